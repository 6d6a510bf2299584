"""Long work on the event loop in slices, so that it starves no other task. Knows nothing of the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

# How long a slice holds the event loop, about.
SLICE_SECONDS = 0.002

Item = TypeVar("Item")


async def in_slices(items: Iterable[Item]) -> AsyncIterator[tuple[int, Item]]:
    """Yield the items with their numbers, from 0 on, and let other tasks run after each SLICE_SECONDS."""
    clock = asyncio.get_running_loop().time
    began = clock()
    for number, item in enumerate(items):
        yield number, item
        if clock() > began + SLICE_SECONDS:
            await asyncio.sleep(0)
            began = clock()
