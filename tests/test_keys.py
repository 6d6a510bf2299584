"""Idempotency keys: the same request gets the first answer, and nothing is published twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from errors import InvalidRequest, KeyReused
from keys import Keys

REQUEST, OTHER = b"a request", b"another request"


def answers(*given: bytes) -> Callable[[], bytes]:
    """A publisher that gives these answers, one each time it is asked, and fails when it is asked once more."""
    left = list(given)
    return lambda: left.pop(0)


def test_the_first_request_is_published() -> None:
    """Its answer is no repetition."""
    assert Keys(9, 999, 60).once("key", REQUEST, 0, answers(b"first")) == (b"first", False)


def test_a_repeat_gets_the_first_answer_and_publishes_nothing() -> None:
    """The publisher is asked once, however often the request comes."""
    keys, publish = Keys(9, 999, 60), answers(b"first")
    keys.once("key", REQUEST, 0, publish)
    assert [keys.once("key", REQUEST, now, publish) for now in (1, 2)] == [(b"first", True)] * 2


def test_another_request_with_the_key_is_refused() -> None:
    """It is not published, and the first answer stays."""
    keys = Keys(9, 999, 60)
    keys.once("key", REQUEST, 0, answers(b"first"))
    with pytest.raises(KeyReused, match="Idempotency-Key"):
        keys.once("key", OTHER, 1, answers())
    assert keys.once("key", REQUEST, 2, answers()) == (b"first", True)


def test_keys_do_not_know_each_other() -> None:
    """The same request with another key is another request."""
    keys, publish = Keys(9, 999, 60), answers(b"first", b"second")
    assert keys.once("one", REQUEST, 0, publish) == (b"first", False)
    assert keys.once("two", REQUEST, 0, publish) == (b"second", False)


def test_a_refusal_leaves_the_key_free() -> None:
    """A publisher corrects its request and sends it with the same key."""

    def refuse() -> bytes:
        raise InvalidRequest("message: required, but missing")

    keys = Keys(9, 999, 60)
    with pytest.raises(InvalidRequest):
        keys.once("key", REQUEST, 0, refuse)
    assert keys.once("key", OTHER, 1, answers(b"good")) == (b"good", False)


def test_an_answer_is_kept_as_long_as_the_history() -> None:
    """Until the second at which its notification expires; a repeat does not prolong it."""
    keys, publish = Keys(9, 999, 60), answers(b"first", b"second")
    keys.once("key", REQUEST, 0, publish)
    keys.once("key", REQUEST, 30, publish)
    assert keys.once("key", REQUEST, 60, publish) == (b"first", True)
    assert keys.once("key", REQUEST, 60.5, publish) == (b"second", False)


def test_as_many_answers_are_kept_as_notifications() -> None:
    """While three notifications are in the history, so are the answers to their requests; later they go."""
    keys = Keys(3, 999, 60)
    for name in ("one", "two", "three"):
        keys.once(name, REQUEST, 0, answers(name.encode()))
    assert keys.once("one", REQUEST, 0, answers()) == (b"one", True)
    for name in ("four", "five"):
        keys.once(name, REQUEST, 0, answers(name.encode()))
    assert keys.once("one", REQUEST, 0, answers(b"again")) == (b"again", False)


def test_answers_are_bounded_in_bytes() -> None:
    """The oldest go when all of them are too much; the newest stays, however large."""
    keys = Keys(9, 10, 60)
    keys.once("one", REQUEST, 0, answers(b"12345678"))
    keys.once("two", REQUEST, 0, answers(b"12345678"))
    assert keys.once("two", REQUEST, 0, answers()) == (b"12345678", True)
    assert keys.once("one", REQUEST, 0, answers(b"again")) == (b"again", False)


def test_what_was_forgotten_makes_room() -> None:
    """The bytes of answers that went are not counted any more."""
    keys = Keys(9, 10, 60)
    for name in ("one", "two", "three", "four"):
        keys.once(name, REQUEST, 0, answers(b"1234"))
    assert keys.once("three", REQUEST, 0, answers()) == (b"1234", True)
