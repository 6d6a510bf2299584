"""The operations of one process on their way to Redis: waiting, in flight, and done where the log is yet to be read.

Owns their order and their answers. Knows no connection and no key; store_redis.py runs the groups.

1. Operations are done in the order in which they were added, a group at a time: all of a group, or none.
2. A group is answered when this process has read the log up to the place where it was done.
3. An operation without an answer is refused to nobody: it waits until it is done. A client that leaves is forgotten
   here where a join removes it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, NamedTuple

from errors import StoreUnavailable
from store_redis_link import Argument

# The arguments of one group, about, so that it keeps Redis busy for no more than about 10 ms.
GROUP_ARGUMENTS = 4000


class _Operation(NamedTuple):
    arguments: tuple[Argument, ...]
    answer: asyncio.Future[Any] | None


class Operations:
    """The queue of one process."""

    def __init__(self) -> None:
        self._waiting: deque[_Operation] = deque()
        self._in_flight: list[_Operation] = []
        # Groups that were done at a place of the log that this process has yet to read, with their replies.
        self._done: deque[tuple[int, list[_Operation], list[Any]]] = deque()

    def add(self, *arguments: Argument, answer: asyncio.Future[Any] | None = None) -> None:
        """Have an operation wait: its name and its arguments, as the script reads them."""
        self._waiting.append(_Operation(arguments, answer))

    def is_idle(self) -> bool:
        return not self._in_flight and not self._waiting

    def next_group(self) -> list[Argument]:
        """Return the arguments of the operations that go to Redis now; none if none wait."""
        arguments: list[Argument] = []
        while self._waiting and len(arguments) < GROUP_ARGUMENTS:
            self._in_flight.append(operation := self._waiting.popleft())
            arguments += operation.arguments
        return arguments

    def done(self, seq: int, replies: list[Any]) -> None:
        """Take the replies to the group, and the number of the newest entry then."""
        self._done.append((seq, self._in_flight, replies))
        self._in_flight = []

    def put_back(self) -> None:
        """Have the group wait again: nothing of it was done.

        Changes of clients that were done and not answered yet are refused: the next join undoes them.
        """
        self._waiting.extendleft(reversed(self._in_flight))
        self._in_flight = []
        for operation in (operation for _, group, _ in self._done for operation in group):
            if operation.arguments[0] in ("admit", "subscribe"):
                _refuse(operation, "The store is away: this process was taken for dead")

    def answer(self, seq: int) -> None:
        """Answer the groups that were done up to this place of the log."""
        while self._done and self._done[0][0] <= seq:
            _, group, replies = self._done.popleft()
            for operation, reply in zip(group, replies, strict=True):
                if operation.answer is not None and not operation.answer.done():
                    operation.answer.set_result(reply)

    def refuse(self, failure: str) -> None:
        """Refuse all that have an answer."""
        done = [operation for _, group, _ in self._done for operation in group]
        for operation in (*done, *self._in_flight, *self._waiting):
            _refuse(operation, failure)
        others = [operation for operation in (*self._in_flight, *self._waiting) if operation.answer is None]
        self.clear()
        self._waiting.extend(others)

    def forget_leaving(self) -> None:
        """Forget the clients that leave: a join removes all that are gone."""
        self._waiting = deque(operation for operation in self._waiting if operation.arguments[0] != "leave")

    def clear(self) -> None:
        self._waiting.clear()
        self._in_flight = []
        self._done.clear()


def _refuse(operation: _Operation, failure: str) -> None:
    if operation.answer is not None and not operation.answer.done():
        operation.answer.set_exception(StoreUnavailable(failure))
