"""Presence: the clients, users and topics of all processes.

Each process knows its own clients whole, so a page is made of the parts of all of them. The number of clients that a
user has is in the registry of the store. Knows no HTTP.

1. A page has the names behind a cursor, in their order. A process answers with its first names, and whether it has
   more. The page ends at the first of these ends, so no client that stays is left out.
2. Nothing holds the event loop in proportion to the number of clients: names are looked through in portions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

import schemas
from clients import Client
from conversation import Change
from errors import InvalidRequest, NotFound, StoreUnavailable, Unauthorized
from guard_identity import shown_address
from schemas import MAX_TOPICS, POLICY_VIOLATION, ConnectedClient, timestamp
from slices import in_slices
from streams import PutOut

if TYPE_CHECKING:
    from admission import Newcomer
    from hub import Hub

# Names are looked through in portions of this size: a fraction of a millisecond.
PORTION = 1000
# A part of a page is no longer than this, unless one client is.
PART_BYTES = 1_048_576
# How often revocations are read from the store.
FOLLOW_SECONDS = 1.0
# The JSON of a client beside its topics, about.
CLIENT_BYTES = 512
_CLIENT_ID_OF = attrgetter("client_id")

Item = TypeVar("Item")


class Wanted(Struct, frozen=True):
    """The clients with all of these; empty is any."""

    client_id: str = ""
    user: str = ""
    topic: str = ""

    def fits(self, client: Client | Newcomer) -> bool:
        return (
            (not self.client_id or client.client_id == self.client_id)
            and (not self.user or client.user == self.user)
            and (not self.topic or self.topic in client.topics)
        )


class Part(Struct):
    """The part of one process in a page: values by name, in the order of the names, and whether there are more."""

    found: dict[str, Any]
    more: bool = False
    # Of all pages.
    total: int = 0


class Presence:
    """Answers for all processes of a Hub, and for this one alone to the others."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def answer(self, question: dict[str, Any]) -> Any:
        """Return this process's answer to a question about its clients."""
        match question:
            case {"ask": "clients", "wanted": wanted, "after": after, "limit": limit}:
                return await self._clients_here(schemas.check(wanted, Wanted), after, limit)
            case {"ask": "topics", "prefix": prefix, "after": after, "limit": limit}:
                return await self._topics_here(prefix, after, limit)
            case {"ask": "disconnect", "wanted": wanted, "reason": reason, "revoked": revoked}:
                return await self._disconnect_here(schemas.check(wanted, Wanted), reason, revoked)
            case {"ask": "most", "user": user, "subscribe": subscribe, "unsubscribe": unsubscribe}:
                await self._hub.admission.settle(Wanted(user=user).fits)
                change, clients = Change.of(subscribe, unsubscribe), list(self._hub.clients.by_user.get(user, ()))
                return max([len(change.applied(client.topics)) async for _, client in in_slices(clients)], default=0)
            case {"ask": "change", "user": user, "subscribe": subscribe, "unsubscribe": unsubscribe}:
                return await self._change_here(user, subscribe, unsubscribe)
        raise AssertionError(f"an unknown question: {question}")

    async def _everywhere(self, question: dict[str, Any], kind: Any) -> list[Any]:
        """Return the answers of all processes. Raises StoreUnavailable."""
        await self._hub.start()
        here, there = await self.answer(question), await self._hub.questions.ask_everyone(question)
        return [here, *(schemas.check(answer, kind) for answer in there)]

    # --- clients

    async def clients(self, wanted: Wanted, after: str, limit: int) -> tuple[list[ConnectedClient], int, str | None]:
        """Return the first clients behind a client_id, the number of all, and the client_id to go on from."""
        question = {"ask": "clients", "wanted": schemas.to_plain(wanted), "after": after, "limit": limit}
        parts = await self._everywhere(question, Part)
        found: dict[str, Any] = {}
        names, goes_on = page_of(parts, found, limit)
        page = [schemas.check(found[name], ConnectedClient) async for _, name in in_slices(names)]
        return page, sum(part.total for part in parts), goes_on

    async def client(self, client_id: str) -> ConnectedClient:
        """Return a client. Raises NotFound."""
        page, *_ = await self.clients(Wanted(client_id=client_id), "", 1)
        if not page:
            raise _unknown(client_id)
        return page[0]

    async def _clients_here(self, wanted: Wanted, after: str, limit: int) -> Part:
        first, total = await first_of(self._group(wanted), _CLIENT_ID_OF, after, limit + 1, wanted.fits)
        part, size = Part({}, total=total), 0
        async for number, client in in_slices(first):
            if number == limit or size > PART_BYTES:
                part.more = True
                break
            part.found[client.client_id] = self._shown(client)
            size += CLIENT_BYTES + sum(map(len, client.topics))
        return part

    def _group(self, wanted: Wanted) -> Collection[Client]:
        """Return the smallest group of clients that includes all wanted ones."""
        clients, groups = self._hub.clients, list[Collection[Client]]()
        if wanted.client_id:
            client = clients.by_id.get(wanted.client_id)
            groups.append(() if client is None else (client,))
        if wanted.user:
            groups.append(clients.by_user.get(wanted.user, ()))
        if wanted.topic:
            groups.append(clients.by_topic.get(wanted.topic, ()))
        return min(groups, key=len, default=clients.by_id.values())

    def _shown(self, client: Client) -> dict[str, Any]:
        wall_time = self._hub.census.wall_time
        return {
            "client_id": client.client_id,
            "user": client.user or None,
            "topics": sorted(client.topics),
            "connected_at": timestamp(wall_time(client.connected_at)),
            "last_ping": timestamp(wall_time(client.heard_at)),
            "user_agent": client.user_agent,
            "address": shown_address(client.peer) if client.peer else None,
            "transport": "sse" if client.connection.is_stream else "websocket",
        }

    async def disconnect(self, client_id: str, reason: str) -> None:
        """Close a client for good. Raises NotFound or StoreUnavailable."""
        if not await self._disconnect(Wanted(client_id=client_id), reason):
            raise _unknown(client_id)

    async def _disconnect(self, wanted: Wanted, reason: str, revoked: int | None = None) -> int:
        question = {"ask": "disconnect", "wanted": schemas.to_plain(wanted), "reason": reason, "revoked": revoked}
        return sum(await self._everywhere(question, int))

    async def _disconnect_here(self, wanted: Wanted, reason: str, revoked: int | None) -> int:
        hub, count = self._hub, 0
        # First: a newcomer with a revoked token must not join behind the others.
        if revoked is not None and hub.revocations is not None:
            hub.revocations.add(wanted.user, revoked)
        # Those in the registry count as connected, so they must not join behind the others either.
        await hub.admission.settle(wanted.fits)
        async for _, client in in_slices(list(self._group(wanted))):
            if client in hub.clients:
                hub.admission.dismiss(client, POLICY_VIOLATION, PutOut(reason))
                count += 1
        return count

    # --- users

    async def disconnect_user(self, user: str, reason: str, *, revoke: bool = False) -> int:
        """Close all clients of a user for good, and return their number; with `revoke` refuse the user's tokens.

        These are the tokens that were issued up to now. Raises InvalidRequest where the server reads no tokens, or
        StoreUnavailable.
        """
        await self._hub.start()
        revoked = None
        if revoke:
            if self._hub.revocations is None:
                raise InvalidRequest("revoke: there are no tokens, so none can be revoked")
            revoked = await self._hub.revocations.revoke(user)
        return await self._disconnect(Wanted(user=user), reason, revoked)

    async def follow_revocations(self) -> None:
        """Read revocations from the store for ever, and close clients that no question has closed."""
        hub, revocations = self._hub, self._hub.revocations
        assert revocations is not None
        while True:
            # A question comes within a second of its revocation, and with a reason.
            due, revocations.learned = revocations.learned, []
            with contextlib.suppress(StoreUnavailable):
                await revocations.read()
            for user in due:
                async for _, client in in_slices(list(hub.clients.by_user.get(user, ()))):
                    try:
                        if client in hub.clients and client.identity is not None:
                            revocations.check(client.identity)
                    except Unauthorized:
                        hub.admission.dismiss(client, POLICY_VIOLATION, PutOut("Token revoked"))
            await asyncio.sleep(FOLLOW_SECONDS)

    async def change_topics(self, user: str, subscribe: Collection[str], unsubscribe: Collection[str]) -> int:
        """Change the topics of all clients that a user has now, and return their number.

        Raises InvalidRequest where a client would have too many topics; none is changed then. Raises StoreUnavailable.
        """
        question = {"ask": "change", "user": user, "subscribe": [*subscribe], "unsubscribe": [*unsubscribe]}
        most = max(await self._everywhere({**question, "ask": "most"}, int))
        if most > MAX_TOPICS:
            raise InvalidRequest(f"subscribe: at most {MAX_TOPICS} topics a client, and this would make {most}")
        return sum(await self._everywhere(question, int))

    async def _change_here(self, user: str, subscribe: Collection[str], unsubscribe: Collection[str]) -> int:
        changes = []
        async for _, client in in_slices(list(self._hub.clients.by_user.get(user, ()))):
            changes.append(Change.of(subscribe, unsubscribe))
            self._hub.conversation.change_topics(client, changes[-1])
        count = 0
        async for _, change in in_slices(changes):
            if not change.done.done():
                await asyncio.wait([change.done])
            # Cancelled where the client has left, and refused where it has had other changes meanwhile.
            refusal = None if change.done.cancelled() else change.done.exception()
            if isinstance(refusal, StoreUnavailable):
                raise refusal
            count += not change.done.cancelled() and refusal is None
        return count

    async def online(self, users: Sequence[str]) -> list[int]:
        """Return the number of clients that each user has on all processes. Raises StoreUnavailable."""
        await self._hub.start()
        return await self._hub.store.online(users)

    # --- topics

    async def topics(self, prefix: str, after: str, limit: int) -> tuple[dict[str, int], str | None]:
        """Return the first topics behind a name with the number of their clients, and the name to go on from."""
        question = {"ask": "topics", "prefix": prefix, "after": after, "limit": limit}
        found = Counter[str]()
        names, goes_on = page_of(await self._everywhere(question, Part), found, limit)
        return {name: found[name] for name in names}, goes_on

    async def _topics_here(self, prefix: str, after: str, limit: int) -> Part:
        groups = self._hub.clients.by_topic
        names, _ = await first_of(groups, str, after, limit + 1, lambda name: name.startswith(prefix))
        return Part({name: len(groups.get(name, ())) for name in names[:limit]}, len(names) > limit)


def _unknown(client_id: str) -> NotFound:
    return NotFound(f"Client {client_id} is not connected")


async def first_of(
    items: Collection[Item], name_of: Callable[[Item], str], after: str, count: int, fits: Callable[[Item], bool]
) -> tuple[list[Item], int]:
    """Return the first items that fit, by name, behind a name, and the number of all that fit; let other tasks run."""
    every, first, total = list(items), list[Item](), 0
    async for _, start in in_slices(range(0, len(every), PORTION)):
        fitting = [item for item in every[start : start + PORTION] if fits(item)]
        total += len(fitting)
        last = name_of(first[-1]) if len(first) == count else None
        first += [item for item in fitting if (name := name_of(item)) > after and (last is None or name < last)]
        first = sorted(first, key=name_of)[:count]
    return first, total


def page_of(parts: Sequence[Part], found: dict[str, Any], limit: int) -> tuple[list[str], str | None]:
    """Join parts in `found`, and return the names of a page, and the one to go on from."""
    end = min((next(reversed(part.found)) for part in parts if part.more), default=None)
    for part in parts:
        # Those of a Counter add up.
        found.update(part.found)
    names = sorted(name for name in found if end is None or name <= end)
    page = names[:limit]
    return page, page[-1] if end is not None or len(names) > limit else None
