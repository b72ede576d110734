"""`python -m taskapi` and the console script `taskapi`: `serve`, and the commands of `flask taskapi`."""

import os
from pathlib import Path

from dotenv import find_dotenv, load_dotenv
from flask import Flask
from flask.cli import ScriptInfo

from . import create_app, embedded, server
from .commands import group
from .config import Settings

FOLDER = Path(".taskapi").absolute()


def make_app() -> Flask:
    return create_app(embedded.fill_settings(Settings.from_env(os.environ), FOLDER))


@group.command(with_appcontext=False)
def serve() -> None:
    """Serve the API, as `python wsgi.py` does; without DATABASE_URL as a try-out, under .taskapi/."""
    server.main(FOLDER)


def main() -> None:
    load_dotenv(find_dotenv(usecwd=True))
    group.main(prog_name="taskapi", obj=ScriptInfo(create_app=make_app))


if __name__ == "__main__":
    main()
