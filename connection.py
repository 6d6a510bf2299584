"""What the Hub needs of a connection, and the connection that any ASGI server gives.

Owns the seam between the Hub and the network: `Connection` is what the Hub calls, `Receiver` what it is told.
Knows neither the Hub nor a server. The fast implementation is wire.py; the one here awaits the standard `send`.

1. A connection goes forward only: connecting, open, closing, closed.
2. Once it is not open, `writable` is false and nothing more is written but its close frame.
3. `left` is told exactly once, after the last byte; nothing is told after it.
4. A peer that does not answer its close frame within CLOSE_DEADLINE_SECONDS is given up on.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from starlette.types import Message, Receive, Scope, Send

from log import payloads

# Where a server puts what it offers beyond ASGI, in scope["extensions"]: a Connection, or for a response a function
# that gives it the whole connection, on which no request is read any more, and returns what aborts it.
WIRE_EXTENSION = "notifyd.wire"
STREAM_EXTENSION = "notifyd.stream"
CLOSE_DEADLINE_SECONDS = 5.0
# What is read of one connection in a turn of the event loop. In frames of 6 bytes these are 2 to 5 ms of work. Without
# a limit uvloop hands over megabytes at a time, and one peer that floods keeps everybody else waiting for seconds.
TURN_BYTES = 4096
# A send that took at least so long has waited for the peer. One that ended at once shows that the server took it, which
# it does for a dead peer, too.
WAITED_SECONDS = 1.0

logger = logging.getLogger("notifyd.connection")


class ConnectionState(enum.IntEnum):
    CONNECTING = 0
    OPEN = 1
    CLOSING = 2
    CLOSED = 3


class Receiver(Protocol):
    """Who is told what happens on an open connection. None of these may raise or block."""

    # Where the receiver may write ready frames by itself: the connection keeps it at -1 while it is not writable,
    # and for good where it is no plain socket.
    descriptor: int

    def heard(self) -> None: ...
    def received(self, message: str | bytes) -> None: ...
    def drained(self) -> None: ...
    def left(self) -> None: ...


class Connection(Protocol):
    """One client's connection as the Hub sees it. No call blocks."""

    state: ConnectionState
    writable: bool
    # Whether protocol pongs are told to the receiver. Where they are not, silence proves nothing.
    hears_pongs: bool
    # Whether it only goes one way.
    is_stream: bool

    def choose(self, subprotocol: str) -> None:
        """Let the handshake be answered with this subprotocol, which was offered. Only while it is CONNECTING."""

    def accept(self, receiver: Receiver, greeting: bytes) -> None:
        """Complete the handshake and send the first frames; from now on `receiver` is told what happens."""

    def write(self, frames: bytes) -> None:
        """Send ready frames. Only while it is OPEN; what is not writable takes them too, so ask `writable` first."""

    def buffered(self) -> int:
        """Return the bytes that were written and have not left yet."""

    def ping(self) -> None:
        """Send a protocol ping, where the server lets us."""

    def close(self, code: int, reason: str) -> None:
        """Say goodbye, wait for the peer's goodbye for a bounded time, and end. Accepts first if need be."""


class SendConnection:
    """A WebSocket of any ASGI server: a task of its own awaits the standard `send`.

    It takes one batch at a time: until the server has taken that, it is not writable, and the Hub's cursor waits.
    """

    __slots__ = (
        "_abort",
        "_deadline",
        "_goodbye",
        "_out",
        "_reader",
        "_receive",
        "_receiver",
        "_send",
        "_subprotocol",
        "_wake",
        "state",
        "writable",
    )

    hears_pongs = False
    is_stream = False

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        # What cuts the peer off, where the server lets us.
        self._abort: Callable[[], None] | None = None
        self._subprotocol: str | None = None
        self._receiver: Receiver | None = None
        self._out: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._goodbye: tuple[int, str] | None = None
        self._deadline: asyncio.Timeout | None = None
        self._reader: asyncio.Task[None] | None = None
        self.state = ConnectionState.CONNECTING
        self.writable = False

    def choose(self, subprotocol: str) -> None:
        self._subprotocol = subprotocol

    def accept(self, receiver: Receiver, greeting: bytes) -> None:
        self._receiver = receiver
        self.state = ConnectionState.OPEN
        self.write(greeting)

    def write(self, frames: bytes) -> None:
        if self.state is ConnectionState.OPEN:
            self._out.append(frames)
            self.writable = False
            self._wake.set()

    def buffered(self) -> int:
        return sum(map(len, self._out))

    def ping(self) -> None:
        """ASGI has no way to send a protocol ping."""

    def close(self, code: int, reason: str) -> None:
        if self.state >= ConnectionState.CLOSING:
            return
        self.state = ConnectionState.CLOSING
        self.writable = False
        self._goodbye = code, reason
        if self._deadline is not None:
            self._deadline.reschedule(self._give_up_at())
        if self._reader is not None:
            # Some servers send nothing while the app waits for the peer, and what it says now is of no use.
            self._reader.cancel()
        self._wake.set()

    def _give_up_at(self) -> float | None:
        closing = self.state is ConnectionState.CLOSING
        return asyncio.get_running_loop().time() + CLOSE_DEADLINE_SECONDS if closing else None

    async def serve(self) -> None:
        """Read and write until the connection has ended."""
        reader = self._reader = asyncio.ensure_future(self._read())
        writer = asyncio.ensure_future(self._write_out())
        try:
            async with asyncio.timeout_at(self._give_up_at()) as self._deadline:
                if self.state is ConnectionState.CLOSING:
                    reader.cancel()
                await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
                # Either ends with the connection: some servers tell of the end only when the app has returned.
                if reader.cancelled():
                    await asyncio.wait({writer})
                (writer if writer.done() else reader).result()
        except TimeoutError:
            logger.debug("A peer did not take its goodbye and is given up on")
        finally:
            self._reader = self._deadline = None
            # A stream of which the server has told the end has nobody to wait for.
            if not (self.is_stream and reader.done() and not reader.cancelled()):
                self._end(took_goodbye=writer.done() or self.state is not ConnectionState.CLOSING)
            reader.cancel()
            writer.cancel()
            self.state = ConnectionState.CLOSED
            self.writable = False
            # They refer to each other. Cut, they go now and need no collector.
            receiver, self._receiver = self._receiver, None
            if receiver is not None:
                receiver.left()

    def _end(self, *, took_goodbye: bool) -> None:
        # The server waits for the peer's goodbye, and a peer that reads nothing would keep it.
        if self._abort is not None and took_goodbye:
            asyncio.get_running_loop().call_later(CLOSE_DEADLINE_SECONDS, self._abort)
        elif self._abort is not None:
            self._abort()

    async def _read(self) -> None:
        while (event := await self._receive())["type"] not in ("websocket.disconnect", "http.disconnect"):
            if self._receiver is not None and event["type"] == "websocket.receive":
                self._receiver.heard()
                if self.state is ConnectionState.OPEN:
                    text = event.get("text")
                    self._receiver.received(event.get("bytes") or b"" if text is None else text)

    async def _write_out(self) -> None:
        try:
            await self._wake.wait()
            await self._open()
            clock = asyncio.get_running_loop().time
            while True:
                began = clock()
                # What was handed over goes out before any goodbye.
                while self._out:
                    await self._send_batch(self._out[0])
                    self._out.popleft()
                if self._goodbye is not None:
                    await self._say_goodbye(*self._goodbye)
                    return
                self._wake.clear()
                self._drained(waited=clock() - began)
                if not self._out:
                    await self._wake.wait()
        except OSError:
            # The peer is gone (ASGI spec 2.4: send() raises OSError); the reader sees the disconnect.
            logger.debug("A peer left while it was written to")

    def _drained(self, waited: float) -> None:
        if self.state is ConnectionState.OPEN and not self.writable:
            self.writable = True
            if self._receiver is not None:
                # Who takes what it was sent is alive; of a stream nothing else is ever heard.
                if self.is_stream or waited >= WAITED_SECONDS:
                    self._receiver.heard()
                self._receiver.drained()

    # --- what is a WebSocket's about it; a stream has others

    async def _open(self) -> None:
        chosen = {} if self._subprotocol is None else {"subprotocol": self._subprotocol}
        await self._send({"type": "websocket.accept", **chosen})

    async def _send_batch(self, frames: bytes) -> None:
        for payload in payloads(frames):
            await self._send({"type": "websocket.send", "text": payload.decode()})

    async def _say_goodbye(self, code: int, reason: str) -> None:
        await self._send({"type": "websocket.close", "code": code, "reason": reason})


# What a browser waits before it reconnects.
RETRY_MILLISECONDS = 3000
_OPENING = b"retry: %d\n\n" % RETRY_MILLISECONDS
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    # nginx would else collect events until its buffer is full.
    (b"x-accel-buffering", b"no"),
]
_NAMED = (b"welcome", b"resume", b"shutdown")
# A notification begins with its id, every other message with its type.
_ID_START, _ID_END = len(b'{"id":"'), len(b'{"id":"') + 36
_TYPE_START = len(b'{"type":"')


class EventStream(SendConnection):
    """A stream that is one client of the Hub, and the ASGI response that carries it."""

    is_stream = True

    def __init__(self, receive: Receive) -> None:
        super().__init__(receive, self._unready)

    async def _unready(self, message: Message) -> None:
        raise RuntimeError(f"{message['type']} before the response has begun")

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        self._send = send
        if take_connection := (scope.get("extensions") or {}).get(STREAM_EXTENSION):
            self._abort = take_connection()
        await self.serve()

    async def _open(self) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send_events(_OPENING)

    async def _send_batch(self, frames: bytes) -> None:
        await self._send_events(b"".join(map(event, payloads(frames))))

    async def _say_goodbye(self, code: int, reason: str) -> None:
        # A comment, for whoever watches: the format has no other place for the reason.
        comment = b": closed: %d %s\n\n" % (code, reason.encode())
        await self._send({"type": "http.response.body", "body": comment, "more_body": False})

    async def _send_events(self, events: bytes) -> None:
        if events:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})


def event(payload: bytes) -> bytes:
    """Return a message as an event, a ping as a comment, and nothing for what has no place in a stream."""
    if payload.startswith(b'{"id":"'):
        return b"id: %s\nevent: message\ndata: %s\n\n" % (payload[_ID_START:_ID_END], payload)
    name = payload[_TYPE_START : payload.index(b'"', _TYPE_START)]
    if name in _NAMED:
        return b"event: %s\ndata: %s\n\n" % (name, payload)
    return b": ping\n\n" if name == b"ping" else b""
