"""The ids of notifications, which are their positions in the log.

Owns the form of an id and the order of ids. Knows no log and no store.
"""

from __future__ import annotations

import secrets
import time

# Of an id: the bits at its end, behind the last hyphen, and the random ones before these, behind the time.
_LOW_BITS, _MIDDLE_BITS = 48, 26


class Positions:
    """Makes ids: UUIDv7 (RFC 9562, section 5.7), strictly increasing even when the clock goes backwards.

    Within one millisecond, or while the clock is behind the last id, the 74 random bits count on instead, by a step
    that is as random: one call of the system for each millisecond, and none for each id.
    """

    __slots__ = ("_high", "_low", "_milliseconds", "_prefix", "_step")

    def __init__(self, last: str = "") -> None:
        """Make ids that come after `last`, an id of this process or another."""
        digits = last.replace("-", "") or "0" * 32
        # 48 bits of time, version 7, 12 bits, variant 10, 62 bits.
        self._begin(int(digits[:12] + digits[13:16], 16) << 14 | int(digits[16:20], 16) & 0x3FFF)
        self._low = int(digits[20:], 16)

    def _begin(self, high: int) -> None:
        """Set the bits before the low ones, which change about once a millisecond, and draw a step."""
        self._high, self._milliseconds = high, high >> _MIDDLE_BITS
        front, middle = high >> 14, high & 0x3FFF
        self._prefix = f"{front >> 28:08x}-{front >> 12 & 0xFFFF:04x}-7{front & 0xFFF:03x}-{0x8000 | middle:04x}-"
        self._step = 1 + secrets.randbits(32)

    def next(self) -> str:
        low = self._low + self._step
        if (milliseconds := time.time_ns() // 1_000_000) > self._milliseconds:
            # The first bit is 0, so that the others have room to count.
            self._begin(milliseconds << _MIDDLE_BITS | secrets.randbits(_MIDDLE_BITS - 1))
            low = secrets.randbits(_LOW_BITS)
        elif low >> _LOW_BITS:
            self._begin(self._high + 1)
            low -= 1 << _LOW_BITS
        self._low = low
        return f"{self._prefix}{low:012x}"
