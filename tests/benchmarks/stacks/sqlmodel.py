"""FastAPI and SQLModel, as most tutorials combine them: `uvicorn tests.benchmarks.stacks.sqlmodel:app`

Synchronous sessions, a dependency that queries the user in each request, and models that validate and serialise each
answer.
"""

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Response
from sqlalchemy import ARRAY, BigInteger, DateTime, Text
from sqlmodel import Field, Session, SQLModel, col, create_engine, select

from tests.benchmarks.stacks import common


def now() -> datetime:
    return datetime.now(UTC)


class User(SQLModel, table=True):
    __tablename__ = "users"
    __table_args__ = {"schema": "taskapi"}

    id: str = Field(primary_key=True)
    email: str | None = None
    name: str | None = None


class Task(SQLModel, table=True):
    __tablename__ = "tasks"
    __table_args__ = {"schema": "taskapi"}

    id: int | None = Field(default=None, primary_key=True, sa_type=BigInteger, sa_column_kwargs={"autoincrement": True})
    user_id: str = Field(primary_key=True, foreign_key="taskapi.users.id")
    title: str
    description: str | None = None
    is_completed: bool = False
    due_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))
    priority: str = "none"
    tags: list[str] = Field(default=[], sa_type=ARRAY(Text))
    created_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    updated_at: datetime = Field(default_factory=now, sa_type=DateTime(timezone=True))
    completed_at: datetime | None = Field(default=None, sa_type=DateTime(timezone=True))


class TaskPublic(common.Changes):
    id: int
    user_id: str
    created_at: datetime
    updated_at: datetime
    completed_at: datetime | None


THREADS = 40
"""FastAPI's threads for synchronous functions, and connections of the pool. With fewer connections all threads can come
to wait for one, and none is left to return one: with SQLAlchemy's default of 15 this API hangs at 64 clients."""

engine = create_engine(
    os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:"), pool_size=THREADS, max_overflow=0
)
app = FastAPI()


def new_session() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


Database = Annotated[Session, Depends(new_session)]


def current_user(id: common.User, session: Database) -> User:
    """The user's row, made at the first request."""
    user = session.get(User, id)
    if user is None:
        user = User(id=id)
        session.add(user)
        session.commit()
    return user


CurrentUser = Annotated[User, Depends(current_user)]


def find(session: Session, user: User, id: int) -> Task:
    task = session.exec(select(Task).where(Task.id == id, Task.user_id == user.id)).first()
    if task is None:
        raise HTTPException(404, "No task with this id.")
    return task


def save(session: Session, task: Task) -> Task:
    task.updated_at = now()
    task.completed_at = (task.completed_at or task.updated_at) if task.is_completed else None
    session.add(task)
    session.commit()
    session.refresh(task)
    return task


@app.get("/api/{user_id}/tasks", response_model=list[TaskPublic])
def list_tasks(session: Database, user: CurrentUser) -> Sequence[Task]:
    tasks = select(Task).where(Task.user_id == user.id)
    return session.exec(tasks.order_by(col(Task.created_at), col(Task.id))).all()


@app.post("/api/{user_id}/tasks", response_model=TaskPublic, status_code=201)
def create_task(session: Database, user: CurrentUser, body: common.NewTask, response: Response) -> Task:
    task = save(session, Task(**body.model_dump(), user_id=user.id))
    response.headers["Location"] = f"/api/{task.user_id}/tasks/{task.id}"
    return task


@app.get("/api/{user_id}/tasks/{id}", response_model=TaskPublic)
def get_task(session: Database, user: CurrentUser, id: int) -> Task:
    return find(session, user, id)


@app.put("/api/{user_id}/tasks/{id}", response_model=TaskPublic)
def update_task(session: Database, user: CurrentUser, id: int, body: common.Changes) -> Task:
    changes = body.model_dump(exclude_unset=True)
    if not changes:
        raise HTTPException(422, "At least one field is required.")
    task = find(session, user, id)
    return save(session, task.sqlmodel_update(changes))


@app.patch("/api/{user_id}/tasks/{id}/complete", response_model=TaskPublic)
def toggle_task(session: Database, user: CurrentUser, id: int) -> Task:
    task = find(session, user, id)
    task.is_completed = not task.is_completed
    return save(session, task)


@app.delete("/api/{user_id}/tasks/{id}", response_model=TaskPublic)
def delete_task(session: Database, user: CurrentUser, id: int) -> Task:
    task = find(session, user, id)
    session.delete(task)
    session.commit()
    return task
