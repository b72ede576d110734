"""What an operator decides. The environment is read here and nowhere else, and every value is checked at start."""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import limits
import psycopg
from limits.errors import ConfigurationError
from limits.storage import storage_from_string
from psycopg.conninfo import conninfo_to_dict

KNOWN_TO_EVERYBODY = {
    "change-me-to-the-secret-of-your-better-auth-server",  # .env.example
    "better-auth-secret-12345678901234567890",  # what Better Auth signs with where no secret is set
}

ORIGIN = re.compile(r"(?!http:.*:80$|https:.*:443$)https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
"""In lower case and without the usual port (the Fetch standard, §3.2)."""

STORES = ("redis://", "rediss://", "redis+unix://")


class ConfigError(ValueError):
    """A setting that cannot be used; the text names its variable and the remedy."""


@dataclass(frozen=True)
class Settings:
    """The settings of one mounted API; see the README's table.

    Raises ConfigError where a value cannot be used, whether it comes from the environment or from code.
    """

    database_url: str | None = field(default=None, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    better_auth_url: str | None = None
    jwks_url: str | None = None
    issuers: tuple[str, ...] = ()
    audiences: tuple[str, ...] = ()
    user_claims: tuple[str, ...] = ("sub", "user.id")
    rate_limit: str = "30000/minute"
    rate_limit_refused: str = "10000/minute"
    rate_limit_storage: str = field(default="memory://", repr=False)
    cors_origins: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    web_concurrency: int = 1
    trusted_proxy: str | None = None
    metrics: tuple[str, int] | None = None
    docs: bool = True

    def __post_init__(self) -> None:
        for check in (self._check_secrets, self._check_urls, self._check_limits, self._check_server):
            check()

    def _check_secrets(self) -> None:
        for secret in self.secrets:
            if secret in KNOWN_TO_EVERYBODY:
                raise ConfigError("BETTER_AUTH_SECRET is a placeholder that everybody knows: set your own secret")
            if len(secret.encode()) < 32:  # RFC 7518 §3.2: a key for HS256 is at least as long as its hash
                raise ConfigError("BETTER_AUTH_SECRET is too short: at least 32 bytes (openssl rand -base64 32)")
            if "-----BEGIN" in secret:  # RFC 8725 §2.1: whoever has the public key could sign
                raise ConfigError("BETTER_AUTH_SECRET is a key in PEM form, which may be public: set a random secret")

    def _check_urls(self) -> None:
        for name, url in (("BETTER_AUTH_URL", self.better_auth_url), ("JWKS_URL", self.jwks_url)):
            if url is not None and not _is_http(url):
                raise ConfigError(f"{name} is no http or https URL: https://auth.example.com")
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"CORS_ORIGINS has {origin!r}, which is no origin as browsers send it: https://app.example.com"
                )
        if self.database_url is not None:
            try:
                conninfo_to_dict(self.database_url)
            except psycopg.Error:  # its text quotes the URL, password and all
                raise ConfigError("DATABASE_URL is no libpq URL: postgresql://user:password@host/database") from None

    def _check_limits(self) -> None:
        for name, limit in (("RATE_LIMIT", self.rate_limit), ("RATE_LIMIT_REFUSED", self.rate_limit_refused)):
            try:
                [item] = limits.parse_many(limit)  # of several, the rest would go unheeded
            except ValueError:
                raise ConfigError(f"{name} is no rate: 600/minute") from None
            if not item.amount:
                raise ConfigError(f"{name} lets nobody in: 600/minute")
        if self.rate_limit_storage != "memory://":
            try:
                if not self.rate_limit_storage.startswith(STORES):
                    raise ValueError
                storage_from_string(self.rate_limit_storage)
            except (ConfigurationError, ValueError):  # their texts quote the URL, password and all
                raise ConfigError("RATE_LIMIT_STORAGE cannot be used: redis://host:6379, taskapi[redis]") from None

    def _check_server(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError("PORT is no number from 0 (any free one) to 65535")
        try:
            if self.trusted_proxy is not None and self.trusted_proxy != str(ipaddress.ip_address(self.trusted_proxy)):
                raise ValueError
        except ValueError:
            raise ConfigError("TRUSTED_PROXY is no IP address in its short form: 127.0.0.1, ::1") from None
        if not 1 <= self.web_concurrency <= 64:
            raise ConfigError("WEB_CONCURRENCY is no number from 1 to 64: how many processes serve")

    @property
    def key_set_url(self) -> str | None:
        """Where the keys of asymmetric tokens are published, if anywhere."""
        if self.jwks_url or not self.better_auth_url:
            return self.jwks_url
        return self.better_auth_url.rstrip("/") + "/api/auth/jwks"

    @property
    def better_auth_urls(self) -> tuple[str, ...]:
        """What Better Auth may call itself in `iss` and `aud`: its URL as it was set, with or without a last slash."""
        url = self.better_auth_url
        return (url.rstrip("/"), url.rstrip("/") + "/") if url else ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """The settings that `environ` names; a variable that is empty counts as not set."""
        found: dict[str, Any] = {}
        for name, (member, parse) in VARIABLES.items():
            if value := environ.get(name, "").strip():
                if not _is_text(value):
                    raise ConfigError(f"{name} is not UTF-8: set it anew")
                parsed = parse(value)
                if parsed == ():
                    raise ConfigError(f"{name} names nothing: set names with commas between them, or leave it unset")
                found[member] = found.get(member, ()) + parsed if member == "secrets" else parsed
        return cls(**found)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # no port has that number, no host that name
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and bool(re.fullmatch("[!-~]+", url))


def _number(value: str) -> int:
    """The number, or one that is out of every range."""
    return int(value) if re.fullmatch("[0-9]{1,9}", value) else -1


def _address(value: str) -> tuple[str, int]:
    found = re.fullmatch("(.+):([0-9]{1,5})", value)
    if found is None or int(found[2]) > 65535:
        raise ConfigError("METRICS is no address to listen on: 127.0.0.1:9464")
    return found[1], int(found[2])


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ConfigError("DOCS is neither on nor off")
    return value == "on"


def _is_text(value: str) -> bool:
    """Whether the bytes that the environment brought were UTF-8; Python keeps others as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _versioned_secrets(value: str) -> tuple[str, ...]:
    """Better Auth's rotation form, `2:new,1:old`; what was signed with any of them is good."""
    versions = [item.partition(":") for item in _names(value)]
    if not versions or not all(number.isdecimal() and colon for number, colon, _ in versions):
        raise ConfigError("BETTER_AUTH_SECRETS is not of the form 2:new-secret,1:old-secret")
    return tuple(secret for _, _, secret in versions)


VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "DATABASE_URL": ("database_url", str),
    "BETTER_AUTH_SECRETS": ("secrets", _versioned_secrets),  # before the next: the first secret signs
    "BETTER_AUTH_SECRET": ("secrets", lambda secret: (secret,)),
    "BETTER_AUTH_URL": ("better_auth_url", str),
    "JWKS_URL": ("jwks_url", str),
    "JWT_ISSUER": ("issuers", _names),
    "JWT_AUDIENCE": ("audiences", _names),
    "JWT_USER_CLAIM": ("user_claims", _names),
    "RATE_LIMIT": ("rate_limit", str),
    "RATE_LIMIT_REFUSED": ("rate_limit_refused", str),
    "RATE_LIMIT_STORAGE": ("rate_limit_storage", str),
    "CORS_ORIGINS": ("cors_origins", _names),
    "TRUSTED_PROXY": ("trusted_proxy", str),
    "METRICS": ("metrics", _address),
    "DOCS": ("docs", _switch),
    "HOST": ("host", str),
    "PORT": ("port", _number),
    "WEB_CONCURRENCY": ("web_concurrency", _number),
}
"""Each variable of the environment, with the setting that it fills and how it is read."""
