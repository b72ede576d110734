"""The stack of plain.py with what taskapi does too: row-level security, a log line for each request, a rate limit for
each user, and a cache of verified tokens: `uvicorn tests.benchmarks.stacks.equal:app`
"""

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any

from fastapi import HTTPException, Request
from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.benchmarks.stacks import common, plain

SET_USER = "SELECT set_config('role', 'taskapi_user', true), set_config('taskapi.user_id', $1, true)"
RATE = parse("30000/minute")
REFUSED_RATE = parse("1000000000/minute")
MAX_TOKENS = 8_192

log = logging.getLogger("equal")
limiter = FixedWindowRateLimiter(MemoryStorage())
tokens: dict[str, tuple[str, float]] = {}  # the user of each verified token, and when it expires


async def fetch_row(request: Request, statement: str, user: str, *params: object) -> Any:
    async with request.app.state.pool.acquire() as conn, conn.transaction():
        await conn.fetchrow(SET_USER, user)
        return await conn.fetchrow(statement, user, *params)


async def check_user(request: Request, user_id: str, credentials: common.Credentials) -> str:
    found = tokens.get(credentials.credentials) if credentials else None
    if found is None or found[1] <= time.time():
        try:
            claims = common.decode(credentials)
        except HTTPException:
            await limiter.hit(REFUSED_RATE, "refused", request.client.host if request.client else "")
            raise
        found = claims["sub"], claims["exp"]
        if credentials:
            if len(tokens) >= MAX_TOKENS:
                del tokens[next(iter(tokens))]
            tokens[credentials.credentials] = found
    if found[0] != user_id:
        raise HTTPException(403, "The token's subject does not match the user in the URL.")
    if not await limiter.hit(RATE, "user", user_id):
        raise HTTPException(429, "Too many requests.")
    request.state.user = user_id
    return user_id


class Log:
    """Logs a line of JSON for each request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await self._app(scope, receive, send_and_note)
        fields: dict[str, Any] = {"time": datetime.now(UTC).isoformat(), "level": "INFO", "message": "request"}
        fields |= {"method": scope["method"], "route": getattr(scope.get("route"), "path", None)}
        fields |= {"client": scope["client"] and scope["client"][0], "user": scope.get("state", {}).get("user")}
        fields |= {"status": status, "duration_ms": round((time.perf_counter() - started) * 1000, 2)}
        log.info(json.dumps(fields))


logging.basicConfig(level=logging.INFO, format="%(message)s")
app = plain.app
plain.fetch_row = fetch_row
app.dependency_overrides[common.check_user] = check_user
app.add_middleware(Log)
