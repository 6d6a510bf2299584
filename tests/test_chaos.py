"""Chaos: two hundred clients with connections that are cut, stalled and lost, and twenty thousand notifications.

Each client ends with exactly its own, in order, or was told where something may be missing. The networks are a
small proxy in the test, which stalls and cuts in the middle of a frame, and resets without a FIN. A seed, CHAOS_SEED,
decides the faults of each client; their time depends on the machine.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from bytes import masked
from conftest import StartServer
from processes import Server, eventually, free_port, is_free, workers
from redis_server import RedisServer
from websockets.client import ClientProtocol
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("CHAOS_SEED", "4"))
CLIENTS, NOTIFICATIONS, BATCH = 200, 20_000, 100
TOPICS = [f"topic{number}" for number in range(40)]
# Two or three clients belong to each.
USERS = 70
MISHAPS_PER_BATCH = 5
# For clients that leave the old connection hanging, noticed by the server after two seconds: once in so many batches.
BATCHES_PER_VANISHING = 10
STALLED_BATCHES = 20
SMALL_BUFFER = 4096
SLOW = re.compile(r"Slow consumer: \d+ notifications behind; resume with since=(\S+)")
PATIENCE = 20.0
# Until all have read what they missed: a run takes 13 s alone, and 160 s beside two others on two cores.
CATCH_UP_SECONDS = 120.0


def reset(transport: Any) -> None:
    """Break off without a FIN."""
    if not transport.is_closing():
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


# --- the network


class Link:
    """One connection through the proxy."""

    def __init__(self) -> None:
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.left: int | None = None  # the bytes that still get through to the client

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, limited: bool) -> None:
        """Pass bytes on in one direction until one side ends, or the link is cut."""
        with suppress(ConnectionError):
            while self.left != 0 and (data := await reader.read(16_384)):
                await self.flowing.wait()
                if limited and self.left is not None:
                    data = data[: self.left]
                    self.left -= len(data)
                writer.write(data)
                await writer.drain()


class Proxy:
    """A network between clients and the server that holds back little, and stalls and cuts where it is told."""

    def __init__(self, server: Server) -> None:
        self.address = server.host, server.port
        self.links: dict[Any, Link] = {}  # by the address of the client's end
        self._serving: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=SMALL_BUFFER)
        self.port = self._listener.sockets[0].getsockname()[1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = socket.socket()
        # A small window and small segments, or the server's kernel would take megabytes for a stalled client.
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
        upstream.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(upstream, self.address)
        except OSError:
            # The server is gone for a moment.
            upstream.close()
            reset(writer.transport)
            return
        up_reader, up_writer = await asyncio.open_connection(sock=upstream, limit=SMALL_BUFFER)
        client_end = writer.get_extra_info("peername")
        link = self.links[client_end] = Link()
        pumps = [
            asyncio.ensure_future(link.pump(up_reader, writer, limited=True)),
            asyncio.ensure_future(link.pump(reader, up_writer, limited=False)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            reset(writer.transport)
            reset(up_writer.transport)
            if self.links[client_end] is link:
                del self.links[client_end]

    async def stop(self) -> None:
        self._listener.close()
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


# --- the clients


class WebSocketBytes:
    """A WebSocket without I/O, by the `websockets` library."""

    def __init__(self, address: tuple[str, int], query: str) -> None:
        self._protocol = ClientProtocol(parse_uri(f"ws://{address[0]}:{address[1]}/ws?{query}"), max_size=None)
        self._protocol.send_request(self._protocol.connect())

    def messages(self, data: bytes) -> Iterator[bytes]:
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode is Opcode.TEXT:
                yield bytes(event.data)

    def to_send(self) -> bytes:
        return b"".join(self._protocol.data_to_send())

    def say(self, **message: str) -> None:
        # It may have been closed by a frame just before.
        with suppress(InvalidState):
            self._protocol.send_text(orjson.dumps(message))

    def half_a_message(self) -> bytes:
        return masked(Opcode.TEXT, b'{"type": "ping"}')[:-7]

    @property
    def reason(self) -> str:
        received = self._protocol.close_rcvd
        return received.reason if received else ""


class StreamBytes:
    """A stream of Server-Sent Events without I/O. HTTP/1.0, so that the body comes as it is."""

    def __init__(self, address: tuple[str, int], query: str) -> None:
        self._to_send = f"GET /events?{query} HTTP/1.0\r\nHost: {address[0]}:{address[1]}\r\n\r\n".encode()
        self._buffer = b""
        self._in_body = False
        self.reason = ""

    def messages(self, data: bytes) -> Iterator[bytes]:
        *blocks, self._buffer = (self._buffer + data).replace(b"\r\n\r\n", b"\n\n").split(b"\n\n")
        for block in blocks:
            if block.startswith(b"HTTP/"):
                self._in_body = b" 200 " in block
            elif b"event: closed\n" in block:
                self.reason = orjson.loads(block.partition(b"data: ")[2])["reason"]
            elif self._in_body and b"data: " in block:
                yield block.partition(b"data: ")[2]

    def to_send(self) -> bytes:
        data, self._to_send = self._to_send, b""
        return data

    def half_a_message(self) -> bytes:
        return b""


class Connection(asyncio.Protocol):
    """One connection of a client."""

    def __init__(
        self, protocol: WebSocketBytes | StreamBytes, take: Callable[[Any], None], *, is_proxied: bool
    ) -> None:
        self.protocol = protocol
        self.take = take
        self.is_proxied = is_proxied
        self.newest = ""
        self.ended = asyncio.Event()  # for the client
        self.is_gone = asyncio.Event()
        self.is_abandoned = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.protocol.to_send())

    def data_received(self, data: bytes) -> None:
        if self.is_abandoned:
            return
        for message in self.protocol.messages(data):
            if self.transport.is_closing():
                return
            self.take(orjson.loads(message))
        if answer := self.protocol.to_send():
            self.transport.write(answer)

    def connection_lost(self, _: Exception | None) -> None:
        self.ended.set()
        self.is_gone.set()

    def abandon(self) -> None:
        """Go on as if it had ended, and leave it to hang."""
        self.is_abandoned = True
        self.ended.set()


class Client:
    """A client that comes back with the id of the last notification it received, until it has the last of all.

    Or it has the server remember: it acknowledges some of the notifications, and comes back with `since=acked`.
    """

    def __init__(self, number: int, chance: random.Random, proxy: Proxy, *, may_acknowledge: bool = False) -> None:
        self.name = f"client{number}"
        self.bytes = StreamBytes if number % 10 == 0 else WebSocketBytes
        self.acknowledges = may_acknowledge and number % 2 == 1
        self.again = 0  # notifications that it received more than once
        self.topics = chance.sample(TOPICS, 2)
        self.user = f"user|{number % USERS}"
        self.chance = chance
        self.proxy = proxy
        self.position = ""
        self.received: list[int] = []
        self.expected: list[int] = []
        self.gaps: list[int] = []  # how many were received when it was told complete: false
        self.connections: list[Connection] = []
        self.connection: Connection | None = None
        self.faults: list[str] = []
        self.is_ready = asyncio.Event()
        # Returns after so many batches; without it the client comes back at once.
        self.stay_away: Callable[[int], Awaitable[None]] | None = None

    async def run(self) -> None:
        while not self.is_done():
            await self._connect_once()
            if self.stay_away is not None and self.position:
                await self.stay_away(self.chance.randint(0, 20))

    def is_done(self) -> bool:
        return NOTIFICATIONS in self.received[-1:]

    async def _connect_once(self) -> None:
        """Resume, directly or through the proxy, and receive until the connection is lost."""
        is_proxied = self.chance.random() < 0.5
        address = ("127.0.0.1", self.proxy.port) if is_proxied else self.proxy.address
        since = "acked" if self.acknowledges else self.position
        query = f"client_id={self.name}&user={self.user}&topics={','.join(self.topics)}&since={since}"
        connection = Connection(self.bytes(address, query), self.take, is_proxied=is_proxied)
        if self.acknowledges:
            connection.take = partial(self.take_and_acknowledge, connection)
        with suppress(ConnectionError):
            await asyncio.get_running_loop().create_connection(lambda: connection, *address)
            self.connection = connection
            self.connections.append(connection)
            await connection.ended.wait()
            if slow := SLOW.fullmatch(connection.protocol.reason):
                self.position = slow[1]
            return
        # Nobody listens for a moment.
        await asyncio.sleep(0.05)

    def take(self, message: Any) -> None:
        if "id" in message:
            if message["id"] <= self.position:
                self.faults.append(f"{message} again, or out of order, after {self.position}")
            self.position = message["id"]
            self.received.append(int(message["data"]["message"]))
            if self.is_done() and self.connection is not None:
                self.connection.transport.close()
        elif message["type"] == "resume":
            self.position = self.position or message["data"]["position"]
            self.is_ready.set()
            if not message["data"]["complete"]:
                self.gaps.append(len(self.received))

    def take_and_acknowledge(self, connection: Connection, message: Any) -> None:
        """Take a notification at least once, in order on each connection, and acknowledge one of three."""
        assert isinstance(connection.protocol, WebSocketBytes)
        if "id" in message:
            if message["id"] <= connection.newest:
                self.faults.append(f"{message} again, or out of order, after {connection.newest}")
            connection.newest = self.position = message["id"]
            number = int(message["data"]["message"])
            if not self.received or number > self.received[-1]:
                self.received.append(number)
            else:
                self.again += 1
            if number % 3 == 0:
                connection.protocol.say(type="ack", id=message["id"])
            if self.is_done():
                connection.transport.close()
        elif message["type"] == "resume":
            if not self.is_ready.is_set():
                # From here on it misses nothing; the answer to the ping says that the server has heard of it.
                connection.protocol.say(type="ack", id=message["data"]["position"])
                connection.protocol.say(type="ping")
            elif not message["data"]["complete"]:
                self.gaps.append(len(self.received))
        elif message["type"] == "pong":
            self.is_ready.set()

    # Its faults.

    def link(self) -> Link | None:
        """Its connection through the proxy, if it has one."""
        if self.connection is None or not self.connection.is_proxied:
            return None
        return self.proxy.links.get(self.connection.transport.get_extra_info("sockname"))

    def suffer(self, *, may_vanish: bool) -> Link | None:
        """Lose the connection in one of many ways, or at once or later; return a link that has stalled."""
        connection, link = self.connection, self.link()
        if connection is None or connection.transport.is_closing():
            return None
        if link is None:
            connection.transport.write(self.chance.choice([b"", connection.protocol.half_a_message()]))
            self.chance.choice([reset, type(connection.transport).close])(connection.transport)
        elif may_vanish:
            link.flowing.clear()
            connection.abandon()
            return link
        elif self.chance.random() < 0.7:
            link.left = self.chance.randint(1, 3000)
        else:
            link.flowing.clear()
            return link
        return None

    def verdict(self) -> str:
        """Say whether it has exactly its own, or exactly its own between the places where it was told of a gap."""
        if self.faults:
            return self.faults[0]
        if self.received == self.expected:
            return "whole"
        bounds = [0, *self.gaps, len(self.received)]
        for start, end in pairwise(bounds):
            part = self.received[start:end]
            first = self.expected.index(part[0]) if part and part[0] in self.expected else 0
            if part != self.expected[first : first + len(part)]:
                return f"{self.name} has {part[:20]}... and should have {self.expected[first : first + 20]}..."
        return "told" if self.gaps else f"{self.name} lacks {set(self.expected) - set(self.received)} and was not told"


# --- the storm


class Storm:
    """Publishes everything, and lets the clients suffer meanwhile."""

    def __init__(self, server: Server, blows: Sequence[Callable[[Storm], None]] = ()) -> None:
        self.server = server
        # Come at equal distances. Then clients also stay away, and some acknowledge.
        self.blows = blows
        self.batches = asyncio.Condition()
        self.published = 0
        self.chance = random.Random(SEED)
        self.proxy = Proxy(server)
        self.clients: list[Client] = []
        self.stalled: list[tuple[int, Link]] = []  # and the batch after which they go on

    async def rage(self) -> None:
        await self.proxy.start()
        seeds = [self.chance.randrange(2**32) for _ in range(CLIENTS)]
        self.clients = [
            Client(number, random.Random(seed), self.proxy, may_acknowledge=bool(self.blows))
            for number, seed in enumerate(seeds)
        ]
        if self.blows:
            for client in self.clients:
                client.stay_away = self.until_more
        lives = [asyncio.ensure_future(client.run()) for client in self.clients]
        await everyone(client.is_ready.wait() for client in self.clients)
        blows = iter(self.blows)
        for count in range(NOTIFICATIONS // BATCH):
            await self.publish([self.notification(count * BATCH + number) for number in range(BATCH)])
            self.happen(count)
            if self.blows and count and not count % (NOTIFICATIONS // BATCH // (len(self.blows) + 1)):
                await asyncio.to_thread(next(blows, lambda _: None), self)
            async with self.batches:
                self.published = count + 1
                self.batches.notify_all()
        await self.publish([self.broadcast(NOTIFICATIONS)])
        self.release(NOTIFICATIONS)
        # Clients that follow different topics share no pages of the log.
        await asyncio.wait_for(asyncio.gather(*lives), CATCH_UP_SECONDS)
        await self.proxy.stop()
        await everyone(connection.is_gone.wait() for client in self.clients for connection in client.connections)

    async def until_more(self, batches: int) -> None:
        """Return when so many more have been published, or all."""
        until = min(self.published + batches, NOTIFICATIONS // BATCH)
        async with self.batches:
            await self.batches.wait_for(lambda: self.published >= until)

    async def publish(self, notifications: list[dict[str, Any]]) -> None:
        """Publish a batch, again if its worker is killed or its store is away meanwhile."""
        headers = {"Idempotency-Key": notifications[0]["message"]}
        while True:
            with suppress(httpx.TransportError):
                request = partial(self.server.request, json=notifications, headers=headers)
                response = await asyncio.to_thread(request, "POST", "/notify/batch")
                if response.status_code == 200:
                    return
                assert response.status_code == 503 and self.blows, response.text
            await asyncio.sleep(0.05)

    def notification(self, number: int) -> dict[str, Any]:
        """Draw an audience: everyone, one or two topics or users, or up to three clients."""
        drawn = self.chance.random()
        if drawn < 0.03:
            return self.broadcast(number)
        if drawn < 0.36:
            users = {client.user for client in self.chance.sample(self.clients, self.chance.randint(1, 2))}
            self.expect(number, [client for client in self.clients if client.user in users])
            return {"message": str(number), "users": sorted(users)}
        if drawn < 0.7:
            topics = self.chance.sample(TOPICS, self.chance.randint(1, 2))
            self.expect(number, [client for client in self.clients if {*topics} & {*client.topics}])
            return {"message": str(number), "topics": topics}
        clients = self.chance.sample(self.clients, self.chance.randint(1, 3))
        self.expect(number, clients)
        return {"message": str(number), "clients": [client.name for client in clients]}

    def broadcast(self, number: int) -> dict[str, Any]:
        self.expect(number, self.clients)
        return {"message": str(number), "data": {"pad": "x" * 1000}}

    def expect(self, number: int, clients: list[Client]) -> None:
        for client in clients:
            client.expected.append(number)

    def happen(self, count: int) -> None:
        """Let some clients suffer, and those go on that have stalled for long."""
        for client in self.chance.sample(self.clients, MISHAPS_PER_BATCH):
            if link := client.suffer(may_vanish=False):
                self.stalled.append((count + self.chance.randint(1, STALLED_BATCHES), link))
        if not count % BATCHES_PER_VANISHING and (link := self.chance.choice(self.clients).suffer(may_vanish=True)):
            self.stalled.append((NOTIFICATIONS, link))
        self.release(count)

    def release(self, count: int) -> None:
        for until, link in self.stalled:
            if until <= count:
                link.flowing.set()
        self.stalled = [(until, link) for until, link in self.stalled if until > count]


async def everyone(waiting: Any) -> None:
    await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE)


def storm(server: Server, *blows: Callable[[Storm], None]) -> Storm:
    """Let it rage, and return it when it is over. With blows, clients stay away, and some have the server remember."""
    raging = Storm(server, blows)
    asyncio.run(raging.rage())
    assert sum(len(client.connections) for client in raging.clients) > 3 * CLIENTS
    return raging


def test_with_history_enough_everyone_ends_with_exactly_its_own(start_server: StartServer) -> None:
    """Nobody is told that something may be missing, because nothing is."""
    clients = storm(start_server("--history-size", "30000")).clients
    assert Counter(client.verdict() for client in clients) == {"whole": CLIENTS}
    assert not any(client.gaps for client in clients)


def test_with_too_little_history_everyone_is_whole_or_was_told(start_server: StartServer) -> None:
    """A client that was away for longer than the history misses nothing before and after the gap."""
    clients = storm(start_server("--history-size", "1000")).clients
    assert {client.verdict() for client in clients} == {"whole", "told"}


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str | RedisServer]:
    """The URL of a SQLite file, or a Redis that loses nothing when it is killed."""
    if request.param == "sqlite":
        yield f"sqlite:{tmp_path}/log.db"
        return
    redis = RedisServer(append_only=True)
    yield redis
    redis.close()


def test_with_a_log_larger_than_memory_everyone_ends_with_exactly_its_own(
    start_server: StartServer, store: str | RedisServer
) -> None:
    """About 500 notifications are in memory, and clients are away half of the time.

    A worker, the parent and Redis are killed meanwhile. Clients that come back with `since` get everything once, those
    with `since=acked` at least once.
    """
    url = store if isinstance(store, str) else store.url
    flags = ("--workers", "2", "--store", url, "--history-size", "30000", "--cache-bytes", "260000")
    flags += "--port", str(free_port()), "--store-timeout", "10"

    def kill_a_worker(raging: Storm) -> None:
        os.kill(min(workers(raging.server)), signal.SIGKILL)

    def kill_the_parent(raging: Storm) -> None:
        killed = raging.server
        os.kill(killed.pid, signal.SIGKILL)
        # Its workers let go of the port when they notice it.
        eventually(lambda: is_free(killed.port))
        raging.server = start_server(*flags)

    def kill_redis(raging: Storm) -> None:
        if isinstance(store, RedisServer):
            store.kill()
            store.start()

    raging = storm(start_server(*flags), kill_a_worker, kill_redis, kill_the_parent)
    assert Counter(client.verdict() for client in raging.clients) == {"whole": CLIENTS}
    assert not any(client.gaps for client in raging.clients)
    assert sum(client.again for client in raging.clients if client.acknowledges) > 0
