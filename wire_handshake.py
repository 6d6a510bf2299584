"""The opening handshake without I/O (RFC 6455, section 4.2): its checks and its answer.

Knows no socket and no client.

1. A breach of section 4.2.1 raises RequestError with the status and the headers of the answer; that ends the
   connection.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from websockets.utils import accept_key

from wire_exchange import response_head
from wire_message import Headers, RequestError, RequestParser

# 16 bytes in base64.
_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")


class Handshake(NamedTuple):
    """The parts of an opening handshake that its answer depends on."""

    key: str
    # In the order of the client's preference (section 4.1).
    subprotocols: list[str]
    # The offers in Sec-WebSocket-Extensions, unread.
    extensions: str


def check_handshake(request: RequestParser) -> Handshake:
    """Read an opening handshake. Raises RequestError for a breach of RFC 6455, section 4.2.1."""
    if request.method != b"GET":
        raise RequestError("A WebSocket handshake is a GET request", 405, ((b"allow", b"GET"),))
    if request.version != "1.1":
        raise RequestError("A WebSocket handshake is an HTTP/1.1 request")
    versions, keys, offers, extensions, has_body = [], [], [], [], False
    for name, value in request.headers:
        if name == b"sec-websocket-version":
            versions.append(value)
        elif name == b"sec-websocket-key":
            keys.append(value)
        elif name == b"sec-websocket-protocol":
            offers += value.decode("latin-1").split(",")
        elif name == b"sec-websocket-extensions":
            extensions.append(value.decode("latin-1"))
        elif name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            has_body = True
    if versions != [b"13"]:
        raise RequestError("Sec-WebSocket-Version must be 13", 426, ((b"sec-websocket-version", b"13"),))
    if has_body:
        # It would be read as frames, or by a proxy in front as a request of its own.
        raise RequestError("A WebSocket handshake has no body")
    # Each comes once: sections 11.3.1 and 11.3.5.
    if len(keys) != 1 or not _KEY.fullmatch(keys[0]):
        raise RequestError("Sec-WebSocket-Key must be 16 bytes in base64")
    subprotocols = list(filter(None, map(str.strip, offers)))
    return Handshake(keys[0].decode("ascii"), subprotocols, ", ".join(extensions))


def acceptance(key: str, subprotocol: str | None = None, headers: Headers = ()) -> bytes:
    """Return the response that completes the handshake (section 4.2.2). Raises ValueError for a bad header."""
    lines = [
        b"Upgrade: websocket\r\n",
        b"Connection: Upgrade\r\n",
        b"Sec-WebSocket-Accept: %b\r\n" % accept_key(key).encode("ascii"),
    ]
    if subprotocol is not None:
        lines.append(b"Sec-WebSocket-Protocol: %b\r\n" % subprotocol.encode("latin-1"))
    for name, value in headers:
        lines.append(b"%b: %b\r\n" % (name, value))
    return response_head(101, lines)
