"""The store in Redis: one log and one registry for the processes of many hosts.

Owns the keys under `settings.store_prefix`, the script that is the only thing to change them (store_redis.lua), and
two connections: one for operations, one that waits for the log. Supported: redis://, rediss:// (TLS) and unix://, with
user, password and database in the URL; Redis 6.2 or later, and Valkey. It must not be one that evicts keys
(maxmemory-policy noeviction). Not supported: Sentinel and Cluster.

1. Operations that arrive while others are under way go with the next call of the script, in order: one group, one
   round trip, one atomic step. A group is done whole or, where the process has to join first, not at all. It is
   answered when this process has read the log up to there: so what was appended has been delivered here before.
2. The log is a stream whose entries are numbered without a gap by `seq`. A reader that sees a gap asks for `before`,
   the id in front of the first entry: if that is newer than what it has delivered, it has missed something.
3. Nothing is trimmed that a live process has not read yet; each group tells how far its process is.
4. A process is alive for LEASE_SECONDS after its last group, by Redis's clock. Whoever comes next puts out the dead,
   before anything else: their clients are gone, what they have counted stays.
5. `epoch` names one life of the data. It ends when Redis restarts, loses its keys, or is behind what a process has
   delivered. Then every process has RESTORE_SECONDS to offer what it has and the log has not; meanwhile the store is
   away. Ids and order stay, numbers begin anew, and a reader leaves out what it has delivered before.
6. An Idempotency-Key lies in the log, with its answer, at the last record of what was appended. Every process keeps
   it for as long as the log does, to offer it with the record. It takes the records of one key together or not at all,
   so no repetition can follow a part of them.
7. A process joins with each new connection and enters its clients again, whatever happened in between. So an operation
   that failed half way leaves nothing behind, and a client that left meanwhile needs no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import secrets
import ssl
import time
from collections import deque
from collections.abc import Collection, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import hiredis
import msgspec
from redis import exceptions
from redis.asyncio.connection import AbstractConnection, Connection, parse_url

from errors import ConnectionRefused, KeyReused, StoreUnavailable
from log import Audience
from settings import Settings, SettingsError
from store import (
    LEASE_SECONDS,
    Appended,
    Census,
    ClientIdTaken,
    Draft,
    Draw,
    Node,
    Once,
    Opening,
    Rate,
    Receipt,
    Record,
    Report,
    address_is_full,
)

logger = logging.getLogger("notifyd")

RENEW_SECONDS = 1.0
# How often a store that is away is looked for.
LOOK_SECONDS = 0.5
# Every process hears of a new epoch with its next renewal, or finds Redis back with its next look.
RESTORE_SECONDS = 1.5
# How long one read of the log waits on Redis; a connection that says nothing for store_timeout longer is dead.
BLOCK_SECONDS = 1.0
# What one call may hold, so that Redis is not busy with it for more than about 10 ms: arguments, and records read.
GROUP_ARGUMENTS, READ_RECORDS, CHUNK = 4000, 200, 500
OLDEST_REDIS = (6, 2)
LOST_DATA = "it has lost data and is being filled again"

_SCRIPT = Path(__file__).with_suffix(".lua").read_text()
_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

_Argument = bytes | str | int
_Entry = tuple[bytes, list[bytes]]
# Where an entry of the log has its key and the answer; store_redis.lua names all its fields.
ONCE, ANSWER = 11, 15
_unpack_audience = msgspec.msgpack.Decoder(tuple[frozenset[str], frozenset[str]]).decode


class _Rejoin(Exception):
    """The store does not know this process: it was taken for dead, or the data's life has ended."""


class _Operation:
    __slots__ = ("answer", "arguments")

    def __init__(self, arguments: tuple[_Argument, ...], answer: asyncio.Future[Any] | None) -> None:
        self.arguments = arguments
        self.answer = answer


class RedisStore:
    """One process's side of a log and a registry in Redis. Raises SettingsError where the URL is none."""

    def __init__(self, settings: Settings, url: str) -> None:
        try:
            # Without the slashes it would be taken for the default, localhost.
            options: dict[str, Any] = dict(parse_url(url if "://" in url else ""))
            self._kind: type[AbstractConnection] = options.pop("connection_class", Connection)
            # Our own deadlines go for whole groups; the protocol is the one that Redis 6 and Valkey answer alike.
            deadlines = {"socket_timeout": None, "socket_connect_timeout": settings.store_timeout}
            self._options = options | deadlines | {"protocol": 2}
            # Options that it does not know are noticed only here.
            self._kind(**self._options)
        except (ValueError, TypeError, exceptions.RedisError):
            # What redis-py says may repeat a part of the password.
            raise SettingsError("--store: expected a URL such as redis://localhost:6379/0") from None
        self.node_id = secrets.token_hex(8)
        self.failure: str | None = None
        self._settings = settings
        self._prefix = settings.store_prefix
        self._timeout = settings.store_timeout
        self._task: asyncio.Task[None] | None = None
        self._queue: deque[_Operation] = deque()
        self._under_way: list[_Operation] = []
        self._epoch = ""
        self._seq = 0
        self._post_id = "0"
        self._opening_until = 0
        self._opening_now = 0
        self._opened = False
        # The newest id that this process has read, and the one from which on it has missed nothing.
        self._newest = self._whole_since = ""
        # What was in the log, until all of it is read.
        self._found: list[Record] = []
        # The keys of what is in the log, and their answers as the log has them, by the id of the record.
        self._keys: dict[str, tuple[bytes, bytes]] = {}
        # What was done at a place of the log that this process has not read up to yet, with the replies.
        self._done: deque[tuple[int, list[_Operation], list[Any]]] = deque()
        # The counters of all: total, sent, messages, slow consumers, test notifications, and when they began.
        self._known = [0, 0, 0, 0, 0, 0]
        self._report = Report(0, 0)
        # By which rule it evicts keys.
        self._policy = "noeviction"

    # --- life

    async def open(self, node: Node) -> None:
        # An event loop may have gone away without a word.
        self._end()
        self._node = node
        self._wake = asyncio.Event()
        # Set once the store is open or known to be away.
        self._settled = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._stay())
        try:
            await self._settled.wait()
        except BaseException:
            # Whoever waited for this has given up.
            self._end()
            raise

    async def close(self) -> None:
        if (task := self._task) is None:
            return
        with contextlib.suppress(StoreUnavailable):
            await self._ask("close")
        self._end()
        await asyncio.gather(task, return_exceptions=True)

    def _end(self) -> None:
        """Be joined no longer."""
        task, self._task = self._task, None
        if task is None:
            return
        if self._loop.is_closed():
            self._done.clear()
            self._queue.clear()
            self._under_way = []
        else:
            task.cancel()
            self._drop("The store is closed")

    async def _stay(self) -> None:
        """Be joined; whenever that fails, look again until it works."""
        # Not while True: an error in a task of the group can swallow the cancellation.
        while self._task is asyncio.current_task():
            try:
                await self._live()
            except _Rejoin:
                continue
            except (exceptions.RedisError, OSError) as error:
                self._fail(self._reason(error))
            except Exception:
                logger.exception("The store in Redis failed and is joined again")
                self._fail("an unexpected error, see the log")
            await asyncio.sleep(LOOK_SECONDS)

    async def _live(self) -> None:
        operations, log = self._kind(**self._options), self._kind(**self._options)
        try:
            async with asyncio.timeout(self._timeout):
                await operations.connect()  # type: ignore[no-untyped-call]
                await log.connect()  # type: ignore[no-untyped-call]
                await self._check_server(operations)
            await self._join(operations)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._operate(operations))
                tasks.create_task(self._follow(log))
                tasks.create_task(self._renew())
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            for connection in (operations, log):
                await connection.disconnect(nowait=True)

    async def _check_server(self, connection: AbstractConnection) -> None:
        """Look whether Redis is new enough, and warn of one that forgets.

        This also is a small command before the large ones: to those, a Redis that asks for a password says no more
        than that they are too large.
        """
        await connection.send_command("INFO")
        try:
            text = (await connection.read_response()).decode()
        except exceptions.NoPermissionError:
            return
        info = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        version = info.get("redis_version", "6.2")
        if [int(part) for part in re.findall(r"\d+", version)] < list(OLDEST_REDIS):
            raise exceptions.RedisError(f"Redis 6.2 or later is needed, this is {version}")
        policy = info.get("maxmemory_policy", "noeviction") if info.get("maxmemory") != "0" else "noeviction"
        if policy not in ("noeviction", self._policy):
            logger.warning("The store may forget what it has acknowledged: its maxmemory-policy is %s", policy)
        self._policy = policy

    def _fail(self, reason: str) -> None:
        failure = f"The store is away: {reason}"
        if self.failure is None:
            logger.warning(failure)
        self.failure = failure
        self._drop(failure)
        self._settled.set()

    def _drop(self, failure: str) -> None:
        done = [operation for _, group, _ in self._done for operation in group]
        for operation in (*done, *self._under_way, *self._queue):
            if operation.answer is not None and not operation.answer.done():
                operation.answer.set_exception(StoreUnavailable(failure))
        self._done.clear()
        self._under_way = []
        # Who leaves meanwhile does so with the next join at the latest.
        self._queue = deque(operation for operation in self._queue if operation.answer is None)

    def _reason(self, error: BaseException) -> str:
        """Return a short text without secrets."""
        if isinstance(error, TimeoutError | exceptions.TimeoutError):
            return f"no answer within {self._timeout:g} s"
        cause = error.__context__
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {cause.reason}"
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        # Where in the script that was stands behind it, or with its code before it, as in Redis before 7.
        text = re.sub(r"Error running script .*: -[A-Z]+ ", "", str(error))
        return text.partition(" script: ")[0].partition("\n")[0][:120]

    # --- join

    async def _join(self, connection: AbstractConnection) -> None:
        """Enter this process and its clients; where the log has lost records, first help to fill it again."""
        entered = reached = ""
        while True:
            seq = self._seq if self._opened else 0
            arguments: list[_Argument] = ["join", self._newest, *self._known, *self._report]
            epoch, members, position, *joined = await self._call(connection, self._epoch, seq, arguments)
            if self._epoch not in ("", epoch.decode()):
                # Nor is it known whether what was done before is in the log still.
                self._fail(LOST_DATA)
            self._epoch = epoch.decode()
            if entered != self._epoch:
                await self._enter_clients(connection, {member.decode() for member in members})
            if joined:
                break
            self._fail(LOST_DATA)
            if entered != self._epoch and self._opened:
                await self._offer(connection, position.decode())
            entered = self._epoch
            # While it is filled, each call does a part of it.
            await asyncio.sleep(0.1 if position.decode() == reached else 0)
            reached = position.decode()
        self._post_id, before = "0", position.decode()
        self._seq, newest, now, self._known[5] = joined
        if self._opened:
            self._check_missed(before)
            self._ready()
            self._answer()
            return
        self._opening_until, self._opening_now = newest, now
        self._newest = self._whole_since = before
        self._found = []
        if self._seq == newest:
            self._open()

    async def _enter_clients(self, connection: AbstractConnection, entered: set[str]) -> None:
        # Whoever was refused a moment ago undoes first what it did here.
        await asyncio.sleep(0)
        # From here on those who leave are in order behind those that are entered now.
        self._queue = deque(operation for operation in self._queue if operation.answer is not None)
        clients = {client.client_id: client for client in self._node.registrations()}
        gone = iter(entered - clients.keys())
        while chunk := list(islice(gone, CHUNK)):
            await self._enter(connection, [part for client_id in chunk for part in ("leave", client_id)])
        waiting, taken = iter(clients.values()), list[str]()
        while some := list(islice(waiting, CHUNK)):
            parts = [part for client in some for part in _flat_registration(*client)]
            _, refused = await self._enter(connection, ["register", len(some), *parts])
            taken += [client_id.decode() for client_id in refused]
        if taken:
            self._node.evicted(taken)

    async def _enter(self, connection: AbstractConnection, arguments: list[_Argument]) -> Any:
        if (replies := await self._call(connection, self._epoch, self._seq, arguments)) == b"join":
            raise _Rejoin
        return replies

    async def _offer(self, connection: AbstractConnection, newest: str) -> None:
        """Offer the records that the log has not."""
        before, records = self._node.kept()
        before = max(before, self._whole_since)
        lost = (record for record in records if record.id > max(before, newest))
        # First without records: those of others must reach back to where this process stands.
        await self._enter(connection, ["offer", before])
        while chunk := list(islice(lost, CHUNK)):
            arguments: list[_Argument] = ["offer", before]
            for record in chunk:
                # As an age, because it is the clock of Redis that forgets what is too old.
                age = round((time.time() - record.at) * 1e6)
                arguments += (record.id, age, *_flat(record), *self._keys.get(record.id, (b"", b"")))
            await self._enter(connection, arguments)

    def _open(self) -> None:
        self._opened = True
        age = (self._opening_now - self._known[5]) / 1e6
        self._node.opened(Opening(self._whole_since, self._found, self._known[5] / 1e6, age))
        self._found = []
        self._ready()

    def _ready(self) -> None:
        if self.failure is not None:
            logger.info("The store is back")
        self.failure = None
        self._settled.set()

    # --- operations

    async def _call(
        self, connection: AbstractConnection, epoch: str, seq: int, arguments: Collection[_Argument]
    ) -> Any:
        """Run the script once. Raises TimeoutError, or what redis-py raises."""
        settings = self._settings
        header: tuple[_Argument, ...] = (
            *(1, self._prefix + "meta", self._prefix, epoch, self.node_id, seq, secrets.randbits(31)),
            *(settings.max_connections, settings.max_connections_per_ip),
            *(settings.history_size, settings.history_bytes),
            *(round(seconds * 1e6) for seconds in (settings.history_ttl, LEASE_SECONDS, RESTORE_SECONDS)),
        )
        async with asyncio.timeout(self._timeout):
            await _send(connection, "EVALSHA", _SHA, *header, *arguments)
            try:
                return await connection.read_response()
            except exceptions.NoScriptError:
                await connection.send_command("EVAL", _SCRIPT, *header, *arguments)
                return await connection.read_response()

    async def _operate(self, connection: AbstractConnection) -> None:
        """Do what is asked, a group at a time."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                arguments: list[_Argument] = []
                while self._queue and len(arguments) < GROUP_ARGUMENTS:
                    self._under_way.append(operation := self._queue.popleft())
                    arguments += operation.arguments
                replies = await self._call(connection, self._epoch, self._seq, arguments)
                group, self._under_way = self._under_way, []
                if replies == b"join":
                    self._queue.extendleft(reversed(group))
                    self._refuse_unanswered()
                    raise _Rejoin
                seq, *replies = replies
                self._done.append((seq, group, replies))
                self._answer()

    def _answer(self) -> None:
        """Answer what was done at a place that this process has read up to: the log comes first."""
        while self._done and self._done[0][0] <= self._seq:
            _, group, replies = self._done.popleft()
            for operation, reply in zip(group, replies, strict=True):
                if operation.answer is not None and not operation.answer.done():
                    operation.answer.set_result(reply)

    def _refuse_unanswered(self) -> None:
        """Refuse what was done for a client and is not answered yet: the next join would undo it."""
        for operation in (operation for _, group, _ in self._done for operation in group):
            if operation.arguments[0] in ("admit", "subscribe") and operation.answer and not operation.answer.done():
                operation.answer.set_exception(StoreUnavailable("The store is away: this process was taken for dead"))

    async def _renew(self) -> None:
        while self._task is not None:
            # Not waited for: the answer comes after what is in the log before it, and that may be lost.
            self._put("renew", self._post_id).add_done_callback(self._renewed)
            await asyncio.sleep(RENEW_SECONDS)

    def _renewed(self, answer: asyncio.Future[Any]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            *self._known, before = answer.result()
            gone = before.decode()
            for id in list(takewhile(gone.__ge__, self._keys)):
                del self._keys[id]

    def _ask(self, *arguments: _Argument) -> asyncio.Future[Any]:
        if self.failure is not None or self._task is None:
            raise StoreUnavailable(self.failure or "The store is closed")
        return self._put(*arguments)

    def _put(self, *arguments: _Argument) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        self._enqueue(_Operation(arguments, answer))
        return answer

    def _enqueue(self, operation: _Operation) -> None:
        self._queue.append(operation)
        # Who leaves because the loop has gone away does so with the next join.
        if not self._loop.is_closed():
            self._wake.set()

    async def append(self, drafts: Sequence[Draft], once: Once | None = None, counter: int | None = None) -> Appended:
        key, fingerprint = ("", b"") if once is None else once
        arguments: list[_Argument] = ["append", len(drafts), "" if counter is None else counter, key, fingerprint]
        for draft in drafts:
            arguments += _flat(draft)
        reply = await self._ask(*arguments)
        if reply == b"reused":
            raise KeyReused("Idempotency-Key: already used for another request")
        receipts = [Receipt(reply[n].decode(), reply[n + 1]) for n in range(2, len(reply), 2)]
        return Appended(receipts, reply[0] / 1e6, bool(reply[1]))

    async def admit(self, client_id: str, topics: Collection[str], address: str) -> str:
        settings = self._settings
        try:
            reply = await self._ask("admit", *_flat_registration(client_id, topics, address))
        except asyncio.CancelledError:
            # It may be under way already.
            self.leave(client_id)
            raise
        if isinstance(reply, bytes):
            return reply.decode()
        if reply[0] == b"taken":
            raise ClientIdTaken(reply[1].decode())
        if reply[0] == b"address":
            raise address_is_full(reply[1], settings.max_connections_per_ip)
        raise ConnectionRefused(f"Connection limit exceeded: {reply[1]}/{settings.max_connections}")

    async def subscribe(self, client_id: str, topics: Collection[str]) -> str:
        newest: bytes = await self._ask("subscribe", client_id, _packed_topics(topics))
        return newest.decode()

    def leave(self, client_id: str) -> None:
        self._enqueue(_Operation(("leave", client_id), None))

    async def draw(self, bucket: str, rate: Rate) -> Draw:
        allowed, until_full = await self._ask("draw", bucket, rate.cost, rate.depth)
        return Draw(allowed == 1, until_full)

    async def lead(self) -> int | None:
        counter: int = await self._ask("lead")
        return None if counter < 0 else counter

    async def report(self, report: Report) -> None:
        self._report = report
        await self._ask("report", *report)

    async def census(self) -> Census:
        active, total, sent, messages, slow, *others = await self._ask("census")
        # What was stated once is no less after Redis has lost its data.
        self._known[:2] = total, sent
        return Census(active, total, sent, messages, slow, [node.decode() for node in others])

    async def post(self, node_id: str, message: bytes) -> None:
        await self._ask("post", node_id, message)

    # --- the log

    async def _follow(self, connection: AbstractConnection) -> None:
        """Read what is appended and posted, as it comes."""
        log, posts = self._prefix + "log", f"{self._prefix}posts:{self.node_id}"
        block, count = round(BLOCK_SECONDS * 1000), READ_RECORDS
        while True:
            async with asyncio.timeout(BLOCK_SECONDS + self._timeout):
                await _send(
                    *(connection, "XREAD", "COUNT", count, "BLOCK", block, "STREAMS", log, posts),
                    *(f"{self._seq}-0", self._post_id),
                )
                streams = await connection.read_response()
            for stream, entries in streams or ():
                if stream.decode() == log:
                    whole = entries[: _whole(entries)]
                    count = READ_RECORDS if whole else 2 * count
                    if whole:
                        await self._read(connection, whole)
                else:
                    self._post_id = entries[-1][0].decode()
                    for _, (_, sender, _, message) in entries:
                        self._node.receive_mail(sender.decode(), message)

    async def _read(self, connection: AbstractConnection, entries: list[_Entry]) -> None:
        if _number(entries[0]) != self._seq + 1:
            async with asyncio.timeout(self._timeout):
                await connection.send_command("HMGET", self._prefix + "meta", "epoch", "before")
                epoch, before = await connection.read_response()
            if epoch != self._epoch.encode():
                raise _Rejoin
            self._check_missed(before.decode())
        # Without await: what is delivered and where this process stands change together.
        records = []
        for entry in entries:
            if (record := _record(entry)).id > self._newest:
                records.append(record)
                if key := entry[1][ONCE]:
                    self._keys[record.id] = key, entry[1][ANSWER]
        self._seq = _number(entries[-1])
        if records:
            self._newest = records[-1].id
        if not self._opened:
            self._found += records
            if self._seq >= self._opening_until:
                self._open()
        elif records:
            self._node.deliver(records)
        self._answer()

    def _check_missed(self, before: str) -> None:
        """Say so if the log begins behind what this process has delivered."""
        if self._opened and before > self._newest:
            self._newest = self._whole_since = before
            self._node.missed()


async def _send(connection: AbstractConnection, *command: _Argument) -> None:
    """Send a command as hiredis packs it: in 2 us, where redis-py takes 16 for an append."""
    # Its stub speaks of a tuple of one.
    await connection.send_packed_command([hiredis.pack_command(command)])  # type: ignore[arg-type]


def _number(entry: _Entry) -> int:
    return int(entry[0][:-2])


def _whole(entries: list[_Entry]) -> int:
    """Return how many entries there are without those at the end whose key comes later."""
    return next((count for count in range(len(entries), 0, -1) if entries[count - 1][1][ANSWER] != b"+"), 0)


def _record(entry: _Entry) -> Record:
    _, id, _, at, _, rest, _, packed, _, replayed, *_ = entry[1]
    audience = Audience(*_unpack_audience(packed)) if packed else None
    return Record(id.decode(), rest, audience, replayed == b"1", int(at) / 1e6)


def _flat(draft: Draft | Record) -> tuple[_Argument, ...]:
    audience = b"" if draft.audience is None else msgspec.msgpack.encode(draft.audience)
    return draft.rest, _size(draft), audience, "1" if draft.replayed else ""


def _size(draft: Draft | Record) -> int:
    """Return what counts towards the bytes of the history."""
    return len(draft.rest) + sum(len(name) for names in draft.audience or () for name in names)


def _flat_registration(client_id: str, topics: Collection[str], address: str) -> tuple[_Argument, ...]:
    return client_id, _packed_topics(topics), address


def _packed_topics(topics: Collection[str]) -> bytes:
    return msgspec.msgpack.encode(list(topics)) if topics else b""
