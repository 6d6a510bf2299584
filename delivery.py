"""Deliveries: who got a notification, as the publisher may ask.

Reads the answer off the log and the cursors of all processes; nothing is written down for each delivery. The tally
(tally.py) counts the hand-overs as they are made. Knows no HTTP.

1. A client is behind a notification that it is to be handed, until its place has moved past it; from then on it counts
   as written to. Both figures of a process are of one moment.
2. Nothing holds the event loop in proportion to the number of clients: they are looked through in slices.
3. A waiting publisher costs a look at one client from time to time: the clients that are behind only get fewer.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Struct

import schemas
from bookmarks import Bookmark, Owner
from clients import Client
from errors import NotFound, StoreUnavailable
from fanout import NOBODY
from guard_identity import Identity
from log import Entry, payloads
from presence import Part, first_of, page_of
from readers import entry_of
from schemas import MAX_SHOWN, Delivery, DeliveryState
from slices import in_slices

if TYPE_CHECKING:
    from hub import Hub

# A waiting publisher looks again after a pause that grows from the first to the last of these.
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.001, 0.25
# Another process tells at least so often whether its clients are still behind.
ANSWER_SECONDS = 1.0
# Counts that the store is told of in one step, a millisecond or two, and the pause behind it where publishes wait.
COUNTED_AT_ONCE, COUNT_PAUSE_SECONDS = 250, 0.002
# Readers wait while more counts than these are in memory: a reader of a topic adds one for each notification.
UNTOLD_COUNTS = 2000
# Publishers that wait at the same time.
MAX_WAITING = 1000


class Standing(Struct):
    """The figures of one process about a notification."""

    pending: int
    # Those that the store does not have.
    addressed: int = 0
    written: int = 0
    acknowledged: int = 0


class Sought(NamedTuple):
    """A notification that is asked for, and its turn in the log of this process; None where it has none."""

    entry: Entry
    turn: int | None


class Deliveries:
    """The deliveries of a Hub's notifications."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._stored = hub.store.log
        self._tally = hub.fanout.tally
        self._waiting = 0
        # Held while counts are handed in.
        self._handing_in = asyncio.Lock()

    # --- of all processes

    async def notification(self, id: str, reader: Identity | None = None) -> tuple[bytes, Delivery]:
        """Return a notification as it was sent, and its delivery.

        Raises NotFound, Forbidden where the reader might not publish it, or StoreUnavailable.
        """
        await self._hub.start()
        entry = await self._entry(id.lower(), reader)
        return next(payloads(entry.frame)), await self._delivery(entry)

    async def _delivery(self, entry: Entry) -> Delivery:
        standings = await self._everywhere({"ask": "delivery", "id": entry.id, "seconds": 0}, Standing)
        addressed = sum(one.addressed for one in standings)
        written = sum(one.written for one in standings)
        if self._stored is not None:
            # All processes have handed in their counts by now.
            if (counted := await self._stored.find(entry.id)) is None:
                raise _unknown(entry.id)
            addressed, written = counted.addressed, counted.written
        return Delivery(
            addressed=None if entry.addressed is None else entry.addressed + addressed,
            written=written,
            acknowledged=sum(one.acknowledged for one in standings) + await self._bookmarked(entry),
            pending=sum(one.pending for one in standings),
        )

    async def settled(self, id: str, seconds: float) -> Delivery | None:
        """Return the delivery of a notification once no client is behind it, or the time is over.

        Also when the drain begins. None where that cannot be known, or too many publishers wait already.
        """
        if self._waiting >= MAX_WAITING:
            return None
        self._waiting += 1
        try:
            deadline = self._hub.clock() + seconds
            while (left := deadline - self._hub.clock()) > 0 and self._hub.is_ready:
                question = {"ask": "delivery", "id": id, "seconds": min(left, ANSWER_SECONDS)}
                if not any(one.pending for one in await self._everywhere(question, Standing)):
                    break
                # A process that drains answers at once.
                await asyncio.sleep(min(max(0.0, deadline - self._hub.clock()), LAST_PAUSE_SECONDS))
            return await self._delivery(await self._entry(id))
        except (NotFound, StoreUnavailable):
            # The notification is published, whatever comes afterwards.
            return None
        finally:
            self._waiting -= 1

    async def clients(
        self, id: str, state: DeliveryState, after: str, limit: int, reader: Identity | None = None
    ) -> tuple[list[schemas.DeliveryClient], str | None]:
        """Return the first clients behind a name in this state, and the name to go on from.

        Raises NotFound, Forbidden or StoreUnavailable, as notification() does.
        """
        await self._hub.start()
        entry = await self._entry(id.lower(), reader)
        question = {"ask": "delivered", "id": entry.id, "state": state, "after": after, "limit": limit}
        parts, found = await self._everywhere(question, Part), dict[str, Any]()
        if state != "pending":
            parts.append(await self._bookmarks_behind(entry, after, limit))
        names, goes_on = page_of(parts, found, limit)
        return [schemas.check(found[name], schemas.DeliveryClient) async for _, name in in_slices(names)], goes_on

    async def _bookmarked(self, entry: Entry) -> int:
        """Return the number of bookmarks that acknowledge a notification."""
        return len([bookmark async for bookmark in self._bookmarks(entry, None)])

    async def _bookmarks_behind(self, entry: Entry, after: str, limit: int) -> Part:
        """Return the clients that have acknowledged a notification, behind a name: they have it, wherever they are."""
        part = Part({})
        client_id, _, user = after.partition(" ")
        async for bookmark in self._bookmarks(entry, Owner(client_id, user) if after else None):
            if len(part.found) == limit:
                part.more = True
                break
            part.found[_name_of(bookmark.owner)] = _shown(bookmark.owner)
        return part

    async def _bookmarks(self, entry: Entry, after: Owner | None) -> AsyncIterator[Bookmark]:
        """Yield the bookmarks behind an owner that acknowledge a notification. All processes have written theirs."""
        while True:
            page, after = await self._hub.store.bookmarks.page(after, entry.id)
            for bookmark in page:
                if bookmark.covers(entry.id, entry.audience):
                    yield bookmark
            if after is None:
                return
            await asyncio.sleep(0)

    async def _everywhere(self, question: dict[str, Any], kind: Any) -> list[Any]:
        """Return the answers of all processes. Raises StoreUnavailable."""
        here, there = await asyncio.gather(self.answer(question), self._hub.questions.ask_everyone(question))
        return [here, *(schemas.check(answer, kind) for answer in there)]

    async def _entry(self, id: str, reader: Identity | None = None) -> Entry:
        """Return a notification of the log. Raises NotFound, or Forbidden where the reader might not publish it."""
        entry = self.in_memory(id)
        if entry is None and self._stored is not None and (counted := await self._stored.find(id)) is not None:
            entry = entry_of(counted.record)
        if entry is None:
            raise _unknown(id)
        if reader is not None:
            reader.check_reader(entry.audience)
        return entry

    def in_memory(self, id: str) -> Entry | None:
        """Return a notification of the log in memory, within its bounds."""
        log = self._hub.fanout.log
        after = log.find(id)
        front, _ = log.reach(None, self._hub.clock())
        return log.entry(after - 1) if after is not None and after > front else None

    # --- of this process

    async def answer(self, question: dict[str, Any]) -> Any:
        """Return this process's answer to a question about a notification."""
        self._hub.acks.write_down()
        if self._stored is not None:
            # By then this process has read the log up to now, and its bookmarks are in the store.
            await self._hub.census.report()
        try:
            sought = self.sought(await self._entry(question["id"]))
        except NotFound:
            # The log has let go of it meanwhile: whoever asks will see that, too.
            return Standing(pending=0) if question["ask"] == "delivery" else Part({})
        match question:
            case {"ask": "delivery", "seconds": seconds}:
                return await self._standing(sought, seconds)
            case {"ask": "delivered", "state": state, "after": after, "limit": limit}:
                return await self._clients_here(sought, state, after, limit)
        raise AssertionError(f"an unknown question: {question}")

    def sought(self, entry: Entry) -> Sought:
        """Return a notification to ask clients about."""
        return Sought(entry, None if entry.sequence < 0 else self._hub.fanout.log.turn(entry))

    async def keep_up(self) -> None:
        """Return once few counts are in memory that the store could take."""
        if self._tally.untold > UNTOLD_COUNTS and self._hub.store.failure is None:
            with contextlib.suppress(StoreUnavailable):
                await self.hand_in()

    async def hand_in(self) -> None:
        """Hand the counts of this process to the store, if that has the log. Raises StoreUnavailable."""
        if self._stored is None:
            return
        # Without await: these are the counts of this moment.
        parts = self._tally.take().parts(COUNTED_AT_ONCE)
        try:
            async with self._handing_in:
                while self._hub.store.failure is None and (part := next(parts, None)) is not None:
                    await self._hub.store.count(part)
                    if max(map(len, part)) >= COUNTED_AT_ONCE:
                        is_waited_for = self._hub.store.durations.under_way["append"]
                        await asyncio.sleep(COUNT_PAUSE_SECONDS if is_waited_for else 0)
            if self._hub.store.failure is not None:
                raise StoreUnavailable(self._hub.store.failure)
        finally:
            for part in parts:
                self._tally.put_back(part)

    async def _standing(self, sought: Sought, seconds: float) -> Standing:
        """Return the figures, once no client is behind the notification or so much time is over."""
        behind = await self._behind(sought)
        deadline, pause = self._hub.clock() + seconds, FIRST_PAUSE_SECONDS
        while behind and self._hub.clock() < deadline and self._hub.is_ready:
            if self.is_behind(behind[-1], sought):
                await asyncio.sleep(min(pause, max(0.0, deadline - self._hub.clock())))
                pause = min(2 * pause, LAST_PAUSE_SECONDS)
            else:
                behind.pop()
        # Without await: a client is in one of the two figures.
        standing = Standing(pending=self._count(behind, sought))
        if self._stored is None:
            standing.addressed, standing.written = (
                self._tally.addressed(sought.entry),
                self._tally.written(sought.entry),
            )
        else:
            await self.hand_in()
        standing.acknowledged = len([one async for one in self._unnamed(sought.entry)])
        return standing

    async def _unnamed(self, entry: Entry) -> AsyncIterator[Client]:
        """Yield the clients that have acknowledged a notification, and whose bookmarks are not written down."""
        acks = self._hub.acks
        async for _, client in in_slices(acks.unnamed()):
            bookmark = acks.bookmark(client)
            if bookmark is not None and bookmark.covers(entry.id, entry.audience):
                yield client

    def _count(self, clients: list[Client], sought: Sought) -> int:
        """Return how many clients are behind a notification, as is_behind() says: in a few ms for 15,000."""
        entry, turn = sought
        by_id, count = self._hub.clients.by_id, 0
        # Clients share their lists of pending entries.
        lists = dict[int, bool]()
        for client in clients:
            if client.reading is not None:
                count += self.is_behind(client, sought)
            elif by_id.get(client.client_id) is not client:
                continue
            elif turn is not None and client.cursor <= turn:
                count += 1
            elif (pending := client.pending) is not None:
                if (has_it := lists.get(id(pending))) is None:
                    has_it = lists[id(pending)] = _has_sequence(pending, entry.sequence)
                count += has_it
        return count

    async def _behind(self, sought: Sought) -> list[Client]:
        """Return the clients that are behind a notification."""
        fanout, audience = self._hub.fanout, sought.entry.audience
        # A broadcast, or a farewell, may be owed to every client.
        is_for_all = sought.turn is not None or audience is None
        suspects: Iterable[Client] = self._hub.clients if is_for_all else chain(fanout.owed, fanout.readers.clients)
        return [client async for _, client in in_slices(list(suspects)) if self.is_behind(client, sought)]

    def is_behind(self, client: Client, sought: Sought) -> bool:
        """Return whether a client has yet to be handed a notification."""
        entry, turn = sought
        if client not in self._hub.clients:
            return False
        if client.reading is not None:
            if turn is not None and entry.audience is not None:
                # A farewell: in the log it is for no client.
                return client.reading.cursor <= turn
            return self._hub.fanout.readers.owes(client, entry)
        if turn is not None and client.cursor <= turn:
            return True
        return client.pending is not None and _has_sequence(client.pending, entry.sequence)

    async def _clients_here(self, sought: Sought, state: DeliveryState, after: str, limit: int) -> Part:
        """Return this process's first clients behind a name in this state."""
        if state == "acknowledged":
            wanted = [client async for client in self._unnamed(sought.entry)]
        else:
            wanted = list(self._hub.clients) if state == "written" else await self._behind(sought)

        def fits(client: Client) -> bool:
            is_behind = self.is_behind(client, sought)
            if state == "written":
                return not is_behind and self._has(client, sought.entry)
            return is_behind or state == "acknowledged"

        first, _ = await first_of(wanted, _name_of, after, limit + 1, fits)
        return Part({_name_of(client): _shown(client) for client in first[:limit]}, len(first) > limit)

    def _has(self, client: Client, entry: Entry) -> bool:
        """Return whether a client that is not behind a notification has been handed it."""
        if entry.audience == NOBODY:
            farewell = self._hub.fanout.log.farewell
            return farewell is not None and farewell.sequence == entry.sequence
        if not entry.replayed:
            return client.joined < entry.id
        # A subscription may have replayed it, from before the client has joined.
        followed, topics = client.followed, frozenset[str]() if entry.audience is None else entry.audience.topics
        is_replayed = followed is not None and followed.includes(entry.id, topics)
        return is_replayed or (client.follows < entry.id and client.is_owed(entry.id, entry.audience))


def _has_sequence(pending: list[int], sequence: int) -> bool:
    index = bisect_left(pending, sequence)
    return index < len(pending) and pending[index] == sequence


def _unknown(id: str) -> NotFound:
    return NotFound(f"Notification {id[:MAX_SHOWN]} is not in the log")


def _name_of(client: Client | Owner) -> str:
    # In the order of bookmarks: no client_id has a space, and each character that one may have comes behind it.
    return f"{client.client_id} {client.user}"


def _shown(client: Client | Owner) -> dict[str, Any]:
    return {"client_id": client.client_id, "user": client.user or None}
