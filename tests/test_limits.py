"""Limits: connections, client ids, sizes and rates of messages."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from bytes import masked
from conftest import StartServer
from expected import CLIENT_ID, PONG, answered, http_error, welcome, ws_error
from processes import Server, eventually
from websockets.frames import Opcode
from ws_clients import PATIENCE, claims

FULL = "Connection limit exceeded: 2/2"
TAKEN = "Client bob is already connected"


@pytest.fixture
def small(start_server: StartServer) -> Server:
    """A server that lets two clients in."""
    return start_server("--max-connections", "2")


# The connection limit.


def test_one_too_many_is_refused(small: Server) -> None:
    """The third of two is closed with 1008 and the documented reason."""
    small.join()
    small.join()
    assert small.connect().closed() == (1008, FULL)


def test_a_refused_client_is_sent_nothing_but_the_close(small: Server) -> None:
    """A refused client gets neither a welcome nor notifications."""
    small.join()
    small.join()
    refused = small.connect()
    small.notify("for those inside")
    assert refused.rest() == []


def test_a_refused_client_is_not_counted(small: Server) -> None:
    """`total` counts admitted clients only."""
    small.join()
    small.join()
    small.connect().closed()
    assert small.read("/health")["connections"] == {"active": 2, "total": 2, "max_allowed": 2}


def test_a_client_that_leaves_makes_room(small: Server) -> None:
    """A slot is free as soon as its client has left."""
    small.join()
    small.join().leave()
    eventually(lambda: small.active() == 1)
    small.join()


def test_a_client_that_breaks_off_makes_room(small: Server) -> None:
    """A slot is free when its client's connection was reset."""
    small.join()
    small.join_bare().reset()
    eventually(lambda: small.active() == 1)
    small.join()


def test_of_fifty_at_once_as_many_as_fit_are_admitted(start_server: StartServer) -> None:
    """A rush lets in exactly the limit."""
    server = start_server("--max-connections", "10")
    met = claims([server.ws_url] * 50)
    assert {first: met.count(first) for first in met} == {
        "welcome": 10,
        "Connection limit exceeded: 10/10": 40,
    }


# One connection for each client_id.


def test_a_second_claim_of_an_id_is_refused(server: Server) -> None:
    """The newcomer is closed with 1008 and the documented reason."""
    server.join("bob")
    assert server.connect("bob").closed() == (1008, TAKEN)


def test_a_second_claim_leaves_the_first_alone(server: Server) -> None:
    """The first client stays and is served."""
    bob = server.join("bob")
    server.connect("bob").closed()
    assert bob.ask({"type": "ping"}) == PONG


def test_a_claim_on_a_living_client_is_refused_at_once(start_server: StartServer) -> None:
    """The probe of the old connection ends with its answer, not after its seconds."""
    server = start_server(constants={"heartbeat.PROBE_SECONDS": 60.0})
    server.join("bob")
    assert server.connect("bob").closed() == (1008, TAKEN)


def test_an_id_is_free_when_its_client_has_left(server: Server) -> None:
    """A client that closes may come back at once, and again."""
    for _ in range(5):
        server.join("bob").leave()
        eventually(lambda: server.active() == 0)
    server.join("bob")


def test_ids_are_compared_exactly(server: Server) -> None:
    """bob, Bob and bob. are three clients."""
    for client_id in ("bob", "Bob", "bob."):
        server.join(client_id)
    assert server.active() == 3


def test_of_a_hundred_claims_at_once_one_wins(server: Server) -> None:
    """One hundred simultaneous claims of one id end with one client."""
    met = claims([server.address("bob")] * 100)
    assert {first: met.count(first) for first in met} == {"welcome": 1, TAKEN: 99}


def test_a_dead_client_gives_way_to_a_newcomer(server: Server) -> None:
    """After about two seconds of silence the newcomer has the id, and the old connection is told why it hasn't."""
    dead = server.join_bare("bob")
    began = time.monotonic()
    server.join("bob")
    assert 1 < time.monotonic() - began < 6
    assert dead.closed() == (1011, "Ping timeout")


def test_a_client_that_answers_the_probe_keeps_its_id(server: Server) -> None:
    """The old connection is pinged as soon as somebody claims its id, and its pong is enough."""
    old = server.join_bare("bob")
    with ThreadPoolExecutor() as background:
        newcomer = background.submit(server.connect, "bob")
        old.send_frame(Opcode.PONG, bytes(old.next_frame(Opcode.PING).data))
    assert newcomer.result().closed() == (1008, TAKEN)
    old.send({"type": "ping"})
    assert old.receive() == PONG


def test_of_twenty_claims_on_a_dead_client_one_wins(server: Server) -> None:
    """When several wait for the probe of a dead connection, one gets the id."""
    server.join_bare("bob")
    met = claims([server.address("bob")] * 20)
    assert {first: met.count(first) for first in met} == {"welcome": 1, TAKEN: 19}


def test_a_newcomer_that_gives_up_during_the_probe_does_no_harm(server: Server) -> None:
    """A newcomer that leaves during the probe does not get the id."""
    server.join_bare("bob")
    server.connect_bare("bob").reset()
    server.join("bob")
    assert server.active() == 1


def test_a_duplicate_is_refused_as_such_even_when_the_server_is_full(small: Server) -> None:
    """The check for duplicates comes before the limit."""
    small.join("bob")
    small.join()
    assert small.connect("bob").closed() == (1008, TAKEN)


def test_a_dead_client_gives_way_even_when_the_server_is_full(small: Server) -> None:
    """The slot that the dead one leaves is the newcomer's."""
    small.join("alice")
    small.join_bare("bob")
    small.join("bob")
    assert small.active() == 2


def test_replace_closes_the_old_connection(start_server: StartServer) -> None:
    """With --on-duplicate replace the old client makes way for the new."""
    server = start_server("--on-duplicate", "replace")
    old = server.join("bob")
    server.join("bob")
    assert old.closed() == (1008, "Replaced by a new connection")


def test_replace_leaves_one_client(start_server: StartServer) -> None:
    """After three claims one after another one is connected, and it is the last."""
    server = start_server("--on-duplicate", "replace")
    *_, last = [server.join("bob") for _ in range(3)]
    assert server.notify("to the last")["recipients"] == 1
    assert last.receive()["data"]["message"] == "to the last"


def test_replace_works_when_the_server_is_full(start_server: StartServer) -> None:
    """The newcomer takes the slot of the one it replaces."""
    server = start_server("--on-duplicate", "replace", "--max-connections", "1")
    server.join("bob")
    server.join("bob")


def test_a_hundred_replacements_at_once_leave_one(start_server: StartServer) -> None:
    """However they interleave, each claim is admitted or replaced and one stays."""
    server = start_server("--on-duplicate", "replace")
    assert set(claims([server.address("bob")] * 100)) <= {"welcome", "Replaced by a new connection"}
    assert server.read("/health")["connections"]["total"] == 100


# Clients of a user.


def test_a_user_has_a_limit_of_clients(start_server: StartServer) -> None:
    """WebSockets and streams of a user count together; other users, and clients of nobody, are not affected."""
    server = start_server("--max-connections-per-user", "2")
    words = "Connection limit exceeded for this user: 2/2"
    client = server.join(query="user=ann")
    with server.http.stream("GET", "/events?user=ann") as stream:
        lines = stream.iter_lines()
        assert any("welcome" in line for line in lines)
        assert server.connect(query="user=ann").closed() == (1008, words)
        refused = server.get("/events?user=ann")
        assert answered(refused) == (429, http_error("application", words))
        ended = server.get("/events?user=ann", headers={"Accept": "text/event-stream"})
        assert ended.status_code == 200 and f'data: {{"code":1008,"reason":"{words}"}}' in ended.text
        for query in ("user=bob", "client_id=ann", ""):
            server.join(query=query)
        client.leave()
        eventually(lambda: server.connect(query="user=ann").receive()["type"] == "welcome")


def test_a_limit_of_a_user_is_kept_when_all_come_at_once(start_server: StartServer) -> None:
    """Exactly as many get in as there is room for."""
    server = start_server("--max-connections-per-user", "5")
    met = claims([server.address(query="user=ann")] * 50)
    assert sorted(met) == ["Connection limit exceeded for this user: 5/5"] * 45 + ["welcome"] * 5


# The form of a client_id.


@pytest.mark.parametrize(
    "client_id", ["a", "0", "client_123", "A.b_c:d@e-f", "..", "auth0|5f7c", "a+b@c.example", "/=~", "x" * 128]
)
def test_an_id_of_the_right_form_is_kept(server: Server, client_id: str) -> None:
    """1 to 128 of letters, digits and ._:@|+/=~- are an id."""
    query = f"client_id={quote(client_id)}"
    assert server.connect(query=query).receive()["client_id"] == client_id


@pytest.mark.parametrize(
    "client_id",
    [
        "x" * 129,
        "x" * 5000,
        "a b",
        "a\n",
        "\na",
        "a\x00",
        "é",
        "\uff41",
        "\u0663",
        "a\\b",
        "<script>",
        "a,b",
        "a%b",
        " ",
    ],
    ids=lambda client_id: repr(client_id[:130]),
)
def test_an_id_of_another_form_is_refused(server: Server, client_id: str) -> None:
    """Anything else is closed with 1008, Invalid client_id."""
    assert server.connect(client_id).closed() == (1008, "Invalid client_id")


def test_a_plus_is_a_space(server: Server) -> None:
    """A plus in a URL stands for a space, and so makes no id."""
    assert server.connect(query="client_id=a+b").closed() == (1008, "Invalid client_id")


@pytest.mark.parametrize("query", ["client_id=", "client_id=bob&client_id=", "client_id"])
def test_an_empty_id_counts_as_none(server: Server, query: str) -> None:
    """A client with an empty id is given one."""
    assert server.connect(query=query).receive()["client_id"] == CLIENT_ID


def test_of_several_ids_the_last_counts(server: Server) -> None:
    """The earlier ones are not even looked at."""
    assert server.connect(query="client_id=a%20b&client_id=alice&client_id=bob").receive()["client_id"] == "bob"


# The form of a user.


@pytest.mark.parametrize("user", ["a", "auth0|5f7c", "José Łuk 李", "a,b", "a/b", " ", "x" * 255])
def test_a_user_is_any_text(server: Server, user: str) -> None:
    """Any number of clients may name one user; the welcome repeats it."""
    for _ in range(2):
        assert server.connect(query=f"user={quote(user)}").receive() == welcome(CLIENT_ID, user=user)


@pytest.mark.parametrize("query", ["user=", "user", "user=ann&user="])
def test_an_empty_user_counts_as_none(server: Server, query: str) -> None:
    """The welcome then has no user."""
    assert server.connect(query=query).receive() == welcome(CLIENT_ID)


@pytest.mark.parametrize("user", ["x" * 256, "a\nb", "\x00", "\x7f", "\x85"], ids=ascii)
def test_a_text_that_is_no_user_is_refused(server: Server, user: str) -> None:
    """A WebSocket is closed, every other request is 400."""
    query = f"user={quote(user)}"
    assert server.connect(query=query).closed() == (1008, "Invalid user")
    for path in ("/events", "/notifications"):
        refused = server.get(f"{path}?{query}")
        assert answered(refused) == (400, http_error("validation", "Invalid user"))


def test_the_form_is_checked_before_the_limit(small: Server) -> None:
    """A bad id is told so even when the server is full."""
    small.join()
    small.join()
    assert small.connect("a b").closed() == (1008, "Invalid client_id")


# Sizes.


@pytest.mark.parametrize("size", [125, 126, 65_535, 65_536])
def test_a_message_up_to_the_limit_is_read(server: Server, size: int) -> None:
    """65,536 bytes of payload are within the limit, at each length of a frame's header."""
    client = server.join()
    assert client.ask('{"type": "ping"}'.ljust(size)) == PONG


@pytest.mark.parametrize("size", [65_537, 1_000_000])
def test_a_message_over_the_limit_closes_with_1009(server: Server, size: int) -> None:
    """One byte more is too much."""
    client = server.join()
    client.send(" " * size)
    assert client.closed()[0] == 1009


def test_a_frame_that_only_claims_to_be_large_closes_with_1009(server: Server) -> None:
    """The length in the header is enough; nobody waits for the rest."""
    client = server.join_bare()
    client.socket.sendall(b"\x81\xff" + (2**40).to_bytes(8, "big") + b"\x00\x00\x00\x00")
    assert client.closed()[0] == 1009


def test_fragments_that_are_too_much_together_close_with_1009(server: Server) -> None:
    """The limit is on the message, not on the frame."""
    client = server.join_bare()
    client.send_frame(Opcode.TEXT, b" " * 40_000, fin=False)
    client.send_frame(Opcode.CONT, b" " * 40_000)
    assert client.closed()[0] == 1009


def test_the_limit_is_a_setting(start_server: StartServer) -> None:
    """With --max-message-size 20, 20 bytes are a message and 21 are too many."""
    client = start_server("--max-message-size", "20").join()
    assert client.ask('{"type": "ping"}'.ljust(20)) == PONG
    client.send(" " * 21)
    assert client.closed()[0] == 1009


# The rate of messages.


def test_a_hundred_messages_at_once_are_answered(server: Server) -> None:
    """A burst within the bucket is no flood."""
    client = server.join()
    for _ in range(100):
        client.send({"type": "ping"})
    assert client.receive_many(100) == [PONG] * 100


@pytest.mark.parametrize("message", ['{"type": "ping"}', "nonsense", '{"type": "pong"}'])
def test_a_flood_of_messages_closes_the_connection(server: Server, message: str) -> None:
    """More than 50 messages a second over two seconds, of any kind, close with 1008."""
    client = server.join_bare()
    client.socket.sendall(masked(Opcode.TEXT, message.encode()) * 250)
    assert client.closed() == (1008, "Message rate exceeded")


def test_protocol_pings_do_not_count_for_the_rate(server: Server) -> None:
    """A library may ping as often as it likes."""
    client = server.join()
    for number in range(300):
        last = client.connection.ping(str(number))
    assert last.wait(PATIENCE)
    assert client.ask("nonsense") == ws_error("Invalid JSON format")


def test_the_bucket_fills_again(server: Server) -> None:
    """After a second there is room for some fifty messages more."""
    client = server.join()
    for _ in range(90):
        assert client.ask({"type": "ping"}) == PONG
    began = time.monotonic()
    eventually(lambda: time.monotonic() > began + 1)
    for _ in range(50):
        assert client.ask({"type": "ping"}) == PONG
