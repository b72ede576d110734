"""The settings: read from environment variables, and checked before the server starts."""

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

PLACEHOLDER_SECRETS = {
    "change-me-to-the-secret-of-your-better-auth-server",  # .env.example
    "better-auth-secret-12345678901234567890",  # Better Auth's default
}

# An origin as browsers send it: in lower case and without the default port (the Fetch standard, §3.2).
ORIGIN = re.compile(r"(?!http:.*:80$|https:.*:443$)https?://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
STORES = ("memory://", "redis://", "rediss://", "redis+unix://")


class ConfigError(ValueError):
    """A setting is missing or invalid. The text names the environment variable and says what to do."""


@dataclass(frozen=True)
class Settings:
    """The settings of one API; the README's table describes them. Raises ConfigError if a value is invalid."""

    database_url: str | None = field(default=None, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)
    better_auth_url: str | None = None
    jwks_url: str | None = None
    issuers: tuple[str, ...] = ()
    audiences: tuple[str, ...] = ()
    user_claims: tuple[str, ...] = ("sub", "user.id")
    rate_limit: str = "30000/minute"
    max_tasks: int = 100_000
    rate_limit_refused: str = "10000/minute"
    rate_limit_storage: str = field(default="memory://", repr=False)
    cors_origins: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    trusted_proxy: str | None = None
    metrics: tuple[str, int] | None = None
    docs: bool = True

    def __post_init__(self) -> None:
        self._check_secrets()
        self._check_urls()
        self._check_limits()
        if self.max_tasks < 1:
            raise ConfigError("MAX_TASKS is not a number of tasks: 100000")
        if not 0 <= self.port <= 65535:
            raise ConfigError("PORT is not a number from 0 (any free port) to 65535")

    def _check_secrets(self) -> None:
        for secret in self.secrets:
            if secret in PLACEHOLDER_SECRETS:
                raise ConfigError("BETTER_AUTH_SECRET is a published placeholder: set your own secret")
            if len(secret.encode()) < 32:  # RFC 7518 §3.2: a key for HS256 is at least as long as its hash
                raise ConfigError("BETTER_AUTH_SECRET is too short: at least 32 bytes (openssl rand -base64 32)")
            if "-----BEGIN" in secret:  # RFC 8725 §2.1: a public key is no secret
                raise ConfigError("BETTER_AUTH_SECRET is a key in PEM form, which may be public: set a random secret")

    def _check_urls(self) -> None:
        for name, url in (("BETTER_AUTH_URL", self.better_auth_url), ("JWKS_URL", self.jwks_url)):
            if url is not None and not _is_http_url(url):
                raise ConfigError(f"{name} is not an http or https URL: set one such as https://auth.example.com")
        for origin in self.cors_origins:
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"CORS_ORIGINS has {origin!r}, which is not an origin as browsers send it: "
                    "set one such as https://app.example.com"
                )
        try:
            conninfo_to_dict(self.database_url or "")
        except psycopg.Error:  # its text quotes the URL with the password
            raise ConfigError(
                "DATABASE_URL is not a libpq URL: set one such as postgresql://user:password@host/database"
            ) from None
        try:
            ipaddress.ip_network(self.trusted_proxy or "::")
        except ValueError:
            raise ConfigError(
                "TRUSTED_PROXY is not an IP address or network: set one such as 127.0.0.1 or 10.0.0.0/8"
            ) from None

    def _check_limits(self) -> None:
        for name, limit in (("RATE_LIMIT", self.rate_limit), ("RATE_LIMIT_REFUSED", self.rate_limit_refused)):
            try:
                [item] = limits.parse_many(limit)  # only one limit is applied
            except ValueError:
                raise ConfigError(f"{name} is not a rate: set one such as 600/minute") from None
            if not item.amount:
                raise ConfigError(f"{name} allows no request: set a rate such as 600/minute")
        try:
            if not self.rate_limit_storage.startswith(STORES):
                raise ValueError
            if self.rate_limit_storage != "memory://":
                storage_from_string(self.rate_limit_storage)
        except (ConfigurationError, ValueError):  # their texts quote the URL with the password
            raise ConfigError(
                "RATE_LIMIT_STORAGE cannot be used: set a URL such as redis://host:6379, and install taskapi[redis]"
            ) from None

    @property
    def key_set_url(self) -> str | None:
        """The URL of the key set (JWKS), or None."""
        if self.jwks_url or not self.better_auth_url:
            return self.jwks_url
        return self.better_auth_url.rstrip("/") + "/api/auth/jwks"

    @property
    def better_auth_urls(self) -> tuple[str, ...]:
        """The values that Better Auth may write to `iss` and `aud`: its base URL, with or without a final slash."""
        url = (self.better_auth_url or "").rstrip("/")
        return (url, url + "/") if url else ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """The settings in `environ`; an empty variable counts as not set."""
        found: dict[str, Any] = {}
        for name, (member, parse) in VARIABLES.items():
            if value := environ.get(name, "").strip():
                if re.search("[\ud800-\udfff]", value):  # Python decodes bytes that are not UTF-8 as surrogates
                    raise ConfigError(f"{name} is not UTF-8: set it again")
                parsed = parse(value)
                if parsed == ():
                    raise ConfigError(f"{name} has no names: separate names by commas, or leave it unset")
                found[member] = found.get(member, ()) + parsed if member == "secrets" else parsed
        return cls(**found)


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:  # an impossible port or host
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname and re.fullmatch("[!-~]+", url))


def _parse_address(value: str) -> tuple[str, int]:
    found = re.fullmatch("(.+):([0-9]{1,5})", value)
    if found is None or int(found[2]) > 65535:
        raise ConfigError("METRICS is not an address to listen on: set one such as 127.0.0.1:9464")
    return found[1].strip("[]"), int(found[2])


def _parse_switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ConfigError("DOCS must be on or off")
    return value == "on"


def _parse_number(value: str) -> int:
    return int(value) if re.fullmatch("[0-9]{1,9}", value) else -1  # which is out of every range


def _parse_names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _parse_versioned_secrets(value: str) -> tuple[str, ...]:
    """Better Auth's format for secret rotation, `2:new,1:old`. A token may be signed with any of these secrets."""
    versions = [item.partition(":") for item in _parse_names(value)]
    if not versions or not all(number.isdecimal() and colon for number, colon, _ in versions):
        raise ConfigError("BETTER_AUTH_SECRETS is not of the form 2:new-secret,1:old-secret")
    return tuple(secret for _, _, secret in versions)


# For each environment variable: the member of Settings, and the function that parses the value.
VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "DATABASE_URL": ("database_url", str),
    "BETTER_AUTH_SECRETS": ("secrets", _parse_versioned_secrets),  # before BETTER_AUTH_SECRET: the first secret signs
    "BETTER_AUTH_SECRET": ("secrets", lambda secret: (secret,)),
    "BETTER_AUTH_URL": ("better_auth_url", str),
    "JWKS_URL": ("jwks_url", str),
    "JWT_ISSUER": ("issuers", _parse_names),
    "JWT_AUDIENCE": ("audiences", _parse_names),
    "JWT_USER_CLAIM": ("user_claims", _parse_names),
    "MAX_TASKS": ("max_tasks", _parse_number),
    "RATE_LIMIT": ("rate_limit", str),
    "RATE_LIMIT_REFUSED": ("rate_limit_refused", str),
    "RATE_LIMIT_STORAGE": ("rate_limit_storage", str),
    "CORS_ORIGINS": ("cors_origins", _parse_names),
    "TRUSTED_PROXY": ("trusted_proxy", str),
    "METRICS": ("metrics", _parse_address),
    "DOCS": ("docs", _parse_switch),
    "HOST": ("host", str),
    "PORT": ("port", _parse_number),
}
