"""The log in the SQLite file, as it is read in pages: beside the transactions, without the lock.

Owns a connection that only reads, in a thread of its own, so that a long replay delays no publish. Knows no client and
no operation.

1. Each call reads one snapshot of the file.
2. A call reads records for everyone and for the names that it is asked for, and no others.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import store_sqlite_counts
from log import PAGE_BYTES, PAGE_ENTRIES, Audience
from settings import Settings, number
from store import Counted, Found, Reach, Record
from store_sqlite_file import File, away, failure_of
from store_sqlite_state import front_of, last_up_to, record_of, state_of
from store_sqlite_transaction import Progress

# Records of each of several names that one call counts: milliseconds.
COUNTED_AT_ONCE = 5000

T = TypeVar("T")


class SqliteLog:
    """The StoredLog of one process."""

    def __init__(self, settings: Settings, file: File, progress: Progress) -> None:
        self._settings = settings
        self._timeout = settings.store_timeout
        self._file = file
        self._progress = progress
        self._executor = ThreadPoolExecutor(1, "notifyd-log")
        # Held by the call that the thread works for: the time of its deadline is its own.
        self._turn = asyncio.Lock()
        self._db: sqlite3.Connection | None = None

    @property
    def before(self) -> str:
        return self._progress.before

    async def reach(self, since: str | None, interest: Audience, until: str) -> Reach:
        reach, after, end, present = await self._in_thread(lambda: self._reach(since, interest, until))
        replayed = reach.replayed
        if len(present) == 1:
            replayed += sum(present.values())
        elif present:
            # A record may be for several of the names.
            while after < end:
                count, after = await self._in_thread(partial(self._count, list(present), after, end))
                replayed += count
        return reach._replace(replayed=replayed)

    async def read(self, interest: Audience, after: str, until: str, *, newest_first: bool = False) -> Found:
        return await self._in_thread(lambda: self._read(interest, after, until, newest_first))

    async def find(self, id: str) -> Counted | None:
        return await self._in_thread(lambda: self._find(id))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Run a function on a snapshot of the file. Raises StoreUnavailable."""
        try:
            async with self._turn, asyncio.timeout(self._timeout):
                return await asyncio.get_running_loop().run_in_executor(self._executor, self._snapshot, work)
        except TimeoutError:
            raise away(f"no answer within {number(self._timeout)} s") from None
        except (OSError, sqlite3.Error) as error:
            raise away(failure_of(error)[0]) from None

    def _snapshot(self, work: Callable[[], T]) -> T:
        try:
            if self._db is None:
                self._file.check_identity()
                path = f"file:{quote(self._file.path)}?mode=ro"
                self._db = sqlite3.connect(path, uri=True, isolation_level=None, timeout=self._timeout)
            self._run("BEGIN")
            done = work()
            self._run("COMMIT")
            return done
        except BaseException:
            if self._db is not None:
                self._db.close()
            self._db = None
            raise

    def close(self) -> None:
        """Let go of the file; the next call may come from another event loop."""
        self._turn = asyncio.Lock()
        self._executor.submit(self._disconnect)

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
        self._db = None

    def _run(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        assert self._db is not None
        return self._db.execute(sql, values)

    # --- in the thread

    def _reach(self, since: str | None, interest: Audience, until: str) -> tuple[Reach, int, int, dict[str, int]]:
        """Return a reach that counts records for everyone, its numbers after and up to, and each name's records."""
        state = state_of(self._run)
        front = front_of(self._run, state, self._settings, time.time())
        after, complete = front - 1, since is None and front == 1
        if since is not None:
            found = last_up_to(since, self._run, state)
            complete = found >= after and self._id_of(found) == since
            after = found if complete else after
        end = max(after, last_up_to(until, self._run, state))
        replayed = self._everyone_before(end + 1) - self._everyone_before(after + 1)
        present = {name: count for name in interest.names() if (count := self._addressed(name, after, end))}
        position, interest = self._id_of(after), interest.only(present.__contains__)
        return Reach(position, complete, replayed, interest, until), after, end, present

    def _addressed(self, name: str, after: int, end: int) -> int:
        """Return the number of records for a name: by the numbers of the first and the last."""
        sql = "SELECT number FROM addressed WHERE name = ? AND sequence > ? AND sequence <= ? ORDER BY sequence"
        first = self._run(f"{sql} LIMIT 1", (name, after, end)).fetchone()
        last = first and self._run(f"{sql} DESC LIMIT 1", (name, after, end)).fetchone()
        return last[0] - first[0] + 1 if first else 0

    def _count(self, names: list[str], after: int, end: int) -> tuple[int, int]:
        """Return how many records are for any of the names, after a number and up to another, and how far that is."""
        sql = f"SELECT sequence FROM addressed WHERE name = ? AND sequence > ? LIMIT 1 OFFSET {COUNTED_AT_ONCE - 1}"
        ends = [row for name in names for row in self._run(sql, (name, after))]
        reached = min([end, *(sequence for (sequence,) in ends)])
        sql = (
            f"SELECT count(DISTINCT sequence) FROM addressed WHERE name IN ({_marks(names)})"
            " AND sequence > ? AND sequence <= ?"
        )
        (count,) = self._run(sql, (*names, after, reached)).fetchone()
        return count, reached

    def _read(self, interest: Audience, after: str, until: str, newest_first: bool) -> Found:
        state = state_of(self._run)
        names, order = interest.names(), "DESC" if newest_first else "ASC"
        span = f"sequence > ? AND sequence <= ? ORDER BY sequence {order} LIMIT {PAGE_ENTRIES}"
        bounds = last_up_to(after, self._run, state), last_up_to(until, self._run, state)
        tables = ["log INDEXED BY log_everyone WHERE audience IS NULL", *["addressed WHERE name = ?"] * len(names)]
        sources = [f"SELECT * FROM (SELECT sequence FROM {table} AND {span})" for table in tables]
        sql = (
            "SELECT id, rest, audience, replayed, at, recipients FROM log"
            f" WHERE sequence IN ({' UNION ALL '.join(sources)}) ORDER BY sequence {order} LIMIT {PAGE_ENTRIES}"
        )
        records: list[Record] = []
        size, reached = 0, after if newest_first else until
        for row in self._run(sql, (*bounds, *(value for name in names for value in (name, *bounds)))):
            size += len(row[1])
            if records and size > PAGE_BYTES:
                reached = records[-1].id
                break
            records.append(record_of(row))
        if len(records) == PAGE_ENTRIES:
            reached = records[-1].id
        if newest_first and reached != after:
            # The page ends before its oldest record.
            reached = self._id_of(last_up_to(reached, self._run, state) - 1)
        return Found(records, reached, state.before)

    def _find(self, id: str) -> Counted | None:
        state = state_of(self._run)
        sequence = last_up_to(id, self._run, state)
        row = self._run(
            "SELECT id, rest, audience, replayed, at, recipients FROM log WHERE sequence = ? AND id = ?", (sequence, id)
        ).fetchone()
        if row is None or sequence < front_of(self._run, state, self._settings, time.time()):
            return None
        record = record_of(row)
        return Counted(record, *store_sqlite_counts.of(self._run, id, record.audience))

    def _id_of(self, sequence: int) -> str:
        """Return the id of a record, or the one before the first."""
        row = self._run("SELECT id FROM log WHERE sequence = ?", (sequence,)).fetchone()
        return state_of(self._run).before if row is None else row[0]

    def _everyone_before(self, sequence: int) -> int:
        row = self._run("SELECT everyone_before FROM log WHERE sequence = ?", (sequence,)).fetchone()
        return state_of(self._run).everyone if row is None else row[0]


def _marks(values: list[str]) -> str:
    return ", ".join("?" * len(values))
