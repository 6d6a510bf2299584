"""The clients of this process: by client_id in the order of their admission, and by topic.

1. Both directions of the topics change together: a client is in the set of each of its topics, and of no other.
2. What a notification for some clients costs depends on its audience, not on how many clients there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING

from connection import Connection
from log import Audience

if TYPE_CHECKING:
    from guard_identity import Identity
    from hub import Hub

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


class Client:
    """One client, and the `Receiver` of its connection."""

    __slots__ = (
        "_hub",
        "_owns_pending",
        "_tokens",
        "_tokens_at",
        "address",
        "client_id",
        "connected_at",
        "connection",
        "cursor",
        "descriptor",
        "heard_at",
        "identity",
        "pending",
        "phase",
        "speaks",
        "topics",
        "user_agent",
    )

    def __init__(
        self,
        hub: Hub,
        connection: Connection,
        client_id: str,
        user_agent: str | None,
        cursor: int,
        phase: int,
        address: str,
    ) -> None:
        self._hub = hub
        self.address = address
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
        # None without authentication.
        self.identity: Identity | None = None
        self.connected_at = self.heard_at = self._tokens_at = hub.clock()
        self.phase = phase % HEARTBEAT_PHASES
        # Whether it has ever sent a message, and so would answer a ping message.
        self.speaks = False
        self._tokens = MESSAGE_BURST

    def heard(self) -> None:
        self.heard_at = self._hub.clock()

    def received(self, message: str | bytes) -> None:
        self._hub.conversation.receive(self, message)

    def drained(self) -> None:
        self._hub.fanout.advance(self)

    def left(self) -> None:
        self._hub.admission.left(self)

    def take_token(self) -> bool:
        """Return whether the client may send one more message now."""
        now = self._hub.clock()
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


# So many audiences are remembered with those who are in them.
REMEMBERED = 8


class Clients:
    """Who is connected, and who follows what."""

    def __init__(self) -> None:
        self._clients: dict[str, Client] = {}
        self._topics: dict[str, set[Client]] = {}
        # Whom the last notifications were addressed to: it is asked twice for each, and the next is often alike.
        self._addressed: dict[Audience, Set[Client]] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[Client]:
        return iter(self._clients.values())

    def __contains__(self, client: Client) -> bool:
        return self._clients.get(client.client_id) is client

    def get(self, client_id: str) -> Client | None:
        return self._clients.get(client_id)

    def add(self, client: Client, topics: frozenset[str]) -> None:
        self._clients[client.client_id] = client
        self.subscribe(client, topics)

    def remove(self, client: Client) -> None:
        del self._clients[client.client_id]
        self.subscribe(client, frozenset())

    def subscribe(self, client: Client, topics: frozenset[str]) -> None:
        """Change what a client is subscribed to."""
        self._addressed.clear()
        for topic in client.topics - topics:
            self._topics[topic].discard(client)
            if not self._topics[topic]:
                del self._topics[topic]
        for topic in topics - client.topics:
            self._topics.setdefault(topic, set()).add(client)
        client.topics = topics

    def count(self, audience: Audience | None) -> int:
        """Return how many clients a notification is addressed to."""
        return len(self._clients) if audience is None else len(self.addressed(audience))

    def addressed(self, audience: Audience) -> Set[Client]:
        """Return whom a notification is addressed to. Valid until somebody comes, goes, or changes topics."""
        if (known := self._addressed.get(audience)) is None:
            groups = [followers for topic in audience.topics if (followers := self._topics.get(topic)) is not None]
            if audience.clients:
                groups.append({client for name in audience.clients if (client := self._clients.get(name)) is not None})
            if len(self._addressed) >= REMEMBERED:
                self._addressed.clear()
            # Copied only where there are several: a topic that all follow costs no more than one that few follow.
            known = self._addressed[audience] = groups[0] if len(groups) == 1 else set().union(*groups)
        return known

    def owed(self, targeted: Sequence[tuple[int, Audience]]) -> Iterator[tuple[Client, list[int]]]:
        """Yield who is owed which of these (sequence, audience); all who are owed the same get the same list.

        Each client is visited once for each different audience that it is in, not once for each notification.
        """
        by_audience: dict[Audience, list[int]] = {}
        for sequence, audience in targeted:
            by_audience.setdefault(audience, []).append(sequence)
        if len(by_audience) == 1:
            [(audience, sequences)] = by_audience.items()
            for client in self.addressed(audience):
                yield client, sequences
            return
        included: dict[Client, list[Audience]] = {}
        for audience in by_audience:
            for client in self.addressed(audience):
                included.setdefault(client, []).append(audience)
        merged: dict[tuple[Audience, ...], list[int]] = {}
        for client, audiences in included.items():
            key = tuple(audiences)
            if key not in merged:
                merged[key] = sorted(sequence for one in audiences for sequence in by_audience[one])
            yield client, merged[key]
