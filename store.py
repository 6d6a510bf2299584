"""The seam between a Hub and its store: one log and one registry, shared by any number of processes.

A process has the newest end of the log in memory; a shared store has all of it, as a StoredLog. Owns that seam, the
values that cross it, and the store in memory, for a single process. The shared stores are store_sqlite.py and
store_redis.py. Knows ids, payloads and audiences; no socket and no frame.

1. The store gives the ids. They increase strictly over all processes, even when a clock is put back.
2. Every process is delivered every record once, its own included, in the one order of the log. Before a coroutine
   returns, the log has been delivered to this process up to the place where the operation was done.
3. An admission and a change of topics return the newest id at that moment. The client is counted in the `recipients`
   of every later record, and of no earlier one. So no count and no seam depends on the speed of a process.
4. A decision that depends on other processes is made in the store, in one step: the limits, the client ids, the keys.
5. An operation that fails, or takes longer than store_timeout, raises StoreUnavailable. `failure` holds the reason
   until the store answers again. The store looks for that by itself, and goes on from where it stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

from bookmarks import Bookmarks, BookmarksInMemory
from buckets import SECOND, Buckets, Draw, Rate
from counts import Durations
from errors import ConnectionRefused, TooManyClients, TooManyConnections
from log import Audience
from positions import Positions
from settings import Settings
from slices import SLICE_SECONDS
from store_keys import IdempotencyKeys

# A process is dead when it has not renewed its lease for this long: its client ids and slots are free.
LEASE_SECONDS = 5.0


class Node(Protocol):
    """The process as its store calls it, always on its event loop. No method may raise or block."""

    def opened(self, opening: Opening) -> None:
        """Take the log as it is; called once, before any deliver()."""

    def deliver(self, records: Sequence[Record]) -> None:
        """Take the next records of the log."""

    def missed(self, before: str) -> None:
        """Forget all records: the log begins after this id, and does not continue them. Its records come next."""

    def receive_mail(self, sender: str, message: bytes) -> None:
        """Take a message that another node has posted."""

    def kept(self, since: str) -> tuple[str, bool, Iterator[Record]]:
        """Return the id before this process's part of the log, whether `since` is known, and the records after it.

        These come with the newest first, and refill a store that lost them. Known is that front, and each id behind it.
        """

    def registrations(self) -> Iterable[Registration]:
        """Return this process's clients, to register them again in a store that lost them."""

    def evicted(self, client_ids: Sequence[str]) -> None:
        """Close these clients: this process was taken for dead, and other processes have admitted their ids."""

    def recipients(self, audience: Audience | None) -> int:
        """Return the number of this process's clients that such a notification is addressed to; None: all of them."""


class StoredLog(Protocol):
    """The whole log, to be read in pages. The coroutines may raise StoreUnavailable; no call depends on its length."""

    @property
    def before(self) -> str:
        """Return the id before the first record, as last known: the records up to it are gone."""

    async def reach(self, since: str | None, interest: Audience, until: str) -> Reach:
        """Return where a reader since this id begins, and the number of notifications for it up to another id.

        That is after `since` if the log gave that id and has everything after it, else where the history begins by its
        bounds. `since` None asks for the whole history, and is complete if nothing has left the log since the start.
        """

    async def read(self, interest: Audience, after: str, until: str, *, newest_first: bool = False) -> Found:
        """Return records for everyone or for these names, after one id and up to another: as many as fit in a page."""

    async def find(self, id: str) -> Counted | None:
        """Return a record within the bounds of the history, with what count() has been given for it."""


class Store(Protocol):
    """One log and one registry. Every coroutine may raise StoreUnavailable."""

    @property
    def log(self) -> StoredLog | None:
        """Return the log beyond the memory of this process; None where the memory has all of it."""

    @property
    def bookmarks(self) -> Bookmarks: ...

    # This process's name in the store; another one after each open().
    node_id: str
    # Why the store cannot be used now; None while it can.
    failure: str | None

    # The durations of its operations, by kind; none where nothing is waited for.
    durations: Durations

    async def open(self, node: Node) -> None:
        """Join. Returns after node.opened(), or at once while the store is away: opened() then comes later."""

    async def close(self) -> None:
        """Leave with all clients, and release everything. Earlier calls of post() and leave() are still done."""

    @property
    def append_at_once(self) -> Callable[[Draft], Receipt] | None:
        """The method that appends a draft as append() does, and never waits; None where others have to be asked."""

    async def append(self, drafts: Sequence[Draft], once: Once | None = None, counter: int | None = None) -> Appended:
        """Append all drafts, or none. Raises KeyReused. Without drafts, only look for an earlier append with the key.

        With `counter` the drafts are this process's test notification of that number. They are appended only if the
        process leads and the last number was one less; otherwise there are no receipts.
        """

    async def admit(self, client: Registration) -> str:
        """Register a client of this process and return the newest id, in one step over all processes.

        Raises, in this order, ClientIdTaken, TooManyConnections when the address has max_connections_per_ip clients,
        TooManyClients when the user has max_connections_per_user, and ConnectionRefused when max_connections clients
        are registered. A refusal changes nothing. A client_id that this process holds already is not taken: the Hub
        knows its own clients.
        """

    async def subscribe(self, client: Registration) -> str:
        """Set the topics of a client of this process, whose user and address stay, and return the newest id."""

    async def online(self, users: Sequence[str]) -> list[int]:
        """Return the number of clients that each user has, in one step."""

    async def revoke(self, user: str, second: int | None = None) -> int:
        """Keep for revocation_ttl that a user's tokens of up to this second, or up to now, are refused; return it."""

    async def revocations(self, place: str) -> tuple[str, dict[str, int]]:
        """Return revocations behind a place LOG/NUMBER, in another LOG the first, and the place behind them."""

    def leave(self, client_id: str) -> None:
        """Remove a client of this process, soon and in order: before any admission that is requested later."""

    async def draw(self, bucket: str, rate: Rate) -> Draw:
        """Take one request out of a bucket that all processes share."""

    async def lead(self) -> int | None:
        """Become or stay the one process that sends test notifications; return the last number, or None."""

    async def report(self, report: Report) -> None:
        """Set this process's counters, for the census."""

    async def census(self) -> Census: ...

    async def count(self, counts: Counts) -> None:
        """Add to the counts of deliveries, all or none; where all is in the memory, do nothing."""

    async def post(self, node_id: str, message: bytes) -> None:
        """Send a message to another node. To a node that is gone it is lost."""


# --- the values


class Draft(NamedTuple):
    """A notification without a place in the log; `rest` is its JSON after the id, from the comma on.

    If it is not to be replayed, it is for everyone or for nobody.
    """

    rest: bytes
    audience: Audience | None = None
    replayed: bool = True


class Record(NamedTuple):
    """A notification in the log, appended at `at`, in seconds since the epoch."""

    id: str
    rest: bytes
    audience: Audience | None
    replayed: bool
    at: float
    # The connected clients that it was addressed to; None where nobody has counted them.
    addressed: int | None = None


class Reach(NamedTuple):
    """The position at which a reader begins, whether that is proven to be complete, and its replay.

    The replay has so many notifications. Of the names that the reader asked for, some may be left out of `interest`:
    the replay, which goes up to `until`, has nothing for them alone.
    """

    position: str
    complete: bool
    replayed: int
    interest: Audience
    until: str


class Found(NamedTuple):
    """A page of records, the id up to which these are all, and the id before the first record of the log."""

    records: list[Record]
    until: str
    before: str


class Counts(NamedTuple):
    """The hand-overs of one process since it has told the last ones, as changes of sums.

    `steps` has, by an id, the change of the number of clients that were handed the broadcasts behind it: all of them
    together are 0. `written` and `addressed` have, by its id, what a notification has beside those and its record.
    """

    steps: dict[str, int]
    written: dict[str, int]
    addressed: dict[str, int]

    def parts(self, size: int) -> Iterator[Counts]:
        """Yield it in parts of so many numbers, with the steps in one."""
        if self.steps:
            yield Counts(self.steps, {}, {})
        for field in ("written", "addressed"):
            numbers = iter(getattr(self, field).items())
            while part := dict(islice(numbers, size)):
                yield Counts({}, {}, {})._replace(**{field: part})


class Counted(NamedTuple):
    """A record, the number of clients it has been handed to, and that of those which a farewell was addressed to."""

    record: Record
    written: int
    addressed: int


class Once(NamedTuple):
    """An Idempotency-Key, and a fingerprint of its request."""

    key: str
    fingerprint: bytes


class Receipt(NamedTuple):
    """The id of a published notification, and the number of connected clients it is addressed to."""

    id: str
    recipients: int


class Appended(NamedTuple):
    """The receipts of an append at `at`, in seconds since the epoch; `repeated` if an earlier request made it."""

    receipts: list[Receipt]
    at: float
    repeated: bool = False


class Opening(NamedTuple):
    """The newest end of the log as a process finds it, and the start of the server: when and how old.

    `before` is the id before the first of the records. These fit in cache_bytes.
    """

    before: str
    records: list[Record]
    started_at: float
    age: float


class Registration(NamedTuple):
    """A client in the registry, with its user and the address whose limit it counts for; either may be empty."""

    client_id: str
    user: str
    topics: Collection[str]
    address: str

    def groups(self) -> list[str]:
        """Return the groups of the registry that have the client as a member, each by its kind and name."""
        groups = [TOPIC + name for name in self.topics]
        if self.user:
            groups.append(USER + self.user)
        if self.address:
            groups.append(ADDRESS + self.address)
        return groups


# The kinds of groups. A registry knows groups alone: it counts their members, and has no other use for a name.
TOPIC, USER, ADDRESS = "topic:", "user:", "address:"


def groups_of(audience: Audience) -> list[str]:
    """Return the groups whose members an audience includes, beside its clients."""
    return [*(TOPIC + name for name in audience.topics), *(USER + name for name in audience.users)]


class Limit(NamedTuple):
    """The members that a group may have, at most."""

    group: str
    most: int

    def check(self, held: int) -> None:
        """Raise TooManyConnections or TooManyClients unless a group with so many members has room."""
        if held < self.most:
            return
        if self.group.startswith(ADDRESS):
            raise TooManyConnections(f"Connection limit exceeded for this address: {held}/{self.most}")
        raise TooManyClients(f"Connection limit exceeded for this user: {held}/{self.most}")


def limits_of(settings: Settings, client: Registration) -> list[Limit]:
    """Return the limits that a newcomer counts for, in the order of their checks."""
    limits = []
    if client.address and settings.max_connections_per_ip:
        limits.append(Limit(ADDRESS + client.address, settings.max_connections_per_ip))
    if client.user and settings.max_connections_per_user:
        limits.append(Limit(USER + client.user, settings.max_connections_per_user))
    return limits


class Report(NamedTuple):
    """The counters of one process since its start."""

    messages_sent: int
    slow_consumers: int


class Census(NamedTuple):
    """The figures of all processes together, and the ids of the other living nodes."""

    active: int
    total: int
    notifications_sent: int
    messages_sent: int
    slow_consumers: int
    others: list[str]


class ClientIdTaken(Exception):
    """Another process has the client_id; `node` is its node_id."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


# --- the store in memory


class MemoryStore:
    """The log and the registry of one process. Its node holds the clients, and no operation waits for another process.

    admit() and the Hub's step after it run without an await in between, so recipients() is exact.
    """

    node_id = ""
    failure: str | None = None
    log = None

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.bookmarks = BookmarksInMemory(settings, clock)
        self._settings = settings
        self._clock = clock
        self.durations = Durations()
        self._positions = Positions()
        self._newest = self._positions.next()
        self._keys = IdempotencyKeys(settings.history_size, settings.history_ttl)
        # The keys of appends in flight.
        self._in_flight: dict[str, asyncio.Event] = {}
        self._opened = False
        self._counter = 0
        self._total = 0
        self._notifications_sent = 0
        self._report = Report(0, 0)
        self._buckets = Buckets()
        # The limits that each client counts for, and the members of each limited group.
        self._limits: dict[str, list[Limit]] = {}
        self._members: Counter[str] = Counter()

    async def open(self, node: Node) -> None:
        self._node = node
        # Held by a batch: where it takes more than one step, the next batch comes behind it.
        self._batch = asyncio.Lock()
        # A Hub that is started again continues its log.
        if not self._opened:
            self._opened = True
            node.opened(Opening(self._newest, [], time.time(), 0.0))

    async def close(self) -> None:
        pass

    def append_at_once(self, draft: Draft) -> Receipt:
        rest, audience, replayed = draft
        id, recipients = self._positions.next(), self._node.recipients(audience)
        self._newest = id
        self._notifications_sent += 1
        self._node.deliver((Record(id, rest, audience, replayed, time.time(), recipients),))
        return Receipt(id, recipients)

    async def append(self, drafts: Sequence[Draft], once: Once | None = None, counter: int | None = None) -> Appended:
        if counter is not None:
            self._counter = counter
        if once is None:
            if len(drafts) == 1:
                return Appended([self.append_at_once(drafts[0])], time.time())
            return await self._append(drafts)
        while (in_flight := self._in_flight.get(once.key)) is not None:
            await in_flight.wait()
        if (known := self._keys.find(once, self._clock())) is not None:
            return known
        done = self._in_flight[once.key] = asyncio.Event()
        try:
            appended = await self._append(drafts)
            if drafts:
                self._keys.keep(once, appended, self._clock())
        finally:
            del self._in_flight[once.key]
            done.set()
        return appended

    async def _append(self, drafts: Sequence[Draft]) -> Appended:
        async with self._batch:
            now, began, node = time.time(), self._clock(), self._node
            records: list[Record] = []
            receipts = []
            for draft in drafts:
                receipts.append(receipt := Receipt(self._positions.next(), node.recipients(draft.audience)))
                records.append(Record(receipt.id, *draft, now, receipt.recipients))
                self._newest = receipt.id
                self._notifications_sent += 1
                if self._clock() > began + SLICE_SECONDS:
                    # A large batch for large audiences must not starve the other tasks.
                    node.deliver(records)
                    records = []
                    await asyncio.sleep(0)
                    began = self._clock()
            if records:
                node.deliver(records)
        return Appended(receipts, now)

    async def admit(self, client: Registration) -> str:
        limits, most = limits_of(self._settings, client), self._settings.max_connections
        for limit in limits:
            limit.check(self._members[limit.group])
        if (active := self._node.recipients(None)) >= most:
            raise ConnectionRefused(f"Connection limit exceeded: {active}/{most}")
        self._total += 1
        if limits:
            self._limits[client.client_id] = limits
            self._members.update(limit.group for limit in limits)
        return self._newest

    async def subscribe(self, client: Registration) -> str:  # noqa: ARG002
        return self._newest

    async def online(self, users: Sequence[str]) -> list[int]:
        nobody = frozenset[str]()
        return [self._node.recipients(Audience(nobody, nobody, frozenset((user,)))) for user in users]

    async def revoke(self, user: str, second: int | None = None) -> int:  # noqa: ARG002
        return int(time.time()) if second is None else second

    async def revocations(self, place: str) -> tuple[str, dict[str, int]]:
        return place, {}

    def leave(self, client_id: str) -> None:
        for limit in self._limits.pop(client_id, ()):
            self._members[limit.group] -= 1
            if not self._members[limit.group]:
                del self._members[limit.group]

    async def draw(self, bucket: str, rate: Rate) -> Draw:
        return self._buckets.draw(bucket, rate, int(self._clock() * SECOND))

    async def lead(self) -> int | None:
        return self._counter

    async def report(self, report: Report) -> None:
        self._report = report

    async def census(self) -> Census:
        active = self._node.recipients(None)
        return Census(active, self._total, self._notifications_sent, *self._report, [])

    async def count(self, counts: Counts) -> None:
        pass

    async def post(self, node_id: str, message: bytes) -> None:
        pass
