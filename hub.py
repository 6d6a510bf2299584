"""The Hub: the verbs that connect publishers with clients, and its life from start to stop.

Everything else is a part in a file of its own that holds the Hub and calls it: admission, presence, conversations, the
heartbeat, the drain, replays, the fan-out with the log and the readers, the census; all read the directory of clients.
Knows connections only through the seam in connection.py, the log of all processes only through the one in store.py, and
calls neither Starlette nor uvicorn.

1. Every verb starts the Hub if it does not run. All calls belong to one event loop at a time.
2. Each await is between consistent states. A verb checks the state again after an await.
3. Counters only grow, and change in the same stretch without await as the thing they count.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import orjson

import schemas
from acks import Acks
from admission import Admission, Newcomer
from census import CensusTaker, Questions, TestNotifications
from clients import Client, Clients, ExpiringClients
from connection import CLOSE_DEADLINE_SECONDS, Connection
from conversation import Conversation, Renew
from counts import Counts
from delivery import Deliveries
from drain import Drain
from errors import InvalidRequest, NotifydError, ShuttingDown, StoreUnavailable, TooLarge, Unauthorized
from fanout import FanOut
from guard_identity import Identity, origin_of
from heartbeat import Heartbeat
from log import Audience, interest_of, payloads
from presence import Presence
from publishers import Publishers
from replay import Replay
from revocations import Revocations
from schemas import ACKED, GOING_AWAY, POLICY_VIOLATION, TRY_AGAIN_LATER
from settings import Settings
from slices import in_slices
from store import Appended, Draft, MemoryStore, Once, Opening, Receipt, Record, Registration, Store

logger = logging.getLogger("notifyd")

# A notification may be longer than its request by this much: id, type, timestamps, sender.
ENVELOPE_BYTES = 1024
# The JSON before the rest of a notification: {"id":"..."
ID_BYTES = 44


# Something that the Hub does in the background for as long as it runs.
Work = Callable[[], Coroutine[Any, Any, None]]


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
        revocations: Revocations | None = None,
    ) -> None:
        """With `renew`, clients may send a token again; it returns the identity that the token stands for.

        With `revocations`, tokens can be revoked.
        """
        self.settings = settings
        self.store = store or MemoryStore(settings, clock)
        self.clock = clock
        self.renew = renew
        self.revocations = revocations
        if revocations is not None:
            revocations.follow(self.store)
        self.state = HubState.STARTING
        # Whether clients and notifications are taken.
        self.is_ready = False
        self.clients = Clients()
        # The Node's; the directory answers.
        self.recipients = self.clients.count
        self.counts = Counts()
        self.fanout = FanOut(self)
        self.replay = Replay(self)
        self.acks = Acks(self)
        self.census = CensusTaker(self)
        self.presence = Presence(self)
        self.deliveries = Deliveries(self)
        self.test_notifications = TestNotifications(self)
        self._make_parts()
        self._loop: asyncio.AbstractEventLoop | None = None
        # While the Hub runs: its background tasks, and the one that watches them.
        self._background: dict[asyncio.Task[None], Work] = {}
        self._supervisor: asyncio.Task[None]

    def _make_parts(self) -> None:
        """Make the parts that have tasks, timers or events of one event loop."""
        self.admission = Admission(self)
        self.publishers = Publishers(self)
        self.conversation = Conversation(self)
        self.heartbeat = Heartbeat(self)
        self.questions = Questions(self)
        self.expiring = ExpiringClients(self)
        # Held while the Hub starts or stops.
        self._changing = asyncio.Lock()
        # Set when clients and notifications are taken no longer.
        self.ending = asyncio.Event()

    # --- life

    async def __aenter__(self) -> Hub:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Open the store, and start the background tasks on the running loop; once they run, do nothing."""
        loop = asyncio.get_running_loop()
        if self._loop is loop and self._background:
            return
        if self._loop is not loop:
            self._leave_loop()
            self._loop = loop
        async with self._changing:
            if self._background:
                return
            await self.store.open(self)
            if self.state is not HubState.READY:
                self._become(HubState.READY)
            self._background = {loop.create_task(work()): work for work in self._works()}
            self._supervisor = loop.create_task(self._supervise())

    def _leave_loop(self) -> None:
        """Let go of an event loop that is gone, such as a test client's. Its clients went with it."""
        if self._background and self._loop is not None and not self._loop.is_closed():
            raise RuntimeError(
                "a Hub belongs to one event loop at a time; with a test client: `with TestClient(app) as client:`"
            )
        self._background = {}
        for client in list(self.clients):
            self.admission.leave(client)
        self._make_parts()
        self.fanout.restart()

    async def _supervise(self) -> None:
        """Start background work that fails again, after a second, and log why."""
        while True:
            done, _ = await asyncio.wait(self._background, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                work = self._background.pop(task)
                if not task.cancelled() and (error := task.exception()) is not None:
                    logger.error("%s failed and is started again", work.__qualname__, exc_info=error)
                    self._background[asyncio.ensure_future(_start_again(work))] = work

    def _works(self) -> Iterator[Work]:
        yield self.fanout.run
        yield self.fanout.trim_regularly
        yield self.fanout.readers.run
        yield self.publishers.run
        yield self.acks.write_regularly
        yield self.census.report_regularly
        if self.revocations is not None:
            yield self.presence.follow_revocations
        if self.settings.ping_interval:
            yield self.heartbeat.run
        if self.settings.notification_interval:
            yield self.test_notifications.run

    async def drain(self, host: str = "") -> None:
        """Announce the shutdown, wait until the clients have left or shutdown_timeout is over, close the rest.

        Only this process's clients; processes of one `host` that drain together announce it once. Cancelled, it closes
        the clients at once. Returns when the closes are sent: wait_closed() waits for the peers' answers. A call while
        the Hub drains or stops only waits for that end.
        """
        await self.start()
        if self.is_ready:
            self._become(HubState.DRAINING)
            await Drain(self).run(host)
        else:
            await self.admission.empty.wait()

    async def wait_closed(self) -> None:
        """Wait until the connections of all dismissed clients have ended, for as long as a close takes at most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.admission.closed.wait(), CLOSE_DEADLINE_SECONDS + 1)

    async def stop(self) -> None:
        """End the background tasks, and close all clients that are still there at once."""
        async with self._changing:
            if not self._background:
                return
            self._become(HubState.STOPPED)
            for client in list(self.clients):
                self.admission.dismiss(client, GOING_AWAY, "Server shutting down")
            tasks = [self._supervisor, *self._background]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._background = {}
            with contextlib.suppress(StoreUnavailable):
                await self.deliveries.hand_in()
            await self.store.close()

    def _become(self, state: HubState) -> None:
        assert state in _NEXT_STATES[self.state], f"{self.state} to {state}"
        logger.debug("The hub was %s and is %s", self.state.value, state.value)
        self.state = state
        self.is_ready = state is HubState.READY
        if self.is_ready:
            self.ending.clear()
        else:
            self.ending.set()

    # --- clients

    async def admit(self, connection: Connection, newcomer: Newcomer) -> Client:
        """Admit a connection as a client: accept it, welcome it, and let it follow the log.

        It follows from now on, or with `since` from after that id (empty: from now, but tell the position). Raises
        ShuttingDown, InvalidRequest, Forbidden if its identity does not allow the request, DuplicateClient,
        ConnectionRefused or StoreUnavailable, with the reason for the close frame, or TooManyConnections for the
        address. The connection is then still the caller's to close.
        """
        await self.start()
        return await self.admission.admit(connection, newcomer)

    # --- publishing

    async def notify(
        self,
        message: str,
        type: str = "custom",
        data: dict[str, Any] | None = None,
        clients: list[str] | None = None,
        topics: list[str] | None = None,
        users: list[str] | None = None,
    ) -> Receipt:
        """Publish a notification to these clients, topics and users, or to everyone if none of them is given.

        Raises InvalidRequest, naming the field and the limit, TooLarge, ShuttingDown, or StoreUnavailable.
        """
        request = {"message": message, "type": type, "data": data, "clients": clients, "topics": topics}
        request["users"] = users
        given = {name: value for name, value in request.items() if value is not None}
        appended = await self.publish([schemas.check(given, schemas.NotifyRequest)])
        return appended.receipts[0]

    async def publish(
        self,
        requests: Sequence[schemas.NotifyRequest],
        once: Once | None = None,
        sender: Identity | None = None,
        *,
        address: str | None = None,
        numbered: bool = False,
    ) -> Appended:
        """Publish checked requests as notify() does: all of them, or none if any is refused.

        With `once` a repetition publishes nothing and returns the outcome of the first; raises KeyReused. With a
        `sender`, raises Forbidden for a request that it may not publish. The log names its `address`, None for this
        process. Errors of `numbered` requests name the place, counted from 0.
        """
        began = self.clock()
        try:
            if not self.is_ready or self._loop is not asyncio.get_running_loop():
                await self.start()
            if sender is not None:
                sender.check_publish(requests)
                self.check_revoked(sender)
            if numbered:
                drafts = [self.draft(request, f"[{place}].") async for place, request in in_slices(requests)]
            else:
                drafts = list(map(self.draft, requests))
            if not self.is_ready:
                drafts = self.refuse_new(once)
            appended = await self.store.append(drafts, once)
            if not appended.receipts:
                raise ShuttingDown
        except NotifydError as error:
            self.counts.fail(error)
            raise
        self.counts.publish.uncounted.append(self.clock() - began)
        self.counts.repeated += appended.repeated
        if logger.isEnabledFor(logging.DEBUG):
            done = "Repeated" if appended.repeated else "Published"
            source = "this process" if address is None else origin_of(address, sender)
            logger.debug("%s %s (%d) from %s", done, appended.receipts[-1].id, len(appended.receipts), source)
        return appended

    def refuse_new(self, once: Once | None) -> list[Draft]:
        """Return no drafts, for the store to look for the first request with a key. Otherwise raise ShuttingDown.

        A repeat gets its answer also during the drain.
        """
        if once is None or self.state is not HubState.DRAINING:
            raise ShuttingDown
        return []

    @property
    def publishes_at_once(self) -> bool:
        """Whether publish_at_once() is worth a try: the store never waits, and nothing is logged."""
        return self.store.append_at_once is not None and not logger.isEnabledFor(logging.DEBUG)

    def publish_at_once(self, request: schemas.NotifyRequest, spelled: schemas.Spelled) -> Receipt | None:
        """Publish a checked request without an await; None where that takes publish(), or publish() says why not.

        Raises InvalidRequest or TooLarge as publish() does. The caller runs on the Hub's event loop.
        """
        append = self.store.append_at_once
        if append is None or not self.is_ready:
            return None
        began = self.clock()
        receipt = append(self.draft(request, spelled=spelled))
        self.counts.publish.uncounted.append(self.clock() - began)
        return receipt

    def draft(self, request: schemas.NotifyRequest, place: str = "", spelled: schemas.Spelled | None = None) -> Draft:
        """Return a checked request as the store takes it. Raises InvalidRequest or TooLarge."""
        topics = sorted(set(request.topics)) if request.topics else []
        try:
            rest = schemas.notification(request, spelled or schemas.spelled(request), topics)
        except InvalidRequest as error:
            raise InvalidRequest(place + error.message) from None
        limit, size = self.settings.max_message_size + ENVELOPE_BYTES, len(rest) + ID_BYTES
        if size > limit:
            raise TooLarge(f"{place}data: the notification is {size} bytes long, over the limit of {limit}")
        clients, users = request.clients or (), request.users or ()
        if not (clients or topics or users):
            return Draft(rest)
        return Draft(rest, _audience(tuple(clients), tuple(topics), tuple(users)))

    def trusts(self, identity: Identity, until: float) -> bool:
        """Whether an identity that was read earlier counts without being read again, up to this moment at most."""
        now = time.time()
        if now >= until or (identity.expires_at is not None and identity.expires_at <= now):
            return False
        if self.revocations is None:
            return True
        with contextlib.suppress(Unauthorized):
            self.revocations.check(identity)
            return self.revocations.is_newest
        return False

    def check_revoked(self, identity: Identity) -> None:
        """Raise Unauthorized where the token has been revoked since it was read."""
        if self.revocations is not None:
            self.revocations.check(identity)

    async def history(
        self,
        since: str | None,
        limit: int,
        topics: Collection[str],
        client_id: str | None,
        user: str = "",
        before: str | None = None,
        *,
        newest_first: bool = False,
    ) -> schemas.History:
        """Return a page of the replay for a client with these parameters: `limit` notifications at most.

        Only those before the id `before`, where it is given. Raises InvalidRequest, or StoreUnavailable.
        """
        await self.start()
        if client_id is not None and not schemas.CLIENT_ID.match(client_id):
            raise InvalidRequest("Invalid client_id")
        if not schemas.USER.match(user):
            raise InvalidRequest("Invalid user")
        after = None if since is None else schemas.since_of(since)
        before = schemas.position_of(before, "before") if before else ""
        interest = interest_of(client_id, user, schemas.topics_of(topics))
        if after == ACKED:
            after = await self.acks.position_of(client_id, user) if client_id else ""
        # Also without an answer of the store: by then this process has read the log up to now.
        with contextlib.suppress(StoreUnavailable):
            await self.census.report()
        stretch = await self.replay.stretch(interest, after, before, limit, newest_first=newest_first)
        fragments = [orjson.Fragment(next(payloads(entry.frame))) for entry in stretch.entries]
        return schemas.History(notifications=fragments, position=stretch.position, complete=stretch.complete)

    async def delivery(self, id: str) -> schemas.Delivery:
        """Return how many clients a notification was addressed to, and has been handed to, and is still owed to.

        Raises NotFound for an id that the log does not have, or StoreUnavailable.
        """
        _, delivery = await self.deliveries.notification(id)
        return delivery

    # --- the store's Node

    def opened(self, opening: Opening) -> None:
        """Take the log as it is."""
        self.census.started(opening.started_at, opening.age)
        self.fanout.begin(opening.before, opening.records)

    def deliver(self, records: Sequence[Record]) -> None:
        """Take the next records of the log, and hand them to the clients that they are for."""
        self.fanout.append(records)
        for record in records:
            if not record.replayed:
                self.test_notifications.notice(record)

    def missed(self, before: str) -> None:
        """Close all clients: the log, which begins after `before`, does not continue the records that they have.

        It let go of others before this process could read them, or another history counts after a failover.
        """
        logger.error("The log does not continue what this process has delivered; its clients are closed")
        for client in list(self.clients):
            self.admission.dismiss(client, TRY_AGAIN_LATER, "Notifications are missing; connect again and resume")
        self.fanout.begin_anew(before)

    def receive_mail(self, sender: str, message: bytes) -> None:
        self.questions.receive(sender, message)

    def kept(self, since: str) -> tuple[str, bool, Iterator[Record]]:
        log = self.fanout.log
        return log.position_before(log.first_sequence), log.find(since) is not None, self.fanout.records(since)

    def registrations(self) -> Iterable[Registration]:
        return [client.registration(client.topics) for client in self.clients]

    def evicted(self, client_ids: Sequence[str]) -> None:
        """Close these clients: their ids belong to other processes by now."""
        for client_id in client_ids:
            if (client := self.clients.by_id.get(client_id)) is not None:
                self.admission.dismiss(client, POLICY_VIOLATION, "Replaced by a new connection")


# Many notifications in a row have the same, and then share it in memory.
@lru_cache(maxsize=16)
def _audience(*names: tuple[str, ...]) -> Audience:
    return Audience(*map(frozenset, names))


async def _start_again(work: Work) -> None:
    await asyncio.sleep(1)
    await work()
