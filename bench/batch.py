"""How much does a batch save per notification?

Method: one connection publishes to one notifyd, in turns (turns.py): single notifications by POST /notify, and 100 and
1,000 per request by POST /notify/batch. The figure is the server's CPU per notification: without clients, for the cost
of publishing alone, and with 100 clients, each reached by a batch in few writes. "x cheaper" is the median of the
turns.

Not measured: peers, because none takes batches.
"""

from collections.abc import Iterator
from functools import partial

from load import Load
from peers import NOTIFYD, Peer
from plan import Figure, Row, Scale
from running import Server
from turns import Side, ratio, take_turns

CLIENTS = (0, 100)
SIZES = (100, 1000)
TITLE = "CPU per notification published {}, {} clients"


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    for clients in CLIENTS:
        with Server(peer) as server, Load(server, clients) as load:
            single = Side(load, partial(load.one_at_a_time, scale.singles_a_turn), scale.singles_a_turn)
            batched = [
                Side(load, partial(load.batches, scale.batched_a_turn // size, size), scale.batched_a_turn)
                for size in SIZES
            ]
            take_turns(scale.batch_pairs, single, *batched)
        yield Figure(Row(TITLE.format("one at a time", clients), "us"), single.cost() * 1e6)
        for size, side in zip(SIZES, batched, strict=True):
            row = Row(TITLE.format(f"in batches of {size:,}", clients), "us")
            yield Figure(row, side.cost() * 1e6, remark=f"{ratio(single, side):.1f} x cheaper")
