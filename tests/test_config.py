"""Settings: which values are refused, and that none of them shows a secret."""

from re import escape
from typing import Any

import pytest

from taskapi import ConfigError, Settings
from tests.people import SECRET

NOT_ORIGINS = [
    *("*", "null", "a.example", "https://", "https://a.example/", "https://a.example/a", "https://a?b", "https://é"),
    *("tauri://localhost/", "https://A.example", "https://a.example:443", "http://a.example:80", "https://*.example"),
    *("https://ann@a.example", "https://a.example:x", "https://a b"),
]
RATES = ["x", "600", "-5/minute", "0/minute", "1.5/second", "600/fortnight", "600/minute;5/second"]
STORAGES = ["x", "http://127.0.0.1", "async+memory://", "redis://[", "redis://u:hunter2@h:x", "foo://u:hunter2@h"]
PROXIES = ["x", "localhost", "127.0.0.1:80", "10.0.0.1/8", "*", "::/129"]
DATABASE = "postgresql://ann@h/d"
PASSWORDS = [f"postgresql://ann:{password}@h/d" for password in ("pa@ss", "pa/ss", "12/34", "a@b:c", "p?@q", "p%")]


@pytest.mark.parametrize(
    ("name", "message", "values"),
    [
        ("BETTER_AUTH_SECRET", "BETTER_AUTH_SECRET is too short", ["short", "é" * 15]),
        ("BETTER_AUTH_SECRET", "BETTER_AUTH_SECRET is not UTF-8", ["\udcff" * 32]),
        ("BETTER_AUTH_SECRET", ".* placeholder", ["change-me-to-the-secret-of-your-better-auth-server"]),
        ("BETTER_AUTH_SECRET", ".* placeholder", ["better-auth-secret-12345678901234567890"]),
        ("BETTER_AUTH_SECRET", ".* is a key in PEM form", ["-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA"]),
        ("BETTER_AUTH_SECRETS", "BETTER_AUTH_SECRETS is not of the form", ["x" * 32, f"a:{'x' * 32}", ","]),
        ("BETTER_AUTH_SECRETS", "BETTER_AUTH_SECRET is too short", ["2:short,1:x"]),
        ("DATABASE_URL", "DATABASE_URL is not a libpq URL.* @ as %40", [*PASSWORDS, "what://is.this"]),
        ("DATABASE_URL", "DATABASE_URL is not a libpq URL", ["postgresql://u:hunter2@h:x y/d"]),
        ("DATABASE_URL", "DATABASE_URL has schema, which only Prisma .*: remove it$", [f"{DATABASE}?schema=public"]),
        ("DATABASE_URL", "DATABASE_URL has sslmode=no-verify, .*: set sslmode=req", [f"{DATABASE}?sslmode=no-verify"]),
        ("DATABASE_URL", "DATABASE_URL has postgresql.psycopg, .*: set postgresql$", ["postgresql+psycopg://h/d"]),
        ("CORS_ORIGINS", "CORS_.* has .*: set https://a.example$", ["https://a.example/", "HTTPS://A.Example:443/b/"]),
        ("HOST", "HOST is not an address: .* set ::, or 0.0.0.0", ["*"]),
        ("TRUSTED_PROXY", "TRUSTED_PROXY is not an IP address or network.*: .*10.0.0.0/8", PROXIES),
        ("JWKS_URL", "JWKS_URL is not an http or https URL", ["ftp://h/keys", "http://h:99999/", "https://h/a b"]),
        ("BETTER_AUTH_URL", "BETTER_AUTH_URL is not an http or https URL", ["http://[::1", "auth.example.com"]),
        ("JWT_USER_CLAIM", "JWT_USER_CLAIM has no names", [","]),
        ("PORT", "PORT is not a number", ["x", "-1", "٣", "65536"]),
        ("DOCS", "DOCS ", ["false"]),
        ("METRICS", "METRICS ", ["9464", "127.0.0.1:", "127.0.0.1:x", ":9464", "127.0.0.1:99999", f"h:{'9' * 5000}"]),
        *((name, f"{name} .*: .*600/minute", RATES) for name in ("RATE_LIMIT", "RATE_LIMIT_REFUSED")),
        ("RATE_LIMIT_STORAGE", "RATE_LIMIT_STORAGE .*: .*redis://host:6379", STORAGES),
        *(("CORS_ORIGINS", f"CORS_ORIGINS has '{escape(one)}', which is not an origin", [one]) for one in NOT_ORIGINS),
    ],
)
def test_invalid_values_are_refused_by_the_name_of_the_variable(name: str, message: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{message}") as caught:
            Settings.from_env({name: value})
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("name", ["secrets", "issuers", "audiences", "user_claims", "cors_origins"])
def test_string_instead_of_a_tuple_is_refused(name: str) -> None:
    values: dict[str, Any] = {name: "https://a.example" * 2}
    with pytest.raises(ConfigError, match=f"^{name} is a string: pass a tuple"):
        Settings(**values)


def test_an_empty_variable_counts_as_not_set_and_origins_are_separated_by_commas() -> None:
    origins = ("https://a.example", "http://[::1]:5173", "app-2://localhost")
    given = {"DATABASE_URL": " ", "PORT": "", "CORS_ORIGINS": f" {' ,'.join(origins)},"}
    assert Settings.from_env(given) == Settings(cors_origins=origins)


URLS = [(url, "https://a.example", "/api/auth") for url in ("https://a.example", "HTTPS://A.Example:443/")]
URLS += [("http://a.example:80/auth/v2//?x=1", "http://a.example", "/auth/v2")]
URLS += [("http://ann:p@[::1]:3000", "http://[::1]:3000", "/api/auth")]


@pytest.mark.parametrize(("url", "origin", "path"), URLS)
def test_better_auth_url_means_what_it_means_to_better_auth(url: str, origin: str, path: str) -> None:
    settings = Settings(better_auth_url=url)
    assert (settings.key_set_url, settings.better_auth_urls) == (f"{origin}{path}/jwks", (origin,))
    assert Settings(better_auth_url=url, jwks_url="https://b.example/k").key_set_url == "https://b.example/k"


def test_urls_of_libpq_are_accepted() -> None:
    for end in ("ann:p%40ss@h:1/d", "/d?host=@abstract", "h1:1,h2:2/d?sslmode=require", "[::1]/d", "ann:p?#@h"):
        assert Settings(database_url=f"postgresql://{end}")


def test_settings_never_show_their_secrets() -> None:
    shown = repr(Settings(database_url="postgresql://u:hunter2@h/d", secrets=(SECRET,)))
    assert "hunter2" not in shown
    assert SECRET not in shown
