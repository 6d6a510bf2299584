"""The log in Redis, as it is read in pages: beside the operations of the process, over a connection of its own.

Knows no client. store_redis.lua has the lists that lead from a name to its records.

1. One call is in flight at a time, so readers take Redis and the event loop no more than a page at a time from others.
2. A page is small: Redis makes it in about a millisecond, and nobody else is served meanwhile.
3. A call reads records for everyone and for the names that it is asked for, and no others.
4. The connection may reach another Redis than the process's others, after a failover: the script checks the epoch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from redis import exceptions
from redis.asyncio.connection import AbstractConnection

import store_redis_records as packing
from errors import StoreUnavailable
from log import PAGE_BYTES, Audience
from store import Counted, Found, Reach
from store_redis_link import Argument, RedisLink

PAGE_RECORDS = 200
# Records that a process reads when it joins, at most: it serves within a second.
OPENING_RECORDS = 20_000


class RedisLog:
    """The StoredLog of one process; `run` runs the script, and `check` raises StoreUnavailable while that is no use."""

    def __init__(
        self,
        link: RedisLink,
        run: Callable[[AbstractConnection, list[Argument]], Awaitable[Any]],
        check: Callable[[], None],
    ) -> None:
        self._link = link
        self._run = run
        self._check = check
        self.before = ""
        self.restart()

    def restart(self) -> None:
        """Belong to the event loop that is running now."""
        self._turn = asyncio.Lock()
        self._connection: AbstractConnection | None = None

    async def disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _ask(self, *arguments: Argument) -> Any:
        """Return the reply to an operation. Raises StoreUnavailable."""
        async with self._turn:
            self._check()
            connection, self._connection = self._connection, None
            try:
                connection = connection or await self._link.connect()
                _, reply = await self._run(connection, list(arguments))
            except BaseException as error:
                # The reply may be on its way, to a caller that was cancelled as well.
                if connection is not None:
                    await connection.disconnect(nowait=True)
                if isinstance(error, exceptions.RedisError | OSError):
                    raise StoreUnavailable(f"The store is away: {self._link.reason(error)}") from None
                raise
            self._connection = connection
            return reply

    async def reach(self, since: str | None, interest: Audience, until: str) -> Reach:
        names = interest.names()
        reply = await self._ask("reach", since or "", until, len(names), *names)
        position, complete, after, end, replayed, *counts = reply
        present = {name: count for name, count in zip(names, counts, strict=True) if count}
        if len(present) == 1:
            replayed += sum(present.values())
        elif present:
            # A record may be for several of the names.
            while int(after) < int(end):
                count, after = await self._ask("count", after, end, len(present), *present)
                replayed += count
        return Reach(position.decode(), complete == 1, replayed, interest.only(present.__contains__), until)

    async def read(self, interest: Audience, after: str, until: str, *, newest_first: bool = False) -> Found:
        names = interest.names()
        bounds = after, until, "1" if newest_first else "", PAGE_RECORDS, PAGE_BYTES
        before, last, oldest, *entries = await self._ask("read", *bounds, len(names), *names)
        records = [record for record in map(packing.record_of, entries) if _is_for(record.audience, interest)]
        reached = (oldest if newest_first else last) or (after if newest_first else until).encode()
        return Found(records, reached.decode(), before.decode())

    async def find(self, id: str) -> Counted | None:
        found = await self._ask("find", id)
        return Counted(packing.record_of(found[0]), *found[1:]) if found else None


def _is_for(audience: Audience | None, interest: Audience) -> bool:
    # Records that are not replayed are in one list, for whatever names they are.
    return audience is None or audience.meets(interest)
