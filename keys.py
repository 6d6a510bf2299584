"""Idempotency keys: a publisher that repeats a request gets the first answer again, and nothing is sent twice.

Owns the answers, kept within the same bounds as the history. Knows neither HTTP nor the Hub.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from errors import KeyReused


class _Kept(NamedTuple):
    fingerprint: bytes
    answer: bytes
    at: float


class Keys:
    """Answers by key, the oldest first."""

    def __init__(self, max_keys: int, max_bytes: int, max_age: float) -> None:
        self._max_keys = max_keys
        self._max_bytes = max_bytes
        self._max_age = max_age
        self._kept: dict[str, _Kept] = {}
        self._bytes = 0

    def once(self, key: str, fingerprint: bytes, now: float, publish: Callable[[], bytes]) -> tuple[bytes, bool]:
        """Return the answer to a request, and whether it is a repetition.

        `fingerprint` stands for the request. Raises KeyReused where the key came with another one, and what
        publish() raises: a refusal is not kept. As publish() has no await, no repeat comes while one is under way.
        """
        self._forget(now)
        if (known := self._kept.get(key)) is not None:
            if known.fingerprint != fingerprint:
                raise KeyReused("Idempotency-Key: already used for another request")
            return known.answer, True
        answer = publish()
        self._kept[key] = _Kept(fingerprint, answer, now)
        self._bytes += len(answer)
        return answer, False

    def _forget(self, now: float) -> None:
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            fits = len(self._kept) <= self._max_keys and self._bytes <= self._max_bytes
            if fits and now - oldest.at <= self._max_age:
                return
            del self._kept[key]
            self._bytes -= len(oldest.answer)
