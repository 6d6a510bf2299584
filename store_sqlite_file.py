"""The SQLite file in which processes share a log and a registry, as one thread of each works on it.

Owns the schema, the turns, the transactions, and what an operation does in one. Knows no event loop.

1. Whatever changes with almost every transaction is one row, State: read at its beginning, written at its end.
2. A transaction begins with its node's lease renewed, the nodes buried whose lease has run out, and the log read.
3. A refused operation has changed nothing, so it need not be undone, and the others of its transaction are done.
4. No record goes that a living node has yet to read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import select
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import sub
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
from msgspec import Struct, field

from errors import ConnectionRefused, KeyReused, StoreUnavailable
from log import Audience, Positions
from settings import Settings, SettingsError
from store import (
    LEASE_SECONDS,
    SECOND,
    Appended,
    Census,
    Draft,
    Draw,
    Once,
    Opening,
    Rate,
    Receipt,
    Record,
    Registration,
    Report,
    Taken,
    address_is_full,
    check_reuse,
    draw,
)

logger = logging.getLogger("notifyd")

TRIM_SECONDS = 1.0
# PATH-wal is copied into PATH when so many pages of it were written; from the second number on at all costs.
PAGE_BYTES = 4096
CHECKPOINT_PAGES = 2000
MAX_WAL_PAGES = 16_000
# Messages between nodes that are kept for all of them together; a node reads its own within milliseconds.
MAX_MAIL = 10_000
# No bucket takes longer to be full, in microseconds.
LONGEST_BUCKET = 3600 * SECOND
# The longest path that a socket is bound to, in bytes: what unix(7) and its kin elsewhere allow.
MAX_SOCKET_PATH = 100

SCHEMA_VERSION = 1
# replayed_before and bytes_before are what all records before this one add up to, so that trimming finds the first
# that stays by reading no further; receipts_total is what the keys up to this one do.
SCHEMA = """
CREATE TABLE state (json BLOB NOT NULL);
CREATE TABLE log (
    sequence INTEGER PRIMARY KEY, id TEXT NOT NULL, replayed INTEGER NOT NULL, at REAL NOT NULL,
    replayed_before INTEGER NOT NULL, bytes_before INTEGER NOT NULL, audience BLOB, rest BLOB NOT NULL
);
CREATE TABLE once (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, fingerprint BLOB NOT NULL, receipts BLOB NOT NULL,
    at REAL NOT NULL, receipts_total INTEGER NOT NULL
);
CREATE TABLE client (id TEXT PRIMARY KEY, node TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE topic (
    name TEXT NOT NULL, client TEXT NOT NULL REFERENCES client ON DELETE CASCADE, PRIMARY KEY (name, client)
) WITHOUT ROWID;
CREATE INDEX topic_client ON topic (client);
CREATE TABLE mail (number INTEGER PRIMARY KEY, node TEXT NOT NULL, sender TEXT NOT NULL, message BLOB NOT NULL);
"""
# Beside that schema: a file that was made before they were needed gets them, too. A bucket is full at so many
# microseconds of CLOCK_MONOTONIC.
LIMITS = (
    "CREATE TABLE IF NOT EXISTS bucket (name TEXT PRIMARY KEY, full_at INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS address (client TEXT PRIMARY KEY REFERENCES client ON DELETE CASCADE,"
    " name TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS address_name ON address (name)",
)
APPEND = (
    "INSERT INTO log (sequence, replayed_before, bytes_before, id, rest, audience, replayed, at)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
RECORDS = "SELECT sequence, id, rest, audience, replayed, at FROM log WHERE sequence > ? ORDER BY sequence"

# A path that is wrong from the start, as opposed to a store that is away.
WRONG_PATH = frozenset(("EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR", "EROFS", "ENAMETOOLONG", "ELOOP")).union(
    ("SQLITE_NOTADB", "SQLITE_CANTOPEN", "SQLITE_READONLY")
)


class Peer(Struct):
    """A node: its lease on CLOCK_MONOTONIC, and how far it has read the log."""

    renewed: float
    read: int
    clients: int = 0
    report: Report = Report(0, 0)


class State(Struct):
    """What changes all the time. `started` is on CLOCK_MONOTONIC, `started_at` in seconds since the epoch.

    `replayed`, `bytes` and `receipts` count all that was ever kept, the `dropped` ones what is gone of it.
    """

    last: str
    before: str
    sequence: int = 0
    replayed: int = 0
    replayed_dropped: int = 0
    bytes: int = 0
    bytes_dropped: int = 0
    receipts: int = 0
    mail: int = 0
    unsaved_pages: int = 0
    started: float = 0.0
    started_at: float = 0.0
    total: int = 0
    notifications_sent: int = 0
    # Of the nodes that are gone.
    report: Report = Report(0, 0)
    leader: str = ""
    led: float = 0.0
    counter: int = 0
    nodes: dict[str, Peer] = field(default_factory=dict)

    def active(self) -> int:
        return sum(peer.clients for peer in self.nodes.values())

    def counted(self) -> Report:
        return _sum([self.report, *(peer.report for peer in self.nodes.values())])


class Operation(NamedTuple):
    """What the thread is asked for. Without a future nobody waits, and it is kept until it could be done."""

    run: Callable[[Database], Any]
    future: asyncio.Future[Any] | None = None
    then: Callable[[Any], None] | None = None


class News(Struct):
    """What a turn of the thread has to tell the loop."""

    outcomes: list[tuple[Operation, Any]] = []
    opening: Opening | None = None
    missed: bool = False
    records: list[Record] = []
    mail: list[tuple[str, bytes]] = []
    evicted: bool = False
    failure: StoreUnavailable | SettingsError | None = None


def away(reason: str) -> StoreUnavailable:
    return StoreUnavailable(f"The store is away: {reason}")


class Database:
    """The file, as the thread works on it. Operations are its public methods, called by transact() alone."""

    def __init__(self, settings: Settings, path: str) -> None:
        self._settings = settings
        self._path = os.path.realpath(path)
        self._in_use = threading.Lock()
        self._lock = self._directory = -1
        self._is_sound = False
        # Tells the file from another one at the same path. A process works on one file for as long as it lives.
        self._identity = ""
        self._db: sqlite3.Connection | None = None
        self._socket: socket.socket | None = None
        # How far this process knows the log; `newest` is the id of that place, empty before the opening.
        self._newest = ""
        self._sequence = self._told = 0
        # When the server started, as this process last read it, and what of the sums is this process's own.
        self._started: float | None = None
        self._counted = Report(0, 0)
        self._has_mail = False
        # Whether this node was taken for dead, and its clients are yet to be entered again.
        self._is_to_restore = False
        self._trimmed = 0.0
        self._saver: threading.Thread | None = None

    # --- the thread's turns

    @contextlib.contextmanager
    def used_by(self, node_id: str, told: str) -> Iterator[Database]:
        """Be this node's, which has been told the log up to an id, and that is the place from which to go on.

        One that is opened again waits for the thread that it had before.
        """
        with self._in_use:
            self._node_id, self._tried = node_id, False
            self._newest, self._sequence = told, -1
            try:
                yield self
            finally:
                self._disconnect()
                if self._socket is not None:
                    self._socket.close()
                    self._socket = None

    def wait(self, ear: socket.socket) -> None:
        """Sleep until the loop or another node rings."""
        sockets = [ear] if self._socket is None else [ear, self._socket]
        poll = select.poll()
        for one in sockets:
            poll.register(one, select.POLLIN)
        poll.poll()
        for one in sockets:
            with contextlib.suppress(BlockingIOError):
                while one.recv(4096, socket.MSG_DONTWAIT):
                    pass

    def look(self) -> News:
        """Read what is new; that needs no turn."""
        news = News()
        if self._db is not None and self._newest:
            try:
                self._run("BEGIN")
                state = self._load()
                self._read(state, news)
                self._run("COMMIT")
                self._has_mail = self._has_mail or bool(news.mail)
                self._arrive(state)
            except Exception as error:
                news = News(failure=self._failure(error))
        return news

    def transact(self, operations: Sequence[Operation]) -> News:
        """Do all operations for which somebody waits, or none."""
        news = News()
        try:
            self._begin()
            self._attend(news)
            self._operations = len(operations)
            for operation in operations:
                if operation.future is None or not operation.future.done():
                    try:
                        outcome = operation.run(self)
                    except (KeyReused, Taken, ConnectionRefused) as refusal:
                        outcome = refusal
                    news.outcomes.append((operation, outcome))
            self._commit()
        except Exception as error:
            failure = self._failure(error)
            waiting = [operation for operation in operations if operation.future is not None]
            # Each raises its own: an exception that is raised again and again keeps every traceback.
            outcomes = [(operation, type(failure)(*failure.args)) for operation in waiting]
            # What can still be read is read now: the wake-up for it may have been the one that led here.
            news = self.look()
            news.failure, news.outcomes = failure, outcomes
            return news
        news.records += self._appended
        self._arrive(self._state)
        self._counted = self._peer.report
        assert self._socket is not None
        for node_id in self._rung:
            # One that has many wake-ups to read needs no more, and one that is gone none.
            with contextlib.suppress(OSError):
                self._socket.sendto(b"!", socket.MSG_DONTWAIT, self._address(node_id))
        return news

    def _failure(self, error: Exception) -> StoreUnavailable | SettingsError:
        """Give up the turn, and say why: at the first attempt a wrong path is a wrong setting."""
        first, self._tried = not self._tried, True
        # Until the next attempt it may do for reading.
        self._is_sound = False
        with contextlib.suppress(sqlite3.Error):
            if self._db is not None and self._db.in_transaction:
                self._db.rollback()
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        if isinstance(error, StoreUnavailable):
            return error
        if isinstance(error, SettingsError):
            return error if first else away(str(error))
        if isinstance(error, OSError):
            code, reason = errno.errorcode.get(error.errno or 0, ""), error.strerror or str(error)
        elif isinstance(error, sqlite3.Error):
            code, reason = getattr(error, "sqlite_errorname", ""), str(error)
        else:
            logger.error("The store failed", exc_info=error)
            code, reason = "", "internal error"
        if first and code in WRONG_PATH:
            return SettingsError(f"store: cannot use {self._path}: {reason}")
        return away(reason)

    # --- the file

    def _run(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        assert self._db is not None
        return self._db.execute(sql, values)

    def _begin(self) -> None:
        """Take the turn and start a transaction."""
        if self._identity not in ("", _identity(self._path)):
            raise away("the file was replaced; restart")
        if not self._is_sound:
            self._disconnect()
            self._connect()
            self._is_sound = True
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._run("BEGIN IMMEDIATE")

    def _connect(self) -> None:
        if os.path.isdir(self._path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self._lock = os.open(f"{self._path}-lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._directory = os.open(os.path.dirname(self._path), os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        self._identity = _identity(self._path)
        # isolation_level None: transactions begin where they are begun here.
        self._db = sqlite3.connect(self._path, timeout=self._settings.store_timeout, isolation_level=None)
        (version,) = self._run("PRAGMA user_version").fetchone()
        (tables,) = self._run("SELECT count(*) FROM sqlite_master").fetchone()
        if version > SCHEMA_VERSION:
            raise SettingsError(f"store: {self._path} was written by a newer version of notifyd")
        if version == 0 and tables:
            raise SettingsError(f"store: {self._path} belongs to another program")
        self._run("PRAGMA journal_mode = WAL")
        self._run("PRAGMA synchronous = NORMAL")
        # Otherwise a COMMIT does it now and then, and everybody waits for its two fsyncs.
        self._run("PRAGMA wal_autocheckpoint = 0")
        self._run("PRAGMA foreign_keys = ON")
        if version == 0:
            first = Positions().next()
            self._db.executescript(f"BEGIN; {SCHEMA}; PRAGMA user_version = {SCHEMA_VERSION}")
            state = State(last=first, before=first)
            self._run("INSERT INTO state VALUES (?)", (msgspec.json.encode(state),))
            self._run("COMMIT")
        for table in LIMITS:
            self._run(table)

    def _disconnect(self) -> None:
        """Close everything; a transaction is rolled back before the turn is given up."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        for descriptor in (self._lock, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self._db, self._lock, self._directory, self._is_sound = None, -1, -1, False

    def _load(self) -> State:
        (json,) = self._run("SELECT json FROM state").fetchone()
        return msgspec.json.decode(json, type=State)

    def _commit(self) -> None:
        """Write what the operations left for the end, and give up the turn."""
        assert self._db is not None
        state = self._state
        self._db.executemany(APPEND, self._rows)
        if self._node_id in state.nodes:
            state.nodes[self._node_id].read = state.sequence
        excess = max(self._settings.history_size // 10, 100)
        if (
            self._now - self._trimmed > TRIM_SECONDS
            or state.replayed - state.replayed_dropped > self._settings.history_size + excess
            or state.bytes - state.bytes_dropped > self._settings.history_bytes * 1.1
        ):
            self._trim()
        # About as many as were written: the row of the state, and the ends of what was changed.
        state.unsaved_pages += 2 + self._operations + state.bytes // PAGE_BYTES - self._bytes // PAGE_BYTES
        saves = state.unsaved_pages > CHECKPOINT_PAGES and not (self._saver and self._saver.is_alive())
        if saves:
            state.unsaved_pages = 0
        self._run("UPDATE state SET json = ?", (msgspec.json.encode(state),))
        self._run("COMMIT")
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        if saves:
            self._saver = threading.Thread(target=_checkpoint, args=(self._path,), daemon=True)
            self._saver.start()

    # --- reading the log, and the nodes

    def _arrive(self, state: State) -> None:
        self._newest, self._sequence, self._told = state.last, state.sequence, state.mail
        self._started, self._tried = state.started, True

    def _read(self, state: State, news: News) -> None:
        """Find what lies between the place of this process and the end of the log."""
        sequence, told = self._sequence, self._told
        if sequence < 0:
            found = self._run("SELECT coalesce(max(sequence), 0) FROM log WHERE id <= ?", (self._newest,))
            (sequence,) = found.fetchone()
        if state.last > self._newest and state.sequence > sequence:
            rows = self._run(RECORDS, (sequence,)).fetchall()
            news.missed = state.before > self._newest
            news.records = [_record(row) for row in rows]
        if state.mail > told:
            sql = "SELECT sender, message FROM mail WHERE node = ? AND number > ? ORDER BY number"
            news.mail = self._run(sql, (self._node_id, told)).fetchall()

    def _attend(self, news: News) -> None:
        """Read the state and the log, renew the lease, bury the dead; join where this node is not known."""
        self._state = state = self._load()
        self._now, self._wall = time.monotonic(), time.time()
        self._bytes, self._operations = state.bytes, 0
        self._rows: list[tuple[Any, ...]] = []
        self._appended: list[Record] = []
        self._rung: set[str] = set()
        for node_id, peer in list(state.nodes.items()):
            # One from the future is from before the machine was started.
            if node_id != self._node_id and not 0 <= self._now - peer.renewed < LEASE_SECONDS:
                self._bury(node_id)
        if self._newest:
            self._read(state, news)
        if self._node_id not in state.nodes:
            self._join(news)
        # Also that of a node that leaves now.
        self._peer = state.nodes[self._node_id]
        self._peer.renewed = self._now
        if self._has_mail or news.mail:
            self._run("DELETE FROM mail WHERE node = ? AND number <= ?", (self._node_id, state.mail))
            self._has_mail = False
        self._positions = Positions(state.last)

    def _join(self, news: News) -> None:
        state, counted = self._state, Report(0, 0)
        if self._started is None and not state.nodes:
            state.total = state.notifications_sent = state.counter = 0
            state.report = Report(0, 0)
            state.started, state.started_at = self._now, self._wall
        elif state.started == self._started:
            # This node was taken for dead, or left; what it had counted is in the sums, and it counts on.
            counted = self._counted
            state.report = Report(*map(sub, state.report, counted))
        self._bind()
        state.nodes[self._node_id] = Peer(self._now, state.sequence, report=counted)
        if self._newest:
            news.evicted = self._is_to_restore = True
        else:
            self._trim()
            records = [_record(row) for row in self._run(RECORDS, (0,))]
            news.opening = Opening(state.before, records, state.started_at, self._now - state.started)

    def _bury(self, node_id: str) -> None:
        """Take a node out with its clients; what it has counted stays in the sums."""
        state = self._state
        gone = state.nodes.pop(node_id)
        state.report = _sum([state.report, gone.report])
        if state.leader == node_id:
            state.leader = ""
        self._run("DELETE FROM client WHERE node = ?", (node_id,))
        self._run("DELETE FROM mail WHERE node = ?", (node_id,))
        with contextlib.suppress(OSError):
            os.unlink(self._address(node_id))

    def _bind(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._address(self._node_id))
        self._socket.bind(self._address(self._node_id))
        os.chmod(self._address(self._node_id), 0o600)

    def _address(self, node_id: str) -> str:
        """Return the path of a node's socket, round about where the straight one is too long for a socket."""
        directory, name = os.path.split(self._path)
        name = f"{name.encode(errors='ignore')[:40].decode(errors='ignore')}-{node_id}"
        path = os.path.join(directory, name)
        return path if len(os.fsencode(path)) <= MAX_SOCKET_PATH else f"/proc/self/fd/{self._directory}/{name}"

    def _trim(self) -> None:
        """Let go of what is beyond the bounds, but of no record that a living node has yet to read."""
        state, settings, expired = self._state, self._settings, self._wall - self._settings.history_ttl
        self._trimmed = self._now
        read = min(peer.read for peer in state.nodes.values()) if state.nodes else state.sequence
        bounds = read, state.replayed - settings.history_size, state.bytes - settings.history_bytes, expired
        front = self._run(
            "SELECT sequence, replayed_before, bytes_before FROM log"
            " WHERE sequence > ? OR (replayed_before >= ? AND bytes_before >= ? AND at >= ?) ORDER BY sequence LIMIT 1",
            bounds,
        ).fetchone()
        if front is None:
            front = state.sequence + 1, state.replayed, state.bytes
        sequence, state.replayed_dropped, state.bytes_dropped = front
        last = self._run("SELECT id FROM log WHERE sequence = ?", (sequence - 1,)).fetchone()
        if last is not None:
            (state.before,) = last
            self._run("DELETE FROM log WHERE sequence < ?", (sequence,))
        self._run(
            "DELETE FROM once WHERE number < (SELECT coalesce(min(number), 9e18) FROM"
            " (SELECT number FROM once WHERE receipts_total > ? AND at >= ? ORDER BY number LIMIT 1))",
            (state.receipts - settings.history_size, expired),
        )
        # One from the future is from before the machine was started.
        now = int(self._now * SECOND)
        self._run("DELETE FROM bucket WHERE full_at NOT BETWEEN ? AND ?", (now, now + LONGEST_BUCKET))

    # --- the operations

    def renew(self) -> None:
        """Nothing more: every transaction renews the lease."""

    def depart(self) -> None:
        self._bury(self._node_id)

    def append(self, drafts: Sequence[Draft], once: Once | None, counter: int | None) -> Appended:
        state, at = self._state, self._wall
        if once is not None and (known := self._known(once)) is not None:
            return known
        if counter is not None:
            if state.leader != self._node_id or counter != state.counter + 1:
                return Appended([], at)
            state.counter, state.led = counter, self._now
        receipts = []
        for draft in drafts:
            record = Record(self._positions.next(), *draft, at)
            receipts.append(Receipt(record.id, self._recipients(draft.audience)))
            state.last = record.id
            state.sequence += 1
            self._appended.append(record)
            size, audience = len(record.rest), None
            if record.audience is not None:
                audience = msgspec.json.encode(record.audience)
                size += sum(len(name) for names in record.audience for name in names)
            counts = state.sequence, state.replayed, state.bytes
            self._rows.append((*counts, record.id, record.rest, audience, record.replayed, at))
            state.replayed += record.replayed
            state.bytes += size
        state.notifications_sent += len(drafts)
        if once is not None:
            state.receipts += len(receipts)
            row = once.key, once.fingerprint, msgspec.json.encode(receipts), at, state.receipts
            self._run(
                "INSERT OR REPLACE INTO once (key, fingerprint, receipts, at, receipts_total) VALUES (?, ?, ?, ?, ?)",
                row,
            )
        self._rung.update(state.nodes.keys() - {self._node_id})
        return Appended(receipts, at)

    def _known(self, once: Once) -> Appended | None:
        bounds = self._state.receipts - self._settings.history_size, self._wall - self._settings.history_ttl
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
            return self._state.active()
        clients, topics = map(list, audience)
        if not clients and len(topics) == 1:
            # The usual case, spared the union that would copy a large topic.
            found = self._run("SELECT count(*) FROM topic WHERE name = ?", topics)
        else:
            found = self._run(
                "SELECT count(*) FROM (SELECT id FROM client WHERE id IN (SELECT value FROM json_each(?))"
                " UNION SELECT client FROM topic WHERE name IN (SELECT value FROM json_each(?)))",
                (msgspec.json.encode(clients).decode(), msgspec.json.encode(topics).decode()),
            )
        return int(found.fetchone()[0])

    def admit(self, client_id: str, topics: Collection[str], address: str) -> str:
        state, limit = self._state, self._settings.max_connections
        owner = self._owner(client_id)
        if owner not in (None, self._node_id):
            raise Taken(owner)
        self._check_address(client_id, address)
        if owner is None and (active := state.active()) >= limit:
            raise ConnectionRefused(f"Connection limit exceeded: {active}/{limit}")
        if owner is None:
            self._register(client_id, topics)
        else:
            self.subscribe(client_id, topics)
        self._set_address(client_id, address)
        state.total += 1
        return state.last

    def _check_address(self, client_id: str, address: str) -> None:
        """Raise TooManyConnections where the other clients of the address are as many as may be."""
        if address and (limit := self._settings.max_connections_per_ip):
            sql = "SELECT count(*) FROM address WHERE name = ? AND client <> ?"
            (held,) = self._run(sql, (address, client_id)).fetchone()
            if held >= limit:
                raise address_is_full(held, limit)

    def _set_address(self, client_id: str, address: str) -> None:
        if address and self._settings.max_connections_per_ip:
            self._run("INSERT OR REPLACE INTO address VALUES (?, ?)", (client_id, address))

    def _owner(self, client_id: str) -> str | None:
        row = self._run("SELECT node FROM client WHERE id = ?", (client_id,)).fetchone()
        return None if row is None else row[0]

    def _register(self, client_id: str, topics: Collection[str]) -> None:
        self._run("INSERT INTO client VALUES (?, ?)", (client_id, self._node_id))
        for topic in topics:
            self._run("INSERT OR IGNORE INTO topic VALUES (?, ?)", (topic, client_id))
        self._state.nodes[self._node_id].clients += 1

    def subscribe(self, client_id: str, topics: Collection[str]) -> str:
        owner = self._owner(client_id)
        if owner is None and self._is_to_restore:
            # With these topics, and not with those that it had when the loop was asked for its clients.
            self._register(client_id, topics)
        elif owner == self._node_id:
            self._run("DELETE FROM topic WHERE client = ?", (client_id,))
            for topic in topics:
                self._run("INSERT OR IGNORE INTO topic VALUES (?, ?)", (topic, client_id))
        return self._state.last

    def leave(self, client_id: str) -> None:
        gone = self._run("DELETE FROM client WHERE id = ? AND node = ?", (client_id, self._node_id))
        self._state.nodes[self._node_id].clients -= gone.rowcount

    def draw(self, bucket: str, rate: Rate) -> Draw:
        row = self._run("SELECT full_at FROM bucket WHERE name = ?", (bucket,)).fetchone()
        now = int(self._now * SECOND)
        drawn = draw(row[0] if row else 0, now, rate)
        if drawn.allowed:
            self._run("INSERT OR REPLACE INTO bucket VALUES (?, ?)", (bucket, now + drawn.until_full))
        return drawn

    def restore(self, registrations: Iterable[Registration]) -> list[str]:
        """Enter clients that this node had before it was taken for dead; return those that others have by now."""
        self._is_to_restore, taken = False, []
        for client_id, topics, address in registrations:
            owner = self._owner(client_id)
            if owner not in (None, self._node_id):
                taken.append(client_id)
                continue
            if owner is None:
                self._register(client_id, topics)
            self._set_address(client_id, address)
        return taken

    def lead(self) -> int | None:
        state = self._state
        if state.leader not in ("", self._node_id) and self._now - state.led < LEASE_SECONDS:
            return None
        state.leader, state.led = self._node_id, self._now
        return state.counter

    def report(self, report: Report) -> None:
        self._state.nodes[self._node_id].report = report

    def census(self) -> Census:
        state = self._state
        others = [node_id for node_id in state.nodes if node_id != self._node_id]
        return Census(state.active(), state.total, state.notifications_sent, *state.counted(), others)

    def post(self, node_id: str, message: bytes) -> None:
        state = self._state
        if node_id in state.nodes:
            state.mail += 1
            self._run("INSERT INTO mail VALUES (?, ?, ?, ?)", (state.mail, node_id, self._node_id, message))
            self._run("DELETE FROM mail WHERE number <= ?", (state.mail - MAX_MAIL,))
            self._rung.add(node_id)


def _identity(path: str) -> str:
    """Return what tells a file from another one at the same path; nothing where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ""
    return f"{status.st_dev}:{status.st_ino}"


def _record(row: tuple[Any, ...]) -> Record:
    _, id, rest, audience, replayed, at = row
    audience = audience and msgspec.json.decode(audience, type=Audience)
    return Record(id, rest, audience, bool(replayed), at)


def _checkpoint(path: str) -> None:
    """Copy what was committed from PATH-wal to where it belongs, so that PATH-wal can begin anew."""
    # What fails now is done later, by the next one. The URI: a file that is gone shall not come back.
    with (
        contextlib.suppress(sqlite3.Error, OSError),
        contextlib.closing(sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True)) as db,
    ):
        _, pages, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if pages > MAX_WAL_PAGES:
            # It begins anew only when nobody has added to it meanwhile: have everybody wait this once.
            with open(f"{path}-lock", "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


def _sum(reports: Iterable[Report]) -> Report:
    return Report(*map(sum, zip(*reports, strict=True)))
