"""What the FastAPI stacks use: the models of bodies, and the check of the token."""

import os
from typing import Annotated, Any, Literal

import jwt
from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=50)]


class Changes(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: Title = ""
    description: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    is_completed: bool = False
    due_at: AwareDatetime | None = None
    priority: Literal["none", "low", "medium", "high"] = "none"
    tags: Annotated[list[Tag], Field(max_length=20)] = []


class NewTask(Changes):
    title: Title


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def decode(credentials: HTTPAuthorizationCredentials | None) -> dict[str, Any]:
    """The claims of a valid token; 401 for any other."""
    token, secret = credentials.credentials if credentials else "", os.environ["BETTER_AUTH_SECRET"]
    try:
        return jwt.decode(token, secret, algorithms=["HS256"], options={"require": ["exp", "sub"]})
    except jwt.InvalidTokenError:
        raise HTTPException(401, "A valid bearer token is required.", {"WWW-Authenticate": "Bearer"}) from None


def check_user(user_id: str, credentials: Credentials) -> str:
    """The token's subject, which must be the user of the URL."""
    if decode(credentials)["sub"] != user_id:
        raise HTTPException(403, "The token's subject does not match the user in the URL.")
    return user_id


User = Annotated[str, Depends(check_user)]
