"""How many deliveries per second does a server reach when publishes come faster than it can deliver each alone?

Method: 8 keep-alive connections with 8 pipelined requests each, 64 in flight, publish to 1,000 clients, and to 100; the
clock runs from the first request to the last byte at the last client. Median of the runs. Taking turns with the floor,
as in fanout.py, was tried and made the figure less steady: the floor's own results in a burst vary by a factor of 3.
The CPU per delivery is that of all runs together: steadier where something else disturbs the clock.

Among few clients the publishing is most of the work. So notifyd is measured there also with one publisher that has 500
requests in flight, over a WebSocket (where it is a client as well, and gets what it publishes) and as NDJSON; beside it
stand the peers' figures of the row before.

Not measured: the effect of a slow client on the others; the load's clients read as fast as they can.
"""

import time
from collections.abc import Iterator
from statistics import median

from load import Load
from peers import NOTIFYD, Peer
from plan import BEST, Figure, Level, Row, Scale
from running import Server

CONNECTIONS, DEPTH = 8, 8
# Of a single publisher: half of its window.
IN_FLIGHT = 500
# After so long no other run begins: the slowest peers take 10 s for one.
LONG_SECONDS = 10.0
FORMS = {"frames": "over one WebSocket", "lines": "as NDJSON"}


def _take(load: Load, scale: Scale, connections: int, depth: int) -> tuple[float, float]:
    """Return the deliveries a second, in millions, and the CPU seconds of a delivery."""
    deliveries = scale.burst * load.clients
    load.poll()
    load.burst(connections * depth, connections, depth)
    before, seconds = load.server.cpu_seconds(), list[float]()
    ends = time.monotonic() + LONG_SECONDS
    while len(seconds) < scale.burst_runs and (time.monotonic() < ends or not seconds):
        seconds.append(load.burst(scale.burst, connections, depth))
    cost = (load.server.cpu_seconds() - before) / len(seconds) / deliveries
    return deliveries / median(seconds) / 1e6, cost


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    levels = {scale.clients: (Level(2, BEST),), scale.few_clients: ()}
    for clients, wanted in levels.items():
        burst = f"in a burst of {scale.burst:,}, {clients:,} clients"
        with Server(peer) as server, Load(server, clients) as load:
            rate, cost = _take(load, scale, CONNECTIONS, DEPTH)
        yield Figure(Row(f"deliveries {burst}", "M/s", 2, more_is_better=True, levels=wanted), rate)
        yield Figure(Row(f"CPU per delivery {burst}", "us", 2), cost * 1e6)
    for form, published in FORMS.items():
        if peer is NOTIFYD:
            with (
                Server(peer.with_flags("--publish-over-websocket")) as server,
                Load(server, clients, form=form) as load,
            ):
                rate, _ = _take(load, scale, 1, IN_FLIGHT)
        title = f"deliveries {burst}, published {published} (peers as above)"
        yield Figure(Row(title, "M/s", 2, more_is_better=True, levels=(Level(1, BEST),)), rate)
