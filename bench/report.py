"""The figures, as a table for reading and as bars for seeing: RESULTS.md and results.svg."""

import os
import platform
import re
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

from peers import PEERS, ROOT, output
from plan import BEST, MEMORY, Figure, Level, Row
from running import CORES

HERE = Path(__file__).parent
RESULTS, PLOT = HERE / "RESULTS.md", HERE / "results.svg"


class Results:
    """The results of a run: figures by row and peer, and the reasons for missing ones."""

    def __init__(self) -> None:
        self.figures: dict[Row, dict[str, Figure]] = {}
        # By measure and peer.
        self.failures: dict[tuple[str, str], str] = {}
        self._measures: dict[Row, str] = {}

    def add(self, measure: str, peer: str, figure: Figure) -> None:
        self.figures.setdefault(figure.row, {})[figure.column or peer] = figure
        self._measures[figure.row] = measure

    def fail(self, measure: str, peer: str, reason: str) -> None:
        """Note why a peer has no figures, or not all, in one line and without this machine's folders."""
        last_line = (reason.strip().splitlines() or [""])[-1]
        self.failures[measure, peer] = re.sub(r"(?<!\S)(['\"(]?)/\S*/", r"\1", last_line)

    def rows(self, *, of_stores: bool) -> dict[Row, dict[str, Figure]]:
        """Return the rows that compare stores, or those that compare peers."""
        return {row: cells for row, cells in self.figures.items() if PEERS.keys().isdisjoint(cells) == of_stores}

    def peers(self) -> list[str]:
        seen = {name for cells in self.figures.values() for name in cells} | {peer for _, peer in self.failures}
        return [name for name in PEERS if name in seen]

    def failed(self, row: Row) -> set[str]:
        """The peers that failed in the measure that gives the row."""
        return {peer for measure, peer in self.failures if measure == self._measures[row]}

    def without_a_row(self) -> list[tuple[str, str]]:
        """Measure and peer, where a measure failed before anybody had a figure."""
        return [failed for failed in self.failures if failed[0] not in self._measures.values()]

    def failure_lines(self) -> list[str]:
        return [f"- {peer} failed in {measure}: {reason}" for (measure, peer), reason in self.failures.items()]


EXPLANATION = """\
A number in brackets is the ratio to the floor, a C loop with one `send()` for each client and nothing else. Where
server and floor took turns (CPU per delivery, latency) it is the median of their ratios, or the ratio over the same
turns. That is steadier than two figures taken minutes apart on a shared machine, and decides the "best peer", among all
but the floor. A floor that takes turns with itself shows how steady. All other ratios are of figures measured minutes
apart: a level met or missed by little there proves nothing. Rows with the unit x are ratios of two notifyd that took
turns. NATS speaks its own protocol: its publishers send PUB and are answered by +OK, where the others take a POST.

In the table of the stores a number in brackets is the ratio to one process with its log in memory, the median of turns,
or, with a sign, the difference to it. "Redis" is the CPU of Redis itself for the same, not included in the figure.

"woken" is the share of deliveries that woke a sleeping client, at the server and at the floor beside it. All clients
are one process, which sleeps more often beside a slower server; in the rows with a level they poll, and no delivery
wakes one.

Every figure stands for notifications that were checked: all of them, at every client, once and in order. The top of
each measure's file says how it measures, and what it leaves out."""


def best_peer(row: Row, cells: dict[str, Figure]) -> str | None:
    """The name of the best of the others, the floor left out.

    Peers are measured minutes apart, in which a shared machine may change its speed by some times: where the floor
    took turns with each of them, what counts is their ratio to it.
    """
    others = {n: f.ratio or f.value for n, f in cells.items() if n not in ("notifyd", "floor")}
    if not others or row.unit == "%":  # a share is neither good nor bad
        return None
    return (max if row.more_is_better else min)(others, key=lambda name: others[name])


def ratio(cells: dict[str, Figure], name: str, base: str) -> float | None:
    """One peer's figure by another's, through the floor's turns where there were any."""
    one, other = cells.get(name), cells.get(base)
    if one and one.ratio and base == one.row.base:
        return one.ratio
    if not one or not other or not other.value:
        return None
    if one.ratio and other.ratio:
        return one.ratio / other.ratio
    return one.value / other.value


def _cell(row: Row, cells: dict[str, Figure], name: str, failed: set[str]) -> str:
    if name not in cells:
        return "failed" if name in failed else "-"
    figure = cells[name]
    to_base = ratio(cells, name, row.base) if row.base else None
    compared = f"{to_base:.2f}" if to_base else ""
    if row.base and any(level.more_than for level in row.levels):
        compared = f"{figure.value - cells[row.base].value:+.{row.decimals}f}"
    beside = ", ".join(part for part in (compared, figure.remark) if part)
    return f"{figure.value:,.{row.decimals}f}" + (f" ({beside})" if beside else "")


def _by_best_peer(row: Row, cells: dict[str, Figure]) -> str:
    best = best_peer(row, cells)
    by_best = best and ratio(cells, "notifyd", best)
    return f"{by_best:.2f} x {best}" if by_best else "-"


def _reached(row: Row, cells: dict[str, Figure], level: Level, name: str = "notifyd") -> str:
    """Return `yes` or `no`, or nothing where there is no figure."""
    figure = cells[name].value if name in cells else None
    if level.times:
        base = best_peer(row, cells) if level.times == BEST else level.times
        figure = ratio(cells, name, base) if base else None
    elif level.more_than and figure is not None:
        figure -= cells[level.more_than].value
    if figure is None:
        return ""
    met = figure >= level.limit if row.more_is_better else figure <= level.limit
    return "yes" if met else "no"


def _wanted(row: Row, level: Level) -> str:
    text = f"{'at least' if row.more_is_better else 'at most'} {level.limit:g}"
    text += f" x {level.times}" if level.times else ""
    return text + (f" more than {level.more_than}" if level.more_than else "")


def table(results: Results) -> str:
    """Return the tables of the peers and of the stores, as far as there are figures, and the failures."""
    tables = [_peers_table(results)] if results.rows(of_stores=False) or results.failures else []
    tables += [_stores_table(results)] if results.rows(of_stores=True) else []
    failures = results.failure_lines()
    return "\n\n".join([*tables, "\n".join(failures)] if failures else tables)


def _stores_table(results: Results) -> str:
    rows = results.rows(of_stores=True)
    names = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    shared = [name for name in names if name != MEMORY]
    lines = [["", *names, "level"]]
    for row, cells in rows.items():
        figures = [_cell(row, cells, name, set()) for name in names]
        levels = []
        for level in row.levels:
            reached = ", ".join(f"{name} {_reached(row, cells, level, name)}" for name in shared if name in cells)
            levels.append(f"{_wanted(row, level)}: {reached}")
        lines.append([f"{row.title} ({row.unit})", *figures, "; ".join(levels)])
    return _aligned(lines)


def _peers_table(results: Results) -> str:
    names = results.peers()
    lines = [["", *names, "notifyd by best peer", "level for notifyd"]]
    for row, cells in results.rows(of_stores=False).items():
        reached = {_wanted(row, level): _reached(row, cells, level) for level in row.levels}
        levels = "; ".join(f"{wanted}: {met}" if met else wanted for wanted, met in reached.items())
        figures = [_cell(row, cells, name, results.failed(row)) for name in names]
        lines.append([f"{row.title} ({row.unit})", *figures, _by_best_peer(row, cells), levels])
    for measure, peer in results.without_a_row():
        lines.append([f"{measure}, all of it", *("failed" if name == peer else "-" for name in names), "-", ""])
    return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
    """A Markdown table that is also aligned, for the terminal."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:-1]), "-" * widths[-1]])
    return "\n".join(
        f"| {first:<{widths[0]}} | "
        + " | ".join(f"{text:>{width}}" for text, width in zip(middle, widths[1:-1], strict=True))
        + f" | {last:<{widths[-1]}} |"
        for first, *middle, last in lines
    )


def machine() -> list[str]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    gigabytes = int(memory[1]) / 2**20 if memory else 0
    return [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {_commit()}",
        f"{cpu[1] if cpu else platform.machine()}, {len(CORES)} cores, {gigabytes:.0f} GiB, load average "
        f"{os.getloadavg()[0]:.1f} at the start",
        f"{platform.system()} {platform.release()}, Python {sys.version.split()[0]}",
    ]


def _version(name: str) -> str:
    try:
        return PEERS[name].version()
    except (OSError, ValueError, LookupError):  # a run of half an hour does not end here
        return "unknown"


def _commit() -> str:
    """The commit that runs, and whether the server differs from it."""
    git = "git", "-C", str(ROOT)
    if not shutil.which("git") or not (commit := output(*git, "rev-parse", "--short=12", "HEAD")).isalnum():
        return "no commit is known"
    changed = output(*git, "status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/*.lua", ":/bench/*.c")
    return f"commit {commit}" + (", with changes that are not committed" if changed else "")


def write_results(results: Results, about: list[str], notes: list[str]) -> None:
    """Write RESULTS.md: the facts, the table, how to read it, and the plot where there is one."""
    versions = [f"{name}: {_version(name)}" for name in results.peers()]
    facts = "\n".join(f"- {fact}" for fact in [*about, *versions, *notes])
    plot = f"\n![The same as bars]({PLOT.name})\n" if PLOT.exists() else ""
    RESULTS.write_text(f"# Results of `make bench`\n\n{facts}\n\n{table(results)}\n\n{EXPLANATION}\n{plot}")


def draw(results: Results) -> str | None:
    """Write the plot: one panel for each row. Return why that cannot be done, or None."""
    PLOT.unlink(missing_ok=True)
    try:
        import matplotlib as mpl  # takes half a second, and only the full run draws
    except ImportError:
        return "matplotlib is not installed"
    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "notifyd", "font.size": 9})
    from matplotlib import pyplot

    rows = [row for row, cells in results.rows(of_stores=False).items() if len(cells) > 1]
    if not rows:
        return "there is nothing to compare"
    figure, panels = pyplot.subplots(-(-len(rows) // 3), 3, figsize=(13, 2.1 * -(-len(rows) // 3)), squeeze=False)
    for panel in panels.flat[len(rows) :]:
        panel.set_visible(False)
    for panel, row in zip(panels.flat, rows, strict=False):
        bars = {name: cell.ratio or cell.value for name, cell in results.figures[row].items()}
        unit = "ratio to the floor" if all(cell.ratio for cell in results.figures[row].values()) else row.unit
        decimals = 2 if unit != row.unit else row.decimals
        colours = ["#d1495b" if name == "notifyd" else "#9aa5b1" for name in bars]
        drawn = panel.barh(list(bars), list(bars.values()), color=colours, height=0.7)
        panel.bar_label(drawn, [f" {value:,.{decimals}f}" for value in bars.values()])
        panel.set_title(f"{row.title}\n{unit}, {'more' if row.more_is_better else 'less'} is better", fontsize=9)
        panel.set_xlim(0, max(bars.values()) * 1.2)
        panel.invert_yaxis()
        panel.set_xticks([])
        panel.tick_params(length=0)
        panel.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout(h_pad=1.5)
    figure.savefig(PLOT, metadata={"Date": None})
    pyplot.close(figure)
    return None
