"""The fan-out: each client is handed everything between its cursor and the end of the log, in one write.

Owns the log, the passes over the clients, the lists of pending entries, and the end of a client that falls too far
behind. Knows neither HTTP nor the messages of clients.

1. A client's place, its cursor and its pending entries, is in memory. Before `trim` removes the entry at its place, the
   client becomes a reader of the store (readers.py), or is closed where memory has the whole log; only a client that
   cannot be written to can be so far behind.
2. The inner body of the pass never blocks, never raises and never changes the set of clients.
3. A client's place moves together with the write: no await between the two.
4. A notification is framed once. Clients that are owed the same entries share one list of them, and so one batch.
   A shared list never changes; a client's own list only grows at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from clients import Client
from connection import OTHER_FORM
from log import Audience, Batch, Entry, Log, frame, payload, payloads
from readers import Readers
from schemas import POLICY_VIOLATION
from store import Record
from tally import Tally

if TYPE_CHECKING:
    from hub import Hub

logger = logging.getLogger("notifyd")

# The pass yields to the event loop after this many clients: at 3 to 10 us each it is held for 1 to 3 ms. A request
# that arrives meanwhile takes three iterations of the loop, and is answered within 10 ms.
SLICE_CLIENTS = 250
# A slice whose clients are owed the same writes at most about this much: the kernel copies a megabyte in 1 to 2 ms
# (bench/run.py --measure hold).
SLICE_BYTES = 1_048_576
# The longest that a pass waits to collect publishes into one write for each client: people notice more.
COLLECT_SECONDS = 0.05
# The log is trimmed as often as this, when nothing is published, for the sake of entries that are too old.
TRIM_SECONDS = 1.0
# Lists of pending entries are shared up to this length without limit: a copy takes about a microsecond.
SHARED_ENTRIES = 256
# The number of longer lists that a publish may make for clients to share. Beyond that each client gets its own.
SHARED_LISTS = 16

# Of the log in memory, the part beyond the bounds that may wait for more: removing costs a step for each entry that is
# left, so it is done for many at once.
TRIMMED_PART = 64
# The hand-overs that are noted before they are summed up: a fraction of a millisecond.
NOTES_KEPT = 1000
# The cursor of a reader: no turn of the log.
NO_CURSOR = -1

# In the log for its position alone.
NOBODY = Audience(frozenset(), frozenset())


class PendingLists:
    """The lists of pending entries that one publish makes.

    A longer list is made once for all clients that share both the old list and the new entries. But where clients
    share little, or are far behind, a publish would make many long copies: such a client gets a list of its own, and
    a publish only adds to that.
    """

    __slots__ = ("_longer",)

    def __init__(self) -> None:
        # Old list, new entries and both together, by the identities of the first two. These are kept beside the
        # result, so that no other list takes their id().
        self._longer: dict[tuple[int, int], tuple[list[int], list[int], list[int]]] = {}

    def owe(self, client: Client, sequences: list[int]) -> None:
        """Owe the client these entries too. All are newer than its pending entries."""
        client.told = sequences[-1]
        if client.pending is None:
            client.pending, client.owns_pending = sequences, False
        elif client.owns_pending:
            client.pending += sequences
        elif len(client.pending) + len(sequences) <= SHARED_ENTRIES or self._may_share(client, sequences):
            key = id(client.pending), id(sequences)
            if (known := self._longer.get(key)) is None:
                known = self._longer[key] = client.pending, sequences, [*client.pending, *sequences]
            client.pending = known[2]
        else:
            client.pending, client.owns_pending = [*client.pending, *sequences], True

    def _may_share(self, client: Client, sequences: list[int]) -> bool:
        is_known = (id(client.pending), id(sequences)) in self._longer
        return client.connection.writable and (is_known or len(self._longer) < SHARED_LISTS)


class FanOut:
    """The log, and the passes that bring every client to its end."""

    def __init__(self, hub: Hub) -> None:
        settings = hub.settings
        memory = math.inf if hub.store.log is None else settings.cache_bytes
        self.log = Log(settings.history_size, settings.history_bytes, settings.history_ttl, memory)
        self.tally = Tally(self.log, is_stored=hub.store.log is not None)
        self.messages_sent = 0
        self.slow_consumers = 0
        self._hub = hub
        self._clients = hub.clients
        self._clock = hub.clock
        self._counts = hub.counts
        self.restart()

    def restart(self) -> None:
        """Belong to the event loop that is running now."""
        # The clients with pending entries, to be read by all; and those that the last full pass left behind the end of
        # the log.
        self.owed: set[Client] = set()
        self._behind: list[Client] = []
        self._published = asyncio.Event()
        # Whether a broadcast has been appended since the last full pass began.
        self._for_everyone = False
        # When the oldest notification was appended that no pass has taken yet.
        self._oldest_at: float | None = None
        # Held while clients are handed frames in portions: by a pass, or by the drain.
        self.passing = asyncio.Lock()
        # The sequences up to which the last pass and the pass before it have gone. A client that is neither owed
        # entries nor left behind has been handed everything before `_passed`. The log is trimmed up to
        # `_passed_before` at most, so a client that cannot be written to for a moment has a whole pass to catch up.
        self._passed = self._passed_before = self.log.first_sequence
        # The sequence from which on each admission and subscription under way keeps the log in memory: the client may
        # be owed all of that, and has no place yet that would keep it.
        self.admitting: dict[object, int] = {}
        self.readers = Readers(self._hub, self)

    def begin(self, before: str, records: Sequence[Record]) -> None:
        """Fill the log with the store's records; `before` is the position before the first."""
        self.log.begin(before)
        now = time.time()
        for record in records:
            self._put(record, self._clock() - max(0.0, now - record.at))
        self._passed = self._passed_before = self.log.next_sequence

    def begin_anew(self, before: str) -> None:
        """Forget the whole log; it begins after the position `before`."""
        self.tally.before_trim(self.log.next_sequence)
        self.log.trim(self.log.next_sequence)
        self.log.begin(before)

    def append(self, records: Sequence[Record]) -> None:
        """Append the next records of the log, and have them handed out."""
        # Without await: the entries, the lists that owe them and the wake-up of the pass change together. A pass, and
        # an admission, sees all of that or nothing.
        now = self._clock()
        targeted: dict[Audience, list[int]] = {}
        for record in records:
            sequence = self._put(record, now)
            if record.audience is None:
                self._for_everyone = True
            else:
                targeted.setdefault(record.audience, []).append(sequence)
        if targeted:
            lists = PendingLists()
            for client, sequences in self._addressees(targeted):
                if client.reading is not None:
                    client.reading.count += len(sequences)
                    continue
                lists.owe(client, sequences)
                self.owed.add(client)
        if self._oldest_at is None:
            self._oldest_at = now
        self._published.set()

    def _addressees(self, targeted: dict[Audience, list[int]]) -> Iterator[tuple[Client, list[int]]]:
        """Yield each addressee of these audiences with its sequences: one list for all that are owed the same.

        A client is visited once for each different audience that it is in, not once for each notification.
        """
        if len(targeted) == 1:
            [(audience, sequences)] = targeted.items()
            for client in self._clients.addressed(audience):
                yield client, sequences
            return
        if not any(audience.clients or audience.users for audience in targeted):
            yield from self._followers(targeted)
            return
        audiences_of: dict[Client, list[Audience]] = {}
        for audience in targeted:
            for client in self._clients.addressed(audience):
                audiences_of.setdefault(client, []).append(audience)
        merged: dict[tuple[Audience, ...], list[int]] = {}
        for client, audiences in audiences_of.items():
            key = tuple(audiences)
            if key not in merged:
                merged[key] = sorted(sequence for audience in audiences for sequence in targeted[audience])
            yield client, merged[key]

    def _followers(self, targeted: dict[Audience, list[int]]) -> Iterator[tuple[Client, list[int]]]:
        """Yield the same for audiences of topics alone: clients that follow the same topics are looked up once."""
        for_topic: dict[str, set[int]] = {}
        for audience, sequences in targeted.items():
            for topic in audience.topics:
                for_topic.setdefault(topic, set()).update(sequences)
        groups = [group for topic in for_topic if (group := self._clients.by_topic.get(topic)) is not None]
        # Many that overlap are more work than everybody.
        overlap = sum(map(len, groups)) > len(self._clients)
        merged: dict[frozenset[str], list[int]] = {}
        for client in self._clients if overlap else set().union(*groups):
            if client.topics not in merged:
                owed = set[int]().union(*(for_topic[topic] for topic in client.topics & for_topic.keys()))
                merged[client.topics] = sorted(owed)
            if sequences := merged[client.topics]:
                yield client, sequences

    def _put(self, record: Record, at: float) -> int:
        data = frame(payload(record.id, record.rest))
        replayed, audience, addressed = record.replayed, record.audience, record.addressed
        return self.log.append(record.id, data, at, replayed=replayed, audience=audience, addressed=addressed)

    def records(self, since: str) -> Iterator[Record]:
        """Return the records in memory after an id, the newest first; each is made when it is asked for."""
        epoch = time.time() - self._clock()
        entries = list(self.log.since(self.log.sequence_after(since)))
        return (
            Record(
                entry.id,
                next(payloads(entry.frame)).removeprefix(payload(entry.id, b"")),
                entry.audience,
                entry.replayed,
                epoch + entry.at,
                entry.addressed,
            )
            for entry in reversed(entries)
        )

    def owe(self, client: Client, entries: list[Entry]) -> None:
        """Owe a client these entries beside its cursor."""
        sequences = [entry.sequence for entry in entries]
        if client.pending is not None:
            # These may be older than pending entries.
            client.pending, client.owns_pending = sorted(client.pending + sequences), True
            client.told = max(client.told, client.pending[-1])
        elif sequences:
            PendingLists().owe(client, sequences)
            self.owed.add(client)

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Trim nothing meanwhile: a client that the store takes now may be owed it."""
        key = object()
        self.admitting[key] = self.log.first_sequence
        try:
            yield
        finally:
            self.admitting.pop(key, None)

    def forget(self, client: Client) -> None:
        """Owe a client that leaves nothing more. A pass that is under way may still hold it."""
        client.pending = None
        self.owed.discard(client)
        self.readers.forget(client)

    def unplace(self, client: Client) -> None:
        """Let go of the place of a client that reads."""
        client.cursor, client.pending = NO_CURSOR, None
        self.owed.discard(client)

    def place(self, client: Client, cursor: int, listed_until: int, pending: list[int]) -> None:
        """Put a client that has read up to here at a cursor, owe it these entries as well, and hand them over."""
        client.cursor, client.listed_until = cursor, listed_until
        if pending:
            # The client may know a newer position, of the resume before a replay.
            told = client.told
            PendingLists().owe(client, pending)
            client.told = max(told, client.told)
            self.owed.add(client)
        if not self.advance(client):
            self._behind.append(client)

    # --- the pass

    async def run(self) -> None:
        """Run passes for ever: at once after a lone publish, and one pass for many publishes in a burst.

        When publishes arrived during a pass, the next pass waits about as long as the last one took, so that a burst
        costs a client one write, and not one for each notification.
        """
        while True:
            await self._published.wait()
            self._published.clear()
            started_at = self._clock()
            async with self.passing:
                await self._pass()
            if self._published.is_set():
                await asyncio.sleep(min(self._clock() - started_at, COLLECT_SECONDS))

    async def _pass(self) -> None:
        """Bring the clients to the end of the log, slice by slice, then trim it.

        A pass is full unless everything since the last one is targeted: then it visits only clients that are owed
        entries.
        """
        # No await up to the first slice: every client that is owed something before `reached` is among the clients.
        started_at, reached = self._clock(), self.log.next_sequence
        oldest_at, self._oldest_at = self._oldest_at, None
        full, self._for_everyone = self._for_everyone, False
        clients = list(self._clients.by_id.values() if full else self.owed)
        if self.readers.clients:
            clients = [client for client in clients if client.reading is None]
        behind: list[Client] = []
        start = 0
        try:
            while start < len(clients):
                # A slice holds clients that are mostly at the place of its first: their batch decides its size.
                batch = self.log.batch(clients[start].cursor, clients[start].pending)
                fits = SLICE_BYTES // len(batch.frames) if batch else SLICE_CLIENTS
                end = start + max(1, min(SLICE_CLIENTS, fits))
                behind += self._hand_over(clients[start:end], batch)
                start = end
                if start < len(clients):
                    await asyncio.sleep(0)
        except BaseException:
            # The next pass reaches the clients that this one did not.
            self._for_everyone |= full
            self._published.set()
            raise
        if full:
            self._behind = behind
        if clients and oldest_at is not None:
            now = self._clock()
            self._counts.passes.uncounted.append(now - started_at)
            self._counts.delivery.uncounted.append(now - oldest_at)
        self._passed_before, self._passed = self._passed, reached
        self.trim()

    def _hand_over(self, clients: list[Client], batch: Batch | None) -> list[Client]:
        """Hand a slice of clients their frames, of the first `batch`, and return the clients that are still behind.

        The inner body of the pass. Nearly all clients stand at one place, are brought to the end by one batch and
        have a plain socket: those cost this loop and the system call. The loop writes past the transport, because
        among 10,000 clients the memory that a transport touches costs 0.4 us a delivery, a tenth of the system call
        (bench/run.py --measure fanout). The transport takes the rest that the kernel does not.
        """
        cursor, pending = clients[0].cursor, clients[0].pending
        if batch is None or batch.cursor != self.log.next_turn or batch.pending is not None:
            return [client for client in clients if not self.advance(client)]
        behind = []
        others = 0
        frames, notifications, end, _ = batch
        write, other = os.write, b""
        for client in clients:
            descriptor = client.descriptor
            if client.cursor == cursor and client.pending is pending and descriptor != -1:
                client.cursor = end
                client.pending = None
                if descriptor >= 0:
                    form = frames
                else:
                    descriptor = OTHER_FORM - descriptor
                    form = other = other or client.connection.form(frames)
                try:
                    sent = write(descriptor, form)
                except OSError:
                    sent = 0
                if sent != len(form):
                    client.connection.write_formed(form[sent:])
            else:
                others += 1
                if not self.advance(client):
                    behind.append(client)
        self.messages_sent += notifications * (len(clients) - others)
        self.tally.notes.append(((cursor, pending), (end, None), len(clients) - others))
        self._counts.bytes_sent += len(frames) * (len(clients) - others)
        if pending is not None:
            self.owed.difference_update(clients)
            # A client that has left since the pass began does not come back: forget() took its pending entries.
            self.owed.update(client for client in behind if client.pending is not None)
        return behind

    def advance(self, client: Client) -> bool:
        """Hand a client its frames as long as it can be written to, and return whether it is at the end of the log.

        Also called when a client's transport has drained.
        """
        if client.reading is not None:
            self.readers.go_on(client)
            return False
        connection, was_owed = client.connection, client.pending is not None
        while connection.writable and (batch := self.log.batch(client.cursor, client.pending)) is not None:
            if client.pending is None:
                turns = client.cursor, batch.cursor
                self.tally.moves[turns] = self.tally.moves.get(turns, 0) + 1
            else:
                self.tally.notes.append(((client.cursor, client.pending), (batch.cursor, batch.pending), 1))
            client.cursor, client.pending = batch.cursor, batch.pending
            self.messages_sent += batch.notifications
            self._counts.bytes_sent += len(batch.frames)
            connection.write(batch.frames)
        if was_owed and client.pending is None:
            self.owed.discard(client)
        return client.cursor == self.log.next_turn and client.pending is None

    def untold(self, client: Client) -> str | None:
        """Return the log's position, if the log has gone on to it without anything for the client; count it as told."""
        log, newest = self.log, self.log.next_sequence - 1
        if client.cursor != log.next_turn or client.pending is not None:
            return None
        if max(client.told, log.newest_broadcast) >= newest:
            return None
        client.told = newest
        return log.position

    def backlogs(self) -> tuple[int, int]:
        """Return how many clients have a backlog, and the notifications of the largest."""
        end, behind, largest = self.log.next_turn, 0, 0
        for client in self._clients:
            if client.reading is None:
                backlog = end - client.cursor + len(client.pending or ())
            else:
                backlog = self.readers.backlog(client)
            if backlog > 0:
                behind, largest = behind + 1, max(largest, backlog)
        return behind, largest

    # --- the slow consumer

    def trim(self) -> None:
        """Trim the log in memory to its bounds, after the clients whose place would be removed have given that up.

        Only a client that the last full pass left behind, or that is owed entries, can have a place before
        `_passed_before`.
        """
        # Without await: no client comes, and none moves, between the check of its place and the removal.
        log = self.log
        until = log.expired(self._clock(), min([self._passed_before, *self.admitting.values()]))
        removable = until - log.first_sequence
        if len(self.tally.notes) + len(self.tally.moves) > NOTES_KEPT:
            self.tally.sum_up()
        if not removable or removable <= len(log) // TRIMMED_PART:
            return
        for client in {*self._behind, *self.owed}:
            is_placed = client in self._clients and client.reading is None
            if is_placed and (start := log.backlog_start(client.cursor, client.pending)) < until:
                if self._hub.store.log is not None:
                    self.readers.fall(client)
                else:
                    backlog = log.next_turn - client.cursor + len(client.pending or ())
                    self.close_slow_consumer(client, backlog, log.position_before(start))
        self.readers.before_trim(until)
        self.tally.before_trim(until)
        log.trim(until)

    def close_slow_consumer(self, client: Client, backlog: int, position: str) -> None:
        self.slow_consumers += 1
        logger.warning("Client %s is %d notifications behind and is closed", client.client_id, backlog)
        reason = f"Slow consumer: {backlog} notifications behind; resume with since={position}"
        self._hub.admission.dismiss(client, POLICY_VIOLATION, reason)

    async def trim_regularly(self) -> None:
        """Trim the log for ever, so that old entries go also when nothing is published."""
        while True:
            await asyncio.sleep(min(TRIM_SECONDS, self.log.max_age))
            async with self.passing:
                self._passed_before = self._passed
                self.trim()
                self.readers.close_late()
