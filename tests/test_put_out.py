"""DELETE /clients/{client_id} and /users/{user}: clients are closed for good, and tokens revoked, on every process."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from signal import SIGCONT, SIGSTOP
from typing import Any
from urllib.parse import quote

import pytest
from conftest import EVERY_KIND, StartServer
from credentials import SECRET, bearer, token
from event_stream import Event, join
from expected import TIME, answered, http_error, invalid
from processes import Server, connected, eventually
from redis_server import RedisServer
from virtual import FakeConnection

from admission import Newcomer
from errors import Unauthorized
from guard_identity import Identity
from hub import Hub
from revocations import Revocations
from settings import Settings
from store import MemoryStore, Registration

KEY = {"X-API-Key": "a-key"}
FLAGS = ("--jwt-secret", SECRET, "--api-key", "ci:a-key")
# As Auth0 names its users.
USER = "auth0|5f7c"


class SlowStore(MemoryStore):
    """Takes a moment for each admission."""

    async def admit(self, client: Registration) -> str:
        await asyncio.sleep(0.05)
        return await super().admit(client)


@pytest.fixture(scope="module", params=EVERY_KIND)
def servers(request: pytest.FixtureRequest, start_together: Callable[..., list[Server]]) -> list[Server]:
    """The servers of one store, the last of which is asked."""
    return start_together(request.param, *FLAGS)


@pytest.fixture
def together(servers: list[Server]) -> Iterator[list[Server]]:
    yield servers
    for server in servers:
        server.forget_clients()


def delete(server: Server, path: str, body: object = None, **headers: str) -> Any:
    content = {} if body is None else {"json": body}
    return server.request("DELETE", path, headers=KEY | headers, **content)


def put_out(server: Server, user: str = USER, **body: object) -> Any:
    return delete(server, f"/users/{quote(user, safe='')}", body or None)


def disconnected(count: int) -> tuple[int, dict[str, object]]:
    return 200, {"status": "success", "disconnected": count, "timestamp": TIME}


def named(user: str, **claims: Any) -> str:
    return token(**{"sub": user, "iat": int(time.time()), **claims})


def joined(server: Server, shown: str, **options: Any) -> Any:
    return server.join(additional_headers=bearer(shown), **options)


def ended(reason: str) -> Event:
    return Event("closed", {"code": 1008, "reason": reason}, "disconnected")


# Clients and users.


def test_a_client_is_put_out(together: list[Server]) -> None:
    """Wherever it is connected, and it alone."""
    client = together[0].join("ann", additional_headers=KEY)
    other = together[0].join("anna", additional_headers=KEY)
    assert answered(delete(together[-1], "/clients/ann")) == disconnected(1)
    assert client.closed() == (1008, "Disconnected")
    assert other.ask({"type": "ping"})["type"] == "pong"
    unknown = 404, http_error("application", "Client ann is not connected")
    assert answered(delete(together[-1], "/clients/ann")) == unknown


def test_all_clients_of_a_user_are_put_out(together: list[Server]) -> None:
    """On every process, WebSockets and streams, and they are counted."""
    shown = named(USER)
    clients = [joined(server, shown) for server in together for _ in range(3)]
    streams = [join(server, f"token={shown}") for server in together]
    other = joined(together[0], named("auth0|5f7d"))
    assert answered(put_out(together[-1], reason="Bye")) == disconnected(4 * len(together))
    assert {client.closed() for client in clients} == {(1008, "Bye")}
    assert [stream.rest() for stream in streams] == [[ended("Bye")]] * len(together)
    assert other.ask({"type": "ping"})["type"] == "pong"
    assert answered(put_out(together[-1])) == disconnected(0)
    joined(together[0], shown)


def test_a_browser_whose_stream_was_put_out_stays_away(server: Server) -> None:
    """It comes back with the id of the last event, and gets the status that ends an EventSource for good."""
    stream = join(server, "client_id=ann")
    assert server.request("DELETE", "/clients/ann").status_code == 200
    assert stream.rest() == [ended("Disconnected")]
    back = server.get("/events?client_id=ann", headers={"Accept": "text/event-stream", "Last-Event-ID": stream.last_id})
    assert (back.status_code, back.content) == (204, b"")
    assert server.get(f"/events?lastEventId={stream.last_id}").status_code == 400


@pytest.mark.parametrize(
    ("reason", "told"), [("x" * 124, "x" * 123), ("é" * 62, "é" * 61), ("a" + "🚀" * 40, "a" + "🚀" * 30), (" ", " ")]
)
def test_a_reason_is_cut_to_a_close_frame(server: Server, reason: str, told: str) -> None:
    """At a whole character."""
    client, stream = server.join("ann"), join(server, "client_id=bob")
    for name in ("ann", "bob"):
        assert server.request("DELETE", f"/clients/{name}", json={"reason": reason}).status_code == 200
    assert client.closed() == (1008, told)
    assert stream.rest() == [ended(told)]


@pytest.mark.parametrize("path", ["/clients/ann", "/users/ann"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"reason": ""}, "reason: expected a text without control characters"),
        ({"reason": "a\nb"}, "reason: expected a text without control characters"),
        ({"reason": "\x7f"}, "reason: expected a text without control characters"),
        ({"reason": None}, "reason: expected string, got null"),
        ({"revoke": 1}, "revoke: expected boolean"),
        ({"revoke": True}, "revoke: "),
        ({"why": "x"}, "why: unknown field"),
        ([], "expected object"),
    ],
)
def test_a_bad_body_is_refused(server: Server, path: str, body: object, said: str) -> None:
    """And nobody is put out. Without tokens there is nothing to revoke, and a client has no tokens."""
    client = server.join(query="client_id=ann&user=ann")
    assert answered(server.request("DELETE", path, json=body)) == invalid(said)
    assert client.ask({"type": "ping"})["type"] == "pong"


def test_only_an_admin_puts_out(start_server: StartServer) -> None:
    server = start_server(*FLAGS)
    for path in ("/clients/ann", "/users/ann"):
        assert server.request("DELETE", path).status_code == 401
        assert server.request("DELETE", path, headers=bearer(named("ann", publish=True))).status_code == 403
    assert server.request("DELETE", "/users/ann", headers=bearer(named("ann", admin=True))).status_code == 200


# Tokens.


def test_a_revoked_token_is_refused_everywhere(together: list[Server]) -> None:
    """At once and on every process: handshakes, streams, publishes, reads and renewals."""
    user = f"revoked {time.time_ns()}"
    shown = named(user, publish=True, admin=True)
    without = token(sub=user, publish=True)
    client = joined(together[0], shown)
    renewing = joined(together[0], named("somebody else"))
    assert answered(put_out(together[-1], user, revoke=True)) == disconnected(1)
    for server in together:
        # Each time over another connection, so that each worker is asked.
        for old in [shown, without] * 4:
            headers = bearer(old) | {"Connection": "close"}
            for response in (
                server.get("/status", headers=headers),
                server.get("/events", headers=headers),
                server.post({"message": "x"}, headers=headers),
            ):
                assert answered(response) == (401, http_error("application", "Token revoked"))
                assert 'error_description="Token revoked"' in response.headers["WWW-Authenticate"]
    for server in together:
        for old in (shown, without):
            assert server.connect(additional_headers=bearer(old)).closed() == (1008, "Token revoked")
    assert client.closed() == (1008, "Disconnected")
    assert renewing.ask({"type": "auth", "token": shown})["message"] == "Token revoked"


def test_a_second_counts_as_a_whole(together: list[Server]) -> None:
    """A token of the second of its revocation is refused, a token of the next second is good."""
    user = f"second {time.time_ns()}"
    put_out(together[-1], user, revoke=True)
    at = int(time.time())
    assert together[0].connect(additional_headers=bearer(named(user, iat=at - 1))).closed() == (1008, "Token revoked")
    joined(together[0], named(user, iat=at + 1))
    joined(together[0], named("another", iat=at - 1))
    # A key is no token.
    together[0].join(additional_headers=KEY, query=f"user={quote(user)}")


def test_a_revocation_ends(start_server: StartServer) -> None:
    server = start_server(*FLAGS, "--revocation-ttl", "4")
    shown = bearer(named(USER, admin=True))
    assert put_out(server, revoke=True).status_code == 200
    assert server.get("/status", headers=shown).status_code == 401
    eventually(lambda: server.get("/status", headers=shown).status_code == 200)


@pytest.mark.parametrize("flags", [(), ("--api-key", "ci:a-key")])
def test_without_tokens_none_can_be_revoked(start_server: StartServer, flags: tuple[str, ...]) -> None:
    server = start_server(*flags)
    assert answered(put_out(server, revoke=True)) == invalid("revoke: there are no tokens")


def test_a_revocation_outlives_a_restart(start_server: StartServer, shared: str) -> None:
    """Where the store does."""
    shown = named(USER)
    server = start_server(*FLAGS, "--store", shared)
    assert put_out(server, revoke=True).status_code == 200
    server.stop()
    again = start_server(*FLAGS, "--store", shared)
    assert again.connect(additional_headers=bearer(shown)).closed() == (1008, "Token revoked")


def test_a_redis_that_lost_its_data_gets_the_revocations_back(start_server: StartServer, redis: RedisServer) -> None:
    """From a process that knows them, for the processes that start later."""
    flags = (*FLAGS, "--store", redis.url, "--store-prefix", "lost:")
    server, shown = start_server(*flags), named(USER)
    assert put_out(server, revoke=True).status_code == 200
    redis.kill()
    redis.start()
    eventually(lambda: server.get("/health").status_code == 200)
    eventually(lambda: USER in redis.command("HGETALL", "lost:revoked"))
    later = start_server(*flags)
    assert later.connect(additional_headers=bearer(shown)).closed() == (1008, "Token revoked")


def test_a_process_that_was_taken_for_dead_reads_on_first(start_server: StartServer) -> None:
    """It knows nothing of the revocation when it goes on, and must not let its first request in."""
    server = start_server(*FLAGS, "--workers", "2", constants={"store.LEASE_SECONDS": 1})
    shown = named(USER, publish=True)
    connections: dict[int, socket.socket] = {}
    while len(connections) < 2:
        connection, pid = connected(server)
        connections.setdefault(pid, connection)
    (stopped, connection), (_, asked) = connections.items()
    os.kill(stopped, SIGSTOP)
    asked.sendall(
        b"DELETE /users/auth0%7C5f7c HTTP/1.1\r\nHost: localhost\r\nX-API-Key: a-key\r\nContent-Length: 15\r\n\r\n"
        b'{"revoke":true}'
    )
    assert b" 200 OK" in asked.recv(4096)
    request = f"POST /notify HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {shown}\r\nContent-Length: 15\r\n\r\n"
    connection.sendall(request.encode() + b'{"message":"x"}')
    os.kill(stopped, SIGCONT)
    assert b" 401 " in connection.recv(4096)


def test_many_clients_of_a_revocation_that_no_question_told_hold_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are closed in slices."""
    monkeypatch.setattr("slices.SLICE_SECONDS", 0)
    monkeypatch.setattr("presence.FOLLOW_SECONDS", 0)
    revocations = Revocations(60)
    hub = Hub(Settings(), revocations=revocations)

    async def closed() -> None:
        async with hub:
            for _ in range(3):
                await hub.admit(FakeConnection(), Newcomer(identity=Identity(user=USER)))
            revocations.add(USER, int(time.time()))
            revocations.learned.append(USER)
            left = set[int]()
            while hub.clients:
                left.add(len(hub.clients))
                await asyncio.sleep(0)
            assert left == {3, 2, 1}

    asyncio.run(closed())


def test_a_newcomer_that_is_being_admitted_does_not_slip_through() -> None:
    """Its token was good when it was read, and is revoked while the store admits it."""
    revocations = Revocations(60)
    hub = Hub(Settings(), SlowStore(Settings()), revocations=revocations)

    async def admitted() -> None:
        async with hub:
            identity = Identity(user=USER, name=USER)
            newcomer = asyncio.ensure_future(hub.admit(FakeConnection(), Newcomer(identity=identity)))
            await asyncio.sleep(0)
            assert await hub.presence.disconnect_user(USER, "Disconnected", revoke=True) == 0
            with pytest.raises(Unauthorized, match="Token revoked"):
                await newcomer
            assert not hub.clients

    asyncio.run(admitted())


@pytest.mark.parametrize("wanted", ["client", "user"])
def test_a_newcomer_that_is_being_admitted_is_put_out(wanted: str) -> None:
    """The registry counts it already."""
    hub = Hub(Settings(), SlowStore(Settings()))

    async def admitted() -> None:
        async with hub:
            connection = FakeConnection(is_stream=True)
            asyncio.ensure_future(hub.admit(connection, Newcomer("ann", user=USER)))  # noqa: RUF006
            await asyncio.sleep(0)
            if wanted == "client":
                await hub.presence.disconnect("ann", "Bye")
            else:
                assert await hub.presence.disconnect_user(USER, "Bye") == 1
            assert connection.goodbye == (1008, "Bye")
            assert not hub.clients

    asyncio.run(admitted())


def test_the_topics_of_a_newcomer_that_is_being_admitted_change() -> None:
    """The registry counts it already."""
    hub = Hub(Settings(), SlowStore(Settings()))

    async def changed() -> None:
        async with hub:
            newcomer = asyncio.ensure_future(hub.admit(FakeConnection(), Newcomer("ann", user=USER)))
            await asyncio.sleep(0)
            assert await hub.presence.change_topics(USER, ["builds"], []) == 1
            assert (await newcomer).topics == {"builds"}

    asyncio.run(changed())


@pytest.mark.parametrize(
    ("request_line", "body"),
    [
        ("POST /notify", b'{"message":"x"}'),
        ("POST /users/online", b'{"users":["a"]}'),
        ("DELETE /users/a", b'{"reason":"Out"}'),
    ],
)
def test_a_body_that_comes_late_is_refused(start_server: StartServer, request_line: str, body: bytes) -> None:
    """The token was good when the head came."""
    server = start_server(*FLAGS)
    shown = named(USER, publish=True, admin=True)
    head = f"{request_line} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {shown}\r\n"
    head += f"Content-Length: {len(body)}\r\n"
    connection = server.raw(f"{head}Expect: 100-continue\r\n\r\n".encode())
    # The server asks for the body of a request that it has let in.
    assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
    put_out(server, revoke=True)
    connection.sendall(body)
    assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_a_refused_token_is_in_the_log(start_server: StartServer) -> None:
    """A stolen phone that tries again is seen."""
    server = start_server(*FLAGS)
    put_out(server, revoke=True)
    server.get("/status", headers=bearer(named(USER, admin=True)))
    server.wait_for_line("Credentials from 127.0.0.1 are refused: Token revoked")
