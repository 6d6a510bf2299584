"""A model of the Hub from the protocol alone: it knows each client's backlog through any interleaving.

HubMachine is a Hypothesis state machine that plays publishers, clients, networks and time against the real Hub. The
clients' connections record everything from the Hub, and its close. LaggingStore stands in for a shared store.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from random import Random
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from virtual import FakeConnection, VirtualLoop

import fanout as fanout_module
import log as log_module
import readers as readers_module
import replay as replay_module
from admission import Newcomer
from connection import ConnectionState, Receiver
from errors import ConnectionRefused, DuplicateClient, NotFound, NotifydError, ShuttingDown, TooManyClients
from hub import Hub
from log import Audience, payloads
from schemas import NotifyRequest
from settings import Settings
from store import Appended, Counted, Counts, Draft, Found, MemoryStore, Once, Reach, Receipt, Record, Registration

logger = logging.getLogger("notifyd")

# Small enough that notifications expire and clients fall behind within a few steps.
SMALL = Settings(
    history_size=6,
    history_bytes=2500,
    history_ttl=10,
    max_connections=4,
    max_connections_per_user=2,
    ping_interval=6,
    ping_timeout=25,
    notification_interval=7.3137,  # so that it never coincides with anything else
    shutdown_timeout=40,
    drain_rate=5,
)
NAMES = ["ann", "bob", "cat", "dan", "eve"]
TOPICS = ["red", "green", "blue"]
USERS = ["uma", "red"]
NEVER_GIVEN = [
    "00000000-0000-0000-0000-000000000000",
    "550e8400-e29b-41d4-a716-446655440000",
    "ffffffff-ffff-7fff-bfff-ffffffffffff",
]
SLOW = re.compile(r"Slow consumer: (\d+) notifications behind; resume with since=(\S+)")
SHUTDOWN = "shutdown"
FAREWELL = "Server is shutting down. Please reconnect later."
SOME_TIME = "2026-01-31T12:00:00.000Z"

Result = TypeVar("Result")
Addressees = tuple[Collection[str], Collection[str], Collection[str]]  # clients, topics and users


def now(work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of a coroutine that never waits, like those of the store in memory."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


# --- the model


class Published(NamedTuple):
    """One entry of the model's log; `audience` None is everyone."""

    id: str
    text: str
    size: int
    at: float
    replayed: bool
    audience: Addressees | None
    addressed: int

    def is_for(self, client_id: str | None, user: str, topics: Collection[str]) -> bool:
        if self.audience is None:
            return True
        clients, names, users = self.audience
        return client_id in clients or user in users or bool(set(names) & set(topics))


class Session(FakeConnection):
    """One connection, with its notifications by the model, and the bytes from the Hub."""

    def __init__(
        self, model: Model, client_id: str, user: str, topics: frozenset[str], since: str | None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.model = model
        self.client_id = client_id
        self.user = user
        self.topics = topics
        self.since = since
        # Ids, and SHUTDOWN at the end.
        self.owed: list[str] = []
        self.received: list[str] = []
        self.heard_at = 0.0
        self.is_contested = False
        # The topics and the since of a subscription that is under way.
        self.asked: tuple[frozenset[str], str] | None = None
        self.has_resumed = False

    def accept(self, receiver: Receiver, greeting: bytes, position: str) -> None:
        self.model.admit(self)
        super().accept(receiver, greeting, position)
        self.model.check_greeting(self)

    def write(self, frames: bytes) -> None:
        self.model.observe()
        for message in map(orjson.loads, payloads(frames)):
            if "id" in message:
                self.received.append(message["id"])
                self.position = max(message["id"], self.position)
                self.model.check_notification(self, message)
            elif message["type"] == SHUTDOWN:
                self.received.append(SHUTDOWN)
            elif message["type"] == "position":
                self.model.check_position(self, message["position"])
                self.position = message["position"]
            elif message["type"] == "resume" and self.asked is not None:
                self.model.check_replay(self, *self.asked, message["data"])
                self.asked = None
        super().write(frames)

    def say(self, message: str | None = None) -> None:
        self.heard_at = self.model.loop.time()
        super().say(message)

    def close(self, code: int, reason: str) -> None:
        if self.state is ConnectionState.OPEN:
            self.model.observe()
            self.model.check_goodbye(self, code, reason)
            self.model.part(self)
        super().close(code, reason)

    def end(self) -> None:
        self.model.part(self)
        super().end()

    def backlog(self) -> list[str]:
        return self.owed[len(self.received) :]


class Model:
    """The promises of the protocol: the log, the reach of the history, and the backlog of each client."""

    def __init__(self, hub: Hub, loop: VirtualLoop) -> None:
        self.hub = hub
        self.loop = loop
        self.log: list[Published] = []
        self.sessions: dict[str, Session] = {}  # those that are connected
        self.parted: list[Session] = []
        self.admitted = 0
        self.slow_consumers = 0
        self.draining = False
        self.faults: list[str] = []
        self.origin = self.newest()

    def fault_unless(self, good: object, fault: str) -> None:
        """Note a fault for the next invariant: raised inside the Hub it would only disturb it."""
        if not good:
            self.faults.append(fault)

    def newest(self) -> str:
        return self.hub.fanout.log.position

    @property
    def position(self) -> str:
        return self.log[-1].id if self.log else self.origin

    # Clients.

    def admit(self, session: Session) -> None:
        self.observe()
        self.admitted += 1
        session.heard_at = self.loop.time()
        if session.since is not None:
            missed, _ = self.missed(session.since, session.client_id, session.user, session.topics)
            session.owed = [one.id for one in missed]
        self.fault_unless(session.client_id not in self.sessions, f"{session.client_id} is there twice")
        self.sessions[session.client_id] = session

    def part(self, session: Session) -> None:
        if self.sessions.get(session.client_id) is session:
            del self.sessions[session.client_id]
            self.parted.append(session)

    def everyone(self) -> Iterator[Session]:
        yield from self.parted
        yield from self.sessions.values()

    # Publishing.

    def publish(self, id: str, request: NotifyRequest) -> int:
        """Note a published notification, and return the number of connected clients it is for."""
        clients, topics, users = request.clients or (), sorted(set(request.topics or ())), request.users or ()
        body = {"id": id, "type": "custom", "timestamp": SOME_TIME, "data": {"message": request.message}}
        body |= {"topics": topics} if topics else {}
        return self._append(
            body, replayed=True, audience=(clients, topics, users) if clients or topics or users else None
        )

    def observe(self) -> None:
        """Note a notification of the Hub itself: a test notification, or the `system` at the end."""
        unseen = now(self.hub.store.census()).notifications_sent - len(self.log)
        self.fault_unless(unseen in (0, 1), f"{unseen} notifications that nobody published")
        if unseen == 1 and self.draining:
            self._observe_system()
        elif unseen == 1:
            self._observe_test()

    def _observe_test(self) -> None:
        count = 1 + sum(one.text.startswith("Test") for one in self.log)
        data = {"message": f"Test notification #{count}", "counter": count, "uptime_seconds": 0.0}
        data |= {"active_connections": len(self.sessions), "server_time": SOME_TIME}
        body = {"id": self.newest(), "type": "test_notification", "timestamp": SOME_TIME, "data": data}
        self._append(body, replayed=False, at=count * SMALL.notification_interval)

    def _observe_system(self) -> None:
        data = {"message": FAREWELL, "priority": "high", "system_time": SOME_TIME}
        body = {"id": self.newest(), "type": "system", "timestamp": SOME_TIME, "data": data}
        self._append(body, replayed=False, sender="system")
        for session in self.sessions.values():
            session.owed.append(SHUTDOWN)

    def _append(
        self,
        body: dict[str, Any],
        *,
        replayed: bool,
        audience: Addressees | None = None,
        at: float | None = None,
        sender: str = "notification_service",
    ) -> int:
        payload = orjson.dumps(body | {"sender": sender})
        size = len(payload) + (2 if len(payload) < 126 else 4)
        size += sum(len(name) + log_module.NAME_BYTES for names in audience or () for name in set(names))
        at = self.loop.time() if at is None else at
        self.fault_unless(body["id"] > self.position, f"{body['id']} does not come after {self.position}")
        one = Published(body["id"], body["data"]["message"], size, at, replayed, audience, 0)
        addressed = [each for each in self.sessions.values() if one.is_for(each.client_id, each.user, each.topics)]
        self.log.append(one._replace(addressed=len(addressed)))
        for session in addressed:
            session.owed.append(body["id"])
        return len(addressed)

    def delivery(self, one: Published) -> tuple[int, int, int]:
        """Return how many clients it was addressed to, has been handed to, and is still owed to."""
        written = sum(session.received.count(one.id) for session in self.everyone())
        return one.addressed, written, sum(one.id in session.backlog() for session in self.sessions.values())

    def delivered(self, one: Published, state: str) -> list[str]:
        """Return the connected clients that have it, or are behind it."""
        sessions = self.sessions.values()
        return sorted(
            each.client_id for each in sessions if one.id in (each.backlog() if state == "pending" else each.received)
        )

    # How far back the history reaches.

    def front(self, now: float) -> int:
        """Return the index of the oldest entry that was within the bounds at that time, of those that were there."""
        entries = [one for one in self.log if one.at <= now]
        count = size = 0
        for index in range(len(entries) - 1, -1, -1):
            entry = entries[index]
            count += entry.replayed
            size += entry.size
            too_old = now - entry.at > SMALL.history_ttl
            if too_old or count > SMALL.history_size or size > SMALL.history_bytes:
                return index + 1
        return 0

    def missed(
        self, since: str | None, client_id: str | None, user: str, topics: Collection[str]
    ) -> tuple[list[Published], bool]:
        """Return the notifications to replay, and whether these are provably all."""
        if since == "":
            return [], True
        ids = [self.origin, *(one.id for one in self.log)]
        after = 0 if since is None else ids.index(since) if since in ids else -1
        front = self.front(self.loop.time())
        kept = self.log[max(after, front) :]
        return [one for one in kept if one.replayed and one.is_for(client_id, user, topics)], after >= front

    # Checks at the moment of an event.

    def check_greeting(self, session: Session) -> None:
        types = [message["type"] for message in session.messages]
        self.fault_unless(types[0] == "welcome", f"the first message is {types[0]}")
        self.fault_unless(types.count("welcome") == 1, "welcomed twice")
        if session.since is None:
            self.fault_unless("resume" not in types, "a resume that nobody asked for")
            return
        missed, complete = self.missed(session.since, session.client_id, session.user, session.topics)
        promised = {"position": self.position, "replayed": len(missed), "complete": complete}
        resume = session.messages[1]
        self.fault_unless(resume["type"] == "resume", f"after the welcome comes {resume}")
        self.fault_unless(resume.get("data") == promised, f"{resume} instead of {promised}")

    def check_position(self, session: Session, position: str) -> None:
        """Find fault with a position that the client knows already, or from which it would miss a notification."""
        told = session.is_stream or session.since is not None or session.has_resumed
        self.fault_unless(told and position == self.position, f"{session.client_id} is told {position}")
        self.fault_unless(position != session.position, f"{session.client_id} is told {position} again")
        self.fault_unless(not session.backlog(), f"{session.client_id} would miss {session.backlog()}")

    def check_replay(self, session: Session, topics: frozenset[str], since: str, resume: Any) -> None:
        """Owe the session what it missed of these topics, in the order of the log, and nothing that it has."""
        missed, complete = self.missed(since, None, "", topics)
        replay = [one.id for one in missed if one.audience is not None and one.id not in session.owed]
        backlog = session.backlog()
        ids = [self.origin, *(one.id for one in self.log)]
        # A client with a backlog must not resume behind it. The farewell alone is none: it is no entry of the log.
        lacks_entries = backlog and backlog[0] in ids and backlog[1:] != [SHUTDOWN]
        position = ids[ids.index(backlog[0]) - 1] if lacks_entries else self.position
        promised = {"position": position, "replayed": len(replay), "complete": complete}
        if readers_module.NEAR_ENTRIES < 1000 and resume["position"] < position:
            # A reader resumes from its place, and between that and its backlog may be notifications for others.
            promised["position"] = position = resume["position"]
        self.fault_unless(resume == promised, f"{resume} instead of {promised}")
        session.position, session.has_resumed = max(position, session.position), True
        del session.owed[len(session.received) :]
        # SHUTDOWN comes after every id.
        session.owed += sorted(backlog + replay)

    def check_notification(self, session: Session, message: Any) -> None:
        self.fault_unless(session.writable, f"{session.client_id} is written to and is not writable")
        known = next((one for one in self.log if one.id == message["id"]), None)
        topics = None if known is None or known.audience is None else list(known.audience[1]) or None
        as_published = known is not None and known.text == message["data"]["message"]
        self.fault_unless(as_published and topics == message.get("topics"), f"never published: {message}")

    def check_goodbye(self, session: Session, code: int, reason: str) -> None:
        """Find fault with a close that the client has not deserved, or that does not tell it how to go on."""
        if slow := SLOW.fullmatch(reason):
            self.slow_consumers += 1
            self._check_slow_consumer(session, int(slow[1]), slow[2])
            session.position = slow[2]
        elif reason == "Ping timeout":
            silent_for = self.loop.time() - session.heard_at
            deserved = (session.is_contested and not session.is_alive) or silent_for > SMALL.ping_timeout
            self.fault_unless(code == 1011 and deserved, f"{session.client_id}: ping timeout after {silent_for} s")
        elif reason == "Replaced by a new connection":
            deserved = session.is_contested and session.is_stream
            self.fault_unless(code == 1008 and deserved, f"{session.client_id} is replaced")
        else:
            going = self.draining and (code, reason) == (1001, "Server shutting down")
            self.fault_unless(going, f"{session.client_id} is closed: {code} {reason}")
            self.fault_unless(not (session.backlog() and session.writable), f"{session.client_id} closed too early")

    def _check_slow_consumer(self, session: Session, behind: int, since: str) -> None:
        owed = [one for one in session.backlog() if one != SHUTDOWN]
        front_id = self.log[self.front(self.loop.time()) - 1].id
        self.fault_unless(not session.writable, f"{session.client_id} can be written to and is a slow consumer")
        self.fault_unless(owed and owed[0] <= front_id, f"{session.client_id} is owed nothing that is gone")
        self.fault_unless(behind == len(owed), f"{behind} notifications behind, and owed {len(owed)}")
        self.fault_unless(owed and since < owed[0], f"resuming after {since} would skip {owed[:1]}")
        # What came before the replay of a subscription is newer than that.
        repeated = [one for one in session.received if since < one < owed[0]]
        self.fault_unless(not repeated, f"resuming after {since} would repeat {repeated}")


# --- the machine

names = st.sampled_from(NAMES)
users = st.sampled_from(["", *USERS])
topic_sets = st.frozensets(st.sampled_from(TOPICS), max_size=2)
someone = st.integers(0, 3)
turns = st.integers(0, 4)
# The start of a client's resume: the id before last, say; now; an id that the log never gave; or none.
moments = st.none() | st.just("") | st.integers(0, 12) | st.sampled_from(NEVER_GIVEN)
kinds = st.sampled_from(
    [
        {},
        {"room": 1},  # stalls right after its greeting
        {"one_at_a_time": True},
        {"one_at_a_time": True, "room": 2},
        {"one_at_a_time": True, "is_stream": True},
    ]
)
everyone = st.none()
groups = (names, st.sampled_from(TOPICS), st.sampled_from(USERS))
some = st.tuples(*(st.lists(group, max_size=2) for group in groups)).filter(any)
paddings = st.sampled_from([0, 0, 0, 300, 900])
publications = st.tuples(everyone | some, paddings)


class HubMachine(RuleBasedStateMachine):
    """Publishers, clients, networks and time."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.stack.enter_context(mock.patch.object(fanout_module, "SLICE_CLIENTS", 2))
        self.loop = VirtualLoop()
        self.stack.callback(self.loop.close)
        self.hub = Hub(SMALL, clock=self.loop.time)
        self.hub.census.uptime = lambda: 0.0  # type: ignore[method-assign]  # as many digits each time
        self.loop.run_until_complete(self.hub.start())
        self.model = Model(self.hub, self.loop)
        self.stack.enter_context(mock.patch.object(logger, "handlers", [_Alarm(self.model.faults)]))
        self.stack.enter_context(mock.patch.object(logger, "propagate", False))
        self.loop.set_exception_handler(lambda _, context: self.model.faults.append(str(context)))
        self.published = 0
        self.drain: asyncio.Task[None] | None = None

    def session(self, index: int) -> Session:
        sessions = list(self.model.sessions.values())
        return sessions[index % len(sessions)]

    def somebody_is_there(self) -> bool:
        return bool(self.model.sessions)

    def is_open(self) -> bool:
        return not self.model.draining

    def request(self, addressees: Addressees | None, padding: int) -> NotifyRequest:
        self.published += 1
        named = zip(("clients", "topics", "users"), addressees or (), strict=False)
        fields = {kind: list(names) for kind, names in named if names}
        return NotifyRequest(message=f"{self.published} {'x' * padding}", **fields)

    def publish(self, wanted: Sequence[NotifyRequest]) -> None:
        self.model.observe()
        receipts = now(self.hub.publish(wanted)).receipts
        recipients = [self.model.publish(receipt.id, one) for receipt, one in zip(receipts, wanted, strict=True)]
        assert [receipt.recipients for receipt in receipts] == recipients

    def settle(self) -> None:
        """Let everything be done that can be done without time passing."""
        self.loop.turn(60)
        self.loop.call(self.model.observe)

    # Publishers.

    @precondition(is_open)
    @rule(publication=publications, turns=turns)
    def publish_one(self, publication: tuple[Any, int], turns: int) -> None:
        self.loop.call(self.publish, [self.request(*publication)])
        self.loop.turn(turns)

    @precondition(is_open)
    @rule(publications=st.lists(publications, min_size=2, max_size=9), turns=turns)
    def publish_many(self, publications: list[tuple[Any, int]], turns: int) -> None:
        self.loop.call(self.publish, [self.request(*one) for one in publications])
        self.loop.turn(turns)

    @precondition(lambda self: self.model.draining)
    @rule()
    def publish_too_late(self) -> None:
        with pytest.raises(ShuttingDown):
            self.loop.call(self.publish, [self.request(None, 0)])

    # Clients.

    @initialize(
        crowd=st.dictionaries(names, st.tuples(users, topic_sets, kinds), min_size=2, max_size=4),
        batch_bytes=st.sampled_from([1, 500]),
        near_entries=st.sampled_from([0, 2, 1000]),
        page_entries=st.sampled_from([1, 3, 500]),
    )
    def open(
        self,
        crowd: dict[str, tuple[str, frozenset[str], dict[str, Any]]],
        batch_bytes: int,
        near_entries: int,
        page_entries: int,
    ) -> None:
        self.stack.enter_context(mock.patch.object(log_module, "BATCH_BYTES", batch_bytes))
        # With few of them, clients read the log page by page.
        self.stack.enter_context(mock.patch.object(log_module, "PAGE_ENTRIES", page_entries))
        for module in (replay_module, readers_module):
            self.stack.enter_context(mock.patch.object(module, "NEAR_ENTRIES", near_entries))
        for client_id, (user, topics, kind) in crowd.items():
            self.join(Session(self.model, client_id, user, topics, None, **kind))

    @rule(client_id=names, user=users, topics=topic_sets, moment=moments, kind=kinds)
    def connect(
        self, client_id: str, user: str, topics: frozenset[str], moment: int | str | None, kind: dict[str, Any]
    ) -> None:
        since = self.id_given(moment) if isinstance(moment, int) else moment
        self.join(Session(self.model, client_id, user, topics, since, **kind))

    def id_given(self, ago: int) -> str:
        """Return the id of so many notifications ago, or from before the first."""
        ids = [self.model.origin, *(one.id for one in self.model.log)]
        return ids[max(0, len(ids) - 1 - ago)]

    def join(self, session: Session) -> None:
        """Ask the Hub to admit a client, and compare its answer."""
        incumbent = self.model.sessions.get(session.client_id)
        if incumbent is not None:
            incumbent.is_contested = True
        refusal = self.refusal(session, incumbent)
        newcomer = Newcomer(session.client_id, session.since, list(session.topics), user=session.user)
        admission = self.hub.admit(session, newcomer)
        if refusal is None:
            self.loop.run_until_complete(admission)
        else:
            with pytest.raises(refusal):
                self.loop.run_until_complete(admission)
            assert session.messages == []
        if incumbent is not None:
            incumbent.is_contested = False

    def refusal(self, session: Session, incumbent: Session | None) -> type[NotifydError] | None:
        """Return how a newcomer is refused, if it is."""
        if self.model.draining:
            return ShuttingDown
        if incumbent is not None and incumbent.is_alive and not incumbent.is_stream:
            return DuplicateClient
        others = [one for one in self.model.sessions.values() if one is not incumbent]
        if session.user and sum(one.user == session.user for one in others) >= SMALL.max_connections_per_user:
            return TooManyClients
        return ConnectionRefused if len(others) >= SMALL.max_connections else None

    @rule(client_id=names, room=st.sampled_from([1, 2, float("inf"), float("inf")]))
    def come_back(self, client_id: str, room: float) -> None:
        """Lose the connection, if there is one, and resume where it stopped, or where the goodbye said."""
        before = [one for one in self.model.everyone() if one.client_id == client_id]
        if before:
            self.loop.call(before[-1].end)
            kind = {"one_at_a_time": before[-1].one_at_a_time, "is_stream": before[-1].is_stream, "room": room}
            self.join(Session(self.model, client_id, before[-1].user, before[-1].topics, before[-1].position, **kind))

    @precondition(somebody_is_there)
    @rule(
        index=someone,
        kind=st.sampled_from(["subscribe", "unsubscribe"]),
        topics=st.frozensets(st.sampled_from(TOPICS), min_size=1),
        moment=moments,
    )
    def change_topics(self, index: int, kind: str, topics: frozenset[str], moment: int | str | None) -> None:
        self.ask_for_topics(index, kind, topics, moment)

    @precondition(somebody_is_there)
    @rule(index=someone, topic=st.sampled_from(TOPICS), ago=st.integers(1, 6), padding=paddings)
    def subscribe_after_a_publish(self, index: int, topic: str, ago: int, padding: int) -> None:
        """Publish for a topic and another, and ask for what has lately come to the topic."""
        if self.is_open():
            self.loop.call(self.publish, [self.request(((), (topic, "red"), ()), padding)])
        # The publish may have closed the last client, a slow consumer.
        if self.somebody_is_there():
            self.ask_for_topics(index, "subscribe", frozenset([topic]), ago)

    def ask_for_topics(self, index: int, kind: str, topics: frozenset[str], moment: int | str | None) -> None:
        session = self.session(index)
        if not session.is_stream:
            since = self.id_given(moment) if isinstance(moment, int) else moment
            message = {"type": kind, "topics": list(topics)} | ({} if since is None else {"since": since})
            session.asked = (topics, since) if kind == "subscribe" and since is not None else None
            self.loop.call(session.say, json.dumps(message))
            self.loop.turn(1)
            while session.asked is not None and self.model.sessions.get(session.client_id) is session:
                self.loop.turn(1)  # The replay is counted page by page.
            if self.model.sessions.get(session.client_id) is not session:
                return  # A slow consumer, closed before its turn.
            assert session.asked is None
            session.topics = session.topics | topics if kind == "subscribe" else session.topics - topics
            answers = [message["topics"] for message in session.messages if message["type"] == "subscribed"]
            assert answers[-1] == sorted(session.topics)

    @precondition(somebody_is_there)
    @rule(index=someone, room=st.integers(0, 2))
    def stall(self, index: int, room: int) -> None:
        """Take one or two writes more, or none."""
        session = self.session(index)
        session.room = min(session.room, room)
        session.writable = session.writable and session.room > 0

    @precondition(somebody_is_there)
    @rule(index=someone)
    def read_on(self, index: int) -> None:
        self.loop.call(self.session(index).read_on)

    @precondition(somebody_is_there)
    @rule(index=someone)
    def leave(self, index: int) -> None:
        self.loop.call(self.session(index).end)

    @precondition(somebody_is_there)
    @rule(index=someone)
    def fall_silent(self, index: int) -> None:
        """Answer nothing any more, as if the network were gone."""
        session = self.session(index)
        session.is_alive = session.is_stream
        session.stall()

    @precondition(is_open)
    @rule(moment=moments, limit=st.integers(1, 9), topics=topic_sets, client_id=everyone | names, user=users)
    def read_history(self, moment: Any, limit: int, topics: frozenset[str], client_id: str | None, user: str) -> None:
        since = self.id_given(moment) if isinstance(moment, int) else moment
        history = self.loop.run_until_complete(self.hub.history(since, limit, topics, client_id, user))
        missed, complete = self.model.missed(since, client_id, user, topics)
        page = missed[:limit]
        assert history.complete is complete
        assert [json.loads(bytes(orjson.dumps(one)))["id"] for one in history.notifications] == [one.id for one in page]
        assert history.position == (page[-1].id if page != missed else self.model.position)

    @rule(ago=st.integers(0, 7))
    def ask_for_a_delivery(self, ago: int) -> None:
        """Ask how many clients and which ones got a notification, of the log or of an earlier one."""
        self.settle()
        index = len(self.model.log) - 1 - ago
        if index < 0:
            return
        one = self.model.log[index]
        if index < self.model.front(self.loop.time()):
            with pytest.raises(NotFound):
                self.loop.run_until_complete(self.hub.delivery(one.id))
            return
        counted = self.loop.run_until_complete(self.hub.delivery(one.id))
        assert (counted.addressed, counted.written, counted.pending) == self.model.delivery(one)
        for state in ("written", "pending"):
            page = self.hub.deliveries.clients(one.id, state, "", 10)
            found = [each.client_id for each in self.loop.run_until_complete(page)[0]]
            assert found == self.model.delivered(one, state), (state, one, found)

    # Time, and the end.

    @rule(steps=st.sampled_from([1, 4, 12, 24]))
    def let_time_pass(self, steps: int) -> None:
        """Let up to twelve seconds pass."""
        for _ in range(steps):
            self.loop.run_until_complete(asyncio.sleep(0.5))
            self.loop.call(self.model.observe)
        self.settle()
        if steps >= 12:
            self.everyone_who_reads_has_everything()
            self.the_silent_are_gone()
            self.what_is_too_old_is_forgotten()

    @precondition(is_open)
    @rule()
    def let_everything_be_done(self) -> None:
        self.settle()
        self.everyone_who_reads_has_everything()

    def everyone_who_reads_has_everything(self) -> None:
        backlogs = {one.client_id: one.backlog() for one in self.model.sessions.values() if one.room >= 1}
        assert not any(backlogs.values()), backlogs

    def the_silent_are_gone(self) -> None:
        longest = SMALL.ping_timeout + SMALL.ping_interval
        now = self.loop.time()
        assert not [one for one in self.model.sessions.values() if one.hears_pongs and now - one.heard_at > longest]

    def what_is_too_old_is_forgotten(self) -> None:
        """An entry that was out of bounds a good second ago is out of the log, even if a client is behind."""
        kept = len(self.model.log) - self.model.front(self.loop.time() - 1.1)
        assert self.model.draining or len(self.hub.fanout.log) <= kept

    @precondition(lambda self: self.is_open() and self.published > 20)
    @rule()
    def shut_down(self) -> None:
        self.settle()
        self.model.draining = True
        self.drain = self.loop.create_task(self.hub.drain())
        self.settle()

    def teardown(self) -> None:
        try:
            if self.drain is None:
                self.stop()
            else:
                self.loop.run_until_complete(self.drain)
            self.nothing_is_wrong()
            assert not self.model.sessions
        finally:
            self.stack.close()

    def stop(self) -> None:
        """Let stalled clients read on: their backlog is still there. Then end."""
        for session in list(self.model.sessions.values()):
            self.loop.call(session.read_on)
        self.settle()
        self.everyone_who_reads_has_everything()
        self.model.draining = True
        self.loop.run_until_complete(self.hub.stop())

    # Invariants after every step.

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert not self.model.faults, "\n".join(self.model.faults)

    @invariant()
    def each_was_handed_exactly_what_it_is_owed_so_far(self) -> None:
        for session in self.model.everyone():
            assert session.received == session.owed[: len(session.received)], session.client_id

    @invariant()
    def the_counters_count(self) -> None:
        self.loop.call(self._count)

    def _count(self) -> None:
        self.model.observe()
        census = now(self.hub.census.take())
        handed = sum(one != SHUTDOWN for session in self.model.everyone() for one in session.received)
        assert census.messages_sent == handed
        assert census.notifications_sent == len(self.model.log)
        assert census.total == self.model.admitted
        assert census.slow_consumers == self.model.slow_consumers
        assert census.active == len(self.model.sessions)
        assert [one.client_id for one in self.hub.clients] == list(self.model.sessions)

    @invariant()
    def whoever_is_behind_is_counted(self) -> None:
        if not self.model.draining:
            assert self.hub.fanout.backlogs()[0] == sum(bool(one.backlog()) for one in self.model.sessions.values())

    @invariant()
    def each_delivery_is_counted(self) -> None:
        self.loop.call(self._check_deliveries)

    def _check_deliveries(self) -> None:
        deliveries, tally = self.hub.deliveries, self.hub.fanout.tally
        for one in self.model.log:
            if (entry := deliveries.in_memory(one.id)) is not None:
                sought = deliveries.sought(entry)
                pending = sum(deliveries.is_behind(client, sought) for client in self.hub.clients)
                addressed = (entry.addressed or 0) + tally.addressed(entry)
                assert (addressed, tally.written(entry), pending) == self.model.delivery(one), one


class _Alarm(logging.Handler):
    """Takes each error in the Hub's log for a fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        self.faults.append(self.format(record))


# --- a Hub with a shared store


class ListedLog:
    """A StoredLog in a list: the contract in its plainest form."""

    def __init__(self, origin: str, settings: Settings, lag: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.before = origin
        self.settings = settings
        self.lag = lag
        self.records: list[Record] = []
        self.gone = 0
        self.steps, self.written = Counter[str](), Counter[str]()

    def trim(self, now: float) -> None:
        """Let go of the records beyond the bounds."""
        self.gone += self.front(now)
        for record in self.records[: self.front(now)]:
            self.before = record.id
        del self.records[: self.front(now)]

    def front(self, now: float) -> int:
        """Return the index of the first record within the bounds."""
        count = size = 0
        for index in range(len(self.records) - 1, -1, -1):
            record = self.records[index]
            count += record.replayed
            size += len(record.rest) + sum(len(name) for names in record.audience or () for name in names)
            too_old = now - record.at > self.settings.history_ttl
            if too_old or count > self.settings.history_size or size > self.settings.history_bytes:
                return index + 1
        return 0

    def for_interest(self, interest: Audience, after: str, until: str) -> list[Record]:
        def is_for(record: Record) -> bool:
            return record.audience is None or record.audience.meets(interest)

        return [one for one in self.records if after < one.id <= until and is_for(one)]

    def reach_at(self, now: float, since: str | None, interest: Audience, until: str) -> Reach:
        front = self.front(now)
        ids = [self.before, *(record.id for record in self.records)]
        place = ids.index(since) if since in ids else -1
        complete = front == self.gone == 0 if since is None else place >= front
        position = ids[place if since is not None and complete else front]
        found = [one for one in self.for_interest(interest, position, until) if one.replayed]
        return Reach(position, complete, len(found), interest, until)

    async def reach(self, since: str | None, interest: Audience, until: str) -> Reach:
        reach = self.reach_at(0.0, since, interest, until)
        await self.lag()
        return reach

    async def find(self, id: str) -> Counted | None:
        record = next((one for one in self.records[self.front(0.0) :] if one.id == id), None)
        broadcasts = sum(change for after, change in self.steps.items() if after < id)
        await self.lag()
        return record and Counted(record, self.written[id] + (broadcasts if record.audience is None else 0), 0)

    async def read(self, interest: Audience, after: str, until: str, *, newest_first: bool = False) -> Found:
        found = self.for_interest(interest, after, until)
        page, before = found[-2:][::-1] if newest_first else found[:2], self.before
        await self.lag()
        if len(page) == len(found):
            return Found(page, after if newest_first else until, before)
        return Found(page, found[-3].id if newest_first else page[-1].id, before)


class Registered(NamedTuple):
    """A client in the registry, and the ids of the notifications addressed to it since."""

    client: Registration
    owed: list[str]


class LaggingStore(MemoryStore):
    """A shared store as one of its processes knows it: it answers at any time, and the log comes before that.

    It does each operation in one step. store.py has the contract that the Hub may rely on.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float], chance: Random) -> None:
        super().__init__(settings, clock)
        self.chance = chance
        self.log = ListedLog(self._newest, settings, self.lag)  # type: ignore[assignment]
        self.registered: dict[str, Registered] = {}
        self.tail: list[Record] = []

    async def lag(self) -> None:
        await asyncio.sleep(self.chance.choice([0, 0, 0.001, 0.01, 0.3]))

    def add(self, drafts: Sequence[Draft]) -> Appended:
        """Append, as another process does."""
        records, receipts = [], []
        for draft in drafts:
            audience, self._newest = draft.audience, self._positions.next()
            addressed = [
                one for one in self.registered.values() if audience is None or audience.includes(*one.client[:3])
            ]
            for one in addressed:
                one.owed.append(self._newest)
            receipts.append(Receipt(self._newest, len(addressed)))
            records.append(Record(self._newest, *draft, 0.0, len(addressed)))
        self.log.records += records
        self.log.trim(0.0)
        self.tail += records
        asyncio.get_running_loop().call_later(self.chance.choice([0, 0.002, 0.02, 0.4]), self.tell)
        return Appended(receipts, 0.0)

    def tell(self) -> None:
        records, self.tail = self.tail, []
        if records:
            self._node.deliver(records)

    async def append(self, drafts: Sequence[Draft], once: Once | None = None, counter: int | None = None) -> Appended:
        await self.lag()
        appended = self.add(drafts)
        await self.lag()
        self.tell()
        return appended

    async def admit(self, client: Registration) -> str:
        await self.lag()
        assert client.client_id not in self.registered, "registered twice"
        self.registered[client.client_id] = Registered(client, [])
        position = self._newest
        await self.lag()
        self.tell()
        return position

    async def subscribe(self, client: Registration) -> str:
        # At once: the client may leave, and its client_id may come again, before the answer does.
        self.registered[client.client_id] = self.registered[client.client_id]._replace(client=client)
        position = self._newest
        await self.lag()
        self.tell()
        return position

    async def count(self, counts: Counts) -> None:
        # In one step, whenever that is.
        assert sum(counts.steps.values()) == 0
        self.log.steps.update(counts.steps)
        self.log.written.update(counts.written)
        await self.lag()

    def leave(self, client_id: str) -> None:
        del self.registered[client_id]
