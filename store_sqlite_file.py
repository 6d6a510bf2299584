"""The SQLite file that processes share: opened, locked, checkpointed, and told apart from a replacement.

Owns the connection of one process to PATH, SQLite's PATH-wal and PATH-shm beside it, the lock PATH-lock, and one
datagram socket for each node, PATH-<node>. Knows no operation, no node's state and no event loop. All methods belong
to one thread.

1. Processes take the lock on PATH-lock before they write, one at a time. SQLite's own way to wait, asleep for up to
   100 ms, would be the latency.
2. A process works on one file for as long as it lives. When the path leads to another file, or to none, nothing is
   written any more: SQLite forbids replacing a file in use, and would write PATH-wal into the replacement.
3. The lock is released only after the transaction has been committed or rolled back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import quote

from errors import StoreUnavailable
from settings import SettingsError

# PATH-wal is copied into PATH after this many written pages; above the second number even if writers have to wait.
PAGE_BYTES = 4096
CHECKPOINT_PAGES = 2000
MAX_WAL_PAGES = 16_000
# The longest path that a socket is bound to, in bytes: the limit in unix(7), and of other systems.
MAX_SOCKET_PATH = 100

SCHEMA_VERSION = 2
# replayed_before, everyone_before and bytes_before are the sums over all earlier records: of those that are replayed,
# of those of them that are for everyone, and of their sizes. So the bounds and the length of a replay are found without
# reading the log. `addressed` has the other records under each name of their audience, numbered for the name, and
# log_everyone those for everyone. receipts_total is the sum over the keys up to and including this one.
SCHEMA = """
CREATE TABLE state (json BLOB NOT NULL);
CREATE TABLE log (
    sequence INTEGER PRIMARY KEY, id TEXT NOT NULL, replayed INTEGER NOT NULL, at REAL NOT NULL,
    replayed_before INTEGER NOT NULL, everyone_before INTEGER NOT NULL, bytes_before INTEGER NOT NULL,
    audience BLOB, rest BLOB NOT NULL, recipients INTEGER
);
CREATE INDEX log_everyone ON log (sequence) WHERE audience IS NULL;
CREATE TABLE addressed (
    name TEXT NOT NULL, sequence INTEGER NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, sequence)
) WITHOUT ROWID;
CREATE TABLE once (
    number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, fingerprint BLOB NOT NULL, receipts BLOB NOT NULL,
    at REAL NOT NULL, receipts_total INTEGER NOT NULL
);
CREATE TABLE client (id TEXT PRIMARY KEY, node TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE mail (number INTEGER PRIMARY KEY, node TEXT NOT NULL, sender TEXT NOT NULL, message BLOB NOT NULL);
"""
# From a file of version 1, whose log had no index.
UPGRADE = """
ALTER TABLE log ADD COLUMN recipients INTEGER;
ALTER TABLE log ADD COLUMN everyone_before INTEGER NOT NULL DEFAULT 0;
UPDATE log SET everyone_before = earlier.number FROM (
    SELECT sequence, coalesce(sum(audience IS NULL AND replayed) OVER (
        ORDER BY sequence ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS number FROM log
) AS earlier WHERE log.sequence = earlier.sequence;
UPDATE state SET json = json_set(CAST(json AS TEXT), '$.everyone',
    (SELECT count(*) FROM log WHERE audience IS NULL AND replayed));
CREATE INDEX log_everyone ON log (sequence) WHERE audience IS NULL;
CREATE TABLE addressed (
    name TEXT NOT NULL, sequence INTEGER NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, sequence)
) WITHOUT ROWID;
INSERT INTO addressed SELECT name, sequence, row_number() OVER (PARTITION BY name ORDER BY sequence) FROM (
    SELECT 'c:' || value AS name, sequence FROM log, json_each(CAST(audience AS TEXT), '$[0]')
    UNION SELECT 't:' || value, sequence FROM log, json_each(CAST(audience AS TEXT), '$[1]')
    UNION SELECT 'u:' || value, sequence FROM log, json_each(CAST(audience AS TEXT), '$[2]')
);
"""
# Tables that an older file lacks. A bucket is full at `full_at` microseconds of CLOCK_MONOTONIC. A
# client is a `member` of groups: its topics, its user and, where addresses are limited, its address.
ADDED_TABLES = (
    "CREATE TABLE IF NOT EXISTS bucket (name TEXT PRIMARY KEY, full_at INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS member (name TEXT NOT NULL, client TEXT NOT NULL REFERENCES client ON DELETE CASCADE,"
    " PRIMARY KEY (name, client)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS member_client ON member (client)",
    "CREATE TABLE IF NOT EXISTS bookmark (client TEXT NOT NULL, user TEXT NOT NULL, position TEXT NOT NULL,"
    " spans BLOB NOT NULL, ends REAL NOT NULL, PRIMARY KEY (client, user)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS bookmark_ends ON bookmark (ends)",
    "CREATE TABLE IF NOT EXISTS revoked (number INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL UNIQUE,"
    " second INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS step (id TEXT PRIMARY KEY, change INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS counted (id TEXT PRIMARY KEY, written INTEGER NOT NULL, addressed INTEGER NOT NULL)"
    " WITHOUT ROWID",
)

# Errors of a path that was wrong from the start, as opposed to a store that is away.
WRONG_PATH = frozenset(("EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR", "EROFS", "ENAMETOOLONG", "ELOOP")).union(
    ("SQLITE_NOTADB", "SQLITE_CANTOPEN", "SQLITE_READONLY")
)


def away(reason: str) -> StoreUnavailable:
    return StoreUnavailable(f"The store is away: {reason}")


class File:
    """One process's connection to the file. Any method may raise OSError or sqlite3.Error."""

    def __init__(self, path: str, timeout: float) -> None:
        self.path = os.path.realpath(path)
        self._timeout = timeout
        self._lock = self._directory = -1
        # Tells the file from another one at the same path; empty until the file is opened for the first time.
        self._identity = ""
        # Cleared by an error: the next transaction then opens the file anew. Until then the connection may serve reads.
        self._is_sound = False
        self._db: sqlite3.Connection | None = None
        self._socket: socket.socket | None = None
        self._checkpointer: threading.Thread | None = None

    @property
    def is_open(self) -> bool:
        return self._db is not None

    def run(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        assert self._db is not None
        return self._db.execute(sql, values)

    def run_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        assert self._db is not None
        self._db.executemany(sql, rows)

    # --- transactions

    def begin(self) -> None:
        """Take the lock and begin a transaction; open the file first where needed.

        Raises SettingsError where the file is no store, and StoreUnavailable where it was replaced.
        """
        self.check_identity()
        if not self._is_sound:
            self._disconnect()
            self._connect()
            self._is_sound = True
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.run("BEGIN IMMEDIATE")

    def check_identity(self) -> None:
        """Raise StoreUnavailable where the path leads to another file than before."""
        if self._identity not in ("", _identity(self.path)):
            raise away("the file was replaced; restart")

    def commit(self) -> None:
        self.run("COMMIT")
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def roll_back(self) -> None:
        """End a transaction that failed, if one has begun, and open the file anew for the next."""
        self._is_sound = False
        with contextlib.suppress(sqlite3.Error):
            if self._db is not None and self._db.in_transaction:
                self._db.rollback()
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def checkpoint(self) -> bool:
        """Begin to copy PATH-wal into PATH, unless that is under way; return whether it began."""
        if self._checkpointer is not None and self._checkpointer.is_alive():
            return False
        self._checkpointer = threading.Thread(target=_checkpoint, args=(self.path,), daemon=True)
        self._checkpointer.start()
        return True

    # --- open and close

    def _connect(self) -> None:
        if os.path.isdir(self.path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self._lock = os.open(f"{self.path}-lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._directory = os.open(os.path.dirname(self.path), os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        self._identity = _identity(self.path)
        # isolation_level None: transactions begin with an explicit BEGIN.
        self._db = sqlite3.connect(self.path, timeout=self._timeout, isolation_level=None)
        version = _version(self._db, self.path)
        self.run("PRAGMA journal_mode = WAL")
        self.run("PRAGMA synchronous = NORMAL")
        # Otherwise some COMMIT runs the checkpoint, and every process waits for its two fsyncs.
        self.run("PRAGMA wal_autocheckpoint = 0")
        self.run("PRAGMA foreign_keys = ON")
        if version < SCHEMA_VERSION:
            changes = UPGRADE if version else SCHEMA
            self._db.executescript(f"BEGIN; {changes}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT")
        for statement in ADDED_TABLES:
            self.run(statement)

    def _disconnect(self) -> None:
        """Close the connection, which rolls its transaction back, and then the lock."""
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        for descriptor in (self._lock, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self._db, self._lock, self._directory, self._is_sound = None, -1, -1, False

    def close(self) -> None:
        self._disconnect()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- the nodes' sockets

    def bind(self, node_id: str) -> None:
        """Make this process's socket, under the name of its node. The file must be open."""
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._address(node_id))
        self._socket.bind(self._address(node_id))
        os.chmod(self._address(node_id), 0o600)

    def unbind(self, node_id: str) -> None:
        """Remove the socket of a node that is gone."""
        with contextlib.suppress(OSError):
            os.unlink(self._address(node_id))

    def wake(self, node_ids: Iterable[str]) -> None:
        """Wake other nodes. A node with unread wake-ups needs no more, and a node that is gone needs none."""
        assert self._socket is not None
        for node_id in node_ids:
            with contextlib.suppress(OSError):
                self._socket.sendto(b"!", socket.MSG_DONTWAIT, self._address(node_id))

    def wait(self, loop_socket: socket.socket) -> None:
        """Sleep until a byte arrives from the event loop, or a wake-up from another node."""
        sockets = [loop_socket] if self._socket is None else [loop_socket, self._socket]
        poll = select.poll()
        for receiver in sockets:
            poll.register(receiver, select.POLLIN)
        poll.poll()
        for receiver in sockets:
            with contextlib.suppress(BlockingIOError):
                while receiver.recv(4096, socket.MSG_DONTWAIT):
                    pass

    def _address(self, node_id: str) -> str:
        """Return the path of a node's socket; through /proc where the direct path is too long for a socket."""
        directory, name = os.path.split(self.path)
        name = f"{name.encode(errors='ignore')[:40].decode(errors='ignore')}-{node_id}"
        path = os.path.join(directory, name)
        return path if len(os.fsencode(path)) <= MAX_SOCKET_PATH else f"/proc/self/fd/{self._directory}/{name}"


def _version(db: sqlite3.Connection, path: str) -> int:
    """Return the version of the tables in a file, 0 for an empty one. Raises SettingsError if they are not ours."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if version > SCHEMA_VERSION:
        raise SettingsError(f"store: {path} was written by a newer version of notifyd")
    if version == 0 and tables:
        raise SettingsError(f"store: {path} belongs to another program")
    return int(version)


def inspect(path: str, timeout: float) -> Iterator[str]:
    """Yield what is odd with a file, which stays as it is. Raises SettingsError where a store cannot be in it."""
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    if not os.path.exists(path):
        if not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
            raise SettingsError(f"store: cannot make {path}: {directory} is not a directory to write in")
        return
    for each in (path, f"{path}-lock", f"{path}-wal", f"{path}-shm", directory):
        if os.path.exists(each) and not os.access(each, os.R_OK | os.W_OK):
            raise SettingsError(f"store: cannot use {path}: no right to write {each}")
    # Without PATH-wal no process is at work. Another mode would make that file, owned by the user who looks.
    mode = "mode=ro" if os.path.exists(f"{path}-wal") else "immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(path)}?{mode}", uri=True, timeout=timeout)) as db:
            if 0 < _version(db, path) < SCHEMA_VERSION:
                yield f"--store: the start will change {path} for good: earlier versions do not read it any more"
    except (OSError, sqlite3.Error) as error:
        raise SettingsError(f"store: cannot use {path}: {failure_of(error)[0]}") from None


def failure_of(error: OSError | sqlite3.Error) -> tuple[str, bool]:
    """Return the reason for people, and whether such an error means a wrong path if it is the first."""
    if isinstance(error, OSError):
        code, reason = errno.errorcode.get(error.errno or 0, ""), error.strerror or str(error)
    else:
        code, reason = getattr(error, "sqlite_errorname", ""), str(error)
    return reason, code in WRONG_PATH


def _identity(path: str) -> str:
    """Return a name for the file that differs from any other file at the same path; empty where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return ""
    return f"{status.st_dev}:{status.st_ino}"


def _checkpoint(path: str) -> None:
    """Copy PATH-wal into PATH, so that PATH-wal can begin anew."""
    # An error now is left to the next checkpoint. The URI: a file that was deleted must not be created again.
    with (
        contextlib.suppress(sqlite3.Error, OSError),
        contextlib.closing(sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True)) as db,
    ):
        _, pages, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if pages > MAX_WAL_PAGES:
            # PATH-wal begins anew only if nothing is appended meanwhile: every process waits for the lock this once.
            with open(f"{path}-lock", "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
