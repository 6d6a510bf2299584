"""--compression auto: notifications compressed once for all who take that, on WebSockets and on streams."""

from __future__ import annotations

import json
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from typing import Any

import httpx
import pytest
from bytes import HANDSHAKE, masked, read_until
from conftest import StartServer
from hypothesis import given
from hypothesis import strategies as st
from processes import Server, environment
from websockets.exceptions import ConnectionClosed
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode

from connection import TURN_BYTES
from deflate import LEAST_BYTES, takes_gzip
from log import frame, payloads
from schemas import encode
from wire_deflate import InflatingParser, agree, deflated
from wire_frames import BINARY, TEXT, FrameError

LIMIT = 10_000
# A kilobyte of JSON, as programs send it.
STATE = {"items": [{"name": f"sensor-{number}", "state": "on", "value": number / 7} for number in range(16)]}
NO_TAKEOVER = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"


@pytest.fixture
def server(start_server: StartServer) -> Server:
    return start_server("--compression", "auto")


def answer_to(server: Server, offers: str) -> str:
    """The extensions in the answer to a handshake."""
    connection = server.raw(HANDSHAKE.replace(b"\r\n\r\n", f"\r\nSec-WebSocket-Extensions: {offers}\r\n\r\n".encode()))
    head = read_until(connection, b"\r\n\r\n").split(b"\r\n\r\n")[0].decode().lower()
    assert head.startswith("http/1.1 101 ")
    return "".join(
        line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("sec-websocket-extensions")
    )


# On WebSockets.


@pytest.mark.parametrize(
    ("offers", "answer"),
    [
        ("permessage-deflate; client_max_window_bits", NO_TAKEOVER),
        ("x-webkit-deflate-frame, permessage-deflate; nonsense, permessage-deflate", NO_TAKEOVER),
        ("permessage-deflate; server_max_window_bits=9", f"{NO_TAKEOVER}; server_max_window_bits=9"),
        ("permessage-deflate; server_max_window_bits=7", ""),
        ("permessage-deflate; server_no_context_takeover; server_no_context_takeover", ""),
        ("permessage-bzip2", ""),
        (';;=,,"', ""),
    ],
)
def test_the_first_valid_offer_is_taken(server: Server, offers: str, answer: str) -> None:
    """RFC 7692, section 5: an offer with a parameter that is unknown, wrong or twice is declined."""
    assert answer_to(server, offers) == answer


def test_without_an_offer_nothing_is_agreed(server: Server) -> None:
    """The answer has no such header, and the frames have no reserved bit."""
    client = server.join_bare()
    server.publish("hello", data=STATE)
    received = client.next_frame(Opcode.TEXT)
    assert not received.rsv1
    assert json.loads(received.data)["data"]["items"] == STATE["items"]


def test_all_receive_the_same(server: Server) -> None:
    """Whether they take it compressed, in a small window or not at all; a short notification too."""
    clients = [server.join(compression="deflate"), server.join(), server.join(extensions=[SmallWindow()])]
    server.publish("hello", data=STATE)
    server.publish("short")
    received = [client.receive_many(2) for client in clients]
    assert received[0] == received[1] == received[2]
    assert received[0][0]["data"]["items"] == STATE["items"]


class SmallWindow:
    """An offer of permessage-deflate by a client that has little memory."""

    name = "permessage-deflate"

    def get_request_params(self) -> list[tuple[str, str | None]]:
        return [("server_max_window_bits", "9")]

    def process_response_params(self, params: Any, accepted: Any) -> PerMessageDeflate:
        assert ("server_max_window_bits", "9") in params
        return PerMessageDeflate(True, True, 9, 15)


def test_only_notifications_are_compressed(server: Server) -> None:
    """An answer may hold what the client chose beside what it must not learn, and its length would tell."""
    connection = server.raw(HANDSHAKE.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n"))
    read_until(connection, b'"welcome"')
    connection.sendall(masked(Opcode.TEXT, json.dumps({"type": "x" * 500}).encode()))
    assert b"Unknown message type" in read_until(connection, b"Unknown message type")
    server.publish("hello", data=STATE)
    received = read_until(connection, b"\xc1\x7e")
    assert b"sensor" not in received


def test_a_kilobyte_takes_a_third_or_less() -> None:
    """Of JSON as programs send it; and a notification that would grow is sent as it is."""
    ready = frame(encode({"id": "01a2175b-8d9b-728f-a9dd-ecc36d7282e5", "data": STATE}))
    assert 900 < len(ready) < 1100
    assert 3 * len(deflated(ready)) < len(ready)
    random = frame(b'{"id":"' + bytes(range(256)) + b'"}')
    assert deflated(random) == random


def test_a_client_that_does_not_read_for_a_while_misses_nothing(server: Server) -> None:
    """Its backlog comes in the notifications' order, each whole."""
    client, other = server.join_bare(receive_buffer=4096), server.join(compression="deflate")
    lazy = server.join(compression="deflate")
    for start in range(0, 2000, 500):
        batch = [{"message": str(number), "data": STATE} for number in range(start, start + 500)]
        server.request("POST", "/notify/batch", json=batch)
        assert [each["data"]["message"] for each in other.receive_many(500)][-1] == str(start + 499)
    assert [each["data"]["message"] for each in lazy.receive_many(2000)] == [str(number) for number in range(2000)]
    assert json.loads(client.next_frame(Opcode.TEXT).data)["data"]["message"] == "0"


# What clients send.


def compressed(text: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (compressor.compress(text) + compressor.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\x00\x00\xff\xff")


def sent(payload: bytes, *, opcode: Opcode = Opcode.TEXT, fin: bool = True, rsv1: bool = True) -> bytes:
    first, *rest = masked(opcode, payload, fin=fin)
    return bytes((first | 0x40 * rsv1, *rest))


def test_a_message_may_come_compressed(server: Server) -> None:
    """And is answered like any other."""
    client = server.join(compression="deflate")
    assert client.ask({"type": "x" * 40})["message"] == f"Unknown message type: {'x' * 40}"


@pytest.mark.parametrize(
    ("bytes_", "code"),
    [
        (sent(compressed(b"x" * 100_000)), 1009),
        (sent(b"\xff\xff\xff"), 1002),
        (sent(compressed(b'{"type":"ping"}' + b" " * 300)[:-6]), 1002),
        (sent(compressed(b"\xff")), 1007),
        (sent(b"", opcode=Opcode.PING), 1002),
        (sent(compressed(b"a" * 50), fin=False) + sent(b"", opcode=Opcode.CONT), 1002),
    ],
    ids=["a bomb", "broken data", "half a message", "no UTF-8", "a compressed ping", "a compressed continuation"],
)
def test_bad_compression_ends_the_connection(server: Server, bytes_: bytes, code: int) -> None:
    """With the code that says why; the limit of a message holds for it inflated."""
    client = server.join(compression="deflate")
    client.connection.socket.sendall(bytes_)
    with pytest.raises(ConnectionClosed):
        client.connection.recv(5)
    assert client.closed()[0] == code


def test_a_compressed_message_without_an_agreement_is_refused(server: Server) -> None:
    """The reserved bit means nothing then."""
    client = server.join()
    client.connection.socket.sendall(sent(compressed(b"{}")))
    assert client.closed()[0] == 1002


@given(
    messages=st.lists(st.tuples(st.booleans(), st.binary(max_size=400) | st.text(max_size=200)), max_size=6),
    cuts=st.lists(st.integers(1, 40), min_size=1, max_size=30),
)
def test_messages_are_read_in_pieces_of_any_size(messages: list[tuple[bool, bytes | str]], cuts: list[int]) -> None:
    """Compressed and others in turn, in fragments; `websockets` compresses them."""
    theirs = PerMessageDeflate(True, True, 15, 15)
    stream, expected = b"", []
    for is_compressed, message in messages:
        opcode = Opcode.TEXT if isinstance(message, str) else Opcode.BINARY
        data = message.encode() if isinstance(message, str) else message
        whole = Frame(opcode, data)
        whole = theirs.encode(whole) if is_compressed else whole
        middle = len(whole.data) // 2
        stream += sent(whole.data[:middle], opcode=opcode, fin=False, rsv1=whole.rsv1)
        stream += masked(Opcode.PING, b"p")
        stream += masked(Opcode.CONT, whole.data[middle:])
        expected.append((TEXT if isinstance(message, str) else BINARY, message))
    parser = InflatingParser(LIMIT)
    read = [event for piece in pieces(stream, cuts) for event in parser.feed(piece)]
    assert [event for event in read if event[0] in (TEXT, BINARY)] == expected


def test_compressed_messages_count_inflated_for_a_turn() -> None:
    """As many of them are read at a time as of uncompressed ones, and the rest later, in order; so is a ping."""
    texts = [str(number) * 3000 for number in range(10)]
    stream = b"".join(sent(compressed(text.encode())) + masked(Opcode.PING, b"p") for text in texts)
    assert len(stream) < TURN_BYTES
    parser, turns = InflatingParser(LIMIT), []
    while stream:
        turns.append([message for opcode, message in parser.feed(stream) if opcode == TEXT])
        stream = parser.put_off()
    assert turns == [*(texts[start : start + 2] for start in range(0, 10, 2)), []]


def test_compressed_requests_that_are_put_off_are_published_in_order(start_server: StartServer) -> None:
    """Those that a full window holds back, too."""
    flags = ("--compression", "auto", "--publish-over-websocket", "--history-size", "1000")
    server = start_server(*flags, constants={"publishers.WINDOW_BYTES": 60_000})
    client = server.join(compression="deflate")
    requests = [{"type": "publish", "message": "x", "topics": ["x"], "ref": str(number)} for number in range(300)]
    data = [json.dumps(request | {"data": {"y": "y" * 30_000}}).encode() for request in requests]
    client.connection.socket.sendall(b"".join(sent(compressed(each)) for each in data))
    assert [message["ref"] for message in client.receive_many(300)] == [request["ref"] for request in requests]


def pieces(stream: bytes, cuts: list[int]) -> Iterator[bytes]:
    start = turn = 0
    while start < len(stream):
        size = cuts[turn % len(cuts)]
        yield stream[start : start + size]
        start, turn = start + size, turn + 1


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_frame_error(data: bytes) -> None:
    """Never another exception."""
    parser = InflatingParser(LIMIT)
    with suppress(FrameError):
        [(_, message)] = parser.feed(sent(data))
        assert isinstance(message, str)


@pytest.mark.parametrize(
    "data", ["f248cdc9c90700", "000500faff48656c6c6f00", "f348cdc9c9070000", "f24805000000ffffcac9c90700"]
)
def test_any_blocks_may_make_a_message(data: str) -> None:
    """The examples of RFC 7692, section 7.2.3: one, one that is not compressed, a last one, and two."""
    assert list(InflatingParser(LIMIT).feed(sent(bytes.fromhex(data)))) == [(TEXT, "Hello")]


def test_the_frames_are_those_that_a_library_reads() -> None:
    """Each stands for itself: `websockets` inflates them in any order, each with a fresh window."""
    made = [frame(encode({"id": "x" * number, "data": STATE})) for number in range(36, 40)]
    joined = deflated(b"".join(made))
    read = [
        PerMessageDeflate(True, True, 15, 15).decode(Frame(Opcode.TEXT, part, rsv1=True)).data
        for part in reversed(list(payloads(joined)))
    ]
    assert read == [next(payloads(each)) for each in reversed(made)]
    assert agree("permessage-deflate") is not None


# On streams.


@pytest.mark.parametrize(
    ("header", "takes"),
    [
        ("gzip, deflate, br", True),
        ("br;q=1.0, gzip;q=0.5", True),
        ("GZIP", True),
        ("gzip;q=0", False),
        ("gzip; q=0.0", False),
        ("br", False),
        ("", False),
    ],
)
def test_gzip_is_for_who_takes_it(header: str, takes: bool) -> None:
    """RFC 9110, section 12.5.3."""
    assert takes_gzip(header) is takes


def test_a_stream_in_gzip_is_read_as_it_comes(server: Server) -> None:
    """By httpx: the welcome, then each notification before the next is published."""
    other = server.join()
    with httpx.stream("GET", f"{server.url}/events", headers={"Accept": "text/event-stream"}, timeout=60) as response:
        assert response.headers["content-encoding"] == "gzip"
        assert response.headers["vary"].lower() == "accept-encoding"
        lines = response.iter_lines()
        assert "event: welcome" in [next(lines) for _ in range(3)]
        for number in range(3):
            server.publish(f"number {number}", data=STATE)
            while not (line := next(lines)).startswith("data: ") or "welcome" in line:
                pass
            assert json.loads(line.removeprefix("data: ")) == other.receive()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_shows_a_stream_in_gzip(server: Server) -> None:
    """Without --compressed it is sent as it is."""
    for flag, coding in (("--compressed", "gzip"), ("--silent", "identity")):
        command = ["curl", "--silent", "--include", "--no-buffer", "--max-time", "60", flag, f"{server.url}/events"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as curl:
            assert curl.stdout is not None
            lines = iter(curl.stdout.readline, "")
            head = [line.strip().lower() for line in takewhile(str.strip, lines)]
            assert ("content-encoding: gzip" in head) == (coding == "gzip")
            while next(lines) != "event: welcome\n":
                pass
            server.publish("disk full", data=STATE)
            while next(lines) != "event: message\n":
                pass
            assert json.loads(next(lines).removeprefix("data: "))["data"]["message"] == "disk full"
            curl.terminate()


def test_a_stream_in_gzip_is_told_its_end(start_server: StartServer) -> None:
    """The event `closed` is in the stream."""
    server = start_server("--compression", "auto", "--on-duplicate", "replace")
    accepted, url = {"Accept": "text/event-stream"}, f"{server.url}/events?client_id=ann"
    with httpx.stream("GET", url, headers=accepted, timeout=60) as response:
        lines = response.iter_lines()
        while next(lines) != "event: welcome":
            pass
        server.join("ann")
        while next(lines) != "event: closed":
            pass
        assert json.loads(next(lines).removeprefix("data: "))["reason"] == "Replaced by a new connection"


def test_head_names_the_coding_of_a_stream(server: Server) -> None:
    """As GET does."""
    for accepted, coding in (("gzip", "gzip"), ("identity", None)):
        headers = server.request("HEAD", "/events", headers={"Accept-Encoding": accepted}).headers
        assert headers.get("content-encoding") == coding
        assert ("vary" in headers) == (coding is not None)


def test_off_is_the_default(start_server: StartServer) -> None:
    """Nothing is agreed, and a stream is sent as it is."""
    server = start_server()
    assert answer_to(server, "permessage-deflate") == ""
    with httpx.stream("GET", f"{server.url}/events", headers={"Accept": "text/event-stream"}) as response:
        assert "content-encoding" not in response.headers


def test_a_short_text_is_left_alone() -> None:
    """It would not pay."""
    ready = frame(b'{"id":"' + b"x" * (LEAST_BYTES - 10) + b'"}')
    assert len(next(payloads(ready))) < LEAST_BYTES and deflated(ready) == ready
