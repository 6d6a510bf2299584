"""One server in a process of its own on a core of its own, and its costs: CPU time and memory.

CPU time is the scheduler's own count in nanoseconds over all threads of the process and its children, ended ones too,
kernel time included. It is exact only while the server sleeps: `cpu_seconds` waits for that.
"""

import contextlib
import functools
import os
import random
import resource
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from peers import ROOT, Peer

START_SECONDS = 60.0
STOP_SECONDS = 5.0
# For a server to have nothing left to do.
PATIENCE_SECONDS = 60.0
# A server whose CPU time stays the same for this long has nothing left to do. The time is longer than a tick of the
# scheduler (1 to 10 ms).
QUIET_SECONDS = 0.012
# Ports below the range that the kernel uses for the clients.
PORTS = range(20000, 30000)

CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]


@contextlib.contextmanager
def on_cores(cores: Iterable[int]) -> Iterator[None]:
    """Processes that are started inside stay on these cores; the caller comes back."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def raise_file_limit() -> int:
    """Return the limit of open files, inherited by the servers and the load."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def free_port() -> int:
    """A port that is free, and the next one with it."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


def process_seconds(pid: int) -> float:
    """CPU time of a process since its start: the clock of clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


@functools.cache
def _soft_interrupts() -> list[Path]:
    """The kernel's thread that does what sending on the server's core left over, where there is one.

    On loopback a part of the receiving side runs in it, in no process's account, and more of it for a server that sends
    much in one go.
    """
    named = Path("/proc").glob("[0-9]*/comm")
    return [comm.parent for comm in named if _text(comm) == f"ksoftirqd/{SERVER_CORE}\n"]


def _text(path: Path) -> str:
    """What the file of a process holds; nothing once the process has ended."""
    try:
        return path.read_text()
    except OSError:
        return ""


class Server:
    """A server that serves inside `with Server(peer) as server:`. If the start fails, its output is shown."""

    def __init__(self, peer: Peer, cores: Iterable[int] = (SERVER_CORE,)) -> None:
        self.peer = peer
        self.port = free_port()
        self._cores = set(cores)

    @property
    def publish_port(self) -> int:
        return self.port + self.peer.publish_port_offset

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="notifyd-bench-")
        folder = Path(self._scratch.name)
        self._log = (folder / "log").open("w")
        environ = {k: v for k, v in os.environ.items() if not k.startswith("NOTIFYD_")}
        with on_cores(self._cores):
            self.process = subprocess.Popen(
                self.peer.command(self.port, folder), stdout=self._log, stderr=self._log, cwd=ROOT, env=environ
            )
        try:
            self._wait_until_it_listens()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            said = Path(self._scratch.name, "log").read_text()
            if self.peer.ready in said:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.publish_port), 1):
                    return
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.peer.name} did not start: {said[-2000:]}")
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()
        self._scratch.cleanup()

    def _processes(self) -> list[Path]:
        """The /proc folders of the process and all that descend from it."""
        found = [Path("/proc", str(self.process.pid))]
        for process in found:
            for children in process.glob("task/*/children"):
                found += [Path("/proc", pid) for pid in children.read_text().split()]
        return found

    def _cpu_seconds(self) -> float:
        processes = [*self._processes(), *_soft_interrupts()]
        return sum(process_seconds(int(process.name)) for process in processes)

    def cpu_seconds(self) -> float:
        """CPU time since the start, once it has stopped growing."""
        spent, deadline = self._cpu_seconds(), time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)
            before, spent = spent, self._cpu_seconds()
            if spent - before < QUIET_SECONDS / 100:
                return spent
        raise RuntimeError(f"{self.peer.name} did not come to rest within {PATIENCE_SECONDS:.0f} s")

    def rss_bytes(self) -> int:
        pages = sum(int((process / "statm").read_text().split()[1]) for process in self._processes())
        return pages * resource.getpagesize()
