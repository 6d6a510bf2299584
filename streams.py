"""Clients that listen to a stream of Server-Sent Events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

Owns the form of events, and a stream's connection: a response that goes on. It writes to a `Pipe` where the server has
one, and else with ASGI messages, as connection.py does.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

from starlette.types import Message, Receive, Scope, Send

from connection import CLOSE_DEADLINE_SECONDS, MAX_REASON_BYTES, STREAM_EXTENSION, ConnectionState, SendConnection
from log import payloads
from schemas import Closed, encode

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
    headers: Iterable[tuple[bytes, bytes]] = STREAM_HEADERS

    def __init__(self) -> None:
        # The first part of the body, once it is sent.
        self.first = b""

    def opening(self, subprotocol: str | None, position: str) -> Iterable[Message]:  # noqa: ARG002
        if self.first:
            return
        self.first = self.lines(position)
        yield {"type": "http.response.start", "status": 200, "headers": list(self.headers)}
        yield {"type": "http.response.body", "body": self.first, "more_body": True}

    def batch(self, frames: bytes) -> Iterable[Message]:
        if body := self.text(frames):
            yield {"type": "http.response.body", "body": body, "more_body": True}

    def goodbye(self, code: int, reason: str) -> Message:
        return {"type": "http.response.body", "body": self.farewell(code, reason), "more_body": False}

    def lines(self, position: str) -> bytes:
        """Return the beginning of the body."""
        return first_lines(position)

    def text(self, frames: bytes) -> bytes:
        """Return ready frames as they are sent; maybe nothing."""
        return events(frames)

    def farewell(self, code: int, reason: str) -> bytes:
        """Return the end of the body."""
        return closed(code, reason)


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

    def __init__(self, carrier: StreamCarrier) -> None:
        self._body = carrier
        super().__init__(carrier)
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
            self._pipe.write(self._body.text(frames))
        self._out.clear()
        if self._goodbye is not None:
            self._finish(*self._goodbye)
        elif not self._pipe.is_full:
            self.resumed()

    def write(self, frames: bytes) -> None:
        if self._pipe is None:
            super().write(frames)
        elif self.state is ConnectionState.OPEN and (told := self._body.text(frames)):
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
        self._pipe.finish(self._body.farewell(code, reason))

    def resumed(self) -> None:
        if self.state is ConnectionState.OPEN:
            self.writable = True
            if self._receiver is not None:
                self._receiver.heard()
                self._receiver.drained()

    def lost(self) -> None:
        self._be_closed()
