"""The rival (b): FastAPI and SQLModel as most tutorials have it, and as the documents describe that this API grew from.

Synchronous sessions, a dependency that looks the user up for every request, models that check
and write every answer. `uvicorn tests.benchmarks.stacks.sqlmodel_api:app` serves it.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated

import jwt
from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AwareDatetime, StringConstraints
from sqlalchemy import ARRAY, BigInteger, DateTime, Text
from sqlmodel import Field, Session, SQLModel, col, create_engine, select

SECRET = os.environ["BETTER_AUTH_SECRET"]

Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]
Description = Annotated[str, StringConstraints(max_length=10_000)]
Priority = Annotated[str, StringConstraints(pattern="^(none|low|medium|high)$")]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=50)]


def now() -> datetime:
    return datetime.now(UTC)


class User(SQLModel, table=True):
    __tablename__ = "users"
    __table_args__ = {"schema": "taskapi"}

    id: str = Field(primary_key=True)
    email: str | None = None
    name: str | None = None


class TaskBase(SQLModel):
    title: Title
    description: Description | None = None
    is_completed: bool = False
    due_at: AwareDatetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    priority: Priority = "none"
    tags: list[Tag] = Field(default=[], max_length=20, sa_type=ARRAY(Text))


class Task(TaskBase, table=True):
    __tablename__ = "tasks"
    __table_args__ = {"schema": "taskapi"}

    id: int | None = Field(default=None, primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": True})
    user_id: str = Field(primary_key=True, foreign_key="taskapi.users.id")
    created_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    updated_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    completed_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))


class TaskCreate(TaskBase):
    model_config = {"extra": "forbid"}


class TaskUpdate(SQLModel):
    model_config = {"extra": "forbid"}

    title: Title = ""
    description: Description | None = None
    is_completed: bool = False
    due_at: AwareDatetime | None = None
    priority: Priority = "none"
    tags: list[Tag] = Field(default=[], max_length=20)


class TaskState(SQLModel):
    is_completed: bool


class TaskPublic(TaskBase):
    id: int
    user_id: str
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None


THREADS = 40
"""On which FastAPI runs what is not async. With fewer connections they can all come to wait for one, and then nobody
has a thread left in which to give one back: with SQLAlchemy's own 15 this API stands still at 64 clients."""

URL = os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:")
engine = create_engine(URL, pool_size=THREADS, max_overflow=0)
app = FastAPI()
bearer = HTTPBearer(auto_error=False)


def new_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


Database = Annotated[Session, Depends(new_session)]


def current_user(
    user_id: str, session: Database, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> User:
    """The token's user, who must be the one of the URL; made at the first request."""
    if credentials is None:
        raise HTTPException(401, "A bearer token is required.", {"WWW-Authenticate": "Bearer"})
    try:
        claims = jwt.decode(credentials.credentials, SECRET, algorithms=["HS256"], options={"require": ["exp", "sub"]})
    except jwt.InvalidTokenError:
        raise HTTPException(401, "The token is not good.", {"WWW-Authenticate": "Bearer"}) from None
    if claims["sub"] != user_id:
        raise HTTPException(403, "The token's user is not the one of the URL.")
    user = session.get(User, user_id)
    if user is None:
        user = User(id=user_id)
        session.add(user)
        session.commit()
    return user


CurrentUser = Annotated[User, Depends(current_user)]


def find(session: Session, user: User, id: int) -> Task:
    task = session.exec(select(Task).where(Task.id == id, Task.user_id == user.id)).first()
    if task is None:
        raise HTTPException(404, "There is no such task.")
    return task


def save(session: Session, task: Task) -> Task:
    task.completed_at = (task.completed_at or now()) if task.is_completed else None
    session.add(task)
    session.commit()
    session.refresh(task)
    return task


@app.get("/api/{user_id}/tasks", response_model=list[TaskPublic])
def list_tasks(session: Database, user: CurrentUser) -> Sequence[Task]:
    tasks = select(Task).where(Task.user_id == user.id)
    return session.exec(tasks.order_by(col(Task.created_at), col(Task.id))).all()


@app.post("/api/{user_id}/tasks", response_model=TaskPublic, status_code=201)
def create_task(session: Database, user: CurrentUser, body: TaskCreate, response: Response) -> Task:
    task = save(session, Task(**body.model_dump(), user_id=user.id))
    response.headers["Location"] = f"/api/{task.user_id}/tasks/{task.id}"
    return task


@app.get("/api/{user_id}/tasks/{id}", response_model=TaskPublic)
def get_task(session: Database, user: CurrentUser, id: int) -> Task:
    return find(session, user, id)


@app.put("/api/{user_id}/tasks/{id}", response_model=TaskPublic)
def update_task(session: Database, user: CurrentUser, id: int, body: TaskUpdate) -> Task:
    changes = body.model_dump(exclude_unset=True)
    if not changes:
        raise HTTPException(422, "Names nothing to change.")
    task = find(session, user, id)
    task.sqlmodel_update(changes, update={"updated_at": now()})
    return save(session, task)


@app.delete("/api/{user_id}/tasks/{id}", response_model=TaskPublic)
def delete_task(session: Database, user: CurrentUser, id: int) -> Task:
    task = find(session, user, id)
    session.delete(task)
    session.commit()
    return task


@app.patch("/api/{user_id}/tasks/{id}/complete", response_model=TaskPublic)
def complete_task(session: Database, user: CurrentUser, id: int, body: TaskState | None = None) -> Task:
    task = find(session, user, id)
    task.is_completed = body.is_completed if body else not task.is_completed
    task.updated_at = now()
    return save(session, task)
