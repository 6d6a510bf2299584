"""Fills the log of a store with so many notifications of 200 bytes, with the store's own code but without a server.

    python bench/fill.py STORE COUNT OWN

All are for the topic `all` but OWN of them, which are for the client `own`. Prints the id of the first, and the one
behind which a tenth of them follows.
"""

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from log import Audience
from settings import Settings
from store import Draft, Node, Store

BATCH, IN_FLIGHT, PAYLOAD_BYTES = 1000, 4, 200
REST = b',"type":"custom","timestamp":"2026-01-31T12:00:00.000Z","data":{"message":"%0*d"},"sender":"bench"}'
# With the id before it, and without a message.
ENVELOPE_BYTES = 44 + len(REST) - len(b"%0*d")
WEEK_SECONDS = 604_800
ALL = Audience(frozenset(), frozenset(("all",)))
ITS_OWN = Audience(frozenset(("own",)), frozenset())


class _Nobody(Node):
    """A node without clients."""

    def opened(self, *_: object) -> None: ...
    def deliver(self, *_: object) -> None: ...
    def recipients(self, *_: object) -> int:
        return 0

    def kept(self, *_: object) -> tuple[str, Iterator[object]]:  # type: ignore[override]
        return "", iter(())

    def registrations(self) -> tuple[()]:
        return ()


def _store(url: str) -> Store:
    settings = Settings(store=url, history_size=2_000_000, history_bytes=10**9, history_ttl=WEEK_SECONDS)
    if url.startswith("sqlite:"):
        from store_sqlite import SqliteStore

        return SqliteStore(settings, url.removeprefix("sqlite:"))
    from store_redis import RedisStore

    return RedisStore(settings, url)


async def main(url: str, count: int, own: int) -> None:
    store, ids, waiting = _store(url), [], []
    await store.open(_Nobody())
    for first in range(0, count, BATCH):
        drafts = [
            Draft(REST % (PAYLOAD_BYTES - ENVELOPE_BYTES, number), ALL if number % (count // own) else ITS_OWN)
            for number in range(first, first + BATCH)
        ]
        waiting.append(asyncio.ensure_future(store.append(drafts)))
        if len(waiting) == IN_FLIGHT:
            ids += (await waiting.pop(0)).receipts
    for appended in waiting:
        ids += (await appended).receipts
    await store.close()
    print(ids[0].id, ids[-count // 10].id)


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
