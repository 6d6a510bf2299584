"""notifyd inside other applications and under other servers: the same behaviour under each of them."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from signal import Signals
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from carriers import CARRIERS, QUIET, client_of, first_quick, granian, gunicorn, host, uvicorn
from event_stream import closed, join
from expected import (
    CLIENT_ID,
    COUNT,
    PONG,
    SHUTDOWN,
    SYSTEM,
    TIME,
    UUID7,
    Record,
    answered,
    http_error,
    naming,
    notification,
    parse,
    welcome,
    ws_error,
)
from processes import Server, eventually
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount

from notifyd import Settings, create_app, drains_on_signal


@pytest.fixture(scope="module", params=first_quick(CARRIERS))
def embedded(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A host with notifyd inside, under one of the servers that can carry it."""
    command, app, flags, prefix = CARRIERS[request.param]
    server = host(command, app, *flags, prefix=prefix)
    yield server
    server.kill()


# Under every server.


def test_http_answers_under_its_prefix(embedded: Server) -> None:
    """Every endpoint is there, under the path that the host chose."""
    for path in ("/health", "/metrics", "/metrics/prometheus", "/status"):
        assert embedded.get(path).status_code == 200
    assert embedded.read("/health")["connections"] == {"active": 0, "total": COUNT, "max_allowed": 4}


def test_a_client_is_welcomed(embedded: Server) -> None:
    """The first message is the documented welcome."""
    assert embedded.connect().receive() == welcome(CLIENT_ID)


def test_a_notification_reaches_everyone(embedded: Server) -> None:
    """Three clients get it, and the answer says so."""
    clients = [embedded.join() for _ in range(3)]
    assert embedded.notify("hi", type="alert", data={"a": 1})["recipients"] == 3
    assert [client.receive() for client in clients] == [notification({"message": "hi", "a": 1}, "alert")] * 3


def test_a_burst_arrives_whole_and_in_order(embedded: Server) -> None:
    """Each of a hundred notifications is a message of its own."""
    client = embedded.join()
    for number in range(100):
        embedded.notify(str(number))
    assert [each["data"]["message"] for each in client.receive_many(100)] == [str(number) for number in range(100)]


def test_messages_are_answered(embedded: Server) -> None:
    """Pings, text or binary, get pongs, and mistakes get errors."""
    client = embedded.join()
    assert client.ask({"type": "ping"}) == PONG
    assert client.ask(b'{"type": "ping"}') == PONG
    assert client.ask("nonsense") == ws_error("Invalid JSON format")


def test_a_refusal_has_its_code_and_reason(embedded: Server) -> None:
    """A duplicate, and a fifth of four clients, get the same close under every server."""
    for client_id in ("bob", None, None, None):
        embedded.join(client_id)
    duplicate, fifth = embedded.connect("bob"), embedded.connect()
    assert duplicate.closed() == (1008, "Client bob is already connected")
    assert fifth.closed() == (1008, "Connection limit exceeded: 4/4")


def test_a_client_that_leaves_is_gone(embedded: Server) -> None:
    """A client that closes makes room, and so does one that breaks off."""
    embedded.join("alice").leave()
    embedded.join_bare("bob").reset()
    eventually(lambda: embedded.active() == 0)


def test_status_lists_the_clients(embedded: Server) -> None:
    """The user agent comes through the host."""
    embedded.join("alice", user_agent_header="agent/1.0")
    assert embedded.read("/status")["connections"]["details"] == [
        {"client_id": "alice", "connected_at": TIME, "last_ping": TIME, "user_agent": "agent/1.0"}
    ]


def test_a_user_in_a_path_is_one_segment(embedded: Server) -> None:
    """The path comes as it was sent; a WebSocket and a stream are put out by it."""
    for user in ("a/b", "a/topics", "..", "J\u00fcrgen %2F", "online"):
        name = quote(user, safe="").replace(".", "%2E")
        client, stream = embedded.join(query=f"user={name}"), join(embedded, f"user={name}")
        assert embedded.read(f"/users/{name}") == {"user": user, "online": True, "clients": 2, "timestamp": TIME}
        assert embedded.http.post(f"/users/{name}/topics", json={"subscribe": ["t"]}).json()["clients"] == 2
        assert embedded.request("DELETE", f"/users/{name}", json={"reason": "Bye"}).json()["disconnected"] == 2
        assert client.closed() == (1008, "Bye")
        assert stream.rest()[-1] == closed(1008, "Bye", "disconnected")
    assert embedded.get("/users/a/b").status_code == 404


def test_errors_have_the_documented_body(embedded: Server) -> None:
    """404, 405 and 400 are notifyd's own, not the host's."""
    answers = [embedded.get("/nothing"), embedded.get("/notify"), embedded.post({"message": ""})]
    assert [answered(answer) for answer in answers] == [
        (404, http_error("application", naming())),
        (405, http_error("validation", naming())),
        (400, http_error("validation", naming("message"))),
    ]


def test_a_foreign_origin_is_refused(embedded: Server) -> None:
    """The check of the origin holds in a host as well."""
    assert embedded.get("/health", headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_stalled_client_costs_the_others_nothing(embedded: Server) -> None:
    """While one client doesn't read, another gets everything at once."""
    embedded.join_bare(receive_buffer=4096)
    reader = embedded.join()
    for number in range(100):
        embedded.notify(str(number), data={"pad": "x" * 60_000})
    assert [each["data"]["message"] for each in reader.receive_many(100)] == [str(number) for number in range(100)]


# Inside a host.


@pytest.fixture(scope="module")
def starlette() -> Iterator[Server]:
    """A Starlette host with two hubs in it; it runs the lifespan of neither."""
    server = host(uvicorn, "in_starlette", prefix="/notifications")
    yield server
    server.kill()


def announce(server: Server) -> Any:
    response = server.request("POST", server.url.replace("/notifications", "/announce"))
    assert response.status_code == 200, response.text
    return parse(response.content)


def test_the_host_publishes_from_inside(starlette: Server) -> None:
    """await hub.notify(...) reaches clients as POST /notify does."""
    client = starlette.join()
    announce(starlette)
    assert client.receive() == notification({"message": "from inside", "priority": "high"}, "alert")


def test_the_receipt_tells_id_and_recipients(starlette: Server) -> None:
    """The receipt's id is that of the notification that clients get."""
    client = starlette.join()
    receipt = announce(starlette)
    assert receipt == {"id": UUID7, "recipients": 1}
    assert client.receive()["id"] == receipt["id"]


def test_a_message_is_all_that_notify_needs(starlette: Server) -> None:
    """Type and data have the same defaults as in POST /notify."""
    client = starlette.join()
    starlette.request("POST", starlette.url.replace("/notifications", "/shout"))
    assert client.receive() == notification({"message": "hi"})


def test_two_hubs_in_one_host_know_nothing_of_each_other(starlette: Server) -> None:
    """A notification published in one app does not reach the clients of another."""
    client = starlette.join()
    elsewhere = starlette.request(
        "POST", starlette.url.replace("/notifications", "/other/hub/notify"), json={"message": "elsewhere"}
    )
    assert parse(elsewhere.content)["recipients"] == 0
    starlette.notify("here")
    assert client.receive()["data"]["message"] == "here"


@pytest.mark.parametrize("app", ["with_lifespan", "in_starlette", "alone"])
def test_a_host_ends_cleanly(app: str) -> None:
    """SIGTERM with a client connected ends the host without a word about exceptions."""
    server = host(uvicorn, app, prefix="" if app == "alone" else "/notifications")
    client = server.join()
    server.signal(signal.SIGTERM)
    client.closed()
    status = server.exit_status()
    server.kill()
    assert status in (0, -signal.SIGTERM)


STREAM = b"GET /notifications/events HTTP/1.1\r\nHost: localhost\r\n\r\n"


def open_stream(server: Server) -> socket.socket:
    """Open a stream of which nothing is read, so that the client never leaves by itself."""
    stream = server.raw(STREAM.replace(b"localhost", f"127.0.0.1:{server.port}".encode()))
    assert b"200" in stream.recv(4096)
    return stream


@pytest.mark.parametrize(
    ("server", "number"), [(uvicorn, signal.SIGTERM), (uvicorn, signal.SIGINT), (gunicorn, signal.SIGTERM)]
)
def test_a_host_drains_before_its_server_hears_the_signal(server: Callable[..., list[str]], number: Signals) -> None:
    """Clients are told, a stream does not keep the process, and after shutdown_timeout the rest is closed with 1001."""
    running = host(server, "draining", prefix="/notifications", NOTIFYD_SHUTDOWN_TIMEOUT="0.5")
    client, _ = running.join(), open_stream(running)
    running.signal(number)
    assert client.receive_many(2) == [SYSTEM, SHUTDOWN]
    assert client.closed() == (1001, "Server shutting down")
    assert running.exit_status() in (0, -number)
    running.kill()


@pytest.mark.parametrize("server", [granian])
def test_a_stream_does_not_keep_a_host_that_hears_signals_itself(server: Callable[..., list[str]]) -> None:
    """Granian and Hypercorn hear the signal on the event loop while the drain runs, and end WebSockets in their way."""
    running = host(server, "draining", prefix="/notifications", NOTIFYD_SHUTDOWN_TIMEOUT="0.5")
    client, _ = running.join(), open_stream(running)
    running.signal()
    client.closed()
    running.exit_status()
    running.kill()


def test_a_second_signal_ends_the_drain_of_a_host() -> None:
    """It closes the clients at once, with the same code."""
    running = host(uvicorn, "draining", prefix="/notifications", NOTIFYD_SHUTDOWN_TIMEOUT="60")
    client, _ = running.join(), open_stream(running)
    running.signal()
    assert client.receive_many(2) == [SYSTEM, SHUTDOWN]
    running.signal()
    assert client.closed() == (1001, "Server shutting down")
    assert running.exit_status() in (0, -signal.SIGTERM)
    running.kill()


def test_a_server_that_handles_signals_outside_of_python_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python could not put such a handler back, as an embedded interpreter has one; the Hub runs all the same."""
    changed: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: changed.append(number))

    async def lifespan() -> bool:
        hub = create_app(Settings(notification_interval=0)).hub
        async with drains_on_signal(hub):
            return hub.is_ready

    assert (asyncio.run(lifespan()), changed) == (True, [])


def test_test_notifications_come_in_a_host() -> None:
    """The hub's own tasks run although the mounted app gets no lifespan."""
    server = host(uvicorn, "in_starlette", prefix="/notifications", NOTIFYD_NOTIFICATION_INTERVAL="0.2")
    received = server.join().receive()
    server.kill()
    assert received["type"] == "test_notification"


# In Starlette's TestClient.


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """notifyd mounted in a Starlette app, in this very process."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    return Starlette(routes=[Mount("/notifications", app=create_app())])


def test_a_test_client_is_served(in_process: Any) -> None:
    """A host's own tests can publish and receive without any server."""
    with (
        client_of(in_process) as client,
        client.websocket_connect("/notifications/ws?client_id=bob") as websocket,
    ):
        assert Record(websocket.receive_json()) == welcome("bob")
        assert client.post("/notifications/notify", json={"message": "hi"}).json()["recipients"] == 1
        assert Record(websocket.receive_json()) == notification({"message": "hi"})


def test_a_test_client_sees_a_refusal(in_process: Any) -> None:
    """The code and the reason of a close arrive in the host's tests."""
    with (
        client_of(in_process) as client,
        client.websocket_connect("/notifications/ws?client_id=a%20b") as websocket,
    ):
        assert websocket.receive() == {"type": "websocket.close", "code": 1008, "reason": "Invalid client_id"}


def test_a_test_client_without_a_context_is_served(in_process: Any) -> None:
    """Then each request runs in an event loop of its own, and the hub must not depend on the first one."""
    client = client_of(in_process)
    assert [client.get("/notifications/health").status_code for _ in range(2)] == [200, 200]
    with client.websocket_connect("/notifications/ws") as websocket:
        assert websocket.receive_json()["type"] == "welcome"


def test_lines_may_be_the_first_request_of_a_hub(in_process: Any) -> None:
    """In a host without a lifespan; and the first in another event loop."""
    client, headers = client_of(in_process), {"Content-Type": "application/x-ndjson"}
    sent = [client.post("/notifications/notify/batch", content=b'{"message":"x"}', headers=headers) for _ in range(2)]
    assert [(answer.status_code, answer.json()["recipients"]) for answer in sent] == [(200, 0)] * 2


# In the middleware of a host.


class TooBig(Exception):
    """An exception of a host's own middleware."""


async def limits_bodies(scope: Any, receive: Any, send: Any) -> None:
    """A host with a middleware that refuses every body, and answers in its own way."""

    async def refuse() -> Any:
        raise TooBig

    try:
        await create_app()(scope, refuse, send)
    except TooBig:
        await PlainTextResponse("Too big for us", 413)(scope, receive, send)


async def adds_a_slash(scope: Any, receive: Any, send: Any) -> None:
    """A host that ends the path of a mount with a slash, as Litestar does."""
    await create_app()(scope | {"path": scope["path"].rstrip("/") + "/"}, receive, send)


def answer_of(app: Any, method: str, path: str, body: Any = b"") -> tuple[int, str]:
    """Status and text of an answer, without any server."""

    async def ask() -> tuple[int, str]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            response = await client.request(method, path, content=body)
            return response.status_code, response.text

    return asyncio.run(ask())


def test_a_hosts_own_limit_of_a_body_answers_for_itself() -> None:
    """An exception out of `receive` reaches the middleware that raised it."""
    assert answer_of(limits_bodies, "POST", "/notify", b"{}") == (413, "Too big for us")


def test_starlettes_limit_of_a_body_answers_for_itself() -> None:
    """The host's limit applies to a body without Content-Length, too."""
    module = pytest.importorskip("starlette.middleware.body_limit", reason="this Starlette limits no bodies")
    mounted = Starlette(routes=[Mount("/notifications", app=create_app())])
    app = module.RequestBodyLimitMiddleware(mounted, max_body_size=10)

    async def body() -> Any:
        yield b'{"message": "more than ten bytes"}'

    assert answer_of(app, "POST", "/notifications/notify", body()) == (413, "Content Too Large")


@pytest.mark.parametrize("path", ["/", "/health", "/health/live", "/status"])
def test_a_slash_that_the_host_adds_does_not_count(path: str) -> None:
    """The client asked for a path that is there."""
    assert answer_of(adds_a_slash, "GET", path)[0] == 200


@pytest.mark.parametrize("path", ["/health/", "/health%2F", "/nothing"])
def test_a_slash_of_the_clients_still_counts(path: str) -> None:
    """There is no such path, with the host's slash or without."""
    assert answer_of(adds_a_slash, "GET", path)[0] == 404
