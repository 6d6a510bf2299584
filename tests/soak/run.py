"""Two thousand clients for ten minutes, after which the server must hold nothing of them.

    python tests/soak/run.py [--seconds 600] [--clients 2000] [flags of the server]

Half of the clients stay, a third comes and goes, resuming each time, and the others stop reading for seconds at a
time; fifty peers send garbage. One publisher publishes to everyone, to a topic, or large notifications to the clients
that stall. At the end every client must have received all of its notifications, once and in order; when all have left,
the server must have as many descriptors and tasks as before, no clients, and no exception in its log. Its memory may
not have grown by 2 % over the second half, judged in runs of two minutes and more. A run of at least ten
minutes writes the figures and the plot into docs/reliability.md. Exit status: 0 if all of that holds.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import linear_regression, mean

import httpx
from crowd import HEAVY, TOPICS, Client, Soak, come_and_go, read_on, send_garbage, stall, stay  # sets sys.path
from processes import ALARMING, ROOT, Server, notifyd_command

DOCS = ROOT / "docs"
MAX_GROWTH = 0.02
# Until every client has all notifications, and until everything with a deadline has gone.
PATIENCE = 60.0
FULL_SECONDS = 600
# In less than that the log is not even full in the second half.
WARM_SECONDS = 120
BROADCASTS, TARGETED, LARGE = 4, 10, 5  # a second
LARGE_BYTES = 40_000
# A server that tells the number of its tasks when it is asked to.
PROGRAM = """
import asyncio, signal, sys, notifyd, server
tell = lambda *_: print("tasks:", len(asyncio.all_tasks()), file=sys.stderr, flush=True)
start = server.Server.startup
async def startup(self, sockets=None):
    await start(self, sockets)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, tell)
server.Server.startup = startup
sys.exit(notifyd.main())
"""


class Watch:
    """The server's process, and its resources."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.began = time.monotonic()
        # Seconds, bytes, descriptors.
        self.samples: list[tuple[float, int, int]] = []

    async def sample(self, every: float) -> None:
        while True:
            held = self.server.memory(), self.server.descriptors()
            self.samples.append((time.monotonic() - self.began, *held))
            await asyncio.sleep(every)

    def growth(self) -> float:
        """Return by how much the memory has grown over the second half, as its trend says, relative to its mean."""
        half = self.samples[len(self.samples) // 2 :]
        seconds, sizes = [each[0] for each in half], [each[1] for each in half]
        return linear_regression(seconds, sizes).slope * (seconds[-1] - seconds[0]) / mean(sizes)

    def tasks(self) -> int:
        line = len(self.server.stderr)
        self.server.signal(signal.SIGUSR1)
        return int(self.server.wait_for_line(r"^tasks: \d+", after=line).removeprefix("tasks: "))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def eventually(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True


async def publish(soak: Soak, http: httpx.AsyncClient) -> None:
    """Publish at the rates above, one after the other, so that their numbers are in their order."""
    began = time.monotonic()
    beat: list[str | None] = [None] * BROADCASTS + ["topic"] * TARGETED + [HEAVY] * LARGE
    soak.chance.shuffle(beat)
    while not soak.is_over:
        number = len(soak.published)
        to = beat[number % len(beat)]
        if to == "topic":
            to = f"t{soak.chance.randrange(TOPICS)}"
        body = {
            "message": "x",
            "type": "soak",
            "data": {"n": number, "pad": "x" * (LARGE_BYTES if to == HEAVY else 200)},
        }
        soak.published.append(to)
        response = await http.post("/notify", json=body | ({} if to is None else {"topics": [to]}))
        if response.status_code != 200:
            soak.failures.append(f"a publisher got {response.status_code}: {response.text}")
        await asyncio.sleep(max(0.0, began + (number + 1) / len(beat) - time.monotonic()))


async def run(server: Server, seconds: float, count: int) -> tuple[Soak, Watch, list[str]]:
    soak, watch = Soak((server.host, server.port), random.Random(0)), Watch(server)
    server.get("/health")
    before = server.descriptors(), watch.tasks()
    # Of each six: three stay, two come and go, and one stalls; some of those get large notifications.
    ways = [stay, come_and_go, stay, come_and_go, stay, stall]
    clients = [
        Client(soak, f"c{number}", HEAVY if number % 48 == 5 else f"t{number % TOPICS}", may_miss=number % 6 == 5)
        for number in range(count)
    ]
    await asyncio.gather(*(client.connect() for client in clients))
    working = [asyncio.create_task(ways[number % 6](client)) for number, client in enumerate(clients)]
    working += [asyncio.create_task(send_garbage(soak)) for _ in range(count // 40)]
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=10) as http:
        watch.began = time.monotonic()
        publishing = asyncio.create_task(publish(soak, http))
        sampling = asyncio.create_task(watch.sample(min(1.0, seconds / 100)))
        await asyncio.wait([publishing, sampling], timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        soak.is_over = True
        sampling.cancel()
        await publishing
    for task in working:
        task.cancel()
    await asyncio.wait(working)

    problems = []
    expected = {topic: soak.expected(topic) for topic in {client.topic for client in clients}}
    reading = [asyncio.create_task(read_on(client, PATIENCE)) for client in clients]
    await eventually(lambda: not any(client.is_late(expected[client.topic]) for client in clients))
    for task in reading:
        task.cancel()
    wrong = [client.name for client in clients if not client.is_right(expected[client.topic])]
    if wrong:
        problems.append(f"{len(wrong)} clients have not received everything once and in order: {wrong[:9]}")
    await asyncio.gather(*(client.leave() for client in clients))
    if not await eventually(lambda: server.active() == 0 and server.descriptors() <= before[0]):
        problems.append(f"{server.active()} clients are left, and {server.descriptors()} descriptors for {before[0]}")
    if not await eventually(lambda: watch.tasks() <= before[1]):
        problems.append(f"{watch.tasks()} tasks are left for {before[1]}")
    if seconds >= WARM_SECONDS and watch.growth() > MAX_GROWTH:
        problems.append(f"memory has grown by {watch.growth():.1%} over the second half")
    if ALARMING.search(log := server.new_log()):
        problems.append(f"the log:\n{log}")
    return soak, watch, problems + soak.failures[:20]


def figures(soak: Soak, watch: Watch) -> list[tuple[str, str]]:
    megabytes = [size / 2**20 for _, size, _ in watch.samples]
    return [
        ("notifications published", f"{len(soak.published):,}"),
        ("notifications delivered", f"{soak.counts.pop('deliveries'):,}"),
        *((name, f"{count:,}") for name, count in sorted(soak.counts.items())),
        ("memory at the middle and at the end, MiB", f"{megabytes[len(megabytes) // 2]:.1f}, {megabytes[-1]:.1f}"),
        ("growth of the memory over the second half, as its trend says", f"{watch.growth():+.2%}"),
        ("most descriptors", f"{max(each[2] for each in watch.samples):,}"),
        ("processor seconds of the server", f"{watch.cpu_seconds():.1f}"),
        (
            "most memory of the clients' process, MiB",
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}",
        ),
    ]


def write(about: list[str], rows: list[tuple[str, str]], watch: Watch) -> None:
    """Put the figures of a run into docs/reliability.md, between its marks, and the plot beside it."""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    facts = "\n".join(f"- {fact}" for fact in about)
    page = DOCS / "reliability.md"
    text = f"<!-- soak -->\n{facts}\n\n| What | |\n|---|---|\n{table}\n\n<!-- end -->"
    page.write_text(re.sub(r"<!-- soak -->.*<!-- end -->", lambda _: text, page.read_text(), flags=re.DOTALL))
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "notifyd", "font.size": 9})
    from matplotlib import pyplot

    seconds, sizes, descriptors = zip(*watch.samples, strict=True)
    figure, panels = pyplot.subplots(2, 1, figsize=(8, 4.5), sharex=True)
    panels[0].plot(seconds, [size / 2**20 for size in sizes], color="#d1495b", linewidth=1)
    panels[0].set_title("memory of the server, MiB")
    panels[1].plot(seconds, descriptors, color="#30638e", linewidth=1)
    panels[1].set_title("its open descriptors")
    panels[1].set_xlabel("seconds")
    for panel in panels:
        panel.set_ylim(0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(DOCS / "soak.svg", metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS)
    parser.add_argument("--clients", type=int, default=2000)
    arguments, flags = parser.parse_known_args()
    about = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {arguments.clients:,} clients for {arguments.seconds:,.0f} seconds",
        f"{platform.system()}, Python {platform.python_version()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f} at the start" + (f", server flags `{' '.join(flags)}`" if flags else ""),
    ]
    most = str(2 * arguments.clients + 100)
    interpreter, _, *command = notifyd_command(
        "--port",
        "0",
        "--max-connections",
        most,
        "--history-size",
        "400",
        "--ping-interval",
        "5",
        "--ping-timeout",
        "30",
        *flags,
    )
    # It tells each write to a peer that has gone.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    server = Server([interpreter, "-c", PROGRAM, *command])
    try:
        soak, watch, problems = asyncio.run(run(server, arguments.seconds, arguments.clients))
        rows = figures(soak, watch)
    finally:
        server.stop()
    print("\n".join([*about, *(f"{value:>16}  {name}" for name, value in rows), *problems]))
    if arguments.seconds >= FULL_SECONDS and not problems:
        write(about, rows, watch)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
