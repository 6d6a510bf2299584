"""The hot end of the log, in memory: entries in the order of their ids, each with its ready-made frame.

Owns the numbering of entries and their bounds. A shared store has the rest of the log; with the store in memory this is
all of it. Knows no client, no socket and no clock.

A *position* is a notification's id, as a place in the log. A *sequence* numbers all entries. A *turn* numbers the
broadcasts alone, and a *cursor* is the turn of the next broadcast for a client:

                trimmed  |              kept               | farewell |  appended next
    position    p0   p1  |  p2   p3   p4   p5   p6   p7    |          |
    audience    all  red |  all  ann  all  red  ann  all   |   all    |
    sequence    0    1   |  2    3    4    5    6    7     |          |  8  (next_sequence)
    turn        0        |  1         2              3     |   4      |  5  (next_turn)
                            first_sequence

    A client with cursor 2 that is also owed the sequences [3, 6] is handed p3 p4 p6 p7 and the farewell.

1. Ids increase strictly. A notification for some clients only takes no turn, so it moves no other client's cursor.
2. Entries leave from the front only. The position just before the front is remembered: a client may resume there.
3. The farewell is one entry of two frames. It takes a turn and no sequence; its position is that of another entry.
4. A batch is joined once for all clients with the same cursor and the same list of sequences beside it, and is
   forgotten at the next append.
5. No call does work in proportion to the length of the log.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

# The memory that a name in an audience takes beside its letters: a str object and its place in the set.
NAME_BYTES = 64
# The memory that an entry takes beside its frame: the tuple, its id and numbers, and its places in two lists.
ENTRY_BYTES = 340
# The memory that an audience takes beside its names: a tuple and three sets. Entries may share one audience.
AUDIENCE_BYTES = 750
# The size of a batch, unless a single entry is larger: a client that is far behind must not pin a copy of the whole
# log in its transport.
BATCH_BYTES = 262_144
# The batches that are kept for the next client at the same place: nearly all clients stand at a few places.
BATCHES_KEPT = 64
# A page of the log has at most so many entries and bytes of frames, unless a single entry is larger: a reader must not
# hold the event loop, nor pin much memory in its transport.
PAGE_ENTRIES, PAGE_BYTES = 500, 131_072
# The entries that one page passes over in memory, and that one call finds beyond the bounds: a millisecond or two.
SCANNED_ENTRIES, EXPIRED_AT_ONCE = 2000, 20_000


# --- frames


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """Return a server's frame: unmasked and final (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def payloads(frames: bytes) -> Iterator[bytes]:
    """Yield the payload of each frame in `frames`, all made by frame()."""
    start, end = 0, len(frames)
    while start < end:
        size, start = frames[start + 1], start + 2
        if size == 126:
            (size,), start = struct.unpack_from("!H", frames, start), start + 2
        elif size == 127:
            (size,), start = struct.unpack_from("!Q", frames, start), start + 8
        yield frames[start : start + size]
        start += size


def payload(id: str, rest: bytes) -> bytes:
    """Return a notification as it is sent; `rest` is its JSON behind the id."""
    return b'{"id":"%s"%s' % (id.encode(), rest)


# --- entries


# Before the names of an audience, in the order of its fields.
KINDS = ("c:", "t:", "u:")


class Audience(NamedTuple):
    """The addressees of a notification that is not for everyone: the union of all three.

    Shared stores keep an audience as an array of three arrays of names, in this order. Older ones lack the third.
    """

    clients: frozenset[str]
    topics: frozenset[str]
    users: frozenset[str] = frozenset()

    # Many notifications in a row have the same audience.
    @lru_cache(maxsize=16)  # noqa: B019 - of values that nothing is known to leave
    def size(self) -> int:
        """Return the memory that the names take, in bytes, approximately."""
        names = [*self.clients, *self.topics, *self.users]
        return NAME_BYTES * len(names) + len("".join(names))

    def includes(self, client_id: str | None, user: str, topics: Collection[str]) -> bool:
        return client_id in self.clients or user in self.users or not self.topics.isdisjoint(topics)

    def meets(self, interest: Audience) -> bool:
        """Return whether a client with these names is an addressee."""
        return any(not names.isdisjoint(others) for names, others in zip(self, interest, strict=True))

    def names(self) -> list[str]:
        """Return the names, each with its kind, as a store files the notification under them."""
        return [kind + name for kind, names in zip(KINDS, self, strict=True) for name in names]

    def only(self, has: Callable[[str], bool]) -> Audience:
        """Return the part of it that a store has notifications for."""
        kinds = zip(KINDS, self, strict=True)
        return Audience(*(frozenset(name for name in names if has(kind + name)) for kind, names in kinds))


def interest_of(client_id: str | None, user: str, topics: Collection[str]) -> Audience:
    """Return the names under which notifications for such a client are addressed."""
    return Audience(frozenset((client_id,) if client_id else ()), frozenset(topics), frozenset((user,) if user else ()))


class Entry(NamedTuple):
    """One notification in the log; `audience` None is everyone. `size` counts the bytes of frame and audience."""

    sequence: int
    id: str
    frame: bytes
    size: int
    at: float
    replayed: bool
    audience: Audience | None
    # The connected clients that it was addressed to; None where nobody has counted them.
    addressed: int | None = None

    def is_for(self, client_id: str | None, user: str, topics: Collection[str]) -> bool:
        return self.audience is None or self.audience.includes(client_id, user, topics)


class Batch(NamedTuple):
    """Frames joined for one write, the number of notifications in them, and the client's place after them.

    `pending` lists the sequences that are still owed beside the broadcasts from `cursor` on; None for none.
    """

    frames: bytes
    notifications: int
    cursor: int
    pending: list[int] | None


class Farewell(NamedTuple):
    """The turn of the farewell, and the sequence of the entry with its notification; -1 for none."""

    turn: int
    sequence: int


class Log:
    """Entries bounded by count, bytes and age, and by the memory that they take."""

    __slots__ = (
        "_batches",
        "_broadcasts",
        "_entries",
        "_position_before",
        "_within",
        "_within_bytes",
        "_within_replayed",
        "_within_targeted",
        "farewell",
        "first_sequence",
        "first_turn",
        "max_age",
        "max_bytes",
        "max_entries",
        "max_memory",
        "newest_broadcast",
        "next_sequence",
        "next_turn",
        "position",
        "size",
    )

    def __init__(self, max_entries: int, max_bytes: int, max_age: float, max_memory: float = math.inf) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.max_memory = max_memory
        # The newest id; before the first notification, an id that is older than any.
        self.position = ""
        # The cursor of a client that has been handed every broadcast.
        self.next_turn = 0
        self.next_sequence = 0
        self.newest_broadcast = -1  # its sequence
        # Bytes of the whole log.
        self.size = 0
        self._entries: list[Entry] = []
        self.first_sequence = 0  # of _entries[0]
        self._broadcasts: list[Entry] = []
        self.first_turn = 0  # of _broadcasts[0]
        self.farewell: Farewell | None = None
        self._position_before = ""  # of _entries[0]
        # The sequence of the first entry within the bounds, as far as it is known; the bytes from there on, and the
        # number of entries that count towards max_entries.
        self._within = self._within_bytes = self._within_replayed = self._within_targeted = 0
        # By cursor, with pending entries also by the identity and length of their list. The list is kept beside its
        # batch, so that no other list takes its id().
        self._batches: dict[int | tuple[int, int, int], tuple[list[int] | None, Batch]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def begin(self, before: str) -> None:
        """Set the position before the first entry."""
        self._position_before = self.position = before

    def append(
        self,
        id: str,
        frame: bytes,
        at: float,
        *,
        replayed: bool = True,
        audience: Audience | None = None,
        addressed: int | None = None,
    ) -> int:
        """Add a notification and return its sequence. `at` is in seconds, of the clock that expired() is given."""
        size = len(frame) + (0 if audience is None else audience.size())
        entry = Entry(self.next_sequence, id, frame, size, at, replayed, audience, addressed)
        self._entries.append(entry)
        self.position = id
        self.next_sequence += 1
        if audience is None:
            self._broadcasts.append(entry)
            self.next_turn += 1
            self.newest_broadcast = entry.sequence
        self._batches.clear()
        self.size += size
        self._within_bytes += size
        self._within_replayed += replayed
        self._within_targeted += audience is not None
        return entry.sequence

    def append_farewell(self, notification: bytes, message: bytes, position: str = "") -> None:
        """Add the last two frames for everyone. The notification's position is that of an entry, if there is one."""
        after = self.find(position) or 0
        self.farewell = Farewell(self.next_turn, after - 1 if after > self.first_sequence else -1)
        frames = notification + message
        self._broadcasts.append(Entry(self.next_sequence, self.position, frames, 0, 0.0, False, None))
        self.next_turn += 1
        self.newest_broadcast = self.next_sequence - 1
        self._batches.clear()

    def batch(self, cursor: int, pending: list[int] | None) -> Batch | None:
        """Return the next frames for a client at this place, up to BATCH_BYTES; None where there are none.

        `pending` lists sequences in their order. It may grow afterwards, but must not change otherwise. All clients
        with the same list are handed the same batch, and go on with the same `pending` of that batch.
        """
        if pending is None and cursor == self.next_turn:
            return None
        key = cursor if pending is None else (cursor, id(pending), len(pending))
        if (known := self._batches.get(key)) is None:
            if len(self._batches) >= BATCHES_KEPT:
                self._batches.clear()
            known = self._batches[key] = pending, self._batch_at(cursor, pending or [])
        return known[1]

    def _batch_at(self, cursor: int, pending: list[int]) -> Batch:
        """Join pending entries and broadcasts in the order of their sequences."""
        assert cursor >= self.first_turn, "the broadcast at this cursor is gone"
        assert not pending or pending[0] >= self.first_sequence, "the first pending entry is gone"
        frames: list[bytes] = []
        size = taken = 0
        while taken < len(pending) or cursor < self.next_turn:
            # The farewell has the sequence of the entry that follows it, and comes first.
            takes_turn = cursor < self.next_turn and (
                taken == len(pending) or self._broadcasts[cursor - self.first_turn].sequence <= pending[taken]
            )
            if takes_turn:
                entry = self._broadcasts[cursor - self.first_turn]
            else:
                entry = self._entries[pending[taken] - self.first_sequence]
            if frames and size + len(entry.frame) > BATCH_BYTES:
                break
            frames.append(entry.frame)
            size += len(entry.frame)
            cursor += takes_turn
            taken += not takes_turn
        return Batch(b"".join(frames), len(frames), cursor, pending[taken:] or None)

    def backlog_start(self, cursor: int, pending: list[int] | None) -> int:
        """Return the sequence of the first entry that a client at this place has yet to be handed."""
        index = cursor - self.first_turn
        start = self._broadcasts[index].sequence if index < len(self._broadcasts) else self.next_sequence
        return min(start, pending[0]) if pending else start

    def turn_of(self, sequence: int) -> int:
        """Return the turn of the first broadcast from this sequence on."""
        return self.first_turn + bisect_left(self._broadcasts, sequence, key=attrgetter("sequence"))

    def turn(self, entry: Entry) -> int | None:
        """Return the turn of an entry, or of the farewell with its notification; None where there is none."""
        if self.farewell is not None and self.farewell.sequence == entry.sequence:
            return self.farewell.turn
        # A farewell behind it has the next sequence.
        return self.turn_of(entry.sequence + 1) - 1 if entry.audience is None else None

    def position_of(self, turn: int) -> str:
        """Return the position of the last broadcast before this turn, or of the last entry that has left."""
        index = turn - self.first_turn - 1
        return self._broadcasts[index].id if index >= 0 else self._position_before

    def position_before(self, sequence: int) -> str:
        """Return the position just before the entry of this sequence: a client that resumes there gets that entry."""
        index = sequence - self.first_sequence - 1
        return self._entries[index].id if index >= 0 else self._position_before

    def entry(self, sequence: int) -> Entry:
        return self._entries[sequence - self.first_sequence]

    def sequence_after(self, position: str) -> int:
        """Return the sequence of the first entry after a position, of this log or of another."""
        return self.first_sequence + bisect_right(self._entries, position, key=attrgetter("id"))

    def since(self, sequence: int) -> Iterator[Entry]:
        """Yield the entries from this sequence on."""
        for index in range(max(0, sequence - self.first_sequence), len(self._entries)):
            yield self._entries[index]

    def find(self, position: str) -> int | None:
        """Return the sequence of the entry after this position, or None where the log cannot prove that it gave it."""
        index = bisect_left(self._entries, position, key=attrgetter("id"))
        if index < len(self._entries) and self._entries[index].id == position:
            return self.first_sequence + index + 1
        return self.first_sequence if position == self._position_before else None

    def reach(self, since: str | None, now: float) -> tuple[int, bool]:
        """Return the sequence after `since`, or where the history begins, and whether nothing between is missing.

        Proven means that the log gave the id and has kept everything after it. `since` None asks for everything that
        is kept, empty for nothing.
        """
        if since == "":
            return self.next_sequence, True
        # Expired entries may be here still, until a pass trims them.
        first = self.expired(now, self.next_sequence)
        after = 0 if since is None else self.find(since)
        complete = after is not None and after >= first
        return (after if after is not None and complete else first), complete

    def page(self, start: int, end: int, interest: Audience) -> tuple[list[Entry], int]:
        """Return the entries for such a client from `start` on, and the sequence up to which these are all, or `end`.

        With a smaller `end` they are those before `start`, newest first, down to `end`.
        """
        found: list[Entry] = []
        start, end = max(start, self.first_sequence), max(end, self.first_sequence)
        step = 1 if start <= end else -1
        first, last = sorted((start - self.first_sequence, end - self.first_sequence))
        size, reached = 0, start
        for index in islice(range(first, last)[::step], SCANNED_ENTRIES):
            entry = self._entries[index]
            if entry.audience is None or entry.audience.meets(interest):
                size += len(entry.frame)
                if len(found) == PAGE_ENTRIES or (found and size > PAGE_BYTES):
                    break
                found.append(entry)
            reached += step
        return found, reached

    def expired(self, now: float, limit: int) -> int:
        """Return the sequence up to which the bounds ask to trim, at most `limit`."""
        count = len(self._entries) - (self._within - self.first_sequence)
        for sequence in range(self._within, min(self._within + EXPIRED_AT_ONCE, self.next_sequence)):
            entry = self._entries[sequence - self.first_sequence]
            fits = (
                self._within_replayed <= self.max_entries
                and self._within_bytes <= self.max_bytes
                and now - entry.at <= self.max_age
                and self._within_bytes + ENTRY_BYTES * count + AUDIENCE_BYTES * self._within_targeted <= self.max_memory
            )
            if fits:
                break
            self._within_replayed -= entry.replayed
            self._within_targeted -= entry.audience is not None
            self._within_bytes -= entry.size
            self._within += 1
            count -= 1
        return min(self._within, max(limit, self.first_sequence))

    def trim(self, sequence: int) -> None:
        """Forget the entries before `sequence`. The farewell goes only with the entry that follows it."""
        gone = self._entries[: max(0, sequence - self.first_sequence)]
        if not gone:
            return
        del self._entries[: len(gone)]
        self.first_sequence = sequence
        self._position_before = gone[-1].id
        self.size -= sum(entry.size for entry in gone)
        for entry in gone[max(0, self._within - gone[0].sequence) :]:
            self._within_replayed -= entry.replayed
            self._within_targeted -= entry.audience is not None
            self._within_bytes -= entry.size
        self._within = max(self._within, sequence)
        turns = self.turn_of(sequence) - self.first_turn
        del self._broadcasts[:turns]
        self.first_turn += turns
        self._batches.clear()
