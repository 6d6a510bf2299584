"""Token buckets: requests that an address may send, at once and per second.

A bucket is one integer, the microsecond at which it is full again. So a store needs no more than a number for each, and
every process computes alike. Knows no address and no store.
"""

from __future__ import annotations

from typing import NamedTuple

SECOND = 1_000_000


class Rate:
    """Requests a second, and how many at once from a full bucket.

    `cost` is the microseconds that refill one request, `depth` those that fill an empty bucket.
    """

    __slots__ = ("burst", "cost", "depth", "per_second")

    def __init__(self, per_second: int, burst: int) -> None:
        self.per_second = per_second
        self.burst = burst
        self.cost = SECOND // per_second
        self.depth = burst * self.cost


class Draw(NamedTuple):
    """Whether a request was let through, and the microseconds until its bucket is full."""

    allowed: bool
    until_full: int


def draw(full_at: int, now: int, rate: Rate) -> Draw:
    """Take one request out of the bucket that is full at `full_at`."""
    # After the clock was put back the bucket is empty, and no worse.
    left = min(max(full_at - now, 0), rate.depth)
    return Draw(True, left + rate.cost) if left + rate.cost <= rate.depth else Draw(False, left)


class Buckets:
    """The buckets of one process, by name. A full bucket is forgotten within a second."""

    def __init__(self) -> None:
        self._full_at: dict[str, int] = {}
        self._swept = 0

    def draw(self, name: str, rate: Rate, now: int) -> Draw:
        drawn = draw(self._full_at.get(name, 0), now, rate)
        self.put(name, drawn, now)
        return drawn

    def put(self, name: str, drawn: Draw, now: int) -> None:
        """Set a bucket to the result of a draw elsewhere."""
        # Sweeping bounds the buckets by the requests of the last seconds.
        if now - self._swept > SECOND:
            self._swept = now
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        self._full_at[name] = now + drawn.until_full

    def refusal(self, name: str, rate: Rate, now: int) -> Draw | None:
        """Return a refusal if the bucket is known to hold no whole request."""
        drawn = draw(self._full_at.get(name, 0), now, rate)
        return None if drawn.allowed else drawn

    def __len__(self) -> int:
        return len(self._full_at)
