"""Readers: clients that stand too far behind for a cursor are handed the log page by page, until they are near its end.

Owns the pages of the whole log, the places of the readers, and the task that hands pages to them. The newest end of the
log is in memory (log.py), the rest in the store. Knows neither HTTP nor the messages of clients.

1. A reader's place is a position: it has been handed everything of its own up to there. The place moves together with
   the write.
2. A page has all notifications between two positions for one interest. Readers of one interest near each other share
   the pages, and from the first shared page on they stand at one place. A reader holds no page, only its place.
3. A reader becomes a client with a cursor in one step, without await: everything before its place has been handed to
   it, everything from there on is its backlog in memory. So nothing is missing at the seam, and nothing comes twice.
4. Pages are handed over in slices that take turns with the passes of the fan-out, so that no reader delays a live
   client by more than a slice.
5. A reader that cannot be written to waits. It is closed when the log has let go of a notification that it is owed.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from clients import Client
from errors import StoreUnavailable
from log import Audience, Entry, frame, payload
from store import Reach, Record

if TYPE_CHECKING:
    from fanout import FanOut
    from hub import Hub

logger = logging.getLogger("notifyd")

# A client that is at most so many entries behind has a cursor, and a list of the entries that it is owed: looking
# through them takes a fraction of a millisecond.
NEAR_ENTRIES = 1000
# Pages that are kept for the next readers, with up to 128 KiB of frames each.
PAGES_KEPT = 16
# A slice of pages holds the event loop for about this long. A live notification waits for about five of them on its way
# from the publisher to the clients (bench/run.py --measure long_log).
SLICE_SECONDS = 0.0002
# The pauses before the store is asked again after a failure, and while it has a publish under way: that goes first.
RETRY_SECONDS, GIVE_WAY_SECONDS = 0.5, 0.001

_id_of = attrgetter("id")
Wants = Callable[[Entry], bool]


def entry_of(record: Record) -> Entry:
    data = frame(payload(record.id, record.rest))
    return Entry(-1, record.id, data, len(data), record.at, record.replayed, record.audience, record.addressed)


# --- pages of the whole log


class Part(NamedTuple):
    """Notifications joined for one write: frames, number, ids of the first and the last; and counts for the tally."""

    frames: bytes
    notifications: int
    first: str
    last: str
    counts: list[tuple[Entry, int]]


def _part(entries: list[Entry]) -> Part | None:
    if not entries:
        return None
    frames, counts = b"".join([entry.frame for entry in entries]), [(entry, 1) for entry in entries]
    return Part(frames, len(entries), entries[0].id, entries[-1].id, counts)


class Page:
    """All notifications for an interest after one position and up to another, in order."""

    __slots__ = ("_parts", "after", "before", "entries", "interest", "until")

    def __init__(self, interest: Audience, after: str, until: str, entries: list[Entry], before: str = "") -> None:
        self.interest = interest
        self.after = after
        self.until = until
        self.entries = entries
        # The position before the front of the log when the page was read; empty in memory.
        self.before = before
        self._parts: dict[bool, Part | None] = {}

    def between(self, after: str, until: str) -> list[Entry]:
        low, high = (bisect_right(self.entries, position, key=_id_of) for position in (after, until))
        return self.entries[low:high]

    def whole(self, replayed: bool) -> Part | None:
        """Return all notifications, or those of a replay, joined once for all readers."""
        if replayed not in self._parts:
            part = _part([one for one in self.entries if one.replayed or not replayed])
            if part is not None:
                # Counted by the place of the reader, but for these.
                targeted = [(one, 1) for one, _ in part.counts if one.audience is not None]
                left_out = [(one, -1) for one in self.entries if one.audience is None and replayed > one.replayed]
                part = part._replace(counts=targeted + left_out)
            self._parts[replayed] = part
        return self._parts[replayed]


class Pages:
    """Reads the whole log: from memory as far as that goes back, and from the store before."""

    def __init__(self, hub: Hub, fanout: FanOut) -> None:
        self._log = fanout.log
        self._clock = hub.clock
        self._stored = hub.store.log
        self._admitting = fanout.admitting

    def in_memory(self, interest: Audience, after: str, until: str) -> Page | None:
        """Return the page after a position, or None where the position is in the store alone."""
        log = self._log
        if self._stored is not None and log.find(after) is None:
            return None
        start, end = log.sequence_after(after), log.sequence_after(until)
        entries, reached = log.page(start, max(start, end), interest)
        return Page(interest, after, until if reached >= end else log.position_before(reached), entries)

    async def read(self, interest: Audience, after: str, until: str) -> Page:
        """Return the page after a position, up to another at most. Raises StoreUnavailable."""
        if (page := self.in_memory(interest, after, until)) is not None:
            await asyncio.sleep(0)
            return page
        return await self.read_stored(interest, after, until)

    async def read_stored(self, interest: Audience, after: str, until: str) -> Page:
        assert self._stored is not None
        found = await self._stored.read(interest, after, until)
        return Page(interest, after, found.until, list(map(entry_of, found.records)), found.before)

    async def read_back(self, interest: Audience, after: str, until: str) -> Page:
        """Return the page that ends with a position, newest first, down to another at most; `until` is its beginning.

        Raises StoreUnavailable.
        """
        log = self._log
        if self._stored is None or (log.find(after) is not None):
            end, start = log.sequence_after(after), log.sequence_after(until)
            entries, reached = log.page(max(start, end), end, interest)
            await asyncio.sleep(0)
            return Page(interest, after, after if reached <= end else log.position_before(reached), entries)
        found = await self._stored.read(interest, after, until, newest_first=True)
        return Page(interest, after, found.until, list(map(entry_of, found.records)))

    def is_near(self, since: str) -> bool:
        """Whether memory proves what is missing since a position, and that is little."""
        start, complete = self._log.reach(since, self._clock())
        return (complete or self._stored is None) and self._log.next_sequence - start <= NEAR_ENTRIES

    async def front(self, since: str | None) -> tuple[str, bool]:
        """Return the position after which a reader since this position begins, and whether it is complete."""
        start, complete = self._log.reach(since, self._clock())
        if self._stored is None or (complete and since is not None):
            return self._log.position_before(start), complete
        reach = await self._stored.reach(since, Audience(frozenset(), frozenset()), self._log.position)
        return reach.position, reach.complete

    async def reach(self, since: str, interest: Audience, until: str) -> Reach:
        """Return where a reader since this position begins, and what there is for it. Raises StoreUnavailable.

        Nothing that is in memory at the beginning leaves it meanwhile.
        """
        if self._stored is not None:
            return await self._stored.reach(since, interest, until)
        log, key = self._log, object()
        start, complete = log.reach(since, self._clock())
        position = after = log.position_before(start)
        self._admitting[key] = start
        try:
            count = 0
            while after < until:
                page = await self.read(interest, after, until)
                count += sum(entry.replayed for entry in page.entries)
                after = page.until
        finally:
            self._admitting.pop(key, None)
        return Reach(position, complete, count, interest, until)


# --- readers


class Reading:
    """The place of a client that is handed the log page by page."""

    __slots__ = (
        "count",
        "cursor",
        "interest",
        "is_sparse",
        "last_id",
        "listed_until",
        "next_id",
        "position",
        "turn",
        "until",
        "wants",
    )

    def __init__(self, position: str, until: str, interest: Audience, count: int, turn: int, cursor: int) -> None:
        # It has been handed everything up to here. Up to `until` there is nothing for other names than `interest`.
        self.position = position
        self.until = until
        self.interest = interest
        # Whether the store's index finds its notifications faster than a search of the memory.
        self.is_sparse = False
        # The ids of the last notification that it was handed, and of the next one, while they are known.
        self.last_id = self.next_id = ""
        # Up to this position it is handed the notifications that it `wants`, afterwards all that it follows.
        self.listed_until = ""
        self.wants: Wants | None = None
        # The notifications that it was owed when the next turn of the log was `turn`, and targeted ones since.
        self.count = count
        self.turn = turn
        # The cursor that it had: it is not told farewell twice.
        self.cursor = cursor

    def end(self) -> str:
        """Return the position at which its present stretch of the log ends."""
        return min(self.until, self.listed_until) if self.position < self.listed_until else self.until


class _Step(enum.Enum):
    """The state of a reader after a step: it lacks a page, waits for its socket, goes on, or has become a cursor."""

    LACKS, WAITS, GOES_ON, DONE = range(4)


class Readers:
    """The readers of this process."""

    def __init__(self, hub: Hub, fanout: FanOut) -> None:
        self._hub = hub
        self._fanout = fanout
        self._log = fanout.log
        self._tally = fanout.tally
        self._clock = hub.clock
        self.pages = Pages(hub, fanout)
        # To be read by all, changed here alone.
        self.clients: set[Client] = set()
        # Those that can go on, in the order of their turn.
        self._queue: OrderedDict[Client, None] = OrderedDict()
        self._kept: deque[Page] = deque(maxlen=PAGES_KEPT)
        self._wanted = asyncio.Event()

    # --- in and out

    def begin(self, client: Client, reach: Reach, count: int) -> None:
        """Hand a client its replay of so many notifications, and then the rest of the log."""
        client.cursor = 0
        reading = self._add(client, reach.position, reach.until, reach.interest, count)
        reading.is_sparse = self._is_sparse(reach)
        reading.listed_until = self._log.position
        reading.wants = _replayed

    def fall(self, client: Client) -> None:
        """Hand a client from the store the backlog that is about to leave the memory."""
        place, count, listed_until, wants = self._backlog_of(client)
        next_id = self._log.entry(self._log.backlog_start(client.cursor, client.pending)).id
        reading = self._add(client, place, place, client.interest(), count)
        reading.next_id, reading.listed_until, reading.wants = next_id, listed_until, wants

    def replay(self, client: Client, since: str, count: int, wants: Wants) -> None:
        """Hand a client the notifications since a position that it `wants`, and its backlog, in their order."""
        place, backlog, _, owed = self._backlog_of(client)
        position = min(place, since)
        reading = self._add(client, position, position, client.interest(), backlog + count)
        reading.listed_until = self._log.position
        reading.wants = lambda one: (
            (one.id > place and (owed(one) if owed else self._follows(client, one))) or (one.id > since and wants(one))
        )

    def place_of(self, client: Client) -> str:
        """Return the position before everything that a client has yet to be handed."""
        if client.reading is not None:
            return client.reading.position
        return self._log.position_before(self._log.backlog_start(client.cursor, client.pending))

    def _add(self, client: Client, position: str, until: str, interest: Audience, count: int) -> Reading:
        cursor = client.cursor if client.reading is None else client.reading.cursor
        client.reading = Reading(position, until, interest, count, self._log.next_turn, cursor)
        self._fanout.unplace(client)
        self.clients.add(client)
        self.go_on(client)
        return client.reading

    def forget(self, client: Client) -> None:
        client.reading = None
        self.clients.discard(client)

    def _backlog_of(self, client: Client) -> tuple[str, int, str, Wants | None]:
        """Return a client's place as a position, the number of notifications that it is owed, and which these are.

        Up to the position beside them it is owed those that it `wants`, afterwards all that it follows.
        """
        log, reading = self._log, client.reading
        if reading is not None:
            return reading.position, self.backlog(client), reading.listed_until, partial(self._wants, client, reading)
        pending = client.pending or []
        count = log.next_turn - client.cursor + len(pending)
        start, listed = log.backlog_start(client.cursor, pending), client.listed_until
        place = log.position_before(start)
        if start >= listed:
            return place, count, "", None
        broadcasts = log.position_before(log.backlog_start(client.cursor, None))
        ids = {log.entry(sequence).id for sequence in pending if sequence < listed}
        listed_until = log.position_before(listed)

        def wants(one: Entry) -> bool:
            if one.id > listed_until:
                return self._follows(client, one)
            return one.id in ids or (one.audience is None and one.id > broadcasts)

        return place, count, listed_until, wants

    def backlog(self, client: Client) -> int:
        """Return the number of notifications that a reader has yet to be handed."""
        assert client.reading is not None
        count: int = client.reading.count + self._log.next_turn - client.reading.turn
        return count

    def owes(self, client: Client, entry: Entry) -> bool:
        """Return whether a reader has yet to be handed a notification."""
        reading = client.reading
        return reading is not None and entry.id > reading.position and self._wants(client, reading, entry)

    def widen(self, client: Client) -> None:
        """Note that the topics of a client have changed."""
        if client.reading is not None:
            client.reading.interest = client.interest()

    # --- one step of one reader

    def go_on(self, client: Client) -> None:
        """Have a reader handed its next page."""
        self._queue[client] = None
        self._wanted.set()

    def _follows(self, client: Client, entry: Entry) -> bool:
        return client.is_owed(entry.id, entry.audience)

    def _wants(self, client: Client, reading: Reading, entry: Entry) -> bool:
        listed = entry.id <= reading.listed_until and reading.wants is not None
        if listed and reading.wants is not _replayed:
            assert reading.wants is not None
            return reading.wants(entry)
        return (entry.replayed or not listed) and self._follows(client, entry)

    def _step(self, client: Client, reading: Reading) -> _Step:
        """Hand a reader its next page, if the page is at hand and the reader can be written to."""
        # Without await: the place moves together with the write, and a client that is near the end of the log passes
        # to a cursor with the entries that are its backlog at this moment.
        log = self._log
        start = log.find(reading.position)
        if start is not None and log.next_sequence - start <= NEAR_ENTRIES:
            self._place(client, reading, start)
            return _Step.DONE
        end = reading.end()
        if reading.position >= end:
            return _Step.LACKS
        page = self._at_hand(reading, may_search=start is not None and not reading.is_sparse)
        if page is None:
            return _Step.LACKS
        until = min(page.until, end)
        is_plain = client.followed is None and reading.wants in (None, _replayed)
        is_whole = is_plain and page.after == reading.position and until == page.until
        if is_whole:
            part = page.whole(reading.position < reading.listed_until)
        else:
            part = _part([one for one in page.between(reading.position, until) if self._wants(client, reading, one)])
        if part is not None:
            if not client.connection.writable:
                reading.next_id = part.first
                return _Step.WAITS
            self._tally.read(part.counts, (page.after, until) if is_whole else None)
            reading.last_id = part.last
            reading.count -= part.notifications
            self._fanout.messages_sent += part.notifications
            self._hub.counts.bytes_sent += len(part.frames)
            client.connection.write(part.frames)
        reading.position, reading.next_id = until, ""
        return _Step.GOES_ON

    def _at_hand(self, reading: Reading, *, may_search: bool) -> Page | None:
        """Return a page that has the reader's next notifications, if it is known or can be made from memory."""
        for page in self._kept:
            if page.interest == reading.interest and page.after <= reading.position < page.until:
                return page
        made = self.pages.in_memory(reading.interest, reading.position, reading.end()) if may_search else None
        if made is not None:
            self._kept.append(made)
        return made

    def _place(self, client: Client, reading: Reading, start: int) -> None:
        """Turn a reader into a client with a cursor, with all entries from `start` on that it is owed."""
        log = self._log
        listed = max(start, log.sequence_after(reading.listed_until))
        pending = [
            one.sequence
            for one in log.since(start)
            if (one.sequence < listed or one.audience is not None) and self._wants(client, reading, one)
        ]
        if reading.last_id:
            client.told = max(client.told, log.sequence_after(reading.last_id) - 1)
        self.forget(client)
        self._fanout.place(client, max(reading.cursor, log.turn_of(listed)), listed, pending)

    # --- the task

    async def run(self) -> None:
        """Hand pages over for ever."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._queue:
                async with self._fanout.passing:
                    lacking = self._serve()
                await asyncio.sleep(GIVE_WAY_SECONDS if self._hub.store.durations.under_way["append"] else 0)
                await self._hub.deliveries.keep_up()
                # It may have left meanwhile.
                if lacking is not None and lacking.reading is not None:
                    await self._fetch(lacking)

    def _serve(self) -> Client | None:
        """Serve the readers in turn for a slice of time, or up to the first that lacks a page, and return that."""
        began = self._clock()
        while self._queue and self._clock() <= began + SLICE_SECONDS:
            client, _ = self._queue.popitem(last=False)
            if client.reading is None or client not in self._hub.clients:
                continue
            step = self._step(client, client.reading)
            if step is _Step.GOES_ON:
                self._queue[client] = None
            elif step is _Step.LACKS:
                self._queue[client] = None
                self._queue.move_to_end(client, last=False)
                return client
        return None

    async def _fetch(self, client: Client) -> None:
        """Read the next page of a reader, or look ahead where its stretch of the log is at its end."""
        reading = client.reading
        assert reading is not None
        try:
            if reading.position < reading.end():
                page = await self.pages.read_stored(reading.interest, reading.position, reading.end())
                if reading.position < page.before and not reading.next_id > page.before:
                    self._close_late(client)
                self._kept.append(page)
                return
            reach = await self.pages.reach(reading.position, client.interest(), self._log.position)
            reading.until, reading.is_sparse = reach.until, self._is_sparse(reach)
            reading.interest = reach.interest if client.followed is None else client.interest()
        except StoreUnavailable:
            await asyncio.sleep(RETRY_SECONDS)

    def _is_sparse(self, reach: Reach) -> bool:
        return self._hub.store.log is not None and reach.replayed < len(self._log) // 16

    # --- the end of a reader

    def close_late(self) -> None:
        """Close the readers that are owed a notification which the log of all processes has let go of."""
        if (stored := self._hub.store.log) is not None:
            for client in list(self.clients):
                if client.reading is not None and "" < client.reading.next_id <= stored.before:
                    self._close_late(client)

    def before_trim(self, until: int) -> None:
        """Move the places of readers that are about to leave the memory, where that is all there is of the log."""
        log, position = self._log, self._log.position_before(until)
        for client in list(self.clients) if self._hub.store.log is None else ():
            reading = client.reading
            if reading is None or reading.position >= position:
                continue
            gone = (one for one in log.since(log.sequence_after(reading.position)) if one.sequence < until)
            lost = next((one for one in gone if self._wants(client, reading, one)), None)
            if lost is not None:
                reading.position = log.position_before(lost.sequence)
                self._close_late(client)
            else:
                reading.position, reading.until = position, max(position, reading.until)

    def _close_late(self, client: Client) -> None:
        if client.reading is not None and client in self._hub.clients:
            self._fanout.close_slow_consumer(client, self.backlog(client), client.reading.position)


def _replayed(entry: Entry) -> bool:
    return entry.replayed
