"""The log in memory: the frames for a client at each place, the bounds, and the positions to resume from."""

from __future__ import annotations

import time
from collections.abc import Iterable
from unittest import mock

import pytest

import log as log_module
from log import BATCHES_KEPT, NAME_BYTES, Audience, Batch, Log
from positions import Positions

FIRST = "id-00"
ANN = Audience(frozenset({"ann"}), frozenset())
RED = Audience(frozenset(), frozenset({"red"}))
NEVER = 10**9


def log_of(count: int = 0, *, max_entries: int = 1000, max_bytes: int = 10**6, max_age: float = 60) -> Log:
    """A log with broadcasts id-01, id-02 and so on, at the seconds 1, 2 and so on."""
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


def drawn() -> Log:
    """The log in the drawing at the top of log.py: p0 to p7, with two trimmed, and the farewell."""
    log = Log(1000, 10**6, 60)
    for number, audience in enumerate([None, RED, None, ANN, None, RED, ANN, None]):
        log.append(f"p{number}", b"<p%d>" % number, number, audience=audience)
    log.trim(2)
    log.append_farewell(b"<soon>", b"<bye>")
    return log


def trimmed_to(log: Log, now: float, limit: int = NEVER) -> int:
    """Trim as far as the bounds ask, and return the first sequence after that."""
    log.trim(log.expired(now, limit))
    return log.first_sequence


def batch(log: Log, cursor: int, pending: list[int] | None = None) -> Batch:
    """Return the next batch; there must be one."""
    found = log.batch(cursor, pending)
    assert found is not None
    return found


# The drawing.


def test_sequences_number_all_entries_and_turns_the_broadcasts() -> None:
    """The farewell takes a turn and no sequence."""
    log = drawn()
    assert (log.first_sequence, log.next_sequence, log.next_turn, log.position) == (2, 8, 5, "p7")


def test_a_client_is_handed_its_entries_and_the_broadcasts_in_the_order_of_the_log() -> None:
    """The example under the drawing."""
    assert batch(drawn(), 2, [3, 6]) == (b"<p3><p4><p6><p7><soon><bye>", 5, 5, None)


@pytest.mark.parametrize(
    ("cursor", "frames"),
    [(1, b"<p2><p4><p7><soon><bye>"), (2, b"<p4><p7><soon><bye>"), (3, b"<p7><soon><bye>"), (4, b"<soon><bye>")],
)
def test_a_cursor_is_the_turn_of_the_next_broadcast(cursor: int, frames: bytes) -> None:
    """The notifications in a batch are as many as the turns between the cursor and the next turn."""
    assert batch(drawn(), cursor) == (frames, 5 - cursor, 5, None)


@pytest.mark.parametrize(
    ("cursor", "pending", "start"),
    [(1, None, 2), (2, None, 4), (2, [3, 6], 3), (3, [3], 3), (3, [], 7), (4, None, 8), (4, [6], 6), (5, None, 8)],
)
def test_a_backlog_starts_with_the_older_of_broadcast_and_entry(
    cursor: int, pending: list[int] | None, start: int
) -> None:
    """The farewell counts as the entry that follows it."""
    assert drawn().backlog_start(cursor, pending) == start


# Batches of broadcasts.


def test_a_batch_has_all_frames_from_the_cursor_on() -> None:
    """A batch has all frames from the cursor on in order, with the cursor that comes next."""
    assert batch(log_of(4), 1) == (b"<2><3><4>", 3, 4, None)


def test_at_the_next_turn_there_is_no_batch() -> None:
    """At the next turn there is no batch, in an empty log either."""
    assert log_of(4).batch(4, None) is None
    assert log_of().batch(0, None) is None


def test_clients_at_the_same_cursor_share_a_batch() -> None:
    """The second is handed the very bytes that were joined for the first."""
    log = log_of(4)
    assert batch(log, 1) is batch(log, 1)


def test_an_appended_entry_is_in_the_next_batch() -> None:
    """A batch that was joined before is not handed out after an append."""
    log = log_of(2)
    batch(log, 0)
    add(log, [3])
    assert batch(log, 0) == (b"<1><2><3>", 3, 3, None)


def test_a_targeted_entry_moves_no_cursor() -> None:
    """It is not among the broadcasts, and takes no turn."""
    log = log_of(1)
    add(log, [2], audience=RED)
    add(log, [3])
    assert batch(log, 0) == (b"<1><3>", 2, 2, None)


def test_a_batch_ends_at_its_limit() -> None:
    """The next one goes on from there."""
    log = log_of(5)
    with mock.patch.object(log_module, "BATCH_BYTES", 7):
        assert batch(log, 0) == (b"<1><2>", 2, 2, None)
        assert batch(log, 2) == (b"<3><4>", 2, 4, None)


def test_an_entry_over_the_limit_goes_alone() -> None:
    """No entry is too large for a batch."""
    with mock.patch.object(log_module, "BATCH_BYTES", 1):
        assert batch(log_of(2), 0) == (b"<1>", 1, 1, None)


def test_the_number_of_kept_batches_is_bounded() -> None:
    """Clients at thousands of places must not keep a copy of the log for each of them."""
    log = log_of(3 * BATCHES_KEPT)
    kept = [batch(log, cursor) for cursor in range(3 * BATCHES_KEPT)]
    assert sum(batch(log, cursor) is one for cursor, one in enumerate(kept)) <= BATCHES_KEPT


# Batches with pending entries.


def test_a_replay_comes_before_later_broadcasts() -> None:
    """Entries before the cursor, broadcasts among them, go first."""
    log = log_of(3)
    add(log, [4])
    assert batch(log, 3, [0, 2]) == (b"<1><3><4>", 3, 4, None)


def test_pending_entries_are_a_batch_without_any_broadcast() -> None:
    """The cursor stays."""
    log = log_of(1)
    assert batch(log, 1, add(log, [2, 3], audience=RED)) == (b"<2><3>", 2, 1, None)


def test_a_batch_with_pending_entries_ends_at_its_limit_too() -> None:
    """The rest stays pending; nothing is lost or repeated."""
    log = log_of(3)
    pending = add(log, [4, 5], audience=RED)
    with mock.patch.object(log_module, "BATCH_BYTES", 13):
        assert batch(log, 0, pending) == (b"<1><2><3><4>", 4, 3, [4])
        assert batch(log, 3, [4]) == (b"<5>", 1, 3, None)


def test_clients_with_the_same_pending_list_share_batch_and_rest() -> None:
    """Clients with the same pending list share a batch until something is appended."""
    log = log_of(3)
    pending = add(log, [4, 5], audience=RED)
    with mock.patch.object(log_module, "BATCH_BYTES", 13):
        assert batch(log, 0, pending) is batch(log, 0, pending)
    pending += add(log, [6], audience=RED)
    assert batch(log, 0, pending) == (b"<1><2><3><4><5><6>", 6, 3, None)


def test_a_pending_list_that_has_grown_gets_another_batch() -> None:
    """A stalled client's list grows in place."""
    log = log_of(0)
    one, two = add(log, [1, 2], audience=RED)
    pending = [one]
    assert batch(log, 0, pending).frames == b"<1>"
    pending.append(two)
    assert batch(log, 0, pending).frames == b"<1><2>"


# The farewell.


def test_the_farewell_is_one_notification_and_no_entry() -> None:
    """Its second frame is a message that is not counted, and the position stays that of the newest entry."""
    log = log_of(2)
    log.append_farewell(b"<soon>", b"<bye>")
    assert batch(log, 0) == (b"<1><2><soon><bye>", 3, 3, None)
    assert (len(log), log.position) == (2, "id-02")


def test_the_farewell_is_never_split() -> None:
    """Both frames go in one write, even above the size of a batch."""
    log = log_of(1)
    log.append_farewell(b"<soon>", b"<bye>")
    with mock.patch.object(log_module, "BATCH_BYTES", 4):
        assert batch(log, 0) == (b"<1>", 1, 1, None)
        assert batch(log, 1) == (b"<soon><bye>", 1, 2, None)


def test_the_farewell_comes_after_pending_entries() -> None:
    """A client in the middle of a replay is told goodbye after it."""
    log = log_of(1)
    pending = add(log, [2], audience=RED)
    log.append_farewell(b"<soon>", b"<bye>")
    assert batch(log, 0, pending) == (b"<1><2><soon><bye>", 3, 2, None)


def test_the_farewell_comes_before_the_entries_that_follow_it() -> None:
    """Other hosts go on publishing while this one drains."""
    log = log_of(1)
    log.append_farewell(b"<soon>", b"<bye>")
    pending = add(log, [2], audience=RED)
    add(log, [3])
    assert batch(log, 0, pending) == (b"<1><soon><bye><2><3>", 4, 3, None)


def test_the_farewell_outlives_the_log() -> None:
    """A client that stalls is told goodbye when every entry is gone."""
    log = log_of(2)
    log.append_farewell(b"<soon>", b"<bye>")
    log.trim(log.expired(NEVER, NEVER))
    assert batch(log, 2) == (b"<soon><bye>", 1, 3, None)


def test_the_farewell_goes_with_the_entry_that_follows_it() -> None:
    """Up to there a cursor that points to the farewell keeps its meaning."""
    log = log_of(2)
    log.append_farewell(b"<soon>", b"<bye>")
    add(log, [3, 4])
    log.trim(2)
    assert batch(log, 2) == (b"<soon><bye><3><4>", 3, 5, None)
    log.trim(3)
    assert batch(log, 4) == (b"<4>", 1, 5, None)


# The bounds.


def test_the_number_of_entries_is_bounded() -> None:
    """The oldest go first."""
    log = log_of(9, max_entries=4)
    assert trimmed_to(log, 9) == 5
    assert [entry.id for entry in log.since(0)] == ["id-06", "id-07", "id-08", "id-09"]


def test_entries_that_are_not_replayed_do_not_count() -> None:
    """Test notifications push nothing out of the history."""
    log = log_of(4, max_entries=4)
    add(log, range(5, 20), replayed=False)
    assert trimmed_to(log, 20) == 0


def test_the_bytes_are_bounded() -> None:
    """Every entry counts here, and those that are left are within the bound."""
    log = log_of(9, max_bytes=12)
    assert trimmed_to(log, 9) == 5
    assert log.size == 12


def test_the_names_of_an_audience_count_too() -> None:
    """Else a notification of a few bytes for thousands of names would take far more memory than the bound."""
    log = log_of(0)
    add(log, [1], audience=Audience(frozenset(["ann"]), frozenset(["red", "blue"])))
    assert log.size == 3 + 3 * NAME_BYTES + len("annredblue")
    log.trim(1)
    assert log.size == 0


def test_the_age_of_entries_is_bounded() -> None:
    """An entry that is exactly as old as allowed is still there."""
    log = log_of(9, max_age=3)
    assert trimmed_to(log, 9) == 5
    assert trimmed_to(log, 9.5) == 6


def test_the_bounds_ask_for_nothing_beyond_the_limit() -> None:
    """The fan-out sets it: entries that clients may still need stay."""
    assert trimmed_to(log_of(9, max_entries=4), 9, limit=2) == 2


def test_cursors_keep_their_meaning_when_the_log_is_trimmed() -> None:
    """They point to the same broadcast before and after."""
    log = log_of(5)
    add(log, [6], audience=RED)
    add(log, [7])
    before = batch(log, 3)
    log.trim(3)
    assert batch(log, 3) == before == (b"<4><5><7>", 3, 6, None)
    assert log.backlog_start(3, None) == 3


def test_a_log_that_was_trimmed_to_nothing_goes_on() -> None:
    """The position is the last id, and the numbers go on."""
    log = log_of(3)
    log.trim(3)
    assert (len(log), log.size, log.position, log.first_sequence, log.next_turn) == (0, 0, "id-03", 3, 3)
    add(log, [4])
    assert batch(log, 3) == (b"<4>", 1, 4, None)


# The replay.


def replayed(log: Log, since: str | None, now: float = 0) -> tuple[list[str], bool]:
    """Return the ids of the entries for ann, with the topic blue, after this position, and whether that is complete."""
    start, complete = log.reach(since, now)
    entries, _ = log.page(start, log.next_sequence, Audience(frozenset({"ann"}), frozenset({"blue"})))
    return [entry.id for entry in entries if entry.replayed], complete


def test_a_replay_has_the_addressed_entries_after_the_position() -> None:
    """Entries for other clients and topics are left out, and so are test notifications."""
    log = log_of(2)
    add(log, [3], audience=ANN)
    add(log, [4], audience=RED)
    add(log, [5], replayed=False)
    assert replayed(log, "id-01") == (["id-02", "id-03"], True)


def test_an_empty_position_asks_for_no_replay() -> None:
    """It is the end of the log; no position asks for everything."""
    assert replayed(log_of(2), "") == ([], True)
    assert replayed(log_of(2), None) == (["id-01", "id-02"], True)


def test_a_replay_is_not_complete_unless_the_log_proves_it() -> None:
    """After an unknown position, everything that is kept is replayed."""
    assert replayed(log_of(2), "id-01x") == (["id-01", "id-02"], False)


def test_expired_entries_are_not_replayed() -> None:
    """Expired entries are not replayed, even before they are trimmed. Only their last position is complete."""
    log = log_of(9, max_age=3)
    assert replayed(log, "id-05", now=9) == (["id-06", "id-07", "id-08", "id-09"], True)
    assert replayed(log, "id-04", now=9) == (["id-06", "id-07", "id-08", "id-09"], False)


# Positions.


def test_a_position_leads_to_the_entry_after_it() -> None:
    """Its sequence is found."""
    assert [log_of(3).find(f"id-{number:02}") for number in (1, 2, 3)] == [1, 2, 3]


def test_the_position_of_an_empty_log_can_be_found() -> None:
    """A client that came before the first notification resumes from the beginning."""
    log = log_of()
    position = log.position
    add(log, [1])
    assert log.find(position) == 0


def test_the_position_just_before_the_first_entry_can_be_found() -> None:
    """Its entry is gone, but everything after it is there."""
    log = log_of(3)
    log.trim(2)
    assert log.find("id-02") == 2


@pytest.mark.parametrize("position", ["id-01", "id-02x", "id-99", "", FIRST])
def test_a_position_that_proves_nothing_is_not_found(position: str) -> None:
    """Trimmed before the front, never given, ahead of the log, from before a log that has lost its beginning."""
    log = log_of(3)
    log.trim(2)
    assert log.find(position) is None


def test_a_client_resumes_with_an_entry_from_the_position_before_it() -> None:
    """A client resumes in the log, at its front, and before the first entry."""
    log = log_of(3)
    assert [log.position_before(sequence) for sequence in range(4)] == [FIRST, "id-01", "id-02", "id-03"]
    log.trim(2)
    assert log.position_before(2) == "id-02"


def test_ids_increase_also_when_the_clock_goes_backwards() -> None:
    """Ids increase in one millisecond, after another process's id, and when the clock goes backwards."""
    positions = Positions()
    ids = [positions.next() for _ in range(1000)]
    with mock.patch.object(time, "time_ns", return_value=0):
        ids += [positions.next() for _ in range(1000)]
        ids += [Positions(ids[-1]).next()]
    assert ids == sorted(set(ids))


# Audiences.


@pytest.mark.parametrize(
    ("client_id", "user", "topics", "included"),
    [
        ("ann", "", [], True),
        ("bob", "", ["red"], True),
        ("bob", "cat", [], True),
        ("ann", "cat", ["red"], True),
        ("bob", "dan", ["blue"], False),
        ("bob", "", [], False),
        (None, "", ["green", "red"], True),
        (None, "cat", [], True),
        (None, "", [], False),
        ("red", "ann", ["cat"], False),
        ("cat", "red", ["ann"], False),
    ],
)
def test_an_audience_is_the_union(client_id: str | None, user: str, topics: list[str], included: bool) -> None:
    """A notification is for the client, for every client of the user, and for every subscriber of the topic."""
    audience = Audience(frozenset({"ann"}), frozenset({"red"}), frozenset({"cat"}))
    assert audience.includes(client_id, user, topics) is included


def test_the_memory_of_a_cache_is_bounded() -> None:
    """The bound counts what Python takes for an entry and its audience, beside the frame."""
    log = Log(1000, 10**6, 60, 10 * (log_module.ENTRY_BYTES + 4))
    log.begin(FIRST)
    add(log, range(1, 100))
    assert (trimmed_to(log, 99), len(log)) == (89, 10)
    add(log, [100], audience=RED)
    assert trimmed_to(log, 100) == 93
