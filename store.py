"""What a store promises the Hub: one log, and one registry of clients, however many processes share them.

Owns the seam between a Hub and its store, and the store in memory, which is this one process. The shared ones are
store_sqlite.py and store_redis.py. Knows ids, payloads and audiences; no socket, no frame.

1. The store gives the ids: strictly increasing over all processes, whatever the clocks do.
2. Every process is told every record once, in the one order of the log (`Node.deliver`); also its own. Before a
   coroutine returns, this process has been told the log up to the place at which it was done.
3. An admission and a change of topics answer with the newest id at that moment. A record after it is the client's
   to have, and counts it in `recipients`; one before is not. So no count and no seam depends on who is how fast.
4. What another process may change is decided in the store, in one step: the limit, the client ids, the keys.
5. Whatever takes longer than store_timeout, or fails, raises StoreUnavailable; `failure` then says why, until the
   store answers again. Nobody has to ask again for that: the store looks for itself, and goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from errors import ConnectionRefused, KeyReused, TooManyConnections
from log import Audience, Positions
from settings import Settings
from slices import SLICE_SECONDS

# A process that has not renewed its lease for so long is dead: its client ids and slots are free.
LEASE_SECONDS = 5.0


class Draft(NamedTuple):
    """A notification that has no place in the log yet; `rest` is its JSON behind the id, from the comma on."""

    rest: bytes
    audience: Audience | None = None
    replayed: bool = True


class Record(NamedTuple):
    """A notification in the log; `at` is when it was appended, in seconds since the epoch."""

    id: str
    rest: bytes
    audience: Audience | None
    replayed: bool
    at: float


class Opening(NamedTuple):
    """The log as a process finds it: its records, the id before the first, when it all started and how long ago."""

    before: str
    records: list[Record]
    started_at: float
    age: float


class Registration(NamedTuple):
    """A client as the registry has it: its topics, and the address that it counts for."""

    client_id: str
    topics: Collection[str]
    address: str


class Report(NamedTuple):
    """What one process has counted since it started."""

    messages_sent: int
    slow_consumers: int


class Census(NamedTuple):
    """The figures of all processes together, and the ids of the other nodes that are alive."""

    active: int
    total: int
    notifications_sent: int
    messages_sent: int
    slow_consumers: int
    others: list[str]


class ClientIdTaken(Exception):
    """The client_id is another process's; `node` is whose."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.node = node


class Node(Protocol):
    """What a store asks of the process that uses it, always on its event loop. None of these may raise or block."""

    def opened(self, opening: Opening) -> None:
        """Take the log as it is; called once before any deliver()."""

    def deliver(self, records: Sequence[Record]) -> None:
        """Take the next records of the log."""

    def missed(self) -> None:
        """Hear that records are lost for this process: the log let go of them before it could read them."""

    def receive_mail(self, sender: str, message: bytes) -> None:
        """Take a message that another node has posted."""

    def kept(self) -> tuple[str, Iterable[Record]]:
        """Return what this process has of the log, to put it back where the store lost it, and the id before that."""

    def registrations(self) -> Iterable[Registration]:
        """Return this process's clients, to register them again where the store lost them."""

    def evicted(self, client_ids: Sequence[str]) -> None:
        """Hear that these clients belong to other processes by now: this one was taken for dead."""

    def active_connections(self) -> int: ...

    def recipients(self, audience: Audience | None) -> int:
        """Return how many of this process's clients a notification is addressed to."""


class Store(Protocol):
    """One log and one registry. Every coroutine may raise StoreUnavailable."""

    # This process as the store knows it; a new one for each start.
    node_id: str
    # Why the store cannot be used now; None while it can.
    failure: str | None

    async def open(self, node: Node) -> None:
        """Join. Returns after node.opened(), or at once while the store is away: opened() then comes later."""

    async def close(self) -> None:
        """Leave with all clients, and let go of everything. What was posted and left before is still done."""

    async def append(self, drafts: Sequence[Draft], once: Once | None = None, counter: int | None = None) -> Appended:
        """Append all of them or none. Raises KeyReused.

        With `counter` they are this process's test notification of that number, and nothing is appended (no
        receipts) unless the process leads and the last one had the number before.
        """

    async def admit(self, client_id: str, topics: Collection[str], address: str) -> str:
        """Register a client of this process and return the newest id, in one step over all processes.

        Raises, in this order, ClientIdTaken, TooManyConnections when the address has max_connections_per_ip clients,
        and ConnectionRefused when max_connections clients are registered. A refusal changes nothing. A client_id that
        this process holds already is not taken: the Hub knows its own clients. An empty address has no limit.
        """

    async def subscribe(self, client_id: str, topics: Collection[str]) -> str:
        """Set the topics of a client of this process and return the newest id."""

    def leave(self, client_id: str) -> None:
        """Take a client of this process out, soon and in order: before any admission that is asked for later."""

    async def draw(self, bucket: str, rate: Rate) -> Draw:
        """Take one request out of a bucket that all processes share."""

    async def lead(self) -> int | None:
        """Become or stay the one process that sends test notifications; return the last one's number, or None."""

    async def report(self, report: Report) -> None:
        """Put down what this process has counted, for the census."""

    async def census(self) -> Census: ...

    async def post(self, node_id: str, message: bytes) -> None:
        """Send a message to another node; to one that is gone, it is lost."""


class MemoryStore:
    """The log and the registry of one process: the Hub's own. Nothing here waits, but for the others' turn."""

    node_id = ""
    failure: str | None = None

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_connections = settings.max_connections
        self._max_per_address = settings.max_connections_per_ip
        self._clock = clock
        self._positions = Positions()
        self._newest = self._positions.next()
        self._keys = IdempotencyKeys(settings.history_size, settings.history_ttl)
        self._opened = False
        # The keys of what is being appended.
        self._under_way: dict[str, asyncio.Event] = {}
        self._counter = 0
        self._total = 0
        self._notifications_sent = 0
        self._report = Report(0, 0)
        self._buckets = Buckets()
        # Empty unless addresses are limited: the address of each client, and how many clients each address has.
        self._addresses: dict[str, str] = {}
        self._clients_of: dict[str, int] = {}

    async def open(self, node: Node) -> None:
        self._node = node
        # A Hub that is started again goes on with the log that it has.
        if not self._opened:
            self._opened = True
            node.opened(Opening(self._newest, [], time.time(), 0.0))

    async def close(self) -> None:
        pass

    async def append(self, drafts: Sequence[Draft], once: Once | None = None, counter: int | None = None) -> Appended:
        if counter is not None:
            self._counter = counter
        if once is None:
            return await self._append(drafts)
        while (under_way := self._under_way.get(once.key)) is not None:
            await under_way.wait()
        if (known := self._keys.find(once, self._clock())) is not None:
            return known
        done = self._under_way[once.key] = asyncio.Event()
        try:
            appended = await self._append(drafts)
            self._keys.keep(once, appended, self._clock())
        finally:
            del self._under_way[once.key]
            done.set()
        return appended

    async def _append(self, drafts: Sequence[Draft]) -> Appended:
        now, began, node = time.time(), self._clock(), self._node
        records: list[Record] = []
        receipts = []
        for draft in drafts:
            record = Record(self._positions.next(), *draft, now)
            records.append(record)
            receipts.append(Receipt(record.id, node.recipients(record.audience)))
            if self._clock() > began + SLICE_SECONDS:
                # A large batch for large audiences: the others' turn.
                self._hand_over(records)
                records = []
                await asyncio.sleep(0)
                began = self._clock()
        if records:
            self._hand_over(records)
        return Appended(receipts, now)

    def _hand_over(self, records: Sequence[Record]) -> None:
        self._newest = records[-1].id
        self._notifications_sent += len(records)
        self._node.deliver(records)

    async def admit(self, client_id: str, topics: Collection[str], address: str) -> str:  # noqa: ARG002
        # Without await up to the Hub's join: active_connections() counts every client that was admitted before.
        if self._max_per_address and (held := self._clients_of.get(address, 0)) >= self._max_per_address:
            raise address_is_full(held, self._max_per_address)
        if (active := self._node.active_connections()) >= self._max_connections:
            raise ConnectionRefused(f"Connection limit exceeded: {active}/{self._max_connections}")
        self._total += 1
        if self._max_per_address and address:
            self._addresses[client_id] = address
            self._clients_of[address] = self._clients_of.get(address, 0) + 1
        return self._newest

    async def subscribe(self, client_id: str, topics: Collection[str]) -> str:  # noqa: ARG002
        return self._newest

    def leave(self, client_id: str) -> None:
        if (address := self._addresses.pop(client_id, None)) is not None:
            self._clients_of[address] -= 1
            if not self._clients_of[address]:
                del self._clients_of[address]

    async def draw(self, bucket: str, rate: Rate) -> Draw:
        return self._buckets.draw(bucket, rate, int(self._clock() * SECOND))

    async def lead(self) -> int | None:
        return self._counter

    async def report(self, report: Report) -> None:
        self._report = report

    async def census(self) -> Census:
        active = self._node.active_connections()
        return Census(active, self._total, self._notifications_sent, *self._report, [])

    async def post(self, node_id: str, message: bytes) -> None:
        pass


def address_is_full(held: int, limit: int) -> TooManyConnections:
    return TooManyConnections(f"Connection limit exceeded for this address: {held}/{limit}")


def make_store(settings: Settings, clock: Callable[[], float]) -> Store:
    """Return the store that `settings.store` names."""
    kind, _, place = settings.store.partition(":")
    if kind == "sqlite":
        from store_sqlite import SqliteStore  # noqa: PLC0415

        return SqliteStore(settings, place)
    if kind not in ("auto", "memory"):
        from store_redis import RedisStore  # noqa: PLC0415

        return RedisStore(settings, settings.store)
    return MemoryStore(settings, clock)


class Receipt(NamedTuple):
    """The id of a published notification, and how many connected clients it is addressed to."""

    id: str
    recipients: int


class Appended(NamedTuple):
    """The receipts of what was appended at `at`, in seconds since the epoch; `repeated` where that was before."""

    receipts: list[Receipt]
    at: float
    repeated: bool = False


class Once(NamedTuple):
    """An Idempotency-Key, and what stands for the request that it came with."""

    key: str
    fingerprint: bytes


class _Kept(NamedTuple):
    fingerprint: bytes
    appended: Appended
    at: float


class IdempotencyKeys:
    """What was appended, by key, the oldest first: at most `max_receipts`, for at most `max_age` seconds."""

    def __init__(self, max_receipts: int, max_age: float) -> None:
        self._max_receipts = max_receipts
        self._max_age = max_age
        self._kept: dict[str, _Kept] = {}
        self._receipts = 0

    def find(self, once: Once, now: float) -> Appended | None:
        """Return what the request appended before. Raises KeyReused where the key came with another request."""
        while self._kept and now - next(iter(self._kept.values())).at > self._max_age:
            self._forget_oldest()
        if (known := self._kept.get(once.key)) is None:
            return None
        check_reuse(once, known.fingerprint)
        return known.appended._replace(repeated=True)

    def keep(self, once: Once, appended: Appended, now: float) -> None:
        """Remember a request that find() did not know. The newest is kept whatever its size."""
        self._kept[once.key] = _Kept(once.fingerprint, appended, now)
        self._receipts += len(appended.receipts)
        while self._receipts > self._max_receipts and len(self._kept) > 1:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        oldest = self._kept.pop(next(iter(self._kept)))
        self._receipts -= len(oldest.appended.receipts)


def check_reuse(once: Once, fingerprint: bytes) -> None:
    """Raise KeyReused unless the key came with the same request before."""
    if once.fingerprint != fingerprint:
        raise KeyReused("Idempotency-Key: already used for another request")


SECOND = 1_000_000


class Rate(NamedTuple):
    """So many requests a second, and so many at once out of a full bucket."""

    per_second: int
    burst: int

    @property
    def cost(self) -> int:
        """The microseconds in which one request is refilled."""
        return SECOND // self.per_second

    @property
    def depth(self) -> int:
        """The microseconds in which an empty bucket is full again."""
        return self.burst * self.cost


class Draw(NamedTuple):
    """Whether a request was let through, and the microseconds until its bucket is full."""

    allowed: bool
    until_full: int


def draw(full_at: int, now: int, rate: Rate) -> Draw:
    """Take one request out of the bucket that is full at `full_at`."""
    # Where the clock was put back, the bucket is empty, and no worse.
    left = min(max(full_at - now, 0), rate.depth)
    return Draw(True, left + rate.cost) if left + rate.cost <= rate.depth else Draw(False, left)


class Buckets:
    """Buckets by name, of one process. One that is full is forgotten within a second."""

    def __init__(self) -> None:
        self._full_at: dict[str, int] = {}
        self._swept = 0

    def draw(self, name: str, rate: Rate, now: int) -> Draw:
        drawn = draw(self._full_at.get(name, 0), now, rate)
        self.put(name, drawn, now)
        return drawn

    def put(self, name: str, drawn: Draw, now: int) -> None:
        """Set a bucket to what was found elsewhere."""
        # So there are never more than requests came in the last seconds.
        if now - self._swept > SECOND:
            self._swept = now
            self._full_at = {name: at for name, at in self._full_at.items() if at > now}
        self._full_at[name] = now + drawn.until_full

    def refusal(self, name: str, rate: Rate, now: int) -> Draw | None:
        """Return the refusal where the bucket is known to hold no whole request."""
        drawn = draw(self._full_at.get(name, 0), now, rate)
        return None if drawn.allowed else drawn

    def __len__(self) -> int:
        return len(self._full_at)
