"""The seam between the Hub and the network, and the connection over any ASGI server's `send`.

`Connection` is the network as the Hub sees it, `Receiver` the Hub as the network sees it. Knows neither the Hub nor a
server. wire.py implements the fast path of WebSockets; `SendConnection` serves WebSockets and streams of events, with
the ASGI messages of a `Carrier`. A stream writes to a `Pipe` where the server has one.

1. A connection goes forward only: connecting, open, closing, closed.
2. While it is not open, `writable` is false and nothing is written but its close frame.
3. `left` is called exactly once, after the last byte; nothing is called after it.
4. A peer that does not answer its close frame within CLOSE_DEADLINE_SECONDS is given up on.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import re
import secrets
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

from starlette.types import Message, Receive, Scope, Send

from log import payloads
from schemas import Closed, encode

# In scope["extensions"] of a WebSocket: its Connection, ready for the Hub.
WIRE_EXTENSION = "notifyd.wire"
# In the scope, where addresses are limited: the address or network that a request or client counts for.
SUBSCRIBER = "notifyd.subscriber"
# In scope["extensions"] of a request: a Stream whose response has begun calls it with itself and the part of the body
# that it sent last. It returns a Pipe, or None where that part has not reached the wire as it was: then a middleware of
# the host changes or delays the response.
STREAM_EXTENSION = "notifyd.stream"
# In scope["extensions"] of a request that came whole, to an app that has the server to itself: a handler calls it with
# the function that answers the next request with the same head, but for its Content-Length, from the body alone: with
# status, headers and body, or None to ask the app. A middleware that tells such requests apart has to remove it.
REPEAT_EXTENSION = "notifyd.repeat"
CLOSE_DEADLINE_SECONDS = 5.0
# A connection reads this much per loop iteration. In frames of 6 bytes these are 2 to 5 ms of work; without the limit
# uvloop hands over megabytes at a time, and a flooding peer starves the others for seconds.
TURN_BYTES = 4096
# A send that took this long has waited for a peer that is alive. One that returned at once proves nothing.
WAITED_SECONDS = 1.0
MAX_REASON_BYTES = 123

logger = logging.getLogger("notifyd.connection")

# --- the seam


class ConnectionState(enum.IntEnum):
    CONNECTING = 0
    OPEN = 1
    CLOSING = 2
    CLOSED = 3


class Receiver(Protocol):
    """The client, as its connection calls it. None of these may raise or block."""

    # A socket for the receiver to write ready frames to directly. The connection keeps it at -1 while it is not
    # writable, and always if it is no plain socket.
    descriptor: int

    def heard(self) -> None:
        """Note a sign of life."""

    def received(self, message: str | bytes) -> None:
        """Act on a message."""

    def drained(self) -> None:
        """Write on: the connection is writable again."""

    def left(self) -> None:
        """Leave: the connection has ended."""


class Connection(Protocol):
    """One client's connection as the Hub sees it. No call blocks."""

    state: ConnectionState
    writable: bool
    # Whether the receiver hears of protocol pongs. If not, silence proves nothing.
    hears_pongs: bool
    # Whether it carries nothing from the client.
    is_stream: bool

    def accept(self, receiver: Receiver, greeting: bytes, position: str) -> None:
        """Complete the handshake and send the first frames; from now on call `receiver`.

        A stream names the position with them: a client that has received no notification yet resumes there.
        """

    def write(self, frames: bytes) -> None:
        """Send ready frames. Only while it is OPEN. Also taken while it is not writable, so check that first."""

    def buffered(self) -> int:
        """Return the number of bytes that were written and have not been sent yet."""

    def hold(self, *, held: bool) -> None:
        """Read nothing while it is `held` and OPEN, but for messages that have arrived."""

    def ping(self) -> None:
        """Send a protocol ping, if the server can."""

    def close(self, code: int, reason: str) -> None:
        """Send a close frame, wait for the peer's for a bounded time, and end. Accepts first if need be."""


class WebSocket(Connection, Protocol):
    """A connection that began with a handshake."""

    def choose(self, subprotocol: str) -> None:
        """Answer the handshake with this subprotocol, one of those offered. Only while it is CONNECTING."""


# --- over any ASGI server's send


class Carrier(Protocol):
    """The ASGI messages that carry one kind of connection."""

    is_stream: bool

    def opening(self, subprotocol: str | None, position: str) -> Iterable[Message]: ...
    def batch(self, frames: bytes) -> Iterable[Message]: ...
    def goodbye(self, code: int, reason: str) -> Message: ...


class SendConnection:
    """A connection of any ASGI server: a task of its own awaits the standard `send`.

    It takes one batch at a time: until the server has taken that, it is not writable, and the Hub's cursor waits.
    """

    __slots__ = (
        "_carrier",
        "_deadline",
        "_goodbye",
        "_held",
        "_out",
        "_position",
        "_reader",
        "_receiver",
        "_subprotocol",
        "_wake",
        "is_stream",
        "state",
        "writable",
    )

    hears_pongs = False

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._subprotocol: str | None = None
        self._position = ""
        self._receiver: Receiver | None = None
        self._out: deque[bytes] = deque()
        self._goodbye: tuple[int, str] | None = None
        self._held: asyncio.Event | None = None
        # Set when there is something for the writer to do.
        self._wake = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._deadline: asyncio.Timeout | None = None
        self.is_stream = carrier.is_stream
        self.state = ConnectionState.CONNECTING
        self.writable = False

    def choose(self, subprotocol: str) -> None:
        self._subprotocol = subprotocol

    def accept(self, receiver: Receiver, greeting: bytes, position: str) -> None:
        self._receiver = receiver
        self._position = position
        self.state = ConnectionState.OPEN
        self.write(greeting)

    def write(self, frames: bytes) -> None:
        if self.state is ConnectionState.OPEN:
            self._out.append(frames)
            self.writable = False
            self._wake.set()

    def buffered(self) -> int:
        return sum(map(len, self._out))

    def hold(self, *, held: bool) -> None:
        if self._held is not None:
            self._held.set()
        self._held = asyncio.Event() if held else None

    def ping(self) -> None:
        """ASGI has no way to send a protocol ping."""

    def close(self, code: int, reason: str) -> None:
        if self.state >= ConnectionState.CLOSING:
            return
        self.state = ConnectionState.CLOSING
        self.writable = False
        self._goodbye = code, reason
        self._wake.set()
        self._begin_goodbye()

    def _begin_goodbye(self) -> None:
        """Limit the time that is left, and read no further: messages are of no use any more.

        Besides, some servers send nothing while the app waits for the peer.
        """
        if self._reader is not None and self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time() + CLOSE_DEADLINE_SECONDS)
            self._reader.cancel()

    async def serve(self, receive: Receive, send: Send) -> None:
        """Read and write until the connection has ended."""
        reader = self._reader = asyncio.ensure_future(self._listen(receive))
        writer = asyncio.ensure_future(self._write_out(send))
        try:
            async with asyncio.timeout(None) as self._deadline:
                if self.state is ConnectionState.CLOSING:
                    self._begin_goodbye()
                # Either ends with the connection: some servers report its end only when the app has returned.
                await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
                if reader.cancelled():
                    await asyncio.wait({writer})
                (writer if writer.done() else reader).result()
        except TimeoutError:
            logger.debug("A peer did not take its goodbye and is given up on")
        finally:
            reader.cancel()
            writer.cancel()
            self._be_closed()

    def _be_closed(self) -> None:
        self.state = ConnectionState.CLOSED
        self.writable = False
        # Connection and receiver refer to each other. Cut, they are freed now and need no collector.
        receiver, self._receiver = self._receiver, None
        self._reader = self._deadline = None
        if receiver is not None:
            receiver.left()

    async def _listen(self, receive: Receive) -> None:
        while (event := await receive())["type"] not in ("websocket.disconnect", "http.disconnect"):
            if self._receiver is not None and event["type"] == "websocket.receive":
                self._receiver.heard()
                if self.state is ConnectionState.OPEN:
                    text = event.get("text")
                    self._receiver.received(event.get("bytes") or b"" if text is None else text)
            if self._held is not None:
                await self._held.wait()

    async def _write_out(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        try:
            await self._wake.wait()
            for message in self._carrier.opening(self._subprotocol, self._position):
                await send(message)
            while True:
                began = clock()
                # Everything written before the goodbye goes out before it.
                while self._out:
                    for message in self._carrier.batch(self._out[0]):
                        await send(message)
                    self._out.popleft()
                if self._goodbye is not None:
                    await send(self._carrier.goodbye(*self._goodbye))
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
                # A peer that takes data is alive; a stream gives no other sign of life.
                if self.is_stream or waited >= WAITED_SECONDS:
                    self._receiver.heard()
                self._receiver.drained()


class WebSocketCarrier:
    """A WebSocket: each message in a text frame."""

    is_stream = False

    def opening(self, subprotocol: str | None, position: str) -> Iterable[Message]:  # noqa: ARG002
        yield {"type": "websocket.accept"} | ({} if subprotocol is None else {"subprotocol": subprotocol})

    def batch(self, frames: bytes) -> Iterable[Message]:
        return ({"type": "websocket.send", "text": payload.decode()} for payload in payloads(frames))

    def goodbye(self, code: int, reason: str) -> Message:
        # Some servers fail with a longer reason than a close frame can hold (RFC 6455, section 5.5).
        text = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
        return {"type": "websocket.close", "code": code, "reason": text}


# --- streams (https://html.spec.whatwg.org/multipage/server-sent-events.html)

# A browser waits this long before it reconnects, and up to as long again: a fleet must not return in one wave.
RETRY_MILLISECONDS = 3000
# A stream that was replaced or put out leaves with such an id. Its browser comes back with it, and gets the status that
# keeps a browser away (204). Otherwise two tabs with one client_id would replace each other for ever.
REPLACED, REPLACED_ID, PUT_OUT_ID = "Replaced by a new connection", "replaced", "disconnected"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    # A proxy that compresses collects events until it has a block of them.
    (b"cache-control", b"no-store, no-transform"),
    # Without it, nginx collects events until its buffer is full.
    (b"x-accel-buffering", b"no"),
]
NAMED_EVENTS = (b"welcome", b"resume", b"position", b"subscribed", b"shutdown")
# A notification begins with its id, every other message with its type.
_ID_START, _ID_END = len(b'{"id":"'), len(b'{"id":"') + 36
_TYPE_START = len(b'{"type":"')
# A message beside the notifications that takes the client to a position: a resume does if nothing is replayed.
_POSITION = re.compile(rb'"position":"([^"]+)"(?:,"replayed":0,|,"timestamp")')


# All streams that stand at one place are handed the same frames.
@lru_cache(maxsize=4)
def events(frames: bytes) -> bytes:
    """Return ready frames as they are sent on a stream; maybe nothing."""
    return b"".join(map(event, payloads(frames)))


def event(payload: bytes) -> bytes:
    """Return a message as an event, a ping as a comment, and nothing for a message that has no place in a stream."""
    if payload.startswith(b'{"id":"'):
        return b"id: %s\nevent: message\ndata: %s\n\n" % (payload[_ID_START:_ID_END], payload)
    name = payload[_TYPE_START : payload.index(b'"', _TYPE_START)]
    if name in NAMED_EVENTS:
        at = _POSITION.search(payload)
        return b"%sevent: %s\ndata: %s\n\n" % (b"id: %s\n" % at[1] if at else b"", name, payload)
    # Without an empty line, for which some clients make an event without data.
    return b": ping\n" if name == b"ping" else b""


def first_lines(position: str) -> bytes:
    """Return the lines in front of the welcome, of the same block: some clients take no id from an empty block."""
    return b"retry: %d\nid: %s\n" % (_retry(), position.encode())


class PutOut(str):
    """The reason of a close for good. It is told by its type, since an admin chooses the text."""

    __slots__ = ()

    def __new__(cls, reason: str) -> PutOut:
        """Cut the reason to the size of a close frame."""
        return super().__new__(cls, reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore"))


def closed(code: int, reason: str, wait_seconds: int = 0) -> bytes:
    """Return the end of a stream as an event, since pages cannot see comments."""
    last_id = PUT_OUT_ID if isinstance(reason, PutOut) else REPLACED_ID if reason == REPLACED else ""
    id = b"id: %s\n" % last_id.encode() if last_id else b""
    data = encode(Closed(code=code, reason=reason))
    return b"retry: %d\n%sevent: closed\ndata: %s\n\n" % (_retry(wait_seconds), id, data)


def _retry(wait_seconds: int = 0) -> int:
    return max(RETRY_MILLISECONDS, 1000 * wait_seconds) + secrets.randbelow(RETRY_MILLISECONDS + 1)


class StreamCarrier:
    """A stream: a response that goes on, with each message as an event."""

    is_stream = True

    def __init__(self) -> None:
        # The first part of the body, once it is sent.
        self.first = b""

    def opening(self, subprotocol: str | None, position: str) -> Iterable[Message]:  # noqa: ARG002
        if self.first:
            return
        self.first = first_lines(position)
        yield {"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS}
        yield {"type": "http.response.body", "body": self.first, "more_body": True}

    def batch(self, frames: bytes) -> Iterable[Message]:
        if body := events(frames):
            yield {"type": "http.response.body", "body": body, "more_body": True}

    def goodbye(self, code: int, reason: str) -> Message:
        return {"type": "http.response.body", "body": closed(code, reason), "more_body": False}


class Stream(Protocol):
    """A response that has the HTTP connection to itself, as the server calls it."""

    def resumed(self) -> None:
        """Write on: the kernel takes more."""

    def lost(self) -> None:
        """End: the connection has ended."""

    def close(self, code: int, reason: str) -> None:
        """End: the server ends."""


class Pipe(Protocol):
    """The rest of a response on the wire, as a stream writes it. No call blocks."""

    @property
    def is_full(self) -> bool:
        """Whether the kernel does not take everything; the pipe calls `resumed` when it does again."""

    def write(self, data: bytes) -> None: ...
    def buffered(self) -> int: ...

    def finish(self, data: bytes) -> None:
        """Write the end of the response, and end the connection."""

    def abort(self) -> None: ...


class EventStream(SendConnection):
    """A client's stream, and the ASGI response that carries it.

    Where the server has a pipe for it, it has no task: it writes when the Hub does, as a WebSocket of the fast wire.
    """

    __slots__ = ("_body", "_pipe")

    def __init__(self) -> None:
        self._body = StreamCarrier()
        super().__init__(self._body)
        self._pipe: Pipe | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (take := (scope.get("extensions") or {}).get(STREAM_EXTENSION)) is not None:
            try:
                for message in self._body.opening(None, self._position):
                    if "headers" in message:
                        # The connection ends with the stream. A client's pool must not send another request on it.
                        message["headers"] = [*message["headers"], (b"connection", b"close")]
                    await send(message)
            except OSError:
                self.lost()
                return
            self._pipe = take(self, self._body.first)
        if self._pipe is None:
            await self.serve(receive, send)
            return
        # From here on nothing is awaited, so the frames that the Hub has handed over go out before the next.
        for frames in self._out:
            self._pipe.write(events(frames))
        self._out.clear()
        if self._goodbye is not None:
            self._finish(*self._goodbye)
        elif not self._pipe.is_full:
            self.resumed()

    def write(self, frames: bytes) -> None:
        if self._pipe is None:
            super().write(frames)
        elif self.state is ConnectionState.OPEN and (told := events(frames)):
            self._pipe.write(told)
            self.writable = not self._pipe.is_full
            if self.writable and self._receiver is not None:
                # A stream gives no other sign of life.
                self._receiver.heard()

    def buffered(self) -> int:
        return super().buffered() + (0 if self._pipe is None else self._pipe.buffered())

    def close(self, code: int, reason: str) -> None:
        if self._pipe is None:
            super().close(code, reason)
        elif self.state < ConnectionState.CLOSING:
            self.state = ConnectionState.CLOSING
            self.writable = False
            self._finish(code, reason)

    def _finish(self, code: int, reason: str) -> None:
        assert self._pipe is not None
        asyncio.get_running_loop().call_later(CLOSE_DEADLINE_SECONDS, self._pipe.abort)
        self._pipe.finish(closed(code, reason))

    def resumed(self) -> None:
        if self.state is ConnectionState.OPEN:
            self.writable = True
            if self._receiver is not None:
                self._receiver.heard()
                self._receiver.drained()

    def lost(self) -> None:
        self._be_closed()
