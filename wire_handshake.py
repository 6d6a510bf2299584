"""The opening handshake without I/O (RFC 6455, section 4.2): a request in; a scope, and the bytes of the answer, out.

Owns what a handshake must be, and how it is answered over HTTP. Knows ASGI's scope, no socket and no client.

1. What section 4.2.1 forbids raises HandshakeError with the status and the headers of the answer.
2. An answer that is not 101 ends the connection, and says so.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

from starlette.types import Scope

from schemas import encode, error_body

Headers = Iterable[Sequence[bytes]]  # ASGI allows any iterable of pairs.

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}


class HandshakeError(Exception):
    """The opening handshake is not what RFC 6455, section 4.2.1 asks for."""

    def __init__(self, message: str, status: int = 400, headers: Headers = ()) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


def read_request(data: bytes) -> tuple[Scope, bytes]:
    """Return the part of the scope that a request's head decides, and its Sec-WebSocket-Key. Raises HandshakeError."""
    request, *lines = data.partition(b"\r\n\r\n")[0].split(b"\r\n")
    method, target, _ = request.decode("latin-1").split(" ", 2)
    headers = []
    for line in lines:
        name, _, value = line.partition(b":")
        headers.append((name.lower(), value.strip()))
    key = check_handshake(method, headers)
    path, _, query = target.partition("?")
    offered = b",".join(value for name, value in headers if name == b"sec-websocket-protocol").decode("latin-1")
    scope: dict[str, Any] = {
        "type": "websocket",
        "http_version": "1.1",
        "path": unquote(path) if "%" in path else path,
        "raw_path": path.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "headers": headers,
        "subprotocols": [name.strip() for name in offered.split(",") if name.strip()],
    }
    return scope, key


def check_handshake(method: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the key of an opening handshake. Raises HandshakeError for what RFC 6455, section 4.2.1 forbids."""
    if method != "GET":
        raise HandshakeError("A WebSocket handshake is a GET request", 405, ((b"allow", b"GET"),))
    hosts, versions, keys, has_body = [], [], [], False
    for name, value in headers:
        if name == b"host":
            hosts.append(value)
        elif name == b"sec-websocket-version":
            versions.append(value)
        elif name == b"sec-websocket-key":
            keys.append(value)
        elif name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            has_body = True
    if len(hosts) != 1:
        raise HandshakeError("Host must come once")
    if versions != [b"13"]:
        raise HandshakeError("Sec-WebSocket-Version must be 13", 426, ((b"sec-websocket-version", b"13"),))
    if has_body:
        # It would be read as frames, or by a proxy in front as a request of its own.
        raise HandshakeError("A WebSocket handshake has no body")
    # Each comes once: sections 11.3.1 and 11.3.5.
    if len(keys) != 1 or not _is_key(keys[0]):
        raise HandshakeError("Sec-WebSocket-Key must be 16 bytes in base64")
    return keys[0]


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == 16
    except binascii.Error:
        return False


def accept_key(key: bytes) -> bytes:
    """Return Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455, section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def acceptance(key: bytes, subprotocol: str | None = None, headers: Headers = ()) -> bytes:
    """Return the response that completes the handshake (RFC 6455, section 4.2.2)."""
    lines = [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade",
        b"Sec-WebSocket-Accept: " + accept_key(key),
    ]
    if subprotocol is not None:
        lines.append(b"Sec-WebSocket-Protocol: " + subprotocol.encode("latin-1"))
    lines.extend(b"%s: %s" % (name, value) for name, value in headers)
    return b"\r\n".join([*lines, b"", b""])


def http_response(status: int, body: bytes = b"", headers: Headers = ()) -> bytes:
    """Return a whole HTTP/1.1 response after which the connection is closed."""
    pairs = [(name, value) for name, value in headers if name.lower() != b"connection"]
    lines = [b"HTTP/1.1 %d %s" % (status, _PHRASES.get(status, b""))]
    lines.extend(b"%s: %s" % pair for pair in pairs)
    if all(name.lower() != b"content-length" for name, _ in pairs):
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*lines, b"connection: close", b"", body])


def error_response(status: int, message: str, category: str = "connection", headers: Headers = ()) -> bytes:
    """Return a whole response with the documented body of an HTTP error."""
    body = encode(error_body(message, category))
    return http_response(status, body, [(b"content-type", b"application/json"), *headers])


def refusal(error: HandshakeError) -> bytes:
    """Return the response to a handshake that is none."""
    return error_response(error.status, str(error), headers=error.headers)
