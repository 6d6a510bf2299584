"""For how long does a fan-out hold notifyd's event loop, so that nothing else is served?

Method, from outside: with 15,000 clients connected, `GET /health` is asked again as soon as it is answered, while
first one and then 64 notifications are published. The longest wait for an answer is the longest time that the loop
was held, plus the request itself: an upper bound. Of a wait, the time counts in which neither the server nor the one
who asks stood in line for its core (the scheduler's count): that is the machine's doing. The clients share their
core with the one who asks, and the scheduler lets them run only when that one sleeps (SCHED_IDLE).

Not measured: other ways of holding the loop, such as a wave of handshakes.
"""

import http.client
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from load import Load
from plan import Figure, Level, Row, Scale
from server import Server

from peers import NOTIFYD, Peer

BURST = 64


class Probe(threading.Thread):
    """Asks /health over and over inside of `with`; `longest` is the longest wait in seconds."""

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
            connection.request("GET", "/health")
            connection.getresponse().read()
            waited = time.perf_counter() - asked
            delayed += sum(int(path.read_text().split()[1]) for path in in_line)
            self.longest = max(self.longest, waited - delayed / 1e9)
        connection.close()


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    longest = 0.0
    with Server(peer) as server, Load(server, scale.hold_clients) as load:
        os.sched_setscheduler(load.process.pid, os.SCHED_IDLE, os.sched_param(0))
        for notifications in (1, BURST) * scale.hold_rounds:
            with Probe(server) as probe:
                load.burst(notifications, 1, notifications)
            longest = max(longest, probe.longest)
    row = Row(f"event loop held, fan-out to {scale.hold_clients:,} clients, at most", "ms", levels=(Level(10),))
    yield Figure(row, longest * 1e3)
