"""Rate limits: how much one person, and one address with bad tokens, may ask."""

import contextlib
import shutil
import signal
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from taskapi import ConfigError, Settings, create_app
from taskapi.db import database
from taskapi.limits import MAX_COUNTERS, STORE_COOLDOWN, Counters, Limits
from tests.people import SECRET, Answer, Person, assert_problem, mint
from tests.processes import (
    Process,
    Server,
    Wire,
    copied,
    environment,
    free_port,
    freeze,
    request,
    serving,
    started,
    wait_until,
)


@contextlib.contextmanager
def app_by(**settings: Any) -> Iterator[FlaskClient]:
    """The API by these settings; without a database, unless they name one."""
    app = create_app(Settings(**{"database_url": "postgresql://127.0.0.1:1/nowhere", "secrets": (SECRET,), **settings}))
    yield app.test_client()
    database(app).close()


def assert_limited(response: TestResponse, policy: str, amount: int, seconds: int = 60) -> None:
    """Checks a 429 whole, with the fields of draft-ietf-httpapi-ratelimit-headers."""
    assert_problem(response, 429, detail="Too many requests.")
    wait = int(response.headers["Retry-After"])
    assert 1 <= wait <= seconds
    assert response.headers["RateLimit-Policy"] == f'"{policy}";q={amount};w={seconds}'
    assert response.headers["RateLimit"] == f'"{policy}";r=0;t={wait}'


def statuses(answers: list[Any]) -> dict[int, int]:
    return dict(Counter(answer.status_code for answer in answers))


# Per person


def test_a_person_who_asks_too_often_has_to_wait_and_nobody_else(database_url: str) -> None:
    with app_by(database_url=database_url, rate_limit="3/minute") as client:
        ann, ben = Person(client, "ann"), Person(client, "ben")
        for method, path, status in (("GET", "", 200), ("GET", "/1", 404), ("PATCH", "", 405)):
            assert ann.request(method, path).status_code == status
        for _ in range(3):
            assert_limited(ann.request("GET"), "person", 3)
        assert_limited(ann.request("DELETE", "/1"), "person", 3)
        assert ben.request("GET").status_code == 200


def test_a_person_is_counted_whatever_token_and_address_they_use(database_url: str) -> None:
    with app_by(database_url=database_url, rate_limit="2/minute") as client:
        for number in (1, 2, 3):
            ann = Person(client, "ann", mint("ann", nonce=number))
            response = ann.request("GET", environ_overrides={"REMOTE_ADDR": f"192.0.2.{number}"})
            assert response.status_code == (200 if number < 3 else 429)


def test_what_is_not_the_persons_doing_is_not_counted(database_url: str) -> None:
    with app_by(database_url=database_url, rate_limit="1/minute") as client:
        ann = Person(client, "ann")
        for _ in range(3):
            assert ann.request("OPTIONS").status_code == 200
            assert client.get(ann.tasks).status_code == 401
            assert ann.open(ann.tasks, headers={"Authorization": f"Bearer {mint('ben')}"}).status_code == 403
        assert ann.request("GET").status_code == 200


def test_a_window_ends_when_it_was_said_to(database_url: str) -> None:
    with app_by(database_url=database_url, rate_limit="2/second") as client:
        ann = Person(client, "ann")
        answers = [ann.request("GET") for _ in range(3)]
        assert_limited(answers[-1], "person", 2, 1)
        said = time.monotonic() + int(answers[-1].headers["Retry-After"])
        wait_until(lambda: ann.request("GET").status_code == 200, "a new window")
        assert time.monotonic() <= said + 0.2


def test_exactly_as_many_as_allowed_get_through_together(database_url: str) -> None:
    with app_by(database_url=database_url, rate_limit="20/minute") as client, ThreadPoolExecutor(8) as pool:
        people = [Person(client.application.test_client(), "ann") for _ in range(50)]
        assert statuses(list(pool.map(lambda ann: ann.request("GET"), people))) == {200: 20, 429: 30}


# Per address with refused tokens


def ask(client: FlaskClient, credentials: str | None, address: str = "192.0.2.1") -> Answer:
    """A request with a token, or with anything else that stands in its place."""
    headers = {} if credentials is None else {"Authorization": credentials}
    return Person(client, "ann").open("/api/ann/tasks", headers=headers, environ_overrides={"REMOTE_ADDR": address})


def exhaust(client: FlaskClient, address: str = "192.0.2.1") -> None:
    """Uses up two refusals."""
    for credentials in ("Bearer a.b.c", f"Bearer {mint('ann', exp=1)}"):
        assert_problem(ask(client, credentials, address), 401)


@pytest.mark.parametrize("credentials", ["Bearer a.b.c", "Bearer", f"Bearer {mint('ann', secret='x' * 32)}"])
def test_an_address_whose_tokens_were_refused_too_often_has_to_wait(credentials: str) -> None:
    with app_by(rate_limit_refused="2/minute") as client:
        exhaust(client)
        for _ in range(3):
            assert_limited(ask(client, credentials), "refused", 2)
        assert_problem(ask(client, credentials, "192.0.2.2"), 401)


def test_it_has_to_wait_before_any_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    with app_by(rate_limit_refused="2/minute") as client:
        exhaust(client)
        monkeypatch.setattr("taskapi.auth._JWS", None)
        assert_limited(ask(client, f"Bearer {mint('ann')}"), "refused", 2)
        assert_problem(ask(client, f"Bearer {mint('ann')}", "192.0.2.2"), 500)  # so nothing else reads a token


def test_tokens_that_were_verified_before_go_on_working_there(database_url: str) -> None:
    with app_by(database_url=database_url, rate_limit_refused="2/minute") as client:
        known = f"Bearer {mint('ann')}"
        assert ask(client, known).status_code == 200
        exhaust(client)
        assert ask(client, known).status_code == 200
        assert_limited(ask(client, f"Bearer {mint('ann', nonce=1)}"), "refused", 2)


def test_a_request_without_a_token_is_neither_counted_nor_limited() -> None:
    with app_by(rate_limit_refused="2/minute") as client:
        for credentials in (None, "", "Basic YTpi") * 3:
            assert_problem(ask(client, credentials), 401)
        exhaust(client)
        assert_limited(ask(client, "Bearer a.b.c"), "refused", 2)
        assert_problem(ask(client, None), 401)


@pytest.mark.parametrize(
    ("first", "second", "is_the_same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),  # a client may have 64 bits whole
        ("2001:db8::1", "2001:0DB8:0:0:1::", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),  # as a socket for both versions tells IPv4
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "unix:", True),
    ],
)
def test_a_client_is_an_ipv4_address_or_an_ipv6_network(first: str, second: str, is_the_same: bool) -> None:
    with app_by(rate_limit_refused="2/minute") as client:
        exhaust(client, first)
        assert ask(client, "Bearer a.b.c", second).status_code == (429 if is_the_same else 401)


# Memory


def test_memory_is_bounded_whoever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_COUNTERS <= 50_000
    monkeypatch.setattr("taskapi.limits.MAX_COUNTERS", 2_000)
    limits = Limits(Settings())
    tracemalloc.start()
    for number in range(6_000):
        limits.count_refusal(f"2001:db8:{number >> 16:x}:{number & 0xFFFF:x}::1")
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(limits._store, Counters)
    assert len(limits._store._windows) == 2_000
    assert used / 2_000 < 500


def test_counters_whose_window_has_ended_go_as_others_come() -> None:
    counters = Counters()
    for number in range(1000):
        counters.incr(f"{number}", 0.001)
    time.sleep(0.001)
    for number in range(1000):
        counters.incr(f"again {number}", 60)
    assert len(counters._windows) == 1000
    assert counters.get("999") == 0
    assert counters.get_expiry("999") == pytest.approx(time.time(), abs=5)


def test_no_count_is_lost_between_threads() -> None:
    counters = Counters()

    def count(_: int) -> list[int]:
        return [counters.incr("ann", 60) for _ in range(2000)]

    with ThreadPoolExecutor(8) as pool:
        counted = [number for numbers in pool.map(count, range(8)) for number in numbers]
    assert sorted(counted) == list(range(1, 16_001))


def test_counting_starts_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of limits' own storage cost 90 µs a request."""
    settings = Settings()
    started: list[threading.Thread] = []
    monkeypatch.setattr("threading.Thread.start", lambda thread: started.append(thread))
    limits = Limits(settings)
    for number in range(100):
        limits.count_request(f"{number}")
        limits.count_refusal(f"192.0.2.{number}")
    assert started == []


# Settings


def test_limits_are_on_by_default_and_nobody_at_work_meets_them() -> None:
    limits = Limits(Settings())
    for item, least in ((limits._requests, 100), (limits._refusals, 10)):
        assert least <= item.amount / item.get_expiry() <= 1000
        assert item.get_expiry() <= 60


@pytest.mark.parametrize("name", ["RATE_LIMIT", "RATE_LIMIT_REFUSED"])
@pytest.mark.parametrize(
    "value",
    ["x", "600", "-5/minute", "1.5/second", "600/fortnight", "600/min", "/minute", "none"]
    + ["600/minute;5/second", "600/minute, 5/second"],
)
def test_a_wrong_rate_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is no rate: 600/minute"):
        Settings.from_env({name: value})


@pytest.mark.parametrize("name", ["RATE_LIMIT", "RATE_LIMIT_REFUSED"])
def test_a_rate_that_lets_nobody_in_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} lets nobody in"):
        Settings.from_env({name: "0/minute"})


@pytest.mark.parametrize("value", ["5/second", "600/minute", "600 per hour", "10 per 5 minutes", "1000/day"])
def test_a_rate_is_one_line(value: str) -> None:
    settings = Settings.from_env({"RATE_LIMIT": value, "RATE_LIMIT_REFUSED": value})
    assert (settings.rate_limit, settings.rate_limit_refused) == (value, value)


@pytest.mark.parametrize(
    "value",
    ["x", "file:///tmp/limits", "http://127.0.0.1", "memcached://127.0.0.1:11211"]
    + ["async+memory://", "redis://[", "redis://u:the-password@h:x", "foo://u:the-password@h"],
)
def test_a_store_of_another_kind_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^RATE_LIMIT_STORAGE .*redis://"):
        Settings.from_env({"RATE_LIMIT_STORAGE": value})


def test_a_stores_password_is_told_to_nobody() -> None:
    for value in ("foo://u:the-password@h", "redis://u:the-password@h:x"):
        with pytest.raises(ConfigError) as caught:
            Settings.from_env({"RATE_LIMIT_STORAGE": value})
        assert "the-password" not in str(caught.value)


# Redis

PASSWORD = "the password of redis"
needs_redis = pytest.mark.skipif(not shutil.which("redis-server"), reason="needs redis-server")


@contextlib.contextmanager
def redis_server(folder: Path, port: int) -> Iterator[Process]:
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", PASSWORD]
    with started(command, folder, environment()) as process:
        process.wait_for("Ready to accept connections()")
        try:
            yield process
        finally:
            process.popen.send_signal(signal.SIGCONT)  # a frozen one would not end


def redis_url(port: int) -> str:
    return f"redis://:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{port}"


@needs_redis
def test_processes_share_the_counters_of_one_redis(database_url: str, tmp_path: Path) -> None:
    port = free_port()
    common = {"database_url": database_url, "rate_limit_storage": redis_url(port)}
    rates = {"rate_limit": "4/minute", "rate_limit_refused": "2/minute"}
    with redis_server(tmp_path, port), app_by(**common, **rates) as one, app_by(**common, **rates) as other:
        for client in (one, other, one, other):
            assert Person(client, "ann").request("GET").status_code == 200
        for client in (one, other):
            assert_limited(Person(client, "ann").request("GET"), "person", 4)
            assert Person(client, "ben").request("GET").status_code == 200
            assert_problem(ask(client, "Bearer a.b.c"), 401)
        for client in (one, other):
            assert_limited(ask(client, "Bearer a.b.c"), "refused", 2)


def break_down(process: Process) -> None:
    process.stop(signal.SIGKILL)


def hang(process: Process) -> None:
    freeze(process.popen.pid)


@needs_redis
@pytest.mark.parametrize("fault", [break_down, hang])
def test_people_go_on_working_without_redis(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[Process], None],
) -> None:
    monkeypatch.setattr("taskapi.limits.STORE_COOLDOWN", 1)
    port = free_port()
    with app_by(database_url=database_url, rate_limit="5/minute", rate_limit_storage=redis_url(port)) as client:
        ann = Person(client, "ann")
        with redis_server(tmp_path, port) as process:
            assert ann.request("GET").status_code == 200
            fault(process)
            begin = time.monotonic()
            assert statuses([ann.request("GET") for _ in range(20)]) == {200: 20}
            assert_problem(ask(client, "Bearer a.b.c"), 401)
            assert time.monotonic() - begin < 1
            (record,) = [record for record in caplog.records if record.getMessage() == "rate limits are off"]
            assert record.levelname == "ERROR"
            assert vars(record)["reason"]
            assert PASSWORD not in str(vars(record))
        with redis_server(tmp_path, port):
            wait_until(lambda: ann.request("GET").status_code == 429, "limits again")


def test_a_store_that_is_down_is_asked_seldom(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    assert STORE_COOLDOWN >= 5
    with app_by(database_url=database_url, rate_limit="1/minute", rate_limit_storage=redis_url(free_port())) as client:
        assert statuses([Person(client, "ann").request("GET") for _ in range(20)]) == {200: 20}
    assert caplog.text.count("rate limits are off") == 1


# The client's address


@contextlib.contextmanager
def process_by(folder: Path, database_url: str, **variables: str) -> Iterator[Server]:
    variables |= {"DATABASE_URL": database_url, "BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT_REFUSED": "2/minute"}
    with copied(folder / "checkout") as checkout, serving(checkout, variables) as server:
        yield server


def refused(server: Server, *forwarded_for: str) -> int:
    """The status of a request with a bad token and these headers."""
    headers = [f"X-Forwarded-For: {value}" for value in forwarded_for]
    with Wire(server.url) as wire:
        return wire.send(request("GET", "/api/ann/tasks", *headers, token="a.b.c")).answer().status


def test_nobody_is_believed_about_an_address_unless_it_was_said_so(tmp_path: Path, database_url: str) -> None:
    with process_by(tmp_path, database_url) as server:
        assert [refused(server, f"192.0.2.{number}") for number in range(3)] == [401, 401, 429]


def test_only_the_trusted_proxy_is_believed(tmp_path: Path, database_url: str) -> None:
    with process_by(tmp_path, database_url, TRUSTED_PROXY="192.0.2.9") as server:
        assert [refused(server, f"192.0.2.{number}") for number in range(3)] == [401, 401, 429]


def test_the_trusted_proxy_is_believed_about_the_last_address_only(tmp_path: Path, database_url: str) -> None:
    with process_by(tmp_path, database_url, TRUSTED_PROXY="127.0.0.1") as server:
        spoofed = [refused(server, f"203.0.113.{number}, 192.0.2.1") for number in range(3)]
        assert spoofed == [401, 401, 429]
        assert refused(server, "203.0.113.9", "192.0.2.1") == 429  # two lines are one
        assert refused(server, '"', "192.0.2.1") == 429  # whatever the client has sent
        assert refused(server, "192.0.2.1, 192.0.2.2") == 401
        assert refused(server, "2001:db8::1") == refused(server, "2001:db8::2") == 401
        assert refused(server, "2001:db8::3") == 429
        assert refused(server) == 401  # the proxy's own
        with Wire(server.url) as wire:  # of no interest here, and sent by clients, too
            target = request("GET", "/api/ann/tasks", "X-Forwarded-Proto: gopher, http")
            assert wire.send(target).answer().headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("value", ["x", "localhost", "127.0.0.1:80", "10.0.0.0/8", "0:0:0:0:0:0:0:1", "*"])
def test_a_proxy_that_could_never_be_met_or_be_anybody_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^TRUSTED_PROXY "):
        Settings.from_env({"TRUSTED_PROXY": value})
