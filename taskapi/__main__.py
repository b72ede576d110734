"""`python -m taskapi` and the console script `taskapi`: `serve`, and the commands of `flask taskapi`."""

from flask import Flask
from flask.cli import ScriptInfo

from . import create_app, embedded, logs, server
from .commands import group


def make_app() -> Flask:
    logs.configure()
    return create_app(embedded.load_settings())


@group.command(with_appcontext=False)
def serve() -> None:
    """Serve the API, as `python wsgi.py` does.

    Without DATABASE_URL it is a try-out, whose data is under .taskapi/.
    """
    server.main()


def main() -> None:
    group.main(prog_name="taskapi", obj=ScriptInfo(create_app=make_app))


if __name__ == "__main__":
    main()
