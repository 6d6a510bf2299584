"""The log and the registry of all processes of one machine, in one SQLite file.

SqliteStore lives on the event loop; the work is done by a thread of its own, in sqlite_database.py. They share the
queue of operations and nothing else. Beside the file PATH lie SQLite's own PATH-wal and PATH-shm, the lock PATH-lock,
and one socket for each node, PATH-<node>.

1. The thread takes all operations that wait, and does them in one transaction: so many at once as arrived during the
   last one. What the transaction found in the log and what it answers reach the loop together, the log first.
2. Processes take turns by a lock on PATH-lock. SQLite's own way to wait, asleep for up to 100 ms, would be the latency.
3. Whoever appends or posts wakes the others by a datagram; a node reads the log then, and once a second in any case.
4. The thread may be stuck in a lock, so the loop keeps the time. What it has given up may still be done.

What was committed survives the death of every process. The newest of it may not survive a power cut, since the file
is synchronised now and then and not at each commit; what is left is never damaged. A process that is stopped in the
middle of a transaction holds all up until it goes on or is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from errors import StoreUnavailable
from settings import Settings, number
from store import Appended, Census, Draft, Draw, Node, Once, Rate, Report
from store_sqlite_file import Database, News, Operation, away

logger = logging.getLogger("notifyd")

T = TypeVar("T")

# The thread has to ask for Python's lock after each statement, and a loop that is busy gives it up after this time.
# With the 5 ms that are the default, two processes that take 30 us to deliver each of 5,000 notifications a second
# need more than 100 ms from publish to receipt at the median; with this 0.5 ms.
SWITCH_SECONDS = 0.0002
RENEW_SECONDS = 1.0
# While the store is away it is looked for so often.
LOOK_SECONDS = 0.5
# One transaction does at most so many operations: about 10 ms, for which the other processes wait.
GROUP = 500
CLOSED = "The store is away: it is closed"

NOTHING = News()


class SqliteStore:
    """The Store of one process, on its event loop."""

    def __init__(self, settings: Settings, path: str) -> None:
        self.node_id = ""
        self.failure: str | None = CLOSED
        self._timeout = settings.store_timeout
        self._database = Database(settings, path)
        # The id up to which the node has been told the log; empty before it has been told any of it.
        self._told = ""
        self._keeper: asyncio.Task[None] | None = None
        self._shut()

    async def open(self, node: Node) -> None:
        """Join. Raises SettingsError where the path leads to no file that a store can be in."""
        # An event loop may have gone away without a word.
        self._end()
        self._node = node
        self._loop = asyncio.get_running_loop()
        self.node_id, self.failure = secrets.token_hex(8), None
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._bell, ear = socket.socketpair()
        self._rung = False
        self._thread_ended = self._loop.create_future()
        arguments = self.node_id, self._told, self._queue, ear, self._loop, self._thread_ended
        threading.Thread(target=self._work, args=arguments, name="notifyd-store", daemon=True).start()
        self._keeper = self._loop.create_task(self._keep())
        try:
            await self._ask(Database.renew)
        except StoreUnavailable:
            pass
        except BaseException:
            # A wrong setting, or whoever waited for this has given up.
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
            self._put(Operation(Database.depart))
            self._put(None)
            self._shut()
            self._bell.close()

    def _shut(self) -> None:
        """Let whatever is asked for from now on go nowhere."""
        self._queue: deque[Operation | None] = deque()
        self._rung = True

    async def append(self, drafts: Sequence[Draft], once: Once | None = None, counter: int | None = None) -> Appended:
        return await self._do(lambda database: database.append(drafts, once, counter))

    async def admit(self, client_id: str, topics: Collection[str], address: str) -> str:
        # One that was given up may be done all the same, and nobody would ever take the client out.
        return await self._do(
            lambda database: database.admit(client_id, topics, address), lambda: self.leave(client_id)
        )

    async def subscribe(self, client_id: str, topics: Collection[str]) -> str:
        return await self._do(lambda database: database.subscribe(client_id, topics))

    def leave(self, client_id: str) -> None:
        self._put(Operation(lambda database: database.leave(client_id)))

    async def draw(self, bucket: str, rate: Rate) -> Draw:
        return await self._do(lambda database: database.draw(bucket, rate))

    async def lead(self) -> int | None:
        return await self._do(Database.lead)

    async def report(self, report: Report) -> None:
        await self._do(lambda database: database.report(report))

    async def census(self) -> Census:
        return await self._do(Database.census)

    async def post(self, node_id: str, message: bytes) -> None:
        await self._do(lambda database: database.post(node_id, message))

    async def _do(self, run: Callable[[Database], T], give_up: Callable[[], None] | None = None) -> T:
        if self.failure is not None:
            raise StoreUnavailable(self.failure)
        return await self._ask(run, give_up)

    async def _ask(self, run: Callable[[Database], T], give_up: Callable[[], None] | None = None) -> T:
        """Have it done, also while the store is away."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._put(Operation(run, future))
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except (TimeoutError, asyncio.CancelledError) as reason:
            if give_up is not None:
                give_up()
            if isinstance(reason, TimeoutError):
                raise self._fail(away(f"no answer within {number(self._timeout)} s")) from None
            raise

    def _put(self, operation: Operation | None) -> None:
        self._queue.append(operation)
        if not self._rung:
            self._rung = True
            # The thread has ended where it had something to tell a loop that was gone.
            with contextlib.suppress(OSError):
                self._bell.send(b"!")

    async def _keep(self) -> None:
        """Renew the lease; while the store is away, look for it."""
        while True:
            await asyncio.sleep(RENEW_SECONDS if self.failure is None else LOOK_SECONDS)
            with contextlib.suppress(StoreUnavailable):
                await self._ask(Database.renew)

    def _fail(self, error: StoreUnavailable) -> StoreUnavailable:
        if self.failure is None:
            logger.warning(error.message)
        self.failure = error.message
        return error

    def _arrived(self, node_id: str, news: News) -> None:
        """Hand on what the thread has found, the log before the answers."""
        if node_id != self.node_id:
            # The next thread has begun at the same place, and finds it, too.
            return
        if self._keeper is None:
            # Closed: whether it could leave is nobody's concern.
            pass
        elif isinstance(news.failure, StoreUnavailable):
            self._fail(news.failure)
        elif news.failure is None and news.outcomes and self.failure is not None:
            self.failure = None
            logger.info("The store is back")
        if news.opening is not None:
            self._told = news.opening.records[-1].id if news.opening.records else news.opening.before
            self._node.opened(news.opening)
        if news.missed:
            self._node.missed()
        if news.records:
            self._told = news.records[-1].id
            self._node.deliver(news.records)
        for sender, message in news.mail:
            self._node.told(sender, message)
        for operation, outcome in news.outcomes:
            if operation.future is not None:
                _settle(operation.future, outcome)
            elif operation.then is not None:
                operation.then(outcome)
        if news.evicted:
            registrations = list(self._node.registrations())
            self._put(Operation(lambda database: database.restore(registrations), then=self._restored))

    def _restored(self, taken: list[str]) -> None:
        if taken:
            self._node.evicted(taken)

    def _work(
        self,
        node_id: str,
        told: str,
        queue: deque[Operation | None],
        ear: socket.socket,
        loop: asyncio.AbstractEventLoop,
        ended: asyncio.Future[None],
    ) -> None:
        """Be the thread, until the queue holds None or the loop has closed."""
        # call_soon_threadsafe() raises RuntimeError when the loop has closed.
        with ear, contextlib.suppress(RuntimeError):
            with self._database.used_by(node_id, told) as database:
                kept: list[Operation] = []
                operations: list[Operation | None] = []
                while None not in operations:
                    if not queue:
                        database.wait(ear)
                    # First this: whoever puts something into the queue from here on rings again.
                    self._rung = False
                    operations = [queue.popleft() for _ in range(min(len(queue), GROUP))]
                    asked = [operation for operation in operations if operation is not None]
                    if asked:
                        asked = kept + asked
                        news = database.transact(asked)
                        kept = [operation for operation in asked if operation.future is None] if news.failure else []
                    else:
                        news = database.look()
                    if news != NOTHING:
                        loop.call_soon_threadsafe(self._arrived, node_id, news)
            loop.call_soon_threadsafe(_settle, ended, None)


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if not future.done():
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
