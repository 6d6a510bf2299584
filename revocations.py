"""Revoked tokens: for each user, tokens issued up to a certain second are refused.

A copy of the store's revocations, so that a check costs a request nothing. A process hears of a revocation in a
question, and answers it before the revocation counts as made. The store has all of them for processes that start later.

1. A token without `iat` counts as issued before any revocation, and a second counts as a whole.
2. A process that has stood still for as long as a lease may have been taken for dead, and left out. It reads on in the
   store before it trusts its copy.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING

import store
from errors import StoreUnavailable, Unauthorized

if TYPE_CHECKING:
    from guard_identity import Identity


class Revocations:
    """This process's copy of the revocations."""

    def __init__(self, seconds_kept: float) -> None:
        self._seconds_kept = seconds_kept
        # By user, the oldest first.
        self._seconds: dict[str, int] = {}
        # How far the copy has read in the store, and when that was.
        self._place = ""
        self._read_at = -math.inf
        self._store: store.Store
        # The users of revocations that came from the store alone.
        self.learned: list[str] = []

    def follow(self, store: store.Store) -> None:
        """Be a copy of this store's revocations."""
        self._store = store

    def check(self, identity: Identity) -> None:
        """Raise Unauthorized for the identity of a revoked token."""
        if not identity.user or (second := self._seconds.get(identity.user)) is None:
            return
        is_older = identity.issued_at is None or math.floor(identity.issued_at) <= second
        if is_older and time.time() < second + self._seconds_kept:
            raise Unauthorized("Token revoked")

    @property
    def is_newest(self) -> bool:
        """Whether no revocation can have left this copy out."""
        return time.monotonic() - self._read_at <= store.LEASE_SECONDS

    async def check_newest(self, identity: Identity) -> None:
        """Check an identity, by a copy that no revocation can have left out."""
        if not self.is_newest:
            with contextlib.suppress(StoreUnavailable):
                await self.read()
        self.check(identity)

    def add(self, user: str, second: int) -> bool:
        """Take a revocation, and return whether it is later than the one known."""
        if second <= self._seconds.get(user, -1):
            return False
        self._seconds.pop(user, None)
        self._seconds[user] = second
        while next(iter(self._seconds.values())) + self._seconds_kept < time.time():
            del self._seconds[next(iter(self._seconds))]
            if not self._seconds:
                break
        return True

    async def revoke(self, user: str) -> int:
        """Refuse all tokens of a user that were issued up to now; return the second. Raises StoreUnavailable."""
        second = await self._store.revoke(user)
        self.add(user, second)
        return second

    async def read(self) -> None:
        """Read on in the store. Raises StoreUnavailable."""
        began_at, place = time.monotonic(), self._place
        there: dict[str, int] = {}
        while True:
            place, found = await self._store.revocations(place)
            there |= found
            if not found:
                break
        self.learned += [user for user, second in there.items() if self.add(user, second)]
        if place.partition("/")[0] != self._place.partition("/")[0]:
            # A store that has lost its data gets the missing revocations back.
            for user, second in list(self._seconds.items()):
                if there.get(user, -1) < second:
                    await self._store.revoke(user, second)
        self._place, self._read_at = place, began_at
