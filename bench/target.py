"""Does a notification for few clients cost more when more other clients are connected?

Method: two notifyd take turns (turns.py), one with 10 clients and one with 10,000. Each notification is for one client,
addressed by its client_id, for the two clients of a user, or for the 10 subscribers of a topic; load.c fails when
another client receives it. The figure is the CPU per notification among 10,000 clients divided by the same among 10: 1
is no difference. The rows with a level address the same 10 clients throughout, so that only the number of the others
differs. The rows without a level address all 10,000 in turn, so that none is in a cache: for a bare write() to so many
sockets that alone is 2.8 us.

The last rows show the cost of a topic that all clients follow. Two notifyd have the same clients and subscriptions; one
publishes to the topic and the other to everyone.

Not measured: peers, because they address clients in other ways or not at all, and clients that follow many topics.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from load import NUMBER, Audience, Load
from peers import NOTIFYD, Peer
from plan import Figure, Level, Row, Scale
from running import Server
from turns import Side, ratio, take_turns

FEW = 10
CLIENT_TITLE = "CPU per notification for one client among {:,}, by one among {:,}"
USER_TITLE = "CPU per notification for one user of two clients among {:,}, by one among {:,}"
TOPIC_TITLE = "CPU per notification for {1:,} followers of a topic among {0:,} clients, by among {1:,}"
IN_TURN_TITLE = "{}, all in turn"
EVERYONE_TITLE = "CPU per delivery by a topic that all {:,} clients follow, by a broadcast's"


@contextlib.contextmanager
def _two_crowds(*crowds: tuple[int, Audience]) -> Iterator[list[Load]]:
    """Two notifyd, each with so many clients of an audience."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(NOTIFYD)) for _ in crowds]
        yield [stack.enter_context(Load(server, *crowd)) for server, crowd in zip(servers, crowds, strict=True)]


def _compare(loads: list[Load], pairs: int, notifications: int) -> tuple[float, float]:
    """Return the seconds that a notification costs with the first load, and by the other's."""
    sides = [Side(load, partial(load.one_at_a_time, notifications), notifications) for load in loads]
    take_turns(pairs, *sides)
    return sides[0].cost(), ratio(*sides)


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    many = scale.many_clients
    one_client = Audience(1, f"?client_id={NUMBER}", f',"clients":["{NUMBER}"]')
    one_user = Audience(2, f"?user={NUMBER}", f',"users":["{NUMBER}"]')
    one_topic = Audience(FEW, f"?topics={NUMBER}", f',"topics":["{NUMBER}"]')
    for title, audience in ((CLIENT_TITLE, one_client), (USER_TITLE, one_user), (TOPIC_TITLE, one_topic)):
        same, everyone = title.format(many, FEW), IN_TURN_TITLE.format(title.format(many, FEW))
        with _two_crowds((many, audience), (FEW, audience)) as loads:
            for row, clients in ((Row(same, "x", 2, levels=(Level(1.1),)), FEW), (Row(everyone, "x", 2), many)):
                for load in loads:
                    load.address(clients // audience.group_size)
                cost, growth = _compare(loads, scale.target_pairs, scale.targets_a_turn)
                yield Figure(row, growth, remark=f"{cost * 1e6:.0f} us")

    by_topic = Audience(scale.clients, f"?topics={NUMBER}", f',"topics":["{NUMBER}"]')
    with _two_crowds((scale.clients, by_topic), (scale.clients, replace(by_topic, field=""))) as loads:
        cost, growth = _compare(loads, scale.pairs, scale.notifications_a_turn)
    row = Row(EVERYONE_TITLE.format(scale.clients), "x", 2)
    yield Figure(row, growth, remark=f"{cost / scale.clients * 1e6:.2f} us")
