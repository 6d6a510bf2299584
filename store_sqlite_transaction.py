"""The transactions of one process on the shared SQLite file, and every operation that runs in one.

Owns the state of all nodes, the log, the registry and the buckets, as rows of the file. Knows neither the event loop
nor its thread; the file is in store_sqlite_file.py, and store_sqlite.py runs one transaction after the other.

1. Data that changes with almost every transaction is one row, State: read at its beginning, written at its end.
2. A transaction begins by renewing its node's lease, removing the nodes with an expired lease, and reading the log.
3. An operation checks before it writes. Refusing one needs no rollback and does not affect the others in its
   transaction.
4. No record is trimmed that a living node has yet to read.
5. A process's Progress changes after a commit only, so a transaction that failed can be repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from operator import sub
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

import store_sqlite_counts
from buckets import SECOND, Draw, Rate, draw
from errors import ConnectionRefused, StoreUnavailable
from log import Audience
from positions import Positions
from settings import Settings, SettingsError
from store import (
    LEASE_SECONDS,
    USER,
    Appended,
    Census,
    ClientIdTaken,
    Counts,
    Draft,
    Once,
    Opening,
    Receipt,
    Record,
    Registration,
    Report,
    groups_of,
    limits_of,
)
from store_keys import check_reuse
from store_sqlite_bookmarks import BookmarkRows
from store_sqlite_file import CHECKPOINT_PAGES, PAGE_BYTES, File
from store_sqlite_state import NodeState, front_of, last_up_to, record_of, state_of, total_of

TRIM_SECONDS = 1.0
REVOCATIONS_AT_ONCE = 5000
# Messages kept for all nodes together; a node reads its own within milliseconds.
MAX_MAIL = 10_000
# The longest time until a bucket is full, in microseconds.
LONGEST_BUCKET = 3600 * SECOND

# Records, keys and names of audiences that one transaction removes: a few milliseconds each.
TRIMMED_AT_ONCE, NAMES_AT_ONCE = 1000, 5000

APPEND = (
    "INSERT INTO log (sequence, replayed_before, everyone_before, bytes_before, id, rest, audience, replayed, at,"
    " recipients) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
ADDRESS = (
    "INSERT INTO addressed (name, sequence, number) VALUES (?1, ?2, 1 + coalesce("
    "(SELECT number FROM addressed WHERE name = ?1 ORDER BY sequence DESC LIMIT 1), 0))"
)
RECORDS = "SELECT id, rest, audience, replayed, at, recipients FROM log WHERE sequence > ? ORDER BY sequence"


class Operation(NamedTuple):
    """A request to the thread. Without a future it has no waiter, and is retried until a transaction succeeds."""

    run: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    future: asyncio.Future[Any] | None = None
    then: Callable[[Any], None] | None = None


class Outcome(Struct):
    """The result of a transaction or a read, for the event loop: the log, the mail, and each operation's answer."""

    answers: list[tuple[Operation, Any]] = []
    opening: Opening | None = None
    # The id before the first record where the log has trimmed others before this process could read them.
    missed: str = ""
    records: list[Record] = []
    mail: list[tuple[str, bytes]] = []
    evicted: bool = False
    failure: StoreUnavailable | SettingsError | None = None


class Progress(Struct):
    """A process's memory of the file between two transactions."""

    # The newest record read: its id, empty before the opening, and its sequence, -1 where only the id is known.
    newest: str = ""
    sequence: int = -1
    # The id before the first record of the log.
    before: str = ""
    # The number of the newest message read, and whether messages that were read are still in the file.
    mail: int = 0
    has_mail: bool = False
    # When the server started, and this process's part in its sums.
    started: float | None = None
    counted: Report = Report(0, 0)
    # Whether this node was removed, and has yet to register its clients again.
    is_to_restore: bool = False
    trimmed_at: float = 0.0


class Transaction:
    """One transaction of a node, and the operations that may run in it."""

    def __init__(self, file: File, settings: Settings, node_id: str, progress: Progress) -> None:
        """Load the state; the transaction must have begun."""
        self._run = file.run
        self._file = file
        self._settings = settings
        self._node_id = node_id
        self._progress = progress
        self.state = state_of(file.run)
        self._now, self._wall = time.monotonic(), time.time()
        self.bookmarks = BookmarkRows(file.run, self.state, settings, self._wall)
        self._bytes = self.state.bytes
        self._rows: list[tuple[Any, ...]] = []
        self._addressed: list[tuple[str, int]] = []
        self._is_to_restore, self._trimmed_at = progress.is_to_restore, progress.trimmed_at
        # Records to deliver and nodes to wake after the commit.
        self.appended: list[Record] = []
        self.to_wake: set[str] = set()

    # --- begin and end

    def read(self, outcome: Outcome) -> None:
        """Put the records and messages that are new to this process into the outcome."""
        state, sequence = self.state, self._progress.sequence
        if sequence < 0:
            sequence = last_up_to(self._progress.newest, self._run, state)
        if state.last > self._progress.newest and state.sequence > sequence:
            rows = self._run(RECORDS, (sequence,)).fetchall()
            outcome.missed = state.before if state.before > self._progress.newest else ""
            outcome.records = list(map(record_of, rows))
        if state.mail > self._progress.mail:
            sql = "SELECT sender, message FROM mail WHERE node = ? AND number > ? ORDER BY number"
            outcome.mail = self._run(sql, (self._node_id, self._progress.mail)).fetchall()

    def begin(self, outcome: Outcome) -> None:
        """Renew the lease, remove the dead nodes and read the log; add this node where it is not known."""
        state = self.state
        for node_id, node in list(state.nodes.items()):
            # A lease from the future dates from before the last boot.
            if node_id != self._node_id and not 0 <= self._now - node.renewed < LEASE_SECONDS:
                self._remove_node(node_id)
        if self._progress.newest:
            self.read(outcome)
        if self._node_id not in state.nodes or not self._progress.newest:
            self._add_node(outcome)
        # Kept here for a node that leaves in this transaction.
        self.node = state.nodes[self._node_id]
        self.node.renewed = self._now
        if self._progress.has_mail or outcome.mail:
            self._run("DELETE FROM mail WHERE node = ? AND number <= ?", (self._node_id, state.mail))
        self._positions = Positions(state.last)

    def finish(self, operations: int) -> None:
        """Write the rows and the state, so that the transaction can be committed; trim and checkpoint where due."""
        state, settings = self.state, self._settings
        self._file.run_many(APPEND, self._rows)
        self._file.run_many(ADDRESS, self._addressed)
        self.node.read = state.sequence
        excess = max(min(settings.history_size // 10, TRIMMED_AT_ONCE), 100)
        if (
            self._now - self._trimmed_at > TRIM_SECONDS
            or state.replayed - state.replayed_dropped > settings.history_size + excess
            or state.bytes - state.bytes_dropped > settings.history_bytes * 1.1
        ):
            self._trim()
        # An estimate: the row of the state, a page for each operation, and the pages of the payloads.
        state.unsaved_pages += 2 + operations + state.bytes // PAGE_BYTES - self._bytes // PAGE_BYTES
        if state.unsaved_pages > CHECKPOINT_PAGES and self._file.checkpoint():
            state.unsaved_pages = 0
        self._run("INSERT OR REPLACE INTO state (rowid, json) VALUES (1, ?)", (msgspec.json.encode(state),))

    def save_progress(self) -> None:
        """Note how far the process has got, after the commit."""
        progress, state = self._progress, self.state
        progress.newest, progress.sequence, progress.mail = state.last, state.sequence, state.mail
        progress.before = state.before
        progress.is_to_restore, progress.trimmed_at = self._is_to_restore, self._trimmed_at

    # --- nodes

    def _add_node(self, outcome: Outcome) -> None:
        state, progress, counted = self.state, self._progress, Report(0, 0)
        if progress.started is None and not state.nodes:
            state.total = state.notifications_sent = state.counter = 0
            state.report = Report(0, 0)
            state.started, state.started_at = self._now, self._wall
        elif progress.started == state.started:
            # This node was removed, and its report was added to the sums. It counts on from that report.
            counted = progress.counted
            state.report = Report(*map(sub, state.report, counted))
        self._file.bind(self._node_id)
        state.nodes[self._node_id] = NodeState(self._now, state.sequence, report=counted)
        if progress.newest:
            outcome.evicted = self._is_to_restore = True
        else:
            # The records follow after the commit: the other processes do not wait for them.
            outcome.opening = Opening(state.last, [], state.started_at, self._now - state.started)

    def _remove_node(self, node_id: str) -> None:
        """Remove a node with its clients; its report stays in the sums."""
        state = self.state
        gone = state.nodes.pop(node_id)
        state.report = total_of([state.report, gone.report])
        if state.leader == node_id:
            state.leader = ""
        self._run("DELETE FROM client WHERE node = ?", (node_id,))
        self._run("DELETE FROM mail WHERE node = ?", (node_id,))
        self._file.unbind(node_id)

    def renew(self) -> None:
        """Do nothing more: every transaction renews the lease."""

    def depart(self) -> None:
        self._remove_node(self._node_id)

    def restore(self, registrations: Iterable[Registration]) -> list[str]:
        """Register the clients that this node had before it was removed; return those that belong to others by now."""
        self._is_to_restore, taken = False, list[str]()
        for client in registrations:
            owner = self._owner(client.client_id)
            if owner is None:
                self._register(client)
            elif owner != self._node_id:
                taken.append(client.client_id)
        return taken

    # --- the log

    def append(self, drafts: Sequence[Draft], once: Once | None, counter: int | None) -> Appended:
        state, at = self.state, self._wall
        if once is not None and (known := self._known(once)) is not None:
            return known
        if counter is not None:
            if state.leader != self._node_id or counter != state.counter + 1:
                return Appended([], at)
            state.counter, state.led = counter, self._now
        receipts = []
        for draft in drafts:
            receipt = Receipt(self._positions.next(), self._recipients(draft.audience))
            receipts.append(receipt)
            record = Record(receipt.id, *draft, at, receipt.recipients)
            state.last = record.id
            state.sequence += 1
            self.appended.append(record)
            size, audience = len(record.rest), None
            if record.audience is not None:
                audience = msgspec.json.encode(record.audience)
                size += sum(len(name) for names in record.audience for name in names)
                self._addressed += [(name, state.sequence) for name in record.audience.names()]
            counts = state.sequence, state.replayed, state.everyone, state.bytes
            self._rows.append((*counts, record.id, record.rest, audience, record.replayed, at, receipt.recipients))
            state.replayed += record.replayed
            state.everyone += record.replayed and audience is None
            state.bytes += size
        state.notifications_sent += len(drafts)
        if once is not None and drafts:
            state.receipts += len(receipts)
            row = once.key, once.fingerprint, msgspec.json.encode(receipts), at, state.receipts
            self._run(
                "INSERT OR REPLACE INTO once (key, fingerprint, receipts, at, receipts_total) VALUES (?, ?, ?, ?, ?)",
                row,
            )
        self.to_wake.update(state.nodes.keys() - {self._node_id})
        return Appended(receipts, at)

    def _known(self, once: Once) -> Appended | None:
        bounds = self.state.receipts - self._settings.history_size, self._wall - self._settings.history_ttl
        row = self._run(
            "SELECT fingerprint, receipts, at FROM once WHERE key = ? AND receipts_total > ? AND at >= ?",
            (once.key, *bounds),
        ).fetchone()
        if row is None:
            return None
        fingerprint, receipts, at = row
        check_reuse(once, fingerprint)
        return Appended(msgspec.json.decode(receipts, type=list[Receipt]), at, True)

    def _recipients(self, audience: Audience | None) -> int:
        if audience is None:
            return self.state.active()
        clients, groups = list(audience.clients), groups_of(audience)
        if not clients and len(groups) == 1:
            # The usual case, without the union: that would copy a large group.
            found = self._run("SELECT count(*) FROM member WHERE name = ?", groups)
        else:
            found = self._run(
                "SELECT count(*) FROM (SELECT id FROM client WHERE id IN (SELECT value FROM json_each(?))"
                " UNION SELECT client FROM member WHERE name IN (SELECT value FROM json_each(?)))",
                (msgspec.json.encode(clients).decode(), msgspec.json.encode(groups).decode()),
            )
        return int(found.fetchone()[0])

    def _trim(self) -> None:
        """Delete some of the records, keys and buckets beyond the bounds, but none that a living node has yet to read.

        If more are left, the next transaction goes on.
        """
        state, settings, expired = self.state, self._settings, self._wall - self._settings.history_ttl
        read = min(node.read for node in state.nodes.values()) if state.nodes else state.sequence
        (first,) = self._run("SELECT min(sequence) FROM log").fetchone()
        self._trimmed_at = self._now
        if first is not None:
            front = min(front_of(self._run, state, settings, self._wall), read + 1)
            if front > first + TRIMMED_AT_ONCE:
                front, self._trimmed_at = first + TRIMMED_AT_ONCE, 0.0
            self._delete(first, front)
        self._run(
            "DELETE FROM once WHERE number < (SELECT min(number) FROM once) + ? AND (receipts_total <= ? OR at < ?)",
            (TRIMMED_AT_ONCE, state.receipts - settings.history_size, expired),
        )
        self.bookmarks.trim()
        # A bucket from the future dates from before the last boot.
        now = int(self._now * SECOND)
        self._run("DELETE FROM bucket WHERE full_at NOT BETWEEN ? AND ?", (now, now + LONGEST_BUCKET))

    def _delete(self, first: int, front: int) -> None:
        """Delete the records before the one at `front`, or fewer if they have very many names."""
        state, gone = self.state, list[tuple[str, int]]()
        sql = "SELECT sequence, audience FROM log WHERE sequence < ? AND audience IS NOT NULL ORDER BY sequence"
        for sequence, audience in self._run(sql, (front,)):
            gone += [(name, sequence) for name in msgspec.json.decode(audience, type=Audience).names()]
            if len(gone) > NAMES_AT_ONCE:
                front = sequence + 1
                break
        if front <= first:
            return
        sql = "SELECT replayed_before, bytes_before FROM log WHERE sequence = ?"
        kept = self._run(sql, (front,)).fetchone()
        state.replayed_dropped, state.bytes_dropped = kept or (state.replayed, state.bytes)
        (state.before,) = self._run("SELECT id FROM log WHERE sequence = ?", (front - 1,)).fetchone()
        self._file.run_many("DELETE FROM addressed WHERE name = ? AND sequence = ?", gone)
        self._run("DELETE FROM log WHERE sequence < ?", (front,))
        store_sqlite_counts.trim(self._run, state.before)

    # --- the registry

    def admit(self, client: Registration) -> str:
        state, most = self.state, self._settings.max_connections
        owner = self._owner(client.client_id)
        if owner is not None and owner != self._node_id:
            raise ClientIdTaken(owner)
        for limit in limits_of(self._settings, client):
            sql = "SELECT count(*) FROM member WHERE name = ? AND client <> ?"
            (held,) = self._run(sql, (limit.group, client.client_id)).fetchone()
            limit.check(held)
        if owner is None and (active := state.active()) >= most:
            raise ConnectionRefused(f"Connection limit exceeded: {active}/{most}")
        if owner is None:
            self._register(client)
        else:
            self.subscribe(client)
        state.total += 1
        return state.last

    def _owner(self, client_id: str) -> str | None:
        row = self._run("SELECT node FROM client WHERE id = ?", (client_id,)).fetchone()
        return None if row is None else row[0]

    def _register(self, client: Registration) -> None:
        self._run("INSERT INTO client VALUES (?, ?)", (client.client_id, self._node_id))
        self._add_to_groups(client)
        self.state.nodes[self._node_id].clients += 1

    def _add_to_groups(self, client: Registration) -> None:
        for group in client.groups():
            self._run("INSERT OR IGNORE INTO member VALUES (?, ?)", (group, client.client_id))

    def subscribe(self, client: Registration) -> str:
        owner = self._owner(client.client_id)
        if owner is None and self._is_to_restore:
            # Register the client with these topics: restore() brings those that it had a moment before.
            self._register(client)
        elif owner == self._node_id:
            self._run("DELETE FROM member WHERE client = ?", (client.client_id,))
            self._add_to_groups(client)
        return self.state.last

    def online(self, users: Sequence[str]) -> list[int]:
        names = msgspec.json.encode([USER + user for user in users]).decode()
        sql = "SELECT name, count(*) FROM member WHERE name IN (SELECT value FROM json_each(?)) GROUP BY name"
        counts = dict(self._run(sql, (names,)).fetchall())
        return [counts.get(USER + user, 0) for user in users]

    def revoke(self, user: str, second: int | None) -> int:
        second = int(self._wall) if second is None else second
        known = self._run("SELECT second FROM revoked WHERE user = ?", (user,)).fetchone()
        if known is None or known[0] < second:
            self._run("INSERT OR REPLACE INTO revoked (user, second) VALUES (?, ?)", (user, second))
        return second

    def revocations(self, place: str) -> tuple[str, dict[str, int]]:
        sql = (
            "DELETE FROM revoked WHERE number IN (SELECT number FROM revoked ORDER BY number LIMIT 100) AND second < ?"
        )
        self._run(sql, (int(self._wall - self._settings.revocation_ttl),))
        sql = "SELECT number, user, second FROM revoked WHERE number > ? ORDER BY number LIMIT ?"
        number = int(place.removeprefix("file/")) if place.startswith("file/") else 0
        rows = self._run(sql, (number, REVOCATIONS_AT_ONCE)).fetchall()
        return f"file/{rows[-1][0] if rows else number}", {user: second for _, user, second in rows}

    def leave(self, client_id: str) -> None:
        gone = self._run("DELETE FROM client WHERE id = ? AND node = ?", (client_id, self._node_id))
        self.state.nodes[self._node_id].clients -= gone.rowcount

    def draw(self, bucket: str, rate: Rate) -> Draw:
        row = self._run("SELECT full_at FROM bucket WHERE name = ?", (bucket,)).fetchone()
        now = int(self._now * SECOND)
        drawn = draw(row[0] if row else 0, now, rate)
        if drawn.allowed:
            self._run("INSERT OR REPLACE INTO bucket VALUES (?, ?)", (bucket, now + drawn.until_full))
        return drawn

    # --- between nodes

    def lead(self) -> int | None:
        state = self.state
        if state.leader not in ("", self._node_id) and self._now - state.led < LEASE_SECONDS:
            return None
        state.leader, state.led = self._node_id, self._now
        return state.counter

    def report(self, report: Report) -> None:
        self.state.nodes[self._node_id].report = report

    def census(self) -> Census:
        state = self.state
        others = [node_id for node_id in state.nodes if node_id != self._node_id]
        return Census(state.active(), state.total, state.notifications_sent, *state.counted(), others)

    def count(self, counts: Counts) -> None:
        store_sqlite_counts.add(self._file.run_many, counts)

    def post(self, node_id: str, message: bytes) -> None:
        state = self.state
        if node_id in state.nodes:
            state.mail += 1
            self._run("INSERT INTO mail VALUES (?, ?, ?, ?)", (state.mail, node_id, self._node_id, message))
            self._run("DELETE FROM mail WHERE number <= ?", (state.mail - MAX_MAIL,))
            self.to_wake.add(node_id)
