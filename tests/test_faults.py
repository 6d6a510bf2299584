"""Faults of the processes and of their store, while publishers publish and clients listen.

After each fault: no notification that was answered 200 is lost, none comes twice or out of order, no counter goes back,
no client stays out for longer than 10 s, and no operator has to help. Publishers repeat unanswered requests with the
same Idempotency-Key, clients that lose their connection resume; both go to the next server where one is gone.
"""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from conftest import StartServer
from processes import Server, eventually, free_port, is_free, needs_proc, program, serving
from redis_server import RedisServer
from traffic import FREE_SECONDS, Traffic, health

pytestmark = [pytest.mark.slow, needs_proc]

# For a store that shall have a full disk.
DISK_BYTES = 32 * 1024 * 1024
# Enough to resume from after the longest absence.
HISTORY = ("--history-size", "100000")


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
    flags = ("--workers", "2", "--store", f"sqlite:{path}", *HISTORY, "--port", str(free_port()))
    first = start_server(*flags)
    with Traffic(first) as traffic:
        traffic.stays_up = False
        os.kill(first.pid, SIGKILL) if victims == "parent" else os.killpg(first.pid, SIGKILL)
        eventually(lambda: is_free(first.port))
        start_server(*flags)
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
    """Redis refuses for want of memory, or because it is a replica for a while."""
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
    """While the clocks go back, ids go on increasing, and nobody is taken for dead or for new."""
    with Traffic(*two) as traffic:
        put_clock_back()
        assert two[0].read("/health")["timestamp"] < two[0].read("/status")["server"]["start_time"]
        traffic.is_whole(connections=1)
