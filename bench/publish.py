"""How many publishes per second does a server take without clients?

Method: wrk, on the load's core, with 32 keep-alive connections and one request in flight on each; any answer but
success fails. Without wrk, the bench's own load does the same.

Not measured: the work done for each. notifyd validates each request and keeps it for clients that resume; of the peers,
FastAPI validates, nchan keeps, and the others only pass the bytes on.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator

from load import CheckFailed, Load
from peers import HERE, Peer
from plan import Figure, Level, Row, Scale
from running import LOAD_CORE, Server, on_core

CONNECTIONS = 32
TITLE = f"POST /notify, no clients, {CONNECTIONS} connections"
SCRIPT = HERE.parent / "publish.lua"


def _with_wrk(server: Server, seconds: int) -> float:
    url = f"http://127.0.0.1:{server.publish_port}{server.peer.publish_path}"
    with on_core(LOAD_CORE):
        done = subprocess.run(
            ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", SCRIPT, url],
            capture_output=True,
            text=True,
            check=True,
        )
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    if rate is None or re.search("Non-2xx|Socket errors", done.stdout):
        raise CheckFailed(f"wrk says: {done.stdout}")
    return float(rate[1])


def rate(server: Server, scale: Scale) -> float:
    """Return how many publishes the server takes a second."""
    if scale.publish_seconds and shutil.which("wrk"):
        return _with_wrk(server, scale.publish_seconds)
    with Load(server) as load:
        return scale.publishes / load.burst(scale.publishes, CONNECTIONS, depth=1)


def measure(peer: Peer, scale: Scale) -> Iterator[Figure]:
    if not peer.has_http:
        return
    with Server(peer) as server:
        yield Figure(Row(TITLE, "/s", 0, more_is_better=True, levels=(Level(15_000),)), rate(server, scale))
