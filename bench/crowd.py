"""Live notifications beside a crowd of clients that resume from far behind, for long_log.py.

Both sides are processes of their own on the core of the load. The crowd runs only while everything else there sleeps
(SCHED_IDLE), so a latency is the server's and not the crowd's.
"""

import base64
import os
import re
import selectors
import socket
import time

LIVE, PUBLISHES_A_SECOND = 50, 100
BODY = b'{"message":"live","topics":["live"],"data":{"number":%d}}'
PUBLISH = b"POST /notify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
SETTLE_SECONDS = 0.5


def connected(port: int, query: str) -> socket.socket:
    """Return a WebSocket of which nothing has been read yet."""
    connection = socket.create_connection(("127.0.0.1", port))
    key = base64.b64encode(os.urandom(16)).decode()
    head = (
        f"GET /ws?{query} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    )
    connection.sendall(head.encode())
    return connection


def live_seconds(port: int, seconds: float) -> list[float]:
    """Publish for so long, and return the time from each publish to its arrival at each of the live clients."""
    waiting, sent, found = selectors.DefaultSelector(), list[float](), list[float]()
    for number in range(LIVE):
        waiting.register(connected(port, f"client_id=live{number}&topics=live"), selectors.EVENT_READ)
    publisher = socket.create_connection(("127.0.0.1", port))
    waiting.register(publisher, selectors.EVENT_READ)
    time.sleep(SETTLE_SECONDS)
    began = time.perf_counter()
    while (now := time.perf_counter()) < began + seconds + SETTLE_SECONDS:
        due = began + len(sent) / PUBLISHES_A_SECOND
        if due <= now < began + seconds:
            body = BODY % len(sent)
            sent.append(now)
            publisher.sendall(PUBLISH % (len(body), body))
        for key, _ in waiting.select(max(0.0, min(due - now, 0.01))):
            arrived, data = time.perf_counter(), key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            if key.fileobj is not publisher:
                found += (arrived - sent[int(number)] for number in re.findall(rb'"number":(\d+)', data))
            elif b" 200 " not in data:
                raise RuntimeError(f"a publish was answered by {data!r}")
    for key in waiting.get_map().values():
        key.fileobj.close()  # type: ignore[union-attr]
    if len(found) != len(sent) * LIVE:
        raise RuntimeError(f"{len(found)} of {len(sent) * LIVE} live notifications have arrived")
    return found


def read_at_once(port: int, query: str, clients: int, seconds: float) -> int:
    """Have so many clients resume at once and read for so long; return the bytes of the one that got the fewest."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    waiting = selectors.DefaultSelector()
    read = {}
    for number in range(clients):
        connection = connected(port, f"client_id=reader{number}&{query}")
        waiting.register(connection, selectors.EVENT_READ)
        read[connection] = 0
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        for key, _ in waiting.select(0.1):
            data = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            if not data:
                raise RuntimeError("a reader was closed")
            read[key.fileobj] += len(data)  # type: ignore[index]
    return min(read.values())
