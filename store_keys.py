"""The Idempotency-Keys of a process, with the answers to their first requests.

Owns the rule by which a key is taken for a repetition, and the bounds of those in memory. Knows neither the log nor a
notification.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from errors import KeyReused

if TYPE_CHECKING:
    from store import Appended, Once

FORGOTTEN_AT_ONCE = 1000


class _Kept(NamedTuple):
    fingerprint: bytes
    appended: Appended
    at: float


class IdempotencyKeys:
    """Appends by their key, oldest first: at most `max_receipts` receipts, each for at most `max_age` seconds.

    Each call forgets a few of those beyond the bounds.
    """

    def __init__(self, max_receipts: int, max_age: float) -> None:
        self._max_receipts = max_receipts
        self._max_age = max_age
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._receipts = 0

    def find(self, once: Once, now: float) -> Appended | None:
        """Return the append of an earlier request with the key. Raises KeyReused if that request was another."""
        for _ in range(FORGOTTEN_AT_ONCE):
            if not self._kept or now - next(iter(self._kept.values())).at <= self._max_age:
                break
            self._forget_oldest()
        if (known := self._kept.get(once.key)) is None or now - known.at > self._max_age:
            return None
        check_reuse(once, known.fingerprint)
        return known.appended._replace(repeated=True)

    def keep(self, once: Once, appended: Appended, now: float) -> None:
        """Remember an append that find() did not know. The newest is kept even if it exceeds the limit alone."""
        if (expired := self._kept.pop(once.key, None)) is not None:
            self._receipts -= len(expired.appended.receipts)
        self._kept[once.key] = _Kept(once.fingerprint, appended, now)
        self._receipts += len(appended.receipts)
        while self._receipts > self._max_receipts and len(self._kept) > 1:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, oldest = self._kept.popitem(last=False)
        self._receipts -= len(oldest.appended.receipts)


def check_reuse(once: Once, fingerprint: bytes) -> None:
    """Raise KeyReused unless the fingerprint is that of the request."""
    if once.fingerprint != fingerprint:
        raise KeyReused("Idempotency-Key: already used for another request")
