"""Those who mean harm, or are merely broken: whatever they do, everybody else goes on being served."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from clients import BareClient
from conftest import StartServer
from expected import PONG, Like, http_error, naming, parse, ws_error
from server import Server, eventually
from websockets.frames import Frame, Opcode

MEGABYTE = 2**20
PUBLISH = b"POST /notify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@pytest.fixture
def bystander(server: Server) -> Iterator[None]:
    """Somebody who is connected throughout, and must be served before and after."""
    client = server.join()
    yield
    client.send({"type": "ping"})
    server.notify("still here?")
    awaited = {"pong", "still here?"}
    while awaited:
        message = client.receive()
        awaited.discard(message["data"]["message"] if message["type"] == "custom" else message["type"])


def push(connection: socket.socket, data: bytes, limit: int) -> int:
    """Send the same bytes again and again until nobody takes them any more; return how many were taken."""
    connection.settimeout(0.5)
    taken = 0
    with suppress(OSError):
        while taken < limit:
            taken += connection.send(data)
    return taken


def stalled(server: Server, client_id: str | None = None) -> BareClient:
    """A client that has a small buffer and stops reading after its welcome."""
    return server.join_bare(client_id, receive_buffer=4096)


# Clients.


def test_a_client_that_never_reads_holds_up_nobody(server: Server) -> None:
    """Another one gets all of six megabytes while one takes nothing."""
    stalled(server)
    reader = server.join()
    for number in range(100):
        server.notify(str(number), data={"pad": "x" * 60_000})
    assert [each["data"]["message"] for each in reader.receive_many(100)] == [str(number) for number in range(100)]


def test_a_client_that_reads_again_has_missed_nothing(server: Server) -> None:
    """As long as the history holds, a stalled client catches up in order."""
    client = server.join_bare(receive_buffer=65_536)
    for number in range(150):
        server.notify(str(number), data={"pad": "x" * 60_000})
    assert [client.receive()["data"]["message"] for _ in range(150)] == [str(number) for number in range(150)]


def test_a_client_that_falls_off_the_history_is_closed_as_slow(start_server: StartServer) -> None:
    """It gets what it was sent, without a gap, and then 1008 with the place where it may go on."""
    server = start_server("--history-size", "10")
    client, published = server.join_bare(receive_buffer=65_536), 0
    while server.active():
        assert published < 2000, "never closed"
        server.notify(str(published), data={"pad": "x" * 60_000})
        published += 1
    received = client.rest()
    assert [each["data"]["message"] for each in received] == [str(number) for number in range(len(received))]
    last = received[-1]["id"]
    assert client.closed() == (
        1008,
        Like(rf"Slow consumer: \d+ notifications behind; resume with since={last}"),
    )


def test_a_flood_from_one_does_not_delay_another(server: Server) -> None:
    """While one sends a hundred thousand messages, another one's ping is answered in time."""
    flooder, other = server.join_bare(), server.join()
    push(flooder.socket, Frame(Opcode.TEXT, b'{"type": "ping"}').serialize(mask=True) * 1000, 2 * MEGABYTE)
    began = time.monotonic()
    assert other.ask({"type": "ping"}) == PONG
    assert time.monotonic() - began < 1


@needs_proc
@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("opcode", [Opcode.PING, Opcode.TEXT])
def test_a_flood_without_reading_takes_no_memory(server: Server, opcode: Opcode) -> None:
    """Answers to a client that doesn't read aren't piled up, neither pongs nor error messages."""
    flooder, before = stalled(server), server.memory()
    push(flooder.socket, Frame(opcode, b"x" * 125).serialize(mask=True) * 500, 40 * MEGABYTE)
    assert server.memory() - before < 8 * MEGABYTE


@needs_proc
@pytest.mark.usefixtures("bystander")
def test_an_endless_fragmented_message_takes_no_memory(server: Server) -> None:
    """Millions of empty fragments are as little welcome as one large message."""
    client, before = server.join_bare(), server.memory()
    client.send_frame(Opcode.TEXT, b"", fin=False)
    push(client.socket, Frame(Opcode.CONT, b"", fin=False).serialize(mask=True) * 1000, 6 * MEGABYTE)
    assert server.memory() - before < 8 * MEGABYTE


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    "raw",
    [
        b"\x81\x02{}",  # Not masked.
        b"\x83\x80\x00\x00\x00\x00",  # An opcode that is reserved.
        b"\x8b\x80\x00\x00\x00\x00",  # A control opcode that is reserved.
        b"\xc1\x80\x00\x00\x00\x00",  # A reserved bit, though no extension was agreed on.
        b"\x09\x80\x00\x00\x00\x00",  # A ping in fragments.
        b"\x89\xfe\x00\x7e\x00\x00\x00\x00" + b"x" * 126,  # A ping with more than 125 bytes.
        b"\x80\x80\x00\x00\x00\x00",  # A continuation of nothing.
        b"\x01\x80\x00\x00\x00\x00\x81\x80\x00\x00\x00\x00",  # A new message inside another.
        b"\x88\x81\x00\x00\x00\x00\x03",  # A close with half a code.
        b"\x88\x82\x00\x00\x00\x00\x03\xed",  # A close with 1005, which is never sent.
        b"\x88\x82\x00\x00\x00\x00\x00\x00",  # A close with a code that doesn't exist.
    ],
    ids=lambda raw: raw[:8].hex(),
)
def test_a_frame_against_the_protocol_closes_with_1002(server: Server, raw: bytes) -> None:
    """What RFC 6455 forbids ends the connection as it says."""
    client = server.join_bare()
    client.socket.sendall(raw)
    assert client.closed()[0] == 1002


@pytest.mark.usefixtures("bystander")
def test_a_close_whose_reason_is_not_utf8_is_an_error(server: Server) -> None:
    """RFC 6455, 5.5.1 and 8.1: the reason is text."""
    client = server.join_bare()
    client.send_frame(Opcode.CLOSE, b"\x03\xe8\xc3\x28")
    assert client.closed()[0] in (1002, 1007)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("seed", range(5))
def test_noise_after_the_handshake_ends_the_connection(server: Server, seed: int) -> None:
    """Random bytes are closed sooner or later, and never answered by a traceback."""
    client = server.join_bare()
    with suppress(OSError):
        client.socket.sendall(random.Random(seed).randbytes(200_000))
        client.socket.shutdown(socket.SHUT_WR)
    assert client.closed()[0] in (1002, 1006, 1007, 1008, 1009)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("eager", [Frame(Opcode.CLOSE, b"\x03\xe8").serialize(mask=True), b"\x81\x05Hello", b"\x81"])
def test_an_end_before_the_handshake_is_answered_is_just_an_end(server: Server, eager: bytes) -> None:
    """A close, a broken frame or half of one with the request leaves nothing in the log."""
    connection = server.raw(HANDSHAKE + eager)
    connection.shutdown(socket.SHUT_WR)
    with suppress(ConnectionResetError):
        while connection.recv(65_536):
            pass


@pytest.mark.usefixtures("bystander")
def test_the_end_of_the_stream_in_the_middle_of_a_frame_is_a_goodbye(server: Server) -> None:
    """Who sends half a frame and a FIN has left."""
    client = server.join_bare()
    client.socket.sendall(b"\x81\xfe\x10")
    client.socket.shutdown(socket.SHUT_WR)
    eventually(lambda: server.active() == 1)


@pytest.mark.usefixtures("bystander")
def test_deep_json_from_a_client_is_just_no_json(server: Server) -> None:
    """Thirty thousand brackets are an error message."""
    client = server.join()
    assert client.ask('{"type": "ping", "deep": ' + "[" * 30_000) == ws_error("Invalid JSON format")


@needs_proc
def test_a_peer_that_ignores_its_close_is_aborted(start_server: StartServer) -> None:
    """After a deadline neither a slot nor a descriptor is left of a client that doesn't answer the close."""
    server = start_server("--on-duplicate", "replace")
    server.get("/health")
    before = server.descriptors()
    client = stalled(server, "bob")
    for _ in range(100):
        server.notify("large", data={"pad": "x" * 60_000})
    server.join("bob").leave()
    eventually(lambda: server.descriptors() <= before, 9)
    assert client.closed()[0] in (1006, 1008)


@needs_proc
def test_clients_that_come_and_break_off_leave_nothing(server: Server) -> None:
    """After three hundred resets as many descriptors are open as before, and nobody is counted."""
    server.get("/health")
    before = server.descriptors()
    for _ in range(100):
        server.join_bare().reset()
        server.connect_bare().reset()
        server.raw(b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n").close()
    eventually(lambda: server.active() == 0 and server.descriptors() <= before)


# Those who never get so far.


@pytest.mark.usefixtures("bystander")
def test_idle_connections_hold_up_nobody(server: Server) -> None:
    """Two hundred connections that ask nothing, or only half of it, are borne."""
    for number in range(200):
        server.raw(b"" if number % 2 else b"GET /health HTTP/1.1\r\nHost: ")
    assert server.get("/health").status_code == 200


@pytest.mark.usefixtures("bystander")
def test_headers_without_end_are_cut_off(server: Server) -> None:
    """A header of many megabytes is refused long before its end."""
    connection = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
    assert push(connection, b"x" * 65_536, 20 * MEGABYTE) < 10 * MEGABYTE


# Publishers.


@needs_proc
@pytest.mark.usefixtures("bystander")
def test_a_declared_body_of_100_megabytes_is_refused_at_once(server: Server) -> None:
    """The declared length is enough for 413; the body needn't be sent."""
    before = server.memory()
    connection = server.raw(PUBLISH + b"Content-Length: 104857600\r\n\r\n" + b"x" * 1000)
    assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")
    assert server.memory() - before < 4 * MEGABYTE


@needs_proc
@pytest.mark.usefixtures("bystander")
def test_a_chunked_body_of_100_megabytes_is_cut_off(server: Server) -> None:
    """Nobody takes a hundred megabytes, whether announced or not."""
    before = server.memory()
    connection = server.raw(PUBLISH + b"Transfer-Encoding: chunked\r\n\r\n")
    push(connection, b"10000\r\n" + b"x" * 65_536 + b"\r\n", 100 * MEGABYTE)
    assert server.memory() - before < 8 * MEGABYTE


@pytest.mark.usefixtures("bystander")
def test_a_publisher_of_100_megabytes_sees_the_413(server: Server) -> None:
    """An ordinary HTTP client that sends it all still gets the documented body."""
    response = server.post(b"x" * (100 * MEGABYTE))
    assert (response.status_code, parse(response.content)) == (413, http_error("validation", naming()))


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("sent", [b"", b'{"mess', b"x" * 999])
def test_half_a_body_is_no_notification(server: Server, sent: bytes) -> None:
    """A publisher that breaks off publishes nothing and leaves no exception in the log."""
    server.raw(PUBLISH + b"Content-Length: 1000\r\n\r\n" + sent).close()


@pytest.mark.usefixtures("bystander")
def test_half_a_body_that_waits_holds_up_nobody(server: Server) -> None:
    """Fifty publishers that stop in the middle don't stop the fifty-first."""
    for _ in range(50):
        server.raw(PUBLISH + b"Content-Length: 1000\r\n\r\n{")
    assert server.notify("the fifty-first")["status"] == "success"


@pytest.mark.usefixtures("bystander")
def test_a_publisher_that_does_not_read_its_answer_holds_up_nobody(server: Server) -> None:
    """A thousand requests in a row, and not one answer taken."""
    request = PUBLISH + b'Content-Length: 17\r\n\r\n{"message": "hi"}'
    assert push(server.raw(b""), b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100, MEGABYTE) > 0
    assert server.raw(request).recv(65_536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'{"message": "hi", "data": ' + b'{"a":' * 1_000_000 + b"0" + b"}" * 1_000_001,
        b'{"message": "hi", "data": {"list": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}}",
    ],
    ids=["brackets", "braces", "closed braces", "closed brackets"],
)
def test_json_a_million_levels_deep_is_400(vast: Server, body: bytes) -> None:
    """Even where the size is allowed, the depth ends in a validation error and not in a crash."""
    response = vast.post(body)
    assert (response.status_code, parse(response.content)) == (400, http_error("validation", naming()))


@pytest.fixture(scope="module")
def vast() -> Iterator[Server]:
    """A server that takes bodies of twenty megabytes."""
    server = Server.notifyd("--notification-interval", "0", "--max-message-size", "20000000")
    yield server
    server.stop()


def test_a_number_of_a_million_digits_is_an_answer_too(vast: Server) -> None:
    """A number that nobody can keep is refused, and quickly."""
    began = time.monotonic()
    status = vast.post(b'{"message": "hi", "data": {"n": ' + b"9" * 1_000_000 + b"}}").status_code
    assert status in (200, 400) and time.monotonic() - began < 2


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    "body",
    [
        b'{"message": "\xff"}',
        b'{"message": "\\ud800"}',
        b'{"message": "x", "data": {"n": NaN}}',
        b"\x00" * 1000,
    ],
    ids=["utf-8", "surrogate", "nan", "nul"],
)
def test_a_publishers_nonsense_is_only_its_own_problem(server: Server, body: bytes) -> None:
    """It gets its 400."""
    assert server.post(body).status_code == 400


def test_text_that_looks_like_markup_or_a_log_line_stays_text(server: Server) -> None:
    """Line feeds and escapes in ids, types and messages don't get into the log as lines of their own."""
    evil = "x\nCRITICAL forged line\r\n\x1b[31mred"
    before = len(server.stderr)
    server.connect(evil).closed()
    server.join(user_agent_header="agent").ask({"type": evil})
    server.post({"message": evil, "type": evil})
    server.post({"message": "hi", evil: 1})
    server.get("/health")
    assert [line for line in server.stderr[before:] if line.startswith("CRITICAL") or "\x1b" in line] == []
