"""The Hub: the clients and their cursors, the fan-out pass, the heartbeat, the drain and the counters.

Knows connections only through the seam in connection.py, and neither Starlette nor uvicorn.

1. Only `_join` and `_leave` change the map of clients; a client that ends, for whatever reason, is taken out
   first and closed afterwards.
2. No await between reading a position and joining the map: a client is handed everything from its cursor on.
3. Every client's cursor, and what it is owed beside, lies between the ring's front and its head. `_trim` keeps
   that true: who would fall off is closed first, and only a client that cannot be written to is behind by then.
4. A notification is encoded and framed once. A client that cannot be written to costs its cursor, an integer.
5. Counters only grow, and are changed in the same stretch without await as what they count.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import orjson
from msgspec import UNSET, Struct, UnsetType

import schemas
from connection import CLOSE_DEADLINE_SECONDS, Connection, ConnectionState
from errors import ConnectionRefused, DuplicateClient, InvalidRequest, ShuttingDown, TooLarge
from frames import frame, payloads
from keys import Keys
from ring import Audience, Entry, Ring
from schemas import GOING_AWAY, INTERNAL_ERROR, POLICY_VIOLATION, encode, timestamp
from settings import Settings, number

logger = logging.getLogger("notifyd")

# The pass yields to the event loop after this many clients: at 3 to 10 us each it is held for 1 to 3 ms. A request
# that arrives meanwhile takes three turns of the loop, and is answered within 10 ms.
SLICE_CLIENTS = 250
# The longest that a pass waits to collect publishes into one write for each client.
COLLECT_SECONDS = 0.05
# How long a client whose client_id is claimed by a newcomer has to prove that it is alive.
PROBE_SECONDS = 2.0
# The bucket of a client's messages: a burst of this many, refilled at this rate.
MESSAGE_BURST, MESSAGES_PER_SECOND = 100.0, 50.0
# Answers that a client does not read are kept up to this size; then it is closed.
UNREAD_BYTES = 1_048_576
# What a notification may be longer than the request it came from: id, type, timestamps, sender.
ENVELOPE_BYTES = 1024
# An answer that is kept for its key repeats the request and may be far larger than the notification: a small bound on
# the bytes of the history must not cut it short.
KEYS_BYTES = 67_108_864
DRAIN_REPORT_SECONDS = 15.0
# Pings are spread over the interval in this many portions.
HEARTBEAT_PHASES = 20


class HubState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


_NEXT_STATES = {
    HubState.STARTING: {HubState.READY},
    HubState.READY: {HubState.DRAINING, HubState.STOPPED},
    HubState.DRAINING: {HubState.STOPPED},
    HubState.STOPPED: {HubState.READY},
}


class Receipt(NamedTuple):
    """What a publisher gets: the notification's id, and how many connected clients it is addressed to."""

    id: str
    recipients: int


class Client:
    """A connection with a client_id, and its cursor into the ring."""

    __slots__ = (
        "_hub",
        "_tokens",
        "_tokens_at",
        "client_id",
        "connected_at",
        "connection",
        "cursor",
        "descriptor",
        "heard_at",
        "pending",
        "phase",
        "speaks",
        "topics",
        "user_agent",
    )

    def __init__(
        self,
        hub: Hub,
        connection: Connection,
        client_id: str,
        user_agent: str | None,
        cursor: int,
        now: float,
    ) -> None:
        self._hub = hub
        self.connection = connection
        self.client_id = client_id
        self.user_agent = user_agent
        self.cursor = cursor
        # Kept by the connection: where frames may be written past the transport, -1 for nowhere.
        self.descriptor = -1
        # What it is owed beside the broadcasts from its cursor on: sequences of entries for it alone, or of its replay.
        self.pending: list[int] | None = None
        self.topics: frozenset[str] = frozenset()
        self.connected_at = now
        self.heard_at = now
        self.phase = hub.total_connections % HEARTBEAT_PHASES
        # Whether it has ever sent a message, and so would answer a ping message.
        self.speaks = False
        self._tokens = MESSAGE_BURST
        self._tokens_at = now

    def heard(self) -> None:
        self.heard_at = self._hub.clock()

    def received(self, message: str | bytes) -> None:
        self._hub.receive(self, message)

    def drained(self) -> None:
        self._hub.advance(self)

    def left(self) -> None:
        self._hub.left(self)

    def take_token(self, now: float) -> bool:
        """Return whether the client may send one more message now."""
        tokens = min(MESSAGE_BURST, self._tokens + (now - self._tokens_at) * MESSAGES_PER_SECOND)
        self._tokens_at = now
        self._tokens = tokens - 1
        return tokens >= 1

    def can_prove_life(self) -> bool:
        """Whether it would be heard if it were alive: else silence is no reason to close it."""
        return self.connection.hears_pongs or self.speaks


class Hub:
    """Everything that connects publishers with clients.

    Starts by itself on first use; `async with hub:` makes start and stop exact. All methods belong to one event
    loop. In-process publishers call `await hub.notify(...)`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock: Callable[[], float] = time.monotonic
        self.state = HubState.STARTING
        self._clients: dict[str, Client] = {}
        # Out of the map, but their connection has not ended yet.
        self._leaving: set[Client] = set()
        self._positions = schemas.Positions()
        self._ring = Ring(
            self._positions.next(),
            settings.history_size,
            settings.history_bytes,
            max_age=settings.history_ttl,
        )
        self._topics: dict[str, set[Client]] = {}
        # The clients with something pending, and those that were not at the head after the last full pass.
        self._owed: set[Client] = set()
        self._behind: list[Client] = []
        self.keys = Keys(settings.history_size, max(settings.history_bytes, KEYS_BYTES), settings.history_ttl)
        self._published = asyncio.Event()
        self._for_everyone = False
        self._passing = asyncio.Lock()
        # The sequence up to which the pass before the last one has gone: nothing newer is trimmed.
        self._settled = self._passed = 0
        self._empty = asyncio.Event()
        self._all_left = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.started_at = time.time()
        self._started_clock = self.clock()
        self.total_connections = 0
        self.messages_sent = 0
        self.notifications_sent = 0
        self.slow_consumers = 0
        self._test_counter = 0

    # --- life

    async def __aenter__(self) -> Hub:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def start(self) -> None:
        """Start the background tasks on the running loop; once they run, do nothing."""
        loop = asyncio.get_running_loop()
        if self._tasks and self._loop is loop:
            return
        if self._tasks and self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("a Hub belongs to one event loop at a time")
        if self.state is not HubState.READY:
            self._become(HubState.READY)
        self._loop = loop
        # Tasks of a loop that is gone (a test client's) went with it.
        self._tasks = [loop.create_task(self._guarded(work)) for work in self._background()]

    def _on_first_use(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            self.start()

    def _background(self) -> list[Callable[[], Awaitable[None]]]:
        works: list[Callable[[], Awaitable[None]]] = [self._fan_out, self._keep_house]
        if self.settings.ping_interval:
            works.append(self._heartbeat)
        if self.settings.notification_interval:
            works.append(self._send_tests)
        return works

    async def stop(self) -> None:
        """End the background tasks and close who is still there, all at once."""
        if self.state is HubState.STOPPED or self._loop is None:
            return
        self._become(HubState.STOPPED)
        for client in list(self._clients.values()):
            self._dismiss(client, GOING_AWAY, "Server shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def _become(self, state: HubState) -> None:
        assert state in _NEXT_STATES[self.state], f"{self.state} to {state}"
        logger.debug("The hub was %s and is %s", self.state.value, state.value)
        self.state = state

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a background task: after an unexpected error, which is logged, it is started again."""
        while True:
            try:
                await work()
                return
            except Exception:
                logger.exception("The background task %s failed and is started again", work.__name__)
                await asyncio.sleep(1)

    # --- clients come and go

    async def admit(
        self,
        connection: Connection,
        client_id: str | None,
        user_agent: str | None,
        since: str | None = None,
        topics: str = "",
    ) -> Client:
        """Admit a connection as a client: accept it, welcome it, and let it follow the log.

        It follows from now on, or with `since` from after that id (empty: from now, but tell the position). Raises
        ShuttingDown, InvalidRequest, DuplicateClient or ConnectionRefused, with the reason for the close frame; the
        connection is then still the caller's to close.
        """
        self._on_first_use()
        client_id = client_id or schemas.new_client_id()
        self._check_open(connection)
        if not schemas.CLIENT_ID.match(client_id):
            raise InvalidRequest("Invalid client_id")
        position = None if since is None else schemas.position_of(since)
        names = schemas.topics_of(topics)
        while (incumbent := self._clients.get(client_id)) is not None:
            await self._contest(incumbent)
            self._check_open(connection)
        if len(self._clients) >= self.settings.max_connections:
            active, limit = len(self._clients), self.settings.max_connections
            raise ConnectionRefused(f"Connection limit exceeded: {active}/{limit}")
        return self._join(connection, client_id, user_agent, position, names)

    def _check_open(self, connection: Connection) -> None:
        if self.state is not HubState.READY:
            raise ShuttingDown
        if connection.state is not ConnectionState.CONNECTING:
            raise ConnectionRefused("The newcomer has left")

    async def _contest(self, incumbent: Client) -> None:
        """Return once the incumbent is out of the map. Raises DuplicateClient where it stays."""
        replace = self.settings.on_duplicate == "replace"
        # A stream cannot answer a probe, so it gives way to whoever comes.
        if replace or incumbent.connection.is_stream:
            self._dismiss(incumbent, POLICY_VIOLATION, "Replaced by a new connection")
        elif await self._is_alive(incumbent):
            raise DuplicateClient(f"Client {incumbent.client_id} is already connected")
        else:
            self._dismiss(incumbent, INTERNAL_ERROR, "Ping timeout")

    async def _is_alive(self, client: Client) -> bool:
        """Ping the client now and wait for anything from it; where it could not be heard, take it for alive."""
        asked_at = self.clock()
        if client.connection.hears_pongs:
            client.connection.ping()
        else:
            self._ping(client, frame(encode(schemas.Ping(timestamp=timestamp()))))
        deadline = asked_at + PROBE_SECONDS
        while self._clients.get(client.client_id) is client:
            if client.heard_at > asked_at or not client.can_prove_life():
                return True
            if self.clock() >= deadline:
                break
            await asyncio.sleep(0.02)
        return False

    def _join(
        self, connection: Connection, client_id: str, user_agent: str | None, since: str | None, topics: frozenset[str]
    ) -> Client:
        # Without await: the cursor is read, what is to be replayed is fixed and the client is in the map before
        # anything else can be published. So nothing is missing at the seam, and nothing comes twice.
        client = Client(self, connection, client_id, user_agent, self._ring.head, self.clock())
        self._clients[client_id] = client
        self.total_connections += 1
        self._empty.clear()
        self._subscribe(client, topics)
        welcome = schemas.Welcome(
            client_id=client_id,
            server_time=timestamp(),
            notification_interval=number(self.settings.notification_interval),
        )
        greeting = frame(encode(welcome))
        if since is not None:
            greeting += frame(encode(self._resume(client, since)))
        connection.accept(client, greeting)
        self.advance(client)
        return client

    def _resume(self, client: Client, since: str) -> schemas.Resume:
        """Owe the client what it missed after `since`, and return what it is told about that."""
        entries, complete = self._missed(since, client.client_id, client.topics)
        if entries:
            client.pending = [entry.sequence for entry in entries]
            self._owed.add(client)
        data = schemas.ResumeData(position=self._ring.position, replayed=len(entries), complete=complete)
        return schemas.Resume(timestamp=timestamp(), data=data)

    def _missed(self, since: str | None, client_id: str | None, topics: Collection[str]) -> tuple[list[Entry], bool]:
        """Return the entries after `since` for such a client, and whether it is proven that these are all.

        Proven means that the log gave the id and has kept everything after it. `since` None asks for all that is
        kept, empty for nothing.
        """
        if since == "":
            return [], True
        front = self._ring.expired(self.clock(), self._ring.next_sequence)
        after = 0 if since is None else self._ring.find(since)
        complete = after is not None and after >= front
        start = after if after is not None and complete else front
        entries = [
            entry
            for entry in self._ring.since(start)
            if entry.audience is None or entry.audience.includes(client_id, topics)
        ]
        return entries, complete

    def _subscribe(self, client: Client, topics: frozenset[str]) -> None:
        """Change what a client is subscribed to, in both directions of the index."""
        for topic in client.topics - topics:
            self._topics[topic].discard(client)
            if not self._topics[topic]:
                del self._topics[topic]
        for topic in topics - client.topics:
            self._topics.setdefault(topic, set()).add(client)
        client.topics = topics

    def _leave(self, client: Client) -> None:
        if self._clients.get(client.client_id) is client:
            del self._clients[client.client_id]
            self._subscribe(client, frozenset())
            # A pass that is under way may still hold the client: it must find nothing owed.
            client.pending = None
            self._owed.discard(client)
            if not self._clients:
                self._empty.set()

    def _dismiss(self, client: Client, code: int, reason: str) -> None:
        """Take a client out of the map, then close its connection."""
        self._leave(client)
        if client.connection.state is not ConnectionState.CLOSED:
            self._leaving.add(client)
            client.connection.close(code, reason)

    def left(self, client: Client) -> None:
        """Hear from the connection that it has ended."""
        self._leave(client)
        self._leaving.discard(client)
        if not self._leaving:
            self._all_left.set()

    # --- publishing and the fan-out pass

    async def notify(
        self,
        message: str,
        type: str = "custom",
        data: dict[str, Any] | None = None,
        clients: list[str] | None = None,
        topics: list[str] | None = None,
    ) -> Receipt:
        """Publish a notification: to these clients and topics, or to everyone where neither is given.

        Raises InvalidRequest, naming the field and the limit, TooLarge, or ShuttingDown.
        """
        request = {"message": message, "type": type, "data": data, "clients": clients, "topics": topics}
        given = {name: value for name, value in request.items() if value is not None}
        return self.publish([schemas.check(given, schemas.NotifyRequest)])[0]

    def publish(self, requests: Sequence[schemas.NotifyRequest], *, numbered: bool = False) -> list[Receipt]:
        """Publish checked requests, all of them or, where one of them is refused, none; as notify().

        Errors of `numbered` requests name the place, counted from 0.
        """
        self._on_first_use()
        if self.state is not HubState.READY:
            raise ShuttingDown
        composed = [
            self._compose_request(request, f"[{number}]." if numbered else "")
            for number, request in enumerate(requests)
        ]
        receipts = [self._append(*one) for one in composed]
        self._published.set()
        return receipts

    def _compose_request(self, request: schemas.NotifyRequest, place: str) -> tuple[str, bytes, Audience | None]:
        data = {"message": request.message, **request.data}
        data["message"] = request.message
        topics = sorted(set(request.topics or ()))
        try:
            entry_id, payload = self._compose(request.type, data, topics=topics or UNSET)
        except InvalidRequest as error:
            raise InvalidRequest(place + error.message) from None
        limit = self.settings.max_message_size + ENVELOPE_BYTES
        if len(payload) > limit:
            raise TooLarge(f"{place}data: the notification is {len(payload)} bytes long, over the limit of {limit}")
        if not topics and request.clients is UNSET:
            return entry_id, payload, None
        return entry_id, payload, Audience(frozenset(request.clients or ()), frozenset(topics))

    def _compose(
        self, type: str, data: Any, sender: str = "notification_service", topics: list[str] | UnsetType = UNSET
    ) -> tuple[str, bytes]:
        entry_id = self._positions.next()
        notification = schemas.Notification(
            id=entry_id, type=type, timestamp=timestamp(), data=data, topics=topics, sender=sender
        )
        return entry_id, encode(notification)

    def _append(
        self, entry_id: str, payload: bytes, audience: Audience | None = None, *, replayed: bool = True
    ) -> Receipt:
        self.notifications_sent += 1
        sequence = self._ring.append(entry_id, frame(payload), self.clock(), replayed=replayed, audience=audience)
        if audience is None:
            self._for_everyone = True
            return Receipt(entry_id, len(self._clients))
        addressed = {client for name in audience.clients if (client := self._clients.get(name)) is not None}
        addressed.update(*(self._topics.get(topic, ()) for topic in audience.topics))
        # One list for all who are owed nothing else: by it the pass knows that they are owed the same.
        owed = [sequence]
        for client in addressed:
            client.pending = owed if client.pending is None else [*client.pending, sequence]
        self._owed |= addressed
        return Receipt(entry_id, len(addressed))

    def history(self, since: str | None, limit: int, topics: str, client_id: str | None) -> schemas.History:
        """Return what a client with these parameters would be replayed, oldest first, `limit` at most."""
        self._on_first_use()
        if client_id is not None and not schemas.CLIENT_ID.match(client_id):
            raise InvalidRequest("Invalid client_id")
        position = None if since is None else schemas.position_of(since)
        entries, complete = self._missed(position, client_id, schemas.topics_of(topics))
        page = entries[:limit]
        return schemas.History(
            notifications=[orjson.Fragment(next(payloads(entry.frame))) for entry in page],
            position=page[-1].id if len(page) < len(entries) else self._ring.position,
            complete=complete,
        )

    async def _fan_out(self) -> None:
        """Run passes for ever: one at once for a lone notification, one for many in a burst.

        When publishes arrived during a pass, the next one waits about as long as that took, so that a burst
        costs a client one write and not one for each notification.
        """
        while True:
            await self._published.wait()
            self._published.clear()
            started_at = self.clock()
            async with self._passing:
                await self._pass()
            if self._published.is_set():
                await asyncio.sleep(min(self.clock() - started_at, COLLECT_SECONDS))

    async def _pass(self) -> None:
        """Hand every client what lies between its cursor and the head, in slices, then trim the ring.

        When everything published since the last pass is for some clients only, the pass visits only those.
        """
        reached = self._ring.next_sequence
        full, self._for_everyone = self._for_everyone, False
        clients = list(self._clients.values() if full else self._owed)
        behind: list[Client] = []
        for start in range(0, len(clients), SLICE_CLIENTS):
            behind += self._hand_over(clients[start : start + SLICE_CLIENTS])
            await asyncio.sleep(0)
        if full:
            self._behind = behind
        self._settled, self._passed = self._passed, reached
        self._trim()

    def _hand_over(self, clients: list[Client]) -> list[Client]:
        """Hand a slice of clients what they are owed, and return those that are still behind.

        The inner body of the pass: it never blocks, never raises and never changes the map. Nearly all clients stand
        at one place, are caught up by one batch and have a plain socket: they cost this loop and the system call.
        Past the transport, because among 10,000 clients what that touches in memory costs 0.4 us a delivery, a tenth
        of the system call (bench/run.py --measure fanout). What the kernel does not take is the transport's.
        """
        at, owed = clients[0].cursor, clients[0].pending
        batch, left = (self._ring.batch(at), None) if owed is None else self._ring.merge(at, owed)
        if batch is None or batch.end != self._ring.head or left:
            return [client for client in clients if not self.advance(client)]
        behind = []
        others = 0
        frames, end, notifications = batch
        size, write = len(frames), os.write
        for client in clients:
            if client.cursor == at and client.pending is owed and client.descriptor >= 0:
                client.cursor = end
                client.pending = None
                try:
                    sent = write(client.descriptor, frames)
                except OSError:
                    sent = 0
                if sent != size:
                    client.connection.write(frames[sent:])
            else:
                others += 1
                if not self.advance(client):
                    behind.append(client)
        self.messages_sent += notifications * (len(clients) - others)
        if owed is not None:
            self._owed.difference_update(clients)
            # Not who has left since the pass began: `_leave` has let go of what they were owed.
            self._owed.update(client for client in behind if client.pending is not None)
        return behind

    def advance(self, client: Client) -> bool:
        """Hand one client what it is owed, while it can be written to, and return whether it has everything.

        Also called when a client's transport has drained. Never blocks, never raises, never changes the map.
        """
        connection = client.connection
        while connection.writable:
            if client.pending is not None:
                batch, left = self._ring.merge(client.cursor, client.pending)
                client.pending = left or None
                if not left:
                    self._owed.discard(client)
            elif (found := self._ring.batch(client.cursor)) is not None:
                batch = found
            else:
                return True
            client.cursor = batch.end
            self.messages_sent += batch.notifications
            connection.write(batch.frames)
        return client.cursor == self._ring.head and client.pending is None

    def _trim(self) -> None:
        """Forget what the bounds say, after closing the clients that would fall off.

        Only who was behind after the last full pass, or is owed something beside, can be that far behind: nothing
        newer than the pass before is trimmed.
        """
        until = self._ring.expired(self.clock(), self._settled)
        if until == self._ring.front:
            return
        for client in {*self._behind, *self._owed}:
            if self._clients.get(client.client_id) is client:
                owed = self._ring.next_owed(client.cursor, client.pending)
                if owed < until:
                    self._drop_slow_consumer(client, owed)
        self._ring.trim(until)

    def _drop_slow_consumer(self, client: Client, owed: int) -> None:
        behind = self._ring.behind(client.cursor) + len(client.pending or ())
        self.slow_consumers += 1
        logger.warning("Client %s is %d notifications behind and is closed", client.client_id, behind)
        reason = f"Slow consumer: {behind} notifications behind; resume with since={self._ring.id_before(owed)}"
        self._dismiss(client, POLICY_VIOLATION, reason)

    async def _keep_house(self) -> None:
        """Let what is too old go also when nothing is published."""
        while True:
            await asyncio.sleep(min(1.0, self.settings.history_ttl))
            async with self._passing:
                self._settled = self._passed
                self._trim()

    # --- messages from clients

    def receive(self, client: Client, message: str | bytes) -> None:
        """Act on one message of a client."""
        client.speaks = True
        if not client.take_token(self.clock()):
            self._dismiss(client, POLICY_VIOLATION, "Message rate exceeded")
            return
        try:
            answer = self._answer(client, message)
        except InvalidRequest as error:
            answer = schemas.ErrorMessage(error_id=schemas.new_error_id(), message=error.message, timestamp=timestamp())
        if answer is not None:
            self._reply(client, encode(answer))

    def _answer(self, client: Client, message: str | bytes) -> Struct | None:
        try:
            value = orjson.loads(message)
        except orjson.JSONDecodeError:
            raise InvalidRequest("Invalid JSON format") from None
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str):
            raise InvalidRequest("Invalid message format")
        if kind == "pong":
            return None
        if kind == "ping":
            return schemas.Pong(timestamp=timestamp())
        if kind == "status_request":
            return self._status_message()
        if kind in ("subscribe", "unsubscribe"):
            return self._change_topics(client, kind, value)
        raise InvalidRequest(f"Unknown message type: {kind[:64]}")

    def _status_message(self) -> schemas.StatusMessage:
        now = timestamp()
        data = schemas.StatusData(
            active_connections=len(self._clients), total_connections=self.total_connections, server_time=now
        )
        return schemas.StatusMessage(data=data, timestamp=now)

    def _change_topics(self, client: Client, kind: str, value: Any) -> schemas.Subscribed:
        named = frozenset(schemas.check(value, schemas.TopicsRequest).topics)
        topics = client.topics | named if kind == "subscribe" else client.topics - named
        if len(topics) > schemas.MAX_TOPICS:
            raise InvalidRequest(f"topics: at most {schemas.MAX_TOPICS} a client, and this would make {len(topics)}")
        self._subscribe(client, topics)
        return schemas.Subscribed(topics=sorted(topics), timestamp=timestamp())

    def _reply(self, client: Client, payload: bytes) -> None:
        if client.connection.buffered() > UNREAD_BYTES:
            self._dismiss(client, POLICY_VIOLATION, "Slow consumer: answers are not read")
            return
        client.connection.write(frame(payload))

    # --- heartbeat and test notifications

    async def _heartbeat(self) -> None:
        """Ping every client once an interval, and close those that have been silent for too long.

        Each client has a phase, so that the pings are spread over the interval and a newcomer waits for its
        first one no longer than that. Where ping_timeout is shorter than two intervals, the interval is half of
        it: a live client must get the chance to prove itself.
        """
        interval = min(self.settings.ping_interval, self.settings.ping_timeout / 2)
        while True:
            for phase in range(HEARTBEAT_PHASES):
                await asyncio.sleep(interval / HEARTBEAT_PHASES)
                ping = frame(encode(schemas.Ping(timestamp=timestamp())))
                self._close_silent()
                due = [client for client in self._clients.values() if client.phase == phase]
                for count, client in enumerate(due, 1):
                    self._ping(client, ping)
                    if not count % SLICE_CLIENTS:
                        await asyncio.sleep(0)

    def _ping(self, client: Client, ping: bytes) -> None:
        # One that cannot be written to has enough to read, and would see no ping before that.
        if client.connection.writable:
            client.connection.write(ping)
            client.connection.ping()

    def _close_silent(self) -> None:
        limit = self.clock() - self.settings.ping_timeout
        for client in [client for client in self._clients.values() if client.heard_at < limit]:
            if client.can_prove_life():
                logger.info("Client %s has been silent for too long and is closed", client.client_id)
                self._dismiss(client, INTERNAL_ERROR, "Ping timeout")

    async def _send_tests(self) -> None:
        due = self.clock()
        while self.state is HubState.READY:
            due += self.settings.notification_interval
            await asyncio.sleep(max(0.0, due - self.clock()))
            if self.state is HubState.READY:
                self._send_test()

    def _send_test(self) -> None:
        self._test_counter += 1
        data = schemas.TestData(
            message=f"Test notification #{self._test_counter}",
            counter=self._test_counter,
            uptime_seconds=self.uptime(),
            active_connections=len(self._clients),
            server_time=timestamp(),
        )
        self._append(*self._compose("test_notification", data), replayed=False)
        self._published.set()

    # --- the drain

    async def drain(self) -> None:
        """Announce the shutdown, wait until the clients have left or shutdown_timeout is over, close the rest.

        Cancelled, it closes the rest at once. Closed means told: wait_closed() waits for the peers' answers.
        """
        self._on_first_use()
        self._become(HubState.DRAINING)
        deadline = self.clock() + self.settings.shutdown_timeout
        try:
            await self._announce_shutdown()
            await self._wait_until_empty(deadline)
            async for client in self._paced(list(self._clients.values())):
                self._dismiss(client, GOING_AWAY, "Server shutting down")
        finally:
            for client in list(self._clients.values()):
                self.advance(client)
                self._dismiss(client, GOING_AWAY, "Server shutting down")

    async def wait_closed(self) -> None:
        """Wait until every connection has ended, for as long as a connection takes at most to give up."""
        if self._leaving:
            self._all_left.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_left.wait(), CLOSE_DEADLINE_SECONDS + 1)

    async def _announce_shutdown(self) -> None:
        # The lock waits for the pass that is under way, and keeps the next one from telling everyone at once.
        async with self._passing:
            now = timestamp()
            data = schemas.SystemData(system_time=now)
            self._append(*self._compose("system", data, sender="system"), replayed=False)
            self._ring.append_farewell(frame(encode(schemas.ShutdownMessage(timestamp=now))))
            async for client in self._paced(list(self._clients.values())):
                self.advance(client)

    async def _paced(self, clients: Collection[Client]) -> AsyncIterator[Client]:
        """Yield the clients at drain_rate a second, so that a fleet does not come back as one wave."""
        started_at = self.clock()
        for count, client in enumerate(clients):
            ahead = started_at + count / self.settings.drain_rate - self.clock()
            if ahead > 0.01:
                await asyncio.sleep(ahead)
            yield client

    async def _wait_until_empty(self, deadline: float) -> None:
        while self._clients and (left := deadline - self.clock()) > 0:
            logger.info(
                "Draining: %d clients remain; they are closed in %.0f s at most (a second signal: now)",
                len(self._clients),
                left,
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), min(DRAIN_REPORT_SECONDS, left))

    # --- figures

    def uptime(self) -> float:
        """Return the seconds since the start, to the millisecond."""
        return round(self.clock() - self._started_clock, 3)

    def is_ready(self) -> bool:
        """Whether clients and notifications are taken."""
        return self.state in (HubState.STARTING, HubState.READY)

    def clients(self) -> Iterable[Client]:
        """Return the connected clients, in the order of their admission."""
        return self._clients.values()

    def active_connections(self) -> int:
        return len(self._clients)

    def clients_behind(self) -> int:
        head = self._ring.head
        return sum(client.cursor != head or client.pending is not None for client in self._clients.values())

    def log_size(self) -> tuple[int, int]:
        """Return how many notifications the log holds, and their bytes."""
        return len(self._ring), self._ring.size

    def wall_time(self, clock: float) -> float:
        """Return a moment of `clock` in seconds since the epoch."""
        return self.started_at + clock - self._started_clock
