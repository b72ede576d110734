"""The guard: a request's token becomes its user, or the request ends here with 401 or 403.

flask-jwt-extended makes tokens (the `token` command). It does not check them: its decoder takes a token without
`exp`, answers bad ones with 422, and has one configuration an app, which is the host's where this API is embedded.
The signature is checked by PyJWT, on which it stands; the claims are checked here (RFC 8725 throughout).
"""

import base64
import hashlib
import logging
import re
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import jwt
from flask import Flask, Response, current_app, g, request
from flask_jwt_extended import JWTManager, create_access_token

from .config import ConfigError, Settings
from .keys import ALGORITHMS, KeySet, KeysUnavailable, Secrets
from .limits import Limits
from .logs import refused, request_id
from .problems import problem, unavailable
from .schemas import parse_json, storable

log = logging.getLogger(__name__)

LEEWAY = 10
"""Seconds by which an issuer's clock may be ahead (`nbf`, `iat`). Never granted to `exp`."""

MAX_EXP = 253_402_300_800
"""The year 10000: a token that expires later was not meant to expire."""

MAX_USER_ID = 2_000
"""Bytes of UTF-8: what an index of PostgreSQL can hold beside the other columns of its key."""

MAX_VERIFIED = 8_192
"""Verified tokens that are remembered at most: some 600 bytes each."""

MAX_TEXT = 320
"""Characters of a person's address or name: what RFC 5321 allows an address."""

CHALLENGE = 'Bearer realm="taskapi"'

_BEARER = re.compile(r"bearer +([\w-]+\.[\w-]+\.[\w-]+)", re.ASCII | re.IGNORECASE)  # RFC 7515 §7.1: no padding
_JWS = jwt.PyJWS()


class InvalidToken(Exception):
    """A token that proves nothing; the text may be shown to its sender."""


@dataclass(frozen=True, slots=True)
class User:
    """Who sends a request, as the verified token tells it."""

    id: str
    email: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Trust:
    """Which tokens are accepted: those that one of `keys` signed, and, where any are named, only from these issuers and
    for these audiences."""

    keys: Secrets | KeySet
    issuers: tuple[str, ...]
    audiences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """A token that was found genuine: by which generation of which keys, when it is valid, and whose it is."""

    keys: Secrets | KeySet
    generation: int
    not_before: float
    expires: float
    user: User

    def holds(self) -> bool:
        """Whether it is valid now, and its keys are still those that verified it."""
        return (
            self.not_before <= time.time() + LEEWAY
            and time.time() < self.expires
            and (self.keys.generation == self.generation)
        )


class Guard:
    """Turns tokens into users by one API's settings."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._trusted: dict[str, Trust] = {}  # an algorithm belongs to a kind of key (RFC 8725 §3.1)
        if settings.secrets:
            self._trusted["HS256"] = Trust(Secrets(settings.secrets), settings.issuers, settings.audiences)
        if settings.key_set_url:
            home = settings.better_auth_urls
            trust = Trust(KeySet(settings.key_set_url), settings.issuers or home, settings.audiences or home)
            self._trusted |= {name: trust for names in ALGORITHMS.values() for name in names}
        if not self._trusted:
            raise ConfigError(
                "BETTER_AUTH_SECRET is not set: set it to the secret that signs your tokens, "
                "or BETTER_AUTH_URL or JWKS_URL to where their keys are published"
            )
        self._keys = {trust.keys for trust in self._trusted.values()}
        self._verified: dict[bytes, Verified] = {}
        self._lock = threading.Lock()

    def known(self, token: str) -> User | None:
        """The user of a token that was verified before and still holds: no cryptography.

        Kept under the token's hash, so that the cache holds neither tokens nor anything of their length.
        """
        found = self._verified.get(_digest(token))
        return found.user if found and found.holds() else None

    def user(self, token: str) -> User:
        """The user of a token that is genuine and valid now. Raises InvalidToken, or KeysUnavailable."""
        header = _header(token)
        trust = self._trusted.get(header["alg"]) if isinstance(header.get("alg"), str) else None
        if trust is None or "crit" in header or "b64" in header:
            raise InvalidToken("The token's algorithm is not accepted.")
        generation = trust.keys.generation  # before the keys: if they change now, what follows is verified again
        claims = _genuine_claims(token, header, trust.keys)
        not_before, expires = _validity(claims)
        _check_target(claims, trust)
        if claims.get("type", "access") != "access":  # flask-jwt-extended's refresh tokens are for its issuer only
            raise InvalidToken("The token is of a wrong type.")
        user = User(self._user_id(claims), _text(claims, "email"), _text(claims, "name"))
        self._keep(token, Verified(trust.keys, generation, not_before, expires, user))
        return user

    def key_set_age(self) -> float | None:
        """Seconds since the key set was fetched, if there is one."""
        return next((keys.age for keys in self._keys if isinstance(keys, KeySet)), None)

    def is_ready(self) -> bool:
        """Whether there are keys to verify tokens with; the lack is logged."""
        found = any(keys.is_ready() for keys in self._keys)
        if not found:
            log.error("not ready", extra={"request_id": request_id(), "reason": "no key to verify tokens with"})
        return found

    def _keep(self, token: str, verified: Verified) -> None:
        digest = _digest(token)
        with self._lock:
            self._verified.pop(digest, None)  # verified anew, or by two at once: the newest now
            while len(self._verified) >= MAX_VERIFIED:
                del self._verified[next(iter(self._verified))]  # the oldest
            self._verified[digest] = verified

    def _user_id(self, claims: dict[str, Any]) -> str:
        found = (_find(claims, path) for path in self.settings.user_claims)
        value = next((one for one in found if one is not _MISSING), None)
        if not isinstance(value, str) or not is_user_id(value):
            raise InvalidToken("The token names no user.")
        return value


def is_user_id(value: str) -> bool:
    """Whether anybody can have that id: 1 to MAX_USER_ID bytes of what PostgreSQL can store."""
    return storable(value) and 1 <= len(value.encode()) <= MAX_USER_ID


def guard() -> Response | None:
    """Lets a request through to its view as its user; the blueprint's before_request hook.

    401 without a valid token, 403 where its user is not the one of the URL: before anything else is looked at.
    """
    if request.method == "OPTIONS":
        return None
    limits: Limits = current_app.extensions["taskapi.limits"]
    try:
        user = _user(limits)
    except InvalidToken as error:
        limits.count_refusal(request.remote_addr)
        return _unauthorized(str(error), f'{CHALLENGE}, error="invalid_token", error_description="{error}"')
    except KeysUnavailable:
        refused("The key server cannot be reached.")
        return unavailable("The keys that verify tokens cannot be reached now.")
    if user is None:
        return _unauthorized("A bearer token is required.", CHALLENGE)
    g.taskapi_user = user
    if not _is_user_of_url(user):
        refused("The token's user is not the one of the URL.")
        return problem(403, "The token is good, but its user is not the one of the URL.")
    limits.count_request(user.id)
    return None


def _user(limits: Limits) -> User | None:
    """The request's user, or None where it carries no token."""
    credentials = request.headers.get("Authorization", "")
    if not credentials[:7].lower().startswith("bearer"):
        return None
    the_guard: Guard = current_app.extensions["taskapi.guard"]
    bearer = _BEARER.fullmatch(credentials)
    if bearer and (user := the_guard.known(bearer[1])):
        g.taskapi_remembered = True
        return user
    limits.check_refusals(request.remote_addr)  # before any cryptography
    if not bearer:
        raise InvalidToken("The token is malformed.")
    user = the_guard.user(bearer[1])
    g.taskapi_remembered = False
    return user


def _unauthorized(detail: str, challenge: str) -> Response:
    refused(detail)
    return problem(401, detail, {"WWW-Authenticate": challenge})


def _is_user_of_url(user: User) -> bool:
    """Compares exactly: bytes of the path that are no UTF-8 read as U+FFFD, and that is another user's name."""
    if (request.view_args or {}).get("user_id") != user.id:
        return False
    if "\ufffd" not in user.id:
        return True
    try:
        return bool(request.environ["PATH_INFO"].encode("latin-1").decode())
    except UnicodeDecodeError:
        return False


def _header(token: str) -> dict[str, Any]:
    """What a token says of itself; PyJWT would decode all of it for that, and again to verify it."""
    encoded = token.partition(".")[0]
    try:
        header = parse_json(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise InvalidToken("The token is malformed.")
    return header


def _genuine_claims(token: str, header: dict[str, Any], keys: Secrets | KeySet) -> dict[str, Any]:
    """The claims of a token that one of the keys signed."""
    for key in keys.find(header["alg"], header.get("kid")):
        try:
            claims = parse_json(_JWS.decode(token, key, algorithms=[header["alg"]]))
        except jwt.InvalidSignatureError:
            continue
        except (jwt.PyJWTError, ValueError):
            raise InvalidToken("The token is malformed.") from None
        if isinstance(claims, dict):
            return claims
    raise InvalidToken("The token's signature is not good.")


def _validity(claims: dict[str, Any]) -> tuple[float, float]:
    """From when to when a token is valid (RFC 7519 §4.1.4 to §4.1.6, with `exp` required), if that is now.

    Numbers only: JSON's true is an int in Python.
    """
    now = time.time()
    expires: Any = claims.get("exp")
    if type(expires) not in (int, float) or not 0 < expires < MAX_EXP:
        raise InvalidToken("The token has no usable expiry.")
    if expires <= now:
        raise InvalidToken("The token has expired.")
    starts: list[Any] = [claims[name] for name in ("nbf", "iat") if name in claims]
    for instant in starts:
        if type(instant) not in (int, float) or not instant <= now + LEEWAY:
            raise InvalidToken("The token is not valid yet.")
    return max(starts, default=0), expires


def _check_target(claims: dict[str, Any], trust: Trust) -> None:
    if trust.issuers and claims.get("iss") not in trust.issuers:
        raise InvalidToken("The token is from another issuer.")
    if trust.audiences:
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        if not any(one in trust.audiences for one in audiences):
            raise InvalidToken("The token is for another audience.")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


_MISSING = object()


def _find(claims: dict[str, Any], path: str) -> Any:
    """The claim of that name, or at that dotted path; names may hold dots themselves (https://example.com/id)."""
    if path in claims:
        return claims[path]
    head, _, rest = path.partition(".")
    inner = claims.get(head)
    return _find(inner, rest) if rest and isinstance(inner, dict) else _MISSING


def _text(claims: dict[str, Any], name: str) -> str | None:
    """What a token tells of a person beside the id: nothing that depends on it may fail, so it is taken or left."""
    for path in (name, f"user.{name}"):
        value = _find(claims, path)
        if isinstance(value, str) and len(value) <= MAX_TEXT and storable(value):
            return value
    return None


def issue(settings: Settings, user_id: str, expires: timedelta, email: str | None = None) -> str:
    """A token that this API takes, signed with the newest secret."""
    signer = Flask("taskapi.signer")  # flask-jwt-extended keeps its settings on an app, and the host's are its own
    signer.config["JWT_SECRET_KEY"] = settings.secrets[0]
    signer.config["JWT_ENCODE_ISSUER"] = settings.issuers[0] if settings.issuers else None
    signer.config["JWT_ENCODE_AUDIENCE"] = settings.audiences or None
    signer.config["JWT_COOKIE_CSRF_PROTECT"] = False  # no claim for a cookie that there is not
    JWTManager(signer)
    with signer.app_context():
        claims = {**({"email": email} if email else {}), settings.user_claims[0]: user_id}  # a path is a name, too
        token: str = create_access_token(user_id, expires_delta=expires, additional_claims=claims)
    return token
