"""The clients of this process: by client_id in the order of their admission, and by topic.

1. Both directions of the topics change together: a client is in the set of each of its topics, and of no other.
2. What a notification for some clients costs depends on its audience, not on how many clients there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from client import Client
from ring import Audience


class Directory:
    """Who is connected, and who follows what."""

    def __init__(self) -> None:
        self._clients: dict[str, Client] = {}
        self._topics: dict[str, set[Client]] = {}

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
        for topic in client.topics - topics:
            self._topics[topic].discard(client)
            if not self._topics[topic]:
                del self._topics[topic]
        for topic in topics - client.topics:
            self._topics.setdefault(topic, set()).add(client)
        client.topics = topics

    def count(self, audience: Audience | None) -> int:
        """Return how many clients a notification is addressed to."""
        if audience is None:
            return len(self._clients)
        named = {client for name in audience.clients if (client := self._clients.get(name)) is not None}
        groups = sorted((*self._followers(audience.topics), named), key=len)
        # The largest is only counted, not copied: a topic that all follow costs as much as one that few follow.
        largest = groups.pop()
        return len(largest) + len(set().union(*groups) - largest)

    def _followers(self, topics: Iterable[str]) -> Iterator[set[Client]]:
        for topic in topics:
            if (followers := self._topics.get(topic)) is not None:
                yield followers

    def owed(self, targeted: Sequence[tuple[int, Audience]]) -> Iterator[tuple[Client, list[int]]]:
        """Yield who is owed which of these (sequence, audience); all who are owed the same get the same list.

        Each client is visited once for each of its topics that is used, not once for each notification.
        """
        by_topic: dict[str, list[int]] = {}
        by_client: dict[str, list[int]] = {}
        for sequence, audience in targeted:
            for topic in audience.topics:
                by_topic.setdefault(topic, []).append(sequence)
            for client_id in audience.clients:
                by_client.setdefault(client_id, []).append(sequence)
        followed: dict[Client, list[str]] = {}
        for topic in by_topic:
            for client in self._topics.get(topic, ()):
                followed.setdefault(client, []).append(topic)
        named = {self._clients[name]: own for name, own in by_client.items() if name in self._clients}
        merged: dict[tuple[tuple[int, ...], tuple[str, ...]], list[int]] = {}
        for client in {**followed, **named}:
            own, topics = named.get(client, ()), followed.get(client, ())
            if (sequences := merged.get(key := (tuple(own), tuple(topics)))) is None:
                sequences = merged[key] = sorted(set(own).union(*(by_topic[topic] for topic in topics)))
            yield client, sequences
