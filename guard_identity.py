"""The rights of a key or token, and the clients that expire with it.

An Identity is a plain value, however it was found; knows no HTTP, no token and no key. Without authentication there are
no identities, and everything is allowed.

1. Deny by default.
2. A refused renewal changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from msgspec import UNSET, Struct

from errors import Forbidden, NotifydError, Unauthorized
from schemas import POLICY_VIOLATION, NotifyRequest

if TYPE_CHECKING:
    from clients import Client
    from hub import Hub

# How often expired clients are looked for.
SWEEP_SECONDS = 1.0

# Names of topics; a trailing * makes a name a prefix.
Patterns = tuple[str, ...]
ALL: Patterns = ("*",)


class Identity(Struct, frozen=True, kw_only=True):
    """The rights of a key or token; with `known` False, of requests without credentials."""

    known: bool = True
    # For logs: the name of the key, or the subject of the token.
    name: str = ""
    # The client_id of its client; empty: the server makes an id; None: any.
    client_id: str | None = ""
    topics: Patterns = ()
    # Whether it may publish everything. If not, only notifications that name nothing but such topics.
    publishes: bool = False
    publish_topics: Patterns = ()
    admin: bool = False
    # Seconds since the epoch, None for never.
    expires_at: float | None = None

    def check_admin(self) -> None:
        """Raise Forbidden, or Unauthorized, unless it may read the figures and the history."""
        if not self.admin:
            raise self._refusal("Not allowed: this needs admin")

    def check_publisher(self) -> None:
        """Raise Forbidden, or Unauthorized, unless it may publish anything."""
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
        """Return the client_id of its client; empty or None: make an id. Raises Forbidden for another's."""
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

    def _refusal(self, message: str) -> NotifydError:
        return Forbidden(message) if self.known else Unauthorized("Authentication required")


def shown_address(address: str) -> str:
    """Return an address as logs have it: IPv4 as such on a socket for both families, and no text of any other size."""
    return repr(address.removeprefix("::ffff:") or "unix")[1:-1][:64]


def origin_of(address: str, identity: Identity | None) -> str:
    """Return, for a log, the address that a publish or a connection comes from, and the name that it has shown."""
    named = f" as {identity.name[:64]!r}" if identity is not None and identity.name else ""
    return shown_address(address) + named


def _matches(topic: str, patterns: Patterns) -> bool:
    return any(topic.startswith(one[:-1]) if one.endswith("*") else topic == one for one in patterns)


class ExpiringClients:
    """Closes clients whose identity has expired. One sweep looks for them; it runs only while any client can expire."""

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

    def renew(self, client: Client, identity: Identity) -> None:
        """Let another identity of the same client limit it. Raises Forbidden if the client could not be the identity's.

        A refused renewal changes nothing.
        """
        held = client.identity
        # A client with an id made by the server keeps it with another token without a client_id.
        nameless = held is not None and held.client_id == identity.client_id == ""
        identity.own_client_id(None if nameless else client.client_id)
        identity.check_topics(client.topics)
        client.identity = identity
        self.watch(client)

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
        for client in list(self._clients):
            identity = client.identity
            if identity is not None and identity.expires_at is not None and identity.expires_at <= now:
                self._hub.admission.dismiss(client, POLICY_VIOLATION, "Token expired")
