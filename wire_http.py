"""uvicorn's HTTP protocol with what it lacks: deadlines, a limit on what comes before the body, and an order.

Owns how long a request may take to arrive and how long its head may be. What an HTTP body may be is routes.py's.

1. One request is read at a time: the parser gets no byte of the next before the last is answered. So `cycle`, which
   is uvicorn's word for a request and its response, is always the one under way, and an upgrade always has its turn.
2. A request is answered once, by the app or here.
3. In one turn of the event loop a connection reads TURN_BYTES at most, but for bodies of known length, which cost
   next to nothing: in heads and chunks each line has its price.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import sys
import termios
from collections.abc import Callable
from typing import Any

from httptools import HttpRequestParser, parse_url
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from connection import STREAM_EXTENSION, TURN_BYTES
from wire_handshake import error_response

# From the first byte of a connection or request to the last byte of the request.
REQUEST_SECONDS = 10.0
# A response of which the peer has taken nothing for so long is given up on.
STALLED_SECONDS = 30.0
# What is still under way of a request that was refused is read for this long, and up to this size.
LINGER_SECONDS = 1.0
LINGER_BYTES = 1_048_576
# Request line and headers together; what servers usually allow.
MAX_HEAD_BYTES = 65_536
_BLANK_LINE = b"\r\n\r\n"


class HttpProtocol(HttpToolsProtocol):
    """One HTTP connection, which becomes a WebSocket when it asks for that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        # What the parser has not been given yet.
        self._unread = b""
        # Whether it is given more in the next turn of the event loop.
        self._goes_on = False
        # Bytes of the head, or read since the last of the body: trailers may be no larger than a head.
        self._head_bytes = 0
        # What is to come of a body of known length.
        self._body_left = 0
        self._in_head = True
        # Whether bytes of the request are still to come. So it is from the start: a silent connection must end.
        self._incomplete = True
        # Whether the request was answered here and not by the app. What still comes of it is dropped.
        self._refused = False
        self._dropped_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_go()
        super().connection_lost(exc)

    def _let_go(self) -> None:
        self._disarm()
        self._watch_no_more()
        if self.cycle is not None:
            # It refers to this one. Cut, they go now and need no collector.
            self.cycle.scope.pop("extensions", None)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._dropped_bytes += len(data)
            if self._dropped_bytes > LINGER_BYTES:
                self.transport.abort()
        elif self._incomplete or self.cycle is None or self.cycle.keep_alive:
            self._unread += data
            if self._goes_on:
                # The app has resumed the reading meanwhile.
                self.transport.pause_reading()
                return
            self._read_on()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unread:
            self._read_on()

    def _read_on(self) -> None:
        left = self._feed()
        if self._refused or self.transport.is_closing():
            return
        if self.parser is None:
            if self._goes_on:
                # From now on it is the other protocol that pauses and resumes.
                self._goes_on = False
                self.transport.resume_reading()
            # An eager client's frames, which uvicorn would forget.
            if self._unread:
                early, self._unread = self._unread, b""
                self.transport.get_protocol().data_received(early)
        elif not self._incomplete:
            self._disarm()
        elif self._deadline is None:
            # A request that arrives in one piece, as nearly all do, costs no timer.
            self._arm()
        if self._goes_on:
            return
        if left <= 0 and self._unread and self._is_reading():
            self._goes_on = True
            # Not by way of `flow`, which is the app's: it would resume.
            self.transport.pause_reading()
            self.loop.call_soon(self._go_on)
        elif len(self._unread) > HIGH_WATER_LIMIT:
            # Whatever made it read on: uvicorn resumes at the end of each response.
            self.flow.pause_reading()

    def _feed(self) -> int:
        """Give the parser what this turn allows, and return how many bytes more that would be."""
        data, position, left = self._unread, 0, TURN_BYTES
        while position < len(data) and left > 0 and self._is_reading():
            is_sized = self._body_left > 0
            start, position = position, self._end_of_piece(data, position)
            if start == position:
                break
            if not is_sized:
                left -= position - start
            self._head_bytes += position - start
            if not self._in_head or self._head_bytes <= MAX_HEAD_BYTES:
                super().data_received(data[start:position])
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"request head: larger than the limit of {MAX_HEAD_BYTES} bytes")
                break
        self._unread = data[position:]
        return left

    def _go_on(self) -> None:
        if self._goes_on and not self.transport.is_closing():
            self._goes_on = False
            if not self.flow.read_paused:
                self.transport.resume_reading()
            self._read_on()

    def _is_reading(self) -> bool:
        if self._refused or self.parser is None or self.transport.is_closing():
            return False
        return self._incomplete or self.cycle is None or self.cycle.response_complete

    def _end_of_piece(self, data: bytes, start: int) -> int:
        """Return how far the parser may read: where a head or a request ends, it ends there.

        Every head and every body of unknown length ends with a blank line; the beginning of one waits for the rest.
        """
        if self._body_left:
            end = min(len(data), start + self._body_left)
            self._body_left -= end - start
            return end
        stop = min(len(data), start + TURN_BYTES)
        if (end := data.find(_BLANK_LINE, start, stop)) >= 0:
            return end + len(_BLANK_LINE)
        return stop - next((size for size in (3, 2, 1) if data.endswith(_BLANK_LINE[:size], start, stop)), 0)

    def pause_writing(self) -> None:
        super().pause_writing()
        # The peer of a stream, which alone has no length, may take its time: the Hub has its rule for that.
        if self.cycle is not None and not self.cycle.chunked_encoding:
            self._watch()

    def resume_writing(self) -> None:
        self._watch_no_more()
        super().resume_writing()

    def _watch(self) -> None:
        self._stalled = self.loop.call_later(STALLED_SECONDS, self._check_progress, self._untaken())

    def _check_progress(self, before: int) -> None:
        if self._untaken() < before:
            self._watch()
        else:
            self.transport.abort()

    def _untaken(self) -> int:
        size = self.transport.get_write_buffer_size()
        # The kernel holds megabytes, too, and asks for more only when a good part of them has gone.
        with contextlib.suppress(OSError):
            held = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            size += int.from_bytes(held, sys.byteorder)
        return size

    def _watch_no_more(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def handle_websocket_upgrade(self) -> None:
        if self.parser.get_http_version() != "1.1":
            # RFC 6455, section 4.2.1. The protocol that takes over would never know.
            self._refuse(400, "A WebSocket handshake is an HTTP/1.1 request", "connection")
            return
        super().handle_websocket_upgrade()
        self._let_go()
        self.parser = None  # type: ignore[assignment]

    def on_message_begin(self) -> None:
        self._incomplete = True
        super().on_message_begin()

    def _unsupported_upgrade_warning(self) -> None:
        if not self._ignores_upgrade():
            # CONNECT, which needs no header to be one. We are no proxy, and what follows is not for us.
            self.cycle.keep_alive = False
            return
        # The parser has stopped at the head: read it again, without what we may ignore (RFC 9110, section 7.8).
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = HttpRequestParser(self)
        super().data_received(b"\r\n".join(lines) + _BLANK_LINE)

    def _ignores_upgrade(self) -> bool:
        return self.parser.should_upgrade() and not self._should_upgrade() and self.parser.get_method() != b"CONNECT"

    def on_headers_complete(self) -> None:
        if self._ignores_upgrade():
            return
        self._body_left = int(dict(self.headers).get(b"content-length", 0))
        if not self.url.startswith(b"/"):
            # RFC 9112, section 3.2.2: a target may come in absolute form.
            target = parse_url(self.url)
            self.url = (target.path or b"/") + (b"?" + target.query if target.query else b"")
        super().on_headers_complete()
        self._in_head = False
        self._head_bytes = 0
        if not self.parser.should_upgrade():
            self.scope["extensions"] = {STREAM_EXTENSION: self.give_to_stream}  # type: ignore[dict-item]

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._ignores_upgrade():
            return
        self._incomplete = False
        self._in_head = True
        self._head_bytes = self._body_left = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        if self._is_answered():
            self.transport.close()
        else:
            super().send_400_response(msg)

    def _is_answered(self) -> bool:
        """Whether the app has begun to answer the request that is being read."""
        return not self._in_head and self.cycle.response_started

    def give_to_stream(self) -> Callable[[], None]:
        """Read no more requests, so that the end is seen whatever has been sent; return what aborts the connection."""
        self.cycle.keep_alive = False
        return self._abort

    def _abort(self) -> None:
        # uvicorn would log that the response is not complete.
        self.cycle.disconnected = True
        self.transport.abort()

    def shutdown(self) -> None:
        if self._incomplete and not self._in_head:
            # Its handler waits for a body that may never come, and would hold up the end.
            self._refuse(503, "Server shutting down", "system")
        else:
            super().shutdown()
        if self.transport.is_closing():
            # A TLS transport waits for the peer's goodbye, which an idle client does not send.
            self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self._expire)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        self._refuse(408, f"request: not complete within {REQUEST_SECONDS:.0f} seconds")

    def _refuse(self, status: int, message: str, category: str = "validation") -> None:
        """Answer in the place of the app, unless it has begun to, and end the connection."""
        self._disarm()
        self._refused = True
        cycle = self.cycle
        if not self._is_answered():
            self.transport.write(error_response(status, message, category))
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        # Closing with unread data would reset the connection, and destroy the answer on its way: end our side only,
        # and read on for a while.
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)
