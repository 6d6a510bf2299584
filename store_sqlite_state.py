"""The state and the rows of the log in the SQLite file, and the places in it.

Owns the row that every transaction changes, and the search for a record without reading the log. Knows no operation.

1. Records lie in the log without a gap between their numbers, and ids grow with the numbers. So a place is found by
   bisection, in about 20 looks.
2. `front_of` is exact: it leaves out records beyond the bounds that have yet to be trimmed.
"""

from __future__ import annotations

import sqlite3
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import Struct, field

from log import AUDIENCE_BYTES, ENTRY_BYTES, Audience
from positions import Positions
from settings import Settings
from store import Record, Report

# Records that a process reads when it joins, at most: it serves within a second.
OPENING_RECORDS = 50_000
NEWEST = (
    "SELECT id, rest, audience, replayed, at, recipients FROM log"
    " WHERE sequence BETWEEN ? AND ? ORDER BY sequence DESC LIMIT ?"
)

Run = Callable[..., sqlite3.Cursor]


class NodeState(Struct):
    """A node: its lease on CLOCK_MONOTONIC, and the last sequence that it has read."""

    renewed: float
    read: int
    clients: int = 0
    report: Report = Report(0, 0)


class State(Struct):
    """The row that every transaction changes. `started` is on CLOCK_MONOTONIC, `started_at` in seconds since the epoch.

    `replayed`, `everyone`, `bytes` and `receipts` are sums over everything ever kept, the `dropped`
    fields over the part trimmed.
    """

    last: str
    before: str
    sequence: int = 0
    replayed: int = 0
    replayed_dropped: int = 0
    everyone: int = 0
    bytes: int = 0
    bytes_dropped: int = 0
    receipts: int = 0
    mail: int = 0
    unsaved_pages: int = 0
    started: float = 0.0
    started_at: float = 0.0
    total: int = 0
    notifications_sent: int = 0
    # Counted by nodes that are gone.
    report: Report = Report(0, 0)
    leader: str = ""
    led: float = 0.0
    counter: int = 0
    # Their number, and the end of the last that had to go before its time, in seconds since the epoch.
    bookmarks: int = 0
    bookmarks_lost_until: float = 0.0
    nodes: dict[str, NodeState] = field(default_factory=dict)

    def active(self) -> int:
        return sum(node.clients for node in self.nodes.values())

    def counted(self) -> Report:
        return total_of([self.report, *(node.report for node in self.nodes.values())])


def front_of(run: Run, state: State, settings: Settings, now: float) -> int:
    """Return the sequence of the first record within the bounds of the history; the next one where there is none."""
    replayed, size = state.replayed - settings.history_size, state.bytes - settings.history_bytes
    expired = now - settings.history_ttl
    sql = "SELECT replayed_before >= ? AND bytes_before >= ? AND at >= ? FROM log WHERE sequence = ?"

    def is_within(sequence: int) -> bool:
        row = run(sql, (replayed, size, expired, sequence)).fetchone()
        return row is not None and bool(row[0])

    return first_that(is_within, run, state)


def first_that(is_true: Callable[[int], bool], run: Run, state: State) -> int:
    """Return the first sequence of the log from which on something is true, or the next one. It takes 20 looks."""
    (first,) = run("SELECT min(sequence) FROM log").fetchone()
    end = state.sequence + 1
    return end if first is None else bisect_left(range(first, end), True, key=is_true) + int(first)


def last_up_to(id: str, run: Run, state: State) -> int:
    """Return the number of the last record up to an id, or the one before the first."""
    sql = "SELECT id > ? FROM log WHERE sequence = ?"

    def is_later(sequence: int) -> bool:
        row = run(sql, (id, sequence)).fetchone()
        return row is None or bool(row[0])

    return first_that(is_later, run, state) - 1


def newest_end(run: Run, settings: Settings, newest: str) -> tuple[str, list[Record]]:
    """Return the newest records up to an id that fit in the cache of a process, and the id before the first of them."""
    state = state_of(run)
    first, last = front_of(run, state, settings, time.time()), last_up_to(newest, run, state)
    records: list[Record] = []
    size = 0
    for row in run(NEWEST, (first, last, OPENING_RECORDS)):
        record = record_of(row)
        size += (
            len(record.rest) + ENTRY_BYTES + (0 if record.audience is None else record.audience.size() + AUDIENCE_BYTES)
        )
        if size > settings.cache_bytes:
            break
        records.append(record)
    records.reverse()
    row = run("SELECT id FROM log WHERE sequence = ?", (last - len(records),)).fetchone()
    return (state.before if row is None else row[0]), records


def state_of(run: Run) -> State:
    row = run("SELECT json FROM state").fetchone()
    if row is not None:
        return msgspec.json.decode(row[0], type=State)
    first = Positions().next()
    return State(last=first, before=first)


def record_of(row: tuple[Any, ...]) -> Record:
    """Return the record of a row: id, rest, audience, replayed, at and recipients."""
    id, rest, audience, replayed, at, recipients = row
    return Record(id, rest, audience and _audience_of(audience), bool(replayed), at, recipients)


# Records often have the same audience, and share it in memory.
_audience_of = lru_cache(maxsize=1000)(msgspec.json.Decoder(Audience).decode)


def total_of(reports: Iterable[Report]) -> Report:
    return Report(*map(sum, zip(*reports, strict=True)))
