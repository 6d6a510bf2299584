"""uvicorn's HTTP protocol with what it lacks: deadlines and a limit on what comes before the body.

Owns how long a request may take to arrive and how long its head may be. What an HTTP body may be is routes.py's.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from httptools import HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from opening_handshake import error_response

# From the first byte of a connection or request to the last byte of the request.
REQUEST_SECONDS = 10.0
# What is still under way of a request that was refused is read for this long, and up to this size.
LINGER_SECONDS = 1.0
LINGER_BYTES = 1_048_576
# Request line and headers together; what servers usually allow.
MAX_HEAD_BYTES = 65_536


class HttpProtocol(HttpToolsProtocol):
    """One HTTP connection, which becomes a WebSocket when it asks for that."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = True
        # Whether bytes of the request are still to come. So it is from the start: a silent connection must end.
        self._incomplete = True
        # Whether the request was answered here and not by the app. What still comes of it is dropped.
        self._refused = False
        self._dropped_bytes = 0
        # Where in the segment the request for an upgrade ended.
        self._upgraded_at: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._dropped_bytes += len(data)
            if self._dropped_bytes > LINGER_BYTES:
                self.transport.abort()
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._upgraded_at is not None:
            # uvicorn forgets what an eager client has sent in the same segment.
            if (early := data[self._upgraded_at :]) and not self.transport.is_closing():
                self.transport.get_protocol().data_received(early)  # type: ignore[attr-defined]
        elif self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"request head: larger than the limit of {MAX_HEAD_BYTES} bytes")
        elif not self._incomplete:
            self._disarm()
        elif self._deadline is None and not self.transport.is_closing():
            # A request that arrives in one piece, as nearly all do, costs no timer.
            self._arm()

    def handle_websocket_upgrade(self) -> None:
        upgrade = sys.exception()
        assert isinstance(upgrade, HttpParserUpgrade)
        self._upgraded_at = upgrade.args[0]
        self._incomplete = False
        self._disarm()
        super().handle_websocket_upgrade()

    def on_message_begin(self) -> None:
        self._incomplete = self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._incomplete = False
        super().on_message_complete()

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
        if cycle is None or cycle.response_complete or not cycle.response_started:
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
