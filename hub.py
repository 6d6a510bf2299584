"""The Hub: who is admitted, what is published, and what a client is answered.

Knows connections only through the seam in connection.py, the log only through the one in store.py, and neither
Starlette nor uvicorn. The parts that it puts together have files of their own: the clients (clients.py), the
fan-out, the heartbeat and the drain.

1. Only `_join` and `_leave` change the directory; a client that ends, for whatever reason, is taken out first and
   closed afterwards.
2. No await between reading a position of the log and joining the directory: a client is handed everything after it.
3. Counters only grow, and are changed in the same stretch without await as what they count.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import orjson
from msgspec import UNSET, UnsetType

import schemas
from census import ANSWER_SECONDS, Accounts, Peers
from clients import Client, Clients
from connection import CLOSE_DEADLINE_SECONDS, Connection, ConnectionState
from conversation import Conversation, Renew
from drain import Drain
from errors import (
    ConnectionRefused,
    DuplicateClient,
    InvalidRequest,
    ShuttingDown,
    StoreUnavailable,
    TooLarge,
)
from fanout import NOBODY, FanOut, payload
from guard_identity import Identities, Identity
from heartbeat import PROBE_SECONDS, Heartbeat
from log import Audience, Entry, Log, Positions, frame, payloads
from schemas import GOING_AWAY, INTERNAL_ERROR, POLICY_VIOLATION, TRY_AGAIN_LATER, encode, timestamp
from settings import Settings, number
from slices import in_slices
from store import Appended, Draft, Once, Opening, Receipt, Record, Registration, Report, Store, Taken, make_store

logger = logging.getLogger("notifyd")

# What a notification may be longer than the request it came from: id, type, timestamps, sender.
ENVELOPE_BYTES = 1024
# The JSON before the rest of a notification: {"id":"..."
ID_BYTES = 44
# A page of the history is no longer than this, unless one notification is.
PAGE_BYTES = 1_048_576
_TEST_START = b',"type":"test_notification"'


class HubState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


_NEXT_STATES = {
    HubState.STARTING: {HubState.READY},
    HubState.READY: {HubState.DRAINING, HubState.STOPPED},
    # To READY where the event loop went away during the drain, and the Hub is used from another.
    HubState.DRAINING: {HubState.STOPPED, HubState.READY},
    HubState.STOPPED: {HubState.READY},
}


class Hub:
    """Everything that connects publishers with clients. It is the `Node` of its store.

    Starts by itself on first use; `async with hub:` makes start and stop exact. All methods belong to one event
    loop. In-process publishers call `await hub.notify(...)`.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store | None = None,
        clock: Callable[[], float] = time.monotonic,
        renew: Renew | None = None,
    ) -> None:
        """With `renew`, clients may send a token again; it returns whom that stands for."""
        self.settings = settings
        self.store = store or make_store(settings, clock)
        self.clock = clock
        self.state = HubState.STARTING
        self.clients = Clients()
        self.fanout = FanOut(
            Log(settings.history_size, settings.history_bytes, settings.history_ttl),
            self.clients,
            clock,
            self._close_slow_consumer,
        )
        self.heartbeat = Heartbeat(
            self.clients, clock, settings.ping_interval, settings.ping_timeout, self._close_silent
        )
        self.peers = Peers(self.store, self._answer_peer)
        self.accounts = Accounts(self.clients, self.store, self.peers, clock, self._counted)
        self.identities = Identities(self._close_expired)
        self.conversation = Conversation(
            self.clients, self.store, self.accounts.census, self._dismiss, self.identities, renew
        )
        # Out of the directory, but their connection has not ended yet.
        self._leaving: set[Client] = set()
        self._numbers = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._last_test_clock = clock()
        self.slow_consumers = 0
        self._make_primitives()

    def _make_primitives(self) -> None:
        """Make what belongs to one event loop."""
        self._empty = asyncio.Event()
        self._all_left = asyncio.Event()
        self._starting = asyncio.Lock()
        # The client_ids for which a newcomer is being registered.
        self._claims: dict[str, asyncio.Event] = {}

    # --- life

    async def __aenter__(self) -> Hub:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Open the store, and start the background tasks on the running loop; once they run, do nothing."""
        loop = asyncio.get_running_loop()
        if self._loop is loop and self._tasks:
            return
        if self._loop is not loop:
            self._leave_loop()
            self._loop = loop
        async with self._starting:
            if self._tasks:
                return
            await self.store.open(self)
            if self.state is not HubState.READY:
                self._become(HubState.READY)
            self._tasks = [loop.create_task(self._guarded(work)) for work in self._background()]

    def _leave_loop(self) -> None:
        """Let go of what belongs to an event loop that is gone, such as a test client's: its clients went with it."""
        if self._tasks and self._loop is not None and not self._loop.is_closed():
            raise RuntimeError(
                "a Hub belongs to one event loop at a time; with a test client: `with TestClient(app) as client:`"
            )
        self._tasks = []
        self._leaving.clear()
        for client in list(self.clients):
            self._leave(client)
        self.conversation.restart()
        self._make_primitives()
        self.fanout.restart()

    def _background(self) -> list[Callable[[], Awaitable[None]]]:
        works: list[Callable[[], Awaitable[None]]] = [
            self.fanout.run,
            self.fanout.keep_short,
            self.accounts.report_regularly,
        ]
        if self.settings.ping_interval:
            works.append(self.heartbeat.run)
        if self.settings.notification_interval:
            works.append(self._send_tests)
        return works

    async def stop(self) -> None:
        """End the background tasks and close who is still there, all at once."""
        if self.state is HubState.STOPPED or self._loop is None:
            return
        self._become(HubState.STOPPED)
        for client in list(self.clients):
            self._dismiss(client, GOING_AWAY, "Server shutting down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await self.store.close()

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
        identity: Identity | None = None,
        address: str = "",
    ) -> Client:
        """Admit a connection as a client: accept it, welcome it, and let it follow the log.

        It follows from now on, or with `since` from after that id (empty: from now, but tell the position). Raises
        ShuttingDown, InvalidRequest, Forbidden where its identity does not allow what it asks for, DuplicateClient,
        ConnectionRefused or StoreUnavailable, with the reason for the close frame, or TooManyConnections for the
        address; the connection is then still the caller's to close.
        """
        await self.start()
        self._check_open(connection)
        if identity is not None:
            client_id = identity.own_client_id(client_id)
        client_id = client_id or schemas.new_client_id()
        if not schemas.CLIENT_ID.match(client_id):
            raise InvalidRequest("Invalid client_id")
        wanted = None if since is None else schemas.position_of(since)
        names = schemas.topics_of(topics)
        if identity is not None:
            identity.check_topics(names)
        while True:
            await self._contest_here(client_id)
            self._check_open(connection)
            try:
                with self._claimed(client_id):
                    position = await self._register(connection, client_id, names, address)
                    return self._join(connection, client_id, user_agent, wanted, names, position, identity, address)
            except Taken as taken:
                node_id = taken.node
            await self._contest_there(client_id, node_id)
            self._check_open(connection)

    def _check_open(self, connection: Connection) -> None:
        self.check_ready()
        if connection.state is not ConnectionState.CONNECTING:
            raise ConnectionRefused("The newcomer has left")

    def check_ready(self) -> None:
        """Raise ShuttingDown unless clients and notifications are taken."""
        if not self.is_ready():
            raise ShuttingDown

    @contextlib.contextmanager
    def _claimed(self, client_id: str) -> Iterator[None]:
        """Let no other newcomer of this process register the client_id, and keep in the log what is appended now."""
        claim = self._claims[client_id] = asyncio.Event()
        self.fanout.held[claim] = self.fanout.log.next_sequence
        try:
            yield
        finally:
            del self._claims[client_id], self.fanout.held[claim]
            claim.set()

    async def _register(self, connection: Connection, client_id: str, topics: frozenset[str], address: str) -> str:
        """Register the client_id in the store, and return the position from which on it is addressed."""
        position = await self.store.admit(client_id, topics, address)
        try:
            self._check_open(connection)
        except BaseException:
            self.store.leave(client_id)
            raise
        return position

    async def _contest_here(self, client_id: str) -> None:
        """Return once nobody of this process has the client_id. Raises DuplicateClient where somebody keeps it."""
        while True:
            if (incumbent := self.clients.get(client_id)) is not None:
                await self._contest(incumbent)
            elif (claim := self._claims.get(client_id)) is not None:
                await claim.wait()
            else:
                return

    async def _contest_there(self, client_id: str, node_id: str) -> None:
        """Return once the other node has let go of the client_id. Raises DuplicateClient where it does not."""
        question = {"ask": "contest", "client_id": client_id}
        answer = await self.peers.ask(node_id, question, PROBE_SECONDS + ANSWER_SECONDS)
        # A node that does not answer is dead, and loses its clients when its lease ends; until then they stay.
        if answer is None or answer["stays"]:
            raise DuplicateClient(f"Client {client_id} is already connected")

    async def _contest(self, incumbent: Client) -> None:
        """Return once the incumbent is out of the directory. Raises DuplicateClient where it stays."""
        code, reason = POLICY_VIOLATION, "Replaced by a new connection"
        # A stream cannot answer a probe, so it gives way to whoever comes.
        if self.settings.on_duplicate != "replace" and not incumbent.connection.is_stream:
            if await self.heartbeat.is_alive(incumbent):
                raise DuplicateClient(f"Client {incumbent.client_id} is already connected")
            code, reason = INTERNAL_ERROR, "Ping timeout"
        if incumbent in self.clients:
            self._dismiss(incumbent, code, reason)

    def _join(
        self,
        connection: Connection,
        client_id: str,
        user_agent: str | None,
        since: str | None,
        topics: frozenset[str],
        position: str,
        identity: Identity | None,
        address: str,
    ) -> Client:
        # Without await: the cursor is read, what is to be replayed is fixed and the client is in the directory
        # before anything else can be delivered. So nothing is missing at the seam, and nothing comes twice.
        log = self.fanout.log
        client = Client(self, connection, client_id, user_agent, log.next_turn, next(self._numbers), address)
        self.clients.add(client, topics)
        self.identities.set(client, identity)
        self._empty.clear()
        welcome = schemas.Welcome(
            client_id=client_id,
            server_time=timestamp(),
            notification_interval=number(self.settings.notification_interval),
        )
        greeting = frame(encode(welcome))
        if since:
            greeting += frame(encode(self._resume(client, since)))
        else:
            # Another process may have been faster than this one: what came after the admission is the client's too.
            self.fanout.owe(client, [entry.sequence for entry in self._since(position) if _is_for(entry, client)])
            if since is not None:
                data = schemas.ResumeData(position=position, replayed=0, complete=True)
                greeting += frame(encode(schemas.Resume(timestamp=timestamp(), data=data)))
        connection.accept(client, greeting)
        self.fanout.advance(client)
        return client

    def _since(self, position: str) -> Iterable[Entry]:
        log = self.fanout.log
        start = None if position == log.position else log.find(position)
        return () if start is None else log.since(start)

    def _resume(self, client: Client, since: str) -> schemas.Resume:
        """Owe the client what it missed after `since`, and return what it is told about that."""
        entries, complete = self._missed(since, client.client_id, client.topics)
        self.fanout.owe(client, [entry.sequence for entry in entries])
        data = schemas.ResumeData(position=self.fanout.log.position, replayed=len(entries), complete=complete)
        return schemas.Resume(timestamp=timestamp(), data=data)

    def _missed(self, since: str | None, client_id: str | None, topics: Collection[str]) -> tuple[list[Entry], bool]:
        """Return the entries after `since` for such a client, and whether it is proven that these are all.

        Proven means that the log gave the id and has kept everything after it. `since` None asks for all that is
        kept, empty for nothing.
        """
        if since == "":
            return [], True
        log = self.fanout.log
        front = log.expired(self.clock(), log.next_sequence)
        after = 0 if since is None else log.find(since)
        complete = after is not None and after >= front
        start = after if after is not None and complete else front
        entries = [
            entry
            for entry in log.since(start)
            if entry.replayed and (entry.audience is None or entry.audience.includes(client_id, topics))
        ]
        return entries, complete

    def _leave(self, client: Client) -> None:
        if client in self.clients:
            self.clients.remove(client)
            self.identities.set(client, None)
            self.fanout.forget(client)
            self.store.leave(client.client_id)
            if not self.clients:
                self._empty.set()

    def _dismiss(self, client: Client, code: int, reason: str) -> None:
        """Take a client out of the directory, then close its connection."""
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

    def advance(self, client: Client) -> bool:
        """Hand a client what it is owed, as far as it can be written to."""
        return self.fanout.advance(client)

    def _close_slow_consumer(self, client: Client, owed: int) -> None:
        behind = self.fanout.log.next_turn - client.cursor + len(client.pending or ())
        self.slow_consumers += 1
        logger.warning("Client %s is %d notifications behind and is closed", client.client_id, behind)
        position = self.fanout.log.position_before(owed)
        self._dismiss(
            client, POLICY_VIOLATION, f"Slow consumer: {behind} notifications behind; resume with since={position}"
        )

    def _close_silent(self, client: Client) -> None:
        self._dismiss(client, INTERNAL_ERROR, "Ping timeout")

    def _close_expired(self, client: Client) -> None:
        self._dismiss(client, POLICY_VIOLATION, "Token expired")

    # --- publishing

    async def notify(
        self,
        message: str,
        type: str = "custom",
        data: dict[str, Any] | None = None,
        clients: list[str] | None = None,
        topics: list[str] | None = None,
    ) -> Receipt:
        """Publish a notification: to these clients and topics, or to everyone where neither is given.

        Raises InvalidRequest, naming the field and the limit, TooLarge, ShuttingDown, or StoreUnavailable.
        """
        request = {"message": message, "type": type, "data": data, "clients": clients, "topics": topics}
        given = {name: value for name, value in request.items() if value is not None}
        appended = await self.publish([schemas.check(given, schemas.NotifyRequest)])
        return appended.receipts[0]

    async def publish(
        self, requests: Sequence[schemas.NotifyRequest], once: Once | None = None, *, numbered: bool = False
    ) -> Appended:
        """Publish checked requests, all of them or, where one of them is refused, none; as notify().

        With `once` a repetition publishes nothing and returns what the first did; raises KeyReused. Errors of
        `numbered` requests name the place, counted from 0.
        """
        await self.start()
        if numbered:
            drafts = [self._draft(request, f"[{place}].") async for place, request in in_slices(requests)]
        else:
            drafts = [self._draft(request) for request in requests]
        self.check_ready()
        return await self.store.append(drafts, once)

    def _draft(self, request: schemas.NotifyRequest, place: str = "") -> Draft:
        data = {"message": request.message, **request.data}
        data["message"] = request.message
        topics = sorted(set(request.topics or ()))
        try:
            rest = _compose(request.type, data, topics=topics or UNSET)
        except InvalidRequest as error:
            raise InvalidRequest(place + error.message) from None
        limit, size = self.settings.max_message_size + ENVELOPE_BYTES, len(rest) + ID_BYTES
        if size > limit:
            raise TooLarge(f"{place}data: the notification is {size} bytes long, over the limit of {limit}")
        if not topics and request.clients is UNSET:
            return Draft(rest)
        return Draft(rest, Audience(frozenset(request.clients or ()), frozenset(topics)))

    async def history(self, since: str | None, limit: int, topics: str, client_id: str | None) -> schemas.History:
        """Return what a client with these parameters would be replayed, oldest first, `limit` at most."""
        await self.start()
        if client_id is not None and not schemas.CLIENT_ID.match(client_id):
            raise InvalidRequest("Invalid client_id")
        wanted, names = None if since is None else schemas.position_of(since), schemas.topics_of(topics)
        # Whatever the store answers, by then this process has read the log up to now.
        with contextlib.suppress(StoreUnavailable):
            await self.store.report(self._counted())
        entries, complete = self._missed(wanted, client_id, names)
        page, size = entries[:limit], 0
        for count, entry in enumerate(page):
            size += len(entry.frame)
            if count and size > PAGE_BYTES:
                del page[count:]
                break
        return schemas.History(
            notifications=[orjson.Fragment(next(payloads(entry.frame))) for entry in page],
            position=page[-1].id if len(page) < len(entries) else self.fanout.log.position,
            complete=complete,
        )

    # --- what the store tells

    def opened(self, opening: Opening) -> None:
        """Take the log as it is."""
        self.accounts.started(opening.started_at, opening.age)
        self.fanout.begin(opening.before, opening.records)

    def deliver(self, records: Sequence[Record]) -> None:
        """Take the next records of the log, and hand them to the clients that they are for."""
        self.fanout.append(records)
        if any(not record.replayed and record.rest.startswith(_TEST_START) for record in records):
            self._last_test_clock = self.clock()

    def missed(self) -> None:
        """Close everyone: they would miss what this process could not read before the log let go of it.

        Nobody can prove any more that a resume from before that is complete, so the log begins anew.
        """
        logger.error("The log has let go of what this process had not read; its clients are closed")
        for client in list(self.clients):
            self._dismiss(client, TRY_AGAIN_LATER, "Notifications are missing; connect again and resume")
        self.fanout.begin_anew()

    def told(self, sender: str, message: bytes) -> None:
        self.peers.told(sender, message)

    def kept(self) -> tuple[str, Iterable[Record]]:
        """Return what the log holds, as the log had it, and the id before that."""
        log = self.fanout.log
        return log.position_before(log.first_sequence), self.fanout.records()

    def registrations(self) -> Iterable[Registration]:
        return [Registration(client.client_id, client.topics, client.address) for client in self.clients]

    def evicted(self, client_ids: Sequence[str]) -> None:
        """Close clients whose ids are other processes' by now."""
        for client_id in client_ids:
            if (client := self.clients.get(client_id)) is not None:
                self._dismiss(client, POLICY_VIOLATION, "Replaced by a new connection")

    def active_connections(self) -> int:
        """Return how many clients this process has."""
        return len(self.clients)

    def recipients(self, audience: Audience | None) -> int:
        return self.clients.count(audience)

    async def _answer_peer(self, question: dict[str, Any]) -> Any:
        if question["ask"] == "contest":
            try:
                await self._contest_here(question["client_id"])
            except DuplicateClient:
                return {"stays": True}
            return {"stays": False}
        await self.accounts.report()
        return schemas.to_plain(await self.accounts.details(question["limit"]))

    def _counted(self) -> Report:
        return Report(self.fanout.messages_sent, self.slow_consumers)

    def receive(self, client: Client, message: str | bytes) -> None:
        self.conversation.receive(client, message)

    # --- test notifications

    async def _send_tests(self) -> None:
        """Send them where this process leads: an interval after the last one, whoever sent that."""
        interval = self.settings.notification_interval
        self._last_test_clock = self.clock()
        due = self._last_test_clock + interval
        while self.state is HubState.READY:
            await asyncio.sleep(max(0.0, due - self.clock()))
            if self._last_test_clock + interval > due + interval / 10:
                due = self._last_test_clock + interval
                continue
            # What was missed while the process did not run is not made up for.
            due = due + interval if due + interval > self.clock() else self.clock() + interval
            if self.state is HubState.READY:
                with contextlib.suppress(StoreUnavailable):
                    await self._send_test()

    async def _send_test(self) -> None:
        if (counter := await self.store.lead()) is None:
            return
        data = schemas.TestData(
            message=f"Test notification #{counter + 1}",
            counter=counter + 1,
            uptime_seconds=self.accounts.uptime(),
            active_connections=(await self.accounts.census()).active,
            server_time=timestamp(),
        )
        draft = Draft(_compose("test_notification", data), replayed=False)
        await self.store.append([draft], counter=counter + 1)

    # --- the drain

    async def drain(self, host: str = "") -> None:
        """Announce the shutdown, wait until the clients have left or shutdown_timeout is over, close the rest.

        Only this process's clients; those of one `host` who drain together announce it once. Cancelled, it closes
        the clients at once. Closed means told: wait_closed() waits for the peers' answers.
        """
        await self.start()
        self._become(HubState.DRAINING)
        drain = Drain(self.clients, self.clock, self.settings.drain_rate, self.settings.shutdown_timeout)
        try:
            async with drain.reported():
                # The lock waits for the pass that is under way, and keeps the next one from telling everyone at once.
                async with self.fanout.passing:
                    await self._announce_shutdown(Once(f"drain {host}", b"") if host else None)
                    await drain.tell(self.advance)
                await drain.wait_until_empty(self._empty)
            await drain.close(self._close_going_away)
        finally:
            for client in list(self.clients):
                self._close_going_away(client)

    def _close_going_away(self, client: Client) -> None:
        self.advance(client)
        self._dismiss(client, GOING_AWAY, "Server shutting down")

    async def _announce_shutdown(self, once: Once | None) -> None:
        """Put what everyone on this host is to be told at the end of the log.

        In the log the notification is for nobody: a place to resume from, the same for all processes of the host.
        """
        now = timestamp()
        draft = Draft(_compose("system", schemas.SystemData(system_time=now), sender="system"), NOBODY, replayed=False)
        try:
            position = (await self.store.append([draft], once)).receipts[0].id
        except StoreUnavailable:
            position = Positions(self.fanout.log.position).next()
        message = encode(schemas.ShutdownMessage(timestamp=now))
        self.fanout.log.append_farewell(frame(payload(position, draft.rest)), frame(message))

    async def wait_closed(self) -> None:
        """Wait until every connection has ended, for as long as a connection takes at most to give up."""
        if self._leaving:
            self._all_left.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_left.wait(), CLOSE_DEADLINE_SECONDS + 1)

    def is_ready(self) -> bool:
        """Whether clients and notifications are taken."""
        return self.state in (HubState.STARTING, HubState.READY)


def _is_for(entry: Entry, client: Client) -> bool:
    return entry.audience is None or entry.audience.includes(client.client_id, client.topics)


def _compose(
    type: str, data: Any, sender: str = "notification_service", topics: list[str] | UnsetType = UNSET
) -> bytes:
    """Return a notification's JSON behind its id."""
    notification = schemas.Notification(type=type, timestamp=timestamp(), data=data, topics=topics, sender=sender)
    return encode(notification).removeprefix(b'{"id":""')
