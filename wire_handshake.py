"""The opening handshake without I/O (RFC 6455, section 4.2): its checks and its answer.

Knows no socket and no client.

1. A breach of section 4.2.1 raises RequestError with the status and the headers of the answer; that ends the
   connection.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

from websockets.utils import accept_key

from wire_message import Headers, RequestError, RequestParser, response_head


def check_handshake(request: RequestParser) -> str:
    """Return the key of an opening handshake. Raises RequestError for a breach of RFC 6455, section 4.2.1."""
    if request.method != b"GET":
        raise RequestError("A WebSocket handshake is a GET request", 405, ((b"allow", b"GET"),))
    if request.version != "1.1":
        raise RequestError("A WebSocket handshake is an HTTP/1.1 request")
    versions, keys, has_body = [], [], False
    for name, value in request.headers:
        if name == b"sec-websocket-version":
            versions.append(value)
        elif name == b"sec-websocket-key":
            keys.append(value)
        elif name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            has_body = True
    if versions != [b"13"]:
        raise RequestError("Sec-WebSocket-Version must be 13", 426, ((b"sec-websocket-version", b"13"),))
    if has_body:
        # It would be read as frames, or by a proxy in front as a request of its own.
        raise RequestError("A WebSocket handshake has no body")
    # Each comes once: sections 11.3.1 and 11.3.5.
    if len(keys) != 1 or not _is_key(keys[0]):
        raise RequestError("Sec-WebSocket-Key must be 16 bytes in base64")
    return keys[0].decode("ascii")


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == 16
    except binascii.Error:
        return False


def subprotocols(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """Return the subprotocols that the client offers (section 4.1), the first it likes best."""
    offered = b",".join([value for name, value in headers if name == b"sec-websocket-protocol"]).decode("latin-1")
    return [name.strip() for name in offered.split(",") if name.strip()]


def acceptance(key: str, subprotocol: str | None = None, headers: Headers = ()) -> bytes:
    """Return the response that completes the handshake (section 4.2.2). Raises ValueError for a bad header."""
    lines = [
        b"Upgrade: websocket\r\n",
        b"Connection: Upgrade\r\n",
        b"Sec-WebSocket-Accept: %b\r\n" % accept_key(key).encode("ascii"),
    ]
    if subprotocol is not None:
        lines.append(b"Sec-WebSocket-Protocol: %b\r\n" % subprotocol.encode("latin-1"))
    lines.extend([b"%b: %b\r\n" % (name, value) for name, value in headers])
    return response_head(101, lines)
