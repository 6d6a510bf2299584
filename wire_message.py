"""HTTP/1.1 requests without I/O (RFC 9112).

Owns the form that a request must have, and the ASGI scope that its head decides. Knows no app, and of a transport
only both ends.

1. httptools checks strictly; this module refuses the rest of the requests that two readers could take differently.
   Either way a RequestError says why, and the parser is not fed again.
2. The parser gets a head whole, and no byte behind the request that is under way.
3. Trailers are read and dropped: they could repeat a header that was checked (RFC 9110, section 6.5.1).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

Headers = Iterable[Sequence[bytes]]  # ASGI allows any iterable of pairs.

BLANK_LINE = b"\r\n\r\n"
# Request line and headers together, and as much for trailers and chunk extensions; servers usually allow as much.
MAX_HEAD_BYTES = 65_536
# A head is read in one piece, and each of its lines costs about 0.5 us.
MAX_HEAD_LINES = 1_000
# The size of a chunk and its line ends: they do not count as an extension.
_CHUNK_FRAMING_BYTES = 16
# A host and a port (RFC 3986, section 3.2), or nothing.
_HOST_BYTE = rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]"
_HOST = re.compile(_HOST_BYTE + rb"*")
_ABSOLUTE = re.compile(rb"https?://(" + _HOST_BYTE + rb"+)(/[^?]*|)(\?.*|)", re.IGNORECASE)
_ASGI = {"version": "3.0", "spec_version": "2.4"}


class RequestError(Exception):
    """The request is refused, and its connection ends: where the next request would begin is unknown."""

    def __init__(self, message: str, status: int = 400, headers: Headers = ()) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class ClientDisconnected(OSError):
    """An app sends to a peer that has left (ASGI specification 2.4)."""


def is_disconnect(error: Exception) -> bool:
    """Whether an app has ended with ClientDisconnected, or with its own exception for it, as Starlette has."""
    return ClientDisconnected in (type(error), type(error.__context__))


class Peer(NamedTuple):
    """Both ends of a connection, as the ASGI scope names them."""

    server: tuple[str, int | None] | None
    client: tuple[str, int] | None
    is_secure: bool


def peer_of(transport: asyncio.BaseTransport) -> Peer:
    server, client = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
    return Peer(
        # A Unix socket has a path, and no port; its clients have no address.
        server[:2] if isinstance(server, tuple) else (server, None) if server else None,
        # A socket for both families has IPv4 addresses in a form of IPv6.
        (client[0].removeprefix("::ffff:"), client[1]) if isinstance(client, tuple) else None,
        transport.get_extra_info("sslcontext") is not None,
    )


class RequestParser:
    """Reads the requests of a connection, one after the other: each head in one piece, its body in any."""

    __slots__ = (
        "_chunks",
        "_framing_bytes",
        "_library",
        "_skips_body",
        "body",
        "body_left",
        "expects_continue",
        "fields",
        "headers",
        "is_complete",
        "is_upgrade",
        "keeps_alive",
        "method",
        "target",
        "version",
    )

    def __init__(self) -> None:
        # Without callbacks it only checks the head; the lines are split here, for half the cost.
        self._library = HttpRequestParser(None)
        # Whether the library has left the body out, because the head offers another protocol.
        self._skips_body = False
        # A body in chunks, with the bytes of its extensions and trailers so far.
        self._chunks: _Chunks | None = None
        self._framing_bytes = 0
        self.method = self.target = b""
        self.version = "1.1"
        self.headers: list[tuple[bytes, bytes]] = []
        # The headers by name; of several, the last.
        self.fields: dict[bytes, bytes] = {}
        self.keeps_alive = self.expects_continue = self.is_upgrade = False
        # The part of the body that has arrived and has not been taken, and the length of the part to come, if known.
        self.body: bytes | bytearray = b""
        self.body_left = 0
        self.is_complete = False

    def read(self, data: bytes, start: int, end: int) -> int:
        """Read a head, and the beginning of a body of known length behind it; return how far. Raises RequestError."""
        head = data[start:end]
        if head.count(b"\n") > MAX_HEAD_LINES:
            raise RequestError(f"request head: more than {MAX_HEAD_LINES} lines", 431)
        self.is_upgrade = self._skips_body = False
        self.body = b""
        try:
            self._library.feed_data(head)
        except HttpParserUpgrade:
            self._skips_body = True
        except HttpParserError as error:
            raise RequestError(f"request: {error}") from None
        request_line, *lines = head[: -len(BLANK_LINE)].split(b"\r\n")
        headers = self.headers = []
        for line in lines:
            name, _, value = line.partition(b":")
            headers.append((name.lower(), value.strip(b" \t")))
        fields = self.fields = dict(headers)
        self.is_upgrade = self._skips_body and fields.get(b"upgrade", b"").lower() == b"websocket"
        self._read_request_line(request_line)
        if len(fields) < len(headers):
            self._check_repeated()
        if (coding := fields.get(b"transfer-encoding")) is not None:
            if self.version == "1.0":
                raise RequestError("Transfer-Encoding: not in HTTP/1.0")
            if coding.lower() != b"chunked":
                raise RequestError("Transfer-Encoding: expected chunked alone", 501)
            self._chunks, self._framing_bytes = _Chunks(), 0
        # The library ends the connection for either.
        connection = b",".join([fields.get(b"connection", b""), fields.get(b"proxy-connection", b"")]).lower()
        self.keeps_alive = self.version == "1.1" and b"close" not in map(bytes.strip, connection.split(b","))
        self.expects_continue = self.version == "1.1" and fields.get(b"expect", b"").lower() == b"100-continue"
        self.body_left = int(fields.get(b"content-length", 0))
        self.is_complete = coding is None and not self.body_left
        return self.read_body(data, end, 0) if self.body_left and end < len(data) else end

    def _read_request_line(self, line: bytes) -> None:
        """Read method, target and version, and check the host beside them. Raises RequestError."""
        # The library would also take several spaces, line ends before the method, and other protocols of this form.
        words = line.split(b" ")
        if len(words) != 3 or words[0] != self._library.get_method():
            raise RequestError("request line: expected method, target and version with one space between them")
        self.method, self.target, version = words
        if version not in (b"HTTP/1.1", b"HTTP/1.0"):
            raise RequestError("request line: expected HTTP/1.1 or HTTP/1.0", 505)
        self.version = "1.1" if version == b"HTTP/1.1" else "1.0"
        if self.method == b"CONNECT":
            raise RequestError("CONNECT: this is no proxy")
        host = self.fields.get(b"host")
        if host is None:
            if self.version == "1.1":
                raise RequestError("Host: required, but missing")
        elif not _HOST.fullmatch(host):
            raise RequestError("Host: expected a host and a port")
        if not self.target.startswith(b"/") or b"#" in self.target:
            self._read_other_target()

    def _check_repeated(self) -> None:
        names = [name for name, _ in self.headers]
        for name in (b"host", b"transfer-encoding", b"content-length"):
            if names.count(name) > 1:
                raise RequestError(f"{name.decode().title()}: expected once, got several")
        # Its lines are one list (RFC 9110, section 5.3).
        self.fields[b"connection"] = b",".join([value for name, value in self.headers if name == b"connection"])

    def _read_other_target(self) -> None:
        """Bring a target of another form into origin form (RFC 9112, section 3.2). Raises RequestError."""
        if b"#" in self.target:
            raise RequestError("request target: has a fragment")
        if self.target == b"*" and self.method == b"OPTIONS":
            return
        if not (absolute := _ABSOLUTE.fullmatch(self.target)):
            raise RequestError("request target: expected a path or an absolute URL")
        authority, path, query = absolute.groups()
        self.target = (path or b"/") + query
        if b"host" in self.fields:
            # Section 3.2.2: the header does not count then.
            self.fields[b"host"] = authority
            self.headers = [(name, authority if name == b"host" else value) for name, value in self.headers]

    def read_body(self, data: bytes, start: int, most: int) -> int:
        """Read on in the body, by `most` bytes where its lines cost something; return how far. Raises RequestError."""
        if self._chunks is not None:
            return self._read_chunks(self._chunks, data, start, min(len(data), start + most))
        end = min(len(data), start + self.body_left)
        piece = data[start:end]
        if not self._skips_body:
            # So that the library expects a head behind the body.
            self._library.feed_data(piece)
        if self.body:
            self._add(piece)
        else:
            self.body = piece
        self.body_left -= end - start
        self.is_complete = not self.body_left
        return end

    def _read_chunks(self, chunks: _Chunks, data: bytes, start: int, stop: int) -> int:
        end = _end_of_lines(data, start, stop)
        for piece in chunks.read(data[start:end]):
            self._framing_bytes -= len(piece) + _CHUNK_FRAMING_BYTES
            self._add(piece)
        self._framing_bytes = max(0, self._framing_bytes + end - start)
        if self._framing_bytes > MAX_HEAD_BYTES:
            raise RequestError(f"trailers and chunk extensions: larger than the limit of {MAX_HEAD_BYTES} bytes", 431)
        if chunks.has_ended:
            self.is_complete = True
            self._chunks = None
            # The library's parser still waits for the chunks.
            self._library = HttpRequestParser(None)
        return end

    def _add(self, piece: bytes) -> None:
        if isinstance(self.body, bytes):
            self.body = bytearray(self.body)
        self.body += piece

    def scope(self, type: str, peer: Peer, root_path: str, state: dict[str, Any]) -> dict[str, Any]:
        """Return the part of the ASGI scope that requests and handshakes have in common."""
        raw_path, _, query = self.target.partition(b"?")
        path = raw_path.decode("latin-1")
        return {
            "type": type,
            "asgi": _ASGI,
            "http_version": self.version,
            "server": peer.server,
            "client": peer.client,
            "scheme": ("https" if peer.is_secure else "http") if type == "http" else "wss" if peer.is_secure else "ws",
            "root_path": root_path,
            "path": root_path + (unquote(path) if "%" in path else path),
            "raw_path": root_path.encode("latin-1") + raw_path,
            "query_string": query,
            "headers": self.headers,
            "state": state.copy(),
        }


class _Chunks:
    """Reads one body in chunks, up to its trailers, with the library."""

    def __init__(self) -> None:
        self.has_ended = False
        self._pieces: list[bytes] = []
        self._library: HttpRequestParser | None = HttpRequestParser(self)
        self._library.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")

    def read(self, data: bytes) -> list[bytes]:
        """Return the parts of chunks in these bytes. Raises RequestError."""
        assert self._library is not None
        try:
            self._library.feed_data(data)
        except HttpParserError as error:
            raise RequestError(f"request body: {error}") from None
        pieces, self._pieces = self._pieces, []
        if self.has_ended:
            # They refer to each other. Cut, they go now and need no collector.
            self._library = None
        return pieces

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self.has_ended = True


def _end_of_lines(data: bytes, start: int, stop: int) -> int:
    """Return how far a body in chunks may be read: it ends with a blank line, and the beginning of one waits."""
    if (end := data.find(BLANK_LINE, start, stop)) >= 0:
        return end + len(BLANK_LINE)
    return stop - next((size for size in (3, 2, 1) if data.endswith(BLANK_LINE[:size], start, stop)), 0)
