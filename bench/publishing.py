"""How much does a publish over the WebSocket cost, and how many a second does one connection reach?

Method: one client publishes to a topic that nobody follows, in turns of `publishes`, 500 of them unanswered at a time;
the log in memory, in a SQLite file, and in a redis-server on the same core, whose own time is not in the cost. Each
answer must be `published`, in the order of the requests, with an id above the one before. The rate is from the first
request to the last answer; median of the turns.

Not measured: peers, because their clients publish without answers, and deliveries, which fanout.py and burst.py do.
"""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

from load import CheckFailed
from peers import NOTIFYD, REDIS, Peer, notifyd_on
from plan import MEMORY, Figure, Level, Row, Scale
from running import LOAD_CORE, Server, on_core
from websockets.frames import Frame, Opcode

DEPTH, TURNS = 500, 5
REQUEST = {
    "type": "publish",
    "message": "bench",
    "topics": ["nobody"],
    "data": {"number": 0, "by": "000", "pad": "x" * 20},
}
HANDSHAKE = b"\r\n".join(
    (
        *(b"GET /ws HTTP/1.1", b"Host: localhost", b"Upgrade: websocket", b"Connection: Upgrade"),
        *(b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13", b"", b""),
    )
)
ANSWER = re.compile(rb'"published","id":"([^"]+)","recipients":0,"ref":"(\d+)"')
CPU = Row("CPU per publish over a WebSocket", "us", 1, levels=(Level(10),))
RATE = Row("publishes over one WebSocket", "/s", 0, more_is_better=True, levels=(Level(60_000),))
STORED_CPU = Row("CPU per publish over a WebSocket", "us", 1, base=MEMORY)
STORED_RATE = Row("publishes over one WebSocket", "/s", 0, more_is_better=True, base=MEMORY, levels=(Level(40_000),))


@dataclass
class Publishing:
    """A publishing client, and its figures by turn."""

    server: Server
    publishes: int
    costs: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def measure(self) -> None:
        frames = []
        for number in range(self.publishes):
            text = json.dumps({**REQUEST, "ref": str(number)}, separators=(",", ":"))
            frames.append(Frame(Opcode.TEXT, text.encode()).serialize(mask=True))
        with on_core(LOAD_CORE), socket.create_connection(("127.0.0.1", self.server.port)) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.sendall(HANDSHAKE)
            greeting = b""
            while b"welcome" not in greeting:
                greeting += client.recv(1 << 16)
            for turn in range(TURNS + 1):
                cpu, began = self.server.cpu_seconds(), time.perf_counter()
                answers = _exchange(client, frames)
                seconds = time.perf_counter() - began
                if turn:
                    self.costs.append((self.server.cpu_seconds() - cpu) / self.publishes)
                    self.rates.append(self.publishes / seconds)
                _check(answers, self.publishes)


def _exchange(connection: socket.socket, frames: list[bytes]) -> bytes:
    """Send all frames, with DEPTH of them unanswered, and return the answers."""
    answers, sent, answered = bytearray(), 0, 0
    while answered < len(frames):
        if sent - answered <= DEPTH // 2 and sent < len(frames):
            part = frames[sent : answered + DEPTH]
            connection.sendall(b"".join(part))
            sent += len(part)
        # Also an answer that is cut: its beginning counts once, and its rest comes before any after it.
        before = max(0, len(answers) - len(b'"published"') + 1)
        answers += connection.recv(1 << 20)
        answered += answers.count(b'"published"', before)
        if b'"error"' in answers[before:]:
            raise CheckFailed(f"a publish was answered by {bytes(answers[before:])!r:.300}")
    return bytes(answers)


def _check(answers: bytes, publishes: int) -> None:
    found = ANSWER.findall(answers)
    ids = [id for id, _ in found]
    # The last answer may be cut behind its beginning.
    if [int(ref) for _, ref in found][: publishes - 1] != list(range(publishes - 1)) or ids != sorted(set(ids)):
        raise CheckFailed("the answers are not those of the requests, in their order")


@contextlib.contextmanager
def _servers() -> Iterator[dict[str, Server]]:
    with contextlib.ExitStack() as stack:
        flags = ("--publish-over-websocket",)
        peers = {MEMORY: notifyd_on("memory", 1, *flags), "sqlite": notifyd_on("sqlite:{folder}/store", 1, *flags)}
        if REDIS.prepare() is None:
            redis = stack.enter_context(Server(REDIS))
            peers["redis"] = notifyd_on(f"redis://127.0.0.1:{redis.port}", 1, *flags)
        yield {name: stack.enter_context(Server(peer)) for name, peer in peers.items()}


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    with _servers() as servers:
        for name, server in servers.items():
            side = Publishing(server, scale.publishes)
            side.measure()
            if name == MEMORY:
                yield Figure(CPU, median(side.costs) * 1e6)
                yield Figure(RATE, median(side.rates))
            yield Figure(STORED_CPU, median(side.costs) * 1e6, column=name)
            yield Figure(STORED_RATE, median(side.rates), column=name)
