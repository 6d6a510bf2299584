"""Hostile and broken peers: the server goes on serving everybody else."""

from __future__ import annotations

import random
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import quote

import pytest
from bytes import HANDSHAKE, MEGABYTE, handshake, masked, push, read_until
from conftest import StartServer
from event_stream import Stream
from expected import PONG, Like, answered, http_error, invalid, naming, parse, ws_error
from processes import QUIET, Server, eventually, needs_proc
from websockets.frames import Opcode
from ws_clients import BareClient

# For servers that give a peer less time to answer a close.
HURRIED = {"connection.CLOSE_DEADLINE_SECONDS": 1}
PUBLISH = b"POST /notify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def bystander(server: Server) -> Iterator[None]:
    """A client that is connected throughout, and must be served before and after."""
    client = server.join()
    yield
    client.send({"type": "ping"})
    server.notify("still here?")
    awaited = {"pong", "still here?"}
    while awaited:
        message = client.receive()
        awaited.discard(message["data"]["message"] if message["type"] == "custom" else message["type"])


def stalled(server: Server, client_id: str | None = None) -> BareClient:
    """A client that has a small buffer and stops reading after its welcome."""
    return server.join_bare(client_id, receive_buffer=4096)


# Clients.


def test_a_client_that_never_reads_does_not_delay_the_others(server: Server) -> None:
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
    """The client gets its notifications without a gap, and then 1008 with the id to resume from."""
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


def test_a_flood_from_one_client_does_not_delay_another(server: Server) -> None:
    """While one sends a hundred thousand messages, another one's ping is answered in time."""
    flooder, other = server.join_bare(), server.join()
    push(flooder.socket, masked(Opcode.TEXT, b'{"type": "ping"}') * 1000, 2 * MEGABYTE)
    began = time.monotonic()
    assert other.ask({"type": "ping"}) == PONG
    assert time.monotonic() - began < 1


def small_frames(opcode: Opcode) -> bytes:
    """Two megabytes of frames that cost the most for their size, within a message, and a goodbye."""
    start, end = masked(Opcode.TEXT, fin=False), masked(Opcode.CLOSE, b"\x03\xe8")
    flood = masked(opcode, b"", fin=opcode is not Opcode.CONT) * (2 * MEGABYTE // 6)
    return HANDSHAKE + start + flood + end


FLOODS = {
    "fragments": small_frames(Opcode.CONT),
    "pings": small_frames(Opcode.PING),
    "pongs": small_frames(Opcode.PONG),
    "chunks": PUBLISH.replace(b"/notify", b"/notify/batch")
    + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"1\r\nx\r\n" * (4 * MEGABYTE // 6)
    + b"0\r\n\r\n",
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_a_flood_of_little_things_is_read_in_turns(server: Server, flood: bytes) -> None:
    """The event loop is everybody's: meanwhile another one is answered again and again."""
    flooder, other, answered = server.raw(b""), server.join_bare(), 0
    with ThreadPoolExecutor(1) as background:
        ended = background.submit(send_and_read_all, flooder, flood)
        while not ended.done():
            other.send_frame(Opcode.PING, b"")
            other.next_frame(Opcode.PONG)
            answered += 1
    assert answered > 20


def send_and_read_all(connection: socket.socket, data: bytes) -> None:
    connection.settimeout(60)
    writer = threading.Thread(target=connection.sendall, args=[data])
    writer.start()
    while connection.recv(65_536):
        pass
    writer.join()


@needs_proc
@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("opcode", [Opcode.PING, Opcode.TEXT])
def test_a_flood_without_reading_takes_no_memory(server: Server, opcode: Opcode) -> None:
    """Answers to a client that doesn't read aren't piled up, neither pongs nor error messages."""
    flooder, before = stalled(server), server.memory()
    push(flooder.socket, masked(opcode, b"x" * 125) * 500, 40 * MEGABYTE)
    assert server.memory() - before < 8 * MEGABYTE


@pytest.fixture
def lenient() -> Iterator[Server]:
    """A server that lets a client send as many messages as it likes."""
    server = Server.notifyd(*QUIET, constants={"clients.MESSAGE_BURST": 1e9})
    yield server
    server.stop()


def test_a_client_that_does_not_read_its_answers_is_closed(lenient: Server) -> None:
    """A client that asks and never reads is closed before they fill the memory."""
    client = lenient.join_bare(receive_buffer=65_536)
    client.socket.sendall(masked(Opcode.TEXT, b"x") * 100_000)
    eventually(lambda: lenient.active() == 0)
    assert client.closed() == (1008, "Slow consumer: answers are not read")


@needs_proc
@pytest.mark.usefixtures("bystander")
def test_an_endless_fragmented_message_takes_no_memory(server: Server) -> None:
    """Hundreds of thousands of empty fragments are as little welcome as one large message."""
    client, before = server.join_bare(), server.memory()
    client.socket.settimeout(30)
    client.send_frame(Opcode.TEXT, b"", fin=False)
    client.socket.sendall(masked(Opcode.CONT, b"", fin=False) * 600_000)
    client.send_frame(Opcode.PING, b"")
    client.next_frame(Opcode.PONG)  # All that came before it has been read.
    assert server.memory() - before < 3 * MEGABYTE


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
        b"\x88\x82\x00\x00\x00\x00\x03\xed",  # A close with 1005, a code that is never sent.
        b"\x88\x82\x00\x00\x00\x00\x00\x00",  # A close with a code that doesn't exist.
    ],
    ids=lambda raw: raw[:8].hex(),
)
def test_a_frame_against_the_protocol_closes_with_1002(server: Server, raw: bytes) -> None:
    """Each violation of RFC 6455 ends the connection with the documented close."""
    client = server.join_bare()
    client.socket.sendall(raw)
    assert client.closed()[0] == 1002


@pytest.mark.usefixtures("bystander")
def test_a_broken_frame_behind_a_message_is_no_error_of_ours(server: Server) -> None:
    """When the message's answer is written, the connection has failed already: nothing is in the log."""
    client = server.join_bare()
    message, pong = masked(Opcode.TEXT, b"x"), masked(Opcode.PONG, b"x" * 125)
    client.socket.sendall(message + pong * 65 + b"\x81\x02{}")
    assert client.closed()[0] == 1002


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65_535])
def test_a_close_with_a_code_that_nobody_may_send_is_answered_with_1002(server: Server, code: int) -> None:
    """RFC 6455, 7.4: some are reserved, the others not defined."""
    client = server.join_bare()
    client.send_close(code)
    assert client.closed()[0] == 1002


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    "lie",
    [
        b"\x81\x82\x00\x00\x00\x00" + b"{}" + b"more than it said",
        b"\x81\xfe\x00\x01\x00\x00\x00\x00" + b"x",  # One byte, in the form for 126 and more.
        b"\x82\xff" + b"\xff" * 8,  # A size with the sign bit.
        b"\x82\xff\x7f" + b"\xff" * 7,
        b"\x02\xfe\xff\xff\x00\x00\x00\x00" + b"x" * 65_535 + b"\x80\xfe\xff\xff\x00\x00\x00\x00",
    ],
    ids=["less than it is", "not minimal", "negative", "exabytes", "fragments"],
)
def test_a_frame_that_lies_about_its_length_ends_the_connection(server: Server, lie: bytes) -> None:
    """The announced length alone ends it: the server neither waits for the payload nor reserves memory."""
    client = server.join_bare()
    client.socket.sendall(lie)
    assert client.closed()[0] in (1002, 1009) or client.rest()[-1]["type"] == "error"


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    "offers",
    [
        b"permessage-deflate; client_max_window_bits=99; server_no_context_takeover=1",
        b"permessage-deflate, " * 2000 + b"x-webkit-deflate-frame",
        b"permessage-deflate; client_max_window_bits=" + b"9" * 10_000,
        b';;=,,"',
        b"\xff\xfe",
    ],
    ids=["bad parameters", "many", "a long number", "no grammar", "no text"],
)
def test_an_offer_of_compression_is_never_taken(server: Server, offers: bytes) -> None:
    """It is declined, or no handshake at all."""
    request = HANDSHAKE.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Extensions: " + offers + b"\r\n\r\n")
    answer = server.raw(request).recv(65_536)
    assert answer.startswith((b"HTTP/1.1 101 ", b"HTTP/1.1 400 ")) and b"extensions" not in answer.lower()


@pytest.mark.usefixtures("bystander")
def test_a_megabyte_of_pings_is_answered(server: Server) -> None:
    """A client that reads its pongs gets them all; others are served meanwhile."""
    client, count = server.join_bare(), MEGABYTE // 131
    with ThreadPoolExecutor(1) as background:
        sent = background.submit(client.socket.sendall, masked(Opcode.PING, b"x" * 125) * count)
        assert server.join().ask({"type": "ping"}) == PONG
        for _ in range(count):
            assert client.next_frame(Opcode.PONG).data == b"x" * 125
        sent.result()


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
@pytest.mark.parametrize(
    "eager",
    [masked(Opcode.CLOSE, b"\x03\xe8"), b"\x81\x05Hello", b"\x81"],
    ids=["goodbye", "unmasked", "half a frame"],
)
def test_an_end_before_the_handshake_is_answered_is_just_an_end(server: Server, eager: bytes) -> None:
    """A close, a broken frame or half of one with the request leaves nothing in the log."""
    connection = server.raw(HANDSHAKE + eager)
    connection.shutdown(socket.SHUT_WR)
    with suppress(ConnectionResetError):
        while connection.recv(65_536):
            pass


@needs_proc
@pytest.mark.usefixtures("bystander")
def test_a_flood_before_the_handshake_is_answered_takes_no_memory(server: Server) -> None:
    """A newcomer with a taken client_id waits two seconds for its answer, and may flood meanwhile."""
    server.join_bare("bob")
    request, before = handshake("/ws?client_id=bob"), server.memory()
    taken = push(server.raw(request), masked(Opcode.PONG, b"x" * 125) * 500, 40 * MEGABYTE)
    assert taken < 40 * MEGABYTE and server.memory() - before < 8 * MEGABYTE


@pytest.mark.usefixtures("bystander")
def test_the_end_of_the_stream_in_the_middle_of_a_frame_is_a_goodbye(server: Server) -> None:
    """A client that sends half a frame and a FIN has left."""
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
    server = start_server("--on-duplicate", "replace", constants=HURRIED)
    client = stalled(server, "bob")
    for _ in range(100):
        server.notify("large", data={"pad": "x" * 60_000})
    assert server.holds(client.socket)
    server.join("bob").leave()
    eventually(lambda: not server.holds(client.socket))
    assert client.closed()[0] in (1006, 1008)


@needs_proc
def test_a_peer_that_ends_its_side_and_reads_nothing_is_aborted(start_server: StartServer) -> None:
    """Bytes that it never takes keep the connection only for a while."""
    server = start_server(constants=HURRIED)
    client = stalled(server)
    for _ in range(100):
        server.notify("large", data={"pad": "x" * 60_000})
    client.socket.shutdown(socket.SHUT_WR)
    eventually(lambda: not server.holds(client.socket))


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


# Before the handshake.


@pytest.mark.usefixtures("bystander")
def test_idle_connections_do_not_delay_the_others(server: Server) -> None:
    """Two hundred connections that ask nothing, or only half of it, are borne."""
    for number in range(200):
        server.raw(b"" if number % 2 else b"GET /health HTTP/1.1\r\nHost: ")
    assert server.get("/health").status_code == 200


@pytest.mark.usefixtures("bystander")
def test_headers_without_end_are_cut_off(server: Server) -> None:
    """A header of many megabytes is refused long before its end."""
    connection = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
    assert push(connection, b"x" * 65_536, 20 * MEGABYTE) < 10 * MEGABYTE


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    "flood",
    [b"GET /" + b"x" * 65_536, b"GET /ws?client_id=" + b"x" * 65_536, HANDSHAKE[:-2] + b"X: y\r\n" * 12_000],
    ids=["URL", "query", "headers"],
)
def test_a_head_that_is_a_flood_is_refused(server: Server, flood: bytes) -> None:
    """The answer is 431 before the end of the head, which never comes."""
    assert server.answer_to(flood).startswith(b"HTTP/1.1 431 ")


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("path", ["/status", "/notifications", "/events", "/notify"])
def test_a_query_with_a_flood_of_parameters_is_refused(server: Server, path: str) -> None:
    """Before any of them is read: a URL has room for more than can be read at once."""
    answer = server.get(f"{path}?{'a&' * 100}") if path != "/notify" else server.http.post(f"{path}?{'a&' * 100}")
    assert answered(answer) == invalid("Query", "100")


@pytest.mark.usefixtures("bystander")
def test_a_handshake_with_a_flood_of_parameters_is_closed(server: Server) -> None:
    """A handshake with more than a hundred parameters is closed with the reason; a hundred are read."""
    assert server.connect(query="a&" * 100).closed() == (1008, "Query: more than 100 parameters")
    assert server.join(query="topics&" * 98 + "client_id=bob").ask({"type": "ping"}) == PONG


@needs_proc
@pytest.mark.parametrize("headers", [b"X: " + b"x" * 9000, b"X: y\r\n" * 200 + b"Z: z"], ids=["long", "many"])
def test_a_handshake_with_much_to_read_is_answered(server: Server, headers: bytes) -> None:
    """A handshake whose head keeps to its limit is answered."""
    connection = server.raw(HANDSHAKE[:-2] + headers + b"\r\n\r\n")
    assert connection.recv(65_536).startswith(b"HTTP/1.1 101 ")


@needs_proc
def test_a_flood_of_handshakes_at_the_limit_shuts_nobody_out_for_long(start_server: StartServer) -> None:
    """Each newcomer is told the reason; connected clients are served, and a free place is given away again."""
    server = start_server("--max-connections", "2")
    first, second = server.join(), server.join()
    server.get("/health")
    before = server.descriptors()
    refused = [server.raw(HANDSHAKE) for _ in range(500)]
    assert first.ask({"type": "ping"}) == PONG
    for connection in refused:
        read_until(connection, b"Connection limit exceeded: 2/2")
    second.leave()
    eventually(lambda: server.active() == 1)
    server.join()
    for connection in refused:
        connection.close()
    eventually(lambda: server.descriptors() <= before)


@needs_proc
def test_ten_thousand_that_come_and_go_at_once_leave_nothing(start_server: StartServer) -> None:
    """Connected, half connected, reset and gone, all together: afterwards everything is as before."""
    server = start_server("--max-connections", "20000")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 12_000:
        pytest.skip("needs 12,000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    client = server.join()
    server.get("/health")
    before = server.descriptors()
    crowd = [server.raw((HANDSHAKE, HANDSHAKE[:50], b"")[number % 3]) for number in range(10_000)]
    for connection in crowd[::2]:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for connection in crowd:
        connection.close()
    assert client.ask({"type": "ping"}) == PONG
    # A store opens a file of its own now and then.
    eventually(lambda: server.active() == 1 and server.descriptors() <= before + 4, 30)


# Publishers.


@needs_proc
@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("length", [104_857_600, 2**63, 2**64 - 1])
def test_a_declared_body_of_100_megabytes_is_refused_at_once(server: Server, length: int) -> None:
    """The declared length is enough for 413; the body needn't be sent."""
    before = server.memory()
    connection = server.raw(PUBLISH + b"Content-Length: %d\r\n\r\n" % length + b"x" * 1000)
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
    assert answered(response) == (413, http_error("validation", naming()))


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("sent", [b"", b'{"mess', b"x" * 999])
def test_half_a_body_is_no_notification(server: Server, sent: bytes) -> None:
    """A publisher that breaks off publishes nothing and leaves no exception in the log."""
    server.raw(PUBLISH + b"Content-Length: 1000\r\n\r\n" + sent).close()


def test_half_a_text_is_no_notification(server: Server) -> None:
    """Any part of a plain text could be one."""
    client = server.join()
    connection = server.raw(
        b"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nContent-Type: text/plain\r\n\r\nhalf"
    )
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(65_536) == b""
    server.notify("whole")
    assert client.receive()["data"]["message"] == "whole"


@pytest.mark.usefixtures("bystander")
def test_half_a_body_that_waits_does_not_delay_the_others(server: Server) -> None:
    """Fifty publishers that stop in the middle don't stop the fifty-first."""
    for _ in range(50):
        server.raw(PUBLISH + b"Content-Length: 1000\r\n\r\n{")
    assert server.notify("the fifty-first")["status"] == "success"


@pytest.mark.usefixtures("bystander")
def test_a_publisher_that_does_not_read_its_answer_does_not_delay_the_others(server: Server) -> None:
    """A thousand requests in a row, and not one answer taken."""
    request = PUBLISH + b'Content-Length: 17\r\n\r\n{"message": "hi"}'
    assert push(server.raw(b""), b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100, MEGABYTE) > 0
    assert server.raw(request).recv(65_536).startswith(b"HTTP/1.1 200 ")


@needs_proc
@pytest.mark.parametrize("path", ["/notifications", "/health"])
def test_requests_behind_an_answer_that_nobody_takes_take_no_memory(start_server: StartServer, path: str) -> None:
    """Further requests wait in the kernel, then at their sender; for few large answers and for many small ones."""
    server = start_server()
    for _ in range(17):
        server.notify("large", data={"pad": "x" * 60_000})
    connection, before = server.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 100), server.memory()
    assert push(connection, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 1000, 40 * MEGABYTE) < 40 * MEGABYTE
    assert server.memory() - before < 8 * MEGABYTE


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
    assert answered(response) == invalid()


@pytest.fixture(scope="module")
def vast() -> Iterator[Server]:
    """A server that takes bodies of twenty megabytes."""
    server = Server.notifyd("--notification-interval", "0", "--max-message-size", "20000000")
    yield server
    server.stop()


def test_a_number_of_ten_million_digits_is_an_answer_too(vast: Server) -> None:
    """A number that nobody can keep is refused, and quickly."""
    began = time.monotonic()
    status = vast.post(b'{"message": "hi", "data": {"n": ' + b"9" * 10_000_000 + b"}}").status_code
    assert status in (200, 400) and time.monotonic() - began < 10


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
def test_a_publishers_invalid_requests_do_not_affect_the_others(server: Server, body: bytes) -> None:
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


LINES = "x\r\nevent: forged\ndata: {}\r\rid: 1\n\n\x00\x1b\x7f\u0085\u2028"


def test_line_ends_in_a_notification_end_no_line_of_a_stream(server: Server) -> None:
    """Type and message arrive as they were sent, in one event, on the stream as on the WebSocket."""
    stream, client = Stream(server), server.join()
    server.notify(LINES, type=LINES, data={LINES: LINES})
    server.notify("the next")
    notification = client.receive()
    assert (notification["type"], notification["data"]) == (LINES, {"message": LINES, LINES: LINES})
    assert stream.event().name == "welcome"
    event = stream.event()
    assert (event.name, event.data) == ("message", notification)
    assert stream.event().data == client.receive()


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("character", ["\r", "\n", "\0", "\x1b", "\x7f"], ids=repr)
def test_no_name_has_a_control_character(server: Server, character: str) -> None:
    """A client_id or topic with a control character is refused everywhere, and no reason or answer repeats it."""
    name = f"x{character}y"
    code, reason = server.connect(name).closed()
    assert (code, reason) == (1008, "Invalid client_id")
    code, reason = server.connect(query=f"topics={quote(name)}").closed()
    assert code == 1008 and character not in str(reason)
    for field in ("clients", "topics"):
        response = server.post({"message": "hi", field: [name]})
        assert response.status_code == 400 and character not in parse(response.content)["error"]["message"]
    answer = server.join().ask({"type": "subscribe", "topics": [name]})
    assert answer["type"] == "error" and character not in answer["message"]
    for path in (f"/events?client_id={quote(name)}", f"/notifications?topics={quote(name)}"):
        assert server.get(path).status_code == 400


@pytest.mark.usefixtures("bystander")
def test_a_close_reason_with_line_ends_is_only_a_reason(server: Server) -> None:
    """Nobody is told of it, and it is not in the log."""
    client, before = server.join_bare(), len(server.stderr)
    client.send_frame(Opcode.CLOSE, b"\x03\xe8x\r\nCRITICAL forged")
    assert client.closed()[0] == 1000
    server.get("/health")
    assert not any("forged" in line for line in server.stderr[before:])
