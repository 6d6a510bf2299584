"""How much CPU does one delivery over Server-Sent Events cost?

Method: as the CPU per delivery in fanout.py, with 1,000 streams that poll. The floor beside them has as many WebSocket
clients. Events differ in size, so a round ends, on both sides, when all have the same and nothing more comes for 20 ms.
There is no latency, and a delivery costs more than in fanout.py, because the server has slept before each.

Not measured: peers without such streams.
"""

import contextlib
from collections.abc import Iterator

from load import Load
from peers import FLOOR, Peer
from plan import Figure, Row, Scale
from running import Server
from turns import ratio

from fanout import compare

TITLE = "CPU per delivery over Server-Sent Events, {:,} streams"


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if not peer.events_path:
        return
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(each)) for each in (peer, FLOOR)]
        loads = [
            stack.enter_context(Load(server, scale.clients, streams=server.peer is peer, settles=True))
            for server in servers
        ]
        for load in loads:
            load.poll()
        side, floor, _ = compare(loads, scale.sleeping_pairs, scale.notifications_a_turn)
    yield Figure(Row(TITLE.format(scale.clients), "us", 2), side.cost() / scale.clients * 1e6, ratio(side, floor))
