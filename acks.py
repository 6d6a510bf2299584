"""Acknowledgements: how far each client of this process has dealt with its notifications.

Takes what clients acknowledge, and has their bookmarks written down in groups. Knows the store through the seam in
bookmarks.py, and neither HTTP nor the form of a message.

1. A client that acknowledges nothing costs nothing here.
2. An acknowledgement is written down within WRITE_SECONDS, however many there are: of each client the last. When a
   client leaves, it is written down before the store hears of that, so the next of its client_id finds it.
3. A client_id that the server has made up is nobody's to come back with: its acknowledgements count while it is here.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING

from bookmarks import NOWHERE, Bookmark, Owner, Span
from clients import Client
from errors import InvalidRequest
from schemas import MAX_SHOWN, is_position

if TYPE_CHECKING:
    from hub import Hub

WRITE_SECONDS = 0.5
# Bookmarks in one group, and the pause behind it: the other operations of the store take their turns.
GROUP, PAUSE_SECONDS = 100, 0.005


class Acks:
    """What this process's clients have acknowledged."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        # Clients that have acknowledged, or resumed from a bookmark; an id for each.
        self._acknowledged: dict[Client, str] = {}
        # Those with bookmarks that are to be written down.
        self._unwritten: dict[Client, None] = {}

    def take(self, client: Client, id: str) -> bool:
        """Note that a client has dealt with everything up to an id. Return whether that is news, and possible."""
        id = id.lower()
        if not self._acknowledged.get(client, "") < id <= self._hub.fanout.log.position or not is_position(id):
            return False
        self._note(client, id)
        # A client that resumes by its acknowledgements, and receives nothing, acknowledges the positions.
        client.takes_positions = True
        return True

    def check(self, id: str) -> None:
        """Raise InvalidRequest unless the log may have given this id."""
        if not is_position(id.lower()):
            raise InvalidRequest(f"id: expected the id of a notification, got {id[:MAX_SHOWN]!r}")
        if id.lower() > self._hub.fanout.log.position:
            raise InvalidRequest("id: ahead of the log")

    def _note(self, client: Client, id: str) -> None:
        self._acknowledged[client] = id
        if client.is_named:
            self._unwritten[client] = None

    # --- resume

    async def position_of(self, client_id: str, user: str) -> str:
        """Return the position of a client's bookmark; empty where nothing is known of it. Raises StoreUnavailable."""
        found = await self._hub.store.bookmarks.find(Owner(client_id, user))
        return "" if found is None else found.position

    async def newest(self, client: Client) -> str:
        """Return the newest id that a client has acknowledged, now or before it came. Raises StoreUnavailable."""
        return self.acknowledged(client) or await self.position_of(client.client_id, client.user)

    def went_on(self, client: Client, position: str) -> None:
        """Note that a client has resumed from its bookmark: that outlives this connection, too."""
        if position > NOWHERE and client in self._hub.clients:
            self._note(client, position)

    # --- what is known

    def acknowledged(self, client: Client) -> str:
        """Return the newest id that a client has acknowledged; empty for none."""
        return self._acknowledged.get(client, "")

    def unnamed(self) -> list[Client]:
        """Return the clients that have acknowledged, and whose bookmarks are not written down."""
        return [client for client in self._acknowledged if not client.is_named]

    def bookmark(self, client: Client) -> Bookmark | None:
        """Return the bookmark of this connection of a client."""
        if (position := self._acknowledged.get(client)) is None:
            return None
        if client.followed is None:
            spans = [Span(topic, client.follows, "") for topic in client.topics]
        else:
            spans = [Span(*span) for span in client.followed.spans()]
        return Bookmark(Owner(client.client_id, client.user), position, (*spans, Span("", client.follows, "")))

    # --- to the store

    def write_down(self) -> None:
        """Have all bookmarks written down before the next operation of the store."""
        self._write(self._unwritten)

    async def write_regularly(self) -> None:
        """Write bookmarks down for ever; all of them once in history_ttl, since they are kept for a time."""
        hub = self._hub
        renewed_at = hub.clock()
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            if hub.clock() - renewed_at > hub.settings.history_ttl:
                renewed_at = hub.clock()
                self._unwritten.update(dict.fromkeys(client for client in self._acknowledged if client.is_named))
            left = len(self._unwritten)
            while left > 0 and hub.store.failure is None:
                some = dict.fromkeys(islice(self._unwritten, min(left, GROUP)))
                left -= GROUP
                self._write(some)
                await asyncio.sleep(PAUSE_SECONDS)

    def _write(self, clients: dict[Client, None]) -> None:
        bookmarks = [bookmark for client in clients if (bookmark := self.bookmark(client)) is not None]
        for client in list(clients):
            self._unwritten.pop(client, None)
        self._hub.store.bookmarks.keep(bookmarks)

    def forget(self, client: Client) -> None:
        """Write down the bookmark of a client that leaves."""
        if client in self._acknowledged:
            if client.is_named:
                self._write({client: None})
            del self._acknowledged[client]
