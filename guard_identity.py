"""The rights of a key or token. Deny by default.

An Identity is a plain value, however it was found; knows no HTTP, no token, no key and no client. Without
authentication there are no identities, and everything is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec import UNSET, Struct

from errors import Forbidden, NotifydError, Unauthorized
from log import Audience
from schemas import NotifyRequest

# Names of topics; a trailing * makes a name a prefix.
Patterns = tuple[str, ...]
ALL: Patterns = ("*",)


class Identity(Struct, frozen=True, kw_only=True):
    """The rights of a key or token; with `known` False, of requests without credentials."""

    known: bool = True
    # For logs: the name of the key, or the subject of the token.
    name: str = ""
    # The user that its client belongs to; empty: none; None: any that the client names.
    user: str | None = ""
    topics: Patterns = ()
    # The topics that its client is subscribed to at once, and so may subscribe to as well.
    subscribe: frozenset[str] = frozenset()
    # Whether it may publish everything. If not, only notifications that name nothing but such topics.
    publishes: bool = False
    publish_topics: Patterns = ()
    admin: bool = False
    # Seconds since the epoch, None for never and for unknown.
    expires_at: float | None = None
    # Whether the same credentials stand for it again, but for an end or a revocation; a host's may change their mind.
    is_lasting: bool = False
    issued_at: float | None = None

    def check_admin(self) -> None:
        """Raise Forbidden, or Unauthorized, unless it may read the figures and the history."""
        if not self.admin:
            raise self._refusal("Not allowed: this needs admin")

    def check_publisher(self) -> None:
        """Raise Forbidden, or Unauthorized, unless it may publish anything."""
        if not self.publishes and not self.publish_topics:
            raise self._refusal("Not allowed: to publish")

    def check_reader(self, audience: Audience | None) -> None:
        """Raise Forbidden unless it is admin, or might publish a notification for this audience."""
        if not (self.admin or self.publishes):
            is_by_topic = audience is not None and not audience.clients and not audience.users
            self._check_topics_of(sorted(audience.topics) if audience is not None and is_by_topic else ())

    def check_admin_or_publisher(self) -> None:
        """Raise Forbidden, or Unauthorized, unless it is admin or may publish anything."""
        if not self.admin:
            self.check_publisher()

    def check_publish(self, requests: Sequence[NotifyRequest]) -> None:
        """Raise Forbidden for the first notification that it may not publish."""
        if self.publishes:
            return
        for request in requests:
            is_by_topic = request.clients is UNSET and request.users is UNSET
            self._check_topics_of(request.topics if is_by_topic and request.topics is not UNSET else ())

    def _check_topics_of(self, topics: Sequence[str]) -> None:
        """Raise Forbidden unless it may publish a notification for these topics alone."""
        if not topics:
            raise Forbidden("Not allowed: to publish other than by topic")
        for topic in topics:
            if not _matches(topic, self.publish_topics):
                raise Forbidden(f"Not allowed: to publish to topic {topic[:64]}")

    def own_user(self, asked: str) -> str:
        """Return the user of its client, empty for none. Raises Forbidden where another user is asked for."""
        if self.user is None:
            return asked
        if asked and asked != self.user:
            raise Forbidden("Not allowed: user")
        return self.user

    def check_client_id(self, asked: str) -> None:
        """Raise Forbidden for a client_id that does not begin with its user. Without a user every client_id will do."""
        if self.user and asked != self.user and not asked.startswith(f"{self.user}:"):
            raise Forbidden(f"Not allowed: client_id must be {self.user} or begin with {self.user}:")

    def allows(self, topic: str) -> bool:
        """Whether its client may subscribe to the topic."""
        return topic in self.subscribe or _matches(topic, self.topics)

    def check_topics(self, topics: Iterable[str]) -> None:
        """Raise Forbidden for the first topic that it may not subscribe to."""
        for topic in sorted(topics):
            if not self.allows(topic):
                raise Forbidden(f"Not allowed: topic {topic[:64]}")

    def _refusal(self, message: str) -> NotifydError:
        return Forbidden(message) if self.known else Unauthorized("Authentication required")


# The right that a path needs. Raises Forbidden or Unauthorized.
Right = Callable[[Identity], None]


def shown_address(address: str) -> str:
    """Return an address as logs have it: IPv4 as such on a socket for both families, and no text of any other size."""
    return repr(address.removeprefix("::ffff:") or "unix")[1:-1][:64]


def origin_of(address: str, identity: Identity | None) -> str:
    """Return, for a log, the address that a publish or a connection comes from, and the name that it has shown."""
    named = f" as {identity.name[:64]!r}" if identity is not None and identity.name else ""
    return shown_address(address) + named


def _matches(topic: str, patterns: Patterns) -> bool:
    return any(topic.startswith(one[:-1]) if one.endswith("*") else topic == one for one in patterns)
