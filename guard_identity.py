"""Who somebody is and what they may, as plain values, whoever has found it out.

Knows no HTTP, no token and no key. Without authentication nobody has an Identity, and everybody may do everything.

1. What is not said to be allowed is refused.
2. A client is in `Identities` only where its identity limits it, or did not name it; a refused renewal changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from msgspec import UNSET, Struct

from clients import Client
from errors import Forbidden, NotifydError, Unauthorized
from schemas import NotifyRequest

# How often the clients are looked through for those whose time is over.
SWEEP_SECONDS = 1.0

# Names of topics; those with a trailing * stand for all that begin so.
Patterns = tuple[str, ...]
ALL: Patterns = ("*",)


class Identity(Struct, frozen=True, kw_only=True):
    """What one key or token stands for; not `known`: what everybody may who shows neither."""

    known: bool = True
    # The client_id that it has as a client: empty for one that the server makes up, None for any.
    client_id: str | None = ""
    topics: Patterns = ()
    # Whether it may publish everything; else only notifications that are for such topics alone.
    publishes: bool = False
    publish_topics: Patterns = ()
    admin: bool = False
    # Seconds since the epoch, None for never.
    expires_at: float | None = None

    def check_admin(self) -> None:
        """Raise Forbidden, or Unauthorized, unless it may see what concerns everybody."""
        if not self.admin:
            raise self._refusal("Not allowed: this needs admin")

    def check_publisher(self) -> None:
        """Raise Forbidden, or Unauthorized, unless there is something that it may publish."""
        if not self.publishes and not self.publish_topics:
            raise self._refusal("Not allowed: to publish")

    def check_publish(self, requests: Sequence[NotifyRequest]) -> None:
        """Raise Forbidden for the first notification that it may not publish."""
        if self.publishes:
            return
        for request in requests:
            if request.clients is not UNSET or request.topics is UNSET:
                raise Forbidden("Not allowed: to publish other than by topic")
            for topic in request.topics:
                if not _matches(topic, self.publish_topics):
                    raise Forbidden(f"Not allowed: to publish to topic {topic[:64]}")

    def own_client_id(self, client_id: str | None) -> str | None:
        """Return the client_id of its client, empty or None for one that is to be made up. Raises Forbidden."""
        if self.client_id is None:
            return client_id
        if client_id and client_id != self.client_id:
            raise Forbidden("Not allowed: another client_id than the token's sub")
        return self.client_id

    def check_topics(self, topics: Iterable[str]) -> None:
        """Raise Forbidden for the first topic that it may not subscribe to."""
        for topic in sorted(topics):
            if not _matches(topic, self.topics):
                raise Forbidden(f"Not allowed: topic {topic[:64]}")

    def limits(self) -> bool:
        """Whether there is anything that a client with it may not do, now or later; or its client_id was made up."""
        return self.expires_at is not None or self.topics != ALL or self.client_id == ""

    def _refusal(self, message: str) -> NotifydError:
        return Forbidden(message) if self.known else Unauthorized("Authentication required")


def _matches(topic: str, patterns: Patterns) -> bool:
    return any(topic.startswith(one[:-1]) if one.endswith("*") else topic == one for one in patterns)


class Identities:
    """The clients that their identity limits. One sweep finds those whose time is over; it runs only while any are."""

    def __init__(self, close_expired: Callable[[Client], None], now: Callable[[], float] = time.time) -> None:
        """`now` is the clock on the wall: an expiry is an agreement with other machines."""
        self._close_expired = close_expired
        self._now = now
        self._known: dict[Client, Identity] = {}
        self._timer: asyncio.TimerHandle | None = None

    def set(self, client: Client, identity: Identity | None) -> None:
        """Let this identity limit the client from now on; one that limits nothing lets it go."""
        if identity is not None and identity.limits():
            self._known[client] = identity
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)
        elif self._known.pop(client, None) is not None and not self._known and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def renew(self, client: Client, identity: Identity) -> None:
        """Let another identity of the same client limit it. Raises Forbidden where the client could not be its."""
        held = self._known.get(client)
        # Whose client_id was made up keeps it with another token that has none.
        nameless = held is not None and held.client_id == identity.client_id == ""
        identity.own_client_id(None if nameless else client.client_id)
        identity.check_topics(client.topics)
        self.set(client, identity)

    def check_topics(self, client: Client, topics: Iterable[str]) -> None:
        """Raise Forbidden for a topic that the client may not subscribe to."""
        if (identity := self._known.get(client)) is not None:
            identity.check_topics(topics)

    def _sweep(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)
        now = self._now()
        for client, identity in list(self._known.items()):
            if identity.expires_at is not None and identity.expires_at <= now:
                self._close_expired(client)
