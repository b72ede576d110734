"""The client's address and URL as a trusted proxy reports them."""

import ipaddress
import re
from collections.abc import Iterable
from typing import Any

from werkzeug.middleware.proxy_fix import ProxyFix

FIELDS = tuple(f"HTTP_X_FORWARDED_{name}" for name in ("FOR", "PROTO", "HOST", "PORT", "PREFIX"))


class TrustedProxy:
    """WSGI middleware: takes X-Forwarded-* from a proxy in `network`, and removes them from all other requests."""

    def __init__(self, app: Any, network: str) -> None:
        self._app = app
        self._network = ipaddress.ip_network(network)
        self._proxy_fix = ProxyFix(app, x_for=1, x_proto=1, x_host=1, x_prefix=1)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        peer = parse_address(environ.get("REMOTE_ADDR", ""))
        # Only the last value is from the proxy. The values before it are from the client.
        fields = {name: environ.pop(name).rpartition(",")[2].strip() for name in FIELDS if name in environ}
        fields = {name: value for name, value in fields.items() if re.fullmatch("[!-~]+", value)}
        if peer is None or peer not in self._network:
            return self._app(environ, start_response)  # type: ignore[no-any-return]
        client = parse_address(fields.pop("HTTP_X_FORWARDED_FOR", ""))
        if client:
            fields["HTTP_X_FORWARDED_FOR"] = str(client)
        return self._proxy_fix(environ | fields, start_response)


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in `203.0.113.7:443`, `[2001:db8::1]:443` or `::ffff:203.0.113.7` (which is 203.0.113.7)."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.version == 6 and address.ipv4_mapped) or address
