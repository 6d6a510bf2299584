"""Heartbeat: the server pings every client, and closes a client that is silent for too long."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import pairwise
from signal import SIGCONT, SIGSTOP
from statistics import median

import pytest
from conftest import StartServer
from expected import PING, PONG
from processes import Server, eventually
from websockets.frames import Opcode


@pytest.fixture(scope="module")
def pinging() -> Iterator[Server]:
    """A server that pings five times a second and gives up after two seconds of silence."""
    flags = ("--notification-interval", "0", "--ping-interval", "0.2", "--ping-timeout", "2")
    server = Server.notifyd(*flags)
    yield server
    server.stop()


def stays(server: Server, client_id: str, keep_alive: object, seconds: float = 3) -> bool:
    """Whether a client is still connected when it has called `keep_alive` again and again for so long."""
    assert callable(keep_alive)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        keep_alive()
    return client_id in [each["client_id"] for each in server.read("/status")["connections"]["details"]]


def test_the_ping_is_the_documented_message(pinging: Server) -> None:
    """Clients that know only messages can answer it."""
    assert pinging.join().receive() == PING


def test_pings_go_on(pinging: Server) -> None:
    """There is a ping in every interval."""
    assert pinging.join().receive_many(4) == [PING] * 4


def test_pings_come_once_in_an_interval(pinging: Server) -> None:
    """Two pings are about one interval apart."""
    times = [datetime.fromisoformat(each["timestamp"]).timestamp() for each in pinging.join().receive_many(8)]
    assert 0.1 < median(later - earlier for earlier, later in pairwise(times)) < 0.4


def test_a_protocol_ping_comes_along(pinging: Server) -> None:
    """A client with a library that answers ping frames stays connected without code of its own."""
    client = pinging.join_bare()
    assert client.next_frame(Opcode.PING)
    assert client.receive() == PING


def test_silence_closes_with_1011(pinging: Server) -> None:
    """A client that answers neither kind of ping for ping_timeout is closed with the documented reason."""
    client, began = pinging.join_bare(), time.monotonic()
    assert client.closed() == (1011, "Ping timeout")
    assert 1.9 < time.monotonic() - began < 6


def test_the_silent_make_room(pinging: Server) -> None:
    """A client that was closed for its silence is not counted any more, though it never answers the close."""
    pinging.join_bare("bob")
    eventually(lambda: pinging.active() == 0)


def test_pongs_of_the_library_keep_a_client(pinging: Server) -> None:
    """A protocol pong proves a client alive, and it needn't say anything else."""
    client = pinging.join("bob")
    assert stays(pinging, "bob", client.receive)


def test_pong_messages_keep_a_client(pinging: Server) -> None:
    """The documented pong message proves a client alive without any protocol pong."""
    client = pinging.join_bare("bob")

    def answer() -> None:
        assert client.receive() == PING
        client.send({"type": "pong"})

    assert stays(pinging, "bob", answer)


def test_anything_heard_keeps_a_client(pinging: Server) -> None:
    """Even an unsolicited protocol ping is a sign of life."""
    client = pinging.join_bare("bob")

    def say_something() -> None:
        assert client.receive() == PING
        client.send_frame(Opcode.PING, b"still here")

    assert stays(pinging, "bob", say_something)


def test_last_ping_follows_the_answers(pinging: Server) -> None:
    """/status shows when a client last answered."""
    pinging.join("bob")

    def last_ping() -> str:
        return str(pinging.read("/status")["connections"]["details"][0]["last_ping"])

    first = last_ping()
    eventually(lambda: last_ping() > first)


def test_pings_are_no_messages_sent(pinging: Server) -> None:
    """Only notifications are counted as messages."""
    before = pinging.read("/metrics")["connections"]["messages_sent"]
    pinging.join().receive_many(3)
    assert pinging.read("/metrics")["connections"]["messages_sent"] == before


def test_an_interval_of_0_sends_no_pings(start_server: StartServer) -> None:
    """While test notifications come, no ping is among them."""
    client = start_server("--ping-interval", "0", "--notification-interval", "0.2").join_bare()
    frames = [client.frame() for _ in range(4)]
    assert [frame and frame.opcode for frame in frames] == [Opcode.TEXT] * 4


def test_pings_are_spread_over_the_interval(start_server: StartServer) -> None:
    """Forty clients that came together aren't pinged together."""
    server = start_server("--ping-interval", "1")
    clients = [server.join() for _ in range(40)]
    for client in clients:
        client.receive()  # The first ping of each; the second is in the steady state.
    times = sorted(datetime.fromisoformat(client.receive()["timestamp"]) for client in clients)
    assert (times[-1] - times[0]).total_seconds() > 0.4


def test_an_incumbent_that_answered_during_a_pause_stays(start_server: StartServer) -> None:
    """The pong is there, and the process did not run: that is no reason to drop a client."""
    server = start_server()
    incumbent = server.join_bare("ann")
    with ThreadPoolExecutor() as pool:
        newcomer = pool.submit(lambda: server.connect("ann").closed())
        ping = incumbent.next_frame(Opcode.PING)
        for process in server.processes():
            os.kill(process, SIGSTOP)
        incumbent.send_frame(Opcode.PONG, bytes(ping.data))
        time.sleep(2.2)  # Longer than a probe takes.
        for process in server.processes():
            os.kill(process, SIGCONT)
        assert newcomer.result() == (1008, "Client ann is already connected")
    incumbent.send({"type": "ping"})
    assert incumbent.receive() == PONG
