"""What does compression save on the wire, and what does it cost?

Method: two notifyd with --compression auto take turns (turns.py); the clients of one offer permessage-deflate, those of
the other do not. Notifications are a kilobyte of JSON, published one at a time. All clients have to receive the same
bytes, which are inflated and checked. The figures are the bytes of a client by those of the other, the CPU per delivery
by the other's, and the memory of an idle connection beyond the other's.

Not measured: peers. Those that compress do so for each connection.
"""

import http.client
import json
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count

from load import CheckFailed, Load
from peers import NOTIFYD, Peer
from plan import Figure, Level, Row, Scale
from running import Server
from turns import Side, ratio, take_turns

OFFER = "permessage-deflate; client_max_window_bits"
ITEMS = 15
COMPRESSED_TEXT, TEXT = 0xC1, 0x81
COMPRESSED = NOTIFYD.with_flags("--compression", "auto")


def _payloads(stream: bytes) -> Iterator[bytes]:
    while stream:
        first, size, start = stream[0], stream[1], 2
        if size == 126:
            size, start = int.from_bytes(stream[2:4], "big"), 4
        payload, stream = stream[start : start + size], stream[start + size :]
        if first not in (TEXT, COMPRESSED_TEXT) or len(payload) < size:
            raise CheckFailed(f"not a frame: {first:02x}, {size} bytes")
        yield zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff") if first == COMPRESSED_TEXT else payload


class _Publisher:
    """Publishes state as programs have it, and checks that all of it has come."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self._numbers = count()
        self._connection = http.client.HTTPConnection("127.0.0.1", load.server.port)
        self.received = 0

    def publish(self, notifications: int) -> list[float]:
        numbers = [next(self._numbers) for _ in range(notifications)]
        for number in numbers:
            items = [
                {"name": f"sensor-{(number * 7 + i) % 900}", "state": "on", "value": (number + i) / 7}
                for i in range(ITEMS)
            ]
            body = json.dumps({"message": f"reading {number}", "data": {"number": number, "items": items}})
            self._connection.request("POST", "/notify", body, {"Content-Type": "application/json"})
            if (answer := self._connection.getresponse()).status != 200:
                raise CheckFailed(f"a publish was answered by {answer.status}")
            answer.read()
        stream = self.load.drain()
        self.received += len(stream)
        if [json.loads(payload)["data"]["number"] for payload in _payloads(stream)] != numbers:
            raise CheckFailed("not as it was published")
        return []


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    each = scale.notifications_a_turn
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(COMPRESSED)) for _ in range(2)]
        loads = [
            stack.enter_context(Load(server, offer=offer)) for server, offer in zip(servers, (OFFER, ""), strict=True)
        ]
        memory = []
        for load in loads:
            before = load.server.rss_bytes()
            load.connect(scale.many_clients)
            load.server.cpu_seconds()  # waits until it sleeps
            memory.append((load.server.rss_bytes() - before) / scale.many_clients / 1024)
            load.disconnect()
            load.connect(scale.clients)
        publishers = [_Publisher(load) for load in loads]
        compressed, plain = [Side(p.load, partial(p.publish, each), each) for p in publishers]
        take_turns(scale.pairs, compressed, plain)
    title = "a kilobyte of JSON: bytes to a client, uncompressed by compressed"
    row = Row(title, "x", 2, more_is_better=True, base=None, levels=(Level(3),))
    yield Figure(row, publishers[1].received / publishers[0].received)
    title = f"the same: CPU per delivery, {scale.clients:,} clients, compressed by uncompressed"
    row = Row(title, "x", 2, base=None, levels=(Level(1.1),))
    cost = compressed.cost() / scale.clients * 1e6
    yield Figure(row, ratio(compressed, plain), remark=f"{cost:.2f} us")
    title = f"the same: memory per idle connection, {scale.many_clients:,} clients, compressed beyond uncompressed"
    yield Figure(Row(title, "KiB", 2, base=None, levels=(Level(0.1),)), memory[0] - memory[1])
