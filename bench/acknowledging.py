"""How much CPU does an acknowledgement cost?

Method: 100 clients, each with a client_id of its own, acknowledge one notification after the other, each by a send of
its own; the log in memory, and in a SQLite file. The cost has the reads from the sockets and the writes of the
bookmarks in it. At the end of a turn the server must count all clients as having acknowledged the newest notification.

Not measured: peers, because none takes acknowledgements as these.
"""

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median

from crowd import connected
from load import CheckFailed
from peers import NOTIFYD, Peer, notifyd_on
from plan import MEMORY, Figure, Row, Scale
from running import LOAD_CORE, Server, on_cores
from websockets.frames import Frame, Opcode

TURNS = 5
# Bookmarks are written down within half a second.
WRITTEN_SECONDS = 1.0
TITLE = "CPU per acknowledgement, {:,} clients"


def _published(connection: http.client.HTTPConnection, count: int) -> list[str]:
    """Publish so many, the last of them to everyone, and return their ids."""
    for_nobody = {"message": "bench", "topics": ["nobody"]}
    body = json.dumps([for_nobody] * (count - 1) + [{"message": "bench"}])
    connection.request("POST", "/notify/batch", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    return [each["id"] for each in answer["notifications"]]


def _cost(server: Server, clients: int, notifications: int) -> float:
    """Return the CPU seconds of an acknowledgement."""
    costs = []
    publishing = http.client.HTTPConnection("127.0.0.1", server.port)
    with ExitStack() as stack, on_cores({LOAD_CORE}):
        sockets = [
            stack.enter_context(connected(server.port, f"client_id=client{number}&topics=some"))
            for number in range(clients)
        ]
        for _ in range(TURNS):
            ids = _published(publishing, notifications)
            acks = [Frame(Opcode.TEXT, b'{"type":"ack","id":"%b"}' % id.encode()).serialize(mask=True) for id in ids]
            time.sleep(WRITTEN_SECONDS)
            before = server.cpu_seconds()
            for ack in acks:
                for client in sockets:
                    client.sendall(ack)
            time.sleep(WRITTEN_SECONDS)
            costs.append((server.cpu_seconds() - before) / notifications / clients)
            publishing.request("GET", f"/notifications/{ids[-1]}")
            delivery = json.loads(publishing.getresponse().read())["delivery"]
            if delivery["acknowledged"] != clients:
                raise CheckFailed(f"{clients} clients have acknowledged, and the server says {delivery}")
    publishing.close()
    return median(costs)


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if peer is not NOTIFYD:
        return
    row = Row(TITLE.format(scale.few_clients), "us", base=MEMORY)
    for name, each in {MEMORY: NOTIFYD, "sqlite": notifyd_on("sqlite:{folder}/store", 1)}.items():
        with Server(each) as server:
            yield Figure(row, _cost(server, scale.few_clients, scale.acknowledged) * 1e6, column=name)
