"""The crowd of a soak: clients that must miss nothing, through all faults, and peers that send garbage.

A client here is an asyncio.Protocol without a library, because two thousand share one core with the server. It records
its notifications, to compare with the published ones.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import sys
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import orjson
from bytes import HANDSHAKE, handshake, masked
from websockets.frames import Opcode

HEAVY = "heavy"
TOPICS = 50
POST = b"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


@dataclass
class Soak:
    """The server's address, the published notifications, and the events so far."""

    address: tuple[str, int]
    chance: random.Random
    # The topics of the published notifications by their number; None for those that are for everyone.
    published: list[str | None] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    # Beside being cancelled: before Python 3.12 wait_for() may swallow that.
    is_over: bool = False

    def expected(self, topic: str) -> array[int]:
        return array("I", (number for number, to in enumerate(self.published) if to in (None, topic)))


class Link(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.welcomed = asyncio.Event()
        self.ended = asyncio.Event()
        self.is_leaving = False
        self.transport: asyncio.Transport | None = None
        self._data = b""
        self._is_open = False

    def itself(self) -> Link:
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def data_received(self, data: bytes) -> None:
        data = self._data + data
        position = 0
        if not self._is_open:
            if (end := data.find(b"\r\n\r\n")) < 0:
                self._data = data
                return
            if not data.startswith(b"HTTP/1.1 101 "):
                self.client.fails(f"was answered {data[:100]!r}")
            self._is_open, position = True, end + 4
        while len(data) - position >= 2:
            size, start = data[position + 1], position + 2
            if size == 126:
                size, start = int.from_bytes(data[start : start + 2], "big"), start + 2
            elif size == 127:
                size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
            if len(data) < start + size:
                break
            self._take(data[position] & 0x0F, data[start : start + size])
            position = start + size
        self._data = data[position:]

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == Opcode.PING and not self.is_leaving:
            self.transport.write(masked(Opcode.PONG, payload))
        elif opcode == Opcode.CLOSE:
            self.client.closed(payload[2:].decode())
            if not self.is_leaving:
                self.transport.write(masked(Opcode.CLOSE, payload[:2]))
            self.transport.close()
        elif payload.startswith(b'{"type":"welcome"'):
            self.welcomed.set()
        elif payload.startswith((b'{"id":', b'{"type":"resume"')):
            self.client.received(orjson.loads(payload))


class Client:
    """One client_id through all of its connections. It resumes where it was."""

    def __init__(self, soak: Soak, name: str, topic: str, *, may_miss: bool) -> None:
        self.soak = soak
        self.name = name
        self.topic = topic
        # Whether it may be away for longer than the log reaches back; it is then told that it missed some.
        self.may_miss = may_miss
        self.has_missed = False
        self.got = array("I")
        self.last_id = ""
        self.link: Link

    async def connect(self) -> None:
        """Come, or come back, and be welcomed, however often it is refused."""
        loop = asyncio.get_running_loop()
        while True:
            link = self.link = Link(self)
            with suppress(OSError):
                place = socket.socket()
                place.setblocking(False)
                if self.topic == HEAVY:
                    # So that the server notices soon when nothing is read.
                    place.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
                await loop.sock_connect(place, self.soak.address)
                await loop.create_connection(link.itself, sock=place)
                link.transport.write(handshake(f"/ws?client_id={self.name}&topics={self.topic}&since={self.last_id}"))
                waits = [asyncio.ensure_future(event.wait()) for event in (link.welcomed, link.ended)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                if link.welcomed.is_set():
                    self.soak.counts["connections"] += 1
                    return
            await asyncio.sleep(self.soak.chance.uniform(0.2, 1))

    async def leave(self) -> None:
        """Leave in one of the ways of real clients."""
        transport, way = self.link.transport, self.soak.chance.randrange(4)
        if transport is None:
            # It was about to come.
            return
        self.link.is_leaving = True
        if transport.is_closing():
            pass
        elif way == 0:
            transport.write(masked(Opcode.CLOSE, b"\x03\xe8"))
        elif way == 1:
            transport.write_eof()
        elif way == 2:
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            transport.abort()
        else:
            transport.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.link.ended.wait(), 10)
        transport.abort()

    def fails(self, how: str) -> None:
        self.soak.failures.append(f"{self.name} {how}")

    def closed(self, reason: str) -> None:
        if reason:
            self.soak.counts[f"closed: {reason.partition(':')[0].replace(self.name, '...')}"] += 1
        if reason.startswith("Slow consumer") and not reason.endswith(self.last_id):
            self.fails(f"got up to {self.last_id} and was told: {reason}")

    def received(self, message: dict[str, Any]) -> None:
        if message["type"] == "resume":
            self.soak.counts["replayed"] += message["data"]["replayed"]
            self.last_id = self.last_id or message["data"]["position"]
            if not message["data"]["complete"]:
                self.has_missed = True
                self.soak.counts["resumed too late"] += 1
                if not self.may_miss:
                    self.fails(f"was told that the log does not reach back to {self.last_id}")
            return
        if message["type"] == "soak":
            self.got.append(message["data"]["n"])
            self.soak.counts["deliveries"] += 1
        self.last_id = message["id"]

    def is_late(self, expected: array[int]) -> bool:
        return self.got[-1:] != expected[-1:]

    def is_right(self, expected: array[int]) -> bool:
        """Whether it has received everything, once and in order; or where it may miss some, the rest."""
        if self.has_missed:
            return list(self.got) == sorted(set(self.got) & set(expected))
        return self.got == expected


async def stay(client: Client) -> None:
    """Stay to the end, without being cut off."""
    await client.link.ended.wait()
    client.fails("was cut off")


async def come_and_go(client: Client) -> None:
    """Stay for seconds, leave, and come back."""
    chance = client.soak.chance
    while not client.soak.is_over:
        with suppress(TimeoutError):
            await asyncio.wait_for(client.link.ended.wait(), chance.uniform(0.5, 10))
        await client.leave()
        client.soak.counts["departures"] += 1
        await asyncio.sleep(chance.uniform(0, 3))
        await client.connect()


async def stall(client: Client) -> None:
    """Read nothing for seconds, again and again, and come back when that was too long."""
    chance = client.soak.chance
    while not client.soak.is_over:
        client.link.transport.pause_reading()
        client.soak.counts["stalls"] += 1
        await asyncio.sleep(chance.uniform(1, 40))
        await read_on(client, chance.uniform(1, 5))


async def read_on(client: Client, seconds: float) -> None:
    """Stay connected and read, for so long."""
    if not client.link.ended.is_set():
        client.link.transport.resume_reading()
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                await client.link.ended.wait()
                await client.connect()


async def send_garbage(soak: Soak) -> None:
    """Open one connection after the other, send garbage, and break off."""
    while not soak.is_over:
        with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            async with asyncio.timeout(2):
                reader, writer = await asyncio.open_connection(*soak.address)
                try:
                    writer.write(_garbage(soak.chance))
                    await writer.drain()
                    if soak.chance.random() < 0.5:
                        writer.write_eof()
                    while await reader.read(65_536):
                        pass
                finally:
                    writer.transport.abort()
        soak.counts["garbage"] += 1
        await asyncio.sleep(soak.chance.uniform(0, 0.5))


def _garbage(chance: random.Random) -> bytes:
    noise = chance.randbytes(chance.randrange(1, 2000))
    body = chance.choice([b"[" * 1000, b'{"message": 1}', b'{"message": "\\ud800"}', noise])
    frames = chance.choice(
        [
            noise,
            b"\x81\x05Hello",
            b"\x82\xff\x7f" + b"\xff" * 11,
            masked(Opcode.CLOSE, b"\x03\xed"),
            masked(Opcode.TEXT, noise),
            masked(Opcode.TEXT, b'{"type": "ping"}') * 200,
            masked(Opcode.PING, b"x" * 125) * 1000,
            masked(Opcode.TEXT, b"", fin=False) + masked(Opcode.CONT, b"", fin=False) * 1000,
            masked(Opcode.TEXT, b'{"type": "subscribe", "topics": ["\\u0000"]}'),
        ]
    )
    return chance.choice(
        [
            noise,
            b"GET /" + noise,
            b"GET /health HTTP/1.1\r\nX: " + b"x" * 70_000,
            HANDSHAKE[: chance.randrange(1, 100)],
            handshake(f"/ws?client_id=%0d%0a&since={chance.random()}"),
            POST % len(body) + body,
            POST % 1_000_000 + body,
            b"POST /notify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + noise,
            b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n" * 2,
            *[HANDSHAKE + frames] * 5,
        ]
    )
