"""A client: a connection with a client_id, and its cursor into the log. Owns nothing but itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from connection import Connection

# The bucket of a client's messages: a burst of this many, refilled at this rate.
MESSAGE_BURST, MESSAGES_PER_SECOND = 100.0, 50.0
# Pings are spread over the interval in this many portions.
HEARTBEAT_PHASES = 20
# Who cannot be written to has a list of its own of what it is owed, when it would be longer than this.
SHARED_PENDING = 256
# So has everybody else, where one publish would make more new lists than this: each is copied as long as it is.
SHARED_LISTS = 16


# Two lists of sequences and what they became together, by the ids of the two.
Joined = dict[tuple[int, int], tuple[list[int], list[int], list[int]]]


class Home(Protocol):
    """Who a client tells what happens on its connection: the Hub."""

    clock: Callable[[], float]

    def receive(self, client: Client, message: str | bytes) -> None: ...
    def advance(self, client: Client) -> bool: ...
    def left(self, client: Client) -> None: ...


class Client:
    """One client, and the `Receiver` of its connection."""

    __slots__ = (
        "_home",
        "_owns_pending",
        "_tokens",
        "_tokens_at",
        "client_id",
        "connected_at",
        "connection",
        "cursor",
        "descriptor",
        "heard_at",
        "pending",
        "phase",
        "speaks",
        "topics",
        "user_agent",
    )

    def __init__(
        self, home: Home, connection: Connection, client_id: str, user_agent: str | None, cursor: int, phase: int
    ) -> None:
        self._home = home
        self.connection = connection
        self.client_id = client_id
        self.user_agent = user_agent
        self.cursor = cursor
        # Kept by the connection: where frames may be written past the transport, -1 for nowhere.
        self.descriptor = -1
        # What it is owed beside the broadcasts from its cursor on: sequences of entries for it alone, or of its replay.
        self.pending: list[int] | None = None
        self._owns_pending = False
        self.topics: frozenset[str] = frozenset()
        self.connected_at = self.heard_at = self._tokens_at = home.clock()
        self.phase = phase % HEARTBEAT_PHASES
        # Whether it has ever sent a message, and so would answer a ping message.
        self.speaks = False
        self._tokens = MESSAGE_BURST

    def heard(self) -> None:
        self.heard_at = self._home.clock()

    def received(self, message: str | bytes) -> None:
        self._home.receive(self, message)

    def drained(self) -> None:
        self._home.advance(self)

    def left(self) -> None:
        self._home.left(self)

    def take_token(self) -> bool:
        """Return whether the client may send one more message now."""
        now = self._home.clock()
        tokens = min(MESSAGE_BURST, self._tokens + (now - self._tokens_at) * MESSAGES_PER_SECOND)
        self._tokens_at = now
        self._tokens = tokens - 1
        return tokens >= 1

    def can_prove_life(self) -> bool:
        """Whether it would be heard if it were alive: else silence is no reason to close it."""
        return self.connection.hears_pongs or self.speaks

    def owe(self, sequences: list[int], joined: Joined) -> None:
        """Owe the client these entries too, all newer than what it is owed already.

        Whoever is owed the same keeps the same list, by which the pass knows that; `joined` is for all
        clients of one publish. A client that stalls and is far behind has a list of its own, which only grows: it
        costs a publish the same however far behind it is. So have clients that are owed different things.
        """
        if self.pending is None:
            self.pending, self._owns_pending = sequences, False
        elif self._owns_pending:
            self.pending += sequences
        elif len(self.pending) + len(sequences) > SHARED_PENDING and not self._may_share(sequences, joined):
            self.pending, self._owns_pending = [*self.pending, *sequences], True
        else:
            key = id(self.pending), id(sequences)
            if (known := joined.get(key)) is None:
                known = joined[key] = self.pending, sequences, [*self.pending, *sequences]
            self.pending = known[2]

    def _may_share(self, sequences: list[int], joined: Joined) -> bool:
        key = id(self.pending), id(sequences)
        return self.connection.writable and (key in joined or len(joined) < SHARED_LISTS)
