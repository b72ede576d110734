"""The rival (a): FastAPI and asyncpg as somebody picks them who knows them well.

PostgreSQL writes the JSON, which is passed through; each statement is prepared once a connection, by asyncpg, whose
pool wipes a connection that is given back, as it does unless told otherwise. No row-level security, no limits, no log,
and of the contract only what is compared. `uvicorn tests.benchmarks.stacks.asyncpg_api:app` serves it, with uvloop and
httptools.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

import asyncpg
import jwt
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

SECRET = os.environ["BETTER_AUTH_SECRET"]

LIST = """
    SELECT coalesce(json_agg(t), '[]')
    FROM (SELECT * FROM taskapi.tasks WHERE user_id = $1 ORDER BY created_at, id) AS t
"""
GET = "SELECT row_to_json(t) FROM taskapi.tasks AS t WHERE user_id = $1 AND id = $2"
CREATE = """
    WITH owner AS (INSERT INTO taskapi.users (id) VALUES ($1) ON CONFLICT DO NOTHING)
    INSERT INTO taskapi.tasks AS t (user_id, title, description, is_completed, due_at, priority, tags, completed_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, CASE WHEN $4 THEN now() END)
    RETURNING id, row_to_json(t) AS task
"""
UPDATE = """
    UPDATE taskapi.tasks AS t
    SET (title, description, is_completed, due_at, priority, tags, completed_at) = (
            SELECT n.title, n.description, n.is_completed, n.due_at, n.priority, n.tags,
                   CASE WHEN n.is_completed THEN coalesce(t.completed_at, now()) END
            FROM jsonb_populate_record(t, $3::jsonb) AS n
        ),
        updated_at = now()
    WHERE user_id = $1 AND id = $2
    RETURNING row_to_json(t)
"""
COMPLETE = """
    UPDATE taskapi.tasks AS t
    SET is_completed = coalesce($3, NOT is_completed),
        completed_at = CASE WHEN coalesce($3, NOT is_completed) THEN coalesce(completed_at, now()) END,
        updated_at = now()
    WHERE user_id = $1 AND id = $2
    RETURNING row_to_json(t)
"""
DELETE = "DELETE FROM taskapi.tasks AS t WHERE user_id = $1 AND id = $2 RETURNING row_to_json(t)"

Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]
Description = Annotated[str, StringConstraints(max_length=10_000)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=50)]


class Changes(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: Title = ""
    description: Description | None = None
    is_completed: bool = False
    due_at: AwareDatetime | None = None
    priority: Literal["none", "low", "medium", "high"] = "none"
    tags: Annotated[list[Tag], Field(max_length=20)] = []


class Task(Changes):
    title: Title


class State(BaseModel):
    is_completed: bool


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keeps a pool of asyncpg's own size, ten connections."""
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], server_settings={"timezone": "UTC"}) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)
bearer = HTTPBearer(auto_error=False)


def unauthorized(detail: str) -> HTTPException:
    return HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})


async def token_user(user_id: str, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> str:
    """The token's user, who must be the one of the URL."""
    if credentials is None:
        raise unauthorized("A bearer token is required.")
    try:
        claims = jwt.decode(credentials.credentials, SECRET, algorithms=["HS256"], options={"require": ["exp", "sub"]})
    except jwt.InvalidTokenError:
        raise unauthorized("The token is not good.") from None
    if claims["sub"] != user_id:
        raise HTTPException(403, "The token's user is not the one of the URL.")
    return user_id


User = Annotated[str, Depends(token_user)]


async def task(request: Request, statement: str, *params: object) -> Response:
    """PostgreSQL's JSON as the answer."""
    found = await request.app.state.pool.fetchval(statement, *params)
    if found is None:
        raise HTTPException(404, "There is no such task.")
    return Response(found, media_type="application/json")


@app.get("/api/{user_id}/tasks")
async def list_tasks(request: Request, user: User) -> Response:
    return await task(request, LIST, user)


@app.post("/api/{user_id}/tasks")
async def create_task(request: Request, user: User, body: Task) -> Response:
    values = (body.title, body.description, body.is_completed, body.due_at, body.priority, body.tags)
    row = await request.app.state.pool.fetchrow(CREATE, user, *values)
    location = f"/api/{user}/tasks/{row['id']}"
    return Response(row["task"], 201, {"Location": location}, media_type="application/json")


@app.get("/api/{user_id}/tasks/{id}")
async def get_task(request: Request, user: User, id: int) -> Response:
    return await task(request, GET, user, id)


@app.put("/api/{user_id}/tasks/{id}")
async def update_task(request: Request, user: User, id: int, body: Changes) -> Response:
    if not body.model_fields_set:
        raise HTTPException(422, "Names nothing to change.")
    return await task(request, UPDATE, user, id, body.model_dump_json(exclude_unset=True))


@app.delete("/api/{user_id}/tasks/{id}")
async def delete_task(request: Request, user: User, id: int) -> Response:
    return await task(request, DELETE, user, id)


@app.patch("/api/{user_id}/tasks/{id}/complete")
async def complete_task(request: Request, user: User, id: int, body: State | None = None) -> Response:
    return await task(request, COMPLETE, user, id, body and body.is_completed)
