"""uvicorn with our protocol classes, and ordinary ASGI apps on them: what goes over real sockets.

All of it holds on each event loop.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from bytes import HANDSHAKE, KEY, MEGABYTE, handshake, masked, push, read_to_end
from expected import http_error, naming, parse
from processes import Server, eventually, free_port, needs_proc
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Opcode
from ws_clients import PATIENCE, BareClient, Client

from connection import CLOSE_DEADLINE_SECONDS

# What the kernel holds for a peer that reads nothing, both directions of loopback together.
KERNEL_BYTES = 16 * MEGABYTE
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


class Apps(Server):
    """The apps of asgi_apps.py in a process of their own, and clients of each."""

    def __init__(self, *flags: str, url: str | None = None) -> None:
        super().__init__([sys.executable, str(Path(__file__).with_name("asgi_apps.py")), *flags], url=url)

    def at(self, app: str, **options: Any) -> BareClient:
        """Connect a bare client to an app."""
        client = BareClient(self._url_of(app), **options)
        self._clients.callback(client.socket.close)
        return client

    def join_app(self, app: str, **options: Any) -> Client:
        """Connect an ordinary client to an app."""
        return self.connect(url=self._url_of(app), **options)

    def _url_of(self, app: str) -> str:
        return f"{self.ws_url.removesuffix('/ws')}/{app}"

    def wake(self) -> None:
        """Wake the apps that wait for it."""
        self.get("/wake")


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def apps(request: pytest.FixtureRequest) -> Iterator[Apps]:
    """WireProtocol on each loop."""
    server = Apps("--loop", request.param)
    yield server
    server.stop()


@pytest.fixture
def failing(apps: Apps) -> Iterator[Apps]:
    """For a test with a failing app, whose error is logged."""
    yield apps
    assert "on purpose" in apps.new_log()


# The handshake.


def test_the_answer_shows_that_the_key_was_read(apps: Apps) -> None:
    """The example of RFC 6455, section 1.3."""
    status, headers, _ = apps.response_to(HANDSHAKE)
    assert (status, headers["Sec-WebSocket-Accept"]) == (101, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    assert (headers["Upgrade"], headers["Connection"]) == ("websocket", "Upgrade")


@pytest.mark.parametrize(
    "changes",
    [
        {"Upgrade": "WebSocket"},
        {"Connection": "keep-alive, Upgrade"},
        {"Connection": "upgrade"},
        {"Sec_WebSocket_Key": None, "sec_websocket_KEY": KEY},
        {"Sec_WebSocket_Key": f"  {KEY}  "},
        {"Sec_WebSocket_Extensions": "permessage-deflate; client_max_window_bits"},
        {"Origin": "http://elsewhere"},
    ],
    ids=str,
)
def test_a_handshake_may_look_like_this_too(apps: Apps, changes: dict[str, str | None]) -> None:
    """Names of headers and some values are the same in any case; extensions needn't be agreed on."""
    status, headers, _ = apps.response_to(handshake(**changes))
    assert (status, headers["Sec-WebSocket-Extensions"]) == (101, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"Sec_WebSocket_Key": None},
        {"Sec_WebSocket_Key": ""},
        {"Sec_WebSocket_Key": "no base64!"},
        {"Sec_WebSocket_Key": base64.b64encode(b"x" * 15).decode()},
        {"Sec_WebSocket_Key": base64.b64encode(b"x" * 17).decode()},
        {"Sec_WebSocket_Key": KEY[:-2]},
        {"sec_websocket_key": KEY},  # A second one.
    ],
    ids=str,
)
def test_a_handshake_without_a_valid_key_is_400(apps: Apps, changes: dict[str, str | None]) -> None:
    """RFC 6455, section 4.2.1: sixteen bytes in base64, once."""
    status, _, body = apps.response_to(handshake(**changes))
    assert (status, parse(body)) == (400, http_error("connection", naming("Sec-WebSocket-Key")))


@pytest.mark.parametrize("changes", [{"Host": None}, {"host": "elsewhere"}], ids=["none", "two"])
def test_a_handshake_has_one_host(apps: Apps, changes: dict[str, str | None]) -> None:
    """RFC 6455, section 4.2.1, and RFC 9112, section 3.2."""
    status, _, body = apps.response_to(handshake(**changes))
    assert (status, parse(body)) == (400, http_error("connection", naming("Host")))


def test_a_handshake_is_http_1_1(apps: Apps) -> None:
    """RFC 6455, section 4.2.1."""
    status, _, body = apps.response_to(HANDSHAKE.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert (status, parse(body)) == (400, http_error("connection", naming("HTTP/1.1")))


@pytest.mark.parametrize("changes", [{"Content_Length": "5"}, {"Transfer_Encoding": "chunked"}], ids=str)
def test_a_handshake_has_no_body(apps: Apps, changes: dict[str, str | None]) -> None:
    """Bytes that a proxy takes for a body must not be read as frames, nor the other way round."""
    assert apps.response_to(handshake(**changes))[0] == 400
    assert apps.response_to(handshake(Content_Length="0"))[0] == 101


@pytest.mark.parametrize("version", ["12", "8", "", "13, 8", "+13", None])
def test_another_version_is_426_with_the_right_version(apps: Apps, version: str | None) -> None:
    """RFC 6455, section 4.2.2: so that the client can try again."""
    status, headers, body = apps.response_to(handshake(Sec_WebSocket_Version=version))
    assert (status, headers["Sec-WebSocket-Version"]) == (426, "13")
    assert parse(body) == http_error("connection", naming("Sec-WebSocket-Version"))


@pytest.mark.parametrize("method", ["POST", "PUT", "HEAD", "OPTIONS"])
def test_a_handshake_is_a_get(apps: Apps, method: str) -> None:
    """RFC 6455, section 4.2.1."""
    status, headers, body = apps.response_to(handshake(method=method))
    assert (status, headers["Allow"]) == (405, "GET")
    if method != "HEAD":
        assert parse(body) == http_error("connection", naming("GET"))


def test_a_refused_handshake_ends_the_connection(apps: Apps) -> None:
    """The answer says that the connection ends, and then it ends."""
    connection = apps.raw(handshake(Sec_WebSocket_Key=None) + b"x" * 1000)
    answer = connection.recv(65_536)
    with suppress(OSError):
        connection.sendall(b"x" * 1000)
        answer += read_to_end(connection)
    assert b"connection: close" in answer.lower()


def test_the_app_chooses_a_subprotocol_and_adds_headers(apps: Apps) -> None:
    """Headers are tuples or lists."""
    status, headers, _ = apps.response_to(handshake("/describe", Sec_WebSocket_Protocol="a, b"))
    assert (status, headers["Sec-WebSocket-Protocol"]) == (101, "b")
    assert (headers["x-list"], headers["x-tuple"]) == ("1", "2")


def test_the_app_sees_the_request_as_sent(apps: Apps) -> None:
    """The scope is the specification's."""
    client = apps.join_app("de%20scribe?a=b%20c", subprotocols=["a", "b"])
    assert json.loads(client.connection.recv(PATIENCE)) == {
        "type": "websocket",
        "http_version": "1.1",
        "scheme": "ws",
        "root_path": "",
        "path": "/de scribe",
        "query_string": "a=b%20c",
        "raw_path": "/de%20scribe",
        "subprotocols": ["a", "b"],
    }


def test_an_app_may_refuse_with_a_response(apps: Apps) -> None:
    """ASGI's extension websocket.http.response."""
    status, headers, body = apps.response_to(handshake("/deny"))
    assert (status, headers["x-why"], headers["content-type"], body) == (
        418,
        "short and stout",
        "text/plain",
        b"teapot",
    )


def test_an_app_may_refuse_by_closing(apps: Apps) -> None:
    """A close before the handshake is 403."""
    assert apps.response_to(handshake("/forbid"))[0] == 403


def test_an_app_that_fails_before_it_answers_is_500(failing: Apps) -> None:
    """The 500 has the documented body."""
    status, _, body = failing.response_to(handshake("/crash_early"))
    assert (status, parse(body)) == (500, http_error("connection", naming()))
    failing.wait_for_line("Error: on purpose")


def test_only_an_app_that_forgets_to_answer_is_logged(apps: Apps) -> None:
    """Its client gets a 500. A refusal is an answer."""
    line = len(apps.stderr)
    assert apps.response_to(handshake("/deny"))[0] == 418
    assert apps.response_to(handshake("/forget"))[0] == 500
    apps.wait_for_line("without", after=line)
    assert sum("without" in each for each in apps.stderr[line:]) == 1


def test_frames_sent_with_the_handshake_are_read_after_it(apps: Apps) -> None:
    """Any number of frames are read in order, beginning in the segment of the request."""
    messages = [b"%d " % number + b"x" * 1000 for number in range(1000)]
    frames = b"".join(masked(Opcode.TEXT, message) for message in messages)
    connection = apps.raw(handshake("/late") + frames[:5000])
    eventually(lambda: apps.active() == 1)
    sender = threading.Thread(target=connection.sendall, args=(frames[5000:],))
    sender.start()
    apps.wake()
    with stream_after_the_answer(connection) as stream:
        assert [read_frame(stream) for _ in messages] == messages
    sender.join(PATIENCE)


def test_half_a_frame_may_come_with_the_handshake(apps: Apps) -> None:
    """The other half comes after the answer."""
    frame = masked(Opcode.TEXT, b"x" * 200)
    connection = apps.raw(handshake("/late") + frame[:3])
    eventually(lambda: apps.active() == 1)
    apps.wake()
    with stream_after_the_answer(connection) as stream:
        connection.sendall(frame[3:])
        assert read_frame(stream) == b"x" * 200


def test_frames_sent_with_a_pipelined_handshake_stay_in_order(apps: Apps) -> None:
    """The order holds where the first request is answered before its end, and the handshake comes with that end."""
    messages = [b"%d " % number + b"x" * 5000 for number in range(200)]
    frames = b"".join(masked(Opcode.TEXT, message) for message in messages)
    head = b"POST /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection = apps.raw(b"")
    everything = head + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n" + HANDSHAKE + frames
    sender = threading.Thread(target=connection.sendall, args=(everything,))
    sender.start()
    with connection.makefile("rb") as stream:
        # The answer's head, its body, and the answer to the handshake.
        for _ in range(3):
            while stream.readline() != b"\r\n":
                pass
        assert [read_frame(stream) for _ in messages] == messages
    sender.join(PATIENCE)


def stream_after_the_answer(connection: socket.socket) -> BinaryIO:
    """Read the answer to a handshake, and return the bytes after it as a file."""
    stream = connection.makefile("rb")
    while stream.readline() != b"\r\n":
        pass
    return stream


def read_frame(stream: BinaryIO) -> bytes:
    """Read an unmasked frame of up to 65,535 bytes, and return its payload."""
    _, size = stream.read(2)
    return stream.read(int.from_bytes(stream.read(2), "big") if size == 126 else size)


# Messages.


@pytest.mark.parametrize("message", ["text", "", "ü" * 100, b"bytes", b"", b"\xff" * 100_000, "x" * MEGABYTE])
def test_a_message_comes_back_as_it_was_sent(apps: Apps, message: str | bytes) -> None:
    """Text as text, bytes as bytes, up to the limit."""
    client = apps.join_app("echo")
    client.send(message)
    assert client.connection.recv(PATIENCE) == message


def test_messages_come_back_in_order(apps: Apps) -> None:
    """Two thousand of them, more than wait for an app at once."""
    client = apps.at("echo")
    for number in range(2000):
        client.send(number)
    assert [client.receive() for _ in range(2000)] == list(range(2000))


def test_a_ping_is_answered_with_its_payload(apps: Apps) -> None:
    """A ping between the fragments of a message is answered as well."""
    client = apps.at("echo")
    client.send_frame(Opcode.TEXT, b'"Hel', fin=False)
    client.send_frame(Opcode.PING, b"there?")
    client.send_frame(Opcode.CONT, b'lo"')
    assert bytes(client.next_frame(Opcode.PONG).data) == b"there?"
    assert client.receive() == "Hello"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x81\x05Hello", 1002),
        (masked(Opcode.CONT, b"x"), 1002),
        (masked(Opcode.TEXT, b"\xff"), 1007),
        (masked(Opcode.BINARY, b"x" * (MEGABYTE + 1)), 1009),
        (masked(Opcode.CLOSE, b"\x03\xed"), 1002),
        (masked(Opcode.CLOSE, b"\x03\xe8\xff"), 1007),
    ],
    ids=["not masked", "continues nothing", "no text", "too large", "a bad code", "a bad reason"],
)
def test_a_broken_frame_is_answered_with_its_code(apps: Apps, frame: bytes, code: int) -> None:
    """RFC 6455, section 7.4.1."""
    client = apps.at("echo")
    client.socket.sendall(frame)
    assert client.closed()[0] == code


def test_messages_before_a_broken_frame_are_answered_before_the_close(apps: Apps) -> None:
    """The answers come first although all frames came in one segment (Autobahn 3.2)."""
    client = apps.at("echo")
    client.socket.sendall(masked(Opcode.TEXT, b'"one"') + masked(Opcode.TEXT, b'"two"') + b"\xff\xff")
    assert (client.rest(), client.closed()) == (["one", "two"], (1002, "Reserved bits are set"))


def test_a_broken_frame_waits_only_so_long_for_a_slow_app(apps: Apps) -> None:
    """After a second the connection fails, even if the app is busy."""
    client = apps.at("answer_in_its_own_time")
    client.socket.sendall(masked(Opcode.TEXT, b'"one"') + b"\xff\xff")
    assert client.closed() == (1002, "Reserved bits are set")
    apps.wake()


# The end.


def test_a_close_is_answered_with_its_code(apps: Apps) -> None:
    """The app hears the code and the reason."""
    client, line = apps.at("echo"), len(apps.stderr)
    client.send_frame(Opcode.CLOSE, b"\x0f\xa0" + "grün".encode())
    assert client.closed()[0] == 4000
    apps.wait_for_line("disconnect 4000 'grün'", after=line)


def test_an_empty_close_is_answered_with_an_empty_one(apps: Apps) -> None:
    """For the app that is 1005."""
    client, line = apps.at("echo"), len(apps.stderr)
    client.send_frame(Opcode.CLOSE, b"")
    assert bytes(client.next_frame(Opcode.CLOSE).data) == b""
    apps.wait_for_line("disconnect 1005", after=line)


def test_a_close_in_the_middle_of_a_message_is_a_close(apps: Apps) -> None:
    """Autobahn 7.1.5: control frames may come between fragments, and bytes after a close are ignored."""
    client = apps.at("echo")
    fragment = masked(Opcode.TEXT, b"frag", fin=False)
    client.socket.sendall(fragment + masked(Opcode.CLOSE, b"\x03\xe8") + masked(Opcode.CONT, b"ment"))
    assert client.closed()[0] == 1000


def test_an_app_closes_with_code_and_reason(apps: Apps) -> None:
    """Whenever it likes."""
    client = apps.at("close")
    apps.wake()
    assert client.closed() == (4000, "Enough")


def test_an_app_that_returns_closes_normally(apps: Apps) -> None:
    """It has nothing more to say."""
    assert apps.at("finish").closed() == (1000, "")


@pytest.mark.parametrize("app", ["crash", "lose_a_file"])
def test_an_app_that_fails_closes_with_1011(failing: Apps, app: str) -> None:
    """Any error is logged, an OSError that isn't about the connection too."""
    line = len(failing.stderr)
    assert failing.at(app).closed() == (1011, "")
    failing.wait_for_line("Error: on purpose", after=line)


def test_a_send_after_the_end_is_an_oserror(apps: Apps) -> None:
    """ASGI 2.4. It is nothing to be logged."""
    client, line = apps.at("send_too_late"), len(apps.stderr)
    client.send_close()
    client.rest()
    apps.wait_for_line("send raised an OSError: True", after=line)


def test_the_end_of_the_stream_is_the_end(apps: Apps) -> None:
    """A peer that ends its side without a goodbye has left: the server ends the other."""
    client, line = apps.at("echo"), len(apps.stderr)
    client.socket.shutdown(socket.SHUT_WR)
    assert read_to_end(client.socket) == b""
    apps.wait_for_line("disconnect", after=line)


def test_the_end_of_the_stream_ends_an_app_that_waits_to_send(apps: Apps) -> None:
    """The app stops writing for a peer that has left; bytes already written still go out."""
    client = apps.at("flood", receive_buffer=65_536)
    eventually(stands_still(client.socket))
    client.socket.shutdown(socket.SHUT_WR)
    eventually(lambda: apps.active() == 0)
    assert 0 < len(read_to_end(client.socket)) < 16 * MEGABYTE


def test_half_a_handshake_and_the_end_of_the_stream(apps: Apps) -> None:
    """A peer that ends its side before the answer gets none, and its app hears of it."""
    connection, line = apps.raw(handshake("/late")), len(apps.stderr)
    eventually(lambda: apps.active() == 1)
    connection.shutdown(socket.SHUT_WR)
    with suppress(ConnectionResetError):
        assert connection.recv(1000) == b""
    apps.wake()
    eventually(lambda: apps.active() == 0)
    assert not any("Traceback" in each for each in apps.stderr[line:])


@needs_proc
@pytest.mark.parametrize("goodbye", [b"", b"\x03\xe8"], ids=["without a goodbye", "with a goodbye"])
def test_a_reset_is_the_end(apps: Apps, goodbye: bytes) -> None:
    """A hundred peers that break off, some in the middle of their close, leave nothing and raise nothing."""
    apps.get("/health")
    before = apps.descriptors()
    for _ in range(100):
        client = apps.at("echo")
        if goodbye:
            client.send_frame(Opcode.CLOSE, goodbye)
        client.reset()
    eventually(lambda: apps.active() == 0 and apps.descriptors() <= before)


def test_bytes_after_a_close_frame_do_not_destroy_the_answer(apps: Apps) -> None:
    """A peer that goes on after its close gets the answer and an orderly end, not a reset."""
    client = apps.at("echo")
    client.send_close()
    with suppress(BrokenPipeError, ConnectionResetError):
        client.socket.sendall(masked(Opcode.BINARY, b"x" * 60_000) * 20)
    assert read_to_end(client.socket) == b"\x88\x02\x03\xe8"


def test_a_peer_that_answers_no_close_is_aborted(apps: Apps) -> None:
    """It has five seconds."""
    client = apps.at("close")
    apps.wake()
    assert client.next_frame(Opcode.CLOSE)
    began = time.monotonic()
    with suppress(ConnectionResetError):
        read_to_end(client.socket)
    assert 4 < time.monotonic() - began < PATIENCE


@needs_proc
def test_a_peer_that_says_goodbye_and_stays_is_aborted(apps: Apps) -> None:
    """Once both have closed, it has a second to end its side."""
    apps.get("/health")
    before = apps.descriptors()
    for _ in range(10):
        client = apps.at("echo")
        client.send_close()
        assert read_to_end(client.socket) == b"\x88\x02\x03\xe8"
    eventually(lambda: apps.descriptors() <= before)


def test_the_servers_end_says_goodbye() -> None:
    """1001 for everyone, whether the app listens, is busy or has not even answered; then the process ends."""
    server = Apps()
    connections = [server.raw(handshake(f"/{app}")) for app in ("echo", "dawdle", "late")]
    eventually(lambda: server.active() == 3)
    for connection in connections[:2]:
        assert connection.recv(1000).startswith(b"HTTP/1.1 101 ")
    server.signal()
    for connection in connections:
        assert read_to_end(connection).endswith(b"\x88\x16\x03\xe9Server shutting down")
        connection.close()
    assert server.exit_status() == 0


def test_an_app_hears_that_the_server_ends() -> None:
    """The app hears it at once, without an answer from the peer."""
    server = Apps()
    client = server.at("echo")
    server.signal()
    assert client.next_frame(Opcode.CLOSE)
    server.wait_for_line("disconnect 1001 'Server shutting down'")
    client.socket.close()
    assert server.exit_status() == 0


# Nothing is lost behind unread data.


def test_a_close_reaches_a_peer_with_unread_data(apps: Apps) -> None:
    """The app has read nothing of many megabytes, and closes. The peer sends on until it sees the close."""
    client = apps.at("close")
    data = masked(Opcode.BINARY, b"x" * 60_000)
    assert push(client.socket, data, 2 * KERNEL_BYTES) < 2 * KERNEL_BYTES
    apps.wake()
    assert client.closed() == (4000, "Enough")


def test_a_peer_that_sends_first_and_reads_afterwards_sees_the_goodbye(apps: Apps) -> None:
    """All of its 32 MiB are taken, though nobody wants them."""
    client = apps.at("close")
    sender = threading.Thread(target=client.socket.sendall, args=(masked(Opcode.BINARY, b"x" * 60_000) * 550,))
    sender.start()
    apps.wake()
    sender.join(PATIENCE)
    assert not sender.is_alive()
    assert client.next_frame(Opcode.CLOSE).data == b"\x0f\xa0Enough"
    client.send_close(4000)
    assert read_to_end(client.socket) == b""


def test_a_goodbye_in_the_middle_of_small_messages_is_followed_by_the_rest(apps: Apps) -> None:
    """The goodbye may come in any iteration of reading, so this is tried several times."""
    small, large = masked(Opcode.BINARY, b"x" * 10) * 16_000, masked(Opcode.BINARY, b"x" * 60_000) * 200
    for _ in range(8):
        client = apps.at("close")
        sender = threading.Thread(target=client.socket.sendall, args=(small + large,))
        sender.start()
        apps.wake()
        sender.join(CLOSE_DEADLINE_SECONDS - 0.5)
        assert not sender.is_alive()
        assert client.next_frame(Opcode.CLOSE).data == b"\x0f\xa0Enough"


def test_a_refusal_reaches_a_peer_that_is_still_sending(apps: Apps) -> None:
    """Bytes after a broken frame are dropped, and the close names the reason."""
    client = apps.at("echo")
    with suppress(BrokenPipeError, ConnectionResetError):
        client.socket.sendall(b"\x81\x05Hello" + b"x" * (20 * MEGABYTE))
    assert client.closed() == (1002, "Frame is not masked")


def test_a_close_waits_for_the_peers_backlog(apps: Apps) -> None:
    """Sixteen megabytes first, for a peer with a small buffer; then the close."""
    client = apps.at("flood", receive_buffer=65_536)
    received = 0
    while (frame := client.frame()) is not None and frame.opcode is Opcode.BINARY:
        received += len(frame.data)
    assert (received, client.closed()) == (16 * MEGABYTE, (4001, "All said"))


def test_a_request_that_is_refused_on_its_way_sees_why(apps: Apps) -> None:
    """A head that is too large is 431, for a client that first sends it all, too."""
    connection = apps.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
    connection.sendall(b"x" * 500_000)
    connection.shutdown(socket.SHUT_WR)
    assert read_to_end(connection).startswith(b"HTTP/1.1 431 ")


# Nobody is held up.


def makes_the_peer_wait(apps: Apps, message_bytes: int, most_bytes: int) -> None:
    """Send such messages to an app that takes none for a while: so much memory they may cost, and none is missing."""
    client, before = apps.at("dawdle"), apps.memory()
    message = masked(Opcode.BINARY, b"x" * message_bytes)
    taken = push(client.socket, message, 4 * KERNEL_BYTES)
    assert taken < 4 * KERNEL_BYTES and apps.memory() - before < most_bytes
    apps.wake()
    client.socket.sendall(message[taken % len(message) :] + masked(Opcode.TEXT, b"end"))
    assert client.receive() == taken // len(message) + 1


@needs_proc
def test_a_slow_app_is_sent_no_more_than_it_can_take(apps: Apps) -> None:
    """The peer has to wait, the server's memory stays, and when the app reads on nothing is missing."""
    makes_the_peer_wait(apps, 10_000, 4 * MEGABYTE)


def test_pings_are_answered_while_an_app_is_busy(apps: Apps) -> None:
    """Reading goes on for a while."""
    client = apps.at("dawdle")
    for number in range(20):
        client.send(number)
    client.send_frame(Opcode.PING, b"alive?")
    assert bytes(client.next_frame(Opcode.PONG).data) == b"alive?"
    apps.wake()
    client.socket.sendall(masked(Opcode.TEXT, b"end"))
    assert client.receive() == 20


def test_a_ping_of_a_peer_that_does_not_read_is_answered_later(apps: Apps) -> None:
    """A peer with a backlog gets its pong behind that: one for its last ping, which answers the earlier ones."""
    client = apps.at("flood", receive_buffer=65_536)
    eventually(stands_still(client.socket))
    for number in range(3):
        client.send_frame(Opcode.PING, b"%d" % number)
    assert bytes(client.next_frame(Opcode.PONG).data) in (b"0", b"1", b"2")
    client.rest()


def stands_still(connection: socket.socket) -> Callable[[], bool]:
    """Return a condition that holds when for a while nothing more has arrived: as much as fits is there."""
    seen: deque[int] = deque(maxlen=20)

    def look() -> bool:
        seen.append(len(connection.recv(MEGABYTE, socket.MSG_PEEK)))
        return len(seen) == seen.maxlen and len(set(seen)) == 1

    return look


@needs_proc
def test_a_send_waits_for_a_peer_that_does_not_read(apps: Apps) -> None:
    """Of sixteen megabytes none is piled up in the server."""
    before = apps.memory()
    client = apps.at("flood", receive_buffer=65_536)
    eventually(stands_still(client.socket))
    assert apps.memory() - before < 2 * MEGABYTE
    client.rest()


def test_two_tasks_may_send_at_once(apps: Apps) -> None:
    """Both wait for the same peer, and both go on."""
    client = apps.at("flood_from_two_tasks", receive_buffer=65_536)
    eventually(stands_still(client.socket))
    received = 0
    while received < 16 * MEGABYTE:
        received += len(client.next_frame(Opcode.BINARY).data)
    assert received == 16 * MEGABYTE


# TLS.


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def secure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apps]:
    """A server with TLS and a certificate of its own."""
    port, pem = free_port(), tmp_path_factory.mktemp("tls") / "key-and-certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", pem, "-out", pem.with_suffix(".crt")], check=True, capture_output=True)
    pem.write_text(pem.read_text() + pem.with_suffix(".crt").read_text())
    flags = ["--loop", request.param, "--port", str(port), "--certificate", str(pem)]
    server = Apps(*flags, url=f"https://localhost:{port}")
    yield server
    server.stop()


def over_tls(server: Apps, app: str, talk: Callable[[ClientConnection], Awaitable[None]], **options: Any) -> None:
    """Connect over TLS and talk, without a client that reads and writes in two threads: OpenSSL forbids that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    url = f"wss://localhost:{server.port}/{app}"
    options |= {"compression": None, "proxy": None, "ping_interval": None, "max_size": None, "close_timeout": 1}

    async def conversation() -> None:
        async with connect_async(url, ssl=context, **options) as connection:
            await asyncio.wait_for(talk(connection), 2 * PATIENCE)

    asyncio.run(conversation())


async def closed(connection: ClientConnection) -> tuple[int | None, str | None]:
    """Read to the end and return the close code and the reason."""
    with suppress(ConnectionClosed):
        while True:
            await connection.recv()
    return connection.close_code, connection.close_reason


@needs_openssl
def test_messages_go_over_tls(secure: Apps) -> None:
    """Five hundred there and back: the transport is never taken for full when it is empty."""

    async def talk(connection: ClientConnection) -> None:
        for number in range(500):
            await connection.send(str(number))
            assert await connection.recv() == str(number)

    over_tls(secure, "echo", talk)


@needs_openssl
def test_the_scheme_is_wss(secure: Apps) -> None:
    """The scope of a WebSocket over TLS has the scheme wss."""

    async def talk(connection: ClientConnection) -> None:
        assert json.loads(await connection.recv())["scheme"] == "wss"

    over_tls(secure, "describe", talk, subprotocols=["a"])


@needs_openssl
def test_a_backlog_goes_over_tls(secure: Apps) -> None:
    """Sixteen megabytes, and the close behind them."""

    async def talk(connection: ClientConnection) -> None:
        received = [len(await connection.recv()) for _ in range(256)]
        assert (sum(received), await closed(connection)) == (16 * MEGABYTE, (4001, "All said"))

    over_tls(secure, "flood", talk)


@needs_openssl
def test_a_close_over_tls_reaches_a_peer_with_unread_data(secure: Apps) -> None:
    """The close frame arrives over TLS as it does without."""

    async def talk(connection: ClientConnection) -> None:
        sender = asyncio.create_task(send_until_closed(connection))
        await asyncio.to_thread(secure.wake)
        assert await closed(connection) == (4000, "Enough")
        await sender

    over_tls(secure, "close", talk)


async def send_until_closed(connection: ClientConnection) -> None:
    with suppress(ConnectionClosed):
        while True:
            await connection.send(b"x" * 60_000)


@needs_openssl
@needs_proc
@pytest.mark.parametrize("politely", [True, False])
def test_the_end_over_tls_leaves_nothing(secure: Apps, politely: bool) -> None:
    """A client that ends with or without a close frame leaves no connection behind."""

    async def leave(connection: ClientConnection) -> None:
        if not politely:
            connection.transport.abort()

    secure.get("/health")
    before = secure.descriptors()
    for _ in range(20):
        over_tls(secure, "echo", leave)
    eventually(lambda: secure.active() == 0 and secure.descriptors() <= before)


@needs_openssl
def test_a_handshake_over_tls_is_refused_as_any_other(secure: Apps) -> None:
    """The refusal over TLS has its body."""
    with pytest.raises(InvalidStatus) as refused:
        over_tls(secure, "deny", closed)
    assert (refused.value.response.status_code, refused.value.response.body) == (418, b"teapot")


def test_an_app_with_the_standard_send_answers_as_it_means_to(apps: Apps) -> None:
    """Also to a client whose messages are compressed: bytes stay bytes, and text stays text."""
    client = apps.join_app("compressed", compression="deflate")
    assert [extension.name for extension in client.connection.protocol.extensions] == ["permessage-deflate"]
    for message in (b'{"id":"' + b"x" * 500, "text " * 100):
        client.send(message)
        assert client.connection.recv(PATIENCE) == message
