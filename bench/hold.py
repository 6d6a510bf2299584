"""For how long does a fan-out, or a batch to a topic, hold notifyd's event loop?

Method, from outside: with 15,000 clients connected, a prober repeats `GET /health/live`, which asks no store, as soon
as the last is answered: during a single notification, during 64 at once, and during a batch of 1,000 to a topic of all
clients. The longest wait for an answer is the longest time that the loop was held, plus the request itself: an upper
bound. Time in which the server or the prober waited for its core, by the scheduler's count, is left out: the machine
causes it. The clients share their core with the prober, and the scheduler lets them run only while that sleeps
(SCHED_IDLE).

Not measured: other ways of holding the loop, such as a wave of handshakes.
"""

import http.client
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from load import NUMBER, Audience, Load
from peers import NOTIFYD, Peer
from plan import Figure, Level, Row, Scale
from running import Server

BURST, BATCH = 64, 1000
TOPIC = f"?topics={NUMBER}", f',"topics":["{NUMBER}"]'


class Probe(threading.Thread):
    """Asks /health/live over and over inside of `with`; `longest` is the longest wait in seconds."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.stopped = threading.Event()
        self.longest = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        in_line = [Path(f"/proc/{process}/schedstat") for process in ("thread-self", self.server.process.pid)]
        while not self.stopped.is_set():
            delayed = -sum(int(path.read_text().split()[1]) for path in in_line)
            asked = time.perf_counter()
            connection.request("GET", "/health/live")
            connection.getresponse().read()
            waited = time.perf_counter() - asked
            delayed += sum(int(path.read_text().split()[1]) for path in in_line)
            self.longest = max(self.longest, waited - delayed / 1e9)
        connection.close()


def _hold(server: Server, load: Load, publish: Callable[[int], object], sizes: Iterable[int]) -> float:
    """Return for how many milliseconds the loop was held at most."""
    os.sched_setscheduler(load.process.pid, os.SCHED_IDLE, os.sched_param(0))
    longest = 0.0
    for size in sizes:
        with Probe(server) as probe:
            publish(size)
        longest = max(longest, probe.longest)
    return longest * 1e3


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    clients, rounds = scale.hold_clients, scale.hold_rounds
    with Server(peer) as server, Load(server, clients) as load:
        held = _hold(server, load, lambda size: load.burst(size, 1, size), (1, BURST) * rounds)
    row = Row(f"event loop held, fan-out to {clients:,} clients, at most", "ms", levels=(Level(10),))
    yield Figure(row, held)
    with Server(peer) as server, Load(server, clients, Audience(clients, *TOPIC)) as load:
        held = _hold(server, load, lambda size: load.batches(1, size), [BATCH] * rounds)
    yield Figure(Row(f"event loop held, a batch of {BATCH:,} to a topic of {clients:,} clients, at most", "ms"), held)
