"""Clients for the tests: an ordinary one, one on a bare socket that may do anything, and a crowd that comes at once."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from contract_oracle import check_message
from expected import parse
from websockets.asyncio.client import connect as connect_async
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Response
from websockets.sync.client import ClientConnection
from websockets.uri import parse_uri

PATIENCE = 20.0  # Seconds until an event that should come counts as missing; the machine may be busy.


def parse_message(text: str | bytes) -> Any:
    """Parse a message to a client. Fails for an object that is none of the contract's."""
    message = parse(text)
    if isinstance(message, dict):
        # Other apps than notifyd's answer with other values.
        check_message(message)
    return message


class Client:
    """A well-behaved client: `websockets` answers pings and closes for it."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def receive(self, timeout: float = PATIENCE) -> Any:
        """Return the next message; the server's are text frames, each with one JSON object."""
        text = self.connection.recv(timeout)
        assert isinstance(text, str), f"not a text frame: {text!r}"
        return parse_message(text)

    def receive_many(self, count: int) -> list[Any]:
        return [self.receive() for _ in range(count)]

    def send(self, message: object) -> None:
        """Send text and bytes as they are, anything else as JSON."""
        self.connection.send(message if isinstance(message, str | bytes) else json.dumps(message))

    def ask(self, message: object) -> Any:
        """Send a message and return the next one that comes."""
        self.send(message)
        return self.receive()

    def rest(self) -> list[Any]:
        """Read to the end and return every message before it."""
        messages = []
        try:
            while True:
                messages.append(self.receive())
        except ConnectionClosed:
            return messages

    def closed(self) -> tuple[object, object]:
        """Read to the end and return the close code and the reason."""
        self.rest()
        return self.connection.close_code, self.connection.close_reason

    def leave(self, code: int = 1000) -> None:
        self.connection.close(code)


class BareClient:
    """A client on a bare socket: sends any bytes, answers nothing by itself, reads only when told."""

    def __init__(self, ws_url: str, *, receive_buffer: int | None = None) -> None:
        address = urlsplit(ws_url)
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        self.socket.connect((address.hostname, address.port))
        self._protocol = ClientProtocol(parse_uri(ws_url), max_size=None)
        self._frames: deque[Frame] = deque()
        self._ended = False
        self._protocol.send_request(self._protocol.connect())
        self.socket.sendall(b"".join(self._protocol.data_to_send()))
        while self._protocol.handshake_exc is None and not self._read():
            pass
        if self._protocol.handshake_exc is not None:
            raise self._protocol.handshake_exc

    def _read(self) -> bool:
        """Read once from the socket; return whether the handshake's answer was in it."""
        try:
            data = self.socket.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        if data:
            self._protocol.receive_data(data)
        else:
            self._ended = True
            self._protocol.receive_eof()
        answered = False
        for event in self._protocol.events_received():
            if isinstance(event, Response):
                answered = True
            else:
                assert isinstance(event, Frame)
                self._frames.append(event)
        return answered or self._ended

    def frame(self) -> Frame | None:
        """Return the next frame of any kind, or None at the end of the stream."""
        while not self._frames and not self._ended:
            self._read()
        return self._frames.popleft() if self._frames else None

    def next_frame(self, opcode: Opcode) -> Frame:
        """Return the next frame of one kind, dropping those before it."""
        while (frame := self.frame()) is not None:
            if frame.opcode is opcode:
                return frame
        raise EOFError(f"the stream ended before a frame {opcode.name}")

    def receive(self) -> Any:
        """Return the next message."""
        return parse_message(bytes(self.next_frame(Opcode.TEXT).data))

    def rest(self) -> list[Any]:
        """Read to the server's close or the end of the stream, and return every message before it."""
        messages = []
        deadline = time.monotonic() + 4 * PATIENCE
        while (frame := self.frame()) is not None and frame.opcode is not Opcode.CLOSE:
            assert time.monotonic() < deadline, "the server neither closes nor ends the stream"
            if frame.opcode is Opcode.TEXT:
                messages.append(parse_message(bytes(frame.data)))
        return messages

    def closed(self) -> tuple[object, object]:
        """Read on, and return the close code and the reason: 1006 where no close frame came."""
        if self._protocol.close_rcvd is None:
            self.rest()
        received = self._protocol.close_rcvd
        return (received.code, received.reason) if received else (1006, "")

    def send(self, message: object) -> None:
        self.send_frame(Opcode.TEXT, json.dumps(message).encode())

    def send_frame(self, opcode: Opcode, payload: bytes, *, fin: bool = True) -> None:
        self.socket.sendall(Frame(opcode, payload, fin).serialize(mask=True))

    def send_close(self, code: int = CloseCode.NORMAL_CLOSURE) -> None:
        self.send_frame(Opcode.CLOSE, struct.pack("!H", code))

    def reset(self) -> None:
        """Break off without a FIN: the server sees a connection reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


def claims(urls: Iterable[str]) -> list[str]:
    """Open all these connections at once; return the first message's type or the close reason of each, in any order.

    An admitted client stays connected until all have their answer.
    """
    addresses = list(urls)

    async def everyone() -> list[str]:
        answered = asyncio.Barrier(len(addresses))
        return await asyncio.gather(*(_claim(address, answered) for address in addresses))

    return asyncio.run(everyone())


async def _claim(url: str, answered: asyncio.Barrier) -> str:
    options = {"compression": None, "ping_interval": None, "proxy": None, "close_timeout": 2, "open_timeout": PATIENCE}
    async with connect_async(url, **options) as connection:
        try:
            met = str(parse_message(await asyncio.wait_for(connection.recv(), PATIENCE))["type"])
        except ConnectionClosed:
            met = str(connection.close_reason)
        await asyncio.wait_for(answered.wait(), 2 * PATIENCE)
        return met
