"""How many publishes per second does a server take without clients, and how much CPU does each take?

Method: wrk, on the load's core, with 32 keep-alive connections and one request in flight on each; any answer but
success fails. Without wrk, the bench's own load does the same. CPU is measured with the bench's own load, 64
connections and one request in flight on each; median of the runs. NATS speaks no HTTP: the bench's own load sends it a
`PUB` instead of each request, and it answers each by +OK.

Not measured: the work done for each. notifyd validates each request and keeps it for clients that resume; of the peers,
FastAPI validates, nchan keeps, and the others only pass the bytes on.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from statistics import median

from load import CheckFailed, Load
from peers import HERE, Peer
from plan import Figure, Level, Row, Scale
from running import LOAD_CORE, Server, on_cores

CONNECTIONS = 32
IN_FLIGHT = 64
TITLE = f"POST /notify, no clients, {CONNECTIONS} connections"
COST_TITLE = f"CPU per POST /notify, {IN_FLIGHT} in flight"
SCRIPT = HERE.parent / "publish.lua"


def _with_wrk(server: Server, seconds: int) -> float:
    url = f"http://127.0.0.1:{server.publish_port}{server.peer.publish_path}"
    with on_cores({LOAD_CORE}):
        done = subprocess.run(
            ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", SCRIPT, url],
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds + 30,
        )
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    if rate is None or re.search("Non-2xx|Socket errors", done.stdout):
        raise CheckFailed(f"wrk says: {done.stdout}")
    return float(rate[1])


def rate(server: Server, scale: Scale) -> float:
    """Return how many publishes the server takes a second."""
    if server.peer.protocol == "websocket" and scale.publish_seconds and shutil.which("wrk"):
        return _with_wrk(server, scale.publish_seconds)
    with Load(server) as load:
        return scale.publishes / load.burst(scale.publishes, CONNECTIONS, depth=1)


def cost(server: Server, scale: Scale) -> float:
    """Return the server's CPU seconds for each publish."""
    costs = []
    with Load(server) as load:
        load.burst(IN_FLIGHT, IN_FLIGHT, depth=1)
        for _ in range(scale.burst_runs):
            before = server.cpu_seconds()
            load.burst(scale.publishes, IN_FLIGHT, depth=1)
            costs.append((server.cpu_seconds() - before) / scale.publishes)
    return median(costs)


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if not peer.answers_publishes:
        return
    with Server(peer) as server:
        yield Figure(Row(TITLE, "/s", 0, more_is_better=True, levels=(Level(0.5, "uws"),)), rate(server, scale))
        yield Figure(Row(COST_TITLE, "us", levels=(Level(25),)), cost(server, scale) * 1e6)
