"""Where does the CPU time of a server go?

Method: perf samples the server's process while it does what other measures time: notifications one at a time
(fanout.py), a burst (burst.py), publishes without clients (publish.py), and handshakes with the disconnects
(handshake.py). The figure is the kernel's share of the samples. Beside it stand the share of its copying from the
sender, which is in it, and the largest shares of libraries. The kernel's share shrinks only by fewer system calls for
the same bytes.

Not measured: peers but uWebSockets.js, and what the kernel's own thread does (running.py).
"""

import contextlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from burst import CONNECTIONS, DEPTH
from load import CheckFailed, Load
from peers import NOTIFYD, UWS, Peer, output
from plan import Figure, Row, Scale
from publish import IN_FLIGHT
from running import Server

RECORD = ("perf", "record", "-q", "-e", "cpu-clock", "-F", "4000")
LEAST_SECONDS = 1.0
SHARE = re.compile(r"^\s*([\d.]+)%\s+(\S.*?)\s*$", re.M)
KERNEL, COPYING = "[kernel.kallsyms]", "_copy_from_iter"
LIBRARIES = 3


@contextlib.contextmanager
def _sampled(server: Server, into: Path) -> Iterator[None]:
    command = [*RECORD, "-o", str(into), "-p", str(server.process.pid)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as perf:
        try:
            while not into.exists() and perf.poll() is None:
                time.sleep(0.05)
            yield
        finally:
            perf.send_signal(2)


def _shares(of: str, data: Path) -> dict[str, float]:
    """Return the shares of the samples, largest first, by `dso` or `sym`."""
    report = output("perf", "report", "-i", str(data), "--stdio", "-q", "--sort", of)
    return {re.sub(r"^\[[k.]\] ", "", name): float(share) for share, name in SHARE.findall(report)}


def _figure(title: str, server: Server, work: Callable[[], object], seconds: float) -> Figure:
    work()
    with tempfile.TemporaryDirectory(prefix="notifyd-bench-") as folder:
        data = Path(folder, "perf.data")
        with _sampled(server, data):
            ends = time.monotonic() + max(seconds, LEAST_SECONDS)
            while time.monotonic() < ends:
                work()
        objects, symbols = _shares("dso", data), _shares("sym", data)
    if not objects:
        raise CheckFailed("perf has no samples")
    kernel, copying = objects.pop(KERNEL, 0.0), symbols.get(COPYING, 0.0)
    names = [f"{re.split('[.]so|-', name)[0]} {share:.0f}" for name, share in list(objects.items())[:LIBRARIES]]
    row = Row(f"the kernel's share of the CPU, {title}", "%", 0, base=None)
    return Figure(row, kernel, remark=", ".join([f"copying {copying:.0f}", *names]))


def _can_sample() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = [*RECORD, "-o", str(Path(folder, "perf.data")), "true"]
        return bool(shutil.which("perf")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    # perf itself needs some tenths of a second to begin.
    if peer not in (NOTIFYD, UWS) or not scale.publish_seconds or not _can_sample():
        return
    seconds = scale.publish_seconds / 2
    for clients in (scale.clients, scale.few_clients):
        with Server(peer) as server, Load(server, clients) as load:
            load.poll()
            one = partial(load.one_at_a_time, scale.notifications_a_turn)
            yield _figure(f"one at a time, {clients:,} clients", server, one, seconds)
            burst = partial(load.burst, scale.burst, CONNECTIONS, DEPTH)
            yield _figure(f"a burst of {scale.burst:,}, {clients:,} clients", server, burst, seconds)
    with Server(peer) as server, Load(server) as load:
        publishes = partial(load.burst, scale.publishes, IN_FLIGHT, 1)
        yield _figure(f"publishes, {IN_FLIGHT} in flight", server, publishes, seconds)

        def handshakes() -> None:
            load.connect(scale.handshakes, at_once=scale.handshakes)
            load.disconnect()

        yield _figure(f"handshakes, {scale.handshakes:,} at once", server, handshakes, seconds)
