"""The log and the registry of all processes of one machine, in one SQLite file.

SqliteStore lives on the event loop, Database in a thread of its own. They share the queue of operations and nothing
else. Owns both sides and their exchange; operations are in store_sqlite_transaction.py, the file and its lock in
store_sqlite_file.py.

1. The thread takes all waiting operations and runs them in one transaction: as many as arrived during the last one.
   The transaction's new records and its answers reach the loop together, the records first.
2. After an append or a post, the thread wakes the other nodes by a datagram. A node then reads the log, and also once
   a second with the renewal of its lease.
3. The thread may be stuck waiting for the lock, so the loop keeps the deadlines. An operation past its deadline may
   still be done.

A commit survives the death of every process. A power cut may lose the newest commits, since the file is synchronised
by checkpoints and not by each commit; the rest of the file stays intact. A process that is stopped in the middle of a
transaction blocks all others until it continues or is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import sqlite3
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from buckets import Draw, Rate
from counts import Durations
from errors import ConnectionRefused, KeyReused, StoreUnavailable
from settings import Settings, SettingsError, number
from store import Appended, Census, ClientIdTaken, Counts, Draft, Node, Once, Registration, Report
from store_sqlite_bookmarks import SqliteBookmarks
from store_sqlite_file import File, away, failure_of
from store_sqlite_log import SqliteLog
from store_sqlite_state import newest_end
from store_sqlite_transaction import Operation, Outcome, Progress, Transaction

logger = logging.getLogger("notifyd")

T = TypeVar("T")

# The thread needs Python's lock after each statement, and a busy loop releases it only after this interval. Measured
# with two processes that take 30 us to deliver each of 5,000 notifications a second, from publish to receipt at the
# median: over 100 ms with the default of 5 ms, 0.5 ms with this.
SWITCH_SECONDS = 0.0002
RENEW_SECONDS = 1.0
# The interval of the renewal while the store is away.
LOOK_SECONDS = 0.5
# Operations in one transaction, at most: the other processes wait for about 10 ms.
GROUP = 500
CLOSED = "The store is away: it is closed"

NOTHING = Outcome()


class SqliteStore:
    """The Store of one process, on its event loop."""

    append_at_once = None

    def __init__(self, settings: Settings, path: str) -> None:
        self.node_id = ""
        self.failure: str | None = CLOSED
        self.durations = Durations()
        self._timeout = settings.store_timeout
        self._database = Database(settings, path)
        self.log = SqliteLog(settings, self._database.file, self._database.progress)
        self.bookmarks = SqliteBookmarks(self._perform, self._retry)
        # The newest id that was delivered to the node; empty before the opening.
        self._delivered = ""
        self._keeper: asyncio.Task[None] | None = None
        self._detach()

    async def open(self, node: Node) -> None:
        """Join. Raises SettingsError where the path leads to no file that a store can be in."""
        # The last event loop may have ended without close().
        self._end()
        self._node = node
        self._loop = asyncio.get_running_loop()
        self.node_id, self.failure = secrets.token_hex(8), None
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._bell, thread_socket = socket.socketpair()
        self._rung = False
        self._thread_ended = self._loop.create_future()
        arguments = self.node_id, self._delivered, self._queue, thread_socket, self._loop, self._thread_ended
        threading.Thread(target=self._work, args=arguments, name="notifyd-store", daemon=True).start()
        self._keeper = self._loop.create_task(self._keep_lease())
        try:
            await self._submit(Transaction.renew)
        except StoreUnavailable:
            pass
        except BaseException:
            # A wrong setting, or the caller was cancelled.
            self._end()
            raise

    async def close(self) -> None:
        self._end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._thread_ended, self._timeout)

    def _end(self) -> None:
        """Have the thread leave and end, if there is one."""
        if self._keeper is not None:
            self.failure = CLOSED
            if not self._loop.is_closed():
                self._keeper.cancel()
            self._keeper = None
            self._enqueue(Operation(Transaction.depart))
            self._enqueue(None)
            self._detach()
            self._bell.close()
            self.log.close()

    def _detach(self) -> None:
        """Give later operations a queue that no thread reads."""
        self._queue: deque[Operation | None] = deque()
        self._rung = True

    # --- the operations

    async def append(self, drafts: Sequence[Draft], once: Once | None = None, counter: int | None = None) -> Appended:
        return await self._perform(Transaction.append, drafts, once, counter)

    async def admit(self, client: Registration) -> str:
        self._check_available()
        try:
            return await self._submit(Transaction.admit, client)
        except (StoreUnavailable, asyncio.CancelledError):
            # The admission may still be done, and nothing else would take the client out again.
            self.leave(client.client_id)
            raise

    async def subscribe(self, client: Registration) -> str:
        return await self._perform(Transaction.subscribe, client)

    async def online(self, users: Sequence[str]) -> list[int]:
        return await self._perform(Transaction.online, users)

    async def revoke(self, user: str, second: int | None = None) -> int:
        return await self._perform(Transaction.revoke, user, second)

    async def revocations(self, place: str) -> tuple[str, dict[str, int]]:
        return await self._perform(Transaction.revocations, place)

    def leave(self, client_id: str) -> None:
        self._retry(Transaction.leave, client_id)

    async def draw(self, bucket: str, rate: Rate) -> Draw:
        return await self._perform(Transaction.draw, bucket, rate)

    async def lead(self) -> int | None:
        return await self._perform(Transaction.lead)

    async def report(self, report: Report) -> None:
        await self._perform(Transaction.report, report)

    async def census(self) -> Census:
        return await self._perform(Transaction.census)

    async def count(self, counts: Counts) -> None:
        await self._perform(Transaction.count, counts)

    async def post(self, node_id: str, message: bytes) -> None:
        await self._perform(Transaction.post, node_id, message)

    def _check_available(self) -> None:
        if self.failure is not None:
            raise StoreUnavailable(self.failure)

    async def _perform(self, run: Callable[..., T], *arguments: Any) -> T:
        """Have the thread run a method of Transaction. Raises StoreUnavailable at once while the store is away."""
        self._check_available()
        return await self._submit(run, *arguments)

    def _retry(self, run: Callable[..., Any], *arguments: Any) -> None:
        """Have the thread run a method of Transaction, again until it succeeds."""
        self._enqueue(Operation(run, arguments))

    async def _submit(self, run: Callable[..., T], *arguments: Any) -> T:
        """Have the thread run a method of Transaction, even while the store is away."""
        future: asyncio.Future[T] = self._loop.create_future()
        self.durations.time(run.__name__, future)
        self._enqueue(Operation(run, arguments, future))
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            raise self._fail(away(f"no answer within {number(self._timeout)} s")) from None

    def _enqueue(self, operation: Operation | None) -> None:
        self._queue.append(operation)
        if not self._rung:
            self._rung = True
            # The thread has ended if it had an outcome for a loop that was closed.
            with contextlib.suppress(OSError):
                self._bell.send(b"!")

    async def _keep_lease(self) -> None:
        """Renew the lease regularly; while the store is away, that finds it again."""
        while True:
            await asyncio.sleep(RENEW_SECONDS if self.failure is None else LOOK_SECONDS)
            with contextlib.suppress(StoreUnavailable):
                await self._submit(Transaction.renew)

    def _fail(self, error: StoreUnavailable) -> StoreUnavailable:
        if self.failure is None:
            logger.warning(error.message)
        self.failure = error.message
        return error

    # --- outcomes of the thread

    def _receive(self, node_id: str, outcome: Outcome) -> None:
        """Take an outcome of the thread: first the log, then the mail, then the answers."""
        if node_id != self.node_id:
            # From an earlier thread; the present thread reads the same again.
            return
        # After close() no failure counts any more.
        if self._keeper is not None:
            self._note_availability(outcome)
        if outcome.opening is not None:
            records = outcome.opening.records
            self._delivered = records[-1].id if records else outcome.opening.before
            self._node.opened(outcome.opening)
        if outcome.missed:
            self._node.missed(outcome.missed)
        if outcome.records:
            self._delivered = outcome.records[-1].id
            self._node.deliver(outcome.records)
        for sender, message in outcome.mail:
            self._node.receive_mail(sender, message)
        for operation, answer in outcome.answers:
            if operation.future is not None:
                _settle(operation.future, answer)
            elif operation.then is not None:
                operation.then(answer)
        if outcome.evicted:
            registrations = list(self._node.registrations())
            self._enqueue(Operation(Transaction.restore, (registrations,), then=self._evict))

    def _note_availability(self, outcome: Outcome) -> None:
        if isinstance(outcome.failure, StoreUnavailable):
            self._fail(outcome.failure)
        elif outcome.failure is None and outcome.answers and self.failure is not None:
            self.failure = None
            logger.info("The store is back")

    def _evict(self, client_ids: list[str]) -> None:
        if client_ids:
            self._node.evicted(client_ids)

    # --- the thread

    def _work(
        self,
        node_id: str,
        delivered: str,
        queue: deque[Operation | None],
        thread_socket: socket.socket,
        loop: asyncio.AbstractEventLoop,
        ended: asyncio.Future[None],
    ) -> None:
        """Run the thread until the queue holds None, or the loop has closed."""
        # call_soon_threadsafe() raises RuntimeError when the loop has closed.
        with thread_socket, contextlib.suppress(RuntimeError):
            with self._database.used_by(node_id, delivered) as database:
                # Operations without a waiter from transactions that failed.
                kept: list[Operation] = []
                taken: list[Operation | None] = []
                while None not in taken:
                    if not queue:
                        database.wait(thread_socket)
                    # Cleared before the queue is read: an operation that is enqueued from here on rings again.
                    self._rung = False
                    taken = [queue.popleft() for _ in range(min(len(queue), GROUP))]
                    operations = [operation for operation in taken if operation is not None]
                    if operations:
                        operations = kept + operations
                        outcome = database.transact(operations)
                        kept = [one for one in operations if one.future is None] if outcome.failure else []
                    else:
                        outcome = database.look()
                    if outcome != NOTHING:
                        loop.call_soon_threadsafe(self._receive, node_id, outcome)
            loop.call_soon_threadsafe(_settle, ended, None)


class Database:
    """Runs transactions on the file, in the store's thread."""

    def __init__(self, settings: Settings, path: str) -> None:
        self._settings = settings
        self.file = File(path, settings.store_timeout)
        self._in_use = threading.Lock()
        self.progress = Progress()

    @contextlib.contextmanager
    def used_by(self, node_id: str, delivered: str) -> Iterator[Database]:
        """Serve one thread as this node. `delivered` is the newest id that was delivered to it, if any.

        The thread of a store that is opened again waits here for the thread before it.
        """
        with self._in_use:
            self._node_id, self._has_tried = node_id, False
            self.progress.newest, self.progress.sequence = delivered, -1
            try:
                yield self
            finally:
                self.file.close()

    def wait(self, loop_socket: socket.socket) -> None:
        """Sleep until the event loop or another node wakes the thread."""
        self.file.wait(loop_socket)

    def look(self) -> Outcome:
        """Read new records and mail, without the lock."""
        outcome = Outcome()
        if self.file.is_open and self.progress.newest:
            try:
                self.file.run("BEGIN")
                transaction = self._transaction()
                transaction.read(outcome)
                self.file.run("COMMIT")
                transaction.save_progress()
                self.progress.has_mail = self.progress.has_mail or bool(outcome.mail)
            except Exception as error:
                outcome = Outcome(failure=self._failure(error))
        return outcome

    def transact(self, operations: Sequence[Operation]) -> Outcome:
        """Run all operations in one transaction, and answer those with a future. After an error none has been done."""
        outcome = Outcome()
        try:
            self.file.begin()
            transaction = self._transaction()
            transaction.begin(outcome)
            for operation in operations:
                if operation.future is None or not operation.future.done():
                    try:
                        answer = operation.run(transaction, *operation.arguments)
                    except (KeyReused, ClientIdTaken, ConnectionRefused) as refusal:
                        answer = refusal
                    outcome.answers.append((operation, answer))
            transaction.finish(len(operations))
            self.file.commit()
            if (opening := outcome.opening) is not None:
                self.file.run("BEGIN")
                before, records = newest_end(self.file.run, self._settings, opening.before)
                self.file.run("COMMIT")
                outcome.opening = opening._replace(before=before, records=records)
        except Exception as error:
            failure = self._failure(error)
            waiting = [operation for operation in operations if operation.future is not None]
            # An exception for each, since one that is raised repeatedly keeps every traceback.
            answers = [(operation, type(failure)(*failure.args)) for operation in waiting]
            # Read now: the wake-up for new records may have been the one that led here.
            outcome = self.look()
            outcome.failure, outcome.answers = failure, answers
            return outcome
        outcome.records += transaction.appended
        transaction.save_progress()
        progress, self._has_tried = self.progress, True
        progress.has_mail = False
        # Not after a mere read: a node that was removed is in the sums of the start that it last took part in.
        progress.started, progress.counted = transaction.state.started, transaction.node.report
        self.file.wake(transaction.to_wake)
        return outcome

    def _transaction(self) -> Transaction:
        return Transaction(self.file, self._settings, self._node_id, self.progress)

    def _failure(self, error: Exception) -> StoreUnavailable | SettingsError:
        """Roll back, and return the error for the callers: on the first attempt a wrong path is a wrong setting."""
        is_first, self._has_tried = not self._has_tried, True
        self.file.roll_back()
        if isinstance(error, StoreUnavailable):
            return error
        if isinstance(error, SettingsError):
            return error if is_first else away(str(error))
        if not isinstance(error, OSError | sqlite3.Error):
            logger.error("The store failed", exc_info=error)
            return away("internal error")
        reason, is_wrong_path = failure_of(error)
        if is_first and is_wrong_path:
            return SettingsError(f"store: cannot use {self.file.path}: {reason}")
        return away(reason)


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if not future.done():
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
