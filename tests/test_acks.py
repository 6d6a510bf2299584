"""Acknowledgements: the server remembers how far a client is, and resumes it from there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jwt
import pytest
from conftest import StartServer
from event_stream import Stream
from expected import ws_error
from processes import Server, eventually
from redis_server import RedisServer
from websockets.exceptions import ConnectionClosed
from ws_clients import Client

NEVER_GIVEN = "550e8400-e29b-41d4-a716-446655440000"


def ack(client: Client, id: str) -> None:
    """Acknowledge, and wait until the server has heard of it: there is no answer."""
    client.send({"type": "ack", "id": id})
    client.send({"type": "ping"})
    until(client, lambda message: message["type"] == "pong")


def until(client: Client, fits: Callable[[Any], bool]) -> None:
    while not fits(client.receive()):
        pass


@pytest.fixture
def server(start_server: StartServer) -> Server:
    """A server that knows nobody."""
    return start_server()


def acked(server: Server, query: str = "client_id=ann") -> Client:
    return server.join(query=f"{query}&since=acked")


def resume(client: Client) -> tuple[bool, list[str]]:
    """Return whether a resume is complete, and the messages of its replay."""
    data = client.receive()["data"]
    return data["complete"], [message["data"]["message"] for message in client.receive_many(data["replayed"])]


@pytest.fixture(params=["memory", "sqlite", "redis", "workers"])
def anywhere(request: pytest.FixtureRequest, start_server: StartServer, tmp_path: Path) -> tuple[Server, Server]:
    """A server for a client, and one for it to come back to: two processes wherever there is a shared store."""
    match request.param:
        case "memory":
            server = start_server()
            return server, server
        case "sqlite" | "redis":
            url = f"sqlite:{tmp_path / 'log.db'}"
            if request.param == "redis":
                redis: RedisServer = request.getfixturevalue("redis")
                url = redis.url
            return start_server("--store", url), start_server("--store", url)
        case "workers":
            server = start_server("--workers", "2")
            return server, server
    pytest.fail("no such store")


# Resume.


def test_a_client_goes_on_after_the_last_that_it_has_acknowledged(anywhere: tuple[Server, Server]) -> None:
    """At once, on whichever process it comes back to, without any storage of its own."""
    here, there = anywhere
    for _ in range(3):
        client = acked(here)
        assert client.receive()["type"] == "resume"
        one, *_ = here.publish("one", "two", "three")
        assert [client.receive()["data"]["message"] for _ in range(3)] == ["one", "two", "three"]
        ack(client, one)
        client.leave()
        again = acked(there)
        assert resume(again) == (True, ["two", "three"])
        [four] = here.publish("four")
        until(again, lambda message, four=four: message.get("id") == four)
        ack(again, four)
        again.leave()
        here, there = there, here


def test_nothing_is_replayed_to_a_client_that_has_acknowledged_everything(server: Server) -> None:
    client = server.join("ann")
    ack(client, server.publish("one")[0])
    client.leave()
    client = acked(server)
    assert resume(client) == (True, [])
    server.publish("two")
    client.leave()
    assert resume(acked(server)) == (True, ["two"])


def test_without_a_position_a_client_starts_from_now(server: Server) -> None:
    """And nothing is missing, as far as it was ever promised anything."""
    [newest] = server.publish("earlier")
    assert acked(server).receive()["data"] == {"position": newest, "replayed": 0, "complete": True}


def test_acknowledgements_are_cumulative(server: Server) -> None:
    """An older one changes nothing, nor does a repetition. The letters of an id may be large."""
    one, two, _ = server.publish("one", "two", "three")
    client = server.join("ann")
    for id in (two.upper(), one, two):
        ack(client, id)
    client.leave()
    assert resume(acked(server)) == (True, ["three"])


def test_a_position_that_has_left_the_log_is_incomplete(start_server: StartServer) -> None:
    """As it is for every other resume: everything that is kept is replayed."""
    server = start_server("--history-size", "2")
    client = server.join("ann")
    ack(client, server.publish("one")[0])
    client.leave()
    server.publish("two", "three", "four")
    eventually(lambda: server.read("/notifications")["complete"] is False)
    assert resume(acked(server)) == (False, ["three", "four"])


def test_a_user_has_a_position_of_its_own(server: Server) -> None:
    """Somebody else who takes the client_id neither gets nor moves it."""
    one, _two = server.publish("one", "two")
    client = server.join(query="client_id=ann&user=a")
    ack(client, one)
    client.leave()
    other = acked(server, "client_id=ann&user=b")
    assert resume(other) == (True, [])
    ack(other, server.publish("three")[0])
    other.leave()
    assert resume(acked(server, "client_id=ann&user=a")) == (True, ["two", "three"])


def test_a_token_names_whose_position_it_is(start_server: StartServer) -> None:
    secret = "a secret of 32 characters or more"
    server = start_server("--jwt-secret", secret)
    tokens = {user: jwt.encode({"sub": user}, secret, "HS256") for user in ("a", "b")}
    headers = {"Authorization": f"Bearer {jwt.encode({'publish': True}, secret, 'HS256')}"}

    def publish(message: str) -> str:
        return str(server.post({"message": message}, headers=headers).headers["notification-id"])

    client = server.join(query=f"client_id=a&token={tokens['a']}")
    ack(client, publish("one"))
    client.leave()
    publish("two")
    assert resume(acked(server, f"client_id=a&token={tokens['a']}")) == (True, ["two"])
    assert acked(server, f"client_id=b&token={tokens['b']}").receive()["data"]["replayed"] == 0


def test_a_client_id_that_the_server_has_made_up_is_not_remembered(server: Server) -> None:
    """Its acknowledgements are taken all the same."""
    client = server.connect()
    name = client.receive()["client_id"]
    ack(client, server.publish("one")[0])
    client.leave()
    server.publish("two")
    assert resume(acked(server, f"client_id={name}")) == (True, [])
    assert resume(acked(server, "")) == (True, [])


def test_a_stream_resumes_from_what_was_acknowledged_elsewhere(server: Server) -> None:
    """It cannot acknowledge, but the client_id may have done so over a WebSocket."""
    one, two = server.publish("one", "two")
    client = server.join("ann")
    ack(client, one)
    client.leave()
    stream = Stream(server, "client_id=ann&since=acked")
    welcome, resumed, event = stream.next(), stream.next(), stream.next()
    assert welcome is not None and resumed is not None and event is not None
    assert (welcome.id, resumed.data["data"]["replayed"], event.id) == (one, 1, two)


def test_the_history_shows_what_a_client_has_yet_to_acknowledge(server: Server) -> None:
    client = server.join("ann")
    ack(client, server.publish("one")[0])
    server.publish("two")
    server.publish("three", clients=["ann"])
    eventually(lambda: shown(server, "client_id=ann&since=acked") == ["two", "three"])
    assert shown(server, "client_id=bob&since=acked") == shown(server, "since=acked") == []


def shown(server: Server, query: str) -> list[str]:
    return [one["data"]["message"] for one in server.read(f"/notifications?{query}")["notifications"]]


def test_a_subscription_begins_after_what_was_acknowledged(server: Server) -> None:
    """On this connection, or before it."""
    one, *_ = server.publish("one", "two", topics=["red"])
    client = server.join("ann")
    ack(client, one)
    assert subscribed(client, "red") == ["two"]
    client.leave()
    server.publish("three", topics=["red"])
    assert subscribed(server.join("ann"), "red") == ["two", "three"]
    assert subscribed(server.join("bob"), "red") == []


def subscribed(client: Client, topic: str) -> list[str]:
    assert client.ask({"type": "subscribe", "topics": [topic], "since": "acked"})["type"] == "subscribed"
    complete, messages = resume(client)
    assert complete
    return messages


# The position is kept.


def test_it_outlives_the_connection_and_the_processes(start_server: StartServer, tmp_path: Path) -> None:
    """Of a crash it survives all but the last second."""
    flags = "--store", f"sqlite:{tmp_path}/log.db"
    server = start_server(*flags)
    one, two, _three = server.publish("one", "two", "three")
    ann, bob = server.join("ann"), server.join("bob")
    ack(ann, one)
    ack(bob, two)
    ann.leave()
    eventually(lambda: shown(server, "client_id=bob&since=acked") == ["three"])
    server.kill()
    server = start_server(*flags)
    assert shown(server, "client_id=ann&since=acked") == ["two", "three"]
    assert shown(server, "client_id=bob&since=acked") == ["three"]


def test_it_is_kept_through_a_drain(start_server: StartServer, tmp_path: Path) -> None:
    flags = "--store", f"sqlite:{tmp_path}/log.db"
    server = start_server(*flags, "--shutdown-timeout", "0")
    one, _ = server.publish("one", "two")
    client = server.join("ann")
    ack(client, one)
    server.drain()
    assert server.exit_status() == 0
    assert resume(acked(start_server(*flags))) == (True, ["two"])


def test_a_silent_client_that_acknowledges_is_told_positions(start_server: StartServer) -> None:
    """It acknowledges those as well, so the log does not leave it behind."""
    server = start_server("--history-size", "2", "--ping-interval", "0.2")
    client = server.join("ann")
    ack(client, server.publish("one")[0])
    [newest] = server.publish(*"abcdef", clients=["bob"])[-1:]
    until(client, lambda message: message.get("position") == newest)
    client.send({"type": "ack", "id": newest})
    client.leave()
    server.publish("two")
    assert resume(acked(server)) == (True, ["two"])


# The message.


def test_an_acknowledgement_has_no_answer(server: Server) -> None:
    """Neither the first nor a repetition, nor one of an id that the log never gave."""
    [one] = server.publish("one")
    client = server.join("ann")
    for id in (one, one, "00000000-0000-0000-0000-000000000000"):
        client.send({"type": "ack", "id": id})
    assert client.ask({"type": "ping"})["type"] == "pong"


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({}, "id: required, but missing"),
        ({"id": None}, "id: expected string, got null"),
        ({"id": 18}, "id: expected string, got integer"),
        ({"id": ""}, "id: expected the id of a notification, got ''"),
        ({"id": "acked"}, "id: expected the id of a notification, got 'acked'"),
        ({"id": "x" * 100}, f"id: expected the id of a notification, got '{'x' * 64}'"),
        ({"id": "ffffffff-ffff-7fff-bfff-ffffffffffff"}, "id: ahead of the log"),
    ],
)
def test_an_id_that_is_none_or_ahead_is_an_error(server: Server, message: dict[str, Any], error: str) -> None:
    """It changes nothing."""
    one, *_ = server.publish("one", "two")
    client = server.join("ann")
    ack(client, one)
    assert client.ask({"type": "ack", **message}) == ws_error(error)
    client.leave()
    assert resume(acked(server)) == (True, ["two"])


def test_acknowledgements_do_not_count_for_the_rate(server: Server) -> None:
    """A client may acknowledge each of a thousand notifications."""
    client = server.join("ann")
    for batch in range(4):
        for id in server.publish(*(f"{batch}" for _ in range(250))):
            client.send({"type": "ack", "id": id})
    until(client, lambda message: message["data"]["message"] == "3")
    client.send({"type": "ping"})
    until(client, lambda message: message["type"] == "pong")


def test_repetitions_count_for_the_rate(server: Server) -> None:
    """So nobody sends them for ever."""
    [one] = server.publish("one")
    client = server.join("ann")
    with suppress(ConnectionClosed):
        for _ in range(1000):
            client.send({"type": "ack", "id": one})
    assert client.closed() == (1008, "Message rate exceeded")
