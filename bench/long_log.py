"""What does a log of a million cost, where memory holds only the newest end of it?

Method: for SQLite and Redis, fill.py fills a log with notifications of 200 bytes for a topic, and ten for a client.
Then a process starts on that log: the time to its start is compared with that on an empty log, and its memory with
cache_bytes. One follower of the topic resumes from the far end and reads everything; the level is that of Redis, 50,000
a second are asked of SQLite. The client with ten of its own reads those, and nothing else. A client of a resume reads
bytes and counts notifications.

Then crowd.py: 100 notifications a second are published to 50 clients, alone, and then while many followers resume at
once from a tenth of the log behind and read. A prober (hold.py) looks for how long the event loop is held. The memory
is that of the server, once a second.

Not measured: the resume over a network, which is slower than the server. Server, SQLite or Redis share one core.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import quantiles

from crowd import connected, live_seconds, read_at_once
from hold import Probe
from peers import NOTIFYD, REDIS, Peer, notifyd_on
from plan import Figure, Level, Row, Scale
from running import Server

OWN = 10
CACHE_BYTES = 67_108_864
FLAGS = (
    "--history-size",
    "2000000",
    "--history-ttl",
    "604800",
    "--history-bytes",
    "1000000000",
    "--log-level",
    "ERROR",
)
MARK = b'"sender":"bench"'


def _fill(url: str, count: int) -> list[str]:
    """Return the id of the first, and the one behind which a tenth follows."""
    command = [sys.executable, str(Path(__file__).with_name("fill.py")), url, str(count), str(OWN)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def _seconds_to_read(server: Server, query: str, count: int) -> float:
    began, rest = time.perf_counter(), b""
    with connected(server.port, query) as connection:
        while count > 0:
            data = rest + connection.recv(1 << 20)
            count -= data.count(MARK)
            rest = data[-len(MARK) + 1 :]
    return time.perf_counter() - began


def _beside_a_crowd(server: Server, since: str, clients: int, behind: int, seconds: float) -> Iterator[Figure]:
    title = f"while {clients:,} resume from {behind:,} behind"
    with ProcessPoolExecutor(2, get_context("fork")) as processes:
        alone = processes.submit(live_seconds, server.port, seconds).result()
        live = processes.submit(live_seconds, server.port, seconds)
        time.sleep(1)
        reading = processes.submit(read_at_once, server.port, f"topics=all&since={since}", clients, seconds)
        memory = []
        with Probe(server) as probe:
            # Not until the readers leave, all at once.
            while not live.done():
                time.sleep(min(1.0, seconds / 4))
                memory.append(server.rss_bytes())
        beside, fewest = live.result(), reading.result()
    if not fewest:
        raise RuntimeError("a client has read nothing")
    yield Figure(Row(f"event loop held {title}", "ms", levels=(Level(10),)), probe.longest * 1e3)
    before, after = (quantiles(found, n=100)[98] * 1e3 for found in (alone, beside))
    yield Figure(Row("live delivery, 99 of 100 within", "ms"), before)
    yield Figure(Row(f"live delivery {title}, 99 of 100 within", "ms"), after)
    yield Figure(Row("the second by the first", "x", levels=(Level(2),)), after / before)
    row = Row(f"memory {title}, most by that at first", "x", 2, levels=(Level(1.1),))
    yield Figure(row, max(memory) / memory[0])


def _started(peer: Peer) -> tuple[float, Server]:
    began = time.perf_counter()
    server = Server(peer).__enter__()
    return time.perf_counter() - began, server


@contextlib.contextmanager
def _stores() -> Iterator[dict[str, tuple[str, str]]]:
    """By name: a store for the long log, and another for an empty one."""
    with tempfile.TemporaryDirectory(prefix="notifyd-bench-") as folder, contextlib.ExitStack() as stack:
        stores = {"sqlite": (f"sqlite:{folder}/long", f"sqlite:{folder}/empty")}
        if REDIS.prepare() is None:
            redis = stack.enter_context(Server(REDIS))
            stores["redis"] = (f"redis://127.0.0.1:{redis.port}/0", f"redis://127.0.0.1:{redis.port}/1")
        yield stores


def _on(url: str, empty: str, scale: Scale) -> Iterator[Figure]:
    count = scale.log_notifications
    first, near = _fill(url, count)
    at_first, fresh = _started(notifyd_on(empty, 1, *FLAGS))
    memory = fresh.rss_bytes()
    fresh.__exit__()
    after, server = _started(notifyd_on(url, 1, *FLAGS))
    try:
        row = Row(f"start with {count:,} in the log, later than with none", "s", 2, levels=(Level(1),))
        yield Figure(row, max(0.0, after - at_first))
        seconds = _seconds_to_read(server, f"topics=all&since={first}", count - OWN)
        row = Row(f"resume from {count:,} behind", "/s", 0, more_is_better=True, levels=(Level(20_000),))
        yield Figure(row, count / seconds)
        row = Row("memory beside that with an empty log, by cache_bytes", "x", 2, levels=(Level(1.2),))
        yield Figure(row, (server.rss_bytes() - memory) / CACHE_BYTES)
        own = _seconds_to_read(server, f"client_id=own&since={first}", OWN - 1)
        yield Figure(Row(f"{OWN - 1} of its own among {count:,}", "ms", levels=(Level(100),)), own * 1e3)
        yield from _beside_a_crowd(server, near, scale.log_readers, count // 10, scale.log_seconds)
    finally:
        server.__exit__()


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    with _stores() as stores:
        for name, (url, empty) in stores.items():
            for figure in _on(url, empty, scale):
                yield Figure(figure.row, figure.value, column=name)
