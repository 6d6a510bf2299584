"""Bytes of HTTP and WebSocket as a peer sends them, and the reading and writing of a bare socket."""

from __future__ import annotations

import socket
from contextlib import suppress

from websockets.frames import Frame, Opcode
from ws_clients import PATIENCE

MEGABYTE = 2**20
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455, section 1.3.
HEADERS = {
    "Host": "localhost",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}


def handshake(target: str = "/ws", method: str = "GET", **changes: str | None) -> bytes:
    """Return a handshake with some headers changed, or for None left out; `Sec_WebSocket_Key`: Sec-WebSocket-Key."""
    headers = HEADERS | {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([f"{method} {target} HTTP/1.1", *lines, "", ""]).encode()


HANDSHAKE = handshake()


def masked(opcode: Opcode, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """Return a client's frame."""
    return Frame(opcode, payload, fin).serialize(mask=True)


def push(connection: socket.socket, data: bytes, limit: int) -> int:
    """Send the same bytes again and again until nobody takes them any more; return how many were taken."""
    connection.settimeout(0.5)
    taken = 0
    with suppress(OSError):
        while taken < limit:
            taken += connection.send(data[taken % len(data) :])
    connection.settimeout(PATIENCE)
    return taken


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    """Read until these bytes have come, and return all that came."""
    connection.settimeout(PATIENCE)
    received = b""
    while wanted not in received:
        data = connection.recv(65_536)
        assert data, f"the end comes before {wanted!r}: {received!r}"
        received += data
    return received


def rest(connection: socket.socket) -> bytes:
    """Return all that comes until the peer ends its side, or resets the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(1 << 18):
            received += data
    return received


def read_to_end(connection: socket.socket) -> bytes:
    """Return all that comes until the peer ends its side. A reset instead is an error."""
    received = b""
    while data := connection.recv(1 << 18):
        received += data
    return received
