"""Messages from clients and their answers, and the changes of topics that an admin makes.

Owns the protocol from client to server (the API reference, "Message Formats"). A bad message is answered with an error
and changes nothing. Too many messages, or answers that the client does not read, end its connection.

1. A client gets its answers in the order of its messages. A message that needs the store waits for it; every other is
   answered at once, unless an earlier one still waits.
2. A client's topics change only here, and one message at a time: they stay the same during an await. The change of an
   admin takes its turn among the messages.
3. A refused renewal of a token changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from msgspec import UNSET, Struct

import schemas
from clients import Client
from errors import Forbidden, InvalidPublish, InvalidRequest, NotifydError, StoreUnavailable
from guard_identity import Identity
from log import frame
from publishers import Expected
from schemas import ACKED, POLICY_VIOLATION, encode, error_message, timestamp

if TYPE_CHECKING:
    from hub import Hub

logger = logging.getLogger("notifyd.conversation")

# The answers that a client may leave unread; with more it is closed. A client that reads never comes near.
UNREAD_BYTES = 1_048_576

# From a token, and the address that has sent it, to its rights. Raises a NotifydError.
Renew = Callable[[str, str], Awaitable[Identity]]
# The messages that answer a message.
Answer = tuple[Struct, ...]
# Finds an answer that has to wait for the store. May raise a NotifydError.
Work = Callable[[], Awaitable[Answer]]


class Change(NamedTuple):
    """The change of a client's topics by an admin. `done` is cancelled if the client leaves first."""

    subscribe: frozenset[str]
    unsubscribe: frozenset[str]
    done: asyncio.Future[None]

    @classmethod
    def of(cls, subscribe: Collection[str], unsubscribe: Collection[str]) -> Change:
        return cls(frozenset(subscribe), frozenset(unsubscribe), asyncio.get_running_loop().create_future())

    def applied(self, topics: frozenset[str]) -> frozenset[str]:
        return (topics | self.subscribe) - self.unsubscribe


# A message that has been read, the fault of another, or the change of an admin.
Asked = schemas.ClientMessage | Expected | InvalidRequest | Change


PUBLISHES = (schemas.Publish, InvalidPublish)


class Conversation:
    """Answers the clients of this process."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._clients = hub.clients
        self._types = schemas.CLIENT_TYPES if hub.renew is not None else schemas.CLIENT_TYPES - {"auth"}
        # By client: the messages and changes that wait for the answer to an earlier message.
        self._waiting: dict[Client, deque[Asked]] = {}
        self._answering: set[asyncio.Task[None]] = set()

    def receive(self, client: Client, message: str | bytes) -> None:
        """Act on one message of a client."""
        client.speaks = True
        asked: Asked
        try:
            asked = schemas.read_message(message, self._types)
        except InvalidRequest as error:
            asked = error
        if isinstance(asked, PUBLISHES) and self._hub.publishers.admits(client):
            # In bytes: an ASCII text is as long, and knows that it is one.
            size = len(message if isinstance(message, bytes) or message.isascii() else message.encode())
            asked = self._hub.publishers.expect(client, asked, size)
            if client not in self._waiting:
                # Its answer comes with those of others.
                self._hub.publishers.publish(asked)
                return
        elif isinstance(asked, schemas.Acknowledge) and self._hub.acks.take(client, asked.id):
            # Free, since a client may acknowledge each notification. It is read in turns, of TURN_BYTES each.
            return
        elif not client.take_token():
            self._hub.admission.dismiss(client, POLICY_VIOLATION, "Message rate exceeded")
            return
        self._take(client, asked)

    def change_topics(self, client: Client, change: Change) -> None:
        """Change the topics of a client; it hears `subscribed`. `done` may get StoreUnavailable or InvalidRequest."""
        self._take(client, change)

    def _take(self, client: Client, asked: Asked) -> None:
        if (waiting := self._waiting.get(client)) is not None:
            waiting.append(asked)
        elif isinstance(answer := self._answer(client, asked), tuple):
            self._reply(client, answer)
        else:
            self._waiting[client] = deque()
            task = asyncio.ensure_future(self._answer_in_order(client, answer))
            # The loop itself holds tasks only weakly.
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    def _answer(self, client: Client, asked: Asked) -> Answer | Work:
        """Return the answer to a message, or the work that finds it."""
        if isinstance(asked, PUBLISHES):
            # It came without the right, which a token before it may have brought meanwhile.
            asked = self._hub.publishers.asked_late(client, asked)
        if isinstance(asked, Expected):
            self._hub.publishers.publish(asked)
            return ()
        if self._hub.publishers.owes(client):
            return partial(self._answer_behind_publishes, client, asked)
        if isinstance(asked, Change):
            return partial(self._change, client, asked)
        try:
            if isinstance(asked, InvalidRequest):
                raise asked
            return self._act(client, asked)
        except InvalidRequest as error:
            ref = error.ref if isinstance(error, InvalidPublish) else UNSET
            return (error_message(error.message, ref),)

    async def _answer_behind_publishes(self, client: Client, asked: Asked) -> Answer:
        await self._hub.publishers.answered(client)
        answer = self._answer(client, asked)
        return answer if isinstance(answer, tuple) else await answer()

    def _act(self, client: Client, message: schemas.ClientMessage) -> Answer | Work:
        match message:
            case schemas.ClientPing():
                return (schemas.Pong(timestamp=timestamp()),)
            case schemas.ClientPong():
                pass
            case schemas.StatusRequest():
                return self._status
            case schemas.Subscribe(topics=topics, since=since):
                position = None if since is UNSET else schemas.since_of(since)
                return partial(self._subscribe, client, frozenset(topics), position)
            case schemas.Unsubscribe(topics=topics):
                return partial(self._unsubscribe, client, frozenset(topics))
            case schemas.Acknowledge(id=id):
                self._hub.acks.check(id)
            case schemas.Authenticate(token=token):
                return partial(self._authenticate, client, token)
            case schemas.Publish():
                raise AssertionError("a publish is expected, or refused")
        return ()

    async def _answer_in_order(self, client: Client, answer: Answer | Work) -> None:
        """Answer a message that has to wait, and those that arrive meanwhile, until none is left."""
        waiting = self._waiting[client]
        try:
            while client in self._clients:
                if not isinstance(answer, tuple):
                    answer = await self._outcome(answer)
                    if client not in self._clients:
                        return
                self._reply(client, answer)
                # No await from here until the list is forgotten: a later message starts a task of its own.
                if not waiting:
                    return
                answer = self._answer(client, waiting.popleft())
        finally:
            for left in self._waiting.pop(client):
                if isinstance(left, Change):
                    left.done.cancel()
                elif isinstance(left, Expected):
                    self._hub.publishers.publish(left)

    async def _outcome(self, work: Work) -> Answer:
        """Do the work and return the answer that it finds, or its error."""
        try:
            return await work()
        except NotifydError as error:
            self._hub.counts.refuse(error)
            return (error_message(error.message),)
        except Exception as error:
            # A host's authentication backend may raise anything, and the client waits for an answer.
            failure = error_message("Internal server error")
            logger.error("Unexpected error %s", failure.error_id, exc_info=error)
            return (failure,)

    async def _status(self) -> Answer:
        census, now = await self._hub.census.take(), timestamp()
        data = schemas.StatusData(active_connections=census.active, total_connections=census.total, server_time=now)
        return (schemas.StatusMessage(data=data, timestamp=now),)

    async def _subscribe(self, client: Client, named: frozenset[str], since: str | None) -> Answer:
        if client.identity is not None:
            client.identity.check_topics(named)
        topics = client.topics | named
        schemas.check_topic_count(topics)
        if since == ACKED:
            since = await self._hub.acks.newest(client)
        if since is not None:
            return await self._subscribe_since(client, named, since)
        return await self._change_topics(client, topics)

    async def _subscribe_since(self, client: Client, named: frozenset[str], since: str) -> Answer:
        topics = client.topics | named
        with self._hub.fanout.keeping():
            reach = await self._hub.replay.reach_topics(client, named, since) if since else None
            # In the store first: no notification for the topics may come before their replay.
            position = await self._hub.store.subscribe(client.registration(topics))
            if client not in self._clients:
                return ()
            # Without await until the answer is written: all that has been delivered is in the replay, and all that
            # comes later finds the client subscribed. So nothing is missing at the seam, and nothing comes twice.
            resume = self._hub.replay.follow_topics(client, named, since, position, reach)
            self._set_topics(client, topics)
            self._hub.counts.resumes[resume.complete] += 1
        subscribed = schemas.Subscribed(topics=sorted(topics), timestamp=timestamp())
        return subscribed, schemas.Resume(timestamp=timestamp(), data=resume)

    async def _unsubscribe(self, client: Client, named: frozenset[str]) -> Answer:
        return await self._change_topics(client, client.topics - named)

    async def _change(self, client: Client, change: Change) -> Answer:
        topics = change.applied(client.topics)
        try:
            schemas.check_topic_count(topics)
            answer = await self._change_topics(client, topics)
        except (InvalidRequest, StoreUnavailable) as error:
            if not change.done.done():
                change.done.set_exception(error)
            # The client has not asked for anything.
            return ()
        client.granted |= change.subscribe & topics
        if not change.done.done():
            change.done.set_result(None)
        return answer

    async def _change_topics(self, client: Client, topics: frozenset[str]) -> Answer:
        """Set the topics of a client, here and in the store. Where the store is away, they stay as they are."""
        before = client.topics
        # New topics in this process first: a notification that the store addresses to the client must find it
        # subscribed. The others in the store first: it has delivered everything addressed to the client by its answer.
        self._set_topics(client, before | topics)
        try:
            await self._hub.store.subscribe(client.registration(topics))
        except StoreUnavailable:
            self._set_topics(client, before)
            raise
        self._set_topics(client, topics)
        return (schemas.Subscribed(topics=sorted(topics), timestamp=timestamp()),)

    def _set_topics(self, client: Client, topics: frozenset[str]) -> None:
        if client in self._clients:
            subscriptions, position = client.subscriptions(), self._hub.fanout.log.position
            subscriptions.end(client.topics - topics, position)
            subscriptions.begin(topics - client.topics, position)
            self._clients.subscribe(client, topics)
            self._hub.fanout.readers.widen(client)

    async def _authenticate(self, client: Client, token: str) -> Answer:
        assert self._hub.renew is not None, "auth is an unknown type then"
        identity = await self._hub.renew(token, client.peer)
        if identity.own_user(client.user) != client.user:
            raise Forbidden("Not allowed: user")
        kept = frozenset(topic for topic in client.topics if topic in client.granted or identity.allows(topic))
        topics = kept | identity.subscribe
        schemas.check_topic_count(topics)
        changed = () if topics == client.topics else await self._change_topics(client, topics)
        if client in self._clients:
            client.identity, client.granted = identity, client.granted | identity.subscribe
            self._hub.expiring.watch(client)
        until = None if identity.expires_at is None else timestamp(identity.expires_at)
        return schemas.Authenticated(expires_at=until, timestamp=timestamp()), *changed

    def _reply(self, client: Client, answer: Answer) -> None:
        if not answer:
            return
        if client.connection.buffered() > UNREAD_BYTES:
            self._hub.admission.dismiss(client, POLICY_VIOLATION, "Slow consumer: answers are not read")
            return
        client.connection.write(b"".join([frame(encode(message)) for message in answer]))
        if client.pending is not None:
            # The replay of a subscription, which no pass hands over.
            self._hub.fanout.advance(client)
