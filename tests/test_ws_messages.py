"""GET /ws: every message that the server sends, and every one that it answers."""

from __future__ import annotations

import pytest
from bytes import masked
from conftest import StartServer
from expected import CLIENT_ID, COUNT, PONG, SECONDS, TIME, notification, welcome, ws_error
from processes import Server
from websockets.frames import Opcode
from ws_clients import PATIENCE, Client

PING = b'{"type": "ping"}'


@pytest.fixture
def client(server: Server) -> Client:
    """A client that has been welcomed."""
    return server.join()


# Welcome.


def test_the_first_message_is_the_documented_welcome(server: Server) -> None:
    """A client with an id is welcomed by it."""
    assert server.connect("my_client_123").receive() == welcome("my_client_123")


def test_a_client_without_an_id_is_given_one(server: Server) -> None:
    """The id is client_ with at least eight hex digits."""
    assert server.connect().receive() == welcome(CLIENT_ID)


def test_given_ids_are_different(server: Server) -> None:
    """Two clients without an id are two clients."""
    assert server.connect().receive()["client_id"] != server.connect().receive()["client_id"]


def test_the_welcome_tells_the_interval(start_server: StartServer) -> None:
    """notification_interval is the setting."""
    assert start_server("--notification-interval", "90").connect("bob").receive() == welcome("bob", 90)


def test_a_client_is_counted_when_it_is_welcomed(server: Server) -> None:
    """A client that has read its welcome is a recipient of every later notification."""
    server.join()
    assert server.notify("hi")["recipients"] == 1


def test_no_compression_is_negotiated(server: Server) -> None:
    """permessage-deflate costs too much memory for each connection, and is declined."""
    assert server.connect(compression="deflate").connection.protocol.extensions == []


# Test notifications.


def test_the_first_test_notification_is_the_documented_one(start_server: StartServer) -> None:
    """Test notifications are numbered from 1."""
    client = start_server("--notification-interval", "3").join()
    data = {
        "message": "Test notification #1",
        "counter": 1,
        "uptime_seconds": SECONDS,
        "active_connections": 1,
        "server_time": TIME,
    }
    assert client.receive() == notification(data, "test_notification")


def test_test_notifications_count_on(start_server: StartServer) -> None:
    """Each has the next number, in its message too."""
    received = start_server("--notification-interval", "0.1").join().receive_many(4)
    first = received[0]["data"]["counter"]
    assert [each["data"]["counter"] for each in received] == list(range(first, first + 4))
    assert received[3]["data"]["message"] == f"Test notification #{first + 3}"


def test_an_interval_of_0_sends_no_test_notifications(server: Server, client: Client) -> None:
    """Only published notifications arrive: the shared server has an interval of 0."""
    for number in range(3):
        server.notify(str(number))
    assert [each["type"] for each in client.receive_many(3)] == ["custom"] * 3


# Ping, pong and status.


def test_a_ping_is_answered_by_the_documented_pong(client: Client) -> None:
    """Server response to client ping."""
    assert client.ask({"type": "ping"}) == PONG


def test_a_binary_frame_is_as_good_as_text(client: Client) -> None:
    """Binary frames hold messages too; the answer is text."""
    assert client.ask(PING) == PONG


def test_a_fragmented_message_is_one_message(client: Client) -> None:
    """A ping in four fragments is a ping."""
    client.connection.send(['{"ty', 'pe": ', "", '"ping"}'])
    assert client.receive() == PONG


def test_a_fragmented_binary_message_is_one_message(client: Client) -> None:
    """Fragments needn't be text."""
    client.connection.send([PING[:5], PING[5:]])
    assert client.receive() == PONG


def test_a_fragment_may_end_inside_a_character(server: Server) -> None:
    """UTF-8 is checked for the whole message, not for each fragment."""
    client = server.join_bare()
    client.send_frame(Opcode.TEXT, b'{"type": "\xc3', fin=False)
    client.send_frame(Opcode.CONT, b'\xa9"}')
    assert client.receive() == ws_error("Unknown message type: é")


def test_a_protocol_ping_between_fragments_is_answered_first(server: Server) -> None:
    """Control frames may come in the middle of a fragmented message."""
    client = server.join_bare()
    client.send_frame(Opcode.TEXT, PING[:5], fin=False)
    client.send_frame(Opcode.PING, b"in between")
    client.send_frame(Opcode.CONT, PING[5:])
    assert bytes(client.next_frame(Opcode.PONG).data) == b"in between"
    assert client.receive() == PONG


def test_a_protocol_ping_is_answered_with_its_payload(client: Client) -> None:
    """The library's own ping works as RFC 6455 has it."""
    assert client.connection.ping(b"any payload").wait(PATIENCE)


def test_frames_that_come_at_once_are_answered_one_by_one(server: Server) -> None:
    """Ten pings in one segment get ten pongs."""
    client = server.join_bare()
    client.socket.sendall(masked(Opcode.TEXT, PING) * 10)
    assert [client.receive() for _ in range(10)] == [PONG] * 10


def test_a_frame_that_comes_byte_by_byte_is_understood(server: Server) -> None:
    """Where the network cuts is of no importance."""
    client = server.join_bare()
    for byte in masked(Opcode.TEXT, PING):
        client.socket.sendall(bytes([byte]))
    assert client.receive() == PONG


def test_a_pong_is_taken_silently(client: Client) -> None:
    """The client's answer to a ping needs no answer."""
    client.send({"type": "pong"})
    assert client.ask({"type": "ping"}) == PONG


def test_a_status_request_gets_the_documented_response(server: Server, client: Client) -> None:
    """The response counts connections, this one included."""
    assert client.ask({"type": "status_request"}) == {
        "type": "status_response",
        "data": {"active_connections": 1, "total_connections": COUNT, "server_time": TIME},
        "timestamp": TIME,
    }


def test_a_status_response_has_the_figures_of_health(server: Server, client: Client) -> None:
    """A client and an operator see the same counts."""
    server.join()
    told, health = client.ask({"type": "status_request"})["data"], server.read("/health")["connections"]
    assert (told["active_connections"], told["total_connections"]) == (health["active"], health["total"])


def test_answers_come_in_the_order_of_the_messages(server: Server) -> None:
    """Answers that wait for the store hold up later ones, errors among them, also when all come in one segment."""
    client = server.join_bare()
    messages = [b'{"type": "status_request"}', b"nonsense", PING, b'{"type": "subscribe", "topics": ["red"]}', PING]
    client.socket.sendall(b"".join(masked(Opcode.TEXT, each) for each in messages))
    answers = [client.receive()["type"] for _ in messages]
    assert answers == ["status_response", "error", "pong", "subscribed", "pong"]


def test_extra_fields_are_ignored(client: Client) -> None:
    """A newer client may say more than this server understands."""
    assert client.ask({"type": "ping", "timestamp": 1, "nonce": [None, {}]}) == PONG


def test_an_answer_goes_only_to_the_client_that_asked(server: Server, client: Client) -> None:
    """A pong is for one client, a notification for all."""
    other = server.join()
    other.ask({"type": "ping"})
    server.notify("to all")
    assert client.receive()["type"] == "custom"


# Errors.


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "hello",
        "{",
        '{"type": "ping"',
        '{"type": "ping"} {"type": "ping"}',
        "{'type': 'ping'}",
        '{"type": NaN}',
        '{"type": "\\ud800"}',
        "[" * 50_000,
        "\u0000",
    ],
    ids=lambda text: text[:12] or "empty",
)
def test_a_message_that_is_not_json_gets_an_error(client: Client, text: str) -> None:
    """Text that cannot be parsed is answered by Invalid JSON format."""
    assert client.ask(text) == ws_error("Invalid JSON format")


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b'{"type": "\xc3\x28"}', b"\x00" * 100])
def test_binary_that_is_not_json_is_told(client: Client, data: bytes) -> None:
    """In a binary frame bad UTF-8 is no protocol error but no JSON either."""
    assert client.ask(data) == ws_error("Invalid JSON format")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "null",
        "42",
        '"ping"',
        '["ping"]',
        '{"Type": "ping"}',
        '{"type": null}',
        '{"type": 5}',
        '{"type": ["ping"]}',
        '{"type": {"type": "ping"}}',
        '{"data": {}}',
    ],
)
def test_json_without_a_string_type_is_told(client: Client, text: str) -> None:
    """JSON that is no message of any type is answered by Invalid message format."""
    assert client.ask(text) == ws_error("Invalid message format")


@pytest.mark.parametrize("kind", ["invalid_type", "PING", " ping", "welcome", "shutdown", "", "🦊", '"', "x" * 64])
def test_an_unknown_type_is_told_by_name(client: Client, kind: str) -> None:
    """A type that no client may send is named in the error, the server's own types included."""
    assert client.ask({"type": kind}) == ws_error(f"Unknown message type: {kind}")


def test_a_long_unknown_type_is_cut(client: Client) -> None:
    """Of a long name 64 characters are repeated."""
    assert client.ask({"type": "🦊" * 1000}) == ws_error("Unknown message type: " + "🦊" * 64)


@pytest.mark.parametrize("mistake", ["nonsense", "{}", '{"type": "unknown"}', b"\xff"])
def test_the_connection_stays_open_after_an_error(client: Client, mistake: str | bytes) -> None:
    """A mistake costs an error message, not the connection."""
    client.ask(mistake)
    assert client.ask({"type": "ping"}) == PONG


def test_each_error_has_an_id_of_its_own(client: Client) -> None:
    """Two errors have two ids."""
    assert client.ask("nonsense")["error_id"] != client.ask("nonsense")["error_id"]


def test_bad_utf8_in_a_text_frame_closes_with_1007(server: Server) -> None:
    """A text frame that is not UTF-8 is a protocol error, as RFC 6455 has it."""
    client = server.join_bare()
    client.send_frame(Opcode.TEXT, b'{"type": "\xc3\x28"}')
    assert client.closed()[0] == 1007


def test_messages_are_compact_text(server: Server) -> None:
    """A message is one text frame of UTF-8 JSON, not of escapes."""
    client = server.join_bare()
    server.notify("grüße 🦊")
    frame = client.next_frame(Opcode.TEXT)
    assert "grüße 🦊".encode() in bytes(frame.data) and frame.fin


def test_the_servers_frames_are_not_masked(server: Server) -> None:
    """A server must not mask: its second byte is the plain length."""
    client = server.join_bare()
    client.send({"type": "ping"})
    head = client.socket.recv(2)
    assert head[0] == 0x81 and head[1] < 126


# Leaving.


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999])
def test_a_clients_close_is_answered_by_the_same_code(server: Server, code: int) -> None:
    """The closing handshake is completed with the code that the client gave."""
    client = server.join_bare()
    client.send_close(code)
    assert client.closed()[0] == code


def test_a_close_without_a_code_is_answered(server: Server) -> None:
    """An empty close frame gets a close frame, and then the end of the stream."""
    client = server.join_bare()
    client.send_frame(Opcode.CLOSE, b"")
    assert client.closed()[0] in (1000, 1005)


def test_requests_before_a_close_are_answered_before_it(server: Server) -> None:
    """A ping and a close in one segment: first the pong, then the close."""
    client = server.join_bare()
    client.send({"type": "ping"})
    client.send_close()
    assert client.rest() == [PONG]


# The handshake.


def test_a_notification_reaches_a_client_right_after_its_welcome(server: Server) -> None:
    """The welcome is the first message even while others publish."""
    clients = []
    for number in range(20):
        clients.append(server.connect())
        server.notify(str(number))
    assert [client.receive()["type"] for client in clients] == ["welcome"] * 20
