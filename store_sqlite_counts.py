"""The counts of deliveries in the SQLite file: how many clients have been handed each notification.

Owns two tables. `step` has the changes of the number of clients that are handed the broadcasts, each behind an id; a
broadcast has been handed to the sum of the steps before it. `counted` has what single notifications were handed to
beside that. Both go with the log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from log import Audience
from store import Counts
from store_sqlite_state import Run

# Rows that one transaction removes: a few milliseconds.
TRIMMED_AT_ONCE = 2000
STEP = "INSERT INTO step (id, change) VALUES (?, ?) ON CONFLICT DO UPDATE SET change = change + excluded.change"
COUNT = (
    "INSERT INTO counted (id, written, addressed) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET"
    " written = written + excluded.written, addressed = addressed + excluded.addressed"
)


def add(run_many: Callable[[str, Iterable[tuple[Any, ...]]], Any], counts: Counts) -> None:
    """Add the counts of a process."""
    steps = [step for step in counts.steps.items() if step[1]]
    run_many(STEP, steps)
    run_many("DELETE FROM step WHERE id = ? AND change = 0", [(id,) for id, _ in steps])
    written, addressed = counts.written, counts.addressed
    run_many(COUNT, [(id, written.get(id, 0), addressed.get(id, 0)) for id in written.keys() | addressed.keys()])


def of(run: Run, id: str, audience: Audience | None) -> tuple[int, int]:
    """Return the clients that a notification has been handed to, and those that it was addressed to by a farewell."""
    row = run("SELECT written, addressed FROM counted WHERE id = ?", (id,)).fetchone()
    written, addressed = row or (0, 0)
    if audience is None:
        written += run("SELECT coalesce(sum(change), 0) FROM step WHERE id < ?", (id,)).fetchone()[0]
    return written, addressed


def trim(run: Run, before: str) -> None:
    """Let go of some of the counts up to an id, after the notifications; the steps up to there become one."""
    gone = run("SELECT id, change FROM step WHERE id < ? LIMIT ?", (before, TRIMMED_AT_ONCE)).fetchall()
    if gone:
        run("DELETE FROM step WHERE id <= ?", (gone[-1][0],))
        run(STEP, (gone[-1][0] if len(gone) == TRIMMED_AT_ONCE else before, sum(change for _, change in gone)))
    run("DELETE FROM counted WHERE id IN (SELECT id FROM counted WHERE id <= ? LIMIT ?)", (before, TRIMMED_AT_ONCE))
