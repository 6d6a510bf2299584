"""How much CPU does a handshake cost when all clients connect at once?

Method: 3,000 clients connect at the same time, as after a restart; CPU time of the server until all are greeted and it
sleeps, divided by their number. They leave with a reset, and come again; median of the rounds.

Not measured: TLS, authentication, and the cost of disconnecting.
"""

from collections.abc import Iterator
from statistics import median

from load import Load
from peers import Peer
from plan import Figure, Level, Row, Scale
from running import Server


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    costs = []
    with Server(peer) as server, Load(server) as load:
        for _ in range(scale.handshake_runs):
            before = server.cpu_seconds()
            load.connect(scale.handshakes, at_once=scale.handshakes)
            costs.append((server.cpu_seconds() - before) / scale.handshakes)
            load.disconnect()
    row = Row(f"CPU per handshake, {scale.handshakes:,} at once", "us", levels=(Level(60),))
    yield Figure(row, median(costs) * 1e6)
