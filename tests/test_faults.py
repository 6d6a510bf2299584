"""Faults of the processes and of their store, while publishers publish and clients listen.

After each fault: no notification that was answered 200 is lost, none comes twice or out of order, no counter goes back,
no client stays out for longer than 10 s, and no operator has to help. Publishers repeat unanswered requests with the
same Idempotency-Key, clients that lose their connection resume; both go to the next server where one is gone.
"""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import count, cycle
from pathlib import Path
from signal import SIGKILL
from typing import Any

import httpx
import pytest
from conftest import StartServer
from expected import parse
from processes import Server, eventually, needs_proc, program, serving
from redis_server import RedisServer
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException
from ws_clients import PATIENCE

pytestmark = [pytest.mark.slow, needs_proc]

CLIENTS, PUBLISHERS = 6, 4
FREE_SECONDS = 10.0
# Until a request is answered, be it 503.
ANSWER_SECONDS = 5.0
# Longer than a fault and its end, to tell a stuck process from a slow one.
RECOVERY_SECONDS = 20.0
RETRY_SECONDS = 0.05
# For a store that shall have a full disk.
DISK_BYTES = 32 * 1024 * 1024
# Enough to resume from after the longest absence.
HISTORY = ("--history-size", "100000")


class Listener:
    """A client that reconnects from its last position, and records every notification."""

    def __init__(self, name: str, fail: Callable[[str], None]) -> None:
        self.name = name
        self.start = self.position = ""
        self.received: dict[str, str] = {}
        self.test_counters: list[int] = []
        self.connections = 0
        self.longest_absence = 0.0
        self._fail = fail
        self._lost_at = time.monotonic()

    async def run(self, servers: Sequence[Server]) -> None:
        for server in cycle(servers):
            address = server.address(query=f"client_id={self.name}&since={self.position}")
            with suppress(OSError, WebSocketException):
                async with connect(
                    address, compression=None, proxy=None, max_queue=None, close_timeout=1
                ) as connection:
                    async for text in connection:
                        self._take(parse(text))
            if self.position and self._lost_at == 0:
                self._lost_at = time.monotonic()
            await asyncio.sleep(RETRY_SECONDS)

    def _take(self, message: Any) -> None:
        if message["type"] == "welcome":
            self.connections += 1
            self.longest_absence = max(self.longest_absence, time.monotonic() - self._lost_at)
            self._lost_at = 0.0
        elif message["type"] == "resume":
            self.start = self.start or message["data"]["position"]
            self.position = self.position or self.start
            if not message["data"]["complete"]:
                self._fail(f"{self.name} is told that something is missing after {self.position}")
        elif message["type"] == "test_notification":
            self.test_counters.append(message["data"]["counter"])
            self._follow(message["id"])
        elif "id" in message:
            self._follow(message["id"])
            self.received[message["id"]] = message["data"]["message"]

    def _follow(self, position: str) -> None:
        if position <= self.position:
            self._fail(f"{self.name} gets {position} again, or out of order, after {self.position}")
        self.position = position


class Traffic:
    """Publishers, listeners and a look at the counters, from the beginning of a test until its verdict."""

    def __init__(self, *servers: Server) -> None:
        self.servers = servers
        self.answered: dict[str, str] = {}
        self.answers = [0] * PUBLISHERS
        self.faults: list[str] = []
        self.listeners = [Listener(f"listener{n}", self.faults.append) for n in range(CLIENTS)]
        self.stays_up = True
        self._publishing = threading.Event()
        self._publishing.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Traffic:
        self._thread.start()
        self._await(lambda: all(listener.position for listener in self.listeners), "all are listening")
        self._publishers = [self._begin(self._publish(number)) for number in range(PUBLISHERS)]
        self._watchers = [self._begin(self._watch(server)) for server in self.servers]
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    def _run(self) -> None:
        async def main() -> None:
            places = [
                self.servers[n % len(self.servers) :] + self.servers[: n % len(self.servers)] for n in range(CLIENTS)
            ]
            async with asyncio.TaskGroup() as self._tasks:
                for listener, servers in zip(self.listeners, places, strict=True):
                    self._tasks.create_task(listener.run(servers))

        with suppress(asyncio.CancelledError), closing(self._loop):
            self._main = self._loop.create_task(main())
            self._loop.run_until_complete(self._main)

    def _begin(self, work: Coroutine[Any, Any, None]) -> Any:
        async def begun() -> None:
            try:
                await work
            except Exception as error:
                self.faults.append(repr(error))
                raise

        return asyncio.run_coroutine_threadsafe(begun(), self._loop)

    def _await(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + RECOVERY_SECONDS
        while not condition():
            assert not self.faults, self.faults[:5]
            assert time.monotonic() < deadline, f"not within {RECOVERY_SECONDS} s: {what}"
            time.sleep(0.02)

    # Traffic.

    async def _publish(self, number: int) -> None:
        start = number % len(self.servers)
        servers = cycle(self.servers[start:] + self.servers[:start])
        # A connection of its own for each request: any of the workers may get it.
        async with httpx.AsyncClient(
            trust_env=False, timeout=ANSWER_SECONDS, limits=httpx.Limits(max_keepalive_connections=0)
        ) as http:
            server = next(servers)
            for n in count():
                message, key = f"{number}-{n}", {"Idempotency-Key": secrets.token_hex(8)}
                while self._publishing.is_set():
                    try:
                        response = await http.post(f"{server.url}/notify", json={"message": message}, headers=key)
                    except httpx.ReadTimeout:
                        self.faults.append(f"/notify does not answer within {ANSWER_SECONDS} s")
                    except httpx.TransportError:
                        server = next(servers)
                    else:
                        if response.status_code == 200:
                            self.answered[response.headers["Notification-Id"]] = message
                            self.answers[number] += 1
                            break
                        if response.status_code != 503:
                            self.faults.append(f"/notify answers {response.text}")
                    await asyncio.sleep(RETRY_SECONDS)
                if not self._publishing.is_set():
                    return
                await asyncio.sleep(0.01)

    async def _watch(self, server: Server) -> None:
        """See that no counter goes back."""
        most = [0, 0, 0]
        async with httpx.AsyncClient(
            base_url=server.url, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        ) as http:
            while self._publishing.is_set():
                with suppress(httpx.TransportError):
                    metrics = (await http.get("/metrics")).json()["connections"]
                    service = (await http.get("/status")).json()["notification_service"]
                    counts = [metrics["total_connections"], metrics["messages_sent"], service["notifications_sent"]]
                    if self.stays_up and any(now < before for now, before in zip(counts, most, strict=True)):
                        self.faults.append(
                            f"total, messages_sent or notifications_sent go back from {most} to {counts}"
                        )
                    most = counts
                await asyncio.sleep(0.1)

    # The tests.

    def goes_on(self) -> None:
        """Every publisher is answered 200 again, and every listener hears of it."""
        before = list(self.answers)
        self._await(
            lambda: all(now > then + 3 for now, then in zip(self.answers, before, strict=True)), "all publish again"
        )
        newest = max(self.answered)
        self._await(lambda: all(one.position >= newest for one in self.listeners), "all receive again")

    def says_unhealthy(self) -> None:
        """All servers say on /health that the store is away; nobody loses a connection for that."""
        for server in self.servers:
            eventually(lambda server=server: health(server) == (503, "unhealthy"))

    def is_whole(self, connections: int | None = None) -> None:
        """Go on, end it, and check that everyone has received everything once and in order."""
        for server in self.running():
            eventually(lambda server=server: health(server) == (200, "healthy"), RECOVERY_SECONDS)
        self.goes_on()
        self._publishing.clear()
        for publisher in (*self._publishers, *self._watchers):
            publisher.result(PATIENCE)
        newest = max(self.answered)
        self._await(lambda: all(one.position >= newest for one in self.listeners), "all have received the last")
        assert not self.faults, self.faults[:5]
        for listener in self.listeners:
            lost = self.answered.items() - listener.received.items()
            assert not lost, f"{listener.name} lacks {len(lost)}, such as {min(lost)}"
            assert len(set(listener.received.values())) == len(listener.received), "something came twice"
            assert listener.received == self.listeners[0].received
            assert listener.longest_absence < FREE_SECONDS
            if connections is not None:
                assert listener.connections == connections
        for server in self.running():
            eventually(lambda server=server: server.active() == CLIENTS)
            self._has_kept_everything(server)

    def _has_kept_everything(self, server: Server) -> None:
        """Resume from before the first, and receive everything that the listeners received."""
        first = self.listeners[0]
        client = server.join(query=f"since={first.start}")
        resume = client.receive()["data"]
        assert (resume["complete"], resume["replayed"]) == (True, len(first.received))
        assert [message["id"] for message in client.receive_many(resume["replayed"])] == list(first.received)
        client.leave()

    def running(self) -> list[Server]:
        return [server for server in self.servers if server.process.poll() is None]


def health(server: Server) -> tuple[int, str]:
    response = httpx.get(f"{server.url}/health", trust_env=False, timeout=PATIENCE)
    return response.status_code, response.json()["status"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer(append_only=True)
    yield server
    server.close()


StartTwo = Callable[..., list[Server]]


@pytest.fixture
def two(request: pytest.FixtureRequest, start_server: StartServer, tmp_path: Path) -> list[Server]:
    """Two servers on one store: on one SQLite file unless the test says "redis"."""
    store = (
        request.getfixturevalue("redis").url
        if getattr(request, "param", "") == "redis"
        else f"sqlite:{tmp_path / 'log.db'}"
    )
    return [start_server("--store", store, *HISTORY) for _ in range(2)]


on_redis = pytest.mark.parametrize("two", ["redis"], indirect=True)
on_both = pytest.mark.parametrize("two", ["sqlite", "redis"], indirect=True)


# Processes die.


@pytest.mark.parametrize("which", [0, -1], ids=["the sender of test notifications", "another"])
def test_a_worker_is_killed(start_server: StartServer, which: int) -> None:
    """The first worker sends the test notifications: another goes on with the counter where it stopped."""
    server = start_server("--workers", "3", *HISTORY, "--notification-interval", "0.2", quiet=False)
    with Traffic(server) as traffic:
        eventually(lambda: all(listener.test_counters for listener in traffic.listeners))
        os.kill(serving(server)[which], SIGKILL)
        last = max(traffic.listeners[0].test_counters)
        eventually(lambda: all(max(one.test_counters) > last + 2 for one in traffic.listeners), FREE_SECONDS)
        traffic.is_whole()
        for listener in traffic.listeners:
            assert listener.test_counters == sorted(set(listener.test_counters))


@on_both
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_one_of_two_servers_is_killed(two: list[Server], which: int) -> None:
    """Its clients go on at the other one."""
    with Traffic(*two) as traffic:
        two[which].process.kill()
        two[which].process.wait()
        traffic.is_whole()


@pytest.mark.parametrize("victims", ["parent", "all"])
def test_the_parent_is_killed_and_started_again(start_server: StartServer, path: Path, victims: str) -> None:
    """The log in the file is there for resume, whether the workers could still say goodbye or not."""
    flags = ("--workers", "2", "--store", f"sqlite:{path}", *HISTORY)
    first = start_server(*flags)
    with Traffic(first) as traffic:
        traffic.stays_up = False
        os.kill(first.pid, SIGKILL) if victims == "parent" else os.killpg(first.pid, SIGKILL)
        first.process.wait()
        start_server(*flags, "--port", str(first.port))
        traffic.is_whole()


# Redis.


@on_redis
def test_redis_is_killed_and_started_again(two: list[Server], redis: RedisServer) -> None:
    """Redis keeps acknowledged notifications in its file."""
    with Traffic(*two) as traffic:
        redis.kill()
        traffic.says_unhealthy()
        redis.start()
        traffic.is_whole(connections=1)


def test_figures_while_redis_is_away(start_server: StartServer, redis: RedisServer) -> None:
    """They are those of a second before, also where nobody had asked for them."""
    flags = ("--store", redis.url, "--notification-interval", "0.3")
    _, server = [start_server(*flags, quiet=False) for _ in range(2)]
    server.join().receive_many(6)
    redis.kill()
    eventually(lambda: health(server) == (503, "unhealthy"))
    connections = server.get("/health").json()["connections"]
    assert (connections["active"], connections["total"]) == (1, 1)


def test_a_server_starts_while_redis_is_away(start_server: StartServer, redis: RedisServer) -> None:
    """It answers 503, turns newcomers away until Redis is there, and then is a server like any other."""
    redis.kill()
    server = start_server("--store", redis.url)
    assert health(server) == (503, "unhealthy")
    assert server.post({"message": "m"}).status_code == 503
    assert server.connect().closed() == (1013, "Try again later")
    redis.start()
    eventually(lambda: health(server) == (200, "healthy"))
    server.join()
    assert server.notify("m")["recipients"] == 1


@on_redis
def test_redis_stops_for_10_s(two: list[Server], redis: RedisServer) -> None:
    """Longer than any lease: the servers come back before anybody is taken for dead."""
    with Traffic(*two) as traffic:
        redis.stop()
        stopped_at = time.monotonic()
        traffic.says_unhealthy()
        time.sleep(max(0.0, stopped_at + 10 - time.monotonic()))
        redis.resume()
        traffic.is_whole(connections=1)


@on_redis
def test_redis_is_emptied(two: list[Server], redis: RedisServer) -> None:
    """The servers put back the notifications that they have."""
    with Traffic(*two) as traffic:
        redis.empty()
        traffic.says_unhealthy()
        traffic.is_whole(connections=1)


@on_redis
@pytest.mark.parametrize("refuse", [RedisServer.refuse_writes, RedisServer.follow_nobody], ids=["full", "read-only"])
def test_redis_refuses_to_write(two: list[Server], redis: RedisServer, refuse: Callable[..., None]) -> None:
    """For want of memory, or because it is a replica for a while."""
    with Traffic(*two) as traffic:
        refuse(redis)
        traffic.says_unhealthy()
        refuse(redis, **{"refuse" if refuse is RedisServer.refuse_writes else "follow": False})
        traffic.is_whole(connections=1)


@on_redis
def test_redis_hangs_up_again_and_again(two: list[Server], redis: RedisServer) -> None:
    """The connections to Redis are cut at any moment of an operation."""
    with Traffic(*two) as traffic:
        for _ in range(10):
            redis.command("CLIENT", "KILL", "TYPE", "normal")
            time.sleep(0.3)
        traffic.is_whole(connections=1)


@on_redis
def test_redis_is_slow(two: list[Server], redis: RedisServer) -> None:
    """Busy with something else, for nearly as long as it is waited for, again and again."""
    with Traffic(*two) as traffic:
        for _ in range(4):
            redis.stop()
            time.sleep(1.5)
            redis.resume()
        traffic.is_whole(connections=1)


# SQLite.


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """Leave no byte free where this file is."""
    filler = path.with_name("filler")
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    yield
    filler.unlink()


@contextmanager
def no_longer_files(servers: list[Server], _: Path) -> Iterator[None]:
    """Let the processes make no file longer."""
    limits = [resource.prlimit(server.pid, resource.RLIMIT_FSIZE) for server in servers]
    for server, (_, hard) in zip(servers, limits, strict=True):
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, hard))
    yield
    for server, limit in zip(servers, limits, strict=True):
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, limit)


@contextmanager
def locked(_: list[Server], path: Path) -> Iterator[None]:
    """Hold SQLite's own lock, like a person with the file open in a shell."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[None]:
    """Put the file on a disk of its own that is soon full."""
    command = ("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", tmp_path)
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a disk, and not everywhere")
    yield
    # Not at once: the servers on it may still be stopping.
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.parametrize("fault", [no_longer_files, locked], ids=["no longer files", "locked"])
def test_sqlite_cannot_write(two: list[Server], path: Path, fault: Callable[..., Any]) -> None:
    """The servers say so, and go on when they can."""
    with Traffic(*two) as traffic:
        with fault(two, path):
            traffic.says_unhealthy()
        traffic.is_whole(connections=1)


@pytest.mark.usefixtures("small_disk")
def test_the_disk_is_full(two: list[Server], path: Path) -> None:
    with Traffic(*two) as traffic:
        with full_disk(path):
            traffic.says_unhealthy()
        traffic.is_whole(connections=1)


# The clock.

CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(id, now);
    if (id == CLOCK_REALTIME && !access(FLAG, F_OK)) now->tv_sec -= 3600;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    *now = (struct timeval){exact.tv_sec, exact.tv_nsec / 1000};
    return 0;
}
"""


@pytest.fixture
def put_clock_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Give every process that is started from now on a clock that can be put back by an hour while it runs."""
    source, library, flag = (tmp_path / name for name in ("clock.c", "clock.so", "flag"))
    source.write_text(CLOCK)
    subprocess.run([program("gcc"), "-shared", "-fPIC", f'-DFLAG="{flag}"', "-o", library, source, "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    return flag.touch


@on_both
def test_the_clock_is_put_back_by_an_hour(put_clock_back: Callable[[], None], two: list[Server]) -> None:
    """For the servers and for Redis alike: ids go on increasing, and nobody is taken for dead or for new."""
    with Traffic(*two) as traffic:
        put_clock_back()
        assert two[0].read("/health")["timestamp"] < two[0].read("/status")["server"]["start_time"]
        traffic.is_whole(connections=1)
