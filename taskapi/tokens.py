"""Tokens: verifies them (RFC 8725, JWT best practice), caches the verified ones, and issues tokens.

PyJWT verifies the signature, the issuer and the audience. The times are checked here: PyJWT accepts an `exp` that is a
string, and its leeway would accept an expired token. flask-jwt-extended only issues tokens: it would accept one without
`exp`, answers invalid ones with 422, and has one configuration for the whole app, which may be an embedding app.
"""

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import jwt
from flask import Flask
from flask_jwt_extended import JWTManager, create_access_token

from .config import ConfigError, Settings
from .context import get_api
from .keys import ALGORITHMS, KeySet, PublicKey
from .schemas import is_storable

PUBLIC_KEY_ALGORITHMS = [name for names in ALGORITHMS.values() for name in names]
LEEWAY = 10  # seconds by which the clock of an issuer may be ahead: for `nbf` and `iat`, not for `exp`
MAX_EXP = 253_402_300_800  # the year 10000: a later expiry is an error of the issuer
MAX_USER_ID = 2_000  # bytes of UTF-8: an index of PostgreSQL has no space for more, with the other columns of its key
MAX_CACHED_TOKENS = 8_192  # about 600 bytes each
MAX_TEXT = 320  # characters of an email address (RFC 5321 §4.5.3.1) or name


class InvalidToken(Exception):
    """A token that is not accepted. The text may be shown to the client; `remedy` is for the log."""

    def __init__(self, detail: str, remedy: str = "") -> None:
        super().__init__(detail)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class User:
    """The user who sends a request, according to the verified token."""

    id: str
    email: str | None = None
    name: str | None = None


class TokenVerifier:
    """Verifies tokens with the settings of one API. Raises ConfigError if they have neither a secret nor a key set."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._secrets = [secret.encode() for secret in settings.secrets]
        self.key_set = KeySet(settings.key_set_url) if settings.key_set_url else None
        if not self._secrets and not self.key_set:
            raise ConfigError(
                "BETTER_AUTH_SECRET is not set: set it to the secret that signs your tokens, "
                "or BETTER_AUTH_URL or JWKS_URL to where their keys are published"
            )
        # The user of each verified token, when it is valid, and the key set that verified it, or None for a secret; by
        # the token's digest, so that no token is kept.
        self._cache: dict[bytes, tuple[User, float, float, list[PublicKey] | None]] = {}
        self._lock = threading.Lock()

    def cached_user(self, token: str) -> User | None:
        """The user of a token that was verified before, if it is valid now and its keys have not changed."""
        found = self._cache.get(_digest(token))
        if found is None:
            return None
        user, not_before, expires, keys = found
        is_valid = not_before - LEEWAY <= time.time() < expires
        is_current = keys is None or (self.key_set and keys is self.key_set.current())
        return user if is_valid and is_current else None

    def verify(self, token: str) -> User:
        """The user of a valid token, which is then cached. Raises InvalidToken or KeysUnavailable."""
        try:
            claims, keys = self._decode(token)
        except jwt.InvalidSignatureError:
            raise InvalidToken("The token's signature is invalid.") from None
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise InvalidToken("The token is malformed.") from None
        not_before, expires = _check_times(claims)
        if claims.get("type", "access") != "access":  # flask-jwt-extended's refresh tokens are for their issuer only
            raise InvalidToken("The token has the wrong type.")
        user_id = next(_find_claims(claims, *self._settings.user_claims), None)
        if not isinstance(user_id, str) or not is_user_id(user_id):
            raise InvalidToken("The token has no usable user id.")
        user = User(user_id, _find_text(claims, "email"), _find_text(claims, "name"))
        with self._lock:
            self._cache.pop(_digest(token), None)  # to add it at the end, as the newest
            while len(self._cache) >= MAX_CACHED_TOKENS:
                del self._cache[next(iter(self._cache))]  # the oldest
            self._cache[_digest(token)] = user, not_before, expires, keys
        return user

    def _decode(self, token: str) -> tuple[dict[str, Any], list[PublicKey] | None]:
        """The claims of a token, and the key set that verified it, if none of the secrets did. Raises PyJWT's
        exceptions, InvalidToken or KeysUnavailable."""
        header = jwt.get_unverified_header(f"{token.partition('.')[0]}..")  # the rest is decoded below
        algorithm: Any = None if header.keys() & {"crit", "b64"} else header.get("alg")  # no extension is supported
        if self.key_set and algorithm in PUBLIC_KEY_ALGORITHMS:  # it belongs to one kind of key (RFC 8725 §3.1)
            keys = self.key_set.current()  # read first: if the keys change now, the next request verifies again
            candidates, default = self.key_set.find(algorithm, header.get("kid")), self._settings.better_auth_urls
        elif self._secrets and algorithm == "HS256":
            keys, candidates, default = None, self._secrets, ()  # all secrets: no token names the one that signed it
        else:
            remedy = "To accept HS256, set BETTER_AUTH_SECRET." if algorithm == "HS256" else ""
            if algorithm in PUBLIC_KEY_ALGORITHMS:
                remedy = f"To accept {algorithm}, set BETTER_AUTH_URL or JWKS_URL."
            raise InvalidToken("The token's algorithm is not accepted.", remedy)
        issuer, audience = self._settings.issuers or default or None, self._settings.audiences or default or None
        options: Any = {f"verify_{claim}": False for claim in ("exp", "nbf", "iat", "sub", "jti")}
        options["verify_aud"] = audience is not None
        for key in candidates:
            try:
                return jwt.decode(token, key, [algorithm], options, issuer=issuer, audience=audience), keys
            except jwt.InvalidSignatureError:
                continue
            except (jwt.InvalidIssuerError, jwt.InvalidAudienceError, jwt.MissingRequiredClaimError) as error:
                detail, claim, name, expected = "for another audience", "aud", "JWT_AUDIENCE", audience
                if isinstance(error, jwt.InvalidIssuerError) or getattr(error, "claim", "") == "iss":
                    detail, claim, name, expected = "from another issuer", "iss", "JWT_ISSUER", issuer
                found = str(jwt.decode(token, options={"verify_signature": False}).get(claim))[:200]
                remedy = f"Expected {', '.join(expected or ())}, got {found}. To accept that, set {name}."
                raise InvalidToken(f"The token is {detail}.", remedy) from None
        raise jwt.InvalidSignatureError

    def is_ready(self) -> bool:
        """Whether there is a key to verify tokens with."""
        return bool(self._secrets or (self.key_set and self.key_set.is_ready()))


def is_user_id(value: str) -> bool:
    """Whether this can be a user's id: 1 to MAX_USER_ID bytes that PostgreSQL can store."""
    return is_storable(value) and 1 <= len(value.encode()) <= MAX_USER_ID


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


def _find_claims(claims: dict[str, Any], *paths: str) -> Iterator[Any]:
    """The claims with these names, or at these dotted paths, that exist. Names may have dots themselves:
    https://example.com/id."""
    for path in paths:
        head, _, rest = path.partition(".")
        if path in claims:
            yield claims[path]
        elif rest and isinstance(inner := claims.get(head), dict):
            yield from _find_claims(inner, rest)


def _find_text(claims: dict[str, Any], name: str) -> str | None:
    """The email or name in a token, or None. An invalid one is ignored."""
    found = _find_claims(claims, name, f"user.{name}")
    return next((text for text in found if isinstance(text, str) and len(text) <= MAX_TEXT and is_storable(text)), None)


def issue_token(
    user_id: str,
    *,
    expires: timedelta = timedelta(minutes=15),
    email: str | None = None,
    name: str | None = None,
    app: Flask | None = None,
) -> str:
    """A token for `user_id` that the API in `app`, by default the current app, accepts until `expires` has passed.

    For the signed-in user of an embedding app, and for trials. `email` and `name` are stored with the first task.
    Raises ConfigError without the API or its secret, and ValueError if `user_id` or `expires` would be refused.
    """
    settings = get_api(app).settings
    if not settings.secrets:
        raise ConfigError("BETTER_AUTH_SECRET is not set: only your issuer can sign tokens")
    if not isinstance(user_id, str) or not is_user_id(user_id):
        raise ValueError(f"the user id {user_id!r} is not a string of 1 to {MAX_USER_ID:,} bytes of UTF-8")
    if not isinstance(expires, timedelta) or expires <= timedelta(0):  # a token without `exp` would be issued for 0
        raise ValueError(f"expires {expires!r} is not a positive timedelta")
    signer = Flask("taskapi.signer")  # an app of its own: an embedding app may have other settings
    signer.config["JWT_SECRET_KEY"] = settings.secrets[0]
    signer.config["JWT_ENCODE_ISSUER"] = settings.issuers[0] if settings.issuers else None
    signer.config["JWT_ENCODE_AUDIENCE"] = settings.audiences or None
    signer.config["JWT_COOKIE_CSRF_PROTECT"] = False  # no claim for a cookie that does not exist
    JWTManager(signer)
    claims = {claim: value for claim, value in (("email", email), ("name", name)) if value}
    claims[settings.user_claims[0]] = user_id  # also a path with dots: _find_claims tries the name first
    with signer.app_context():
        token: str = create_access_token(user_id, expires_delta=expires, additional_claims=claims)
    return token
