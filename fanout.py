"""The fan-out: every client gets what lies between its cursor and the head of the log, in one write.

Owns the log, the passes over the clients, and who falls off the log. Knows neither HTTP nor messages of clients.

1. Every client's cursor, and what it is owed beside, lies between the log's front and its head. `trim` keeps that
   true: who would fall off is closed first, and only a client that cannot be written to is behind by then.
2. A notification is framed once. A client that cannot be written to costs its cursor, an integer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from clients import Client, Joined
from log import Audience, Log, Positions, frame, payloads
from schemas import POLICY_VIOLATION
from store import Record

if TYPE_CHECKING:
    from hub import Hub

logger = logging.getLogger("notifyd")

# The pass yields to the event loop after this many clients: at 3 to 10 us each it is held for 1 to 3 ms. A request
# that arrives meanwhile takes three turns of the loop, and is answered within 10 ms.
SLICE_CLIENTS = 250
# Nor is a slice, where its clients are owed the same, more than about this much to write: the kernel copies a megabyte
# in 1 to 2 ms (bench/run.py --measure hold).
SLICE_BYTES = 1_048_576
# The longest that a pass waits to collect publishes into one write for each client.
COLLECT_SECONDS = 0.05

NOBODY = Audience(frozenset(), frozenset())


def payload(id: str, rest: bytes) -> bytes:
    """Return a notification as it is sent; `rest` is its JSON behind the id."""
    return b'{"id":"%s"%s' % (id.encode(), rest)


class FanOut:
    """The log, and the passes that move every client's cursor to its head."""

    def __init__(self, hub: Hub) -> None:
        settings = hub.settings
        self.log = Log(settings.history_size, settings.history_bytes, settings.history_ttl)
        self.messages_sent = 0
        self.slow_consumers = 0
        self._hub = hub
        self._clients = hub.clients
        self._clock = hub.clock
        self.restart()

    def restart(self) -> None:
        """Belong to the event loop that is running now."""
        # The clients with something pending, and those that were not at the head after the last full pass.
        self._owed: set[Client] = set()
        self._behind: list[Client] = []
        self._published = asyncio.Event()
        self._for_everyone = False
        # Held by whoever hands clients what they are owed in portions: a pass, or the drain.
        self.passing = asyncio.Lock()
        # The sequence up to which the pass before the last one has gone: nothing newer is trimmed.
        self._settled = self._passed = self.log.first_sequence
        # Admissions that are under way: what is newer than their sequences is not trimmed.
        self.held: dict[object, int] = {}

    def begin(self, before: str, records: Sequence[Record]) -> None:
        """Take the log as it is found; `before` is the id before its first record."""
        self.log.begin(before)
        now = time.time()
        for record in records:
            self._put(record, self._clock() - max(0.0, now - record.at))
        self._settled = self._passed = self.log.next_sequence

    def begin_anew(self) -> None:
        """Forget the whole log. Its position is from now on an id that was never given to anything."""
        self.log.trim(self.log.next_sequence)
        self.log.begin(Positions(self.log.position).next())

    def append(self, records: Sequence[Record]) -> None:
        """Append what comes next in the log, and have it handed out."""
        now = self._clock()
        targeted: list[tuple[int, Audience]] = []
        for record in records:
            sequence = self._put(record, now)
            if record.audience is None:
                self._for_everyone = True
            else:
                targeted.append((sequence, record.audience))
        if targeted:
            joined: Joined = {}
            for client, sequences in self._clients.owed(targeted):
                client.owe(sequences, joined)
                self._owed.add(client)
        self._published.set()

    def _put(self, record: Record, at: float) -> int:
        data = frame(payload(record.id, record.rest))
        return self.log.append(record.id, data, at, replayed=record.replayed, audience=record.audience)

    def records(self) -> Iterator[Record]:
        """Return what the log holds now, as records that are made one by one."""
        began = time.time() - self._clock()
        return (
            Record(
                entry.id,
                next(payloads(entry.frame)).removeprefix(payload(entry.id, b"")),
                entry.audience,
                entry.replayed,
                began + entry.at,
            )
            for entry in list(self.log.since(self.log.first_sequence))
        )

    def owe(self, client: Client, sequences: list[int]) -> None:
        """Owe one client these entries beside the broadcasts from its cursor on."""
        if sequences:
            client.owe(sequences, {})
            self._owed.add(client)

    def forget(self, client: Client) -> None:
        """Owe the client nothing. A pass that is under way may still hold it."""
        client.pending = None
        self._owed.discard(client)

    async def run(self) -> None:
        """Run passes for ever: one at once for a lone notification, one for many in a burst.

        When publishes arrived during a pass, the next one waits about as long as that took, so that a burst
        costs a client one write and not one for each notification.
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
        """Hand every client what lies between its cursor and the head, in slices, then trim the log.

        When everything published since the last pass is for some clients only, the pass visits only those.
        """
        reached = self.log.next_sequence
        full, self._for_everyone = self._for_everyone, False
        clients = list(self._clients if full else self._owed)
        behind: list[Client] = []
        start = 0
        try:
            while start < len(clients):
                end = start + self._slice_from(clients[start])
                behind += self._hand_over(clients[start:end])
                start = end
                await asyncio.sleep(0)
        except BaseException:
            # Whoever was not reached is reached by the next pass.
            self._for_everyone |= full
            self._published.set()
            raise
        if full:
            self._behind = behind
        self._settled, self._passed = self._passed, reached
        self.trim()

    def _slice_from(self, client: Client) -> int:
        """Return how many clients are a slice, where each is owed what this one is."""
        batch = self.log.batch(client.cursor, client.pending)
        return max(1, min(SLICE_CLIENTS, SLICE_BYTES // len(batch.frames))) if batch else SLICE_CLIENTS

    def _hand_over(self, clients: list[Client]) -> list[Client]:
        """Hand a slice of clients what they are owed, and return those that are still behind.

        The inner body of the pass: it never blocks, never raises and never changes the map. Nearly all clients stand
        at one place, are caught up by one batch and have a plain socket: they cost this loop and the system call.
        Past the transport, because among 10,000 clients what that touches in memory costs 0.4 us a delivery, a tenth
        of the system call (bench/run.py --measure fanout). What the kernel does not take is the transport's.
        """
        at, owed = clients[0].cursor, clients[0].pending
        batch = self.log.batch(at, owed)
        if batch is None or batch.cursor != self.log.next_turn or batch.pending is not None:
            return [client for client in clients if not self.advance(client)]
        behind = []
        others = 0
        frames, notifications, end, _ = batch
        size, write = len(frames), os.write
        for client in clients:
            if client.cursor == at and client.pending is owed and client.descriptor >= 0:
                client.cursor = end
                client.pending = None
                try:
                    sent = write(client.descriptor, frames)
                except OSError:
                    sent = 0
                if sent != size:
                    client.connection.write(frames[sent:])
            else:
                others += 1
                if not self.advance(client):
                    behind.append(client)
        self.messages_sent += notifications * (len(clients) - others)
        if owed is not None:
            self._owed.difference_update(clients)
            # Not who has left since the pass began: `forget` has let go of what they were owed.
            self._owed.update(client for client in behind if client.pending is not None)
        return behind

    def advance(self, client: Client) -> bool:
        """Hand one client what it is owed, while it can be written to, and return whether it has everything.

        Also called when a client's transport has drained. Never blocks, never raises, never changes the map.
        """
        connection = client.connection
        while connection.writable and (batch := self.log.batch(client.cursor, client.pending)) is not None:
            client.cursor, client.pending = batch.cursor, batch.pending
            self.messages_sent += batch.notifications
            connection.write(batch.frames)
        if client.pending is None:
            self._owed.discard(client)
        return client.cursor == self.log.next_turn and client.pending is None

    def trim(self) -> None:
        """Forget what the bounds say, after closing the clients that would fall off.

        Only who was behind after the last full pass, or is owed something beside, can be that far behind: nothing
        newer than the pass before is trimmed.
        """
        until = self.log.expired(self._clock(), min([self._settled, *self.held.values()]))
        if until == self.log.first_sequence:
            return
        for client in {*self._behind, *self._owed}:
            if client in self._clients:
                owed = self.log.backlog_start(client.cursor, client.pending)
                if owed < until:
                    self._close_slow_consumer(client, owed)
        self.log.trim(until)

    def _close_slow_consumer(self, client: Client, owed: int) -> None:
        """Close a client that would fall off the log; `owed` is the sequence that it is owed next."""
        behind = self.log.next_turn - client.cursor + len(client.pending or ())
        self.slow_consumers += 1
        logger.warning("Client %s is %d notifications behind and is closed", client.client_id, behind)
        position = self.log.position_before(owed)
        reason = f"Slow consumer: {behind} notifications behind; resume with since={position}"
        self._hub.admission.dismiss(client, POLICY_VIOLATION, reason)

    async def keep_short(self) -> None:
        """Let what is too old go also when nothing is published."""
        while True:
            await asyncio.sleep(min(1.0, self.log.max_age))
            async with self.passing:
                self._settled = self._passed
                self.trim()

    def clients_behind(self) -> int:
        head = self.log.next_turn
        return sum(client.cursor != head or client.pending is not None for client in self._clients)
