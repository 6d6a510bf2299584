"""The replay: the part of the past that a newcomer or a new subscription is owed, or a request for the history reads.

Finds where it begins, whether it is complete, and how many notifications it has. Near the end of the log they are
listed for the client's cursor (fanout.py); from farther back the client reads (readers.py). Knows neither HTTP nor the
messages of clients.

1. reach() and reach_topics() may wait for the store. What arrives meanwhile stays in memory: see FanOut.admitting.
2. follow() and follow_topics() do not wait: the client's place and the number in its `resume` are of one moment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from clients import UNTOLD, Client
from log import Audience, Entry
from readers import NEAR_ENTRIES, Readers
from schemas import ResumeData
from store import Reach

if TYPE_CHECKING:
    from hub import Hub

# A stretch of the history is no longer than this, unless one notification is.
STRETCH_BYTES = 1_048_576


class Stretch(NamedTuple):
    """A stretch of the history: its notifications, and the position from which the next stretch goes on."""

    entries: list[Entry]
    position: str
    # Whether the log reaches back to the position that was asked for.
    complete: bool


class Replay:
    """The replays of this process's clients."""

    def __init__(self, hub: Hub) -> None:
        self._fanout = hub.fanout
        self._log = hub.fanout.log
        self._clock = hub.clock

    @property
    def _readers(self) -> Readers:
        return self._fanout.readers

    async def reach(self, since: str | None, interest: Audience) -> Reach | None:
        """Find the replay of a newcomer since a position if that is far behind. Raises StoreUnavailable.

        The newcomer must be among the admitting.
        """
        if not since or self._readers.pages.is_near(since):
            return None
        return await self._readers.pages.reach(since, interest, self._log.position)

    def follow(self, client: Client, since: str | None, position: str, reach: Reach | None = None) -> ResumeData:
        """Put a newcomer at the end of the log, owe it the earlier entries that are its, and return what these are.

        With `since` they are its replay, for which reach() has looked. Otherwise they are those after the `position` at
        which the store admitted it: another process may have been faster than this one.
        """
        log = self._log
        client.cursor, client.listed_until = log.next_turn, log.next_sequence
        client.told = log.next_sequence - 1 if (since or position) == log.position else UNTOLD
        start, complete = self._start(since, position, reach)
        if start is None:
            assert reach is not None
            return self._follow_from_afar(client, reach)
        client.follows = client.joined = log.position
        owed: list[Entry] = []
        if start < log.next_sequence:
            client.follows = log.position_before(start)
            if not since:
                client.joined = client.follows
            owed = [one for one in log.since(start) if client.is_owed(one.id, one.audience)]
            if since:
                owed = [one for one in owed if one.replayed]
            self._fanout.owe(client, owed)
        if since:
            return ResumeData(position=log.position, replayed=len(owed), complete=complete)
        return ResumeData(position=position, replayed=0, complete=True)

    def _follow_from_afar(self, client: Client, reach: Reach) -> ResumeData:
        """Have a newcomer read the log."""
        log, client.follows, client.joined = self._log, reach.position, self._log.position
        # Appended since the store counted.
        newer = [one for one in log.since(log.sequence_after(reach.until)) if client.is_owed(one.id, one.audience)]
        replayed = reach.replayed + sum(one.replayed for one in newer)
        self._readers.begin(client, reach, replayed)
        return ResumeData(position=log.position, replayed=replayed, complete=reach.complete)

    async def reach_topics(self, client: Client, topics: frozenset[str], since: str) -> Reach | None:
        """Find the replay of a subscription as reach() does. The client's topics must not change meanwhile."""
        until, interest = self._log.position, Audience(frozenset(), topics)
        if (reach := await self.reach(since, interest)) is None:
            return None
        # Counted one by one: the client is handed some of them for another reason.
        position, count, wants = reach.position, 0, self._wants_topics(client, topics)
        while position < until:
            page = await self._readers.pages.read(interest, position, until)
            count += sum(map(wants, page.entries))
            position = page.until
        return reach._replace(replayed=count)

    def _wants_topics(self, client: Client, topics: frozenset[str]) -> Callable[[Entry], bool]:
        """Return the choice of entries that a client is handed only because it subscribes to topics now."""
        known = client.subscriptions().copy()

        def wants(entry: Entry) -> bool:
            if (audience := entry.audience) is None or audience.topics.isdisjoint(topics):
                return False
            is_named = audience.includes(client.client_id, client.user, ()) and entry.id > client.follows
            return not is_named and not known.includes(entry.id, audience.topics)

        return wants

    def follow_topics(
        self, client: Client, topics: frozenset[str], since: str, position: str, reach: Reach | None = None
    ) -> ResumeData:
        """Owe a client the earlier entries for topics that it subscribes to now, and return what these are.

        Only entries for these topics, and none that the client is handed for another reason: in person, by a topic
        that it follows already, or by an earlier subscription. With an empty `since` they are those after `position`.
        reach_topics() has looked for the replay.
        """
        log, subscriptions = self._log, client.subscriptions()
        wants = self._wants_topics(client, topics)
        start, complete = self._start(since, position, reach)
        if not self._fanout.advance(client):
            # A client with a backlog must not resume behind it.
            position = min(position, self._readers.place_of(client))
        elif since:
            position = log.position
        if start is not None and client.reading is None:
            subscriptions.begin(topics, log.position_before(start))
            owed = [entry for entry in log.since(start) if wants(entry)]
            self._fanout.owe(client, owed)
            client.listed_until = log.next_sequence
            replayed = len(owed)
        else:
            if reach is None:
                assert start is not None
                reach = Reach(log.position_before(start), complete, 0, client.interest(), log.position_before(start))
            newer = log.since(log.sequence_after(reach.until))
            replayed = reach.replayed + sum(map(wants, newer))
            subscriptions.begin(topics, reach.position)
            self._readers.replay(client, reach.position, replayed, wants)
        client.takes_positions = True
        if position == log.position:
            client.told = log.next_sequence - 1
        return ResumeData(position=position, replayed=replayed if since else 0, complete=complete)

    def _start(self, since: str | None, position: str, reach: Reach | None) -> tuple[int | None, bool]:
        """Return the sequence from which a client is owed entries, and whether it is provably the one after `since`.

        None if that is too far behind for a list of entries.
        """
        log = self._log
        if reach is not None:
            start = log.find(reach.position)
            near = start is not None and log.next_sequence - start <= NEAR_ENTRIES
            return start if near else None, reach.complete
        if since:
            return log.reach(since, self._clock())
        start = None if position == log.position else log.find(position)
        return log.next_sequence if start is None else start, True

    async def stretch(
        self, interest: Audience, since: str | None, before: str, limit: int, *, newest_first: bool
    ) -> Stretch:
        """Read a stretch of the whole log for a request, with `limit` notifications at most.

        Since a position, or from the front, up to the id `before`, or to the end where that is empty. Raises
        StoreUnavailable.
        """
        pages, newest = self._readers.pages, self._log.position
        end = min(before or newest, newest)
        start, complete = await pages.front(since)
        read = partial(pages.read_back, interest, start) if newest_first else partial(pages.read, interest, until=end)
        at, finish = (end, start) if newest_first else (start, end)
        found: list[Entry] = []
        size = 0
        while at != finish and (at < finish) != newest_first:
            page = await read(at)
            for entry in page.entries:
                if entry.replayed and entry.id != before:
                    size += len(entry.frame)
                    if len(found) == limit or (found and size > STRETCH_BYTES):
                        return Stretch(found, found[-1].id, complete)
                    found.append(entry)
            at = page.until
        return Stretch(found, (found[-1].id if found else end) if newest_first else end, complete)
