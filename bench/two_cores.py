"""How many more deliveries a second do two workers on two cores make than one worker on one?

Method: one worker on a SQLite file, on the core of all servers, and two workers on another file, which have both cores,
take turns: notifications one at a time, and a burst as in burst.py, to clients that sleep. The load needs a core, and a
machine of two has none to spare: it shares both with the two workers. So the figure is no quotient of two rates. It is
the CPU time of the one worker, by half of the core-seconds that the load left to the two, from the first request to the
last byte: what these wait for one another, for the file or for the load counts against them, and so does whatever else
runs on the machine. Two that lose nothing reach 2. Beside it stand the CPU time of both by that of the one, and the
load's share of the two cores.

Not measured: more workers, and the load on a machine of its own.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from statistics import median

from burst import CONNECTIONS, DEPTH
from load import Load
from peers import NOTIFYD, Peer, notifyd_on
from plan import Figure, Level, Row, Scale
from running import CORES, SERVER_CORE, Server

STORE = "sqlite:{folder}/store"
TITLE = "deliveries a second, two workers on two cores by one on one, SQLite, {}, {:,} clients"


@contextlib.contextmanager
def _loads(clients: int) -> Iterator[list[Load]]:
    """The clients of one worker, and of two."""
    with contextlib.ExitStack() as stack:
        loads = []
        for workers, cores in ((1, {SERVER_CORE}), (2, set(CORES))):
            server = stack.enter_context(Server(notifyd_on(STORE, workers), cores))
            loads.append(stack.enter_context(Load(server, clients)))
        os.sched_setaffinity(loads[1].process.pid, CORES)
        yield loads


def _compare(title: str, loads: list[Load], pairs: int, publish: Callable[[Load], float]) -> Figure:
    gains, costs, shares = [], [], []
    for turn in range(pairs + 1):
        spent = []
        for load in loads:
            before, of_load = load.server.cpu_seconds(), load.cpu_seconds()
            wall = publish(load)
            spent.append((load.server.cpu_seconds() - before, load.cpu_seconds() - of_load, wall))
        (one, *_), (both, of_load, wall) = spent
        if turn:
            gains.append(one / (wall - of_load / 2))
            costs.append(both / one)
            shares.append(of_load / wall / 2)
    row = Row(title, "x", 2, more_is_better=True, base=None, levels=(Level(1.8),))
    return Figure(row, median(gains), remark=f"CPU {median(costs):.2f} x, the load has {median(shares):.0%}")


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD or len(CORES) < 2:
        return
    some = scale.notifications_a_turn
    with _loads(scale.many_clients) as loads:
        title = TITLE.format("one at a time", scale.many_clients)
        yield _compare(title, loads, scale.batch_pairs, lambda load: sum(load.one_at_a_time(some)))
    with _loads(scale.clients) as loads:
        title = TITLE.format(f"a burst of {scale.burst:,}", scale.clients)
        yield _compare(title, loads, scale.burst_runs, lambda load: load.burst(scale.burst, CONNECTIONS, DEPTH))
