"""Several processes behind one port: the parent that keeps them running, and the parent as a worker knows it.

Owns the processes, the orders between them, and the temporary log that they share when no store is named. Knows
neither Hub nor uvicorn.

1. The parent binds the ports and never listens, so no other program gets them. Each worker inherits a socket of its own
   on each port and listens when it is ready; the kernel spreads newcomers over the listening workers.
2. Orders go over a socket pair, a byte each. Its end tells either side that the other is dead, for any reason.
3. A worker that has drained serves on until all have: if its socket closed earlier, newcomers that the kernel has
   assigned to it would be lost instead of being told of the shutdown.
4. Only the parent acts on Ctrl+C, sent by the terminal to the whole group, and on a SIGHUP to reload. A worker that
   gets a SIGTERM of its own drains, and is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from settings import Settings, SettingsError

if TYPE_CHECKING:
    from server import Server

logger = logging.getLogger("notifyd")

# No variable of a setting: only the parent sets it.
VARIABLE = "_NOTIFYD_WORKER"
DIRECTORY_PREFIX, LOCK = "notifyd-workers-", "lock"
READY, ALIVE, DRAINED = b"r", b"a", b"e"
DRAIN, NOW, END, RELOAD = b"d", b"n", b"x", b"h"
# Linux spreads newcomers over the sockets that share a port. On other systems the workers share one socket, and the
# first worker to wake accepts almost everything: 362 of 400 simultaneous connections, with four workers.
DEALS_OUT = sys.platform == "linux"
# A worker that dies sooner is not replaced at once: the next one is likely to die as well.
STABLE_SECONDS = 2.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 10.0
# The interval at which a worker says that it is alive. A worker that is silent for twice SILENCE_SECONDS hangs: the
# kernel would go on assigning newcomers to it, and they would get no answer.
ALIVE_SECONDS, SILENCE_SECONDS = 1.0, 10.0
# Longer than a worker needs to close all its connections, leave the store and end: a worker that takes longer hangs.
KILL_SECONDS = 15.0
# The time that a worker without a parent has for its closes.
ORPHAN_SECONDS = 1.0


class WorkerStart(Struct):
    """The start data of a worker: the descriptors of the listeners and of the link to its parent, and settings.

    `host` is the same for all workers of one parent.
    """

    listeners: list[int]
    link: int
    host: str
    settings: Settings


def read_start(environ: Mapping[str, str]) -> WorkerStart | None:
    """Return the start data from the parent, if this process is a worker."""
    return msgspec.json.decode(environ[VARIABLE], type=WorkerStart) if VARIABLE in environ else None


class ParentLink(asyncio.Protocol):
    """The parent as a worker knows it."""

    def __init__(self, start: WorkerStart) -> None:
        self._link = start.link
        self.host = start.host
        # Whether the whole server stops, and not this worker alone.
        self.stops = False
        self._all_have_drained = asyncio.Event()

    async def follow(self, server: Server) -> None:
        """Report that the server is ready, and let the parent give it orders from now on."""
        self._server = server
        link = socket.socket(fileno=self._link)
        self._transport, _ = await asyncio.get_running_loop().create_connection(lambda: self, sock=link)
        self._transport.write(READY)
        self._say_alive()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _say_alive(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(ALIVE)
            asyncio.get_running_loop().call_later(ALIVE_SECONDS, self._say_alive)

    async def drained(self) -> None:
        """Report that the server has drained. If all workers drain, return when all have."""
        if self.stops and not self._transport.is_closing():
            self._transport.write(DRAINED)
            await self._all_have_drained.wait()

    def data_received(self, data: bytes) -> None:
        if RELOAD in data:
            self._server.reload()
        if END in data:
            self._all_have_drained.set()
        self.stops = self.stops or NOW in data or DRAIN in data
        if NOW in data:
            self._server.close_now()
        elif DRAIN in data:
            self._server.drain()

    def connection_lost(self, *_: object) -> None:
        logger.error("The parent process is gone: closing everyone")
        # First of all: the next start must find the port free.
        self._server.stop_listening()
        self._server.close_now()
        self._all_have_drained.set()
        asyncio.get_running_loop().call_later(ORPHAN_SECONDS, os._exit, 1)


def supervise(settings: Settings, ports: Sequence[socket.socket], announce: Callable[[], None]) -> int:
    """Serve with several workers on bound sockets until told to stop, and return the exit status.

    Announces when all of them serve.
    """
    for port in ports if DEALS_OUT else ():
        # Only now that it is bound: no socket of another user can share the port.
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with contextlib.ExitStack() as stack:
        store = settings.store
        if store == "auto":
            try:
                directory = stack.enter_context(_temporary_directory())
            except OSError as error:
                reason = f"no directory for a temporary log: {error.strerror}"
                raise SettingsError(f"--workers: {reason}; name a --store") from None
            store = f"sqlite:{directory / 'log'}"
        drain_rate = max(1, settings.drain_rate // settings.workers)
        settings = msgspec.structs.replace(settings, store=store, drain_rate=drain_rate)
        return asyncio.run(_Supervisor(settings, ports, announce).run())


def check_store(settings: Settings) -> None:
    """Raise SettingsError if the workers would not share a store."""
    if settings.workers > 1 and settings.store == "memory":
        raise SettingsError(f"--store: memory is for one process, and --workers is {settings.workers}")


class _Worker:
    """A worker as its parent knows it."""

    def __init__(self, settings: Settings, host: str, ports: Sequence[socket.socket]) -> None:
        """Start it. Raises OSError."""
        self.has_drained = False
        self._link, link = socket.socketpair()
        self._link.setblocking(False)
        listeners = [_twin(port) if DEALS_OUT else port.dup() for port in ports]
        start = WorkerStart([listener.fileno() for listener in listeners], link.fileno(), host, settings)
        variables = os.environ | {VARIABLE: msgspec.json.encode(start).decode()}
        # A worker inherits the mask: it never hears Ctrl+C, and a SIGTERM waits until it can drain.
        heard = {signal.SIGINT, signal.SIGTERM} | ({signal.SIGHUP} if settings.ssl_certfile else set())
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, heard)
        try:
            self.process = subprocess.Popen(  # noqa: S603 - the command line is this process's own
                [sys.executable, *sys.orig_argv[1:]], env=variables, pass_fds=[*start.listeners, start.link]
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            link.close()
            for listener in listeners:
                listener.close()

    async def _hear(self) -> bytes:
        """Return the next byte from the worker, nothing after its end."""
        with contextlib.suppress(ConnectionError):
            return await asyncio.get_running_loop().sock_recv(self._link, 1)
        return b""

    async def ready(self) -> bool:
        """Wait until it serves, or has ended before that."""
        return await self._hear() == READY

    def order(self, order: bytes) -> None:
        with contextlib.suppress(OSError):
            self._link.send(order)

    async def ended(self, drained: Callable[[], None]) -> int:
        """Wait for its end, killing it if it hangs, and return the exit status as shells do.

        Calls `drained` when it has drained.
        """
        silences, heard = 0, ALIVE
        while heard:
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    heard = await self._hear()
                silences = 0
                if heard == DRAINED:
                    self.has_drained = True
                    drained()
            except TimeoutError:
                # The first silence may be this process's own: it was stopped, and the worker with it.
                silences += 1
                if silences == 2:
                    logger.error("Worker %d hangs and is killed", self.process.pid)
                    self.process.kill()
        # It takes milliseconds, but even these must not block the event loop.
        while (status := self.process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._link.close()
        return status if status >= 0 else 128 - status


def _twin(port: socket.socket) -> socket.socket:
    """Return another socket bound to the same port, with the options that accepted sockets inherit."""
    twin = socket.socket(port.family)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        twin.setsockopt(socket.SOL_SOCKET, option, 1)
    for option in (socket.TCP_NODELAY, socket.TCP_USER_TIMEOUT):
        twin.setsockopt(socket.IPPROTO_TCP, option, port.getsockopt(socket.IPPROTO_TCP, option))
    if port.family == socket.AF_INET6:
        only = port.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        twin.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
    twin.bind(port.getsockname())
    return twin


class _Supervisor:
    """The parent: starts the workers, replaces those that die, and ends when all have ended."""

    def __init__(self, settings: Settings, ports: Sequence[socket.socket], announce: Callable[[], None]) -> None:
        self._settings = settings
        self._host = secrets.token_hex(8)
        self._ports = ports
        self._announce = announce
        self._workers: set[_Worker] = set()
        self._ready = 0
        self._status = 0
        self._one_is_ready = asyncio.Event()
        self._stopping = asyncio.Event()

    async def run(self) -> int:
        with signals_to(self._signalled, self._reload if self._settings.ssl_certfile else None):
            # The others wait for the first, so that an error of all of them is logged once.
            first = asyncio.create_task(self._keep())
            await self._one_is_ready.wait()
            await asyncio.gather(first, *(self._keep() for _ in range(self._settings.workers - 1)))
        return self._status

    async def _keep(self) -> None:
        """Keep one worker running. The first failure before all are ready is the parent's end."""
        pause = 0.0
        while not self._stopping.is_set():
            started_at = time.monotonic()
            status = await self._run_one()
            if self._stopping.is_set():
                self._status = self._status or status
            elif self._ready < self._settings.workers:
                self._status = status or 1
                if status > 128:
                    # Otherwise the worker has logged the reason.
                    logger.error("A worker ended with status %d before all were ready", status)
                self._stop(NOW)
            else:
                stable = time.monotonic() - started_at > STABLE_SECONDS
                pause = 0.0 if stable else min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
                level = logging.WARNING if status else logging.INFO
                logger.log(level, "A worker ended with status %d and is replaced in %.2f s", status, pause)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause)

    async def _run_one(self) -> int:
        try:
            worker = _Worker(self._settings, self._host, self._ports)
        except OSError as error:
            logger.error("Cannot start a worker: %s", error)
            return 1
        self._workers.add(worker)
        if await worker.ready():
            self._ready += 1
            self._one_is_ready.set()
            if self._ready == self._settings.workers and not self._stopping.is_set():
                self._announce()
        status = await worker.ended(self._let_end)
        self._workers.discard(worker)
        self._let_end()
        return status

    def _let_end(self) -> None:
        """Let the workers end when all remaining ones have drained."""
        if all(worker.has_drained for worker in self._workers):
            for worker in self._workers:
                worker.order(END)

    def _signalled(self) -> None:
        self._stop(NOW if self._stopping.is_set() else DRAIN)

    def _reload(self) -> None:
        for worker in self._workers:
            worker.order(RELOAD)

    def _stop(self, order: bytes) -> None:
        self._stopping.set()
        self._one_is_ready.set()
        for port in self._ports:
            port.close()
        for worker in self._workers:
            worker.order(order)
        # The store is told twice: of the shutdown, and that the worker leaves.
        patience = KILL_SECONDS + 2 * self._settings.store_timeout
        if order == DRAIN:
            # At worst everyone stays until the end of the drain, and is then closed at its pace.
            patience += self._settings.shutdown_timeout + self._settings.max_connections / self._settings.drain_rate
        asyncio.get_running_loop().call_later(patience, self._kill)

    def _kill(self) -> None:
        for worker in self._workers:
            # A worker that has drained waits for the others.
            if not worker.has_drained:
                logger.error("Worker %d does not end and is killed", worker.process.pid)
                worker.process.kill()


@contextlib.contextmanager
def signals_to(act: Callable[[], None], reload: Callable[[], None] | None = None) -> Iterator[None]:
    """Call `act` on the event loop for each SIGINT and SIGTERM, and ignore those that come afterwards.

    `reload`, where it is given, is called for each SIGHUP.
    """
    loop = asyncio.get_running_loop()
    actions = {signal.SIGINT: act, signal.SIGTERM: act}
    if reload is not None:
        actions[signal.SIGHUP] = reload
    for number, action in actions.items():
        signal.signal(number, lambda *_, action=action: loop.call_soon_threadsafe(action))
    if reload is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    yield
    # The rest of the process takes milliseconds; an impatient signal must not spoil its exit status.
    for number in actions:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _temporary_directory() -> Iterator[Path]:
    """Make a directory that only this user can enter, locked as long as this process lives, and remove it at the end.

    Removes those of dead processes first.
    """
    for leftover in Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*"):
        _remove_if_dead(leftover)
    path = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
    # Workers do not inherit the descriptor, and so not the lock.
    with (path / "new").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now, because an unlocked directory counts as a dead process's.
        (path / "new").rename(path / LOCK)
        yield path
        # A cleaner may have removed it already.
        shutil.rmtree(path, ignore_errors=True)


def _remove_if_dead(directory: Path) -> None:
    with contextlib.suppress(OSError):
        if directory.lstat().st_uid == os.getuid():
            with (directory / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
