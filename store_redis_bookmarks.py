"""The bookmarks in Redis, and those that this process can put back.

Knows no client and no connection. store_redis.lua has the rule by which one bookmark follows another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import msgspec

from bookmarks import NOWHERE, PAGE_BOOKMARKS, Bookmark, BookmarksInMemory, Owner, Span, bounds
from settings import Settings
from store_redis_link import Argument

# Two or three milliseconds.
PUT_BACK_AT_ONCE = 200
# Between client_id and user in the name of an owner: neither has it.
_BETWEEN = "\n"
_unpack = msgspec.msgpack.Decoder(tuple[str, tuple[Span, ...]]).decode


class RedisBookmarks:
    """The Bookmarks of one process.

    `perform` and `submit` enqueue an operation, `perform` only while the store is there; `enqueue` has no answer.
    """

    def __init__(
        self,
        settings: Settings,
        perform: Callable[..., asyncio.Future[Any]],
        submit: Callable[..., asyncio.Future[Any]],
        enqueue: Callable[..., None],
    ) -> None:
        most, seconds = bounds(settings)
        # Their number, and how long they are kept: microseconds.
        self.bounds = most, round(seconds * 1e6)
        self._perform, self._submit = perform, submit
        self._enqueue = enqueue
        self._epoch, self._lost = "", iter(list[Bookmark]())
        # All that this process has written down, also of clients that have left.
        self._written = BookmarksInMemory(settings, time.monotonic)

    def keep(self, bookmarks: Sequence[Bookmark]) -> None:
        self._written.keep(bookmarks)
        for bookmark in bookmarks:
            self._enqueue(*_keep(bookmark))

    def joined(self, epoch: str) -> None:
        """Write everything down again in a new life of the data: Redis may have lost it."""
        if epoch != self._epoch:
            self._epoch, self._lost = epoch, iter(self._written.all())
        self._put_back()

    def _put_back(self, answer: asyncio.Future[Any] | None = None) -> None:
        """Write some down, and others when these are there: in between come the operations of clients."""
        if answer is not None and (answer.cancelled() or answer.exception() is not None):
            # The next join goes on.
            return
        some = list(islice(self._lost, PUT_BACK_AT_ONCE))
        for bookmark in some:
            self._enqueue(*_keep(bookmark))
        if some:
            self._submit("bookmark", _name(some[-1].owner)).add_done_callback(self._put_back)

    async def find(self, owner: Owner) -> Bookmark | None:
        found, may_be_lost = await self._perform("bookmark", _name(owner))
        if found is not None:
            return Bookmark(owner, *_unpack(found))
        return Bookmark(owner, NOWHERE, ()) if may_be_lost else None

    async def page(self, after: Owner | None, least: str) -> tuple[list[Bookmark], Owner | None]:
        start = "-" if after is None else f"({_name(after)}"
        last, *found = await self._perform("bookmarks", start, PAGE_BOOKMARKS, least)
        return (
            [Bookmark(_owner(found[k]), *_unpack(found[k + 1])) for k in range(0, len(found), 2)],
            _owner(last) if last else None,
        )


def _keep(bookmark: Bookmark) -> tuple[Argument, ...]:
    return "keep", _name(bookmark.owner), bookmark.position, msgspec.msgpack.encode(bookmark.spans)


def _name(owner: Owner) -> str:
    return _BETWEEN.join(owner)


def _owner(name: bytes) -> Owner:
    return Owner(*name.decode().split(_BETWEEN))
