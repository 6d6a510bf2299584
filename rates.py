"""Token buckets without I/O: what a rate is, and what one request takes out of a bucket.

A bucket is one number: when it will be full, in microseconds of whatever clock its owner keeps. A bucket that is full
by now is like one that never was, so it can be forgotten. store_redis.lua has draw() once more.
"""

from __future__ import annotations

from typing import NamedTuple

SECOND = 1_000_000


class Rate(NamedTuple):
    """So many requests a second, and so many at once out of a full bucket."""

    per_second: int
    burst: int

    @property
    def cost(self) -> int:
        """The microseconds in which one request is refilled."""
        return SECOND // self.per_second

    @property
    def depth(self) -> int:
        """The microseconds in which an empty bucket is full again."""
        return self.burst * self.cost


class Draw(NamedTuple):
    """Whether a request was let through, and the microseconds until its bucket is full."""

    allowed: bool
    until_full: int


def draw(full_at: int, now: int, rate: Rate) -> Draw:
    """Take one request out of the bucket that is full at `full_at`."""
    # Where the clock was put back, the bucket is empty, and no worse.
    left = min(max(full_at - now, 0), rate.depth)
    return Draw(True, left + rate.cost) if left + rate.cost <= rate.depth else Draw(False, left)


class Buckets:
    """Buckets by name, of one process. One that is full is forgotten within a second."""

    def __init__(self) -> None:
        self._full_at: dict[str, int] = {}
        self._swept = 0

    def draw(self, name: str, rate: Rate, now: int) -> Draw:
        drawn = draw(self._full_at.get(name, 0), now, rate)
        self.put(name, drawn, now)
        return drawn

    def put(self, name: str, drawn: Draw, now: int) -> None:
        """Set a bucket to what was found elsewhere."""
        # So there are never more than requests came in the last seconds.
        if now - self._swept > SECOND:
            self._swept = now
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        self._full_at[name] = now + drawn.until_full

    def refusal(self, name: str, rate: Rate, now: int) -> Draw | None:
        """Return the refusal where the bucket is known to hold no whole request."""
        drawn = draw(self._full_at.get(name, 0), now, rate)
        return None if drawn.allowed else drawn

    def __len__(self) -> int:
        return len(self._full_at)
