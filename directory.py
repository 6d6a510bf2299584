"""The clients of this process: by client_id in the order of their admission, and by topic.

1. Both directions of the topics change together: a client is in the set of each of its topics, and of no other.
2. What a notification for some clients costs depends on its audience, not on how many clients there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from client import Client
from ring import Audience

# So many audiences are remembered with those who are in them.
REMEMBERED = 8


class Directory:
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
