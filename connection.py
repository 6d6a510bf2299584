"""The seam between the Hub and the network, and the connection over any ASGI server's `send`.

`Connection` is the network as the Hub sees it, `Receiver` the Hub as the network sees it. Knows neither the Hub nor a
server. wire.py implements the fast path of WebSockets; `SendConnection` serves WebSockets and streams of events, with
the ASGI messages of a `Carrier`.

1. A connection goes forward only: connecting, open, closing, closed.
2. While it is not open, `writable` is false and nothing is written but its close frame.
3. `left` is called exactly once, after the last byte; nothing is called after it.
4. A peer that does not answer its close frame within CLOSE_DEADLINE_SECONDS is given up on.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from starlette.types import Message, Receive, Send

from log import payloads

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
# the bytes of a response with status 200, from its headers on, or None to ask the app. A middleware that tells such
# requests apart has to remove it.
REPEAT_EXTENSION = "notifyd.repeat"
# The number of a socket that takes frames in another form, one for all such sockets, is taken from this.
OTHER_FORM = -2
# In scope["extensions"] of a request: an app that has its own deadlines for the body calls it, and the server has none.
TIME_EXTENSION = "notifyd.time"
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

    # A socket for the receiver to write ready frames to directly; in another form if it is below -1 (OTHER_FORM). The
    # connection keeps it at -1 while it is not writable, and always if it is no plain socket.
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

    def form(self, frames: bytes) -> bytes:
        """Return ready frames as they are written to the socket."""

    def write_formed(self, data: bytes) -> None:
        """Send on, behind the part of such data that the receiver has written itself."""

    def buffered(self) -> int:
        """Return the number of bytes that were written and have not been sent yet."""

    def hold(self, *, held: bool) -> None:
        """Read nothing while it is `held` and OPEN, but for messages that have arrived."""

    def is_mute(self) -> bool:
        """Whether a live peer is not heard, because it is held; if that has left, it is noticed all the same."""

    def ping(self) -> None:
        """Send a protocol ping, if the server can."""

    def close(self, code: int, reason: str) -> None:
        """Send a close frame, wait for the peer's for a bounded time, and end. Accepts first if need be."""


class WebSocket(Connection, Protocol):
    """A connection that began with a handshake."""

    def choose(self, subprotocol: str) -> None:
        """Answer the handshake with this subprotocol, one of those offered. Only while it is CONNECTING."""

    def compress(self) -> None:
        """Compress notifications, if the client offers to take that. Only while it is CONNECTING."""


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

    def compress(self) -> None:
        """Leave it to the server, which has settled that with the client."""

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

    def form(self, frames: bytes) -> bytes:
        return frames

    def write_formed(self, data: bytes) -> None:  # noqa: ARG002
        raise AssertionError("there is no socket to write past it")

    def buffered(self) -> int:
        return sum(map(len, self._out))

    def hold(self, *, held: bool) -> None:
        if self._held is not None:
            self._held.set()
        self._held = asyncio.Event() if held else None

    def is_mute(self) -> bool:
        # While it is held, a server may keep back that its peer has left: then the heartbeat ends it.
        return False

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
            # Behind a message: that the peer has left is noticed also while it is held, unless more has come before.
            if self._held is not None:
                await self._held.wait()
            if self._receiver is not None and event["type"] == "websocket.receive":
                self._receiver.heard()
                if self.state is ConnectionState.OPEN:
                    text = event.get("text")
                    self._receiver.received(event.get("bytes") or b"" if text is None else text)

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
