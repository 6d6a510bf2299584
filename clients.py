"""The clients of this process: by client_id in the order of their admission, by user, by topic, and as they expire.

Owns a client's state between its connection and the Hub, and the two directions of every index. Knows connections
through the seam in connection.py.

1. Only admission.py adds and removes clients; only conversation.py changes the topics of a client after that.
2. Both directions of an index change together: a client is in the group of each of its names, and in no other.
3. The addressees of a notification cost as much as the audience is large, however many other clients there are.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator, Set
from typing import TYPE_CHECKING

from connection import Connection
from log import Audience, interest_of
from schemas import POLICY_VIOLATION
from store import Registration

if TYPE_CHECKING:
    from admission import Newcomer
    from hub import Hub
    from readers import Reading

# Messages that a client may send at once, and per second after that (a token bucket).
MESSAGE_BURST = 100.0
MESSAGES_PER_SECOND = 50.0
# Pings are spread over the interval in this many portions, so that answers do not come as one wave.
HEARTBEAT_PHASES = 20
# The addressees of this many audiences are remembered: each audience is asked for twice, to count and to deliver, and
# the next notification often has the same.
AUDIENCES_REMEMBERED = 8
# No topics: one set for all clients, because each empty frozenset is another, of 216 bytes.
NO_TOPICS: frozenset[str] = frozenset()
# Before every sequence, and before the position of an empty log.
UNTOLD = -2
# How often expired clients are looked for.
SWEEP_SECONDS = 1.0
# How many of them are closed in one step, at about 12 us each.
SWEPT_AT_ONCE = 250
# The ended subscriptions of a client that are remembered, so that a later replay does not repeat their notifications.
ENDED_KEPT = 256


class Client:
    """A connection with a client_id and its place in the log; the `Receiver` of the connection."""

    __slots__ = (
        "_hub",
        "_tokens",
        "_tokens_at",
        "address",
        "client_id",
        "connected_at",
        "connection",
        "cursor",
        "descriptor",
        "followed",
        "follows",
        "granted",
        "heard_at",
        "identity",
        "is_named",
        "joined",
        "listed_until",
        "owns_pending",
        "peer",
        "pending",
        "phase",
        "reading",
        "speaks",
        "takes_positions",
        "told",
        "topics",
        "user",
        "user_agent",
    )

    def __init__(self, hub: Hub, connection: Connection, newcomer: Newcomer, phase: int) -> None:
        self._hub = hub
        self.connection = connection
        self.client_id = newcomer.client_id
        # Whether it can come back under this client_id: the server has not made that up.
        self.is_named = newcomer.is_named
        # Empty for none.
        self.user = newcomer.user
        self.user_agent = newcomer.user_agent
        self.address = newcomer.address
        # Its own address, for admins and the log.
        self.peer = newcomer.peer
        # None without authentication.
        self.identity = newcomer.identity
        self.cursor = 0
        # Set by the connection: the socket, if the fan-out may write frames to it by itself, or -1.
        self.descriptor = -1
        # Sequences of entries that the client is owed beside the broadcasts from its cursor on: targeted ones, and
        # those of its replay. Only the fan-out changes the list, and only one that the client owns.
        self.pending: list[int] | None = None
        self.owns_pending = False
        # Entries before this sequence are owed to it if they are pending or broadcasts from its cursor on; from there
        # on all are that it follows.
        self.listed_until = 0
        # Set while the client stands too far behind for a cursor, and is handed the log page by page.
        self.reading: Reading | None = None
        # Whether it resumes by itself, and so is told its position while it receives nothing.
        self.takes_positions = newcomer.since is not None or connection.is_stream
        # The newest sequence with a position that the client knows, or will know when it has been handed its pending
        # entries; it knows those of broadcasts as well.
        self.told = UNTOLD
        self.topics = NO_TOPICS
        # The topics among them that its token or an admin has set: it keeps them without a right.
        self.granted = NO_TOPICS if newcomer.identity is None else newcomer.identity.subscribe
        # The position from which on it is owed its notifications, and its topics since then, once they have changed.
        self.follows = ""
        # The position at which it has joined: of those before, it is handed its replay alone.
        self.joined = ""
        self.followed: Followed | None = None
        self.connected_at = self.heard_at = self._tokens_at = hub.clock()
        self.phase = phase % HEARTBEAT_PHASES
        # Whether the client has ever sent a message, and so would answer a ping message.
        self.speaks = False
        self._tokens = MESSAGE_BURST

    def heard(self) -> None:
        self.heard_at = self._hub.clock()

    def received(self, message: str | bytes) -> None:
        self._hub.conversation.receive(self, message)

    def drained(self) -> None:
        self._hub.publishers.drained(self)
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

    def interest(self) -> Audience:
        """Return the names under which notifications for it may be addressed."""
        topics = self.topics if self.followed is None else self.topics | self.followed.topics()
        return interest_of(self.client_id, self.user, topics)

    def is_owed(self, position: str, audience: Audience | None) -> bool:
        """Return whether it follows the notification at this position of the log, which is for this audience."""
        if audience is None or self.followed is None:
            return audience is None or audience.includes(self.client_id, self.user, self.topics)
        is_named = audience.includes(self.client_id, self.user, ())
        return is_named or self.followed.includes(position, audience.topics)

    def subscriptions(self) -> Followed:
        """Return, for each topic, the positions from a subscription on, up to its end."""
        if self.followed is None:
            self.followed = Followed(self.topics, self.follows)
        return self.followed

    def registration(self, topics: frozenset[str]) -> Registration:
        """Return the client as the registry is to have it."""
        return Registration(self.client_id, self.user, topics, self.address)

    def can_prove_life(self) -> bool:
        """Whether a live client would be heard. If not, its silence is no reason to close it."""
        return (self.connection.hears_pongs or self.speaks) and not self.connection.is_mute()


class Followed:
    """For each topic the positions that a client is handed: after that of a subscription, up to that of its end."""

    __slots__ = ("_ended", "_since")

    def __init__(self, topics: Iterable[str], position: str) -> None:
        self._since = dict.fromkeys(topics, position)
        self._ended: deque[tuple[str, str, str]] = deque(maxlen=ENDED_KEPT)

    def copy(self) -> Followed:
        copied = Followed((), "")
        copied._since, copied._ended = self._since.copy(), self._ended.copy()
        return copied

    def begin(self, topics: Iterable[str], position: str) -> None:
        """Note that the client is handed the notifications for these topics after this position."""
        for topic in topics:
            self._since[topic] = min(position, self._since.get(topic, position))

    def end(self, topics: Iterable[str], position: str) -> None:
        """Note that the client is handed those for these topics up to this position."""
        for topic in topics:
            if (start := self._since.pop(topic, position)) < position:
                self._ended.append((topic, start, position))

    def spans(self) -> Iterator[tuple[str, str, str]]:
        """Yield the topics with the positions after which and up to which they count; the others are not ended."""
        yield from self._ended
        yield from ((topic, since, "") for topic, since in self._since.items())

    def topics(self) -> frozenset[str]:
        """Return all topics, the ended ones too."""
        return frozenset((*self._since, *(topic for topic, _, _ in self._ended)))

    def includes(self, position: str, topics: Set[str]) -> bool:
        """Return whether the client is handed the notification at this position for these topics."""
        return any(position > self._since[topic] for topic in topics & self._since.keys()) or any(
            topic in topics and start < position <= end for topic, start, end in self._ended
        )


class Clients:
    """All clients, by client_id, by user and by topic."""

    def __init__(self) -> None:
        # To be read by all, changed here alone.
        self.by_id: dict[str, Client] = {}
        # No group without a client. Read by all, too.
        self.by_user: dict[str, set[Client]] = {}
        self.by_topic: dict[str, set[Client]] = {}
        self._addressed: dict[Audience, Set[Client]] = {}

    def __len__(self) -> int:
        return len(self.by_id)

    def __iter__(self) -> Iterator[Client]:
        return iter(self.by_id.values())

    def __contains__(self, client: Client) -> bool:
        return self.by_id.get(client.client_id) is client

    def add(self, client: Client, topics: frozenset[str]) -> None:
        self.by_id[client.client_id] = client
        if client.user:
            self.by_user.setdefault(client.user, set()).add(client)
        self.subscribe(client, topics)

    def remove(self, client: Client) -> None:
        del self.by_id[client.client_id]
        if client.user:
            _part(self.by_user, client.user, client)
        self.subscribe(client, NO_TOPICS)

    def subscribe(self, client: Client, topics: frozenset[str]) -> None:
        """Set the topics of a client."""
        self._addressed.clear()
        for name in client.topics - topics:
            _part(self.by_topic, name, client)
        for name in topics - client.topics:
            self.by_topic.setdefault(name, set()).add(client)
        client.topics, client.granted = topics or NO_TOPICS, client.granted & topics or NO_TOPICS

    def count(self, audience: Audience | None) -> int:
        """Return the number of clients in an audience; None is everyone."""
        return len(self.by_id) if audience is None else len(self.addressed(audience))

    def addressed(self, audience: Audience) -> Set[Client]:
        """Return the clients of an audience. Valid until a client comes, goes, or changes its topics."""
        if (known := self._addressed.get(audience)) is None:
            groups = [*_found(self.by_topic, audience.topics), *_found(self.by_user, audience.users)]
            if audience.clients:
                groups.append({client for name in audience.clients if (client := self.by_id.get(name)) is not None})
            if len(self._addressed) >= AUDIENCES_REMEMBERED:
                self._addressed.clear()
            # A single group is not copied, so a topic of all clients costs no more than a topic of a few.
            known = self._addressed[audience] = groups[0] if len(groups) == 1 else set().union(*groups)
        return known


def _found(groups: dict[str, set[Client]], names: Iterable[str]) -> Iterator[set[Client]]:
    return (members for name in names if (members := groups.get(name)) is not None)


def _part(groups: dict[str, set[Client]], name: str, client: Client) -> None:
    """Take a client out of a group."""
    groups[name].discard(client)
    if not groups[name]:
        del groups[name]


class ExpiringClients:
    """Closes clients when their identity expires, by one sweep for all that runs only while any client can expire."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._clients: set[Client] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, client: Client) -> None:
        """Close the client when its identity, a new one or a renewed one, expires."""
        if client.identity is None or client.identity.expires_at is None:
            self.forget(client)
            return
        self._clients.add(client)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    def forget(self, client: Client) -> None:
        """Let the client go: it has left, or cannot expire any more."""
        self._clients.discard(client)
        if not self._clients and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)
        # The clock on the wall: an expiry is an agreement with other machines.
        now = time.time()
        expired = [
            client
            for client in self._clients
            if client.identity and client.identity.expires_at is not None and client.identity.expires_at <= now
        ]
        if len(expired) > SWEPT_AT_ONCE:
            self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(0, self._sweep)
        for client in expired[:SWEPT_AT_ONCE]:
            self._hub.admission.dismiss(client, POLICY_VIOLATION, "Token expired")
