"""How much CPU does one delivery cost, and how long does a notification take to the last client?

Method: the server and the floor have the same number of clients each and take turns (turns.py) of a few notifications,
published one at a time. Latency is from the first byte of the publish to the last byte at the last client, in
the same turns.

The clients poll and never sleep, so no delivery wakes a client: a send then costs the least, and the ratio compares the
servers' own work. A sender pays for waking a sleeping client. All clients here are one process, which sleeps whenever
it has read everything: beside a slower server it sleeps more often, and that server pays for more wake-ups. One more
row has such clients; "woken" is the share of the deliveries that woke one, at the server and at the floor. (If each
client were a process of its own, every delivery would wake one.)

Not measured: clients on other machines. Loopback spends the receiving kernel's time on the server's core, for all
alike.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from statistics import median, quantiles

from load import Load
from peers import FLOOR, Peer
from plan import Figure, Level, Row, Scale
from running import Server
from turns import Side, ratio, take_turns

COST_TITLE = "CPU per delivery, {:,} clients"
SLEEPING_TITLE = "CPU per delivery, clients that sleep, {:,} clients"
LATENCY_TITLE = "publish to last client, {}, {:,} clients"
# The server's CPU time is the least that this can take: near 1, the load is never waited for.
LAG_TITLE = "publish to last client by CPU time of the server, {:,} clients"


@contextlib.contextmanager
def beside_the_floor(peer: Peer, clients: int) -> Iterator[list[Load]]:
    """The server and the floor, each with its clients."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(each)) for each in (peer, FLOOR)]
        yield [stack.enter_context(Load(server, clients)) for server in servers]


def compare(loads: list[Load], pairs: int, notifications: int) -> tuple[Side, Side, str]:
    """Let both take their turns; return these, and the shares of their deliveries that woke a client."""
    side, floor = [Side(load, partial(load.one_at_a_time, notifications), notifications) for load in loads]
    before = [load.sleeps() for load in loads]
    take_turns(pairs, side, floor)
    deliveries = (pairs + 1) * notifications * loads[0].clients
    woken = [(load.sleeps() - had) / deliveries for load, had in zip(loads, before, strict=True)]
    return side, floor, "woken {:.0%}/{:.0%}".format(*woken)


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    clients = scale.clients
    with beside_the_floor(peer, clients) as loads:
        side, floor, woken = compare(loads, scale.sleeping_pairs, scale.notifications_a_turn)
        sleeping = Row(SLEEPING_TITLE.format(clients), "us", 2)
        yield Figure(sleeping, side.cost() / clients * 1e6, ratio(side, floor), woken)

        for load in loads:
            load.poll()
        side, floor, _ = compare(loads, scale.pairs, scale.notifications_a_turn)
        row = Row(COST_TITLE.format(clients), "us", 2, levels=(Level(1.08, "floor"),))
        yield Figure(row, side.cost() / clients * 1e6, ratio(side, floor))
        for name, at, levels in (("p50", 49, ()), ("p99", 98, (Level(1.15, "floor"),))):
            row = Row(LATENCY_TITLE.format(name, clients), "ms", 2, levels=levels)
            seconds, base = quantiles(side.latencies, n=100)[at], quantiles(floor.latencies, n=100)[at]
            yield Figure(row, seconds * 1e3, seconds / base)
        if peer is FLOOR:
            row = Row(LAG_TITLE.format(clients), "x", 2, base=None)
            yield Figure(row, median(side.latencies) / side.cost())

    others = (
        (scale.few_clients, scale.pairs, scale.notifications_a_turn * scale.clients // scale.few_clients),
        (scale.many_clients, scale.many_pairs, scale.many_notifications_a_turn),
    )
    for clients, pairs, notifications in others:
        with beside_the_floor(peer, clients) as loads:
            for load in loads:
                load.poll()
            side, floor, _ = compare(loads, pairs, notifications)
            row = Row(COST_TITLE.format(clients), "us", 2, levels=(Level(1.15, "floor"),))
            yield Figure(row, side.cost() / clients * 1e6, ratio(side, floor))
