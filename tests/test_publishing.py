"""Publishing over the WebSocket: the same requests, checks and rights as POST /notify, answered in their order."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from bytes import masked
from carriers import CARRIERS, first_quick, host
from conftest import EVERY_KIND, StartServer
from credentials import SECRET, token
from expected import COUNT, ERROR_ID, PING, PONG, TIME, UUID7, Like, naming, notification
from processes import Server, eventually
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode
from ws_clients import PATIENCE, BareClient, Client

import schemas
from connection import SendConnection, WebSocketCarrier
from errors import InvalidRequest

OPEN = "--publish-over-websocket"
KEY = "key-of-ci-4711"


def publish(message: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"type": "publish", "message": message, **fields}


def published(ref: str | None = None, recipients: object = COUNT) -> dict[str, Any]:
    return {"type": "published", "id": UUID7, "recipients": recipients, "ref": ref, "timestamp": TIME}


def refused(message: object, ref: str | None = None, code: int = 1008) -> dict[str, Any]:
    return {"type": "error", "error_id": ERROR_ID, "message": message, "code": code, "ref": ref, "timestamp": TIME}


def answers(client: Client | BareClient, count: int) -> list[Any]:
    """Return the next answers, without the notifications between them."""
    found: list[Any] = []
    while len(found) < count:
        message = client.receive()
        found += [message] if message["type"] in ("published", "error", "pong", "subscribed") else []
    return found


def refs(client: Client | BareClient, count: int) -> list[str]:
    return [answer["ref"] for answer in answers(client, count) if answer["type"] == "published"]


def frames(count: int, width: int = 0, **fields: Any) -> bytes:
    requests = (publish(ref=str(number).zfill(width), **fields) for number in range(count))
    return b"".join(masked(Opcode.TEXT, json.dumps(request).encode()) for request in requests)


def sent(server: Server) -> int:
    return int(server.read("/status")["notification_service"]["notifications_sent"])


@pytest.fixture(scope="module")
def opened() -> Any:
    """A server without authentication on which everybody may publish."""
    server = Server.notifyd(OPEN, "--notification-interval", "0", "--ping-interval", "0", "--max-connections", "50")
    yield server
    server.stop()


@pytest.fixture
def publisher(opened: Server) -> Client:
    """A client that follows nothing but broadcasts."""
    return opened.join("publisher")


# The request and its answer.


def test_a_publish_is_answered_and_delivered(opened: Server, publisher: Client) -> None:
    """The notification has its own type in `notification_type`, and its addressees are those of POST /notify."""
    red, user = opened.join("red", query="topics=red"), opened.join(query="user=ann")
    request = publish(notification_type="alert", data={"a": 1}, topics=["red"], clients=["red"], users=["ann"], ref="7")
    assert publisher.ask(request) == published("7", 2)
    told = notification({"message": "hi", "a": 1}, "alert")
    for client in (red, user):
        message = client.receive()
        assert message.pop("topics") == ["red"]
        assert message == told
    assert opened.read("/notifications?topics=red")["notifications"][-1]["type"] == "alert"


def test_the_answers_come_in_the_order_of_the_requests(opened: Server, publisher: Client) -> None:
    """Also those of refused requests, of other messages, and of a message that waits for the store."""
    sequence = [publish(topics=["x"], ref="a"), {"type": "publish", "ref": "b"}, {"type": "ping"}]
    sequence += [publish(topics=["x"], key="k"), publish(topics=["x"], ref=""), {"type": "subscribe", "topics": ["y"]}]
    sequence += [publish(topics=["x"], ref="c"), "{", publish(topics=["x"], ref="d")]
    for message in sequence:
        publisher.send(message)
    expected = [published("a"), refused(naming("message"), "b"), PONG, published(), published("")]
    assert publisher.receive_many(5) == expected
    assert publisher.receive()["topics"] == ["y"]
    last = [publisher.receive() for _ in range(3)]
    assert (last[0], last[1]["message"], last[2]) == (published("c"), "Invalid JSON format", published("d"))


def test_a_subscription_behind_a_publish_does_not_include_it(opened: Server, publisher: Client) -> None:
    """And one before it does."""
    for message in (publish("before", topics=["z"]), {"type": "subscribe", "topics": ["z"]}, publish(topics=["z"])):
        publisher.send(message)
    received = publisher.receive_many(4)
    assert [each["data"]["message"] for each in received if "data" in each] == ["hi"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"message": ""}, ["message", ">= 1"]),
        ({"message": "x" * 8193}, ["message", "8192"]),
        ({"clienst": ["ann"]}, ["clienst", "unknown field"]),
        ({"notification_type": "published"}, ["notification_type", "'published'", "own types"]),
        ({"notification_type": 1}, ["notification_type", "expected string"]),
        ({"data": []}, ["data", "expected object"]),
        ({"data": {"n": 2**64}}, ["data", "64-bit"]),
        ({"clients": []}, ["clients"]),
        ({"topics": ["a,b"]}, ["topics[0]"]),
        ({"users": None}, ["users", "null"]),
        ({"key": ""}, ["key", ">= 1"]),
        ({"key": "k" * 256}, ["key", "255"]),
        ({"key": 1}, ["key", "expected string"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_named_and_publishes_nothing(publisher: Client, fields: dict[str, Any], words: list[str]) -> None:
    """The checks are those of POST /notify; the connection goes on."""
    assert publisher.ask(publish(**{"ref": "r"} | fields)) == refused(naming(*words), "r")
    assert publisher.ask(publish(topics=["x"])) == published()


@pytest.mark.parametrize(
    "fields",
    [
        '"message":"\\u0068\\ud83d\\ude00\u2028","data":{"a":[1.0,-0,1e5,"\\/"],"a":2,"message":3},"ref":"r","ref":"s"',
        '"message":"hi","topics":[" red ","red"],"users":["ann"],"key":"k","notification_type":"alert"',
        '"message":"hi","type":"publish"',
        '"message":"hi","type":"ping"',
        '"message":"hi","type":1',
        '"message":"\\ud800"',
        '"message":"hi","data":{"a":NaN}',
        '"message":"hi","datum":{}',
        '"ref":"r"',
        '"message":"hi","ref":1',
        '"message":"hi"} x',
    ],
)
def test_a_publish_is_read_as_any_message(fields: str) -> None:
    """In the usual form it is read in one step, which has the same outcome."""

    def read(text: str) -> object:
        try:
            return schemas.read_message(text, schemas.CLIENT_TYPES)
        except InvalidRequest as error:
            return type(error), error.message, getattr(error, "ref", None)

    usual = f'{{"type":"publish",{fields}}}'
    assert read(usual) == read(" " + usual)


@pytest.mark.parametrize("ref", [1, None, "r" * 256, {}], ids=["number", "null", "long", "object"])
def test_a_ref_is_a_text_of_up_to_255_characters(publisher: Client, ref: object) -> None:
    assert publisher.ask(publish(ref=ref)) == refused(naming("ref"))


# Keys.


def test_a_key_publishes_once(opened: Server, publisher: Client) -> None:
    """The repeat gets the first answer, with its own `ref`, also from another connection."""
    first = publisher.ask(publish(topics=["x"], key="once", ref="1"))
    before = sent(opened)
    again = opened.join().ask(publish(topics=["x"], key="once", ref="2"))
    assert (again, sent(opened)) == (first | {"ref": "2"}, before)


def test_keys_are_one_namespace_with_those_of_http(opened: Server, publisher: Client) -> None:
    """The same key from the other way is an error, and so is another request with it."""
    publisher.ask(publish(topics=["x"], key="ws"))
    body = {"message": "hi", "topics": ["x"]}
    assert opened.post(body, headers={"Idempotency-Key": "ws"}).status_code == 422
    assert opened.post(body, headers={"Idempotency-Key": "http"}).status_code == 200
    reused = refused("key: already used for another request")
    for request in (publish(topics=["x"], key="http"), publish("another", topics=["x"], key="ws")):
        assert publisher.ask(request) == reused


# Rights.


def test_without_authentication_it_takes_a_setting(server: Server) -> None:
    """A page that may listen may not publish."""
    client = server.join()
    assert client.ask(publish(ref="1")) == refused(naming("Not allowed", OPEN), "1")
    assert server.next_for(client) == "marker"


def test_rights_are_those_of_the_key_or_token(start_server: StartServer) -> None:
    """The setting opens nothing then."""
    server = start_server(OPEN, "--api-key", f"ci:{KEY}", variables={"NOTIFYD_JWT_SECRET": SECRET})

    def asked(shown: str, **fields: Any) -> Any:
        return server.join(query=f"token={shown}").ask(publish(**fields))

    assert asked(KEY, topics=["x"]) == published()
    assert asked(token(publish=True), users=["nobody"]) == published()
    assert asked(token(publish=["a.*"]), topics=["a.b"]) == published()
    assert asked(token(publish=["a.*"]), topics=["b"], ref="1") == refused("Not allowed: to publish to topic b", "1")
    assert asked(token(publish=["a.*"])) == refused("Not allowed: to publish other than by topic")
    assert asked(token(), topics=["x"], ref="1") == refused("Not allowed: to publish", "1")


def test_a_renewed_token_has_its_own_rights(start_server: StartServer) -> None:
    server = start_server(variables={"NOTIFYD_JWT_SECRET": SECRET})
    client = server.join(query=f"token={token(sub='ann')}")
    for message in (publish(topics=["x"]), {"type": "auth", "token": token(sub="ann", publish=True)}):
        client.send(message)
    client.send(publish(topics=["x"]))
    assert [each["type"] for each in client.receive_many(3)] == ["error", "authenticated", "published"]


def test_with_keys_alone_a_listener_may_not_publish(start_server: StartServer) -> None:
    client = start_server(OPEN, "--api-key", f"ci:{KEY}").join()
    assert client.ask(publish(topics=["x"])) == refused("Authentication required")


# Flow control.


def test_publishers_are_exempt_from_the_message_rate(opened: Server, publisher: Client) -> None:
    """Their other messages are not, and neither is a `publish` without the right."""
    for number in range(300):
        publisher.send(publish(topics=["x"], ref=str(number)))
        publisher.send({"type": "publish"})
    assert refs(publisher, 600) == [str(number) for number in range(300)]
    with suppress(ConnectionClosed):
        for _ in range(1000):
            publisher.send({"type": "pong"})
    assert publisher.closed() == (1008, "Message rate exceeded")


def test_publishes_without_the_right_count_for_the_message_rate(server: Server) -> None:
    client = server.join()
    # The close may come before the last of them.
    with suppress(ConnectionClosed):
        for _ in range(1000):
            client.send(publish())
    assert client.closed() == (1008, "Message rate exceeded")


def stuff(client: BareClient, data: bytes) -> int:
    """Send these bytes until the server takes no more; return how many it took."""
    client.socket.settimeout(1)
    taken = 0
    try:
        while taken < len(data):
            taken += client.socket.send(data[taken : taken + 65_536])
    except TimeoutError:
        pass
    return taken


def check_that_an_unread_publisher_waits(server: Server) -> None:
    """A publisher sends much, and reads nothing until its server takes no more."""
    client = server.join_bare("publisher", receive_buffer=4096)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
    # More answers than the kernel holds for both.
    count, width = 30_000, 255
    data = frames(count, width, topics=["x"])
    taken = stuff(client, data)
    assert taken < len(data)
    before = sent(server)
    assert before < count
    assert server.get("/health").status_code == 200
    client.socket.settimeout(30)
    sender = threading.Thread(target=client.socket.sendall, args=(data[taken:],))
    sender.start()
    assert refs(client, count) == [str(number).zfill(width) for number in range(count)]
    sender.join()


def test_a_publisher_that_reads_no_answers_is_not_read_and_not_closed(start_server: StartServer) -> None:
    """Its requests wait in the kernel, and with it; nothing is lost, and nothing else waits."""
    check_that_an_unread_publisher_waits(start_server(OPEN))


def test_no_more_than_a_window_waits_for_the_store(start_server: StartServer) -> None:
    """A publisher that sends more than the window is answered all the same."""
    server = start_server(OPEN, constants={"publishers.WINDOW_REQUESTS": 10, "publishers.GROUP_REQUESTS": 4})
    client = server.join_bare()
    client.socket.sendall(frames(2000, topics=["x"]))
    assert refs(client, 2000) == [str(number) for number in range(2000)]


# Its surroundings.


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_on_every_store(start_together: Callable[..., list[Server]], kind: str) -> None:
    """Each is published once, in order, and delivered on every process, whatever the key."""
    servers = start_together(kind, OPEN, "--history-size", "5000")
    listener, client = servers[-1].join(query="topics=x"), servers[0].join_bare()
    client.socket.sendall(frames(1500, topics=["x"], data={"n": 1}) + frames(3, topics=["x"], key="same"))
    assert refs(client, 1503) == [*map(str, range(1500)), "0", "1", "2"]
    listener.receive_many(1501)
    assert server_history(servers[-1]) == 1501
    listener.leave()


def server_history(server: Server) -> int:
    page = server.read("/notifications?topics=x&limit=1000")
    rest = server.read(f"/notifications?topics=x&limit=1000&since={page['position']}")
    return len(page["notifications"]) + len(rest["notifications"])


@pytest.mark.parametrize("name", first_quick(CARRIERS))
def test_on_every_server(name: str) -> None:
    """Those without the fast wire, too: in order, with the window, and without the message rate."""
    command, app, flags, prefix = CARRIERS[name]
    server = host(command, app, *flags, prefix=prefix, NOTIFYD_PUBLISH_OVER_WEBSOCKET="true")
    try:
        check_that_an_unread_publisher_waits(server)
    finally:
        server.kill()


def test_a_publisher_that_waits_for_the_store_is_not_silent(start_server: StartServer, redis: Any) -> None:
    """While its window is full nothing of it is read, its pongs neither."""
    store = ("--store", redis.url, "--store-prefix", "held:", "--store-timeout", "60")
    pings = ("--ping-interval", "0.2", "--ping-timeout", "3")
    server = start_server(OPEN, *store, *pings, constants={"publishers.WINDOW_REQUESTS": 1})
    client = server.join()
    redis.stop()
    try:
        client.send(publish(topics=["x"]))
        assert client.receive_many(20) == [PING] * 20
    finally:
        redis.resume()
    assert answers(client, 1) == [published()]


class Pausing:
    """A receiver that holds its connection with each message."""

    descriptor = -1
    has_left = False

    def __init__(self, connection: SendConnection) -> None:
        self.connection = connection

    def heard(self) -> None: ...

    def drained(self) -> None: ...

    def received(self, message: str | bytes) -> None:
        self.connection.hold(held=True)

    def left(self) -> None:
        self.has_left = True


def test_a_publisher_that_leaves_while_it_is_not_read_is_noticed() -> None:
    """By an ASGI server that takes no more for it, and has nothing else to say."""

    async def leave() -> bool:
        connection = SendConnection(WebSocketCarrier())
        receiver = Pausing(connection)
        connection.accept(receiver, b"", "")
        events: asyncio.Queue[Any] = asyncio.Queue()
        events.put_nowait({"type": "websocket.receive", "text": "{}"})
        events.put_nowait({"type": "websocket.disconnect"})
        forever = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(PATIENCE):
            await connection.serve(events.get, lambda _: forever)
        return receiver.has_left

    assert asyncio.run(leave())


def test_all_that_was_read_is_answered_in_the_drain(start_server: StartServer) -> None:
    """Published before it, refused from then on; a repeat with a key gets its answer."""
    server = start_server(OPEN)
    client = server.join()
    first = client.ask(publish(topics=["x"], key="k"))
    server.drain()
    for message in (publish(topics=["x"], ref="1"), publish(topics=["x"], key="k")):
        client.send(message)
    assert answers(client, 2) == [refused("Server shutting down", "1", 1001), first]
    client.leave()
    assert server.exit_status() == 0


@pytest.mark.parametrize(
    "before",
    [None, publish(topics=["x"]), {"type": "status_request"}, {"type": "subscribe", "topics": ["y"]}],
    ids=lambda before: before and before["type"],
)
def test_requests_of_a_client_that_leaves_are_published(opened: Server, before: dict[str, Any] | None) -> None:
    """They had arrived before its close, and wait behind other messages, or behind none."""
    count_before = sent(opened)
    client = opened.join_bare()
    others = [before, {"type": "ping"}] if before else []
    first = b"".join(masked(Opcode.TEXT, json.dumps(message).encode()) for message in others)
    client.socket.sendall(first + frames(200, topics=["x"]) + masked(Opcode.CLOSE, b"\x03\xe8"))
    published_first = bool(before) and before["type"] == "publish"
    eventually(lambda: sent(opened) == count_before + 200 + published_first)


def test_while_the_store_is_away_each_is_refused(start_server: StartServer, redis: Any) -> None:
    """With the code that says that it may pass; afterwards they are taken again."""
    server = start_server(OPEN, "--store", redis.url, "--store-prefix", "away:", "--store-timeout", "1")
    client = server.join()
    assert client.ask(publish(topics=["x"])) == published()
    redis.stop()
    try:
        eventually(
            lambda: client.ask(publish(topics=["x"], ref="1")) == refused(Like("The store is away: .*"), "1", 1013)
        )
    finally:
        redis.resume()
    eventually(lambda: client.ask(publish(topics=["x"])) == published())
