"""The stream: Server-Sent Events, from the same log and cursor as a WebSocket.

Owns the text/event-stream format (https://html.spec.whatwg.org/multipage/server-sent-events.html). Knows the seam
in connection.py and nothing of the Hub.

1. Only notifications have an `id:`, and with it a browser resumes by itself: it sends the last one it saw as
   Last-Event-ID. A `resume` event must have none, or a connection cut during the replay would skip the rest.
2. Payloads are JSON on one line, so nothing that is published can end a field or begin another.
"""

from __future__ import annotations

from starlette.types import Message, Receive, Scope, Send

from connection import STREAM_EXTENSION, SendConnection
from frames import payloads

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

    hears_pongs = False
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
