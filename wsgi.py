"""`app` for any WSGI server; `python wsgi.py` serves it under waitress."""

import os
from pathlib import Path

from dotenv import load_dotenv

from taskapi import Settings, create_app, local, server

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".taskapi"

load_dotenv(HERE / ".env")

if __name__ == "__main__":
    server.main(FOLDER)
else:
    app = create_app(local.complete(Settings.from_env(os.environ), FOLDER))
