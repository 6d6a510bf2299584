"""A kept connection repeats its heads: from the third on, a request is answered at once, exactly as the others were."""

from __future__ import annotations

import asyncio
import json
import re
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
from credentials import SECRET, token
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState
from ws_clients import PATIENCE

import routes
import wire_http
from connection import REPEAT_EXTENSION
from notifyd import App, create_app
from settings import Settings
from wire import WireProtocol
from wire_http import HttpProtocol

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
JSON = "Content-Type: application/json\r\n"
# What no two answers have in common: ids, times and the names of errors.
NEW = rb"[0-9a-f]{8}-[0-9a-f-]{27}|\d{4}-\d\d-\d\dT[\d:.]+Z|error_\w+"


def post(body: str = '{"message":"hi"}', headers: str = JSON, length: object = None, target: str = "/notify") -> bytes:
    told = len(body.encode()) if length is None else length
    return f"POST {target} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {told}\r\n\r\n{body}".encode()


def data(value: object) -> str:
    return f'{{"message":"hi","data":{{"x":{value}}}}}'


class Served:
    """An app on a socket, and one connection to it. `asked` has the paths that the app was asked for."""

    def __init__(self, app: App, reader: StreamReader, writer: StreamWriter, asked: list[str]) -> None:
        self.app = app
        self.asked = asked
        self.reader = reader
        self.writer = writer

    async def answer(self, *pieces: bytes) -> bytes:
        """Send the pieces of a request, each by itself, and return its response without the values that are new."""
        return re.sub(NEW, b"NEW", await self.whole_answer(*pieces))

    async def whole_answer(self, *pieces: bytes) -> bytes:
        for piece in pieces:
            self.writer.write(piece)
            await asyncio.sleep(0.001 if len(pieces) > 1 else 0)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        body = await self.reader.readexactly(int(length[1])) if length else b""
        return head + body

    def published(self) -> list[bytes]:
        """Return the messages in the log."""
        rests = b"".join(reversed([record.rest for record in self.app.hub.fanout.records("")]))
        return re.findall(rb'"message":"(.*?)"', rests)


@asynccontextmanager
async def served(*, repeats: bool = True, **settings: Any) -> AsyncIterator[Served]:
    app = create_app(Settings(notification_interval=0, **settings))
    asked: list[str] = []

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await app(scope, receive, send)

    # Longer than any pause between two requests.
    config = uvicorn.Config(counted, ws=WireProtocol, lifespan="off", log_config=None, timeout_keep_alive=60)
    protocol = partial(HttpProtocol, config, ServerState(), {}, repeats=repeats)
    async with (
        asyncio.timeout(PATIENCE),
        app.hub,
        await asyncio.get_running_loop().create_server(protocol, "127.0.0.1") as server,
    ):
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            yield Served(app, reader, writer, asked)
        finally:
            writer.transport.abort()
            await asyncio.sleep(0.01)


def with_server(talk: Callable[[Served], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        async with served(**settings) as server:
            await talk(server)

    asyncio.run(run())


def test_a_repeat_is_answered_and_published_without_the_app() -> None:
    """Also several at once, and one of another length."""

    async def talk(server: Served) -> None:
        first = await server.answer(post())
        await server.answer(post())
        assert [await server.answer(post()) for _ in range(3)] == [first] * 3
        server.writer.write(post() * 20 + post('{"message":"longer"}'))
        assert [await server.answer() for _ in range(20)] == [first] * 20
        assert b'"longer"' in await server.answer()
        assert server.asked == ["/notify"] * 2
        assert server.published() == [b"hi"] * 25 + [b"longer"]

    with_server(talk)


@pytest.mark.parametrize("size", [1, 10, 60, len(post()) - 17, len(post()) - 16, len(post()) - 8])
def test_a_repeat_may_come_in_pieces(size: int) -> None:
    """Many clients send the body apart from the head."""

    async def talk(server: Served) -> None:
        first = await server.answer(post())
        await server.answer(post())
        request = post()
        pieces = [request[start : start + size] for start in range(0, len(request), size)]
        assert [await server.answer(*pieces), await server.answer(*pieces)] == [first, first]
        assert b"healthy" in await server.answer(HEALTH)
        assert server.published() == [b"hi"] * 4

    with_server(talk)


def test_each_repeat_has_its_own_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where half of the next request always comes with the one before it."""
    monkeypatch.setattr(wire_http, "REQUEST_SECONDS", 1.5)

    async def talk(server: Served) -> None:
        first, request = await server.answer(post()), post()
        assert await server.answer(request + request[:50]) == first
        for _ in range(8):
            await asyncio.sleep(0.25)
            assert await server.answer(request[50:] + request[:50]) == first

    with_server(talk)


@pytest.mark.parametrize(
    "request_",
    [
        post("{"),
        post('{"message":""}'),
        post('{"message":"hi","type":"ping"}'),
        post('{"message":"hi","data":{"x":' + "[" * 300 + "]" * 300 + "}}"),
        post('{"message":"%s"}' % ("x" * 8000)),
        post("x" * 2000),
        post(length="+16"),
        post(length=" 16"),
        post(length="016"),
        post(length="16 "),
        post(length=""),
        post(length="1" * 12),
        post(length="0"),
        post(headers=""),
        post("hi", headers="Content-Type: text/plain\r\n"),
        post(headers=JSON.replace(": ", ":")),
        post(headers=JSON + "Transfer-Encoding: chunked\r\n"),
        post(headers=JSON + "Content-Length: 16\r\n"),
        post(headers=JSON + "Idempotency-Key: k\r\n"),
        post(headers=JSON + "Connection: close\r\n"),
        post(headers=JSON + "Origin: https://other.example\r\n"),
        post(target="/notify?a=1"),
        HEALTH,
        b"\r\n" + post(),
        post() + b"x\r\n\r\n",
    ],
    ids=lambda data: str(data[-60:]),
)
def test_any_other_request_is_answered_as_ever(request_: bytes) -> None:
    """It gets the answer that a server without repeats gives, and so does the request behind it."""

    async def answers(*, repeats: bool) -> list[bytes]:
        async with served(repeats=repeats, max_message_size=1000) as server:
            told = [await server.answer(each) for each in (post(), post(), request_)]
            server.writer.write(post())
            server.writer.write_eof()
            return [*told, re.sub(NEW, b"NEW", await server.reader.read())]

    assert asyncio.run(answers(repeats=True)) == asyncio.run(answers(repeats=False))


@pytest.mark.parametrize(
    "body",
    [
        '{"message":"hi","data":{}}',
        ' { "message" : "\\u0068\\u00e9\\ud83d\\ude00" ,\n"data":{ "a" : [1.0, -0, 1e5, "\\/", null] } } ',
        '{"message":"\u2028","type":"alért","message":"last","data":{"b":1,"a":2,"b":3}}',
        '{"message":"hi","data":{"message":"other"}}',
        '{"message":"hi","data":{"a":1,"message":[2],"b":{"message":3}}}',
        '{"message":"hi","clients":["ann"],"topics":[" red ","red","blue"],"users":["bob","ann"]}',
        '{"message":"hi","topics":[]}',
        '{"message":"hi","datum":{}}',
        *map(data, ('"\\ud800"', "NaN", "1e400", 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, "9" * 5000)),
        *(data("[" * deep + "]" * deep) for deep in (251, 252, 253, 254)),
        b'{"message":"\xff"}',
        b'\xef\xbb\xbf{"message":"hi"}',
    ],
    ids=lambda body: repr(body[:60]),
)
def test_the_body_of_a_repeat_means_the_same(body: str | bytes) -> None:
    """The answer and the notification are those of a server without repeats."""
    raw = body if isinstance(body, bytes) else body.encode()
    request = post("x" * len(raw)).removesuffix(b"x" * len(raw)) + raw

    async def outcome(*, repeats: bool) -> tuple[bytes, list[bytes]]:
        async with served(repeats=repeats) as server:
            for _ in range(2):
                await server.answer(post())
            told = await server.answer(request)
            return told, [re.sub(NEW, b"NEW", record.rest) for record in server.app.hub.fanout.records("")]

    assert asyncio.run(outcome(repeats=True)) == asyncio.run(outcome(repeats=False))


@pytest.mark.parametrize(
    ("headers", "settings"),
    [
        (JSON, {"rate_limit": True}),
        (JSON, {"allow_origin": ["https://app.example"]}),
        (JSON + "Idempotency-Key: k\r\n", {}),
        (JSON + "Expect: 100-continue\r\n", {}),
        ("Content-Type: text/plain\r\n", {}),
        ("Content-Type: application/json; charset=latin-1\r\n", {}),
    ],
    ids=str,
)
def test_the_app_is_asked_where_more_than_the_body_counts(headers: str, settings: dict[str, Any]) -> None:
    """Limits, rights, keys, the headers of CORS and the charset are the app's."""

    async def talk(server: Served) -> None:
        for _ in range(3):
            await server.answer(post("{}", headers))
            await server.answer(post(headers=headers))
        assert server.asked == ["/notify"] * 6

    with_server(talk, **settings)


def test_a_repeat_with_a_key_is_answered_without_the_app() -> None:
    """The head is the same, and so are the credentials."""

    async def talk(server: Served) -> None:
        headers = JSON + "Authorization: Bearer hush\r\n"
        first = await server.answer(post(headers=headers))
        assert [await server.answer(post(headers=headers)) for _ in range(4)] == [first] * 4
        assert server.asked == ["/notify"] * 2
        assert b" 401 " in await server.answer(post(headers=JSON + "Authorization: Bearer hash\r\n"))

    with_server(talk, api_key=["ci:hush"])


def test_the_end_and_the_rights_of_a_token_count_for_each_repeat() -> None:
    """Its topics, its revocation, and its exp."""

    async def talk(server: Served) -> None:
        ends = int(time.time()) + 5
        shown = token(sub="ann", publish=["a.*"], exp=ends)
        headers = JSON + f"Authorization: Bearer {shown}\r\n"
        good, foreign = (post(f'{{"message":"hi","topics":["{name}"]}}', headers) for name in ("a.b", "b"))
        assert [b" 200 OK" in await server.answer(good) for _ in range(4)] == [True] * 4
        assert b" 403 " in await server.answer(foreign)
        assert b" 200 OK" in await server.answer(good)
        await asyncio.sleep(ends + 0.1 - time.time())
        assert b"Token expired" in await server.answer(good)

    with_server(talk, jwt_secret=SECRET)


def test_a_revoked_token_is_refused_at_the_next_repeat() -> None:
    """At once."""

    async def talk(server: Served) -> None:
        headers = JSON + f"Authorization: Bearer {token(sub='ann', publish=True)}\r\n"
        assert [b" 200 OK" in await server.answer(post(headers=headers)) for _ in range(4)] == [True] * 4
        assert server.app.hub.revocations is not None
        await server.app.hub.revocations.revoke("ann")
        assert b"Token revoked" in await server.answer(post(headers=headers))

    with_server(talk, jwt_secret=SECRET)


def test_a_repeat_is_refused_during_the_drain() -> None:
    """The Hub has the last word."""

    async def talk(server: Served) -> None:
        assert [b" 200 OK" in await server.answer(post()) for _ in range(3)] == [True] * 3
        await server.app.hub.drain()
        assert b" 503 " in await server.answer(post())

    with_server(talk)


def test_an_unexpected_error_at_a_repeat_is_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And logged under the id of the answer. The connection goes on."""

    async def talk(server: Served) -> None:
        assert [b" 200 OK" in await server.answer(post()) for _ in range(3)] == [True] * 3
        with monkeypatch.context() as broken:
            broken.setattr(routes, "timestamp", lambda: 1 / 0)
            head, _, body = (await server.whole_answer(post())).partition(b"\r\n\r\n")
        assert b" 500 " in head
        assert json.loads(body)["error"]["id"] in caplog.text
        assert b" 200 OK" in await server.answer(post())

    with_server(talk)


def test_answers_that_are_not_read_are_not_made() -> None:
    """Requests wait in the kernel, and with the peer."""

    async def talk(server: Served) -> None:
        for _ in range(2):
            await server.answer(post())
        body = '{"message":"%s"}' % ("x" * 8000)
        server.reader._transport.pause_reading()  # type: ignore[attr-defined]
        server.writer.write(post(body) * 4000)
        before = -1
        while before < (before := len(server.published())):
            await asyncio.sleep(0.1)
        # What the kernel holds for both.
        assert before < 1000

    with_server(talk, history_size=10_000, history_bytes=10**9)


def test_repeats_are_offered_to_an_app_that_stands_alone() -> None:
    """A host's middleware may tell requests apart: under `http=HttpProtocol` no app is offered to pass it by."""
    offered = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        offered.append(REPEAT_EXTENSION in scope["extensions"])
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async def talk(**options: Any) -> None:
        config = uvicorn.Config(app, ws=WireProtocol, lifespan="off", log_config=None)
        protocol = partial(HttpProtocol, config, ServerState(), {}, **options)
        async with await asyncio.get_running_loop().create_server(protocol, "127.0.0.1") as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            for _ in range(2):
                writer.write(post())
                await reader.readuntil(b"\r\n\r\n")
            writer.close()

    asyncio.run(talk())
    asyncio.run(talk(repeats=True))
    assert offered == [False, False, False, True]
