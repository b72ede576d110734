"""Tokens: verifies them (RFC 8725, JWT best practice), caches the verified ones, and issues tokens for trials.

PyJWT verifies the signature, the issuer and the audience. The times are checked here: PyJWT accepts an `exp` that is a
string, and its leeway would accept an expired token. flask-jwt-extended only issues tokens: it would accept one without
`exp`, answers invalid ones with 422, and has one configuration for the whole app, which may be an embedding app.
"""

import hashlib
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import jwt
from flask import Flask
from flask_jwt_extended import JWTManager, create_access_token

from .config import ConfigError, Settings
from .jwks import ALGORITHMS
from .keys import KeySet, SharedSecrets
from .schemas import is_storable

LEEWAY = 10  # seconds by which the clock of an issuer may be ahead: for `nbf` and `iat`, not for `exp`
MAX_EXP = 253_402_300_800  # the year 10000: a later expiry is an error of the issuer
MAX_USER_ID = 2_000  # bytes of UTF-8: an index of PostgreSQL has no space for more, with the other columns of its key
MAX_CACHED_TOKENS = 8_192  # about 600 bytes each
MAX_TEXT = 320  # characters of an email address (RFC 5321 §4.5.3.1) or name
_NOT_VERIFIED = {f"verify_{claim}": False for claim in ("exp", "nbf", "iat", "sub", "jti")}
_MISSING = object()


class InvalidToken(Exception):
    """A token that is not accepted. The text may be shown to the client."""


@dataclass(frozen=True, slots=True)
class User:
    """The user who sends a request, according to the verified token."""

    id: str
    email: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class TrustedIssuer:
    """Accepts tokens signed by one of `keys`, from one of `issuers` and for one of `audiences`; empty means any."""

    keys: SharedSecrets | KeySet
    issuers: tuple[str, ...]
    audiences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A verified token: its user, when it is valid, and the keys and their generation that verified it."""

    keys: SharedSecrets | KeySet
    generation: int
    not_before: float
    expires: float
    user: User

    def is_valid(self) -> bool:
        """Whether it is valid now, and its keys have not changed."""
        now = time.time()
        return self.not_before <= now + LEEWAY and now < self.expires and self.keys.generation == self.generation


class TokenVerifier:
    """Verifies tokens with the settings of one API. Raises ConfigError if they have neither a secret nor a key set."""

    def __init__(self, settings: Settings) -> None:
        self._user_claims = settings.user_claims
        self._trusted: dict[str, TrustedIssuer] = {}  # an algorithm belongs to one kind of key (RFC 8725 §3.1)
        issuers, audiences = settings.issuers, settings.audiences
        if settings.secrets:
            self._trusted["HS256"] = TrustedIssuer(SharedSecrets(settings.secrets), issuers, audiences)
        if settings.key_set_url:
            default = settings.better_auth_urls
            trusted = TrustedIssuer(KeySet(settings.key_set_url), issuers or default, audiences or default)
            self._trusted |= {name: trusted for names in ALGORITHMS.values() for name in names}
        if not self._trusted:
            raise ConfigError(
                "BETTER_AUTH_SECRET is not set: set it to the secret that signs your tokens, "
                "or BETTER_AUTH_URL or JWKS_URL to where their keys are published"
            )
        self._keys = {trusted.keys for trusted in self._trusted.values()}
        self._cache: dict[bytes, VerifiedToken] = {}  # by the token's digest, so that no token is kept
        self._lock = threading.Lock()

    def cached_user(self, token: str) -> User | None:
        """The user of a token that was verified before and is still valid. Verifies no signature."""
        found = self._cache.get(_digest(token))
        return found.user if found and found.is_valid() else None

    def verify(self, token: str) -> User:
        """The user of a valid token, which is then cached. Raises InvalidToken or KeysUnavailable."""
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise InvalidToken("The token is malformed.") from None
        algorithm = header.get("alg")
        trusted = self._trusted.get(algorithm) if isinstance(algorithm, str) else None
        if trusted is None or "crit" in header or "b64" in header:
            raise InvalidToken("The token's algorithm is not accepted.")
        generation = trusted.keys.generation  # read first: if the keys change now, the next request verifies again
        claims = _verify_signature(token, header, trusted)
        not_before, expires = _check_times(claims)
        if claims.get("type", "access") != "access":  # flask-jwt-extended's refresh tokens are for their issuer only
            raise InvalidToken("The token has the wrong type.")
        user = User(self._user_id(claims), _text_claim(claims, "email"), _text_claim(claims, "name"))
        self._add_to_cache(token, VerifiedToken(trusted.keys, generation, not_before, expires, user))
        return user

    def key_set_age(self) -> float | None:
        """Seconds since the key set was fetched, if there is one."""
        return next((keys.age for keys in self._keys if isinstance(keys, KeySet)), None)

    def is_ready(self) -> bool:
        """Whether there is a key to verify tokens with."""
        return any(keys.is_ready() for keys in self._keys)

    def _add_to_cache(self, token: str, verified: VerifiedToken) -> None:
        digest = _digest(token)
        with self._lock:
            self._cache.pop(digest, None)  # to add it at the end, as the newest
            while len(self._cache) >= MAX_CACHED_TOKENS:
                del self._cache[next(iter(self._cache))]  # the oldest
            self._cache[digest] = verified

    def _user_id(self, claims: dict[str, Any]) -> str:
        found = (_find_claim(claims, path) for path in self._user_claims)
        value = next((value for value in found if value is not _MISSING), None)
        if not isinstance(value, str) or not is_user_id(value):
            raise InvalidToken("The token has no usable user id.")
        return value


def is_user_id(value: str) -> bool:
    """Whether this can be a user's id: 1 to MAX_USER_ID bytes that PostgreSQL can store."""
    return is_storable(value) and 1 <= len(value.encode()) <= MAX_USER_ID


def _verify_signature(token: str, header: dict[str, Any], trusted: TrustedIssuer) -> dict[str, Any]:
    """The claims of a token. Raises InvalidToken unless a key signed it and its issuer and audience are accepted."""
    for key in trusted.keys.find(header["alg"], header.get("kid")):
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[header["alg"]],
                issuer=trusted.issuers or None,
                audience=trusted.audiences or None,
                options={"verify_aud": bool(trusted.audiences), **_NOT_VERIFIED},  # type: ignore[arg-type]
            )
        except jwt.InvalidSignatureError:
            continue
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError, jwt.MissingRequiredClaimError) as error:
            is_about_issuer = isinstance(error, jwt.InvalidIssuerError) or getattr(error, "claim", "") == "iss"
            detail = "from another issuer" if is_about_issuer else "for another audience"
            raise InvalidToken(f"The token is {detail}.") from None
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise InvalidToken("The token is malformed.") from None
    raise InvalidToken("The token's signature is invalid.")


def _check_times(claims: dict[str, Any]) -> tuple[float, float]:
    """The start and the end of a token's validity. Raises InvalidToken if it is not valid now (RFC 7519 §4.1.4-6)."""
    now = time.time()
    expires: Any = claims.get("exp")
    if type(expires) not in (int, float) or not 0 < expires < MAX_EXP:  # isinstance would accept JSON's true
        raise InvalidToken("The token has no usable expiry.")
    if expires <= now:
        raise InvalidToken("The token has expired.")
    starts: list[Any] = [claims[name] for name in ("nbf", "iat") if name in claims]
    for start in starts:
        if type(start) not in (int, float) or not start <= now + LEEWAY:
            raise InvalidToken("The token is not valid yet.")
    return max(starts, default=0), expires


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _find_claim(claims: dict[str, Any], path: str) -> Any:
    """The claim with that name, or at that dotted path. Names may have dots themselves: https://example.com/id."""
    if path in claims:
        return claims[path]
    head, _, rest = path.partition(".")
    inner = claims.get(head)
    return _find_claim(inner, rest) if rest and isinstance(inner, dict) else _MISSING


def _text_claim(claims: dict[str, Any], name: str) -> str | None:
    """The email or name in a token, or None. An invalid one is ignored."""
    for path in (name, f"user.{name}"):
        value = _find_claim(claims, path)
        if isinstance(value, str) and len(value) <= MAX_TEXT and is_storable(value):
            return value
    return None


def issue_token(settings: Settings, user_id: str, expires: timedelta, email: str | None = None) -> str:
    """A token that this API accepts, signed with the first secret."""
    signer = Flask("taskapi.signer")  # an app of its own: an embedding app may have other settings
    signer.config["JWT_SECRET_KEY"] = settings.secrets[0]
    signer.config["JWT_ENCODE_ISSUER"] = settings.issuers[0] if settings.issuers else None
    signer.config["JWT_ENCODE_AUDIENCE"] = settings.audiences or None
    signer.config["JWT_COOKIE_CSRF_PROTECT"] = False  # no claim for a cookie that does not exist
    JWTManager(signer)
    claims = {"email": email} if email else {}
    claims[settings.user_claims[0]] = user_id  # also a path with dots: _find_claim tries the name first
    with signer.app_context():
        token: str = create_access_token(user_id, expires_delta=expires, additional_claims=claims)
    return token
