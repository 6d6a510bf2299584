"""A thousand clients: each one gets everything, and those that stop reading cost no memory."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from signal import SIGUSR1
from typing import Any

import pytest
from bytes import MEGABYTE
from conftest import StartServer
from processes import Server, eventually, notifyd_command
from websockets.asyncio.client import connect
from ws_clients import parse_message

CLIENTS = 1000


async def listen(url: str, count: int, ready: asyncio.Barrier) -> list[Any]:
    """Be one of many clients: wait until all are welcomed, and return the messages of so many notifications."""
    async with connect(url, compression=None, ping_interval=None, proxy=None, open_timeout=30) as connection:
        assert parse_message(await connection.recv())["type"] == "welcome"
        await ready.wait()
        return [parse_message(await connection.recv())["data"]["message"] for _ in range(count)]


def audience(server: Server, messages: list[str]) -> tuple[list[Any], list[list[Any]]]:
    """Publish to a thousand clients; return the numbers of recipients and the notifications of each client."""

    async def run() -> tuple[list[Any], list[list[Any]]]:
        ready = asyncio.Barrier(CLIENTS + 1)
        listeners = [asyncio.create_task(listen(server.ws_url, len(messages), ready)) for _ in range(CLIENTS)]
        await ready.wait()
        answers = [await asyncio.to_thread(server.notify, message) for message in messages]
        return [answer["recipients"] for answer in answers], list(await asyncio.gather(*listeners))

    return asyncio.run(asyncio.wait_for(run(), 120))


def test_everything_reaches_each_of_a_thousand_clients_in_order(start_server: StartServer) -> None:
    """Twenty notifications are counted to a thousand recipients and received twenty thousand times."""
    messages = [str(number) for number in range(20)]
    recipients, received = audience(start_server(), messages)
    assert recipients == [CLIENTS] * 20
    assert received == [messages] * CLIENTS


def test_clients_that_come_and_go_miss_nothing_in_between(server: Server) -> None:
    """While others publish, forty visitors each receive twenty notifications in a row, without a gap or a double."""

    def visit() -> list[int]:
        client = server.join()
        received = [int(message["data"]["message"]) for message in client.receive_many(20)]
        client.leave()
        return received

    with ThreadPoolExecutor(8) as visitors:
        visits = [visitors.submit(visit) for _ in range(40)]
        published = count()
        while not all(each.done() for each in visits):
            server.notify(str(next(published)))
    for each in visits:
        first = each.result()[0]
        assert each.result() == list(range(first, first + 20))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_clients_that_stop_reading_cost_the_ring_and_no_more(start_server: StartServer) -> None:
    """Thirty stalled clients are thirty integers: six megabytes of notifications are kept once, not thirty times."""
    server = start_server()
    reader = server.join()
    for _ in range(30):
        server.join_bare(receive_buffer=4096)
    before = server.memory()
    for number in range(100):
        server.notify(str(number), data={"pad": "x" * 60_000})
    reader.receive_many(100)
    assert server.memory() - before < 24 * MEGABYTE


COUNTS_GARBAGE = """
import gc, signal, sys, notifyd
ours = {"clients", "connection", "wire_http", "wire", "wire_session", "starlette.requests"}
gc.set_debug(gc.DEBUG_SAVEALL)
def collect(*_):
    gc.collect()
    found = [one for one in gc.garbage if type(one).__module__ in ours]
    gc.garbage.clear()
    print("unreachable:", len(found), file=sys.stderr, flush=True)
signal.signal(signal.SIGUSR1, collect)
sys.exit(notifyd.main())
"""


def test_connections_leave_nothing_for_the_collector() -> None:
    """The collector hardly ever runs, so the objects of a connection must go with it."""
    _, _, *flags = notifyd_command("--port", "0", "--notification-interval", "0")
    server = Server([sys.executable, "-c", COUNTS_GARBAGE, *flags])
    server.join().leave()
    server.get("/health")
    server.signal(SIGUSR1)
    server.wait_for_line("unreachable")
    seen = len(server.stderr)
    for number in range(100):
        server.join(f"ws{number}").leave()
        stream = server.raw(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert stream.recv(65_536)
        stream.close()
        assert server.answer_to(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    eventually(lambda: server.active() == 0)
    server.signal(SIGUSR1)
    # Of ours: the transports of asyncio hold themselves.
    assert int(server.wait_for_line("unreachable", after=seen).split()[-1]) < 10
    server.stop()
