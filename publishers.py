"""Publishing over connections: many requests on each, published in groups and answered in their order.

Owns the requests between their arrival and their answers, the publishing clients, and the window that bounds both.
Publishing by lines over HTTP is ndjson.py's.

1. The requests of a publisher are published, and answered, in their order.
2. The requests that wait, of all publishers, are one group, and the next is taken when that one is answered: a shared
   store is asked once for many. Two groups at once were not faster.
3. A publisher that has a full window, or does not take its answers, is read no further. It is not closed for that.
4. Whatever has been read is answered, also during the drain. The requests of a client that has left are still
   published.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from msgspec import UNSET, Struct
from msgspec.structs import asdict

import schemas
from clients import Client
from errors import InvalidPublish, KeyReused, NotifydError, ShuttingDown, Unauthorized
from guard_identity import Identity, origin_of
from log import frame
from schemas import encode, error_message, published, timestamp
from store import Draft, Once, Receipt

if TYPE_CHECKING:
    from hub import Hub

logger = logging.getLogger("notifyd.publishers")

# The requests of a publisher that may be without an answer, and their bytes.
WINDOW_REQUESTS, WINDOW_BYTES = 1000, 1_048_576
# Of a group, so that it keeps a shared store busy for no more than about 10 ms.
GROUP_REQUESTS, GROUP_BYTES = 500, 1_048_576
# In the fingerprint of a key, in the place of a path.
FORM = b"publish"


# A published request: its receipt, and its time.
Outcome = tuple[Receipt, str]


class Expected(Struct):
    """A request that has arrived, or its fault, with its size in bytes."""

    publisher: Publisher
    request: schemas.NotifyRequest | NotifydError
    size: int


class Publisher(Protocol):
    """The sender of many requests, as these are published. No call blocks."""

    # Requests that are being published.
    in_flight: int

    @property
    def sender(self) -> Identity | None: ...
    @property
    def address(self) -> str: ...

    def answer(self, expected: Expected, outcome: Outcome | NotifydError) -> None:
        """Take the answer to the oldest request without one."""

    def hand_over(self) -> None:
        """Send the answers so far."""


class PublishingClient:
    """A client that publishes: its requests without an answer, and the answers that it has yet to take."""

    __slots__ = (
        "_answered_size",
        "_answers",
        "_client",
        "_has_left",
        "_is_held",
        "_requests",
        "_settled",
        "_size",
        "in_flight",
    )

    def __init__(self, client: Client) -> None:
        self._client = client
        # The window: requests that have arrived and whose answers have not been written, and their bytes.
        self._requests = self._size = 0
        # Those among them that are being published, and the answers of the others with the bytes of their requests.
        self.in_flight = 0
        self._answers: list[bytes] = []
        self._answered_size = 0
        # Whether the connection is read no further.
        self._is_held = False
        self._has_left = False
        # Set when no request is in flight, or the client has left.
        self._settled: asyncio.Event | None = None

    @property
    def sender(self) -> Identity | None:
        return self._client.identity

    @property
    def address(self) -> str:
        return self._client.peer

    def expect(self, size: int) -> None:
        """Count a request into the window."""
        self._requests += 1
        self._size += size
        if not (self._requests < WINDOW_REQUESTS and self._size < WINDOW_BYTES and self._client.connection.writable):
            self._pace()

    def answer(self, expected: Expected, outcome: Outcome | NotifydError) -> None:
        """Take the answer to the oldest request without one."""
        if isinstance(outcome, NotifydError):
            answer = encode(error_message(outcome.message, _ref(expected.request), outcome.close_code))
        else:
            (id, recipients), at = outcome
            answer = published(id, recipients, _ref(expected.request), at)
        self._answers.append(frame(answer))
        self._answered_size += expected.size
        self.in_flight -= 1
        if not self.in_flight:
            self._settle()

    def hand_over(self, *, at_once: bool = False) -> None:
        """Write the answers, if the client takes them or `at_once`, and read on if the window allows."""
        if self._has_left:
            return
        connection = self._client.connection
        if self._answers and (connection.writable or at_once):
            connection.write(b"".join(self._answers))
            self._requests -= len(self._answers)
            self._size -= self._answered_size
            self._answers, self._answered_size = [], 0
        self._pace()

    def leave(self) -> None:
        """Write no more answers."""
        self._has_left = True
        self._settle()

    async def settled(self) -> None:
        """Return once each request has its answer, written or not, or the client has left."""
        while self.in_flight and not self._has_left:
            self._settled = self._settled or asyncio.Event()
            await self._settled.wait()

    def _settle(self) -> None:
        if self._settled is not None:
            self._settled.set()
            self._settled = None

    def _pace(self) -> None:
        connection = self._client.connection
        is_full = self._requests >= WINDOW_REQUESTS or self._size >= WINDOW_BYTES or not connection.writable
        if is_full != self._is_held:
            self._is_held = is_full
            connection.hold(held=is_full)
            if not is_full:
                # The time in which it was not read was not silence.
                self._client.heard()


class Publishers:
    """The publishers of this process, and the groups of their requests."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._is_open = hub.settings.publish_over_websocket
        self._of: dict[Client, PublishingClient] = {}
        self._waiting: deque[Expected] = deque()
        # Requests of the group under way that earlier ones with the same key had published.
        self._repeated = 0
        # Set when requests wait.
        self._wake = asyncio.Event()
        # Set while none waits or is in flight.
        self._settled = asyncio.Event()
        self._settled.set()

    # --- called by the conversation

    def admits(self, client: Client) -> bool:
        """Whether a client may publish anything."""
        identity = client.identity
        return self._is_open if identity is None else identity.publishes or bool(identity.publish_topics)

    def expect(self, client: Client, request: schemas.Publish | InvalidPublish, size: int) -> Expected:
        """Count a request that has arrived into the window of its client."""
        if (publisher := self._of.get(client)) is None:
            publisher = self._of[client] = PublishingClient(client)
        publisher.expect(size)
        return Expected(publisher, request, size)

    def asked_late(self, client: Client, request: schemas.Publish | InvalidPublish) -> Expected | InvalidPublish:
        """Take a request of a client that could not publish when it arrived, or return why it still may not."""
        if self.admits(client):
            return self.expect(client, request, 0)
        if client.identity is None:
            reason = "Not allowed: to publish over the WebSocket without --publish-over-websocket"
            return InvalidPublish(reason, _ref(request))
        try:
            client.identity.check_publisher()
        except NotifydError as refusal:
            return InvalidPublish(refusal.message, _ref(request))
        raise AssertionError("it may")

    def publish(self, expected: Expected) -> None:
        """Publish a request soon, and answer it."""
        expected.publisher.in_flight += 1
        self._waiting.append(expected)
        if len(self._waiting) == 1:
            self._settled.clear()
            self._wake.set()

    def owes(self, client: Client) -> bool:
        """Whether requests of a client wait for their answers."""
        publisher = self._of.get(client)
        return publisher is not None and publisher.in_flight > 0

    async def answered(self, client: Client) -> None:
        """Return once all requests of a client have been answered, or it has left."""
        if (publisher := self._of.get(client)) is not None:
            await publisher.settled()
            publisher.hand_over(at_once=True)

    def drained(self, client: Client) -> None:
        """Write the answers that a client has not taken so far."""
        if (publisher := self._of.get(client)) is not None:
            publisher.hand_over()

    def forget(self, client: Client) -> None:
        if (publisher := self._of.pop(client, None)) is not None:
            publisher.leave()

    async def settle(self) -> None:
        """Return once every request that has arrived is answered."""
        await self._settled.wait()

    # --- the groups

    async def run(self) -> None:
        """Publish group after group, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                await self._collect()
                group = self._take_group()
                began = self._hub.clock()
                outcomes = await self._publish(group)
                self._count(outcomes, self._hub.clock() - began)
                self._answer(group, outcomes)
            self._settled.set()

    def _answer(self, group: Sequence[Expected], outcomes: Sequence[Outcome | NotifydError]) -> None:
        for expected, outcome in zip(group, outcomes, strict=True):
            expected.publisher.answer(expected, outcome)
        if logger.isEnabledFor(logging.DEBUG):
            _log(group, outcomes)
        for publisher in dict.fromkeys(expected.publisher for expected in group):
            publisher.hand_over()

    async def _collect(self) -> None:
        """Return when nothing more has come in an iteration of the event loop, or enough: a large group costs less."""
        before = 0
        while before < len(self._waiting) < GROUP_REQUESTS:
            before = len(self._waiting)
            await asyncio.sleep(0)

    def _count(self, outcomes: Sequence[Outcome | NotifydError], took: float) -> None:
        refusals = [outcome for outcome in outcomes if isinstance(outcome, NotifydError)]
        for refusal in refusals:
            self._hub.counts.fail(refusal)
        if taken := len(outcomes) - len(refusals):
            self._hub.counts.publish.observe(took, taken)
            # Together: a count of those that were accepted must never fall.
            self._hub.counts.repeated += self._repeated
            self._repeated = 0

    def _take_group(self) -> list[Expected]:
        group: list[Expected] = []
        size = 0
        while self._waiting and len(group) < GROUP_REQUESTS and size < GROUP_BYTES:
            group.append(expected := self._waiting.popleft())
            size += expected.size
        return group

    async def _publish(self, group: Sequence[Expected]) -> list[Outcome | NotifydError]:
        """Publish a group, and return the outcome of each request."""
        outcomes: list[Outcome | NotifydError] = []
        # Without a key, requests in a row are one append.
        appends: list[Append] = []
        for place, expected in enumerate(group):
            drafted = self._draft(expected)
            if isinstance(drafted, NotifydError):
                outcomes.append(drafted)
                continue
            draft, once = drafted
            outcomes.append(UNKNOWN)
            if once is not None or not appends or appends[-1].once is not None:
                appends.append(Append([], [], once))
            appends[-1].places.append(place)
            appends[-1].drafts.append(draft)
        if self._hub.store.append_at_once is None:
            # A shared store takes them in this order, and many in one step.
            done = await asyncio.gather(*map(self._append, appends))
        else:
            done = [await self._append(append) for append in appends]
        for append, found in zip(appends, done, strict=True):
            for place, outcome in zip(append.places, found, strict=True):
                outcomes[place] = outcome
        return outcomes

    def _draft(self, expected: Expected) -> tuple[Draft, Once | None] | NotifydError:
        """Return a request as the store takes it, or its refusal."""
        request, sender = expected.request, expected.publisher.sender
        if isinstance(request, NotifydError):
            return request
        try:
            if sender is not None:
                sender.check_publisher()
                sender.check_publish((request,))
                if sender.expires_at is not None and sender.expires_at <= time.time():
                    raise Unauthorized("Token expired")
                self._hub.check_revoked(sender)
            return self._hub.draft(request), _once(request)
        except NotifydError as refusal:
            return refusal
        except Exception as error:
            return _unexpected(error)

    async def _append(self, append: Append) -> Sequence[Outcome | NotifydError]:
        try:
            drafts = append.drafts if self._hub.is_ready else self._hub.refuse_new(append.once)
            receipts, at, is_repeated = await self._hub.store.append(drafts, append.once)
            if not receipts:
                raise ShuttingDown
            self._repeated += is_repeated
        except KeyReused:
            return [KeyReused("key: already used for another request")]
        except NotifydError as refusal:
            return [refusal] * len(append.drafts)
        except Exception as error:
            return [_unexpected(error)] * len(append.drafts)
        told = timestamp(at)
        return [(receipt, told) for receipt in receipts]


class Append(NamedTuple):
    """One append to the store: requests by their places in the group, and their drafts."""

    places: list[int]
    drafts: list[Draft]
    once: Once | None


UNKNOWN = NotifydError("Internal server error")


def _once(request: schemas.NotifyRequest) -> Once | None:
    """Return the key of a request with a digest of all of it but the key and the `ref`."""
    if not isinstance(request, schemas.Publish) or request.key is UNSET:
        return None
    stated = {name: value for name, value in asdict(request).items() if name not in ("key", "ref")}
    given = {name: value for name, value in stated.items() if value is not UNSET}
    return Once(request.key, hashlib.sha256(FORM + b"\0" + encode(given)).digest())


_WITH_REF = (schemas.Publish, InvalidPublish)


def _ref(request: schemas.NotifyRequest | NotifydError) -> str | None:
    assert isinstance(request, _WITH_REF)
    return None if request.ref is UNSET else request.ref


def _log(group: Sequence[Expected], outcomes: Sequence[Outcome | NotifydError]) -> None:
    for expected, outcome in zip(group, outcomes, strict=True):
        if not isinstance(outcome, NotifydError):
            source = origin_of(expected.publisher.address, expected.publisher.sender)
            logger.debug("Published %s (1) from %s", outcome[0].id, source)


def _unexpected(error: Exception) -> NotifydError:
    logger.error("Unexpected error at a publish", exc_info=error)
    return NotifydError("Internal server error")
