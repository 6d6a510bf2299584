"""How much memory does an idle connection take?

Method: the growth of the resident set of the server and its children, from just before the first of 10,000
clients connects to when all are greeted and the server sleeps, divided by their number.

Not measured: the kernel's memory for a socket, the same for all, and the memory of a client with a backlog.
"""

from collections.abc import Iterator

from load import Load
from peers import Peer
from plan import Figure, Level, Row, Scale
from running import Server


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    with Server(peer) as server, Load(server) as load:
        before = server.rss_bytes()
        load.connect(scale.many_clients)
        server.cpu_seconds()  # waits until it sleeps
        growth = server.rss_bytes() - before
    row = Row(f"memory per idle connection, {scale.many_clients:,} clients", "KiB", base=None, levels=(Level(2.3),))
    yield Figure(row, growth / scale.many_clients / 1024)
