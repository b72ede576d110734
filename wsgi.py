"""`app` for any WSGI server. `python wsgi.py` serves the API with waitress (taskapi/server.py)."""

from taskapi import ConfigError, create_app, embedded, logs, server

if __name__ == "__main__":
    server.main()
else:
    logs.configure()
    try:
        app = create_app(embedded.load_settings())
    except ConfigError as error:
        logs.exit_with(error)
