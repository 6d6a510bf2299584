"""One HTTP connection as wire_http.py reads it: one request after the other, deadlines, and how a head may come."""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
import struct
import sys
import time
from asyncio import StreamReader
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest
import uvicorn
from bytes import HANDSHAKE, handshake, masked, read_to_end, read_until, rest
from conftest import StartServer
from processes import QUIET, Server, eventually, needs_proc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket
from uvicorn.server import ServerState
from websockets.frames import Opcode
from ws_clients import PATIENCE

from wire import WireProtocol
from wire_http import HttpProtocol
from wire_message import ClientDisconnected

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
EVENTS = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF_A_POST = b"POST /notify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    """A server that waits half a second for a request, and a second between requests."""
    server = Server.notifyd(*QUIET, "--keep-alive-timeout", "1", constants={"wire_http.REQUEST_SECONDS": 0.5})
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (handshake("/ws", "HEAD"), 405),
        (handshake("/events", "HEAD", Sec_WebSocket_Version="12"), 405),
        (b"HEAD /events?topic=a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"HEAD /health HTTP/1.1\r\n\r\n", 400),
        (b"HEAD /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5x\r\n\r\n", 400),
        (b"HEAD /health HTTP/1.1\r\nHost: x\r\n", 408),
        (b"HEAD /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n", 200),
    ],
)
def test_a_refused_head_has_no_body(impatient: Server, request_: bytes, status: int) -> None:
    """A client would take it for its next answer (RFC 9110, section 9.3.2); another request's refusal has one."""
    answer = rest(impatient.raw(HEAD + request_)).split(b"\r\n\r\n")
    assert (len(answer), answer[1].split()[1], answer[2:]) == (3, b"%d" % status, [b""])
    assert rest(impatient.raw(HEAD + b"x\r\n")).endswith(b"}}")


# One request after the other.


@pytest.mark.parametrize("behind", [HEALTH, HALF_A_POST, HANDSHAKE, HEALTH * 10_000], ids=lambda data: str(len(data)))
def test_a_stream_ends_with_its_socket_whatever_is_pipelined_behind_it(server: Server, behind: bytes) -> None:
    """It keeps no slot."""
    connection = server.raw(EVENTS)
    read_until(connection, b"event: welcome")
    connection.settimeout(0.2)
    with suppress(TimeoutError):
        connection.sendall(behind)
    connection.close()
    eventually(lambda: server.active() == 0)


def test_nothing_is_written_into_a_stream_for_requests_pipelined_behind_it(impatient: Server) -> None:
    """Half a request has its deadline when its turn comes, and behind a stream that is never."""
    connection = impatient.raw(EVENTS + HALF_A_POST)
    read_until(connection, b"event: welcome")
    assert rest(impatient.raw(HALF_A_POST)).startswith(b"HTTP/1.1 408 ")  # As much time has passed here, too.
    impatient.notify("the next")
    assert b"HTTP/1.1" not in read_until(connection, b"the next")


def test_a_handshake_may_come_behind_a_request(server: Server) -> None:
    """It is answered when its turn comes."""
    answer = read_until(server.raw(HEALTH + HANDSHAKE), b'"type":"welcome"')
    assert answer.index(b"healthy") < answer.index(b"HTTP/1.1 101 ")


def test_a_goodbye_may_come_with_the_handshake(server: Server) -> None:
    """An eager client is welcomed first."""
    answer = rest(server.raw(HANDSHAKE + masked(Opcode.CLOSE, b"\x03\xe8")))
    assert b'"type":"welcome"' in answer and answer.endswith(b"\x88\x02\x03\xe8")


def test_a_handshake_waits_for_the_requests_before_it(server: Server) -> None:
    """No notification gets into the answer before it, of which the peer has yet to take megabytes."""
    for _ in range(17):
        server.notify("large", data={"pad": "x" * 60_000})
    page = b"GET /notifications HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection = server.raw(page * 20 + HANDSHAKE)
    received = b""
    while b"HTTP/1.1 101 " not in received:
        received += connection.recv(200_000)
        server.notify("in between")
    for _ in range(20):
        head, _, received = received.partition(b"\r\n\r\n")
        received = received[int(re.search(rb"content-length: (\d+)", head)[1]) :]  # type: ignore[index]
    assert received.startswith(b"HTTP/1.1 101 ")


def test_many_requests_may_come_at_once(server: Server) -> None:
    """Each is answered in its order, whether it has a body and of what kind."""
    body = b'{"message": "hi"}\r\n\r\n'
    sized = b"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    chunked = b"POST /notify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
    requests = b"\r\n" + sized + HEALTH + chunked % (len(body), body) + HEALTH + sized
    answer = server.answer_to(requests * 3 + LAST)
    assert answer.count(b"HTTP/1.1 200 ") == 16


POST = b"POST /notify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 17\r\n%s\r\n%s"
BODY = b'{"message": "hi"}'


@pytest.mark.parametrize(
    "headers",
    [
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
        b"Upgrade: websocket, h2c\r\nConnection: Upgrade\r\n",
        b"Upgrade: h2c\r\nConnection: upgrade\r\nUpgrade: TLS/1.0\r\nExpect: 100-continue\r\n",
    ],
)
@pytest.mark.parametrize("cut", [0, 10, 17, 18, 19, 120])
def test_an_upgrade_to_anything_else_is_ignored(server: Server, headers: bytes, cut: int) -> None:
    """`curl --http2` offers one with every first request; its body and what follows are read as ever."""
    request = POST % (headers, BODY)
    connection = server.raw(request[: len(request) - cut])
    server.get("/health")  # The server has read the first part.
    connection.sendall(request[len(request) - cut :] + POST % (headers, BODY) + LAST)
    answers = rest(connection).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").split(b"HTTP/1.1 ")
    assert [answer[:3] for answer in answers[1:]] == [b"200", b"200", b"200"]


@pytest.mark.parametrize("target", [b"/health", b"localhost:443"])
def test_connect_gets_one_answer(server: Server, target: bytes) -> None:
    """This is no proxy."""
    answer = server.answer_to(b"CONNECT " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n\x16\x03\x01")
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 405 ")) and answer.count(b"HTTP/1.1") == 1


# The head.


@pytest.mark.parametrize(
    "host", [b"http://localhost", b"http://elsewhere:80", b"HTTP://localhost", b"https://[::1]:8000"]
)
@pytest.mark.parametrize(
    ("path", "status"), [(b"/health?a=b", 200), (b"/status?limit=x", 400), (b"", 200), (b"?a", 200)]
)
def test_a_target_may_come_in_absolute_form(server: Server, host: bytes, path: bytes, status: int) -> None:
    """RFC 9112, section 3.2.2: it is answered as the same without a host."""
    assert server.response_to(LAST.replace(b"/health", host + path))[0] == status


def test_the_target_of_a_handshake_may_come_in_absolute_form(server: Server) -> None:
    """The absolute form keeps its query."""
    connection = server.raw(handshake("http://localhost/ws?client_id=bob"))
    assert b'"client_id":"bob"' in read_until(connection, b'"type":"welcome"')


def head(size: int) -> bytes:
    """A request of so many bytes."""
    return LAST.replace(b"\r\n\r\n", b"\r\nX-Long: ") + b"x" * (size - len(LAST) - 10) + b"\r\n\r\n"


@pytest.mark.parametrize(("size", "status"), [(65_536, b"200"), (65_537, b"431")])
@pytest.mark.parametrize("before", [b"", HEALTH], ids=["first", "pipelined"])
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 60_000])
def test_a_head_has_a_limit_however_it_is_cut(
    server: Server, before: bytes, size: int, status: bytes, cut: int
) -> None:
    """65,536 bytes are a head and one more is too many, whatever comes in the same segment."""
    request = before + head(size)
    connection = server.raw(request[: len(request) - cut])
    server.get("/health")  # The server has read the first part.
    connection.sendall(request[len(request) - cut :])
    assert rest(connection).split(b"HTTP/1.1 ")[-1].startswith(status)


@pytest.mark.parametrize("trailer", [b"X: y\r\n", b"x" * 6], ids=["many", "one"])
def test_trailers_have_a_limit_too(server: Server, trailer: bytes) -> None:
    """Nobody's memory is filled behind the body."""
    connection = server.raw(
        b"POST /notify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: y\r\n"
    )
    with suppress(ConnectionError):
        connection.sendall(b"Y: " + trailer * 80_000)
    assert rest(connection).startswith(b"HTTP/1.1 431 ")


def test_a_body_in_the_segment_of_its_head_is_no_part_of_it(server: Server) -> None:
    """A body of any size is read as a body, not as the next request."""
    body = b"x" * 70_000
    request = b"POST /notify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % len(body)
    connection = server.raw(request)
    server.get("/health")
    connection.sendall(b"\r\n" + body + LAST)
    assert [answer[:3] for answer in rest(connection).split(b"HTTP/1.1 ")[1:]] == [b"413", b"200"]


# One answer.


SIZED, CHUNKED = b"Content-Length: 70000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n11170\r\n"


@pytest.mark.parametrize(("length", "then"), [(SIZED, b""), (CHUNKED, b""), (CHUNKED, b"x" * 1000 + b"no chunk\r\n")])
def test_a_request_is_answered_once(impatient: Server, length: bytes, then: bytes) -> None:
    """What else is wrong with a body that was too large is told by nothing but the end of the connection."""
    connection = impatient.raw(b"POST /notify HTTP/1.1\r\nHost: localhost\r\n" + length + b"x" * 69_000)
    assert read_until(connection, b"}}\n").startswith(b"HTTP/1.1 413 ")
    connection.sendall(then)
    assert rest(connection) == b""


def test_the_end_behind_a_refusal_is_seen_at_once(start_server: StartServer) -> None:
    """Our side ends behind the answer, though a peer that is still sending is read on for a while."""
    server = start_server(constants={"wire_http.LINGER_SECONDS": 10 * PATIENCE})
    assert read_to_end(server.raw(HALF_A_POST.replace(b"1000", b"x"))).startswith(b"HTTP/1.1 400 ")


# A peer that takes its time.


SLOW = {
    "a handshake": HANDSHAKE[:-2],
    "a head": HEALTH[:-2],
    "the second request": HEALTH + HEALTH[:-2],
    "a body": HALF_A_POST,
    "chunks": HALF_A_POST.replace(b"Content-Length: 1000", b"Transfer-Encoding: chunked").replace(b"{", b"1\r\n{\r\n"),
    "trailers": b"POST /notify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: y\r\n",
}


@needs_proc
@pytest.mark.parametrize("name", SLOW)
def test_a_request_has_a_deadline_however_slowly_it_arrives(impatient: Server, name: str) -> None:
    """Some bytes at a time, often enough to look alive: 408, and the descriptor is free again."""
    connection, answer, began = impatient.raw(b""), b"", time.monotonic()
    connection.settimeout(0.03)
    slow = SLOW[name]
    step = len(slow) // 5 + 1
    pieces = [slow[start : start + step] for start in range(0, len(slow), step)]
    while b" 408 " not in answer:
        assert time.monotonic() - began < PATIENCE
        with suppress(ConnectionError):
            connection.sendall(pieces.pop(0) if pieces else b"0" if name in ("a body", "trailers") else b"")
        with suppress(TimeoutError):
            answer += connection.recv(65_536)
    eventually(lambda: not impatient.holds(connection))


@needs_proc
@pytest.mark.parametrize("sent", [b"", b"\r\n", HEALTH], ids=["nothing", "an empty line", "a request"])
def test_an_idle_connection_is_closed_without_an_answer(impatient: Server, sent: bytes) -> None:
    """After keep_alive_timeout, counted from the last answer: RFC 9112, section 9.5 knows no 408 for it."""
    connection, began = impatient.raw(sent), time.monotonic()
    answer = rest(connection)
    assert answer.count(b"HTTP/1.1") == (sent == HEALTH)
    assert 0.9 < time.monotonic() - began < PATIENCE
    eventually(lambda: not impatient.holds(connection))


@needs_proc
def test_half_an_empty_line_does_not_keep_a_connection(start_server: StartServer) -> None:
    """CR comes before the end of keep_alive_timeout, LF behind it."""
    server = start_server("--keep-alive-timeout", "3", constants={"wire_http.REQUEST_SECONDS": 0.5})
    connection = server.raw(b"")
    time.sleep(1)
    connection.sendall(b"\r")
    time.sleep(2.2)
    connection.sendall(b"\n")
    eventually(lambda: not server.holds(connection))


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["nothing", "a request"])
def test_a_late_request_gets_its_own_answer(start_server: StartServer, before: bytes) -> None:
    """Browsers connect in advance, and take a 408 that comes meanwhile for the answer to their first request."""
    connection = start_server(constants={"wire_http.REQUEST_SECONDS": 0.5}).raw(before)
    if before:
        read_until(connection, b"}\n")
    connection.settimeout(1)  # Longer than a request may take, and shorter than keep_alive_timeout.
    with pytest.raises(TimeoutError):
        connection.recv(1)
    connection.settimeout(PATIENCE)
    connection.sendall(LAST)
    answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1") == 1


# A peer that does not read.


@pytest.fixture(scope="module")
def resigned() -> Iterator[Server]:
    """A server that waits two seconds for its answer to be taken."""
    server = Server.notifyd(*QUIET, constants={"wire_http.STALLED_SECONDS": 2.0})
    yield server
    server.stop()


@pytest.fixture
def history(resigned: Server) -> bytes:
    """Requests whose answers are larger than what the kernel holds for a peer."""
    for _ in range(17):
        resigned.notify("large", data={"pad": "x" * 60_000})
    page = b"GET /notifications HTTP/1.1\r\nHost: localhost\r\n"
    return (page + b"\r\n") * 19 + page + b"Connection: close\r\n\r\n"


@needs_proc
def test_an_answer_that_nobody_takes_is_given_up(resigned: Server, history: bytes) -> None:
    """The descriptor is free again, long before the peer looks."""
    connection = resigned.raw(history)
    read_until(connection, b"200 OK")
    assert resigned.holds(connection)
    eventually(lambda: not resigned.holds(connection))
    assert len(rest(connection)) < 17_000_000


def test_an_answer_that_is_taken_slowly_comes_whole(resigned: Server, history: bytes) -> None:
    """A slow reader gets the whole answer, as long as it goes on reading."""
    connection = resigned.raw(b"")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 500_000)
    connection.sendall(history)
    received, began = 0, time.monotonic()
    while data := connection.recv(200_000):
        received += len(data)
        if time.monotonic() < began + 3:
            time.sleep(0.1)
    assert received > 17_000_000


# Any app, served in this process.


async def asked(
    app: ASGIApp,
    request: bytes,
    read: Callable[[StreamReader], Awaitable[bytes]] = StreamReader.read,
    *,
    ends: bool = False,
) -> bytes:
    """Serve the app, and return what `read` has read of its answer while the connection is still there."""
    config = uvicorn.Config(app, ws=WireProtocol, lifespan="off", log_config=None)
    serve = partial(HttpProtocol, config, ServerState(), {})
    async with asyncio.timeout(PATIENCE), await asyncio.get_running_loop().create_server(serve, "127.0.0.1") as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(request)
        if ends:
            writer.write_eof()
        answer = await read(reader)
        writer.close()
    return answer


def test_an_app_that_fails_at_head_is_answered_without_a_body() -> None:
    """RFC 9110, section 9.3.2."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("on purpose")

    answer = asyncio.run(asked(app, b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert answer.startswith(b"HTTP/1.1 500 ") and answer.endswith(b"\r\n\r\n") and answer.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize(
    ("length", "sent", "end"),
    [
        (None, 0, b'"category":"system"'),
        (None, 1, b"\r\n\r\n3\r\nabc\r\n"),
        (b"9", 2, b"\r\n\r\nabcabc"),
    ],
    ids=["head", "chunked", "sized"],
)
def test_an_app_that_fails_in_its_response_ends_the_connection(length: bytes | None, sent: int, end: bytes) -> None:
    """The client sees that the body is cut off. Before the first part of the body it still gets an error."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", length)] if length else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(sent):
            await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        raise RuntimeError("on purpose")

    answer = asyncio.run(asked(app, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2))
    assert answer.count(b"HTTP/1.1 ") == 1 and answer.startswith(b"HTTP/1.1 %d " % (200 if sent else 500))
    assert answer.endswith(end) if sent else end in answer


def test_a_reset_in_a_response_ends_its_app() -> None:
    """An app that sends without end hears of it as an OSError, and one that receives as a disconnect."""
    heard: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        except OSError:
            heard.append(await receive())
            raise

    async def read(reader: StreamReader) -> bytes:
        transport = reader._transport  # type: ignore[attr-defined]
        answer = await reader.readexactly(1000)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
        while not heard:
            await asyncio.sleep(0.01)
        return answer

    asyncio.run(asked(app, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", read))
    assert heard == [{"type": "http.disconnect"}]


def test_an_idle_connection_keeps_nothing_of_its_last_answer() -> None:
    """Else each would hold a whole page until its next request."""
    page = b"x" * 1000
    before, at_rest = sys.getrefcount(page), []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
        await send({"type": "http.response.body", "body": page})

    async def read(reader: StreamReader) -> bytes:
        await reader.readuntil(b"\r\n\r\n")
        answer = await reader.readexactly(1000)
        at_rest.append(sys.getrefcount(page))
        return answer

    assert asyncio.run(asked(app, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", read)) == page
    assert at_rest == [before]


def test_a_handshake_behind_which_the_client_has_ended_its_side_keeps_no_connection() -> None:
    """It waits for the answer before it; the end has been told to the HTTP connection by then."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            while (await receive())["type"] == "http.request":
                pass
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})
            return
        while (await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.accept"})

    assert b"HTTP/1.1 204 " in asyncio.run(asked(app, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + HANDSHAKE, ends=True))


async def endless(request: Request) -> StreamingResponse:
    return StreamingResponse("x" * 1000 for _ in itertools.count())


async def talkative(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        await websocket.send_bytes(b"x" * 1000)


@pytest.mark.parametrize("request_", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", HANDSHAKE], ids=["http", "websocket"])
def test_a_peer_that_leaves_is_no_error_of_an_app_of_starlette(
    request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette raises an exception of its own where it is told that the peer has left."""
    app = Starlette(routes=[Route("/", endless), WebSocketRoute("/ws", talkative)])
    left = "A peer left while"

    async def read(reader: StreamReader) -> bytes:
        answer = await reader.readexactly(1000)
        reader._transport.abort()  # type: ignore[attr-defined]
        while left not in caplog.text and "Unexpected" not in caplog.text:
            await asyncio.sleep(0.01)
        return answer

    with caplog.at_level("DEBUG", "notifyd.wire"):
        asyncio.run(asked(app, request_, read))
    assert "Unexpected" not in caplog.text


def test_half_a_request_behind_which_the_client_has_ended_its_side_is_not_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Our side has ended as well by then, so an app that answers without the body hears that its peer has left."""
    outcomes: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            while scope["method"] == "GET" and (await receive())["type"] == "http.request":
                pass
            await send({"type": "http.response.start", "status": 204})
            await send({"type": "http.response.body"})
        finally:
            outcomes.append(sys.exc_info()[0])

    async def read(reader: StreamReader) -> bytes:
        answer = await reader.read()
        while len(outcomes) < 2:
            await asyncio.sleep(0.01)
        return answer

    answer = asyncio.run(asked(app, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + HALF_A_POST, read, ends=True))
    assert answer.count(b"HTTP/1.1 ") == 1 and outcomes == [None, ClientDisconnected]
    assert not caplog.records
