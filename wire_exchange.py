"""One request and its response, as an ASGI app has them: `receive` and `send`.

Owns the response: its framing, and whether it keeps its promises. Knows the connection as HttpProtocol, the owner of
the parser and of the request's body; neither sockets nor deadlines.

1. The state goes forward only. Once it is COMPLETE or LOST this exchange never touches the connection again, so a
   send that comes too late cannot get into the next response.
2. The head waits for the first part of the body, and leaves with it (ASGI specification 2.4).
3. `send` waits while the transport is full, and raises an OSError once the peer has left.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Scope

from errors import Category
from schemas import encode, error_body, new_error_id
from streams import Pipe, Stream
from wire_message import ClientDisconnected, Headers, is_disconnect

if TYPE_CHECKING:
    from wire_http import HttpProtocol

logger = logging.getLogger("notifyd.wire")

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# A head and a body up to this size leave in one write.
JOINED_BYTES = 65_536
_STATUS_LINES = {number: b"HTTP/1.1 %d \r\n" % number for number in range(100, 1000)}
_STATUS_LINES |= {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)", re.IGNORECASE)
# Of a body that is read at once; a longer one comes in pieces.
MAX_LENGTH_DIGITS = 7
# Of a request that repeats, so much waits here until its body is whole.
MAX_AWAITED_BYTES = 16_384
_NO_CONTROLS = bytes(byte for byte in range(256) if (byte >= 32 and byte != 127) or byte == ord("\t"))


# From the body of a request to the bytes of a response with status 200 from its headers on; None where the app has to
# be asked.
AnswerAtOnce = Callable[[bytes], bytes | None]


class Answer(enum.IntEnum):
    AWAITED = 0
    STARTED = 1
    COMPLETE = 2
    LOST = 3


AWAITED, STARTED, COMPLETE, LOST = Answer


class Exchange:
    """A request, from its head to the end of its response."""

    __slots__ = (
        "_body_left",
        "_changed",
        "_has_body",
        "_has_own_time",
        "_head",
        "_http",
        "_is_chunked",
        "_last_part",
        "_owes_body",
        "expects_continue",
        "keeps_alive",
        "state",
        "stream",
    )

    def __init__(self, http: HttpProtocol) -> None:
        self._http = http
        # Whether the client waits before it sends the body.
        self.expects_continue = http.parser.expects_continue
        # Whether the connection serves another request afterwards.
        self.keeps_alive = http.parser.keeps_alive
        # Whether the app has yet to be told the end of the request's body.
        self._owes_body = True
        self._has_own_time = False
        self.state = AWAITED
        # The head of the response until it is written.
        self._head = b""
        self._has_body = self._is_chunked = False
        # The bytes to come of a response of known length.
        self._body_left: int | None = None
        self._last_part = b""
        # Awaited by a `receive` or a `send`.
        self._changed: asyncio.Event | None = None
        # The stream that has taken the connection over.
        self.stream: Stream | None = None

    @property
    def has_begun(self) -> bool:
        """Whether a part of the response has been written."""
        return self.state >= STARTED and not self._head

    @property
    def keeps_time(self) -> bool:
        """Whether the app has its own deadlines for the rest of the body."""
        return self._has_own_time and self.state < COMPLETE

    def keep_time(self) -> None:
        """Hear from the app that it has them."""
        self._has_own_time = True
        self._http.time_request()

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        has_returned = False
        try:
            await app(scope, self.receive, self.send)
            has_returned = True
        except Exception as error:
            if is_disconnect(error):
                logger.debug("A peer left while it was answered")
            else:
                logger.exception("Unexpected error in the app of a request")
        finally:
            if self.state < COMPLETE and self.stream is None:
                if has_returned:
                    logger.error("The app of a request ended without completing its response")
                self._http.refuse(500, "Internal server error", "system")

    async def receive(self) -> Message:
        http, parser = self._http, self._http.parser
        if self.expects_continue and self.state is AWAITED and not (parser.body or parser.is_complete):
            http.transport.write(_CONTINUE)
        self.expects_continue = False
        while self.state < COMPLETE:
            if self._owes_body and (parser.body or parser.is_complete):
                body, parser.body = bytes(parser.body), b""
                self._owes_body = not parser.is_complete
                if http.is_paused:
                    http.pace()
                return {"type": "http.request", "body": body, "more_body": self._owes_body}
            if http.peer_has_ended and parser.is_complete:
                break
            await self._change()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        while self._http.is_full and self.state < COMPLETE:
            await self._change()
        kind = message["type"]
        if self.state is STARTED and kind == "http.response.body":
            self._send_body(message.get("body", b""), message.get("more_body", False))
        elif self.state is AWAITED and kind == "http.response.start":
            self._start(message["status"], message.get("headers", ()))
        elif self.state is LOST:
            raise ClientDisconnected
        else:
            raise RuntimeError(f"{kind} is out of place while the response is {self.state.name.lower()}")

    def _start(self, status: int, headers: Headers) -> None:
        lines = []
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-length":
                if status == 204:
                    continue
                self._body_left = int(value)
            elif lower == b"connection" and value.lower() == b"close":
                self.keeps_alive = False
                continue
            elif lower == b"transfer-encoding":
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        parser = self._http.parser
        if self.expects_continue and not parser.is_complete:
            # The client may leave the body out now, or send it: nobody knows (RFC 9110, section 10.1.1).
            self.keeps_alive = False
        self._has_body = not (parser.method == b"HEAD" or status in (204, 304))
        if self._has_body and self._body_left is None and parser.version == "1.1":
            self._is_chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        if not self.keeps_alive:
            lines.append(b"connection: close\r\n")
        self._head = response_head(status, lines, self._http.server_state.default_headers)
        self.state = STARTED

    def _send_body(self, body: bytes, more: bool) -> None:
        # Not kept behind the end: an idle connection would hold a whole page.
        self._last_part = body if more else b""
        if not self._has_body:
            body = b""
        elif self._is_chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more:
                body += b"0\r\n\r\n"
        elif self._body_left is not None:
            self._body_left -= len(body)
            if self._body_left < 0 or (self._body_left and not more):
                raise RuntimeError("The body of the response is not as long as its Content-Length")
        head, self._head = self._head, b""
        if head and len(body) > JOINED_BYTES:
            self._http.transport.write(head)
            head = b""
        if head or body:
            self._http.transport.write(head + body)
        if not more:
            self.state = COMPLETE
            if self._changed is not None:
                self.change()
            self._http.answered()

    async def _change(self) -> None:
        if self._changed is None:
            self._changed = asyncio.Event()
        await self._changed.wait()

    # --- called by the connection

    def change(self) -> None:
        """Let `receive` and `send` look again: at the body, the room to write, or the peer."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        if self.stream is not None and not self.is_full:
            self.stream.resumed()

    def lose(self) -> None:
        """Hear that nothing more can be sent."""
        stream, self.stream = self.stream, None
        if self.state < COMPLETE:
            self.state = LOST
            self.change()
        if stream is not None:
            stream.lost()

    # --- for a stream, written to like a WebSocket

    def be_taken_by(self, stream: Stream, sent: bytes) -> Pipe | None:
        """Let a stream write the rest of the response, if `sent` is the very part that was written last."""
        if self.state is not STARTED or self._last_part is not sent:
            return None
        self.stream = stream
        self.keeps_alive = False
        self._http.read_no_more()
        return self

    @property
    def is_full(self) -> bool:
        return self._http.is_full

    def write(self, data: bytes) -> None:
        self._send_body(data, more=True)

    def finish(self, data: bytes) -> None:
        self._send_body(data, more=False)

    def buffered(self) -> int:
        return self._http.transport.get_write_buffer_size()

    def abort(self) -> None:
        self._http.transport.abort()


class Repeat:
    """The head of a request that came whole, and the function that answers the next request with this head.

    Publishers repeat their heads. Where no more than the value of Content-Length differs, the head is neither parsed
    again nor shown to the app, and the request costs no task and no exchange (bench/run.py --measure publish).
    """

    __slots__ = ("_after", "_answer", "_before", "_beginning", "_last", "_length", "_own")

    def __init__(self, head: bytes, answer: AnswerAtOnce) -> None:
        """Take a head that has been checked, and has one Content-Length."""
        length = _LENGTH.search(head)
        assert length is not None
        self._before, self._after = head[: length.start(1)], head[length.end(1) :]
        self._answer = answer
        # The head of the last request, and the length of its body: most have the same.
        self._last, self._length = head, int(length[1])
        # The server's own headers, and the response up to their end. It makes a new list when Date changes.
        self._own: Headers | None = None
        self._beginning = b""

    def answers(self, data: bytes, most: int, default_headers: Headers) -> tuple[int, list[bytes]]:
        """Answer the requests that begin in the first `most` bytes; return where the last ends, and the responses."""
        if default_headers is not self._own:
            self._own, self._beginning = default_headers, response_head(200, [], default_headers).removesuffix(b"\r\n")
        start, responses = 0, []
        while start < min(len(data), most):
            body, end = self._find_body(data, start)
            if not body or end > len(data):
                break
            try:
                answered = self._answer(data[body:end])
            except Exception:
                error_id = new_error_id()
                logger.exception("Unexpected error %s in the app of a repeated request", error_id)
                responses.append(_unexpected(error_id, default_headers))
            else:
                if answered is None:
                    break
                responses.append(self._beginning + answered)
            start = end
        return start, responses

    def awaits_body(self, data: bytes, start: int) -> bool:
        """Whether a request with this head begins here, whose body has yet to come: many clients send it apart."""
        body, end = self._find_body(data, start)
        return bool(body) and len(data) < end <= start + MAX_AWAITED_BYTES

    def _find_body(self, data: bytes, start: int) -> tuple[int, int]:
        """Return where the body of the request that begins here begins and ends; both 0 if it has another head."""
        if data.startswith(self._last, start):
            body = start + len(self._last)
            return body, body + self._length
        digits = start + len(self._before)
        end = data.find(b"\r", digits, digits + MAX_LENGTH_DIGITS + 1)
        if data.startswith(self._before, start) and data.startswith(self._after, end):
            length, body = data[digits:end], end + len(self._after)
            if length.isdigit():
                self._last, self._length = data[start:body], int(length)
                return body, body + self._length
        return 0, 0


# --- the bytes of a response

# The server's own headers, and their lines. It makes a new list when the second changes, since Date is one of them.
_default_headers: Headers = ()
_default_lines = b""


def response_head(status: int, lines: list[bytes], default_headers: Headers = ()) -> bytes:
    """Return the head of a response, with CRLF after each line. Raises ValueError for any other line end."""
    global _default_headers, _default_lines  # noqa: PLW0603 - a memory of one value
    if default_headers is not _default_headers:
        _default_lines = b"".join(map(b"%b: %b\r\n".__mod__, map(tuple, default_headers)))
        _default_headers = default_headers
    joined = b"".join(lines)
    if joined.translate(None, _NO_CONTROLS) != b"\r\n" * len(lines):
        raise ValueError("A header has a control character or a line end")
    return b"%b%b%b\r\n" % (_STATUS_LINES[status], _default_lines, joined)


def http_response(status: int, body: bytes = b"", headers: Headers = (), default_headers: Headers = ()) -> bytes:
    """Return a whole response that ends its connection."""
    lines, has_length = [], False
    for name, value in headers:
        if (lower := name.lower()) != b"connection":
            lines.append(b"%b: %b\r\n" % (name, value))
            has_length = has_length or lower == b"content-length"
    if not has_length:
        lines.append(b"content-length: %d\r\n" % len(body))
    return response_head(status, [*lines, b"connection: close\r\n"], default_headers) + body


def error_response(
    status: int, message: str, category: Category, headers: Headers = (), default_headers: Headers = ()
) -> bytes:
    """Return a whole response with the documented body of an HTTP error."""
    own, body = _error(message, category)
    return http_response(status, body, [*own, *headers], default_headers)


def _unexpected(error_id: str, default_headers: Headers) -> bytes:
    """Return a response that does not end its connection."""
    headers, body = _error("Internal server error", "system", error_id)
    return response_head(500, [b"%b: %b\r\n" % header for header in headers], default_headers) + body


def _error(message: str, category: Category, error_id: str | None = None) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers and the documented body of an HTTP error."""
    body = encode(error_body(message, category, error_id))
    return [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))], body
