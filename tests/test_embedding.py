"""The API inside a host app: nothing outside the prefix changes."""

import contextlib
import gc
import json
import secrets
import select
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, LiteralString, cast

import psycopg
import psycopg_pool
import pytest
from flask import Flask, Response, got_request_exception, jsonify, render_template_string, request
from flask.testing import FlaskClient
from flask_jwt_extended import JWTManager, create_access_token, get_jwt_identity, jwt_required
from flask_wtf.csrf import CSRFProtect, generate_csrf
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from werkzeug.exceptions import Forbidden, HTTPException, NotFound, TooManyRequests

import taskapi
from taskapi import ConfigError, Settings
from taskapi.context import get_api
from taskapi.tokens import User
from tests import issuers
from tests.people import SECRET, UNREACHABLE, Person, assert_problem, mint, new_person, next_url, running_app
from tests.processes import CHECKOUT, ask, environment, readme, started, wait_until, within
from tests.servers import tasks_locked

HOST_SECRET = "the host's own secret has 32 bytes and more"


def host() -> Flask:
    """An app with pages, error pages, /api routes and tokens of its own."""
    app = Flask("host")
    app.config["JWT_SECRET_KEY"] = HOST_SECRET
    JWTManager(app)

    app.add_url_rule("/api/health", endpoint="health", view_func=lambda: "fine")

    @app.get("/api/<name>/tasks/<int:number>/notes")
    def notes(name: str, number: int) -> Any:
        return jsonify(name=name, number=number)

    @app.get("/account")
    @jwt_required()  # type: ignore[untyped-decorator]
    def account() -> Any:
        return jsonify(me=get_jwt_identity())

    app.add_url_rule("/echo", endpoint="echo", view_func=lambda: request.get_data(), methods=["POST"])
    app.add_url_rule("/broken", endpoint="broken", view_func=lambda: str(1 / 0))

    @app.errorhandler(404)
    @app.errorhandler(405)
    def page(error: Any) -> Any:
        return render_template_string("<h1>{{ code }}</h1>", code=error.code), error.code

    app.register_error_handler(Exception, lambda error: ("<h1>sorry</h1>", 500))
    return app


@contextlib.contextmanager
def mounted(app: Flask, url: str | None = UNREACHABLE, prefix: str = "/api", pool: Any = None) -> Iterator[Person]:
    """A new user of the API in `app`, until the end of the with block."""
    taskapi.init_app(app, Settings(database_url=url, secrets=(SECRET,)), url_prefix=prefix, pool=pool)
    yield Person(app.test_client(), f"änn-{secrets.token_hex(6)}", prefix=prefix.rstrip("/"))
    get_api(app).database.close()


@pytest.fixture(params=["/api", "/todo/v1"])
def ann(request: pytest.FixtureRequest, database_url: str) -> Iterator[Person]:
    with mounted(host(), database_url, request.param) as ann:
        yield ann


def answers(client: FlaskClient) -> list[tuple[int, bytes, dict[str, str]]]:
    """What the host answers at its own addresses."""
    with client.application.app_context():
        token = create_access_token("a user of the host")
    paths = ["/", "/nope", "/docs", "/docs/docs.js", "/openapi.json", "/account", "/broken", "/todo/v1", "/todo/v1/u"]
    paths += ["/api", "/api/nope", "/api/health", "/api/u/tasks/5/notes"]
    requests = [("GET", path) for path in paths]
    requests += [("POST", "/api/health"), ("OPTIONS", "/api/health"), ("PUT", "/api/u/tasks/5/notes")]
    found = [client.open(path, method=method) for method, path in requests]
    found.append(client.get("/account", headers={"Authorization": f"Bearer {token}"}))
    return [(response.status_code, response.data, dict(response.headers)) for response in found]


def test_nothing_outside_the_prefix_changes(ann: Person) -> None:
    assert answers(ann.client) == answers(host().test_client())


def test_tasks_work_at_any_prefix(ann: Person) -> None:
    created = ann.request("POST", json={"title": "t"})
    assert created.status_code == 201
    assert created.headers["Location"] == f"{ann.tasks}/{created.json['id']}"
    assert ann.open(created.headers["Location"]).json == created.json
    ann.create("u")
    second = ann.open(next_url(ann.request("GET", query_string="limit=1")))
    assert [task["title"] for task in second.json] == ["u"]
    assert [task["title"] for task in ann.request("DELETE", query_string="q=u").json] == ["u"]
    assert ann.request("PATCH", f"/{created.json['id']}/complete").json["is_completed"] is True
    assert ann.request("DELETE", f"/{created.json['id']}").status_code == 200
    assert ann.list() == []


@pytest.mark.parametrize(("prefix", "trap"), [("/api", False), ("/", True), ("/todo/", True)])
def test_errors_have_the_one_shape(database_url: str, monkeypatch: pytest.MonkeyPatch, prefix: str, trap: bool) -> None:
    """Under the prefix. It may end with a slash, and the host may trap HTTP exceptions."""
    app = host()
    app.config["TRAP_HTTP_EXCEPTIONS"] = trap
    with mounted(app, database_url, prefix) as ann:
        assert ann.list() == []
        assert_problem(ann.client.patch(ann.tasks), 401)
        assert_problem(ann.open(ann.tasks, headers={"Authorization": f"Bearer {mint('ben')}"}), 403)
        assert_problem(ann.request("GET", "/0"), 404)
        assert ann.request("PATCH").headers["Allow"] == "DELETE, GET, HEAD, OPTIONS, POST"
        assert_problem(ann.request("PATCH"), 405)
        assert_problem(ann.request("POST", data=b"x" * 70_000, content_type="application/json"), 413)
        assert_problem(ann.request("POST", data=b"x"), 415)
        assert_problem(ann.request("POST", json={}), 422)
        monkeypatch.setattr("taskapi.db.Database.run", lambda *_, **__: 1 / 0)
        if not trap:  # a trapped exception is the host's
            assert_problem(ann.request("GET"), 500)


def test_requests_in_one_app_context_share_nothing(
    ann: Person, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a command or a test of the host: neither the id, the deadline nor the reason of a request remains."""
    with ann.client.application.app_context():
        assert_problem(ann.open(ann.tasks, headers={"X-Request-ID": "first"}), 401)
        monkeypatch.setattr("taskapi.tasks.POOL_TIMEOUT", -10)  # the next request's deadline is over at once
        assert_problem(ann.request("GET", headers={"X-Request-ID": "second"}), 503)
        monkeypatch.undo()
        caplog.clear()
        response = ann.request("GET", headers={"X-Request-ID": "third"})
        assert (response.status_code, response.headers["X-Request-ID"]) == (200, "third")
        assert [record.message for record in caplog.records] == []


def test_nested_request_restores_the_outer_one(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "taskapi")
    with running_app(database_url) as app:
        ann, ben = new_person(app.test_client()), new_person(app.test_client())

        @app.after_request
        def ask_again(response: Response) -> Response:
            if request.headers["X-Request-ID"] == "outer":
                assert ben.request("GET", headers={"X-Request-ID": "inner"}).status_code == 200
            return response

        assert ann.request("GET", headers={"X-Request-ID": "outer"}).headers["X-Request-ID"] == "outer"
    logged = [(vars(record)["request_id"], vars(record)["user"]) for record in caplog.records]
    assert logged == [("inner", ben.user), ("outer", ann.user)]


def test_tokens_and_body_limits_of_the_host_and_of_the_api_are_separate(ann: Person) -> None:
    app = ann.client.application
    assert ann.client.get("/account", headers={"Authorization": f"Bearer {ann.token}"}).status_code != 200
    app.config["MAX_CONTENT_LENGTH"] = 10
    assert ann.create("more than ten bytes")["title"] == "more than ten bytes"
    assert ann.client.post("/echo", data=b"x" * 11).status_code == 500  # the host's own handler
    with app.app_context():
        ann.token = create_access_token(ann.user)
    assert_problem(ann.request("GET"), 401)


def test_two_apps_in_one_process_are_separate(new_database: Callable[..., str]) -> None:
    people = []
    for number, prefix in enumerate(("/api", "/b")):
        app, secret = host(), f"secret number {number} has 32 bytes and more"
        taskapi.init_app(app, Settings(database_url=new_database(), secrets=(secret,)), url_prefix=prefix)
        assert app.test_cli_runner().invoke(args=["taskapi", "migrate"]).exit_code == 0
        people.append(Person(app.test_client(), "ann", mint("ann", secret=secret), prefix))
    first, second = people
    task = first.create("first's")
    assert second.list() == []
    assert second.create("second's")["title"] == "second's"
    assert first.list() == [task]
    first.token, second.token = second.token, first.token
    for person in people:
        assert_problem(person.request("GET"), 401)
        get_api(person.client.application).database.close()


@pytest.mark.parametrize("autocommit", [True, False])
def test_host_may_lend_its_pool(database_url: str, autocommit: bool) -> None:
    """With any settings: they change no answer and no command, and its connections come back as they were. The host may
    remove all prepared statements: by DISCARD ALL, or by a ROLLBACK, after which psycopg removes them."""
    options = "-c timezone=Asia/Tokyo -c search_path=pg_catalog -c datestyle=German"
    kwargs = {"autocommit": autocommit, "options": options, "client_encoding": "latin1", "row_factory": dict_row}
    shown = """SELECT current_user, current_setting('timezone'), current_setting('client_encoding'),
        current_setting('statement_timeout'), nullif(current_setting('taskapi.user_id', true), '')"""
    lent = psycopg_pool.ConnectionPool(database_url, min_size=1, max_size=1, kwargs=kwargs)
    with lent as pool, contextlib.ExitStack() as stack:

        def state() -> list[object]:
            with pool.connection() as conn:
                of_client = [conn.prepare_threshold, conn.info.encoding, conn.autocommit, conn.row_factory]
                return [conn.execute(shown, prepare=True).fetchone(), *of_client]

        before = state()
        ann = stack.enter_context(mounted(app := host(), None, pool=pool))
        task = ann.create("größer", tags=["€"])
        assert task["created_at"].endswith("Z")
        assert (task["user_id"], task["title"], task["tags"]) == (ann.user, "größer", ["€"])
        commands: tuple[LiteralString, ...] = ("ROLLBACK", "DISCARD ALL", "SELECT")
        for command in commands:
            assert ann.list() == ann.request("GET", query_string={"tag": "€"}).json == [task]
            with pool.connection() as conn:
                assert conn.execute("SELECT FROM pg_prepared_statements WHERE name LIKE 'taskapi_%'").rowcount > 0
                conn.rollback()
                conn.set_autocommit(True)
                conn.execute(command)
                conn.set_autocommit(autocommit)
        assert_problem(ann.request("GET", "/0"), 404)
        other = ann.create("other")
        assert ann.open(next_url(ann.request("GET", query_string="limit=1"))).json == [other]
        assert ann.request("DELETE", f"/{other['id']}").json == other
        lines = [["check"], ["export", ann.user], ["delete-user", ann.user, "--yes"]]
        ended = [app.test_cli_runner().invoke(args=["taskapi", *line]) for line in lines]
        assert [result.exit_code for result in ended] == [0, 0, 0]
        assert json.loads(ended[1].stdout_bytes) == task
        assert state() == before
        stack.close()
        assert not pool.closed


def test_lent_pool_without_a_limit_serves_several_requests_of_a_user(database_url: str) -> None:
    app = host()
    with psycopg_pool.NullConnectionPool(database_url) as pool, mounted(app, None, pool=pool) as ann:
        assert ann.list() == []
        assert [get_api(app).limits.concurrency.start(ann.user) for _ in range(3)] == [1, 2, 3]


class Limited(TooManyRequests):
    """As a rate limiter raises it."""

    description = "5 per 1 minute"

    def get_headers(self, *_: object) -> list[tuple[str, str]]:
        return [("Content-Type", "text/html"), ("Retry-After", "7"), ("X-RateLimit-Limit", "5")]


@pytest.mark.parametrize(
    ("error", "status", "detail", "headers"),
    [
        (Forbidden("maintenance"), 403, "maintenance", {}),
        (NotFound("closed for the night"), 404, "closed for the night", {}),
        (NotFound(), 404, "No such path.", {}),
        (Limited(), 429, "5 per 1 minute", {"Retry-After": "7", "X-RateLimit-Limit": "5"}),
    ],
)
def test_host_errors_keep_their_words(error: HTTPException, status: int, detail: str, headers: dict[str, str]) -> None:
    app = host()

    @app.before_request
    def refuse() -> None:
        raise error

    with mounted(app) as ann:
        answer = ann.request("GET")
    assert_problem(answer, status, detail=detail)
    assert {name: answer.headers.get(name) for name in headers} == headers


def test_exception_of_the_host_goes_to_its_handler() -> None:
    app = host()
    app.register_error_handler(LookupError, lambda _: ("pay first", 402))

    @app.before_request
    def require_payment() -> None:
        raise LookupError if "paid" not in request.args else ValueError("a defect")

    with mounted(app) as ann:
        answer = ann.request("GET")
        assert (answer.status_code, answer.text) == (402, "pay first")
        assert_problem(ann.request("GET", query_string="paid"), 500)


def test_csrf_protection_of_the_host(database_url: str) -> None:
    """It tells its reason. Without it for the blueprint, no session of the host opens the API."""
    app = host()
    app.secret_key = HOST_SECRET
    csrf = CSRFProtect(app)
    app.add_url_rule("/form", endpoint="form", view_func=generate_csrf)
    with mounted(app, database_url) as ann:
        assert_problem(ann.request("POST", json={"title": "t"}), 400, detail="The CSRF token is missing.")
        form = {"X-CSRFToken": ann.client.get("/form").text}  # which sets the cookie of the session
        csrf.exempt(taskapi.tasks.bp)
        assert ann.create("t")["title"] == "t"
        assert_problem(ann.open(ann.tasks, method="POST", json={"title": "t"}, headers=form), 401)
        assert ann.client.post("/echo").status_code == 500  # the host's own handler: it is protected as before


def test_compression_of_the_host_leaves_tags_usable(database_url: str) -> None:
    app, gzip = host(), {"Accept-Encoding": "gzip"}
    pytest.importorskip("flask_compress", reason="needs Flask-Compress").Compress(app)
    with mounted(app, database_url) as ann:
        path = f"/{ann.create('t' * 500)['id']}"
        for url in ("", path):
            tag = ann.request("GET", url, headers=gzip).headers["ETag"]
            assert tag.endswith(':gzip"')
            unchanged = ann.request("GET", url, headers={**gzip, "If-None-Match": tag})
            assert (unchanged.status_code, unchanged.headers["ETag"]) == (304, tag)
        change = {"json": {"is_completed": True}, "headers": {**gzip, "If-Match": tag}}
        assert ann.request("PUT", path, **change).status_code == 200
        assert_problem(ann.request("PUT", path, **change), 412)


RAISING = [{name: True} for name in ("TESTING", "DEBUG", "PROPAGATE_EXCEPTIONS")]
ANSWERING = [{}, {"TESTING": True, "PROPAGATE_EXCEPTIONS": False}]


@pytest.mark.parametrize("config", RAISING + ANSWERING)
def test_defects_are_signalled_and_raised(monkeypatch: pytest.MonkeyPatch, config: dict[str, bool]) -> None:
    """As Flask documents."""
    app = host()
    app.config.update(config)
    monkeypatch.setattr("taskapi.db.Database.run", lambda *_, **__: 1 / 0)
    signals: list[Exception] = []
    noted = got_request_exception.connected_to(lambda _, exception, **__: signals.append(exception), app)
    raised = pytest.raises(ZeroDivisionError) if config in RAISING else contextlib.nullcontext()
    with mounted(app) as ann, noted, raised:
        assert_problem(ann.request("GET"), 500)
    assert [type(error) for error in signals] == [ZeroDivisionError]


def test_readme_app_keeps_its_page_and_gives_it_a_token(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    for name, value in {"DATABASE_URL": database_url, "TASKS_SECRET": SECRET, "SESSION_SECRET": HOST_SECRET}.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {"__name__": "myapp"}
    exec(readme("Embedding", "python"), names)  # noqa: S102 (our own text)
    client = cast(Flask, names["app"]).test_client()
    assert client.get("/").text == "The app's own page, as before."
    assert client.post("/tasks-token").status_code == 401
    user = f"ann-{secrets.token_hex(6)}"
    with client.session_transaction() as session:
        session["user_id"] = user
    answer = client.post("/tasks-token")
    assert answer.headers["Cache-Control"] == "no-store"
    ann = Person(client, user, cast(Any, answer.json)["token"], prefix="/todo")
    assert ann.list() == []
    assert_problem(ann.open(ann.tasks, headers={}), 401)
    for path in ("/readyz", "/openapi.json", "/docs"):
        with client.get(path) as page:
            assert page.status_code == 200
    get_api(names["app"]).database.close()


def test_token_has_what_the_api_requires() -> None:
    with running_app(issuers=("me",), audiences=("you",), user_claims=("user.id",)) as app, app.app_context():
        with host().app_context():
            token = taskapi.issue_token("ann", email="ann@example.com", name="Ann", app=app)
        assert get_api(app).verifier.verify(token) == User("ann", "ann@example.com", "Ann")
        for invalid in (cast(Any, 5), "", "\0"):
            with pytest.raises(ValueError, match="user id"):
                taskapi.issue_token(invalid)
        for never in (cast(Any, 900), timedelta(0), timedelta(-1)):
            with pytest.raises(ValueError, match=r"^expires "):
                taskapi.issue_token("ann", expires=never)


WITHOUT_API = [lambda app: taskapi.issue_token("ann", app=app), taskapi.openapi.init_app, taskapi.docs.init_app]


@pytest.mark.parametrize("use", WITHOUT_API)
def test_app_without_the_api_is_refused(use: Callable[[Flask], object]) -> None:
    with pytest.raises(ConfigError, match="init_app"):
        use(host())


def test_environment_is_read_without_settings(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("BETTER_AUTH_SECRET", SECRET)
    app = host()
    taskapi.init_app(app)
    assert Person(app.test_client(), f"ann-{secrets.token_hex(6)}").list() == []
    get_api(app).database.close()


UNUSABLE: list[tuple[dict[str, Any], str]] = [
    *(({"url_prefix": prefix}, "^url_prefix [^ ]* is not a fixed") for prefix in ("/x/<int:n>", "x", "/x?y", "/x#y")),
    ({"pool": AsyncConnectionPool(open=False)}, "^pool is of type AsyncConnectionPool"),
    ({"settings": UNREACHABLE}, "^settings is of type str"),
    ({"settings": Settings(secrets=(SECRET,))}, "^DATABASE_URL is not set"),
    ({"settings": Settings(database_url=UNREACHABLE)}, "^BETTER_AUTH_SECRET is not set"),
]
USABLE = Settings(database_url=UNREACHABLE, secrets=(SECRET,))


@pytest.mark.parametrize(("arguments", "message"), UNUSABLE)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        taskapi.init_app(host(), **{"settings": USABLE, **arguments})


def test_second_api_in_one_app_is_refused(database_url: str) -> None:
    app = host()
    with mounted(app, database_url) as ann:
        before = answers(ann.client)
        with pytest.raises(ConfigError, match="has the API already"):
            taskapi.init_app(app, USABLE, url_prefix="/b")
        assert ann.list() == []
        assert answers(ann.client) == before


def test_eventlet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It removes select.poll."""
    monkeypatch.delattr(select, "poll")
    with pytest.raises(ConfigError, match="eventlet"):
        taskapi.init_app(host(), USABLE)


def test_app_that_never_served_has_no_connection(database_url: str, conn: psycopg.Connection) -> None:
    """So that a server may fork after it made the app."""
    with running_app(f"{database_url} application_name=unused"):
        assert conn.execute("SELECT FROM pg_stat_activity WHERE application_name = 'unused'").rowcount == 0


@pytest.mark.slow
def test_deleted_apps_leave_no_thread_and_no_connection(database_url: str, conn: psycopg.Connection) -> None:
    before, signer = set(threading.enumerate()), issuers.Signer.new("EdDSA")
    with issuers.publishing(signer) as issuer:
        settings = Settings(database_url=f"{database_url} application_name=deleted", jwks_url=issuer.url)
        for _ in range(50):
            app = host()
            taskapi.init_app(app, settings)
            Person(app.test_client(), "ann", signer.token("ann")).list()
            del app
    gc.collect()
    count = "SELECT FROM pg_stat_activity WHERE application_name = 'deleted'"
    with within(2):
        wait_until(lambda: conn.execute(count).rowcount == 0, "no connection is left")
    assert set(threading.enumerate()) <= before


@pytest.mark.slow
def test_gevent_serves_others_while_a_statement_waits(database_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gunicorn", "--worker-class=gevent", "--bind=127.0.0.1:0", "wsgi:app"]
    env = environment(DATABASE_URL=database_url, BETTER_AUTH_SECRET=SECRET, PYTHONPATH=str(CHECKOUT))
    with started(command, tmp_path, env) as process, ThreadPoolExecutor() as threads:
        url = process.wait_for(r"Listening at: (\S+)")
        assert ask(url, "GET", "/api/ann/tasks", token=mint("ann")).status == 200
        with tasks_locked(database_url) as wait:
            waiting = threads.submit(ask, url, "GET", "/api/ann/tasks", token=mint("ann"))
            wait(1)
            assert ask(url, "GET", "/livez").status == 200
            assert not waiting.done()
        assert waiting.result().status == 200
