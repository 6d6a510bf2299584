"""The servers and stores of the tests, and the checks of servers after every test."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT
from typing import Any

import pytest
from browser import Browser
from expected import Record, order_differs
from forks import WarmProcess
from members import SHORT_LEASE, Process, shorten_leases
from processes import QUIET, ROOT, Server, program, use_extra_flags
from redis_group import Group
from redis_server import RedisServer
from wheels import build, command, install

from store import LEASE_SECONDS

StartServer = Callable[..., Server]
Make = Callable[[str, Callable[[Path], None]], Path]

MANY_FILES = 8

# Modules and tests stay until the end. To look for garbage among them takes most of the time of the collection.
gc.disable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server-args", default="", help="flags to append to the command line of every server")
    parser.addoption("--server-python", default=sys.executable, help="the interpreter of every server")
    parser.addoption(
        "--store", choices=["sqlite", "redis", "sentinel"], help="the store of every server, each with its own"
    )


def pytest_configure(config: pytest.Config) -> None:
    use_extra_flags(config.getoption("--server-args"))
    for number in (SIGINT, SIGHUP):
        # A run in the background ignores Ctrl+C, and children inherit that, but not a handler that does nothing.
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    Server.python = config.getoption("--server-python")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three workers a core for many files, because most tests only wait; none for a few tests, which end sooner."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return min(3 * (os.cpu_count() or 1), 12) if is_whole or len(config.args) > MANY_FILES else 0


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Say it when two objects differ only in the order of their fields."""
    if op == "==" and isinstance(left, Record) and isinstance(right, dict) and order_differs(list(left), list(right)):
        return ["the order of the fields", f"got:      {list(left)}", f"expected: {list(right)}"]
    return None


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """After each test, close its clients, show what the servers logged, and let no exception in there pass."""
    yield
    complaints = [complaint for server in Server.started for complaint in server.complaints()]
    for server in [server for server in Server.started if server.process.returncode is not None]:
        server.kill()
        Server.started.remove(server)
    assert not complaints, "\n".join(complaints)


@pytest.fixture(scope="session", autouse=True)
def _store(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put every server on a store of its own in the one that --store names."""
    store = pytestconfig.getoption("--store")
    if store == "sqlite":
        use_extra_flags(f"--store sqlite:{tmp_path_factory.mktemp('stores')}/{{new}}")
    redis = RedisServer() if store == "redis" else Group(replicas=0, sentinels=1) if store == "sentinel" else None
    if redis is not None:
        use_extra_flags(f"--store {redis.url} --store-prefix {{new}}:")
    if store is not None:
        # A busy machine is no reason to take the store for away.
        use_extra_flags("--store-timeout 10")
    yield
    if redis is not None:
        redis.close()


@pytest.fixture(scope="session", autouse=True)
def _every_server_ends(_store: None) -> Iterator[None]:
    """At the end, wait for the servers that were still stopping."""
    yield
    for server in Server.started:
        server.stop()
    WarmProcess.end()
    complaints = [complaint for server in Server.started for complaint in server.complaints()]
    assert not complaints, "\n".join(complaints)


@pytest.fixture(scope="session")
def _shared_server() -> Iterator[Server]:
    server = Server.notifyd(*QUIET)
    yield server
    server.stop()


@pytest.fixture
def server(_shared_server: Server) -> Server:
    """A server that many tests share: default settings, but neither test notifications nor pings."""
    return _shared_server


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Start servers with flags and variables of their own; they are asked to stop when the test has ended.

    The check takes a moment, and no test waits for it: a later test reports the fault, with the name of this one.
    """
    servers: list[Server] = []

    def start(*flags: str, quiet: bool = True, **options: Any) -> Server:
        silence = QUIET if quiet else ()
        servers.append(Server.notifyd(*silence, *flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.ask_to_stop()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium."""
    browser = Browser(program("chromium", "chromium-browser", "google-chrome"), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.stop()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make a directory once for all processes of this test run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        directory, done = base / name, base / f"{name}.done"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                fill(directory)
                done.touch()
        return directory

    return make


@pytest.fixture(scope="session")
def npm_package(once: Make) -> Path:
    """A directory with the npm package, and the script that uses it."""

    def fill(directory: Path) -> None:
        npm = program("npm")
        [packed] = command(npm, "pack", "--silent", "--pack-destination", directory, ROOT / "clients" / "js").split()
        (directory / "package.json").write_text('{"private": true, "type": "module"}')
        command(npm, "install", "--silent", "--offline", "--no-audit", "--prefix", directory, directory / packed)
        shutil.copy(ROOT / "examples" / "listen.js", directory)

    return once("npm", fill)


@pytest.fixture(scope="session")
def client_wheel(once: Make) -> Path:
    [wheel] = once("client", lambda directory: build(ROOT / "clients" / "python", directory)).glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def pythons(once: Make, client_wheel: Path) -> Callable[..., str]:
    """Return the interpreter of an environment with the Python package."""

    def make(name: str, extras: str, *others: str) -> str:
        wanted = f"notifyd-client{extras} @ file://{client_wheel}"
        return str(once(f"client-{name}", lambda directory: install(directory, wanted, *others)) / "bin" / "python")

    return make


@pytest.fixture
def python(pythons: Callable[..., str]) -> str:
    return pythons("all", "[all]")


@pytest.fixture(scope="session")
def node() -> list[str]:
    """The command that runs node with a WebSocket."""
    command = program("node")
    found = subprocess.run([command, "-p", "typeof WebSocket"], capture_output=True, text=True, check=True)
    return [command] if found.stdout.strip() == "function" else [command, "--experimental-websocket"]


# Stores without a server, see members.py.


@pytest.fixture(scope="session")
def common_redis() -> Iterator[Callable[[], RedisServer]]:
    """Give a Redis, the same for all tests; it is started for the first that asks."""
    start = functools.cache(RedisServer)
    yield start
    if start.cache_info().currsize:
        start().close()


EVERY_KIND = ["memory", "workers", "sqlite", "redis"]


@pytest.fixture(scope="module")
def start_together(
    tmp_path_factory: pytest.TempPathFactory, common_redis: Callable[[], RedisServer]
) -> Iterator[Callable[..., list[Server]]]:
    """Start the servers of one store: two of a shared one, so that the last knows the first's clients through it."""
    started: list[Server] = []

    def start(kind: str, *flags: str) -> list[Server]:
        store: tuple[str, ...] = ()
        if kind == "workers":
            store = ("--workers", "2")
        elif kind == "sqlite":
            store = ("--store", f"sqlite:{tmp_path_factory.mktemp('store') / 'log.db'}")
        elif kind == "redis":
            store = ("--store", common_redis().url, "--store-prefix", f"{secrets.token_hex(4)}:")
        count = 2 if kind in ("sqlite", "redis") else 1
        servers = [Server.notifyd(*QUIET, *flags, "--store-timeout", "10", *store) for _ in range(count)]
        started.extend(servers)
        return servers

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def redis(common_redis: Callable[[], RedisServer]) -> RedisServer:
    """That Redis, with nothing in it."""
    common_redis().empty()
    return common_redis()


def _address(kind: str, tmp_path: Path, common_redis: Callable[[], RedisServer]) -> str:
    if kind == "redis":
        common_redis().empty()
        return common_redis().url
    return f"sqlite:{tmp_path / 'log.db'}" if kind == "sqlite" else kind


@pytest.fixture(params=["memory", "sqlite", "redis"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path, common_redis: Callable[[], RedisServer]) -> str:
    """The address of an empty store."""
    return _address(request.param, tmp_path, common_redis)


@pytest.fixture(params=["sqlite", "redis"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, common_redis: Callable[[], RedisServer]) -> str:
    """The address of an empty store that processes share."""
    return _address(request.param, tmp_path, common_redis)


@pytest.fixture
def _short_leases() -> Iterator[None]:
    """Have nodes of this process taken for dead after SHORT_LEASE."""
    shorten_leases(SHORT_LEASE)
    yield
    shorten_leases(LEASE_SECONDS)


@pytest.fixture
def start_process() -> Iterator[Callable[..., Process]]:
    """Start members in processes of their own."""
    processes: list[Process] = []

    def start(*arguments: Any, **settings: int) -> Process:
        processes.append(Process(*arguments, **settings))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
