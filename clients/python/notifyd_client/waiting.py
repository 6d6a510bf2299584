"""How long to wait before the next attempt."""

from __future__ import annotations

import random

BASE_SECONDS = 0.5  # the first delay is at most this; each failure doubles it
CAP_SECONDS = 30.0


def backoff(failures: int, base: float = BASE_SECONDS, cap: float = CAP_SECONDS) -> float:
    """Return the seconds to wait: anything up to a limit that doubles with each failure ("full jitter")."""
    return random.uniform(0, min(cap, base * 2.0 ** min(failures, 64)))
