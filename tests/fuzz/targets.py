"""What is fuzzed: for each target a function that takes any bytes and raises for whatever must not happen.

The seeds are what an engine starts from. The targets `http` and `websocket` speak to the real app through a real pair
of sockets: what they send is read as from any peer, and after each input nothing may be left of it.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import logging
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import uvicorn
from bytes import handshake as handshake_for
from frame_oracle import check_against_reference, masked
from starlette.datastructures import QueryParams
from uvicorn.server import ServerState

import connection
import schemas
import wire
import wire_http
from errors import InvalidRequest, Unauthorized
from guard_tokens import tokens_of
from notifyd import create_app
from settings import Settings
from wire_handshake import check_handshake
from wire_message import BLANK_LINE, RequestError, RequestParser

# An input that has not ended after so long is one that makes the server hang.
PATIENCE = 10.0
# A connection may be held so long after its end: here not for seconds, to see whether it is let go.
DEADLINE_SECONDS = connection.CLOSE_DEADLINE_SECONDS = wire.CLOSE_DEADLINE_SECONDS = 0.1
# So few that inputs are read in several turns of the event loop.
wire_http.TURN_BYTES = wire.TURN_BYTES = 64

NOTIFICATION = b'{"message":"m","type":"t","data":{"a":[1,2.5,null,true]},"clients":["bob"],"topics":["x"]}'
HANDSHAKE = handshake_for("/ws?client_id=bob&topics=a,b&since=", Host="x")
TOKEN_HEADER = b'{"alg":"HS256","typ":"JWT"}'
CLAIMS = b'{"sub":"bob","topics":["a*"],"publish":["b"],"admin":true,"exp":9e9}'
MESSAGES = [
    b'{"type":"ping"}',
    b'{"type":"status_request"}',
    b'{"type":"subscribe","topics":["x"]}',
    b'{"type":"unsubscribe","topics":["a"]}',
    b'{"type":"\\u0000\\r\\n"}',
    b"[" * 200,
]
FRAMES = [
    *(masked(0x81, message, bytes(4)) for message in MESSAGES),
    masked(0x01, b"a", bytes(4)) + masked(0x89, b"?") + masked(0x80, b"b"),
    masked(0x81, b"\xf0\x9f\x98\x80", bytes(4)) + masked(0x82, b"\xff"),
    masked(0x88, b"\x03\xe8bye", bytes(4)),
    masked(0x82, b"x" * 126) + masked(0x8A, b""),
    b"\x82\xff" + bytes(8),
]


def post(path: bytes, body: bytes, headers: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s" % (path, headers, len(body), body)


REQUESTS = [
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /status?limit=1 HTTP/1.0\r\n\r\n",
    b"GET /notifications?since=&limit=2&topics=x HTTP/1.1\r\nHost: x\r\n\r\n" * 2,
    b"GET /events?client_id=bob&topics=x HTTP/1.1\r\nHost: x\r\nLast-Event-ID: \r\n\r\n",
    b"OPTIONS /notify HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\nAccess-Control-Request-Method: POST\r\n\r\n",
    b"GET http://x/metrics HTTP/1.1\r\nHost: x\r\nOrigin: null\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
    b"HEAD /metrics/prometheus HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n\x16\x03",
    post(b"/notify", NOTIFICATION) * 3,
    post(b"/notify", b'{"message":"x"}') * 4 + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    post(b"/notify", NOTIFICATION, b"Idempotency-Key: k\r\n"),
    post(b"/notify", b"disk full", b"Content-Type: text/plain\r\nExpect: 100-continue\r\n"),
    post(b"/notify/batch", b"[%s,%s]" % (NOTIFICATION, NOTIFICATION)),
    b"POST /notify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nA: b\r\n\r\n",
    HANDSHAKE,
    HANDSHAKE.replace(b"bob&topics=a,b", b"%00%ff&topics=,").replace(b"x\r\n", b"x\r\nOrigin: http://y\r\n"),
]


class App:
    """The app as notifyd.py serves it, in an event loop of its own."""

    def __init__(self) -> None:
        # What is kept must be full soon, or it would pass for growth.
        settings = Settings(notification_interval=0, history_size=20, max_message_size=1000)
        self.errors: list[str] = []
        logging.getLogger().addHandler(_Errors(self.errors))
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda _, context: self.errors.append(repr(context)))
        self.app = create_app(settings)
        self.config = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            http=wire_http.HttpProtocol,
            ws=wire.WireProtocol,
            ws_ping_interval=None,
            ws_per_message_deflate=False,
            ws_max_size=settings.max_message_size,
        )
        self.config.load()
        self.state = ServerState()
        self.loop.run_until_complete(self.app.state.hub.start())

    def __call__(self, data: bytes) -> None:
        self.loop.run_until_complete(asyncio.wait_for(self._exchange(data), PATIENCE))
        assert not self.errors, self.errors.pop()

    async def _exchange(self, data: bytes) -> None:
        """Send the bytes, end our side, take all that is answered, and wait until nothing is left."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        serve = partial(wire_http.HttpProtocol, self.config, self.state, {}, repeats=True)
        await self.loop.connect_accepted_socket(serve, theirs)
        with ours, suppress(ConnectionError):
            await self.loop.sock_sendall(ours, data)
            ours.shutdown(socket.SHUT_WR)
            while await self.loop.sock_recv(ours, 65_536):
                pass
        while self.state.connections or self.state.tasks or self.app.state.hub.clients:
            await asyncio.sleep(0)


class _Errors(logging.Handler):
    """What the log has of errors."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._errors = errors

    def emit(self, record: logging.LogRecord) -> None:
        self._errors.append(self.format(record))


def over_http() -> Callable[[bytes], None]:
    return App()


def over_websocket() -> Callable[[bytes], None]:
    app = App()
    return lambda data: app(HANDSHAKE + data)


def decode(data: bytes) -> None:
    """Read what a publisher or a client may send: what is wrong with it is an InvalidRequest and nothing else."""
    with suppress(InvalidRequest):
        schemas.read_message(data, schemas.CLIENT_TYPES)
    for kind in (schemas.NotifyRequest, schemas.NotifyRequests):
        with suppress(InvalidRequest):
            schemas.encode(schemas.Notification(type="", timestamp="", data=schemas.decode(data, kind)))
    text = data.decode("latin-1")
    for read in (schemas.topics_of, schemas.position_of):
        with suppress(InvalidRequest):
            read(QueryParams(text).get("a", text))


def handshake(data: bytes) -> None:
    """Read a head, whose first line may be one: a request, and perhaps a handshake, or a RequestError."""
    request = RequestParser()
    with suppress(RequestError):
        target = data.replace(b" ", b"").partition(b"\r\n")[0]
        head = b"GET %b HTTP/1.1\r\n%b\r\n\r\n" % (target, data)
        request.read(head, 0, head.index(BLANK_LINE) + len(BLANK_LINE))
        check_handshake(request)


def over_tokens() -> Callable[[bytes], None]:
    """Read tokens as a server with a secret does: any text, and any header or claims with a good signature."""
    secret = "a secret of at least thirty-two bytes"
    tokens = tokens_of(Settings(jwt_secret=secret))

    def signed(header: bytes, claims: bytes) -> str:
        text = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in (header, claims))
        digest = hmac.digest(secret.encode(), text, "sha256")
        return (text + b"." + base64.urlsafe_b64encode(digest).rstrip(b"=")).decode()

    def read(data: bytes) -> None:
        for token in (data.decode("latin-1"), signed(TOKEN_HEADER, data), signed(data, b"{}")):
            try:
                # It waits for nothing: the key is at hand.
                tokens.identity(token).send(None)
            except (Unauthorized, StopIteration):
                continue
            raise AssertionError("reading a token waits")

    return read


class Target(NamedTuple):
    """How the function is made, in the process that uses it, and seeds."""

    make: Callable[[], Callable[[bytes], None]]
    seeds: list[bytes]


TARGETS = {
    "frames": Target(lambda: check_against_reference, FRAMES),
    "decode": Target(lambda: decode, [NOTIFICATION, b"[%s]" % NOTIFICATION, b'{"topics":["a"]}', b"a=x,y&b=%41"]),
    "handshake": Target(lambda: handshake, [HANDSHAKE.split(b"\r\n", 1)[1]]),
    "tokens": Target(
        over_tokens, [TOKEN_HEADER, b'{"sub":"bob","topics":["a*"],"publish":["b"],"admin":true,"exp":9e9}']
    ),
    "http": Target(over_http, REQUESTS),
    "websocket": Target(over_websocket, FRAMES),
}
