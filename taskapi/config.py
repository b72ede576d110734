"""The settings: read from environment variables and a file `.env`, and checked before the server starts."""

import contextlib
import ipaddress
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self
from urllib.parse import urlsplit

import limits
from dotenv import find_dotenv, load_dotenv
from limits.storage import storage_from_string
from psycopg.conninfo import conninfo_to_dict

log = logging.getLogger(__name__)

PLACEHOLDER_SECRETS = {
    "change-me-to-the-secret-of-your-better-auth-server",  # .env.example
    "better-auth-secret-12345678901234567890",  # Better Auth's default
}

# Parts of a database's URL that only these clients understand, and what to do.
FOREIGN_PARTS = {
    r"[?&](schema|connection_limit|pool_timeout|pgbouncer|statement_cache_size|sslaccept)=": ("Prisma", "remove it"),
    r"[?&](sslmode=no-verify)\b": ("node-postgres", "set sslmode=require, which does not verify either"),
    r"^(postgres(?:ql)?\+\w+)://": ("SQLAlchemy", "set postgresql"),
}
# An origin as browsers send it: in lower case and without the default port (the Fetch standard, §3.2). Of any scheme:
# pages of apps and extensions have their own.
ORIGIN = re.compile(
    r"(?!http:.*:80$|https:.*:443$)[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?"
)
STORES = ("memory://", "redis://", "rediss://", "redis+unix://")


class ConfigError(ValueError):
    """A setting is missing or invalid. The text names the environment variable and says what to do."""


def find_origin(url: str) -> str:
    """The origin of an http or https URL, in lower case and without the default port. Raises ValueError for any other
    text."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch("[!-~]+", url):
        raise ValueError("not an http or https URL")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    is_default = parts.port in (None, 443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{host}" + ("" if is_default else f":{parts.port}")


def _check_secrets(values: tuple[str, ...]) -> bool:
    for secret in values:
        if secret in PLACEHOLDER_SECRETS:
            raise ConfigError("BETTER_AUTH_SECRET is a published placeholder: set your own secret")
        if len(secret.encode()) < 32:  # RFC 7518 §3.2: a key for HS256 is at least as long as its hash
            raise ConfigError("BETTER_AUTH_SECRET is too short: at least 32 bytes (openssl rand -base64 32)")
        if "-----BEGIN" in secret:  # RFC 8725 §2.1: a public key is no secret
            raise ConfigError("BETTER_AUTH_SECRET is a key in PEM form, which may be public: set a random secret")
    return True


def _check_database_url(url: str) -> bool:
    """Whether libpq accepts the URL, and takes no part of the password for a part of the address: its messages quote
    the address."""
    for pattern, (client, remedy) in FOREIGN_PARTS.items():
        if found := re.search(pattern, url):
            raise ConfigError(f"DATABASE_URL has {found[1]}, which only {client} understands: {remedy}")
    parts = conninfo_to_dict(url)
    host, port, database = (str(parts.get(name, "")) for name in ("host", "port", "dbname"))
    return "@" not in host[1:] + database and bool(re.fullmatch("[0-9,]*", port))  # a host may start with @


def _check_origins(origins: tuple[str, ...]) -> bool:
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            remedy = "one such as https://app.example.com"
            with contextlib.suppress(ValueError):
                remedy = remedy if "*" in origin else find_origin(origin)
            raise ConfigError(f"CORS_ORIGINS has {origin!r}, which is not an origin as browsers send it: set {remedy}")
    return True


def _check_rate(text: str) -> bool:
    [item] = limits.parse_many(text)  # only one limit is applied
    return item.amount > 0


def _check_store(url: str) -> bool:
    return url.startswith(STORES) and (url == "memory://" or bool(storage_from_string(url)))


def _parse_address(value: str) -> tuple[str, int | None]:
    host, _, port = value.rpartition(":")
    return host.strip("[]"), _parse_number(port)


def _parse_number(value: str) -> int | None:
    return int(value) if re.fullmatch("[0-9]{1,9}", value) else None


def _parse_names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _parse_versioned_secrets(value: str) -> tuple[str, ...]:
    """Better Auth's format for secret rotation, `2:new,1:old`. A token may be signed with any of these secrets."""
    versions = [item.partition(":") for item in _parse_names(value)]
    is_valid = all(number.isdecimal() and colon for number, colon, _ in versions)
    return tuple(secret for _, _, secret in versions) if is_valid else ()


# In this order: the first secret signs.
SECRETS = {"BETTER_AUTH_SECRETS": _parse_versioned_secrets, "BETTER_AUTH_SECRET": lambda secret: (secret,)}
NO_NAMES = "has no names: separate names by commas, or leave it unset"
NOT_DATABASE = (
    "is not a libpq URL: set one such as postgresql://user:password@host/database, "
    "and in the password write @ as %40, / as %2F and % as %25"
)
NOT_SECRETS = "is not of the form 2:new-secret,1:old-secret"
NOT_URL = "is not an http or https URL: set one such as https://auth.example.com"
NOT_TASKS = "is not a number of tasks: set one such as 100000"
NOT_RATE = "is not a rate that allows requests: set one such as 600/minute"
NOT_STORE = "cannot be used: set a URL such as redis://host:6379, and install taskapi[redis]"
NOT_PROXY = "is not an IP address or network: set one such as 127.0.0.1 or 10.0.0.0/8"
NOT_ADDRESS = "is not an address to listen on: set one such as 127.0.0.1:9464"
NOT_HOST = "is not an address: to listen on all addresses set ::, or 0.0.0.0 for those of IPv4"
NOT_PORT = "is not a number from 0 (any free port) to 65535"
PORTS = range(65_536)
SWITCH = {"on": True, "off": False}


def _setting(
    default: Any, variables: dict[str, Any], check: Callable[[Any], object], complaint: str, **options: Any
) -> Any:
    """A member of Settings: the variables that set it, with the functions that parse them; whether a value is valid
    (`check` may also raise an exception); and the message if it is not, or is parsed as () or None."""
    metadata = {"variables": variables, "check": check, "complaint": complaint}
    return field(default=default, metadata=metadata, **options)


@dataclass(frozen=True)
class Settings:
    """The settings of one API; the README's table describes them. Raises ConfigError if a value is invalid."""

    database_url: str | None = _setting(None, {"DATABASE_URL": str}, _check_database_url, NOT_DATABASE, repr=False)
    secrets: tuple[str, ...] = _setting((), SECRETS, _check_secrets, NOT_SECRETS, repr=False)
    better_auth_url: str | None = _setting(None, {"BETTER_AUTH_URL": str}, find_origin, NOT_URL)
    jwks_url: str | None = _setting(None, {"JWKS_URL": str}, find_origin, NOT_URL)
    issuers: tuple[str, ...] = _setting((), {"JWT_ISSUER": _parse_names}, all, NO_NAMES)
    audiences: tuple[str, ...] = _setting((), {"JWT_AUDIENCE": _parse_names}, all, NO_NAMES)
    user_claims: tuple[str, ...] = _setting(("sub", "user.id"), {"JWT_USER_CLAIM": _parse_names}, all, NO_NAMES)
    rate_limit: str = _setting("30000/minute", {"RATE_LIMIT": str}, _check_rate, NOT_RATE)
    max_tasks: int = _setting(100_000, {"MAX_TASKS": _parse_number}, lambda number: number > 0, NOT_TASKS)
    rate_limit_refused: str = _setting("10000/minute", {"RATE_LIMIT_REFUSED": str}, _check_rate, NOT_RATE)
    rate_limit_storage: str = _setting("memory://", {"RATE_LIMIT_STORAGE": str}, _check_store, NOT_STORE, repr=False)
    cors_origins: tuple[str, ...] = _setting((), {"CORS_ORIGINS": _parse_names}, _check_origins, NO_NAMES)
    host: str = _setting("127.0.0.1", {"HOST": str}, lambda host: host != "*", NOT_HOST)
    port: int = _setting(8000, {"PORT": _parse_number}, PORTS.__contains__, NOT_PORT)
    trusted_proxy: str | None = _setting(None, {"TRUSTED_PROXY": str}, ipaddress.ip_network, NOT_PROXY)
    metrics: tuple[str, int] | None = _setting(
        None, {"METRICS": _parse_address}, lambda at: at[0] not in ("", "*") and at[1] in PORTS, NOT_ADDRESS
    )
    docs: bool = _setting(True, {"DOCS": SWITCH.get}, lambda on: on in (True, False), "is not on or off")

    def __post_init__(self) -> None:
        for name, member in VARIABLES.items():
            value = getattr(self, member.name)
            if isinstance(member.default, tuple) and isinstance(value, str):  # its characters would be the values
                raise ConfigError(f"{member.name} is a string: pass a tuple of strings")
            try:
                is_valid = value is None or member.metadata["check"](value)
            except ConfigError:
                raise
            except Exception:  # of many types; its text may quote a password
                is_valid = False
            if not is_valid:
                raise ConfigError(f"{name} {member.metadata['complaint']}")

    @property
    def key_set_url(self) -> str | None:
        """The URL of the key set (JWKS), or None. Better Auth has it below its own path, by default `/api/auth`."""
        if self.jwks_url or not self.better_auth_url:
            return self.jwks_url
        path = urlsplit(self.better_auth_url).path.rstrip("/") or "/api/auth"
        return f"{find_origin(self.better_auth_url)}{path}/jwks"

    @property
    def better_auth_urls(self) -> tuple[str, ...]:
        """What Better Auth writes to `iss` and `aud`: the origin of its URL."""
        return (find_origin(self.better_auth_url),) if self.better_auth_url else ()

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """The settings in `environ`; an empty variable counts as not set."""
        found: dict[str, Any] = {}
        for name, member in VARIABLES.items():
            if value := environ.get(name, "").strip():
                if re.search("[\ud800-\udfff]", value):  # Python decodes bytes that are not UTF-8 as surrogates
                    raise ConfigError(f"{name} is not UTF-8: set it again")
                parsed = member.metadata["variables"][name](value)
                if parsed in ((), None):
                    raise ConfigError(f"{name} {member.metadata['complaint']}")
                found[member.name] = found.get(member.name, ()) + parsed if member.name == "secrets" else parsed
        return cls(**found)


VARIABLES = {name: member for member in fields(Settings) for name in member.metadata["variables"]}


def load_env_file() -> None:
    """Adds the nearest `.env` from the current folder upwards to the environment, which overrides it. Names the file in
    the log. Raises ConfigError."""
    if not (path := find_dotenv(usecwd=True)):
        return
    try:
        load_dotenv(path, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # UTF-16, for example
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"the settings in {path} cannot be read ({reason}): correct or remove the file") from None
    log.info("settings from %s", path)
