"""Admission: a newcomer becomes a client, and a client leaves.

The only file that adds clients to the directory (`Clients`) and removes them; all others read it. Knows connections
through the seam in connection.py and the registry of all processes through the one in store.py; knows no HTTP.

1. Only `_join` adds to the directory and only `leave` removes from it. A client that ends, for any reason, leaves
   first; its connection is closed afterwards.
2. No await between reading a position of the log and joining the directory: the client is handed everything after
   that position, and nothing twice.
3. After each await the newcomer is checked again: meanwhile it may have gone, or the drain may have begun.
4. At most one newcomer of this process registers a client_id at a time. Its claim also keeps in memory all that is
   appended until it has joined, and for a replay all that is there already.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from msgspec import UNSET, Struct
from msgspec.structs import replace

import schemas
from census import ANSWER_SECONDS
from clients import Client
from connection import Connection, ConnectionState
from errors import ConnectionRefused, DuplicateClient, InvalidRequest, NotifydError, ShuttingDown
from guard_identity import Identity, origin_of
from heartbeat import PROBE_SECONDS
from log import frame, interest_of
from schemas import ACKED, INTERNAL_ERROR, POLICY_VIOLATION, encode, timestamp
from settings import number
from store import ClientIdTaken, Reach, Registration
from streams import PutOut

if TYPE_CHECKING:
    from hub import Hub

logger = logging.getLogger("notifyd")


class Newcomer(Struct, frozen=True):
    """A connection's request to become a client, as it was read from the query and the headers."""

    # Empty: the server makes an id.
    client_id: str = ""
    # The position to resume from, or ACKED; empty: from now, and tell the position; None: from now.
    since: str | None = None
    topics: Collection[str] = ()
    user_agent: str | None = None
    # None without authentication.
    identity: Identity | None = None
    # The subscriber whose limit it counts for, empty without limits, and the peer's own address.
    address: str = ""
    peer: str = ""
    # Empty: none, or that of the identity.
    user: str = ""
    # Whether it has named the client_id itself. Set by checked().
    is_named: bool = True

    def checked(self) -> Newcomer:
        """Return the request with a client_id, and every value in the form that is kept.

        Raises InvalidRequest, or Forbidden where the identity does not allow the request.
        """
        identity, client_id, user = self.identity, self.client_id, self.user
        if identity is not None:
            user = identity.own_user(user)
            if client_id:
                identity.check_client_id(client_id)
        if not schemas.USER.match(user):
            raise InvalidRequest("Invalid user")
        is_named = bool(client_id)
        client_id = client_id or schemas.new_client_id()
        if not schemas.CLIENT_ID.match(client_id):
            raise InvalidRequest("Invalid client_id")
        since = None if self.since is None else schemas.since_of(self.since)
        given = () if identity is None else identity.subscribe
        topics = schemas.topics_of(self.topics, given) if self.topics or given else frozenset()
        if identity is not None:
            identity.check_topics(topics)
        values = client_id, since, topics, self.user_agent, identity, self.address, self.peer, user, is_named
        return Newcomer(*values)


class Admission:
    """The way into the directory of a Hub's clients, and out of it."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._notification_interval = number(hub.settings.notification_interval)
        # By client_id, the newcomers of this process that are being registered.
        self._claims: dict[str, tuple[Newcomer, asyncio.Event]] = {}
        # Clients that have left the directory while their connections still close.
        self._closing: set[Client] = set()
        # Set while no such connection is left.
        self.closed = asyncio.Event()
        self.closed.set()
        # Set while the directory is empty.
        self.empty = asyncio.Event()
        self.empty.set()
        self._numbers = itertools.count()

    # --- in

    async def admit(self, connection: Connection, newcomer: Newcomer) -> Client:
        """See Hub.admit()."""
        try:
            return await self._admit(connection, newcomer)
        except NotifydError as refusal:
            if logger.isEnabledFor(logging.DEBUG):
                source = origin_of(newcomer.peer, newcomer.identity)
                logger.debug("A newcomer from %s is refused: %s", source, refusal.message)
            raise

    async def _admit(self, connection: Connection, newcomer: Newcomer) -> Client:
        self._check_open(connection)
        newcomer = newcomer.checked()
        client_id = newcomer.client_id
        while True:
            while client_id in self._claims or client_id in self._hub.clients.by_id:
                await self.contest(client_id)
                self._check_open(connection)
            try:
                return await self._register(connection, newcomer)
            except ClientIdTaken as taken:
                node_id = taken.node
            await self._contest_there(client_id, node_id)
            self._check_open(connection)

    def _check_open(self, connection: Connection) -> None:
        if not self._hub.is_ready:
            raise ShuttingDown
        if connection.state is not ConnectionState.CONNECTING:
            raise ConnectionRefused("The newcomer has left")

    async def contest(self, client_id: str) -> None:
        """Return once no client or newcomer of this process has the client_id. Raises DuplicateClient if it stays."""
        while True:
            if (incumbent := self._hub.clients.by_id.get(client_id)) is not None:
                await self._contest_incumbent(incumbent)
            elif (claim := self._claims.get(client_id)) is not None:
                await claim[1].wait()
            else:
                return

    async def settle(self, fits: Callable[[Newcomer], bool]) -> None:
        """Return once every such newcomer that is being registered now has become a client, or has been refused."""
        for newcomer, claim in list(self._claims.values()):
            if fits(newcomer):
                await claim.wait()

    async def _contest_incumbent(self, incumbent: Client) -> None:
        """Return once the incumbent has left. Raises DuplicateClient if it stays."""
        code, reason = POLICY_VIOLATION, "Replaced by a new connection"
        # A stream cannot answer a probe, so it gives way to every newcomer.
        if self._hub.settings.on_duplicate != "replace" and not incumbent.connection.is_stream:
            if await self._hub.heartbeat.is_alive(incumbent):
                raise DuplicateClient(f"Client {incumbent.client_id} is already connected")
            code, reason = INTERNAL_ERROR, "Ping timeout"
        if incumbent in self._hub.clients:
            self.dismiss(incumbent, code, reason)

    async def _contest_there(self, client_id: str, node_id: str) -> None:
        """Return once another process has given up the client_id. Raises DuplicateClient if it does not."""
        question = {"ask": "contest", "client_id": client_id}
        answer = await self._hub.questions.ask(node_id, question, PROBE_SECONDS + ANSWER_SECONDS)
        # A node that does not answer is dead. Its clients stay in the registry until its lease ends.
        if answer is None or answer["stays"]:
            raise DuplicateClient(f"Client {client_id} is already connected")

    async def _register(self, connection: Connection, newcomer: Newcomer) -> Client:
        """Claim the client_id, register it in the store, and join. Raises ClientIdTaken if another process has it."""
        client_id, fanout = newcomer.client_id, self._hub.fanout
        claim = asyncio.Event()
        self._claims[client_id] = newcomer, claim
        # For a replay also all that is there now: the log must not move on between the promise and the replay.
        fanout.admitting[claim] = fanout.log.first_sequence if newcomer.since else fanout.log.next_sequence
        try:
            registration = Registration(client_id, newcomer.user, newcomer.topics, newcomer.address)
            position = await self._hub.store.admit(registration)
            try:
                reach = None
                if is_acked := newcomer.since == ACKED:
                    newcomer = replace(newcomer, since=await self._hub.acks.position_of(client_id, newcomer.user))
                if newcomer.since:
                    interest = interest_of(client_id, newcomer.user, newcomer.topics)
                    reach = await self._hub.replay.reach(newcomer.since, interest)
                self._check_open(connection)
                if newcomer.identity is not None:
                    self._hub.check_revoked(newcomer.identity)
                client = self._join(connection, newcomer, position, reach)
                if is_acked:
                    self._hub.acks.went_on(client, newcomer.since or "")
                return client
            except BaseException:
                self._withdraw(client_id)
                raise
        finally:
            del self._claims[client_id]
            # Gone already if the Hub has left the event loop of this newcomer.
            fanout.admitting.pop(claim, None)
            claim.set()

    def _join(self, connection: Connection, newcomer: Newcomer, position: str, reach: Reach | None) -> Client:
        """Add a registered newcomer to the directory, and welcome it as a client."""
        # Without await: the client is in the directory, its cursor is set and its replay is fixed before anything else
        # can be delivered. So nothing is missing at the seam, and nothing comes twice.
        hub = self._hub
        client = Client(hub, connection, newcomer, next(self._numbers))
        hub.clients.add(client, frozenset(newcomer.topics))
        self.empty.clear()
        if newcomer.identity is not None:
            hub.expiring.watch(client)
        resume = hub.replay.follow(client, newcomer.since, position, reach)
        welcome = schemas.Welcome(
            client_id=client.client_id,
            server_time=timestamp(),
            notification_interval=self._notification_interval,
            user=client.user or UNSET,
        )
        if logger.isEnabledFor(logging.DEBUG):
            source = origin_of(newcomer.peer, newcomer.identity)
            logger.debug("Client %s has connected from %s", client.client_id, source)
        greeting = frame(encode(welcome))
        if newcomer.since is not None:
            hub.counts.resumes[resume.complete] += 1
            greeting += frame(encode(schemas.Resume(timestamp=timestamp(), data=resume)))
        # With a replay, the position that precedes it: the stream may be cut before its first notification.
        connection.accept(client, greeting, newcomer.since or resume.position)
        if client.pending is not None:
            hub.fanout.advance(client)
        return client

    # --- out

    def _withdraw(self, client_id: str) -> None:
        """Undo a registration whose newcomer is not, or only half, a client."""
        if (client := self._hub.clients.by_id.get(client_id)) is not None:
            self.leave(client)
        else:
            self._hub.store.leave(client_id)

    def dismiss(self, client: Client, code: int, reason: str) -> None:
        """Take a client out of the directory, then close its connection."""
        self._hub.counts.close(code, reason, is_put_out=isinstance(reason, PutOut))
        self.leave(client)
        if client.connection.state is not ConnectionState.CLOSED:
            self._closing.add(client)
            self.closed.clear()
            client.connection.close(code, reason)

    def left(self, client: Client) -> None:
        """Take out a client after the end of its connection."""
        if client in self._hub.clients:
            self._hub.counts.leave()
        self.leave(client)
        self._closing.discard(client)
        if not self._closing:
            self.closed.set()

    def leave(self, client: Client) -> None:
        """Take a client out of the directory, if it is still there."""
        hub = self._hub
        if client not in hub.clients:
            return
        hub.clients.remove(client)
        hub.expiring.forget(client)
        hub.fanout.forget(client)
        hub.publishers.forget(client)
        hub.acks.forget(client)
        hub.store.leave(client.client_id)
        if not hub.clients:
            self.empty.set()
