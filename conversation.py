"""What a client says on its connection, and what it is answered.

Owns the protocol's messages from client to server (the API reference, "Message Formats"). Bad ones are answered and
change nothing; too many, or answers that are not read, end the connection.

1. A client is answered in the order in which it asked. What needs no other process is answered at once, unless
   something that does is still to be answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from msgspec import Struct

import schemas
from clients import Client, Clients
from errors import InvalidRequest, NotifydError, StoreUnavailable
from guard_identity import Identities, Identity
from log import frame
from schemas import POLICY_VIOLATION, encode, timestamp
from store import Census, Store

logger = logging.getLogger("notifyd.conversation")

# Answers that a client does not read are kept up to this size; then it is closed.
UNREAD_BYTES = 1_048_576
# What clients ask that other processes have a part in.
_ASKS_THE_STORE = frozenset(("status_request", "subscribe", "unsubscribe"))

Close = Callable[[Client, int, str], None]
# From a token to whom it stands for. Raises a NotifydError.
Renew = Callable[[str], Awaitable[Identity]]


class Conversation:
    """Answers the clients of a directory."""

    def __init__(
        self,
        clients: Clients,
        store: Store,
        census: Callable[[], Awaitable[Census]],
        close: Close,
        identities: Identities,
        renew: Renew | None,
    ) -> None:
        """`close` ends a connection.

        Without `renew`, which finds out whom a token stands for, nobody may send one.
        """
        self._clients = clients
        self._store = store
        self._census = census
        self._close = close
        self._identities = identities
        self._renew = renew
        # What cannot be answered at once.
        self._asks = _ASKS_THE_STORE if renew is None else _ASKS_THE_STORE | {"auth"}
        # Messages of clients that wait for the answer to an earlier one, which asks the store.
        self._waiting: dict[Client, deque[dict[str, Any] | InvalidRequest]] = {}
        self._answering: set[asyncio.Task[None]] = set()

    def restart(self) -> None:
        """Belong to the event loop that is running now."""
        self._waiting.clear()
        self._answering.clear()

    def receive(self, client: Client, message: str | bytes) -> None:
        """Act on one message of a client."""
        client.speaks = True
        if not client.take_token():
            self._close(client, POLICY_VIOLATION, "Message rate exceeded")
            return
        try:
            value: dict[str, Any] | InvalidRequest = _read(message)
        except InvalidRequest as error:
            value = error
        if (waiting := self._waiting.get(client)) is not None:
            waiting.append(value)
        elif isinstance(value, dict) and value["type"] in self._asks:
            self._waiting[client] = deque([value])
            task = asyncio.ensure_future(self._answer_in_order(client))
            # The loop itself holds tasks only weakly.
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        else:
            self._reply(client, _answer(value))

    async def _answer_in_order(self, client: Client) -> None:
        """Answer a client's messages from the first that asks the store on, until all are answered."""
        waiting = self._waiting[client]
        try:
            while waiting and client in self._clients:
                value = waiting.popleft()
                answer = _answer(value)
                if isinstance(value, dict) and value["type"] in self._asks:
                    try:
                        answer = await self._ask(client, value)
                    except NotifydError as error:
                        answer = _error_message(error)
                    except Exception as error:
                        # A host's backend may raise anything, and whoever asked waits for the answer.
                        failure = _error_message(NotifydError("Internal server error"))
                        logger.error("Unexpected error %s", failure.error_id, exc_info=error)
                        answer = failure
                if client in self._clients:
                    self._reply(client, answer)
        finally:
            del self._waiting[client]

    async def _ask(self, client: Client, value: dict[str, Any]) -> Struct:
        if value["type"] == "auth" and self._renew is not None:
            return await self._authenticate(client, self._renew, value)
        if value["type"] != "status_request":
            return await self._change_topics(client, value)
        census, now = await self._census(), timestamp()
        data = schemas.StatusData(active_connections=census.active, total_connections=census.total, server_time=now)
        return schemas.StatusMessage(data=data, timestamp=now)

    async def _authenticate(self, client: Client, renew: Renew, value: dict[str, Any]) -> schemas.Authenticated:
        identity = await renew(schemas.check(value, schemas.AuthRequest).token)
        if client in self._clients:
            self._identities.renew(client, identity)
        until = None if identity.expires_at is None else timestamp(identity.expires_at)
        return schemas.Authenticated(expires_at=until, timestamp=timestamp())

    async def _change_topics(self, client: Client, value: dict[str, Any]) -> schemas.Subscribed:
        named = frozenset(schemas.check(value, schemas.TopicsRequest).topics)
        before = client.topics
        if value["type"] == "unsubscribe":
            topics = before - named
            # What was addressed to the client until now is still to come: it is here when the store has answered.
            await self._store.subscribe(client.client_id, topics)
        else:
            self._identities.check_topics(client, named)
            topics = before | named
            if len(topics) > schemas.MAX_TOPICS:
                raise InvalidRequest(
                    f"topics: at most {schemas.MAX_TOPICS} a client, and this would make {len(topics)}"
                )
            # Here first: nothing that is addressed to the client from now on may pass by.
            self._clients.subscribe(client, topics)
            try:
                await self._store.subscribe(client.client_id, topics)
            except StoreUnavailable:
                self._follow(client, before)
                raise
        self._follow(client, topics)
        return schemas.Subscribed(topics=sorted(topics), timestamp=timestamp())

    def _follow(self, client: Client, topics: frozenset[str]) -> None:
        if client in self._clients:
            self._clients.subscribe(client, topics)

    def _reply(self, client: Client, answer: Struct | None) -> None:
        if answer is None:
            return
        if client.connection.buffered() > UNREAD_BYTES:
            self._close(client, POLICY_VIOLATION, "Slow consumer: answers are not read")
            return
        client.connection.write(frame(encode(answer)))


def _read(message: str | bytes) -> dict[str, Any]:
    """Return a client's message. Raises InvalidRequest."""
    try:
        value = orjson.loads(message)
    except orjson.JSONDecodeError:
        raise InvalidRequest("Invalid JSON format") from None
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise InvalidRequest("Invalid message format")
    return value


def _answer(value: dict[str, Any] | InvalidRequest) -> Struct | None:
    """Return the answer to a message that needs nothing from the store."""
    if isinstance(value, InvalidRequest):
        return _error_message(value)
    if value["type"] == "pong":
        return None
    if value["type"] == "ping":
        return schemas.Pong(timestamp=timestamp())
    return _error_message(InvalidRequest(f"Unknown message type: {value['type'][:64]}"))


def _error_message(error: NotifydError) -> schemas.ErrorMessage:
    return schemas.ErrorMessage(error_id=schemas.new_error_id(), message=error.message, timestamp=timestamp())
