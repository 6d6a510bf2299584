"""The ids of notifications, which are their positions in the log.

Owns the form of an id and the order of ids. Knows no log and no store.
"""

from __future__ import annotations

import secrets
import time

_LOW_BITS, _NODE_BITS = (1 << 62) - 1, (1 << 48) - 1


class Positions:
    """Makes ids: UUIDv7 (RFC 9562, section 5.7), strictly increasing even when the clock goes backwards.

    Within one millisecond, or while the clock is behind the last id, the 74 random bits count on instead, by a step
    that is as random: one call of the system for each millisecond, and none for each id.
    """

    __slots__ = ("_last", "_prefix", "_prefixed", "_step")

    def __init__(self, last: str = "") -> None:
        """Make ids that come after `last`, an id of this process or another."""
        digits = last.replace("-", "") or "0" * 32
        self._last = int(digits[:12] + digits[13:16], 16) << 62 | int(digits[16:], 16) & _LOW_BITS
        self._step = 1 + secrets.randbits(32)
        # The high bits of the last id, and the digits that they make: they change once a millisecond.
        self._prefixed = -1
        self._prefix = ""

    def next(self) -> str:
        milliseconds = time.time_ns() // 1_000_000
        if milliseconds > self._last >> 74:
            value = milliseconds << 74 | secrets.randbits(73)
            self._step = 1 + secrets.randbits(32)
        else:
            value = self._last + self._step
        self._last = value
        # 48 bits of time, version 7, 12 bits, variant 10, 62 bits.
        if self._prefixed != (high := value >> 62):
            self._prefixed = high
            self._prefix = f"{high >> 28:08x}-{high >> 12 & 0xFFFF:04x}-7{high & 0xFFF:03x}"
        low = value & _LOW_BITS | 2 << 62
        return f"{self._prefix}-{low >> 48:04x}-{low & _NODE_BITS:012x}"
