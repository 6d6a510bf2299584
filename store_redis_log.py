"""The log in Redis, as it is read in pages: through the operations of the process, in groups with all others.

Knows no client and no connection. store_redis.lua has the lists that lead from a name to its records.

1. A page is small: Redis makes it in about a millisecond, and nobody else is served meanwhile.
2. A call reads records for everyone and for the names that it is asked for, and no others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import store_redis_records as packing
from log import PAGE_BYTES, Audience
from store import Found, Reach
from store_redis_link import Argument

PAGE_RECORDS = 200
# Operations that keep Redis as busy as so many arguments of others.
COSTS: dict[Argument, int] = {"reach": 200, "count": 1000, "read": 1000}
# Records that a process reads when it joins, at most: it serves within a second.
OPENING_RECORDS = 20_000


class RedisLog:
    """The StoredLog of one process; `perform` enqueues an operation."""

    def __init__(self, perform: Callable[..., asyncio.Future[Any]]) -> None:
        self._perform = perform
        self.before = ""

    async def reach(self, since: str | None, interest: Audience, until: str) -> Reach:
        names = interest.names()
        reply = await self._perform("reach", since or "", until, len(names), *names)
        position, complete, after, end, replayed, *counts = reply
        present = {name: count for name, count in zip(names, counts, strict=True) if count}
        if len(present) == 1:
            replayed += sum(present.values())
        elif present:
            # A record may be for several of the names.
            while int(after) < int(end):
                count, after = await self._perform("count", after, end, len(present), *present)
                replayed += count
        return Reach(position.decode(), complete == 1, replayed, interest.only(present.__contains__), until)

    async def read(self, interest: Audience, after: str, until: str, *, newest_first: bool = False) -> Found:
        names = interest.names()
        bounds = after, until, "1" if newest_first else "", PAGE_RECORDS, PAGE_BYTES
        before, last, oldest, *entries = await self._perform("read", *bounds, len(names), *names)
        records = [record for record in map(packing.record_of, entries) if _is_for(record.audience, interest)]
        reached = (oldest if newest_first else last) or (after if newest_first else until).encode()
        return Found(records, reached.decode(), before.decode())


def _is_for(audience: Audience | None, interest: Audience) -> bool:
    # Records that are not replayed are in one list, for whatever names they are.
    return audience is None or audience.meets(interest)
