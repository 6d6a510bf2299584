"""The log in memory: what is kept, what a cursor is handed, and what a client that comes back can be told."""

from __future__ import annotations

from collections.abc import Iterable
from unittest import mock

import pytest

import log as log_module
from log import NAME_BYTES, Audience, Log

FIRST = "id-00"
RED = Audience(frozenset(), frozenset({"red"}))
NEVER = 10**9


def ring_of(count: int = 0, *, max_entries: int = 1000, max_bytes: int = 10**6, max_age: float = 60) -> Log:
    """A log in which id-01, id-02 and so on were broadcast at the seconds 1, 2 and so on."""
    log = Log(max_entries, max_bytes, max_age)
    log.begin(FIRST)
    add(log, range(1, count + 1))
    return log


def add(log: Log, numbers: Iterable[int], *, audience: Audience | None = None, replayed: bool = True) -> list[int]:
    """Append entries with these numbers and return their sequences."""
    return [
        log.append(f"id-{number:02}", b"<%d>" % number, number, replayed=replayed, audience=audience)
        for number in numbers
    ]


def front_at(log: Log, now: float, settled: int = NEVER) -> int:
    """Trim as far as the bounds ask, and return where the log begins then."""
    log.trim(log.expired(now, settled))
    return log.front


# What a cursor is handed.


def test_a_cursor_is_handed_everything_up_to_the_head() -> None:
    """One batch has all frames from the cursor on, in order, and the cursor that comes next."""
    assert ring_of(4).batch(1) == (b"<2><3><4>", 4, 3)


def test_at_the_head_there_is_nothing() -> None:
    """Who has everything gets no batch, in an empty log too."""
    assert ring_of(4).batch(4) is None
    assert ring_of().batch(0) is None


def test_clients_at_the_same_cursor_share_one_batch() -> None:
    """What was joined for one is the very same bytes for the next."""
    log = ring_of(4)
    assert log.batch(1) is log.batch(1)


def test_a_new_entry_is_in_the_next_batch() -> None:
    """A batch that was joined before is not handed out again after an append."""
    log = ring_of(2)
    log.batch(0)
    add(log, [3])
    assert log.batch(0) == (b"<1><2><3>", 3, 3)


def test_a_targeted_entry_moves_no_cursor() -> None:
    """What is for some only is not among the broadcasts, and takes no turn."""
    log = ring_of(1)
    add(log, [2], audience=RED)
    add(log, [3])
    assert log.batch(0) == (b"<1><3>", 2, 2)


def test_a_batch_has_an_end() -> None:
    """One write stays within BATCH_BYTES; the next goes on where it ended."""
    log = ring_of(5)
    with mock.patch.object(log_module, "BATCH_BYTES", 7):
        assert log.batch(0) == (b"<1><2>", 2, 2)
        assert log.batch(2) == (b"<3><4>", 4, 2)


def test_one_entry_is_never_too_large_for_a_batch() -> None:
    """An entry that is larger than BATCH_BYTES goes alone."""
    log = ring_of(2)
    with mock.patch.object(log_module, "BATCH_BYTES", 1):
        assert log.batch(0) == (b"<1>", 1, 1)


def test_of_the_farewell_one_frame_is_a_notification() -> None:
    """Both come last and are not in the log; the message is not in the count either."""
    log = ring_of(2)
    log.append_farewell(b"<soon>", b"<bye>")
    assert log.batch(0) == (b"<1><2><soon><bye>", 4, 3)
    assert (len(log), log.position) == (2, "id-02")


def test_the_farewell_is_handed_out_by_itself() -> None:
    """Who has everything else gets it alone."""
    log = ring_of(2)
    log.append_farewell(b"<soon>", b"<bye>")
    assert log.batch(2) == (b"<soon><bye>", 4, 1)


def test_how_far_behind_counts_notifications() -> None:
    """Three broadcasts are three behind, and one more with the farewell."""
    log = ring_of(3)
    assert [log.behind(cursor) for cursor in range(4)] == [3, 2, 1, 0]
    log.append_farewell(b"<soon>", b"<bye>")
    assert [log.behind(cursor) for cursor in range(6)] == [4, 3, 2, 1, 0, 0]


# What a client is handed that is owed more than the broadcasts.


def test_what_is_owed_beside_comes_in_its_place() -> None:
    """Targeted entries and broadcasts are merged in the order of the log."""
    log = ring_of(1)
    pending = add(log, [2], audience=RED)
    add(log, [3])
    pending += add(log, [4], audience=RED)
    assert log.merge(0, pending) == ((b"<1><2><3><4>", 2, 4), [])


def test_a_replay_comes_before_what_is_published_later() -> None:
    """Entries before the cursor, broadcasts among them, go first."""
    log = ring_of(3)
    add(log, [4])
    assert log.merge(3, [0, 2]) == ((b"<1><3><4>", 4, 3), [])


def test_a_merged_batch_has_an_end_too() -> None:
    """What does not fit is left for the next time, and nothing is lost or repeated between them."""
    log = ring_of(3)
    pending = add(log, [4, 5], audience=RED)
    with mock.patch.object(log_module, "BATCH_BYTES", 13):
        assert log.merge(0, pending) == ((b"<1><2><3><4>", 3, 4), [4])
        assert log.merge(3, [4]) == ((b"<5>", 3, 1), [])


def test_who_is_owed_the_same_is_handed_the_same() -> None:
    """It is joined once, and what is left stays one list; until something is appended."""
    log = ring_of(3)
    pending = add(log, [4, 5], audience=RED)
    with mock.patch.object(log_module, "BATCH_BYTES", 13):
        (batch, left), (same_batch, same_left) = log.merge(0, pending), log.merge(0, pending)
    assert batch is same_batch
    assert left is same_left
    pending += add(log, [6], audience=RED)
    assert log.merge(0, pending) == ((b"<1><2><3><4><5><6>", 3, 6), [])


def test_a_merged_farewell_comes_last_and_is_not_counted() -> None:
    """Also who is owed a replay is told goodbye, after it."""
    log = ring_of(1)
    pending = add(log, [2], audience=RED)
    log.append_farewell(b"<soon>", b"<bye>")
    assert log.merge(0, pending) == ((b"<1><2><soon><bye>", 3, 3), [])


def test_what_comes_behind_the_farewell_is_counted() -> None:
    """Other hosts go on publishing while this one drains."""
    log = ring_of(1)
    log.append_farewell(b"<soon>", b"<bye>")
    add(log, [2])
    assert log.batch(0) == (b"<1><soon><bye><2>", 4, 3)
    assert log.batch(3) == (b"<2>", 4, 1)


def test_the_next_that_is_owed_is_the_older_of_both() -> None:
    """A client's place in the log is its next broadcast, or the entry that it is owed beside."""
    log = ring_of(1)
    pending = add(log, [2], audience=RED)
    add(log, [3])
    assert log.next_owed(0, pending) == 0
    assert log.next_owed(1, pending) == 1
    assert log.next_owed(1, None) == 2
    assert log.next_owed(2, None) == log.next_sequence


# What is kept.


def test_so_many_entries_are_kept() -> None:
    """The oldest go first."""
    log = ring_of(9, max_entries=4)
    assert front_at(log, 9) == 5
    assert [entry.id for entry in log.since(0)] == ["id-06", "id-07", "id-08", "id-09"]


def test_entries_that_are_not_replayed_do_not_count() -> None:
    """Test notifications push nothing out of the history."""
    log = ring_of(4, max_entries=4)
    add(log, range(5, 20), replayed=False)
    assert front_at(log, 20) == 0


def test_so_many_bytes_are_kept() -> None:
    """Every entry counts here, and what is left is within the bound."""
    log = ring_of(9, max_bytes=12)
    assert front_at(log, 9) == 5
    assert log.size == 12


def test_the_names_of_an_audience_count_too() -> None:
    """Else a notification of a few bytes for thousands of names would take far more memory than the bound."""
    log = ring_of(0)
    add(log, [1], audience=Audience(frozenset(["ann"]), frozenset(["red", "blue"])))
    assert log.size == 3 + 3 * NAME_BYTES + len("annredblue")
    log.trim(1)
    assert log.size == 0


def test_entries_are_kept_for_so_long() -> None:
    """What is exactly as old as allowed is still there."""
    log = ring_of(9, max_age=3)
    assert front_at(log, 9) == 5
    assert front_at(log, 9.5) == 6


def test_nothing_is_trimmed_that_has_not_settled() -> None:
    """What is newer than the pass before stays, whatever the bounds say."""
    assert front_at(ring_of(9, max_entries=4), 9, settled=2) == 2


def test_a_trimmed_log_hands_out_what_is_left() -> None:
    """Cursors go on to mean the same broadcast."""
    log = ring_of(5)
    add(log, [6], audience=RED)
    add(log, [7])
    log.trim(3)
    assert log.batch(3) == (b"<4><5><7>", 6, 3)
    assert log.next_owed(3, None) == 3


def test_a_batch_that_was_joined_before_a_trim_is_still_right() -> None:
    """Trimming forgets batches that begin before the front, and no others."""
    log = ring_of(5)
    before = log.batch(3)
    log.trim(3)
    assert log.batch(3) == before == (b"<4><5>", 5, 2)


def test_a_log_that_was_trimmed_to_nothing_goes_on() -> None:
    """Its position is the last id, its front the next sequence, and it hands out what comes then."""
    log = ring_of(3)
    log.trim(3)
    assert (len(log), log.size, log.position, log.front, log.head) == (0, 0, "id-03", 3, 3)
    add(log, [4])
    assert log.batch(3) == (b"<4>", 4, 1)


def test_the_farewell_outlives_the_log() -> None:
    """Who has yet to be told goodbye is told when everything else is gone."""
    log = ring_of(2)
    log.append_farewell(b"<soon>", b"<bye>")
    log.trim(log.expired(NEVER, NEVER))
    assert log.batch(2) == (b"<soon><bye>", 4, 1)


# Where a client resumes.


def test_what_follows_an_id_is_found() -> None:
    """The place after an id is the sequence of the next entry."""
    assert [ring_of(3).find(f"id-{number:02}") for number in (1, 2, 3)] == [1, 2, 3]


def test_the_position_of_an_empty_log_can_be_found() -> None:
    """Who came before the first notification resumes from the beginning."""
    log = ring_of()
    position = log.position
    add(log, [1])
    assert log.find(position) == 0


def test_the_id_just_before_the_front_can_be_found() -> None:
    """Its entry is gone, but everything after it is there."""
    log = ring_of(3)
    log.trim(2)
    assert log.find("id-02") == 2


@pytest.mark.parametrize("id", ["id-01", "id-02x", "id-99", "", FIRST])
def test_an_id_that_proves_nothing_is_not_found(id: str) -> None:
    """Trimmed before the front, never given, ahead of the log, from before a log that has lost its beginning."""
    log = ring_of(3)
    log.trim(2)
    assert log.find(id) is None


def test_the_id_before_a_sequence_is_where_to_resume() -> None:
    """Resuming there gives that entry first: in the log, at its front, and before the first entry."""
    log = ring_of(3)
    assert [log.id_before(sequence) for sequence in range(4)] == [FIRST, "id-01", "id-02", "id-03"]
    log.trim(2)
    assert log.id_before(2) == "id-02"


# Who a notification is for.


@pytest.mark.parametrize(
    ("client_id", "topics", "included"),
    [
        ("ann", [], True),
        ("bob", ["red"], True),
        ("ann", ["red"], True),
        ("bob", ["blue"], False),
        ("bob", [], False),
        (None, ["green", "red"], True),
        (None, [], False),
        ("red", ["ann"], False),
    ],
)
def test_an_audience_is_the_union(client_id: str | None, topics: list[str], included: bool) -> None:
    """A notification for a client and a topic is for that client, and for whoever has the topic."""
    assert Audience(frozenset({"ann"}), frozenset({"red"})).includes(client_id, topics) is included
