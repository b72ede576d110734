"""Settings: which values are refused, and that none of them shows a secret."""

import secrets
from re import escape

import pytest

from taskapi import ConfigError, Settings
from tests.people import SECRET

NOT_ORIGINS = [
    *("*", "null", "a.example", "https://", "https://a.example/", "https://a.example/a", "https://a?b", "https://é"),
    *("ftp://a.example", "https://A.example", "https://a.example:443", "http://a.example:80", "https://*.example"),
    *("https://ann@a.example", "https://a.example:x", "https://a b"),
]


@pytest.mark.parametrize(
    ("name", "message", "values"),
    [
        ("BETTER_AUTH_SECRET", "BETTER_AUTH_SECRET is too short", ["short", "é" * 15]),
        ("BETTER_AUTH_SECRET", "BETTER_AUTH_SECRET is not UTF-8", ["\udcff" * 32]),
        ("BETTER_AUTH_SECRET", ".* placeholder", ["change-me-to-the-secret-of-your-better-auth-server"]),
        ("BETTER_AUTH_SECRET", ".* placeholder", ["better-auth-secret-12345678901234567890"]),
        ("BETTER_AUTH_SECRETS", "BETTER_AUTH_SECRETS is not of the form", ["x" * 32, f"a:{'x' * 32}", ","]),
        ("BETTER_AUTH_SECRETS", "BETTER_AUTH_SECRET is too short", ["2:short,1:x"]),
        ("DATABASE_URL", "DATABASE_URL is not a libpq URL", ["what://is.this"]),
        ("JWKS_URL", "JWKS_URL is not an http or https URL", ["ftp://h/keys", "http://h:99999/", "https://h/a b"]),
        ("BETTER_AUTH_URL", "BETTER_AUTH_URL is not an http or https URL", ["http://[::1", "auth.example.com"]),
        ("JWT_USER_CLAIM", "JWT_USER_CLAIM has no names", [","]),
        ("PORT", "PORT is not a number", ["x", "-1", "٣", "65536"]),
        *(("CORS_ORIGINS", f"CORS_ORIGINS has '{escape(one)}', which is not an origin", [one]) for one in NOT_ORIGINS),
    ],
)
def test_invalid_values_are_refused_by_the_name_of_the_variable(name: str, message: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{message}"):
            Settings.from_env({name: value})


def test_an_empty_variable_counts_as_not_set_and_origins_are_separated_by_commas() -> None:
    given = {"DATABASE_URL": " ", "PORT": "", "CORS_ORIGINS": " https://a.example ,http://[::1]:5173,"}
    assert Settings.from_env(given) == Settings(cors_origins=("https://a.example", "http://[::1]:5173"))


def test_settings_never_show_their_secrets() -> None:
    password = secrets.token_hex(8)
    shown = repr(Settings(database_url=f"postgresql://u:{password}@h/d", secrets=(SECRET,)))
    assert SECRET not in shown
    assert password not in shown
    with pytest.raises(ConfigError) as caught:
        Settings(database_url=f"postgresql://u:{password}@h:x y/d")
    assert password not in str(caught.value)
