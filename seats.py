"""How many clients of this process each address has, for --max-connections-per-ip.

Owns this process's counts; the store adds up those of all processes. A count is put down whole and not as a
difference, so an operation whose outcome is unknown leaves nothing behind: the next one corrects it.
"""

from __future__ import annotations

from errors import TooManyConnections
from store import Store


class Seats:
    """The counts, in step with the store's."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store = store
        self._limit = limit
        self._held: dict[str, int] = {}

    async def take(self, address: str) -> None:
        """Count a newcomer. Raises TooManyConnections, or StoreUnavailable."""
        held = self._held.get(address, 0) + 1
        if held > self._limit:
            raise TooManyConnections(f"Connection limit exceeded for this address: {held - 1}/{self._limit}")
        self._held[address] = held
        try:
            await self._store.seat(address, held)
        except BaseException:
            self.give(address)
            raise

    def give(self, address: str) -> None:
        """Count one less."""
        held = self._held[address] - 1
        if held:
            self._held[address] = held
        else:
            del self._held[address]
        self._store.unseat(address, held)
