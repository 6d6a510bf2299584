"""The log in memory: entries in the order of their ids, and the ready-made frames of each.

Owns positions and what is kept. Knows no client, no socket and no clock of its own.

1. Ids increase strictly. An entry's `sequence` counts all entries; its `turn` counts the broadcasts before it.
2. A cursor is a turn: the next broadcast that a client has not been handed. A notification for some clients
   only takes no turn, so it moves nobody else's cursor.
3. What is trimmed is gone from the front; nothing is ever removed from the middle. The id just before the
   front is remembered, because a client may stand there.
4. A batch is joined once for all clients that stand at the same cursor, and forgotten at the next append; so is one
   for all who are owed the same list beside.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Collection, Iterator
from operator import attrgetter
from typing import NamedTuple

# What a name in an audience takes in memory beside its letters.
NAME_BYTES = 64
# One write hands a client at most about this much, so that a client that is far behind does not pin a copy of
# the whole log in its transport.
BATCH_BYTES = 262_144
# So many batches with what clients are owed beside are kept for the next one who is owed the same.
MERGED = 8


class Audience(NamedTuple):
    """Who a notification is for, where it is not for everyone: the union of both."""

    clients: frozenset[str]
    topics: frozenset[str]

    def size(self) -> int:
        """Return about how many bytes it takes in memory."""
        return sum(len(name) + NAME_BYTES for names in self for name in names)

    def includes(self, client_id: str | None, topics: Collection[str]) -> bool:
        return client_id in self.clients or not self.topics.isdisjoint(topics)


class Entry(NamedTuple):
    """One notification as it stands in the log; `audience` None is everyone. `size` counts frame and audience."""

    sequence: int
    turn: int
    id: str
    frame: bytes
    size: int
    at: float
    replayed: bool
    audience: Audience | None


class Batch(NamedTuple):
    """Frames joined for one write, the cursor behind them, and how many notifications they are."""

    frames: bytes
    end: int
    notifications: int


class Log:
    """Entries bounded by count, bytes and age."""

    __slots__ = (
        "_batches",
        "_before_front",
        "_broadcasts",
        "_bytes",
        "_entries",
        "_farewell",
        "_front",
        "_front_turn",
        "_merged",
        "_replayed",
        "max_age",
        "max_bytes",
        "max_entries",
    )

    def __init__(self, max_entries: int, max_bytes: int, max_age: float) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.max_age = max_age
        self._entries: list[Entry] = []
        self._front = 0  # the sequence of _entries[0]
        self._before_front = ""
        self._broadcasts: list[Entry] = []
        self._front_turn = 0  # the turn of _broadcasts[0]
        self._bytes = 0
        self._farewell = -1  # the cursor behind the two frames of the farewell, once there is one
        self._replayed = 0  # entries that count towards max_entries
        self._batches: dict[int, Batch] = {}
        # By cursor, and by the list that is owed with its length then. The list is kept, so that it is no other's id.
        self._merged: dict[tuple[int, int, int], tuple[list[int], Batch, list[int]]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """The bytes of the whole log."""
        return self._bytes

    @property
    def head(self) -> int:
        """The turn that the next broadcast will take."""
        return self._front_turn + len(self._broadcasts)

    @property
    def front(self) -> int:
        """The sequence of the oldest entry that is still there."""
        return self._front

    @property
    def next_sequence(self) -> int:
        return self._front + len(self._entries)

    @property
    def position(self) -> str:
        """The newest id; before the first notification, one that is older than any."""
        return self._entries[-1].id if self._entries else self._before_front

    def begin(self, before: str) -> None:
        """Say which id comes before all that will be appended."""
        self._before_front = before

    def append(
        self, id: str, frame: bytes, at: float, *, replayed: bool = True, audience: Audience | None = None
    ) -> int:
        """Add a notification and return its sequence. `at` is in seconds, of the clock that expired() is given."""
        size = len(frame) + (0 if audience is None else audience.size())
        entry = Entry(self.next_sequence, self.head, id, frame, size, at, replayed, audience)
        self._entries.append(entry)
        self._merged.clear()
        if audience is None:
            self._broadcasts.append(entry)
            self._batches.clear()
        self._bytes += size
        self._replayed += replayed
        return entry.sequence

    def append_farewell(self, notification: bytes, message: bytes) -> None:
        """Add the last two frames for everyone. They are not in the log: of the first, that is another entry."""
        for frame in (notification, message):
            self._broadcasts.append(Entry(self.next_sequence, self.head, self.position, frame, 0, 0.0, False, None))
        self._farewell = self.head
        self._batches.clear()
        self._merged.clear()

    def batch(self, cursor: int) -> Batch | None:
        """Return what lies between the cursor and the head, up to BATCH_BYTES; None at the head."""
        found = self._batches.get(cursor)
        if found is None and cursor < self.head:
            found = self._batches[cursor] = self._join(cursor)
        return found

    def _join(self, cursor: int) -> Batch:
        frames = [entry.frame for entry in self._broadcasts[cursor - self._front_turn :]]
        size = 0
        for count, frame in enumerate(frames):
            if size and size + len(frame) > BATCH_BYTES:
                del frames[count:]
                break
            size += len(frame)
        end = cursor + len(frames)
        return Batch(b"".join(frames), end, len(frames) - (cursor < self._farewell <= end))

    def merge(self, cursor: int, pending: list[int]) -> tuple[Batch, list[int]]:
        """Return the next batch of a client that is also owed the entries `pending`, and what of these is left.

        `pending` holds sequences in their order; an entry comes before the broadcasts whose turn is not before its own.
        It may grow afterwards, but not change; what is left is one list for all who are owed the same.
        """
        key = cursor, id(pending), len(pending)
        if (known := self._merged.get(key)) is None:
            if len(self._merged) >= MERGED:
                self._merged.clear()
            known = self._merged[key] = pending, *self._merge(cursor, pending)
        _, batch, left = known
        return batch, left

    def _merge(self, cursor: int, pending: list[int]) -> tuple[Batch, list[int]]:
        assert pending[0] >= self._front, "owed what is gone"
        frames: list[bytes] = []
        size = taken = notices = 0
        while taken < len(pending) or cursor < self.head:
            entry = self._entries[pending[taken] - self._front] if taken < len(pending) else None
            if owed := entry is None or entry.turn > cursor:
                entry = self._broadcasts[cursor - self._front_turn]
            if frames and size + len(entry.frame) > BATCH_BYTES:
                break
            frames.append(entry.frame)
            size += len(entry.frame)
            cursor += owed
            taken += not owed
            notices += owed and cursor == self._farewell
        return Batch(b"".join(frames), cursor, len(frames) - notices), pending[taken:]

    def next_owed(self, cursor: int, pending: list[int] | None) -> int:
        """Return the sequence of the first entry that a client with this cursor has yet to be handed."""
        index = cursor - self._front_turn
        owed = self._broadcasts[index].sequence if index < len(self._broadcasts) else self.next_sequence
        return min(owed, pending[0]) if pending else owed

    def behind(self, cursor: int) -> int:
        """Return how many broadcasts lie between the cursor and the head; the message of the farewell is none."""
        return self.head - cursor - (cursor < self._farewell)

    def id_before(self, sequence: int) -> str:
        """Return the id just before this sequence: whoever resumes there gets what follows."""
        index = sequence - self._front - 1
        return self._entries[index].id if index >= 0 else self._before_front

    def since(self, sequence: int) -> Iterator[Entry]:
        """Yield the entries from this sequence on."""
        for index in range(max(0, sequence - self._front), len(self._entries)):
            yield self._entries[index]

    def expired(self, now: float, settled: int) -> int:
        """Return the sequence up to which the bounds ask to trim, but not beyond `settled`."""
        drop, replayed, size = 0, self._replayed, self._bytes
        limit = min(settled - self._front, len(self._entries))
        while drop < limit:
            entry = self._entries[drop]
            within = replayed <= self.max_entries and size <= self.max_bytes and now - entry.at <= self.max_age
            if within:
                break
            replayed -= entry.replayed
            size -= entry.size
            drop += 1
        return self._front + drop

    def _turn_of(self, sequence: int) -> int:
        """Return the first turn at or after the entry with this sequence. The farewell stays, whatever is trimmed."""
        index = sequence - self._front
        if index < len(self._entries):
            return self._entries[index].turn
        return self.head - 2 * (self._farewell == self.head)

    def trim(self, sequence: int) -> None:
        """Forget the entries before `sequence`."""
        drop = sequence - self._front
        if drop <= 0:
            return
        front_turn = self._turn_of(sequence)
        gone = self._entries[:drop]
        self._before_front = gone[-1].id
        self._bytes -= sum(entry.size for entry in gone)
        self._replayed -= sum(entry.replayed for entry in gone)
        del self._entries[:drop]
        self._front = sequence
        del self._broadcasts[: front_turn - self._front_turn]
        self._front_turn = front_turn
        self._batches = {cursor: batch for cursor, batch in self._batches.items() if cursor >= front_turn}
        self._merged.clear()

    def find(self, id: str) -> int | None:
        """Return the sequence of the entry after this id, or None where the log cannot prove that it gave it."""
        index = bisect_left(self._entries, id, key=attrgetter("id"))
        if index < len(self._entries) and self._entries[index].id == id:
            return self._front + index + 1
        return self._front if id == self._before_front else None


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """Return one unmasked, final frame."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def payloads(frames: bytes) -> Iterator[bytes]:
    """Yield the payload of each of our own frames that stand one after the other in `frames`."""
    position, end = 0, len(frames)
    while position < end:
        size, start = frames[position + 1], position + 2
        if size == 126:
            (size,), start = struct.unpack_from("!H", frames, start), start + 2
        elif size == 127:
            (size,), start = struct.unpack_from("!Q", frames, start), start + 8
        position = start + size
        yield frames[start:position]
