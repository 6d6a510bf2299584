"""Idempotency keys: a publisher that repeats a request gets the first answer again, and nothing is sent twice.

Owns what a publisher gets, and the memory of it, bounded as the history is. Knows neither HTTP nor the Hub.
"""

from __future__ import annotations

from typing import NamedTuple

from errors import KeyReused


class Receipt(NamedTuple):
    """The id of a published notification, and how many connected clients it is addressed to."""

    id: str
    recipients: int


class Appended(NamedTuple):
    """The receipts of what was appended at `at`, in seconds since the epoch; `repeated` where that was before."""

    receipts: list[Receipt]
    at: float
    repeated: bool = False


class Once(NamedTuple):
    """An Idempotency-Key, and what stands for the request that it came with."""

    key: str
    fingerprint: bytes


class _Kept(NamedTuple):
    fingerprint: bytes
    appended: Appended
    at: float


class Keys:
    """What was appended, by key, the oldest first: at most `max_receipts`, for at most `max_age` seconds."""

    def __init__(self, max_receipts: int, max_age: float) -> None:
        self._max_receipts = max_receipts
        self._max_age = max_age
        self._kept: dict[str, _Kept] = {}
        self._receipts = 0

    def find(self, once: Once, now: float) -> Appended | None:
        """Return what the request appended before. Raises KeyReused where the key came with another request."""
        while self._kept and now - next(iter(self._kept.values())).at > self._max_age:
            self._forget_oldest()
        if (known := self._kept.get(once.key)) is None:
            return None
        check_reuse(once, known.fingerprint)
        return known.appended._replace(repeated=True)

    def keep(self, once: Once, appended: Appended, now: float) -> None:
        """Remember a request that find() did not know. The newest is kept whatever its size."""
        self._kept[once.key] = _Kept(once.fingerprint, appended, now)
        self._receipts += len(appended.receipts)
        while self._receipts > self._max_receipts and len(self._kept) > 1:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        oldest = self._kept.pop(next(iter(self._kept)))
        self._receipts -= len(oldest.appended.receipts)


def check_reuse(once: Once, fingerprint: bytes) -> None:
    """Raise KeyReused unless the key came with the same request before."""
    if once.fingerprint != fingerprint:
        raise KeyReused("Idempotency-Key: already used for another request")
