"""`app` for any WSGI server; `python wsgi.py` serves it under waitress."""

import os
import sys
from pathlib import Path

from dotenv import load_dotenv

from taskapi import ConfigError, Settings, create_app, local, server

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".taskapi"

load_dotenv(HERE / ".env")

if __name__ == "__main__":
    server.main(FOLDER)
else:
    try:
        app = create_app(local.complete(Settings.from_env(os.environ), FOLDER))
    except ConfigError as error:
        sys.exit(f"taskapi: {error}")
