"""How much do two workers on a shared store cost, compared with one process without one?

Method: four notifyd take turns (turns.py): one process with its log in memory, two workers on a SQLite file, two on a
redis-server (appendonly yes, appendfsync everysec), and two with --store-replicas 1 on another that has a replica.
Latency is from the first byte of the publish to the last byte at the last of 32 clients, which the kernel spreads over
both workers; the publisher is connected to one of them. CPU time is that of the parent and its workers together; that
of Redis is shown separately, without its replica. For deliveries it is measured one notification at a time, and in a
burst as in burst.py; for handshakes as in handshake.py; publishes per second as in publish.py.

Workers and Redis share one core, as all servers do in the bench.

Not measured: more workers, and a Redis on another machine, with the network's round trips.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles

from burst import CONNECTIONS, DEPTH
from load import Load
from peers import NOTIFYD, REDIS, Peer, notifyd_on
from plan import MEMORY, Figure, Level, Row, Scale
from publish import TITLE as PUBLISH_TITLE
from publish import rate
from running import Server
from turns import Side, ratio, take_turns

WORKERS = 2
# Enough for both workers to have some: all are on one worker once in 2 ** 31 runs.
FEW = 32

Servers = dict[str, tuple[Server, Server | None]]


@dataclass
class _Side(Side):
    """One notifyd, and its store where that is a server of its own."""

    store: Server | None = None
    # CPU seconds of the store for each notification, by turn.
    store_costs: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        before = self.store.cpu_seconds() if self.store else 0.0
        super().take_turn()
        if self.store:
            self.store_costs.append((self.store.cpu_seconds() - before) / self.notifications)


@contextlib.contextmanager
def _servers() -> Iterator[Servers]:
    """One notifyd for each store that the machine has, by its name, and the store where that is a server."""
    with contextlib.ExitStack() as stack:
        peers: dict[str, tuple[Peer, Server | None]] = {
            MEMORY: (NOTIFYD, None),
            "sqlite": (notifyd_on("sqlite:{folder}/store", WORKERS), None),
        }
        if REDIS.prepare() is None:
            redis = stack.enter_context(Server(REDIS))
            peers["redis"] = notifyd_on(f"redis://127.0.0.1:{redis.port}", WORKERS), redis
            primary, replica = stack.enter_context(Server(REDIS)), stack.enter_context(Server(REDIS))
            _follow(replica, primary)
            url = f"redis://127.0.0.1:{primary.port}"
            peers["redis, 1 replica"] = notifyd_on(url, WORKERS, "--store-replicas", "1"), primary
        yield {name: (stack.enter_context(Server(peer)), store) for name, (peer, store) in peers.items()}


def _follow(replica: Server, primary: Server) -> None:
    """Make a Redis the replica of another, and wait until it is."""
    with socket.create_connection(("127.0.0.1", replica.port)) as connection:
        connection.sendall(b"REPLICAOF 127.0.0.1 %d\r\n" % primary.port)
        while b"connected" not in connection.recv(1000):
            time.sleep(0.1)
            connection.sendall(b"ROLE\r\n")


@contextlib.contextmanager
def _sides(
    servers: Servers, clients: int, publish: Callable[[Load], list[float]], notifications: int
) -> Iterator[dict[str, _Side]]:
    """Each server with so many clients of its own."""
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, (server, store) in servers.items():
            load = stack.enter_context(Load(server, clients))
            load.poll()
            sides[name] = _Side(load, partial(publish, load), notifications, store=store)
        yield sides


def _costs(row: Row, sides: dict[str, _Side], deliveries: int = 1) -> Iterator[Figure]:
    """Yield the cost of a delivery when a notification has so many clients."""
    for name, side in sides.items():
        redis = f"Redis {median(side.store_costs) / deliveries * 1e6:.{row.decimals}f}" if side.store else ""
        yield Figure(row, side.cost() / deliveries * 1e6, ratio(side, sides[MEMORY]), redis, column=name)


def _one_at_a_time(servers: Servers, scale: Scale) -> Iterator[Figure]:
    each = scale.singles_a_turn
    with _sides(servers, FEW, lambda load: load.one_at_a_time(each), each) as sides:
        take_turns(scale.batch_pairs, *sides.values())
    for at, more in ((50, 3), (99, 10)):
        level = Level(more, more_than=MEMORY)
        row = Row(f"publish to last client, p{at}, {FEW} clients", "ms", 2, base=MEMORY, levels=(level,))
        for name, side in sides.items():
            yield Figure(row, quantiles(side.latencies, n=100)[at - 1] * 1e3, column=name)
    yield from _costs(Row(f"CPU per notification, {FEW} clients", "us", base=MEMORY), sides)

    clients, some = scale.clients, scale.notifications_a_turn
    with _sides(servers, clients, lambda load: load.one_at_a_time(some), some) as sides:
        take_turns(scale.pairs, *sides.values())
    row = Row(f"CPU per delivery, {clients:,} clients", "us", 2, base=MEMORY, levels=(Level(1.1, MEMORY),))
    yield from _costs(row, sides, clients)


def _in_a_burst(servers: Servers, scale: Scale) -> Iterator[Figure]:
    clients, burst = scale.clients, scale.burst
    with _sides(servers, clients, lambda load: [load.burst(burst, CONNECTIONS, DEPTH)], burst) as sides:
        take_turns(scale.burst_runs, *sides.values())
    row = Row(f"CPU per delivery in a burst of {burst:,}, {clients:,} clients", "us", 2, base=MEMORY)
    yield from _costs(row, sides, clients)


def _handshakes(servers: Servers, scale: Scale) -> Iterator[Figure]:
    wave = scale.handshakes

    def connect(load: Load) -> list[float]:
        load.connect(wave, at_once=wave)
        return []

    with _sides(servers, 0, connect, wave) as sides:
        for _ in range(scale.handshake_runs):
            for side in sides.values():
                side.take_turn()
                side.load.disconnect()
    level = Level(100, more_than=MEMORY)
    yield from _costs(Row(f"CPU per handshake, {wave:,} at once", "us", base=MEMORY, levels=(level,)), sides)


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    with _servers() as servers:
        yield from _one_at_a_time(servers, scale)
        yield from _in_a_burst(servers, scale)
        yield from _handshakes(servers, scale)
        row = Row(PUBLISH_TITLE, "/s", 0, more_is_better=True, base=MEMORY, levels=(Level(5000),))
        for name, (server, _) in servers.items():
            yield Figure(row, rate(server, scale), column=name)
