"""Idempotency keys: the same request gets the first answer, and nothing is published twice."""

from __future__ import annotations

import pytest

from errors import InvalidRequest, KeyReused
from store import Appended, Once, Receipt
from store_keys import IdempotencyKeys

REQUEST, OTHER = b"a request", b"another request"


def appended(count: int = 1) -> Appended:
    return Appended([Receipt(f"id-{number}", 3) for number in range(count)], 17.0)


def published(keys: IdempotencyKeys, key: str, now: float = 0.0, count: int = 1) -> bool:
    """Send the request with this key, and return whether it was published."""
    once = Once(key, REQUEST)
    if keys.find(once, now) is not None:
        return False
    keys.keep(once, appended(count), now)
    return True


def test_a_repeat_gets_the_first_answer() -> None:
    """A repeat gets the first answer, marked as a repetition, however often it comes."""
    keys, once = IdempotencyKeys(9, 60), Once("key", REQUEST)
    assert keys.find(once, 0) is None
    keys.keep(once, appended(), 0)
    assert [keys.find(once, now) for now in (1, 2)] == [appended()._replace(repeated=True)] * 2


def test_another_request_with_the_key_is_refused() -> None:
    """It is a mistake of the publisher, and the first request stays as it was."""
    keys = IdempotencyKeys(9, 60)
    assert published(keys, "key")
    with pytest.raises(KeyReused) as refusal:
        keys.find(Once("key", OTHER), 1)
    assert isinstance(refusal.value, InvalidRequest) and "Idempotency-Key" in refusal.value.message
    assert not published(keys, "key", 2)


def test_keys_do_not_know_each_other() -> None:
    """The same request with two keys is two requests."""
    keys = IdempotencyKeys(9, 60)
    assert published(keys, "one") and published(keys, "two")


def test_a_key_is_forgotten_when_it_is_too_old() -> None:
    """Its age counts from the first request: a repetition does not make it younger."""
    keys = IdempotencyKeys(9, 60)
    assert [published(keys, "key", now) for now in (0, 30, 60, 60.5)] == [True, False, False, True]


def test_the_oldest_keys_make_room() -> None:
    """Keys are kept for as many notifications as the history has, and the oldest go first."""
    keys = IdempotencyKeys(3, 60)
    assert all(published(keys, name) for name in ("one", "two", "three"))
    assert not published(keys, "one")
    assert published(keys, "four")
    assert [published(keys, name) for name in ("two", "three", "four")] == [False] * 3


def test_a_batch_counts_each_of_its_notifications() -> None:
    """Two batches of two do not fit where three are kept."""
    keys = IdempotencyKeys(3, 60)
    assert published(keys, "one", count=2) and published(keys, "two", count=2)
    assert not published(keys, "two", count=2)
    assert published(keys, "one", count=2)


def test_the_newest_is_kept_at_any_size() -> None:
    """A batch that is larger than the history is still sent once."""
    keys = IdempotencyKeys(3, 60)
    assert published(keys, "key", count=1000)
    assert not published(keys, "key", count=1000)
