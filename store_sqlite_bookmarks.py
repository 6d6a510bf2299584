"""The bookmarks in the SQLite file: the event loop's side, and the rows, as part of a transaction.

Knows neither the log nor a client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from bookmarks import (
    FORGOTTEN_AT_ONCE,
    NOWHERE,
    PAGE_BOOKMARKS,
    Bookmark,
    Owner,
    Span,
    bounds,
)
from settings import Settings
from store_sqlite_state import Run, State

if TYPE_CHECKING:
    from store_sqlite_transaction import Transaction

_spans_of = msgspec.json.Decoder(tuple[Span, ...]).decode


class SqliteBookmarks:
    """The Bookmarks of one process. `enqueue` has the thread run something, and `perform` waits for its answer."""

    def __init__(self, perform: Callable[..., Any], enqueue: Callable[..., None]) -> None:
        self._perform = perform
        self._enqueue = enqueue

    def keep(self, bookmarks: Sequence[Bookmark]) -> None:
        self._enqueue(_keep, bookmarks)

    async def find(self, owner: Owner) -> Bookmark | None:
        found: Bookmark | None = await self._perform(_find, owner)
        return found

    async def page(self, after: Owner | None, least: str) -> tuple[list[Bookmark], Owner | None]:
        found: tuple[list[Bookmark], Owner | None] = await self._perform(_page, after, least)
        return found


def _keep(transaction: Transaction, bookmarks: Sequence[Bookmark]) -> None:
    transaction.bookmarks.keep(bookmarks)


def _find(transaction: Transaction, owner: Owner) -> Bookmark | None:
    return transaction.bookmarks.find(owner)


def _page(transaction: Transaction, after: Owner | None, least: str) -> tuple[list[Bookmark], Owner | None]:
    return transaction.bookmarks.page(after, least)


class BookmarkRows:
    """The rows of bookmarks in one transaction."""

    def __init__(self, run: Run, state: State, settings: Settings, now: float) -> None:
        self._run, self._state, self._now = run, state, now
        self._most, self._ttl = bounds(settings)

    def keep(self, bookmarks: Sequence[Bookmark]) -> None:
        for bookmark in bookmarks:
            known = self._known(bookmark.owner)
            kept = bookmark if known is None else bookmark.joined(known)
            self._state.bookmarks += known is None
            values = *kept.owner, kept.position, msgspec.json.encode(kept.spans), self._now + self._ttl
            self._run("INSERT OR REPLACE INTO bookmark VALUES (?, ?, ?, ?, ?)", values)
        if self._state.bookmarks > self._most:
            self.trim()

    def _known(self, owner: Owner) -> Bookmark | None:
        row = self._run("SELECT position, spans FROM bookmark WHERE client = ? AND user = ?", owner).fetchone()
        return None if row is None else Bookmark(owner, row[0], _spans_of(row[1]))

    def find(self, owner: Owner) -> Bookmark | None:
        self.trim()
        if (known := self._known(owner)) is not None:
            return known
        return Bookmark(owner, NOWHERE, ()) if self._now < self._state.bookmarks_lost_until else None

    def page(self, after: Owner | None, least: str) -> tuple[list[Bookmark], Owner | None]:
        sql = (
            "SELECT client, user, position, spans FROM bookmark WHERE (client, user) > (?, ?)"
            " ORDER BY client, user LIMIT ?"
        )
        rows = self._run(sql, (*(after or ("", "")), PAGE_BOOKMARKS)).fetchall()
        found = [
            Bookmark(Owner(client, user), position, _spans_of(spans))
            for client, user, position, spans in rows
            if position >= least
        ]
        return found, Owner(*rows[-1][:2]) if len(rows) == PAGE_BOOKMARKS else None

    def trim(self) -> None:
        """Delete some of the bookmarks whose time is over, or that are too many."""
        state = self._state
        if not state.bookmarks:
            return
        self._delete(self._now)
        if (excess := min(state.bookmarks - self._most, FORGOTTEN_AT_ONCE)) > 0:
            sql = "SELECT ends FROM bookmark ORDER BY ends LIMIT 1 OFFSET ?"
            (state.bookmarks_lost_until,) = self._run(sql, (excess - 1,)).fetchone()
            self._delete(state.bookmarks_lost_until)

    def _delete(self, until: float) -> None:
        sql = (
            "DELETE FROM bookmark WHERE (client, user) IN"
            " (SELECT client, user FROM bookmark WHERE ends <= ? ORDER BY ends LIMIT ?)"
        )
        self._state.bookmarks -= self._run(sql, (until, FORGOTTEN_AT_ONCE)).rowcount
