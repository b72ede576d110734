"""The key set of an issuer (JWKS, RFC 7517): downloads it within limits, and selects the keys that verify tokens."""

import http.client
import json
import re
import time
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError

import jwt

from . import VERSION

TIMEOUT = 2  # seconds to connect, for each part, and for the whole body; a slower issuer counts as down
MAX_BYTES = 256 * 1024  # enough for 500 RSA keys; issuers publish fewer than ten
MIN_RSA_BITS = 2048  # RFC 7518 §3.3

ALGORITHMS = {
    ("OKP", "Ed25519"): ("EdDSA",),
    ("OKP", "Ed448"): ("EdDSA",),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
}
"""The algorithms that a public key may verify, by its `kty` and `crv`. `oct` is a secret: it must stay private."""


@dataclass(frozen=True)
class PublicKey:
    """A public key, and the algorithms that it may verify."""

    kid: str | None
    algorithms: tuple[str, ...]
    key: Any


def parse_key_set(document: Any) -> tuple[PublicKey, ...]:
    """The keys of a JWKS that may verify tokens; others are ignored. Raises ValueError if it is not a JWKS."""
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("the response is not a JSON Web Key Set")
    return tuple(key for jwk in document["keys"] if (key := _parse_key(jwk)))


def _parse_key(jwk: Any) -> PublicKey | None:
    try:
        algorithms = tuple(name for name in ALGORITHMS[jwk["kty"], jwk.get("crv")] if jwk.get("alg", name) == name)
        is_for_signatures = jwk.get("use", "sig") == "sig" and "verify" in jwk.get("key_ops", ["verify"])
        if not algorithms or not is_for_signatures or "d" in jwk:  # "d": a private key, now public
            return None
        key: Any = jwt.get_algorithm_by_name(algorithms[0]).from_jwk(jwk)
        if jwk["kty"] == "RSA" and key.key_size < MIN_RSA_BITS:
            return None
        kid = jwk.get("kid")
        return PublicKey(kid if isinstance(kid, str) else None, algorithms, key)
    except Exception:  # of many types, from PyJWT and cryptography; one malformed key must not disable the other keys
        return None


def redact_url(url: str) -> str:
    """The URL without the parts that may contain a password."""
    return re.split("[?#]", _without_user(url))[0]


def _without_user(url: str) -> str:
    return re.sub("(?<=//)[^/?#]*@", "", url, count=1)


class KeySetClient(jwt.PyJWKClient):
    """PyJWT's client, with limits of bytes and of time.

    Use `fetch_keys`, not `get_jwk_set`: that fails if the set is empty, as at a new issuer, or if one key is malformed.
    """

    def __init__(self, url: str) -> None:
        headers = {"User-Agent": f"taskapi/{VERSION}", "Accept": "*/*"}
        url = _without_user(url)  # urllib would take user@host for the host name
        super().__init__(url, cache_jwk_set=False, headers=headers)

    def fetch_keys(self) -> tuple[PublicKey, ...]:
        """The keys at the URL that may verify tokens. Raises ValueError with a reason in one line."""
        try:
            return parse_key_set(self.fetch_data())
        except (OSError, http.client.HTTPException, RecursionError) as error:
            raise ValueError(str(error.reason if isinstance(error, URLError) else error)) from error

    def fetch_data(self) -> Any:
        """The JSON at the URL. Redirects are not followed; a proxy that the environment names is used."""
        request = urllib.request.Request(self.uri, headers=self.headers)  # noqa: S310 (PyJWT takes only http and https)
        deadline = time.monotonic() + TIMEOUT
        raw = b""
        with urllib.request.build_opener(_AnyStatus).open(request, timeout=TIMEOUT) as response:
            if response.status != 200:
                raise ValueError(f"the server answered {response.status}")
            while part := response.read1(MAX_BYTES):
                raw += part
                if len(raw) > MAX_BYTES:
                    raise ValueError(f"the response has more than {MAX_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
        return json.loads(raw)


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Returns every response unchanged. urllib would follow a redirect, and raise an exception for an error status."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response
