"""Does a delivery by notifyd cost more after a long uptime?

Method: one notifyd has served thousands of clients that came and went, and thousands of notifications; another has just
started. Then both have the same number of clients and take turns (turns.py). The figure is the median of the
ratios of their CPU per delivery, the aged by the fresh one: 1 is no growth.

Not measured: days. Growth with every client or notification shows here, growth with the clock alone does not.
"""

from collections.abc import Iterator
from functools import partial

from burst import CONNECTIONS, DEPTH
from load import Load
from peers import NOTIFYD, Peer
from plan import Figure, Level, Row, Scale
from running import Server
from turns import Side, ratio, take_turns

ROUNDS = 3
# How many clients receive the notifications in between.
AUDIENCE = 100


def _age(server: Server, scale: Scale) -> None:
    for _ in range(ROUNDS):
        with Load(server, scale.handshakes):
            pass
        with Load(server, AUDIENCE) as load:
            load.burst(scale.ageing_notifications, CONNECTIONS, DEPTH)


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    with Server(peer) as aged, Server(peer) as fresh:
        _age(aged, scale)
        with Load(aged, scale.clients) as aged_load, Load(fresh, scale.clients) as fresh_load:
            each = scale.notifications_a_turn
            sides = (
                Side(aged_load, partial(aged_load.one_at_a_time, each), each),
                Side(fresh_load, partial(fresh_load.one_at_a_time, each), each),
            )
            take_turns(scale.pairs, *sides)
    clients, notifications = ROUNDS * scale.handshakes, ROUNDS * scale.ageing_notifications
    title = f"CPU per delivery after {clients:,} clients and {notifications:,} notifications, by a fresh server's"
    yield Figure(Row(title, "x", 2, levels=(Level(1.1),)), ratio(*sides))
