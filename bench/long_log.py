"""What does a log of a million cost, where memory holds only the newest end of it?

Method: for SQLite and Redis, one process fills a log with notifications of 200 bytes for a topic, and ten for a client.
Then another process starts on that log: the time to its start is compared with that on an empty log, and its memory
with cache_bytes. One follower of the topic resumes from the far end and reads everything; the level is that of Redis,
50,000 a second are asked of SQLite. The client with ten of its own reads those, and nothing else. At last many
followers resume at once from a tenth of the log behind and read a fifth of that, while one publishes and a prober
(hold.py) looks for how long the event loop is held. A client of a resume reads bytes and counts notifications.

Not measured: the resume over a network, which is slower than the server.
"""

import base64
import contextlib
import http.client
import json
import os
import selectors
import socket
import tempfile
import threading
import time
from collections.abc import Iterator

from hold import Probe
from peers import NOTIFYD, REDIS, Peer, notifyd_on
from plan import Figure, Level, Row, Scale
from running import Server

BATCH, PAYLOAD_BYTES, OWN = 1000, 200, 10
# The JSON around the message.
ENVELOPE_BYTES = 158
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
MARK = b'"sender":"notification_service"'


def _fill(server: Server, count: int) -> list[str]:
    """Publish so many, with ten for one client among them, and return the ids."""
    connection, ids = http.client.HTTPConnection("127.0.0.1", server.port), []
    for first in range(0, count, BATCH):
        messages = (f"{number:0{PAYLOAD_BYTES - ENVELOPE_BYTES}}" for number in range(first, first + BATCH))
        batch = [{"message": message, "topics": ["all"]} for message in messages]
        if first % (count // OWN) == 0:
            batch[0] = {"message": "own", "clients": ["own"]}
        connection.request("POST", "/notify/batch", json.dumps(batch), {"Content-Type": "application/json"})
        ids += [one["id"] for one in json.loads(connection.getresponse().read())["notifications"]]
    connection.close()
    return ids


def _resume(server: Server, query: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port))
    key = base64.b64encode(os.urandom(16)).decode()
    head = (
        f"GET /ws?{query} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    )
    connection.sendall(head.encode())
    return connection


def _seconds_to_read(server: Server, query: str, count: int) -> float:
    began, rest = time.perf_counter(), b""
    with _resume(server, query) as connection:
        while count > 0:
            data = rest + connection.recv(1 << 20)
            count -= data.count(MARK)
            rest = data[-len(MARK) + 1 :]
    return time.perf_counter() - began


def _read_at_once(server: Server, since: str, clients: int, size: int) -> None:
    """Have so many followers resume at once, and read until each has about so many bytes."""
    waiting = selectors.DefaultSelector()
    left = {}
    for number in range(clients):
        connection = _resume(server, f"client_id=reader{number}&topics=all&since={since}")
        left[connection] = size
        waiting.register(connection, selectors.EVENT_READ)
    while any(bytes_left > 0 for bytes_left in left.values()):
        for key, _ in waiting.select():
            data = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            if not data:
                os._exit(1)
            left[key.fileobj] -= len(data)  # type: ignore[index]


def _publish(server: Server, stopped: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    while not stopped.wait(0.01):
        connection.request("POST", "/notify", b'{"message": "live"}')
        connection.getresponse().read()


def _held_by_readers(server: Server, since: str, clients: int, size: int) -> float:
    """Return for how many milliseconds the event loop was held at most while they read."""
    stopped = threading.Event()
    publisher = threading.Thread(target=_publish, args=(server, stopped), daemon=True)
    if (reader := os.fork()) == 0:
        _read_at_once(server, since, clients, size)
        os._exit(0)
    publisher.start()
    with Probe(server) as probe:
        _, status = os.waitpid(reader, 0)
    stopped.set()
    if status:
        raise RuntimeError("a reader was closed")
    return probe.longest * 1e3


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


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    count, readers = scale.log_notifications, scale.log_readers
    with _stores() as stores:
        for name, (url, empty) in stores.items():
            with Server(notifyd_on(url, 1, *FLAGS)) as server:
                ids = _fill(server, count)
            at_first, fresh = _started(notifyd_on(empty, 1, *FLAGS))
            memory = fresh.rss_bytes()
            fresh.__exit__()
            after, server = _started(notifyd_on(url, 1, *FLAGS))
            try:
                row = Row(f"start with {count:,} in the log, later than with none", "s", 2, levels=(Level(1),))
                yield Figure(row, max(0.0, after - at_first), column=name)
                seconds = _seconds_to_read(server, f"topics=all&since={ids[0]}", count - OWN)
                title = f"resume from {count:,} behind"
                row = Row(title, "/s", 0, more_is_better=True, levels=(Level(20_000),))
                yield Figure(row, count / seconds, column=name)
                row = Row("memory beside that with an empty log, by cache_bytes", "x", 2, levels=(Level(1.2),))
                yield Figure(row, (server.rss_bytes() - memory) / CACHE_BYTES, column=name)
                own = _seconds_to_read(server, f"client_id=own&since={ids[0]}", OWN - 1)
                row = Row(f"{OWN - 1} of its own among {count:,}", "ms", levels=(Level(100),))
                yield Figure(row, own * 1e3, column=name)
                held = _held_by_readers(server, ids[-count // 10], readers, count // 50 * PAYLOAD_BYTES)
                title = f"event loop held while {readers:,} resume from {count // 10:,} behind"
                yield Figure(Row(title, "ms", levels=(Level(10),)), held, column=name)
            finally:
                server.__exit__()
