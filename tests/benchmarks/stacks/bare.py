"""The floor (c): a WSGI callable that does nothing, `python -m tests.benchmarks.stacks.bare {ours,stock} PORT`.

It answers every request with the task that stands in TASK, under the same headers as this API's answer; served by this
project's server, or by waitress as it comes.
"""

import os
import socket
import sys
from collections.abc import Iterable
from typing import Any

import waitress

from taskapi.server import BACKLOG, Server

TASK = os.environ["TASK"].encode()
HEADERS = [
    ("Content-Type", "application/json"),
    ("Content-Length", str(len(TASK))),
    ("ETag", '"2026-11-21T01:44:39.663396+00:00"'),
    ("Cache-Control", "private, no-cache"),
    ("X-Request-ID", "0123456789abcdef"),
]


def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", HEADERS)
    return [TASK]


def main(kind: str, port: int) -> None:
    if kind == "stock":
        waitress.serve(app, host="127.0.0.1", port=port, _quiet=True)
        return
    with socket.create_server(("127.0.0.1", port), backlog=BACKLOG) as sock:
        the_app: Any = app  # a Flask, where it is not for a floor
        Server(the_app, sock).serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
