"""Long work on the event loop, in portions: others get their turn between them. Knows nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

# The event loop is held no longer than about this at a time.
SLICE_SECONDS = 0.002

Item = TypeVar("Item")


async def in_slices(items: Iterable[Item]) -> AsyncIterator[tuple[int, Item]]:
    """Yield the items with their numbers, from 0 on, and let others run when that has taken long enough."""
    clock = asyncio.get_running_loop().time
    began = clock()
    for number, item in enumerate(items):
        yield number, item
        if clock() > began + SLICE_SECONDS:
            await asyncio.sleep(0)
            began = clock()
