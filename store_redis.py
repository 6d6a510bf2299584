"""The store in Redis: one log and one registry for the processes of many hosts.

Owns the keys under `settings.store_prefix` and the process's part in them: its place in the log, and the keys it can
put back. Only the script store_redis.lua changes those keys. store_redis_link.py reaches Redis, with a connection each
for operations, new records and pages of the log. Redis must not evict keys (maxmemory-policy noeviction).

1. Operations that arrive while others are in flight go with the next call of the script, in order: one group, one
   round trip, one atomic step. A group is done whole, or not at all if the process has to join first. It is answered
   when this process has read the log up to there, so an appended record has been delivered here before its receipt.
2. The log is a stream with entries numbered by `seq`, without a gap. After a gap, a reader asks for `before`, the id in
   front of the first entry: if that is newer than the last record delivered here, records were missed.
3. No entry is trimmed that a living process has yet to read; each group states the process's place.
4. A process is alive for LEASE_SECONDS after its last group, by Redis's clock. Each call removes the dead processes
   first: their clients are gone, their counters stay in the sums.
5. `epoch` names one life of the data in one Redis. It ends when that restarts, loses its keys, is behind the records
   that a process has delivered, or when a replica takes over. Every process then has RESTORE_SECONDS, or two
   thirds more while known processes are missing, to begin to offer the records that the log lacks. It is waited for
   while it offers them, and registers its clients; meanwhile the store is away.
   A newcomer that comes before all others to an emptied Redis begins an empty log. While no record is in it, its epoch
   ends when a process with records comes. Ids and order stay, numbers begin anew. So a lost connection, a lost primary
   and lost data are one case: join again.
6. An Idempotency-Key and its answer are in the log at the last record of the append, and in every process as long as
   that record, to re-offer both. A batch with a key is read whole or not at all, so a retry duplicates no part of it.
7. A process joins with each new connection and registers its clients again. So an operation that failed half way
   leaves nothing behind, and a client that left meanwhile is removed.
8. Two histories are never merged. Processes that went on apart, with an old primary and a new one, have records of
   different epochs: only those of the later epoch are put back, and a process whose newest record is not in the log
   begins anew with the log, which its clients are told.
9. With store_replicas, a record is delivered once a later group of this process was confirmed by so many replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Sequence
from itertools import chain, islice, takewhile
from typing import Any

from redis import exceptions
from redis.asyncio.connection import AbstractConnection

import store_redis_records as packing
from buckets import Draw, Rate
from counts import Durations
from errors import KeyReused, StoreUnavailable
from log import ENTRY_BYTES
from settings import Settings
from store import (
    LEASE_SECONDS,
    Appended,
    Census,
    Counts,
    Draft,
    Node,
    Once,
    Opening,
    Record,
    Registration,
    Report,
    limits_of,
)
from store_redis_bookmarks import RedisBookmarks
from store_redis_link import Argument, RedisLink, send
from store_redis_log import OPENING_RECORDS, RedisLog
from store_redis_queue import Operations

logger = logging.getLogger("notifyd")

RENEW_SECONDS = 1.0
# The interval of tries while the store is away.
LOOK_SECONDS = 0.5
# Every process learns of a new epoch with its next renewal, or finds Redis back with its next try.
RESTORE_SECONDS = 1.5
# How long a read of the log waits in Redis. A connection that is silent for store_timeout longer is dead.
BLOCK_SECONDS = 1.0
# Records that one call reads.
READ_RECORDS = 200
# Keys that one renewal forgets.
FORGOTTEN_AT_ONCE = 500
LOST_DATA = "it has lost data and is being filled again"


class _Rejoin(exceptions.RedisError):
    """The store does not know this process: it was taken for dead, or the data's life has ended."""


class RedisStore:
    """One process's side of a log and a registry in Redis."""

    append_at_once = None

    def __init__(self, settings: Settings, url: str) -> None:
        """Raises SettingsError if the URL is none."""
        self._link = RedisLink(settings, url)
        self.log = RedisLog(self._link, self._run, self._check_available)
        self.bookmarks = RedisBookmarks(settings, self._perform, self._submit, self._enqueue)
        self.node_id = secrets.token_hex(8)
        self.failure: str | None = None
        self.durations = Durations()
        self._settings = settings
        self._prefix, self._timeout = settings.store_prefix, settings.store_timeout
        self._task: asyncio.Task[None] | None = None
        self._operations = Operations()
        # The place of this process: epoch, number of the last entry read, id of the last message read.
        self._epoch, self._seq, self._post_id = "", 0, "0"
        # The entry up to which the last group has found the log on enough replicas.
        self._replicated = 0
        # The epoch of the last join. Whatever was delivered here is in the log of that epoch.
        self._branch = ""
        # The newest id that this process has read, and the id after which it has missed nothing.
        self._newest = self._whole_since = ""
        # The opening: the records so far, the entry that completes it, and its time.
        self._opened = False
        self._found: list[Record] = []
        self._opening_until = self._opening_now = 0
        # The keys in the log with their answers as they are stored there, by the id of the record.
        self._keys: dict[str, tuple[bytes, bytes]] = {}
        # The sums over all processes as the script has them, with their start; and this process's part.
        self._sums, self._report = [0] * 7, Report(0, 0)

    # --- life

    async def open(self, node: Node) -> None:
        # The last event loop may have ended without close().
        self._end()
        self._node = node
        self._wake = asyncio.Event()
        self._group_done = asyncio.Event()
        # Set once the store is open, or known to be away.
        self._settled = asyncio.Event()
        self.log.restart()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._stay_joined())
        try:
            await self._settled.wait()
        except BaseException:
            # The caller was cancelled.
            self._end()
            raise

    async def close(self) -> None:
        if (task := self._task) is None:
            return
        with contextlib.suppress(StoreUnavailable):
            await self._perform("close")
        self._end()
        await asyncio.gather(task, return_exceptions=True)

    def _end(self) -> None:
        task, self._task = self._task, None
        if task is None:
            return
        if self._loop.is_closed():
            self._operations.clear()
        else:
            task.cancel()
            self._operations.refuse("The store is closed")

    async def _stay_joined(self) -> None:
        """Join, and join again after each failure."""
        # Not `while True`: an error in a task of the group can swallow the cancellation.
        while self._task is asyncio.current_task():
            try:
                await self._work()
            except _Rejoin:
                continue
            except (exceptions.RedisError, OSError) as error:
                self._fail(self._link.reason(error))
            except Exception:
                logger.exception("The store in Redis failed and is joined again")
                self._fail("an unexpected error, see the log")
            await asyncio.sleep(LOOK_SECONDS)

    async def _work(self) -> None:
        """Join, then run operations and follow the log until one of them fails."""
        async with self._link.connected() as (operations, log):
            await self._add_node(operations)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._run_operations(operations))
                    tasks.create_task(self._follow_log(log))
                    tasks.create_task(self._renew())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                await self.log.disconnect()

    def _fail(self, reason: str) -> None:
        failure = f"The store is away: {reason}"
        if self.failure is None:
            logger.warning(failure)
        self.failure = failure
        self._operations.refuse(failure)
        self._settled.set()

    def _note_available(self) -> None:
        if self.failure is not None:
            logger.info("The store is back")
        self.failure = None
        self._settled.set()

    # --- join

    async def _add_node(self, connection: AbstractConnection) -> None:
        """Join with this process's clients; where the log has lost records, help to refill it first."""
        # The epoch that has this process's clients, and its records where it lacked some.
        entered = reached = ""
        while True:
            if not self._opened:
                self._seq = 0
            has_entered = "1" if entered and entered == self._epoch else ""
            opening = OPENING_RECORDS, self._settings.cache_bytes, ENTRY_BYTES
            arguments: list[Argument] = ["join", self._newest, self._branch, has_entered, *opening]
            arguments += (*self._sums, *self._report)
            epoch, members, position, *joined = await self._run(connection, arguments)
            if self._epoch not in ("", epoch.decode()):
                # Operations that are not answered yet may be lost, too.
                self._fail(LOST_DATA)
            self._epoch = epoch.decode()
            if not joined:
                self._fail(LOST_DATA)
            if entered != self._epoch:
                # The records first: clients can be registered later, but no record put in front of others.
                if not joined and self._opened:
                    await self._offer_records(connection, position.decode())
                await self._register_clients(connection, {member.decode() for member in members})
                entered = self._epoch
            if joined:
                break
            # Each call puts a part of the records back, until all of them are there.
            await asyncio.sleep(0.1 if position.decode() == reached else 0)
            reached = position.decode()
        await self._link.await_replicas(connection)
        self._post_id, before = "0", position.decode()
        self._seq, is_whole, newest, now, self._sums[-1] = joined
        self._replicated = newest
        self.bookmarks.joined(self._epoch)
        self._branch = self._epoch
        if self._opened:
            if not is_whole:
                self._begin_anew(before)
            self._note_available()
            self._operations.answer(self._seq)
        else:
            self._opening_until, self._opening_now = newest, now
            self._newest = self._whole_since = before
            self._found = []
            if self._seq == newest:
                self._finish_opening()

    async def _register_clients(self, connection: AbstractConnection, members: set[str]) -> None:
        """Make the registry's members of this node those that the Hub has."""
        # Callers that were refused a moment ago first undo their changes here, such as a client's topics.
        await asyncio.sleep(0)
        # Clients that leave from here on do so in order, after their registration below.
        self._operations.forget_leaving()
        clients = {client.client_id: client for client in self._node.registrations()}
        for some in packing.chunks(("leave", client_id) for client_id in members - clients.keys()):
            await self._run(connection, list(chain(*some)))
        taken = list[str]()
        for some in packing.chunks(map(packing.registration, clients.values())):
            _, refused = await self._run(connection, ["register", len(some), *chain(*some)])
            taken += [client_id.decode() for client_id in refused]
        if taken:
            self._node.evicted(taken)

    async def _offer_records(self, connection: AbstractConnection, newest: str) -> None:
        """Offer the records that the log lacks, the newest first.

        If this process does not know the newest of the log, that is another log.
        """
        front, is_known, lost = self._node.kept(max(newest, self._whole_since))
        front = max(front, self._whole_since)
        if newest > front and not is_known:
            return
        parts = (packing.offer(record, *self._keys.get(record.id, (b"", b""))) for record in lost)
        head = "offer", self._branch, self._newest
        for some in packing.chunks(parts):
            which: list[Argument] = [*head, some[-1][0], some[0][0], len(some)]
            if (answer := await self._run(connection, which)) == b"refused":
                return
            if answer == b"wanted":
                await self._run(connection, which + list(chain(*some)))
        # All of them: this process's part of the log goes back to its front.
        await self._run(connection, [*head, front, front, 0])

    def _finish_opening(self) -> None:
        self._opened = True
        age = (self._opening_now - self._sums[-1]) / 1e6
        self._node.opened(Opening(self._whole_since, self._found, self._sums[-1] / 1e6, age))
        self._found = []
        self._note_available()

    # --- operations

    async def _run(self, connection: AbstractConnection, arguments: list[Argument]) -> Any:
        """Run one group in the script. Raises _Rejoin if that was refused."""
        settings = self._settings
        header: tuple[Argument, ...] = (
            *(2, self._prefix + "meta", self._prefix + "never", self._prefix, self._epoch, self.node_id, self._seq),
            *(secrets.randbits(31), settings.max_connections, settings.history_size, settings.history_bytes),
            *(round(seconds * 1e6) for seconds in (settings.history_ttl, LEASE_SECONDS, RESTORE_SECONDS)),
            *self.bookmarks.bounds,
        )
        if (replies := await self._link.run_script(connection, *header, *arguments)) == b"join":
            raise _Rejoin
        return replies

    async def _run_operations(self, connection: AbstractConnection) -> None:
        """Run the queue, a group at a time."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while arguments := self._operations.next_group():
                try:
                    seq, *replies = await self._run(connection, arguments)
                except _Rejoin:
                    self._operations.put_back()
                    raise
                await self._link.await_replicas(connection)
                self._replicated = seq
                self._operations.done(seq, replies)
                self._group_done.set()
                self._operations.answer(self._seq)

    async def _renew(self) -> None:
        while self._task is not None:
            # Not awaited: the answer comes after the log up to it, and an entry of that may be lost.
            self._submit("renew", self._post_id).add_done_callback(self._renewed)
            await asyncio.sleep(RENEW_SECONDS)

    def _renewed(self, answer: asyncio.Future[Any]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            *self._sums, before = answer.result()
            self.log.before = before.decode()
            # The keys of the records that this process could put back.
            front = self._node.kept(self._newest)[0] if self._opened else ""
            for id in list(islice(takewhile(max(self.log.before, front).__ge__, self._keys), FORGOTTEN_AT_ONCE)):
                del self._keys[id]

    def _check_available(self) -> None:
        if self.failure is not None or self._task is None:
            raise StoreUnavailable(self.failure or "The store is closed")

    def _perform(self, *arguments: Argument) -> asyncio.Future[Any]:
        """Enqueue an operation. Raises StoreUnavailable at once while the store is away."""
        self._check_available()
        return self._submit(*arguments)

    def _submit(self, *arguments: Argument) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        self.durations.time(str(arguments[0]), answer)
        self._enqueue(*arguments, answer=answer)
        return answer

    def _enqueue(self, *arguments: Argument, answer: asyncio.Future[Any] | None = None) -> None:
        self._operations.add(*arguments, answer=answer)
        # On a loop that has ended, the next join removes the clients that leave.
        if not self._loop.is_closed():
            self._wake.set()

    async def append(self, drafts: Sequence[Draft], once: Once | None = None, counter: int | None = None) -> Appended:
        key, fingerprint = ("", b"") if once is None else once
        arguments: list[Argument] = ["append", len(drafts), "" if counter is None else counter, key, fingerprint]
        for draft in drafts:
            arguments += packing.draft(draft)
        reply = await self._perform(*arguments)
        if reply == b"reused":
            raise KeyReused("Idempotency-Key: already used for another request")
        return packing.appended(reply)

    async def admit(self, client: Registration) -> str:
        limits = limits_of(self._settings, client)
        try:
            reply = await self._perform("admit", *packing.registration(client), *packing.bounds(limits))
        except asyncio.CancelledError:
            # The admission may be in flight already.
            self.leave(client.client_id)
            raise
        return packing.admitted(reply, limits, self._settings.max_connections)

    async def subscribe(self, client: Registration) -> str:
        return bytes(await self._perform("subscribe", *packing.registration(client))).decode()

    async def online(self, users: Sequence[str]) -> list[int]:
        return list(await self._perform("online", len(users), *users))

    async def revoke(self, user: str, second: int | None = None) -> int:
        return int(await self._perform("revoke", user, "" if second is None else second))

    async def revocations(self, place: str) -> tuple[str, dict[str, int]]:
        log, ttl = f"{self._epoch}/", round(self._settings.revocation_ttl * 1e6)
        number = place.removeprefix(log) if place.startswith(log) else 0
        return packing.revoked(await self._perform("revocations", number, ttl), log)

    def leave(self, client_id: str) -> None:
        self._enqueue("leave", client_id)

    async def draw(self, bucket: str, rate: Rate) -> Draw:
        allowed, until_full = await self._perform("draw", bucket, rate.cost, rate.depth)
        return Draw(allowed == 1, until_full)

    async def lead(self) -> int | None:
        counter: int = await self._perform("lead")
        return None if counter < 0 else counter

    async def report(self, report: Report) -> None:
        self._report = report
        await self._perform("report", *report)

    async def census(self) -> Census:
        active, total, sent, messages, slow, *others = await self._perform("census")
        # Figures that were stated do not decrease after Redis has lost its data.
        self._sums[:2] = total, sent
        return Census(active, total, sent, messages, slow, [node.decode() for node in others])

    async def count(self, counts: Counts) -> None:
        await self._perform("tally", *packing.counts(counts))

    async def post(self, node_id: str, message: bytes) -> None:
        await self._perform("post", node_id, message)

    # --- the log

    async def _follow_log(self, connection: AbstractConnection) -> None:
        """Read entries and messages as they come."""
        log, posts = self._prefix + "log", f"{self._prefix}posts:{self.node_id}"
        block, count = round(BLOCK_SECONDS * 1000), READ_RECORDS
        while True:
            async with asyncio.timeout(BLOCK_SECONDS + self._timeout):
                place = f"{self._seq}-0", self._post_id
                await send(connection, "XREAD", "COUNT", count, "BLOCK", block, "STREAMS", log, posts, *place)
                streams = await connection.read_response()
            for stream, entries in streams or ():
                if stream.decode() == log:
                    whole = entries[: packing.whole_batches(entries)]
                    count = READ_RECORDS if whole else 2 * count
                    if whole:
                        if self._settings.store_replicas:
                            await self._until_replicated(packing.number_of(whole[-1]))
                        await self._take_entries(connection, whole)
                else:
                    self._post_id = entries[-1][0].decode()
                    for _, (_, sender, _, message) in entries:
                        self._node.receive_mail(sender.decode(), message)

    async def _until_replicated(self, number: int) -> None:
        """Return when a group of this process has found that enough replicas have the log up to this number."""
        while number > self._replicated:
            if self._operations.is_idle():
                self._enqueue("report", *self._report)
            await self._group_done.wait()
            self._group_done.clear()

    async def _take_entries(self, connection: AbstractConnection, entries: list[packing.Entry]) -> None:
        first, last = packing.number_of(entries[0]), packing.number_of(entries[-1])
        if first != self._seq + 1:
            async with asyncio.timeout(self._timeout):
                await connection.send_command("HMGET", self._prefix + "meta", "epoch", "before")
                epoch, before = await connection.read_response()
            if epoch != self._epoch.encode():
                raise _Rejoin
            if self._opened and before.decode() > self._newest:
                self._begin_anew(before.decode())
        # Without await: the delivery and the place of this process change together.
        records = []
        for entry in entries:
            if (record := packing.record_of(entry)).id > self._newest:
                records.append(record)
                if key := entry[1][packing.KEY]:
                    self._keys[record.id] = key, entry[1][packing.ANSWER]
        self._seq = last
        if records:
            self._newest = records[-1].id
        if not self._opened:
            self._found += records
            if self._seq >= self._opening_until:
                self._finish_opening()
        elif records:
            self._node.deliver(records)
        self._operations.answer(self._seq)

    def _begin_anew(self, before: str) -> None:
        """Go on with the log from its start: it does not continue the records delivered here."""
        self._newest = self._whole_since = before
        self._node.missed(before)
