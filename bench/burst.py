"""How many deliveries per second does a server reach when publishes come faster than it can deliver each alone?

Method: 8 keep-alive connections with 8 pipelined requests each, 64 in flight, publish to 1,000 clients, and to 100; the
clock runs from the first request to the last byte at the last client. Median of the runs. Taking turns with the floor,
as in fanout.py, was tried and made the figure less steady: the floor's own results in a burst vary by a factor of 3.

Not measured: the effect of a slow client on the others; the load's clients read as fast as they can.
"""

from collections.abc import Iterator
from statistics import median

from load import Load
from peers import Peer
from plan import BEST, Figure, Level, Row, Scale
from running import Server

CONNECTIONS, DEPTH = 8, 8


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    levels = {scale.clients: (Level(5), Level(2, BEST)), scale.few_clients: (Level(1, BEST),)}
    for clients in (scale.clients, scale.few_clients):
        with Server(peer) as server, Load(server, clients) as load:
            load.poll()
            load.burst(CONNECTIONS * DEPTH, CONNECTIONS, DEPTH)
            seconds = median(load.burst(scale.burst, CONNECTIONS, DEPTH) for _ in range(scale.burst_runs))
        title = f"deliveries in a burst of {scale.burst:,}, {clients:,} clients"
        row = Row(title, "M/s", 2, more_is_better=True, levels=levels[clients])
        yield Figure(row, scale.burst * clients / seconds / 1e6)
