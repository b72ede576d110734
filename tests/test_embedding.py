"""The API inside an app that is somebody else's: nothing outside the prefix changes."""

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import psycopg_pool
import pytest
from flask import Flask, jsonify, render_template_string, request
from flask.testing import FlaskClient
from flask_jwt_extended import JWTManager, create_access_token, get_jwt_identity, jwt_required

import taskapi
from taskapi.db import database
from tests.people import SECRET, Person, assert_problem, mint

HOSTS_SECRET = "the host's own secret has 32 bytes and more"


def host() -> Flask:
    """An app with pages, error pages, /api routes and tokens of its own."""
    app = Flask("host")
    app.config["JWT_SECRET_KEY"] = HOSTS_SECRET
    JWTManager(app)

    @app.get("/api/health")
    def health() -> str:
        return "fine"

    @app.get("/api/<name>/tasks/<int:number>/notes")
    def notes(name: str, number: int) -> Any:
        return jsonify(name=name, number=number)

    @app.get("/account")
    @jwt_required()  # type: ignore[untyped-decorator]
    def account() -> Any:
        return jsonify(me=get_jwt_identity())

    @app.get("/broken")
    def broken() -> str:
        raise RuntimeError("host's defect")

    @app.errorhandler(404)
    @app.errorhandler(405)
    def page(error: Any) -> Any:
        return render_template_string("<h1>{{ code }}</h1>", code=error.code), error.code

    @app.errorhandler(Exception)
    def defect(error: Exception) -> tuple[str, int]:
        return "<h1>sorry</h1>", 500

    return app


def answers(client: FlaskClient) -> list[tuple[int, bytes, dict[str, str]]]:
    """What the host says at its own addresses."""
    with client.application.app_context():
        token = create_access_token("host's user")
    requests = [
        ("GET", "/"),
        ("GET", "/nope"),
        ("GET", "/docs"),
        ("GET", "/docs/docs.js"),
        ("GET", "/openapi.json"),
        ("GET", "/api"),
        ("GET", "/api/nope"),
        ("GET", "/api/health"),
        ("POST", "/api/health"),
        ("OPTIONS", "/api/health"),
        ("GET", "/api/u/tasks/5/notes"),
        ("PUT", "/api/u/tasks/5/notes"),
        ("GET", "/account"),
        ("GET", "/broken"),
        ("GET", "/todo/v1"),
        ("GET", "/todo/v1/u"),
    ]
    found = [client.open(path, method=method) for method, path in requests]
    found.append(client.get("/account", headers={"Authorization": f"Bearer {token}"}))
    return [(response.status_code, response.data, dict(response.headers)) for response in found]


@pytest.fixture(params=["/api", "/todo/v1"])
def embedded(request: pytest.FixtureRequest, database_url: str) -> Iterator[tuple[Flask, str]]:
    app = host()
    taskapi.init_app(app, taskapi.Settings(database_url=database_url, secrets=(SECRET,)), url_prefix=request.param)
    yield app, request.param
    database(app).close()


def test_nothing_outside_the_prefix_changes(embedded: tuple[Flask, str]) -> None:
    app, _ = embedded
    assert answers(app.test_client()) == answers(host().test_client())


def test_the_tasks_work_at_any_prefix(embedded: tuple[Flask, str]) -> None:
    app, prefix = embedded
    ann = Person(app.test_client(), f"ann-{secrets.token_hex(6)}", prefix=prefix)
    created = ann.request("POST", json={"title": "t"})
    assert created.status_code == 201
    assert created.headers["Location"] == f"{ann.tasks}/{created.json['id']}"
    assert ann.open(created.headers["Location"]).json == created.json
    ann.create("u")
    link = ann.request("GET", query_string="limit=1").headers["Link"]
    assert [task["title"] for task in ann.open(link.partition(">")[0][1:]).json] == ["u"]
    assert [task["title"] for task in ann.request("DELETE", query_string="q=u").json] == ["u"]
    assert ann.request("PATCH", f"/{created.json['id']}/complete").json["is_completed"] is True
    assert ann.request("DELETE", f"/{created.json['id']}").status_code == 200
    assert ann.list() == []


def test_errors_under_the_prefix_keep_the_one_shape(
    embedded: tuple[Flask, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, prefix = embedded
    ann = Person(app.test_client(), "ann", prefix=prefix)
    assert_problem(app.test_client().get(ann.tasks), 401)
    assert_problem(ann.open(ann.tasks, headers={"Authorization": f"Bearer {mint('ben')}"}), 403)
    assert_problem(ann.request("GET", "/9"), 404)
    assert ann.request("PATCH").headers["Allow"] == "DELETE, GET, HEAD, OPTIONS, POST"
    assert_problem(ann.request("PATCH"), 405)
    assert_problem(ann.request("POST", data=b"x" * 70_000, content_type="application/json"), 413)
    assert_problem(ann.request("POST", data=b"x"), 415)
    assert_problem(ann.request("POST", json={}), 422)
    monkeypatch.setattr("taskapi.db.Database.run", lambda *_: 1 / 0)
    assert_problem(ann.request("GET"), 500)


@pytest.mark.parametrize("prefix", ["/", "/todo/"])
def test_a_prefix_may_end_with_a_slash(database_url: str, prefix: str) -> None:
    """And then, too, no method gets past the guard."""
    app = host()
    taskapi.init_app(app, taskapi.Settings(database_url=database_url, secrets=(SECRET,)), url_prefix=prefix)
    ann = Person(app.test_client(), "ann", prefix=prefix.rstrip("/"))
    assert ann.list() == []
    assert_problem(app.test_client().patch(ann.tasks), 401)
    assert_problem(ann.request("PATCH"), 405)
    assert app.test_client().options(ann.tasks).headers["Allow"] == "DELETE, GET, HEAD, OPTIONS, POST"
    database(app).close()


def test_a_host_may_trap_http_exceptions(database_url: str) -> None:
    app = host()
    app.config["TRAP_HTTP_EXCEPTIONS"] = True
    taskapi.init_app(app, taskapi.Settings(database_url=database_url, secrets=(SECRET,)))
    ann = Person(app.test_client(), "ann")
    assert_problem(ann.request("GET", "/9"), 404)
    assert_problem(ann.request("PATCH"), 405)
    assert_problem(ann.request("POST", json={}), 422)
    database(app).close()


def test_requests_that_share_a_context_share_nothing(
    embedded: tuple[Flask, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of a command of the host's, or of its tests: they work after six seconds, too."""
    app, prefix = embedded
    ann = Person(app.test_client(), "ann", prefix=prefix)
    with app.app_context():
        assert_problem(ann.open(ann.tasks, headers={"X-Request-ID": "first"}), 401)
        monkeypatch.setattr("taskapi.db.POOL_TIMEOUT", -4)  # the time of a request that begins now is over
        assert_problem(ann.request("GET", headers={"X-Request-ID": "second"}), 503)
        monkeypatch.undo()
        caplog.clear()
        response = ann.request("GET", headers={"X-Request-ID": "third"})
        assert (response.status_code, response.headers["X-Request-ID"]) == (200, "third")
        assert [record.message for record in caplog.records] == []  # none of a refusal


def test_the_hosts_tokens_and_the_apis_are_strangers(embedded: tuple[Flask, str]) -> None:
    app, prefix = embedded
    ann = Person(app.test_client(), "ann", prefix=prefix)
    assert app.test_client().get("/account", headers={"Authorization": f"Bearer {ann.token}"}).status_code != 200
    with app.app_context():
        ann.token = create_access_token("ann")
    assert_problem(ann.request("GET"), 401)


def test_the_limit_of_a_body_is_the_apis_own(database_url: str) -> None:
    app = host()
    app.config["MAX_CONTENT_LENGTH"] = 10

    @app.post("/echo")
    def echo() -> bytes:
        return request.get_data()

    taskapi.init_app(app, taskapi.Settings(database_url=database_url, secrets=(SECRET,)))
    ann = Person(app.test_client(), f"ann-{secrets.token_hex(6)}")
    assert ann.create("more than ten bytes")["title"] == "more than ten bytes"
    assert app.test_client().post("/echo", data=b"x" * 11).status_code == 500  # the host's own handler
    database(app).close()


def test_two_apps_in_one_process_do_not_disturb_each_other(new_database: Callable[[], str]) -> None:
    people = []
    for number, prefix in enumerate(("/api", "/b")):
        app, secret = host(), f"secret number {number} has 32 bytes and more"
        taskapi.init_app(app, taskapi.Settings(database_url=new_database(), secrets=(secret,)), url_prefix=prefix)
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
        database(person.client.application).close()


@pytest.mark.parametrize("autocommit", [True, False])
def test_a_host_may_lend_its_pool(database_url: str, autocommit: bool) -> None:
    """Whatever it is set to: neither its settings show in the answers, nor ours in its connections afterwards."""
    options = "-c timezone=Asia/Tokyo -c search_path=pg_catalog -c datestyle=German"
    kwargs = {"autocommit": autocommit, "options": options, "client_encoding": "latin1"}
    shown = """SELECT current_user, current_setting('timezone'), current_setting('client_encoding'),
        current_setting('taskapi.user_id', true)"""
    with psycopg_pool.ConnectionPool(database_url, min_size=1, max_size=1, kwargs=kwargs) as pool:
        with pool.connection() as conn:
            before = conn.execute(shown).fetchone()
        app = host()
        taskapi.init_app(app, taskapi.Settings(secrets=(SECRET,)), pool=pool)
        ann = Person(app.test_client(), f"änn-{secrets.token_hex(6)}")
        task = ann.create("größer", tags=["€"])
        assert task["created_at"].endswith("+00:00")
        assert (task["user_id"], task["title"], task["tags"]) == (ann.user, "größer", ["€"])
        assert ann.list() == [task]
        assert ann.request("GET", query_string={"tag": "€"}).json == [task]
        assert_problem(ann.request("GET", "/9"), 404)
        with pool.connection() as conn:
            after = conn.execute(shown).fetchone()
        assert before is not None
        assert after == (*before[:3], after[3] if after and not after[3] else None)
        database(app).close()
        assert not pool.closed


def test_the_environment_is_read_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("BETTER_AUTH_SECRET", SECRET)
    app = host()
    taskapi.init_app(app)
    assert Person(app.test_client(), f"ann-{secrets.token_hex(6)}").list() == []
    database(app).close()


def test_without_a_database_or_a_secret_nothing_is_embedded() -> None:
    with pytest.raises(taskapi.ConfigError, match="DATABASE_URL is not set"):
        taskapi.init_app(host(), taskapi.Settings(secrets=(SECRET,)))
    with pytest.raises(taskapi.ConfigError, match="BETTER_AUTH_SECRET is not set"):
        taskapi.init_app(host(), taskapi.Settings(database_url="postgresql://"))


def test_an_app_that_never_served_holds_no_connection(database_url: str) -> None:
    """So that a server may fork after it made the app."""
    app = taskapi.create_app(
        taskapi.Settings(database_url=f"{database_url} application_name=unused", secrets=(SECRET,))
    )
    with psycopg.connect(database_url) as conn:
        found = conn.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'unused'").fetchone()
    assert found == (0,)
    database(app).close()
