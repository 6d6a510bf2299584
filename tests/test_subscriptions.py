"""Subscribing by message with `since`: the notifications for a topic that came before are replayed, none twice."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from carriers import host, uvicorn
from conftest import StartServer
from expected import TIME, ws_error
from processes import Server
from redis_server import RedisServer
from ws_clients import Client

NEVER_GIVEN = "550e8400-e29b-41d4-a716-446655440000"


def subscribe(client: Client, since: str | None, *topics: str) -> dict[str, Any]:
    """Subscribe, and return the data of the `resume` that follows the `subscribed`."""
    subscribed, resume = ask(client, since, *topics), client.receive()
    assert set(topics) <= set(subscribed["topics"])
    assert resume == {"type": "resume", "timestamp": TIME, "data": resume["data"]}
    assert set(resume["data"]) == {"position", "replayed", "complete"}
    data: dict[str, Any] = resume["data"]
    return data


def ask(client: Client, since: str | None, *topics: str) -> Any:
    """Subscribe, and return the `subscribed`."""
    answer = client.ask({"type": "subscribe", "topics": list(topics)} | ({} if since is None else {"since": since}))
    assert answer["type"] == "subscribed", answer
    return answer


def rest(client: Client, least: int = 0) -> list[str]:
    """Return so many notifications, which a pong may overtake, and those up to the answer to a ping after them."""
    first = client.receive_many(least)
    client.send({"type": "ping"})
    messages = [*first, *iter(client.receive, {"type": "pong", "timestamp": TIME})]
    return [message["data"]["message"] for message in messages]


def in_the_gap(server: Server) -> str:
    """Publish for everyone, some topics and a client; return the id before them."""
    [before] = server.publish("before")
    server.publish("red", topics=["red"])
    server.publish("all")
    server.publish("red and blue", topics=["red", "blue"])
    server.publish("ann", clients=["ann"])
    server.publish("blue", topics=["blue"])
    server.publish("ann and green", clients=["ann"], topics=["green"])
    return before


# The gap.


def test_a_gap_before_the_subscription_is_replayed(server: Server) -> None:
    """After a resume, `subscribed`, `resume` and the topic's notifications follow, then the live ones."""
    before = in_the_gap(server)
    client = server.join(query=f"client_id=ann&since={before}")
    assert client.receive()["data"] | {"position": ""} == {"position": "", "replayed": 3, "complete": True}
    assert rest(client, 3) == ["all", "ann", "ann and green"]
    data = subscribe(client, before, "red", "blue")
    position = server.read("/notifications?since=")["position"]
    assert data == {"position": position, "replayed": 3, "complete": True}
    [live] = server.publish("live", topics=["red"])
    assert rest(client, 4) == ["red", "red and blue", "blue", "live"]
    assert live > position


def test_without_since_a_subscription_holds_from_now_on(server: Server) -> None:
    """Neither a `resume` nor a replay comes."""
    before = in_the_gap(server)
    client = server.join(query=f"since={before}")
    client.receive_many(2)
    assert ask(client, None, "red")["topics"] == ["red"]
    assert rest(client) == []


def test_an_empty_since_subscribes_from_now_and_tells_the_position(server: Server) -> None:
    """It is that of the newest notification, from which the client misses nothing."""
    in_the_gap(server)
    client = server.join()
    position = server.read("/notifications?since=")["position"]
    assert subscribe(client, "", "red") == {"position": position, "replayed": 0, "complete": True}
    assert rest(client) == []


def test_an_id_in_upper_case_is_the_same_id(server: Server) -> None:
    """An id in upper case counts in the message as it does in the URL."""
    before = in_the_gap(server)
    assert subscribe(server.join(), before.upper(), "red")["replayed"] == 2


@pytest.mark.parametrize("since", [NEVER_GIVEN, "ffffffff-ffff-7fff-bfff-ffffffffffff"])
def test_an_id_that_the_log_never_gave_is_not_complete(start_server: StartServer, since: str) -> None:
    """All that is kept for the topic is replayed."""
    server = start_server()
    in_the_gap(server)
    client = server.join()
    assert subscribe(client, since, "red")["complete"] is False
    assert rest(client, 2) == ["red", "red and blue"]


def test_an_id_that_has_left_the_history_is_not_complete(start_server: StartServer) -> None:
    """The part that is kept is replayed."""
    server = start_server("--history-size", "3")
    before, *_ = server.publish(*map(str, range(5)), topics=["red"])
    client = server.join()
    data = subscribe(client, before, "red")
    assert (data["replayed"], data["complete"]) == (3, False)
    assert rest(client, 3) == ["2", "3", "4"]


# Nothing twice.


def test_nothing_that_came_otherwise_is_replayed(server: Server) -> None:
    """Notifications for a topic of the URL, for the client itself or for an earlier subscription are not repeated."""
    before = in_the_gap(server)
    client = server.join(query=f"client_id=ann&topics=red&since={before}")
    client.receive()
    assert rest(client, 5) == ["red", "all", "red and blue", "ann", "ann and green"]
    assert subscribe(client, before, "red", "blue", "green")["replayed"] == 1
    assert rest(client, 1) == ["blue"]
    assert subscribe(client, before, "red", "blue", "green")["replayed"] == 0
    assert rest(client) == []


def test_nothing_that_came_for_the_user_is_replayed_again(server: Server) -> None:
    """A notification for the user and a topic came at once; one from before the connection comes by the topic."""
    [before] = server.publish("before")
    server.publish("absent", users=["eve"], topics=["red"])
    client = server.join(query="user=eve")
    server.publish("both", users=["eve"], topics=["red"])
    server.publish("red", topics=["red"])
    assert rest(client, 1) == ["both"]
    assert subscribe(client, before, "red")["replayed"] == 2
    assert rest(client, 2) == ["absent", "red"]


def test_an_earlier_subscription_that_has_ended_counts(server: Server) -> None:
    """A topic's notifications from between two subscriptions are replayed alone."""
    [before] = server.publish("before")
    client = server.join()
    ask(client, None, "red")
    server.publish("first", topics=["red"])
    assert client.receive()["data"]["message"] == "first"
    client.ask({"type": "unsubscribe", "topics": ["red"]})
    server.publish("between", topics=["red"])
    assert subscribe(client, before, "red")["replayed"] == 1
    assert rest(client, 1) == ["between"]


def test_an_earlier_position_extends_the_replay(server: Server) -> None:
    """The second request asks for more than the first, and gets the difference."""
    ids = server.publish("0", "1", "2", "3", topics=["red"])
    client = server.join()
    assert subscribe(client, ids[2], "red")["replayed"] == 1
    assert rest(client, 1) == ["3"]
    assert subscribe(client, ids[0], "red")["replayed"] == 2
    assert rest(client, 2) == ["1", "2"]


def test_what_was_addressed_before_the_client_came_is_replayed_by_topic(server: Server) -> None:
    """A client without `since` did not get it in person."""
    before = in_the_gap(server)
    client = server.join("ann")
    assert subscribe(client, before, "green")["replayed"] == 1
    assert rest(client, 1) == ["ann and green"]


# Refused.


@pytest.mark.parametrize(
    ("since", "message"),
    [
        ("x", "Invalid since"),
        (NEVER_GIVEN + "0", "Invalid since"),
        (" ", "Invalid since"),
        (None, "since: expected string, got null"),
        (5, "since: expected string, got integer"),
        ([NEVER_GIVEN], "since: expected string, got array"),
    ],
)
def test_a_bad_since_is_an_error_that_changes_nothing(server: Server, since: object, message: str) -> None:
    """The client has the topics that it had before."""
    client = server.join(query="topics=blue")
    assert client.ask({"type": "subscribe", "topics": ["red"], "since": since}) == ws_error(message)
    assert client.ask({"type": "unsubscribe", "topics": ["none"]})["topics"] == ["blue"]


def test_a_topic_that_is_not_allowed_is_not_replayed(start_server: StartServer) -> None:
    """A token's topics are the bounds of every replay."""
    secret = "a secret of 32 characters or more"
    server = start_server("--jwt-secret", secret, "--api-key", "ci:a-key")
    key = {"headers": {"X-API-Key": "a-key"}}
    before = server.post({"message": "before"}, **key).headers["Notification-Id"]
    server.post({"message": "secret", "topics": ["red"]}, **key)
    client = server.join(query=f"token={jwt.encode({'topics': ['blue']}, secret)}")
    message = {"type": "subscribe", "topics": ["blue", "red"], "since": before}
    assert client.ask(message) == ws_error("Not allowed: topic red")
    assert subscribe(client, before, "blue")["replayed"] == 0
    assert rest(client) == []


# The seam, with every store and over every wire.


@pytest.fixture(params=["memory", "sqlite", "redis", "workers", "another server's send"])
def anywhere(
    request: pytest.FixtureRequest, start_server: StartServer, tmp_path: Path
) -> Iterator[tuple[Server, Server]]:
    """A server for clients, and one for publishers: two processes wherever there is a shared store."""
    match request.param:
        case "memory":
            server = start_server()
            yield server, server
        case "sqlite" | "redis":
            url = f"sqlite:{tmp_path / 'log.db'}"
            if request.param == "redis":
                redis: RedisServer = request.getfixturevalue("redis")
                url = redis.url
            yield start_server("--store", url), start_server("--store", url)
        case "workers":
            server = start_server("--workers", "2")
            yield server, server
        case _:
            server = host(uvicorn, "alone", "--ws", "websockets", NOTIFYD_MAX_CONNECTIONS="30")
            yield server, server
            server.kill()


def until(client: Client, field: str, value: str) -> list[Any]:
    """Return the notifications that come before the next message with this field."""
    notifications = []
    while (message := client.receive()).get(field) != value:
        if "id" in message:
            notifications.append(message)
    return notifications


def test_nothing_is_lost_or_repeated_at_the_seam(anywhere: tuple[Server, Server]) -> None:
    """Clients subscribe and unsubscribe while others publish: each gets the whole topic once, and in order."""
    server, elsewhere = anywhere
    [before] = elsewhere.publish("before")
    messages, chance = [str(number) for number in range(400)], random.Random(7)
    publisher = threading.Thread(target=elsewhere.publish, args=messages, kwargs={"topics": ["red"]})
    publisher.start()
    clients = [server.join() for _ in range(3)]
    received: list[list[Any]] = [[] for _ in clients]
    while any(len(got) < len(messages) for got in received):
        for client, got in zip(clients, received, strict=True):
            client.send({"type": "subscribe", "topics": ["red"], "since": got[-1]["id"] if got else before})
            got.extend(until(client, "type", "resume"))
            for _ in range(min(chance.randint(1, 40), len(messages) - len(got))):
                got.append(client.receive())
            client.send({"type": "unsubscribe", "topics": ["red"]})
            got.extend(until(client, "type", "subscribed"))
    publisher.join()
    assert [[one["data"]["message"] for one in got] for got in received] == [messages] * 3


def test_recipients_count_a_subscription_exactly(anywhere: tuple[Server, Server]) -> None:
    """A publish that counts no recipient reaches none, however close to the subscription it comes."""
    server, elsewhere = anywhere
    counted: list[int] = []

    def publish() -> None:
        counted.extend(elsewhere.notify(str(number), topics=["red"])["recipients"] for number in range(200))

    clients = [server.join() for _ in range(20)]
    publisher = threading.Thread(target=publish)
    publisher.start()
    for client in clients:
        client.send({"type": "subscribe", "topics": ["red"], "since": ""})
        assert until(client, "type", "resume") == []
    publisher.join()
    [last] = elsewhere.publish("last")
    received = [int(one["data"]["message"]) for client in clients for one in until(client, "id", last)]
    assert [received.count(number) for number in range(200)] == counted
