"""`app` for any WSGI server. `python wsgi.py` serves the API with waitress (taskapi/server.py)."""

import os
import sys
from pathlib import Path

from dotenv import load_dotenv

from taskapi import ConfigError, Settings, create_app, embedded, logs, server

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".taskapi"

load_dotenv(HERE / ".env")

if __name__ == "__main__":
    server.main(FOLDER)
else:
    logs.configure()
    try:
        app = create_app(embedded.fill_settings(Settings.from_env(os.environ), FOLDER))
    except ConfigError as error:
        sys.exit(f"taskapi: {error}")
