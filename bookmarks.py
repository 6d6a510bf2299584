"""Bookmarks: how far clients have acknowledged their notifications, kept beyond their connections.

Owns the values that cross the seam to the stores, that part of the seam, and the bookmarks in memory. A client that
acknowledges is a cursor, and its bookmark is that cursor kept. Knows ids and names; no log, no socket and no message.

1. A bookmark belongs to a client_id and its user, so nobody gets or moves that of another user.
2. It moves forward only. Its spans say for which notifications up to there it speaks: those that came while the client
   was connected, or by a resume, and no others.
3. It outlives the connection by history_ttl at least. Those that are not kept any longer go in bounded steps.
4. A bookmark that may have been lost is not taken for one that never was: see `NOWHERE`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from log import Audience
from settings import Settings

# Before every notification: the position of a client whose bookmark may have been lost, so that a resume from there
# is incomplete, and has everything that is kept.
NOWHERE = "00000000-0000-0000-0000-000000000000"
# A bookmark is kept for so many times history_ttl since it was last written down, which happens once in history_ttl
# while its client is connected, and when that leaves.
KEPT_TTLS = 2
# For each client that may be connected so many bookmarks are kept, and in all no fewer than LEAST_KEPT.
KEPT_FOR_EACH_CONNECTION, LEAST_KEPT = 10, 10_000
# The spans of one bookmark; the oldest go first.
MOST_SPANS = 128
# Bookmarks that one step looks at or forgets: a millisecond or two.
PAGE_BOOKMARKS, FORGOTTEN_AT_ONCE = 500, 1000


class Owner(NamedTuple):
    """The client that a bookmark belongs to; `user` is empty for none."""

    client_id: str
    user: str


class Span(NamedTuple):
    """Notifications after one id and up to another, empty for no end yet.

    They are for a topic; or with an empty `topic` for everyone, for the client_id and for the user.
    """

    topic: str
    after: str
    until: str


class Bookmark(NamedTuple):
    """Everything within these spans has been acknowledged up to this id."""

    owner: Owner
    position: str
    spans: tuple[Span, ...]

    def covers(self, id: str, audience: Audience | None) -> bool:
        """Return whether it acknowledges the notification with this id, which is for this audience."""
        return id <= self.position and any(
            span.after < id <= (span.until or id) and self._includes(span.topic, audience) for span in self.spans
        )

    def _includes(self, topic: str, audience: Audience | None) -> bool:
        if audience is None:
            return not topic
        return topic in audience.topics if topic else audience.includes(*self.owner, ())

    def joined(self, earlier: Bookmark) -> Bookmark:
        """Return it with the spans of an earlier bookmark of its owner; spans that meet become one."""
        if earlier.position >= self.position:
            return earlier
        spans, first, ended = list(self.spans), dict[str, int](), list[Span]()
        for place, span in enumerate(spans):
            if span.topic not in first or span.after < spans[first[span.topic]].after:
                first[span.topic] = place
        for topic, after, until in earlier.spans:
            end, place = until or earlier.position, first.get(topic, -1)
            if place >= 0 and spans[place].after <= end:
                spans[place] = spans[place]._replace(after=min(after, spans[place].after))
            else:
                ended.append(Span(topic, after, end))
        return self._replace(spans=(*ended, *spans)[-MOST_SPANS:])


class Bookmarks(Protocol):
    """The bookmarks of all processes. The coroutines may raise StoreUnavailable."""

    def keep(self, bookmarks: Sequence[Bookmark]) -> None:
        """Write bookmarks down, soon and in order: before each operation that is requested later.

        That takes place even if the store is away now. A bookmark never replaces a newer one of its owner.
        """

    async def find(self, owner: Owner) -> Bookmark | None:
        """Return the bookmark of an owner; one at NOWHERE where it may have been lost before its time."""

    async def page(self, after: Owner | None, least: str) -> tuple[list[Bookmark], Owner | None]:
        """Return bookmarks behind an owner, in the order of their owners: of a bounded number those from an id on.

        Beside them the owner behind which the next page begins; None at the end.
        """


def bounds(settings: Settings) -> tuple[int, float]:
    """Return the number of bookmarks that are kept at most, and the seconds for which they are kept."""
    most = max(LEAST_KEPT, KEPT_FOR_EACH_CONNECTION * settings.max_connections)
    return most, KEPT_TTLS * settings.history_ttl


class BookmarksInMemory:
    """Bookmarks, those that were written down last at the end."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        (self._most, self._ttl), self._clock = bounds(settings), clock
        # Each with the time of its end.
        self._kept: OrderedDict[Owner, tuple[Bookmark, float]] = OrderedDict()
        self._owners: list[Owner] = []
        # The end of the last that had to go before its time.
        self._lost_until = 0.0

    def keep(self, bookmarks: Sequence[Bookmark]) -> None:
        now = self._clock()
        for bookmark in bookmarks:
            known = self._kept.pop(bookmark.owner, None)
            if known is None:
                insort(self._owners, bookmark.owner)
            kept = bookmark if known is None else bookmark.joined(known[0])
            self._kept[bookmark.owner] = kept, now + self._ttl
        self._forget(now)

    def _forget(self, now: float) -> None:
        for _ in range(FORGOTTEN_AT_ONCE):
            if not self._kept:
                return
            owner, (_, end) = next(iter(self._kept.items()))
            if end > now:
                if len(self._kept) <= self._most:
                    return
                self._lost_until = end
            del self._kept[owner], self._owners[bisect_left(self._owners, owner)]

    async def find(self, owner: Owner) -> Bookmark | None:
        now = self._clock()
        self._forget(now)
        bookmark, end = self._kept.get(owner, (None, 0.0))
        if end > now:
            return bookmark
        return Bookmark(owner, NOWHERE, ()) if now < self._lost_until else None

    async def page(self, after: Owner | None, least: str) -> tuple[list[Bookmark], Owner | None]:
        self._forget(self._clock())
        start = 0 if after is None else bisect_right(self._owners, after)
        owners = self._owners[start : start + PAGE_BOOKMARKS]
        found = [self._kept[owner][0] for owner in owners if self._kept[owner][0].position >= least]
        return found, owners[-1] if len(owners) == PAGE_BOOKMARKS else None

    def all(self) -> list[Bookmark]:
        """Return all, the last that was written down first."""
        return [bookmark for bookmark, _ in reversed(self._kept.values())]
