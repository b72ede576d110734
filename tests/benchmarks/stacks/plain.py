"""FastAPI and asyncpg, as an expert in both combines them: `uvicorn tests.benchmarks.stacks.plain:app`

PostgreSQL writes the JSON, which is passed through; each statement is prepared once a connection; the pool resets a
connection that is returned, as it does by default. No row-level security, rate limits or log, and of the contract only
what is compared. uvicorn[standard] serves it, with uvloop and httptools.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from fastapi import FastAPI, HTTPException, Request, Response

from tests.benchmarks.stacks.common import Changes, NewTask, User

MEMBERS = "id, user_id, title, description, is_completed, created_at, updated_at, due_at, priority, tags, completed_at"
JSON = f"(SELECT row_to_json(m) FROM (SELECT {MEMBERS}) AS m)"
LIST = f"""
    SELECT coalesce(json_agg(t), '[]')
    FROM (SELECT {MEMBERS} FROM taskapi.tasks WHERE user_id = $1 ORDER BY created_at, id) AS t
"""
GET = f"SELECT {JSON} FROM taskapi.tasks AS t WHERE user_id = $1 AND id = $2"
CREATE = f"""
    WITH owner AS (INSERT INTO taskapi.users (id) VALUES ($1) ON CONFLICT DO NOTHING)
    INSERT INTO taskapi.tasks AS t (user_id, title, description, is_completed, due_at, priority, tags, completed_at)
    VALUES ($1, $2, $3, $4, $5, $6, $7, CASE WHEN $4 THEN now() END)
    RETURNING id, {JSON} AS task
"""
UPDATE = f"""
    UPDATE taskapi.tasks AS t
    SET (title, description, is_completed, due_at, priority, tags, completed_at) = (
            SELECT n.title, n.description, n.is_completed, n.due_at, n.priority, n.tags,
                   CASE WHEN n.is_completed THEN coalesce(t.completed_at, now()) END
            FROM jsonb_populate_record(t, $3::jsonb) AS n
        ),
        updated_at = now()
    WHERE user_id = $1 AND id = $2
    RETURNING {JSON}
"""
COMPLETE = f"""
    UPDATE taskapi.tasks AS t
    SET is_completed = NOT is_completed, completed_at = CASE WHEN NOT is_completed THEN now() END, updated_at = now()
    WHERE user_id = $1 AND id = $2
    RETURNING {JSON}
"""
DELETE = f"DELETE FROM taskapi.tasks AS t WHERE user_id = $1 AND id = $2 RETURNING {JSON}"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], server_settings={"timezone": "UTC"}) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


async def fetch_row(request: Request, statement: str, user: str, *params: object) -> Any:
    return await request.app.state.pool.fetchrow(statement, user, *params)


async def answer(request: Request, statement: str, user: str, *params: object) -> Response:
    """The JSON in the row's only column."""
    row = await fetch_row(request, statement, user, *params)
    if row is None:
        raise HTTPException(404, "No task with this id.")
    return Response(row[0], media_type="application/json")


@app.get("/api/{user_id}/tasks")
async def list_tasks(request: Request, user: User) -> Response:
    return await answer(request, LIST, user)


@app.post("/api/{user_id}/tasks")
async def create_task(request: Request, user: User, body: NewTask) -> Response:
    values = (body.title, body.description, body.is_completed, body.due_at, body.priority, body.tags)
    row = await fetch_row(request, CREATE, user, *values)
    return Response(row["task"], 201, {"Location": f"/api/{user}/tasks/{row['id']}"}, media_type="application/json")


@app.get("/api/{user_id}/tasks/{id}")
async def get_task(request: Request, user: User, id: int) -> Response:
    return await answer(request, GET, user, id)


@app.put("/api/{user_id}/tasks/{id}")
async def update_task(request: Request, user: User, id: int, body: Changes) -> Response:
    if not body.model_fields_set:
        raise HTTPException(422, "At least one field is required.")
    return await answer(request, UPDATE, user, id, body.model_dump_json(exclude_unset=True))


@app.patch("/api/{user_id}/tasks/{id}/complete")
async def toggle_task(request: Request, user: User, id: int) -> Response:
    return await answer(request, COMPLETE, user, id)


@app.delete("/api/{user_id}/tasks/{id}")
async def delete_task(request: Request, user: User, id: int) -> Response:
    return await answer(request, DELETE, user, id)
