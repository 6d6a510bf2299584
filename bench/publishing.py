"""How much does a publish over the WebSocket or as a line of NDJSON cost, and how many a second take one connection?

Method: one connection publishes to a topic that nobody follows, in turns of `publishes`, 500 of them unanswered at a
time; the log in memory, in a SQLite file, and in a redis-server on the same core, whose own time is not in the cost.
Each has to be answered by success, in the order of the requests. The rate is from the first request to the last answer;
median of the turns. Beside it stands what uWebSockets.js takes by POST, as in publish.py.

Not measured: other peers, because their clients publish without answers, and deliveries, which fanout.py and burst.py
do.
"""

import contextlib
from collections.abc import Iterator
from statistics import median

from burst import IN_FLIGHT
from load import Audience, Load
from peers import NOTIFYD, REDIS, UWS, Peer, notifyd_on
from plan import MEMORY, Figure, Level, Row, Scale
from publish import rate
from running import Server

TURNS = 5
FORMS = {
    "frames": ("publish over a WebSocket", "publishes over one WebSocket"),
    "lines": ("line of NDJSON", "lines of NDJSON"),
}
NOBODY = Audience(1, "?topics=nobody", ',"topics":["nobody"]')
CPU_LEVEL, RATE_LEVELS, STORED_LEVEL = Level(10), (Level(60_000), Level(1, "uws")), Level(40_000)


@contextlib.contextmanager
def _servers() -> Iterator[dict[str, Server]]:
    with contextlib.ExitStack() as stack:
        flags = ("--publish-over-websocket",)
        peers = {MEMORY: notifyd_on("memory", 1, *flags), "sqlite": notifyd_on("sqlite:{folder}/store", 1, *flags)}
        if REDIS.prepare() is None:
            redis = stack.enter_context(Server(REDIS))
            peers["redis"] = notifyd_on(f"redis://127.0.0.1:{redis.port}", 1, *flags)
        yield {name: stack.enter_context(Server(peer)) for name, peer in peers.items()}


def _take(server: Server, form: str, publishes: int) -> tuple[float, float]:
    """Return the CPU seconds of a publish, and the publishes a second."""
    costs, rates = [], []
    with Load(server, 0, NOBODY, form=form) as load:
        load.burst(publishes, 1, IN_FLIGHT)
        for _ in range(TURNS):
            before = server.cpu_seconds()
            rates.append(publishes / load.burst(publishes, 1, IN_FLIGHT))
            costs.append((server.cpu_seconds() - before) / publishes)
    return median(costs), median(rates)


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    over_websocket = Row(FORMS["frames"][1], "/s", 0, more_is_better=True, base="uws", levels=RATE_LEVELS)
    if peer is UWS:
        with Server(peer) as server:
            yield Figure(over_websocket, rate(server, scale), remark="by POST")
    if peer is not NOTIFYD:
        return
    with _servers() as servers:
        for form, (one, many) in FORMS.items():
            levels = (CPU_LEVEL,) if form == "frames" else ()
            for name, server in servers.items():
                cost, reached = _take(server, form, scale.publishes)
                if name == MEMORY:
                    yield Figure(Row(f"CPU per {one}", "us", levels=levels), cost * 1e6)
                    row = over_websocket if form == "frames" else Row(many, "/s", 0, more_is_better=True)
                    yield Figure(row, reached)
                yield Figure(Row(f"CPU per {one}", "us", base=MEMORY), cost * 1e6, column=name)
                row = Row(many, "/s", 0, more_is_better=True, base=MEMORY, levels=(STORED_LEVEL,) if levels else ())
                yield Figure(row, reached, column=name)
