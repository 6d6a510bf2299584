"""notifyd beside the other ways to send one notification to many WebSocket clients.

    make bench          all measures, 28 minutes at most; writes bench/RESULTS.md and bench/results.svg
    make bench-quick    the same with fewer rounds and clients, in some minutes; only prints

Each server has one core for itself and the load generator another. A peer that the machine does not have is skipped,
and the reason is printed; a measure that fails, or takes too long, is marked as failed, and the others go on. Exit
status: 0; 1 after a failure; 69 when nothing can run.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import acknowledging
import batch
import burst
import compression
import event_streams
import handshake
import hold
import load
import long_log
import memory
import publish
import publishing
import report
import shares
import stores
import target
import two_cores
import uptime
from peers import FLOOR, PEERS, REDIS, Peer
from plan import FULL, QUICK, TINY, Figure, Scale
from running import CORES, LOAD_CORE, raise_file_limit

import fanout

# Of one peer in one measure, and of all.
MEASURE_SECONDS, RUN_SECONDS = 300, 27 * 60

# In the order of a run: if the time is too short, it is too short for the last.
_MODULES = (
    fanout,
    burst,
    handshake,
    memory,
    publish,
    publishing,
    two_cores,
    compression,
    event_streams,
    acknowledging,
    shares,
    stores,
    batch,
    target,
    hold,
    uptime,
    long_log,
)
MEASURES: dict[str, ModuleType] = {module.__name__: module for module in _MODULES}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="scale", const=QUICK, help="under a minute")
    size.add_argument(
        "--tiny", action="store_const", dest="scale", const=TINY, help="only the checks; no figure counts"
    )
    parser.add_argument("--only", nargs="+", choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, help="only these")
    parser.set_defaults(scale=FULL, only=list(PEERS), measure=list(MEASURES))
    return parser.parse_args()


def prepare(names: list[str]) -> dict[str, str]:
    """Return those that cannot run here, with the reason."""
    needed = load.prepare() or FLOOR.prepare()
    if needed:
        return dict.fromkeys(names, f"the load generator and the floor are C, and {needed}")
    return {name: reason for name in names if (reason := PEERS[name].prepare())}


def _give_up(*_: object) -> None:
    raise TimeoutError("it took too long")


def run_one(name: str, peer: str, scale: Scale, results: report.Results, deadline: float) -> None:
    """Add a peer's figures of one measure, or its failure, to the results."""
    run: Callable[[Peer, Scale], Iterator[Figure]] = MEASURES[name].measure
    signal.setitimer(signal.ITIMER_REAL, max(0.001, min(MEASURE_SECONDS, deadline - time.monotonic())))
    try:
        for figure in run(PEERS[peer], scale):
            results.add(name, peer, figure)
            beside = f", {figure.ratio:.2f} x {figure.row.base}" if figure.ratio else ""
            beside += f", {figure.remark}" if figure.remark else ""
            title = f"{figure.row.title}, {figure.column}" if figure.column else figure.row.title
            print(f"{peer:>10}  {title}: {figure.value:,.2f} {figure.row.unit}{beside}", flush=True)
    except Exception as failure:  # the border of one measure: the others still have something to say
        reason = f"{type(failure).__name__}: {failure}"
        print(f"{peer:>10}  {name} FAILED: {reason}", flush=True)
        results.fail(name, peer, reason)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    asked = arguments()
    if sys.platform != "linux":
        print("the bench reads CPU time from /proc and polls with epoll: it needs Linux")
        return os.EX_UNAVAILABLE
    skipped = prepare(asked.only)
    if reason := REDIS.prepare():
        skipped["redis"] = reason
    for peer, reason in skipped.items():
        print(f"skipped: {peer}: {reason}")
    peers = [peer for peer in asked.only if peer not in skipped]
    if not peers:
        return os.EX_UNAVAILABLE

    scale = asked.scale.within(raise_file_limit())
    about = report.machine()
    if "redis" not in skipped:
        about.append(f"redis: {REDIS.version()}")
    os.sched_setaffinity(0, {LOAD_CORE})
    if len(CORES) == 1:
        about.append("one core for server and load: latency and rates are not those of a server alone on its core")
    if not shutil.which("wrk"):
        about.append("wrk is not installed: the bench's own load did the publishing")
    results = report.Results()
    signal.signal(signal.SIGALRM, _give_up)
    began = time.monotonic()
    for name in asked.measure:
        for peer in peers:
            run_one(name, peer, scale, results, began + RUN_SECONDS)
        print(f"{name} done, {time.monotonic() - began:.0f} s", flush=True)
    about.append(f"the run took {(time.monotonic() - began) / 60:.0f} minutes")
    print("\n".join(["", *about, "", report.table(results)]))
    if asked.scale is FULL and asked.only == list(PEERS) and asked.measure == list(MEASURES):
        notes = [f"{peer} is missing: {reason}" for peer, reason in skipped.items()]
        if undrawn := report.draw(results):
            notes.append(f"no plot: {undrawn}")
        report.write_results(results, about, notes)
        print("\n".join(["", *notes]))
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main())
