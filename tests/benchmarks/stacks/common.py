"""What the FastAPI stacks use: the models of bodies, and the check of the token."""

import os
from typing import Annotated, Any, Literal

import jwt
from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

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


class NewTask(Changes):
    title: Title


def unauthorized(detail: str) -> HTTPException:
    return HTTPException(401, detail, {"WWW-Authenticate": "Bearer"})


def decode(credentials: HTTPAuthorizationCredentials | None) -> dict[str, Any]:
    """The claims of a valid token; 401 for any other."""
    if credentials is None:
        raise unauthorized("A bearer token is required.")
    secret, required = os.environ["BETTER_AUTH_SECRET"], ["exp", "sub"]
    try:
        return jwt.decode(credentials.credentials, secret, algorithms=["HS256"], options={"require": required})
    except jwt.InvalidTokenError:
        raise unauthorized("The token is invalid.") from None


def check_user(
    user_id: str, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
) -> str:
    """The token's subject, which must be the user of the URL."""
    if decode(credentials)["sub"] != user_id:
        raise HTTPException(403, "The token's subject does not match the user in the URL.")
    return user_id


User = Annotated[str, Depends(check_user)]
