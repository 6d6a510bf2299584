"""The tally: how many clients have been handed each notification, as sums of changes.

Counts the hand-overs of this process as they are made, by groups of clients that stand at one place. Where the log goes
on in a store, the counts do as well: they are taken by id, before the numbers of the log in memory are forgotten. Knows
no client, no store and no clock; log.py draws the numbers.

1. Clients that are handed the broadcasts of a range of turns are a step up at its first turn, and a step down behind
   its last one. A broadcast has been handed to the sum of the steps up to its turn. Where pass follows on pass, the
   steps between them cancel out: steady traffic leaves two.
2. An entry that takes no turn, or is handed over out of turn, is counted by its sequence.
3. Nothing is counted for each client where clients stand together.
4. The fan-out only notes its hand-overs. They are summed up when somebody asks, and before entries leave the memory.
"""

from __future__ import annotations

from log import Entry, Log
from store import Counts

# A cursor and the pending entries beside it.
Place = tuple[int, list[int] | None]
# What is counted for a reader: entries with their changes.
Changes = list[tuple[Entry, int]]

# Parts of pages that are not counted yet: each takes a tenth of a millisecond, and keeps its entries in memory.
PARTS_NOTED = 4


class Tally:
    """The hand-overs of one process: of all entries in its memory, or with a stored log those since take()."""

    def __init__(self, log: Log, *, is_stored: bool) -> None:
        self._log = log
        self._is_stored = is_stored
        # Of so many clients the places before and after a hand-over. The pending entries of a place are handed over in
        # their order, and a list of them does not change any more once a client has been handed some.
        self.notes: list[tuple[Place, Place, int]] = []
        # The turns before and behind the broadcasts that single clients are handed, with their number.
        self.moves: dict[tuple[int, int], int] = {}
        # By turn; those of the turns that have left the memory are in one sum.
        self._steps: dict[int, int] = {}
        self._steps_before = 0
        # By sequence.
        self._counts: dict[int, int] = {}
        # By sequence, the clients of this process that a farewell was addressed to.
        self._addressed: dict[int, int] = {}
        # What readers were handed, by identity, with their number: many are handed the same.
        self._parts: dict[int, tuple[Changes, int]] = {}
        self._taken = Counts({}, {}, {})

    def sum_up(self) -> None:
        """Count the hand-overs that are noted."""
        notes, counts = self.notes.copy(), self._counts
        self.notes.clear()
        for (cursor, end), clients in self.moves.items():
            self._step(cursor, end, clients)
        self.moves.clear()
        # Clients that do not stand in a slice's group are noted one by one, at the same places.
        alike: dict[tuple[int, int, int, int], tuple[Place, Place, int]] = {}
        for before, after, clients in notes:
            key = before[0], id(before[1]), after[0], id(after[1])
            known = alike.get(key)
            alike[key] = before, after, clients + (0 if known is None else known[2])
        for (cursor, pending), (end, left), clients in alike.values():
            if end != cursor:
                self._step(cursor, end, clients)
            if pending is not None:
                for sequence in pending if left is None else pending[: len(pending) - len(left)]:
                    counts[sequence] = counts.get(sequence, 0) + clients
        while self._parts:
            self._count_part(next(iter(self._parts)))

    def _step(self, first: int, end: int, clients: int) -> None:
        """Count clients that are handed the broadcasts from one turn up to another."""
        farewell = self._log.farewell
        if farewell is not None and first <= farewell.turn < end:
            # Its turn is this process's own, so it is counted as the entry that it is.
            if farewell.sequence >= 0:
                self._count(farewell.sequence, clients)
            if first < farewell.turn:
                self._step(first, farewell.turn, clients)
            first = farewell.turn + 1
            if first == end:
                return
        steps = self._steps
        if begun := steps.pop(first, 0) + clients:
            steps[first] = begun
        steps[end] = steps.get(end, 0) - clients

    def _count(self, sequence: int, clients: int) -> None:
        self._counts[sequence] = self._counts.get(sequence, 0) + clients

    def read(self, changes: Changes, broadcasts: tuple[str, str] | None) -> None:
        """Count a reader by these changes, and by the broadcasts after one position and up to another.

        The changes are one list for all readers that are handed the same, and stay as they are.
        """
        _, readers = self._parts.pop(id(changes), (changes, 0))
        self._parts[id(changes)] = changes, readers + 1
        if len(self._parts) > PARTS_NOTED:
            self._count_part(next(iter(self._parts)))
        if broadcasts is None:
            return
        if self._is_stored:
            for position, change in zip(broadcasts, (1, -1), strict=True):
                _add(self._taken.steps, position, change)
            return
        first, end = (self._log.turn_of(self._log.sequence_after(position)) for position in broadcasts)
        if first != end:
            self._step(first, end, 1)

    def _count_part(self, key: int) -> None:
        changes, readers = self._parts.pop(key)
        for entry, change in changes:
            if self._is_stored:
                _add(self._taken.written, entry.id, change * readers)
            else:
                self._count(entry.sequence, change * readers)

    def before_trim(self, until: int) -> None:
        """Forget the entries before a sequence, which are about to leave the memory."""
        self.sum_up()
        log = self._log
        if self._is_stored:
            self._name()
            return
        for turn in range(log.first_turn, log.turn_of(until)):
            self._steps_before += self._steps.pop(turn, 0)
        for sequence in range(log.first_sequence, until):
            self._counts.pop(sequence, None)

    def _name(self) -> None:
        """Give everything that is counted by its number its id."""
        log, taken = self._log, self._taken
        for turn, change in self._steps.items():
            _add(taken.steps, log.position_of(turn), change)
        for sequence, count in self._counts.items():
            _add(taken.written, log.entry(sequence).id, count)
        for sequence, count in self._addressed.items():
            _add(taken.addressed, log.entry(sequence).id, count)
        for numbered in (self._steps, self._counts, self._addressed):
            numbered.clear()

    @property
    def untold(self) -> int:
        """The number of notifications with a count that the store has not been told of."""
        return len(self._taken.written)

    def take(self) -> Counts:
        """Return everything that is counted since the last call, for the store."""
        self.sum_up()
        self._name()
        taken, self._taken = self._taken, Counts({}, {}, {})
        return taken

    def put_back(self, counts: Counts) -> None:
        """Take back counts that the store has not been told of."""
        for taken, numbers in zip(self._taken, counts, strict=True):
            for id, change in numbers.items():
                _add(taken, id, change)

    def announce(self, clients: int) -> None:
        """Count the clients that the farewell is addressed to: the store's record is for nobody."""
        farewell = self._log.farewell
        if farewell is not None and farewell.sequence >= 0:
            self._addressed[farewell.sequence] = clients

    def addressed(self, entry: Entry) -> int:
        """Return the number of clients of this process that an entry was addressed to beside those of its record."""
        return self._addressed.get(entry.sequence, 0)

    def written(self, entry: Entry) -> int:
        """Return the number of clients that have been handed an entry."""
        self.sum_up()
        count = self._counts.get(entry.sequence, 0)
        if entry.audience is None:
            turn = self._log.turn(entry)
            assert turn is not None
            count += self._steps_before + sum(step for first, step in self._steps.items() if first <= turn)
        return count


def _add(numbers: dict[str, int], id: str, change: int) -> None:
    if left := numbers.pop(id, 0) + change:
        numbers[id] = left
