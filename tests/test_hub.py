"""The real Hub through any interleaving: nobody misses, repeats or overhears a notification.

A Hypothesis state machine plays publishers, clients, networks and time. A model that is written from the protocol
alone says what each client is owed; the clients' connections remember what the Hub handed them, and its goodbye.
A longer run:

    HUB_EXAMPLES=3000 HUB_STEPS=100 pytest tests/test_hub.py --timeout 0
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import ExitStack, suppress
from operator import is_
from random import Random
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import hypothesis.strategies as st
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from virtual import FakeConnection, VirtualLoop

import fanout as fanout_module
import log as log_module
import schemas
import store as store_module
from admission import Newcomer
from clients import Joined
from connection import ConnectionState, Receiver
from errors import ConnectionRefused, DuplicateClient, NotifydError, ShuttingDown
from hub import Hub
from log import Audience, payloads
from schemas import NotifyRequest
from settings import Settings
from store import Appended, Draft, MemoryStore, Once, Receipt, Record

logger = logging.getLogger("notifyd")

# Small enough that notifications expire and clients fall behind within a few steps.
SMALL = Settings(
    history_size=6,
    history_bytes=2500,
    history_ttl=10,
    max_connections=4,
    ping_interval=6,
    ping_timeout=25,
    notification_interval=7.3137,  # so that it never coincides with anything else
    shutdown_timeout=40,
    drain_rate=5,
)
NAMES = ["ann", "bob", "cat", "dan", "eve"]
TOPICS = ["red", "green", "blue"]
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
Addressees = tuple[Collection[str], Collection[str]]  # clients and topics


def now(work: Coroutine[Any, Any, Result]) -> Result:
    """Return what a coroutine returns that waits for nothing, as all that the store in memory does."""
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

    def is_for(self, client_id: str | None, topics: Collection[str]) -> bool:
        if self.audience is None:
            return True
        clients, names = self.audience
        return client_id in clients or bool(set(names) & set(topics))


class Session(FakeConnection):
    """One connection, with what it is owed by the model, and what it was handed by the Hub."""

    def __init__(self, model: Model, client_id: str, topics: frozenset[str], since: str | None, **options: Any) -> None:
        super().__init__(**options)
        self.model = model
        self.client_id = client_id
        self.topics = topics
        self.since = since
        # Ids, and SHUTDOWN at the end.
        self.owed: list[str] = []
        self.received: list[str] = []
        self.position = since or ""  # the id to resume from
        self.heard_at = 0.0
        self.is_contested = False

    def accept(self, receiver: Receiver, greeting: bytes) -> None:
        self.model.admit(self)
        super().accept(receiver, greeting)
        self.model.check_greeting(self)

    def write(self, frames: bytes) -> None:
        self.model.observe()
        for message in map(orjson.loads, payloads(frames)):
            if "id" in message:
                self.received.append(message["id"])
                self.position = message["id"]
                self.model.check_notification(self, message)
            elif message["type"] == SHUTDOWN:
                self.received.append(SHUTDOWN)
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
    """What the protocol promises: the log, how far back the history reaches, and who is owed what."""

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

    # Who is there.

    def admit(self, session: Session) -> None:
        self.observe()
        self.admitted += 1
        session.heard_at = self.loop.time()
        if session.since is not None:
            missed, _ = self.missed(session.since, session.client_id, session.topics)
            session.owed = [one.id for one in missed]
            session.position = session.since or self.position
        self.fault_unless(session.client_id not in self.sessions, f"{session.client_id} is there twice")
        self.sessions[session.client_id] = session

    def part(self, session: Session) -> None:
        if self.sessions.get(session.client_id) is session:
            del self.sessions[session.client_id]
            self.parted.append(session)

    def everyone(self) -> Iterator[Session]:
        yield from self.parted
        yield from self.sessions.values()

    # What is published.

    def publish(self, id: str, request: NotifyRequest) -> int:
        """Note what was published, and return how many connected clients it is for."""
        clients, topics = request.clients or (), sorted(set(request.topics or ()))
        body = {"id": id, "type": "custom", "timestamp": SOME_TIME, "data": {"message": request.message}}
        body |= {"topics": topics} if topics else {}
        return self._append(body, replayed=True, audience=(clients, topics) if clients or topics else None)

    def observe(self) -> None:
        """Note what the Hub published by itself: a test notification, or the system's at the end."""
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
        self.log.append(Published(body["id"], body["data"]["message"], size, at, replayed, audience))
        addressed = [one for one in self.sessions.values() if self.log[-1].is_for(one.client_id, one.topics)]
        for session in addressed:
            session.owed.append(body["id"])
        return len(addressed)

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

    def missed(self, since: str | None, client_id: str | None, topics: Collection[str]) -> tuple[list[Published], bool]:
        """Return what must be replayed, and whether that is provably everything."""
        if since == "":
            return [], True
        ids = [self.origin, *(one.id for one in self.log)]
        after = 0 if since is None else ids.index(since) if since in ids else -1
        front = self.front(self.loop.time())
        kept = self.log[max(after, front) :]
        return [one for one in kept if one.replayed and one.is_for(client_id, topics)], after >= front

    # What is checked at the moment when it happens.

    def check_greeting(self, session: Session) -> None:
        types = [message["type"] for message in session.messages]
        self.fault_unless(types[0] == "welcome", f"the first message is {types[0]}")
        self.fault_unless(types.count("welcome") == 1, "welcomed twice")
        if session.since is None:
            self.fault_unless("resume" not in types, "a resume that nobody asked for")
            return
        missed, complete = self.missed(session.since, session.client_id, session.topics)
        promised = {"position": self.position, "replayed": len(missed), "complete": complete}
        resume = session.messages[1]
        self.fault_unless(resume["type"] == "resume", f"after the welcome comes {resume}")
        self.fault_unless(resume.get("data") == promised, f"{resume} instead of {promised}")

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
        repeated = [one for one in session.received if since < one]
        self.fault_unless(not repeated, f"resuming after {since} would repeat {repeated}")


# --- the machine

names = st.sampled_from(NAMES)
topic_sets = st.frozensets(st.sampled_from(TOPICS), max_size=2)
someone = st.integers(0, 3)
turns = st.integers(0, 4)
# What a client resumes from: the id before last, say; now; an id that the log never gave; or it does not.
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
some = st.tuples(st.lists(names, max_size=2), st.lists(st.sampled_from(TOPICS), max_size=2)).filter(any)
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
        clients, topics = addressees or ((), ())
        fields = {"clients": list(clients)} if clients else {}
        fields |= {"topics": list(topics)} if topics else {}
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
        crowd=st.dictionaries(names, st.tuples(topic_sets, kinds), min_size=2, max_size=4),
        batch_bytes=st.sampled_from([1, 500]),
    )
    def open(self, crowd: dict[str, tuple[frozenset[str], dict[str, Any]]], batch_bytes: int) -> None:
        self.stack.enter_context(mock.patch.object(log_module, "BATCH_BYTES", batch_bytes))
        for client_id, (topics, kind) in crowd.items():
            self.join(Session(self.model, client_id, topics, None, **kind))

    @rule(client_id=names, topics=topic_sets, moment=moments, kind=kinds)
    def connect(self, client_id: str, topics: frozenset[str], moment: int | str | None, kind: dict[str, Any]) -> None:
        since = self.id_given(moment) if isinstance(moment, int) else moment
        self.join(Session(self.model, client_id, topics, since, **kind))

    def id_given(self, ago: int) -> str:
        """Return the id of so many notifications ago, or from before the first."""
        ids = [self.model.origin, *(one.id for one in self.model.log)]
        return ids[max(0, len(ids) - 1 - ago)]

    def join(self, session: Session) -> None:
        """Ask the Hub to admit a client, and compare its answer."""
        incumbent = self.model.sessions.get(session.client_id)
        if incumbent is not None:
            incumbent.is_contested = True
        refusal = self.refusal(incumbent)
        admission = self.hub.admit(session, Newcomer(session.client_id, session.since, list(session.topics)))
        if refusal is None:
            self.loop.run_until_complete(admission)
        else:
            with pytest.raises(refusal):
                self.loop.run_until_complete(admission)
            assert session.messages == []
        if incumbent is not None:
            incumbent.is_contested = False

    def refusal(self, incumbent: Session | None) -> type[NotifydError] | None:
        """Return how a newcomer is refused, if it is."""
        if self.model.draining:
            return ShuttingDown
        if incumbent is not None and incumbent.is_alive and not incumbent.is_stream:
            return DuplicateClient
        if len(self.model.sessions) - (incumbent is not None) >= SMALL.max_connections:
            return ConnectionRefused
        return None

    @rule(client_id=names, room=st.sampled_from([1, 2, float("inf"), float("inf")]))
    def come_back(self, client_id: str, room: float) -> None:
        """Lose the connection, if there is one, and resume where it stopped, or where the goodbye said."""
        before = [one for one in self.model.everyone() if one.client_id == client_id]
        if before:
            self.loop.call(before[-1].end)
            kind = {"one_at_a_time": before[-1].one_at_a_time, "is_stream": before[-1].is_stream, "room": room}
            self.join(Session(self.model, client_id, before[-1].topics, before[-1].position, **kind))

    @precondition(somebody_is_there)
    @rule(
        index=someone,
        kind=st.sampled_from(["subscribe", "unsubscribe"]),
        topics=st.frozensets(st.sampled_from(TOPICS), min_size=1),
    )
    def change_topics(self, index: int, kind: str, topics: frozenset[str]) -> None:
        session = self.session(index)
        if not session.is_stream:
            self.loop.call(session.say, json.dumps({"type": kind, "topics": list(topics)}))
            self.loop.turn(1)
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
    @rule(moment=moments, limit=st.integers(1, 9), topics=topic_sets, client_id=everyone | names)
    def read_history(self, moment: Any, limit: int, topics: frozenset[str], client_id: str | None) -> None:
        since = self.id_given(moment) if isinstance(moment, int) else moment
        history = self.loop.run_until_complete(self.hub.history(since, limit, topics, client_id))
        missed, complete = self.model.missed(since, client_id, topics)
        page = missed[:limit]
        assert history.complete is complete
        assert [json.loads(bytes(orjson.dumps(one)))["id"] for one in history.notifications] == [one.id for one in page]
        assert history.position == (page[-1].id if page != missed else self.model.position)

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
        """What was out of the bounds a good second ago is out of the log, whoever is behind."""
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
        """Let the stalled ones read on: what they were owed is still there. Then end."""
        for session in list(self.model.sessions.values()):
            self.loop.call(session.read_on)
        self.settle()
        self.everyone_who_reads_has_everything()
        self.model.draining = True
        self.loop.run_until_complete(self.hub.stop())

    # What holds after every step.

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
            assert self.hub.fanout.clients_behind() == sum(bool(one.backlog()) for one in self.model.sessions.values())


class _Alarm(logging.Handler):
    """Takes what the Hub logs as an error for a fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.faults = faults

    def emit(self, record: logging.LogRecord) -> None:
        self.faults.append(self.format(record))


TestHub = HubMachine.TestCase
TestHub.settings = settings(
    max_examples=int(os.environ.get("HUB_EXAMPLES", "200")),
    stateful_step_count=int(os.environ.get("HUB_STEPS", "50")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    deadline=None,
)


# --- a Hub whose store is shared


class Registration(NamedTuple):
    """A client_id in the registry, and the ids of what was addressed to it since."""

    topics: frozenset[str]
    owed: list[str]


class LaggingStore(MemoryStore):
    """A shared store as one of its processes knows it: it answers when it likes, and the log comes before that.

    What it is asked it does as one step each. What the Hub may rely on is in store.py.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float], chance: Random) -> None:
        super().__init__(settings, clock)
        self.chance = chance
        self.registered: dict[str, Registration] = {}
        self.tail: list[Record] = []

    async def lag(self) -> None:
        await asyncio.sleep(self.chance.choice([0, 0, 0.001, 0.01, 0.3]))

    def add(self, drafts: Sequence[Draft]) -> Appended:
        """Append, as another process does."""
        records = [Record(self._positions.next(), *draft, 0.0) for draft in drafts]
        self._newest = records[-1].id
        receipts = []
        for record in records:
            audience = record.audience
            addressed = [
                one for name, one in self.registered.items() if audience is None or audience.includes(name, one.topics)
            ]
            for one in addressed:
                one.owed.append(record.id)
            receipts.append(Receipt(record.id, len(addressed)))
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

    async def admit(self, client_id: str, topics: Collection[str], address: str) -> str:
        await self.lag()
        assert client_id not in self.registered, "registered twice"
        self.registered[client_id] = Registration(frozenset(topics), [])
        position = self._newest
        await self.lag()
        self.tell()
        return position

    def leave(self, client_id: str) -> None:
        del self.registered[client_id]


AUDIENCES = [None, None, Audience(frozenset(["a", "b"]), frozenset()), Audience(frozenset(), frozenset(["red"]))]


@settings(max_examples=int(os.environ.get("HUB_EXAMPLES", "100")), deadline=None)
@given(seed=st.integers(0, 2**32), history_size=st.sampled_from([2, 1000]))
def test_with_a_shared_store_each_gets_what_is_addressed_to_it(seed: int, history_size: int) -> None:
    """However slowly the store answers and the log comes, and whatever is published elsewhere meanwhile."""
    chance, loop = Random(seed), VirtualLoop()
    quiet = Settings(notification_interval=0, ping_interval=0, history_size=history_size)
    store = LaggingStore(quiet, loop.time, chance)
    hub = Hub(quiet, store, loop.time)
    met: list[tuple[FakeConnection, Registration]] = []

    async def come_and_go(client_id: str) -> None:
        for _ in range(3):
            await asyncio.sleep(chance.choice([0, 0.003, 0.3]))
            connection = FakeConnection(one_at_a_time=chance.random() < 0.5)
            with suppress(DuplicateClient):
                await hub.admit(
                    connection, Newcomer(client_id, chance.choice([None, ""]), chance.choice([[], ["red"]]))
                )
                met.append((connection, store.registered[client_id]))
                await asyncio.sleep(chance.choice([0, 0.01, 1]))
                if chance.random() < 0.7:
                    connection.end()

    async def scenario() -> None:
        await hub.start()
        clients = [asyncio.ensure_future(come_and_go(name)) for name in ("a", "b", "c", "c")]
        for number in range(60):
            rest = b',"type":"custom","data":{"message":"%d"}}' % number
            store.add([Draft(rest, chance.choice(AUDIENCES))] * chance.choice([1, 1, 5]))
            await asyncio.sleep(chance.choice([0, 0, 0.001, 0.05]))
        await asyncio.gather(*clients)
        await asyncio.sleep(5)

    try:
        loop.run_until_complete(scenario())
        for connection, registration in met:
            received = [message["id"] for message in connection.messages if "id" in message]
            is_there = connection.state is ConnectionState.OPEN
            assert received == (registration.owed if is_there else registration.owed[: len(received)])
        loop.run_until_complete(hub.stop())
    finally:
        loop.close()


# --- what chance would take long to find


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


def hub_on(loop: VirtualLoop, **changes: Any) -> Hub:
    """A quiet Hub on this loop: neither test notifications nor pings."""
    return Hub(Settings(**{"notification_interval": 0, "ping_interval": 0} | changes), clock=loop.time)


def join(loop: VirtualLoop, hub: Hub, client_id: str, topics: str = "", **kind: Any) -> FakeConnection:
    """Admit a client with a fake connection."""
    connection = FakeConnection(**kind)
    loop.run_until_complete(hub.admit(connection, Newcomer(client_id, topics=topics.split(",") if topics else [])))
    return connection


def test_the_farewell_is_not_lost_when_everything_before_it_has_expired(loop: VirtualLoop) -> None:
    """A client that stalls before the farewell is told goodbye when it reads on."""
    hub = hub_on(loop, history_ttl=1)
    client = join(loop, hub, "ann", one_at_a_time=True)

    async def drain_during_a_burst() -> asyncio.Task[None]:
        await hub.notify("one")
        await asyncio.sleep(0)
        await hub.notify("two")
        client.room = 1
        return asyncio.create_task(hub.drain())

    with mock.patch.object(log_module, "BATCH_BYTES", 1):
        drain = loop.run_until_complete(drain_during_a_burst())
        loop.run_until_complete(asyncio.sleep(5))
        assert [one["type"] for one in client.messages] == ["welcome", "custom", "custom"]
        loop.call(client.read_on)
    assert [one["type"] for one in client.messages[3:]] == ["system", "shutdown"]
    drain.cancel()


def test_who_leaves_during_a_pass_is_owed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass still holds those who leave between its slices; they must not come back among the owed."""
    monkeypatch.setattr(fanout_module, "SLICE_CLIENTS", 2)

    async def scenario() -> tuple[Hub, list[Any]]:
        hub = Hub(Settings(notification_interval=0, ping_interval=0))
        clients = [await hub.admit(FakeConnection(), Newcomer(f"c{number}", topics=["t"])) for number in range(8)]
        await hub.notify("one", topics=["t"])
        passing = asyncio.ensure_future(hub.fanout._pass())
        await asyncio.sleep(0)
        for client in clients:
            client.connection.close(1000, "")
            client.left()
        await passing
        owed = list(hub.fanout._owed)
        await hub.stop()
        return hub, owed

    assert asyncio.run(scenario())[1] == []


def test_a_batch_for_a_topic_is_one_list_for_all_who_follow_it(loop: VirtualLoop) -> None:
    """What a thousand clients are owed is written down once, also when they are owed something already."""
    hub = hub_on(loop)
    for number in range(9):
        join(loop, hub, f"c{number}", "t").stall()
    requests = [NotifyRequest(message=str(number), topics=["t"]) for number in range(50)]
    for _ in range(3):
        loop.run_until_complete(hub.publish(requests))
    owed = [client.pending for client in hub.clients]
    assert all(one is owed[0] for one in owed) and len(owed[0] or ()) == 150


def test_a_client_that_is_far_behind_does_not_make_publishing_dear(loop: VirtualLoop) -> None:
    """Its list grows in place, and is its own."""
    hub = hub_on(loop)
    join(loop, hub, "ann", "t").stall()
    join(loop, hub, "bob", "t").stall()
    requests = [NotifyRequest(message=str(number), topics=["t"]) for number in range(300)]
    loop.run_until_complete(hub.publish(requests[:200]))
    loop.run_until_complete(hub.publish(requests[200:]))
    ann, bob = hub.clients
    before = ann.pending
    loop.run_until_complete(hub.notify("for ann", clients=["ann"]))
    assert ann.pending is before and len(ann.pending or ()) == 301 and len(bob.pending or ()) == 300


def test_clients_that_are_owed_different_things_do_not_make_publishing_dear(loop: VirtualLoop) -> None:
    """Between two passes the lists of nearly all grow in place, also of those that can be written to."""
    hub = hub_on(loop)
    for number in range(100):
        join(loop, hub, f"c{number}")
    for client in hub.clients:
        client.owe([*range(300)], {})
    for common in ([300], [301]):
        before: list[Any] = [client.pending for client in hub.clients]
        joined: Joined = {}
        for client in hub.clients:
            client.owe(common, joined)
    after = [client.pending for client in hub.clients]
    assert all(pending == [*range(302)] for pending in after)
    assert sum(map(is_, before, after)) > 80


def test_each_gets_its_own_of_a_batch_for_many_topics(loop: VirtualLoop) -> None:
    """By topic, by name and by both; each once and in order, whatever it was owed before."""
    hub = hub_on(loop)
    ann, bob = join(loop, hub, "ann", "red"), join(loop, hub, "bob", "red,blue")
    for connection in (ann, bob):
        connection.stall()
    audiences = [{"topics": ["red"]}, {"topics": ["blue", "red"]}, {"clients": ["ann"], "topics": ["blue"]}]
    requests = [NotifyRequest(message=str(number), **one) for number, one in enumerate(audiences * 2)]
    for _ in range(2):
        loop.run_until_complete(hub.publish(requests))
    for connection in (ann, bob):
        loop.call(connection.read_on)
    everything = [str(number) for number in range(6)] * 2
    assert [one["data"]["message"] for one in ann.messages[1:]] == everything
    assert [one["data"]["message"] for one in bob.messages[1:]] == everything


def test_a_pause_of_the_process_is_nobodys_silence(loop: VirtualLoop) -> None:
    """Whoever is alive stays; who is not is closed when it has been silent for the whole time again."""
    hub = hub_on(loop, ping_interval=6, ping_timeout=25)
    alive, dead = join(loop, hub, "ann"), join(loop, hub, "bob")
    loop.run_until_complete(asyncio.sleep(7))
    loop.pause(600)
    dead.is_alive = False
    loop.run_until_complete(asyncio.sleep(20))
    assert (alive.goodbye, dead.goodbye) == (None, None)
    loop.run_until_complete(asyncio.sleep(20))
    assert (alive.goodbye, dead.goodbye) == (None, (1011, "Ping timeout"))


def test_a_pause_is_told_once(loop: VirtualLoop, caplog: pytest.LogCaptureFixture) -> None:
    """However many pings it has delayed."""
    hub = hub_on(loop, ping_interval=1, ping_timeout=2)
    join(loop, hub, "ann")
    loop.pause(4)
    loop.run_until_complete(asyncio.sleep(5))
    assert len([record for record in caplog.records if "has not run" in record.message]) == 1


def test_test_notifications_are_not_made_up_for(loop: VirtualLoop) -> None:
    """After a pause of the process there is one, and the next an interval later."""
    hub = hub_on(loop, notification_interval=10)
    client = join(loop, hub, "ann")
    loop.pause(65)
    loop.run_until_complete(asyncio.sleep(9))
    assert len(client.messages) == 2
    loop.run_until_complete(asyncio.sleep(10))
    assert len(client.messages) == 3


def test_an_incumbent_that_leaves_during_its_probe_is_left_alone(loop: VirtualLoop) -> None:
    """It has said goodbye by itself: nothing waits for that again."""
    hub = hub_on(loop)
    incumbent = join(loop, hub, "ann")
    incumbent.is_alive = False

    async def scenario() -> None:
        newcomer = asyncio.ensure_future(hub.admit(FakeConnection(), Newcomer("ann")))
        await asyncio.sleep(0.1)
        incumbent.end()
        await newcomer
        await hub.drain()
        before = loop.time()
        await hub.wait_closed()
        assert loop.time() - before < 2

    hub.settings = Settings(shutdown_timeout=0)
    loop.run_until_complete(scenario())
    assert incumbent.goodbye is None


def test_the_announcement_of_a_shutdown_is_within_its_time(loop: VirtualLoop) -> None:
    """Whoever is not reached by then is told when it is closed, at the same rate."""
    hub = hub_on(loop, shutdown_timeout=5, drain_rate=2)
    connections = [join(loop, hub, f"c{number}") for number in range(30)]
    before = loop.time()
    loop.run_until_complete(hub.drain())
    assert 19 < loop.time() - before < 22
    for connection in connections:
        assert [one["type"] for one in connection.messages] == ["welcome", "system", "shutdown"]
        assert connection.goodbye == (1001, "Server shutting down")


def test_a_hub_is_used_from_one_event_loop_after_another() -> None:
    """The first is gone with its clients, as between two runs of a test client; everything works in the second."""
    hub = Hub(Settings(notification_interval=0))

    async def scenario() -> tuple[int, list[Any]]:
        connection = FakeConnection()
        await hub.admit(connection, Newcomer("ann"))
        receipt = await hub.notify("hello")
        await asyncio.sleep(0.05)
        return receipt.recipients, [message["type"] for message in connection.messages]

    assert [asyncio.run(scenario()) for _ in range(3)] == [(1, ["welcome", "custom"])] * 3


def test_many_short_pauses_are_nobodys_silence_either(loop: VirtualLoop) -> None:
    """What is late is pinged at once: pauses do not add up to a longer interval."""
    hub = hub_on(loop, ping_interval=1, ping_timeout=2)
    connections = [join(loop, hub, f"c{number}") for number in range(20)]
    for _ in range(30):
        loop.pause(0.45)
        loop.run_until_complete(asyncio.sleep(0.1))
    assert [connection.goodbye for connection in connections] == [None] * 20


def test_a_notification_is_encoded_once_for_all(loop: VirtualLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients there are."""
    hub = hub_on(loop)
    for number in range(100):
        join(loop, hub, f"c{number}")
    encoded: list[Any] = []
    monkeypatch.setattr(schemas.orjson, "dumps", lambda *given, **options: encoded.append(given) or b'{"id":""}')
    loop.run_until_complete(hub.notify("hello"))
    loop.run_until_complete(asyncio.sleep(1))
    assert len(encoded) == 1
    assert all(len(client.connection.messages) == 2 for client in hub.clients)  # type: ignore[attr-defined]


def test_a_batch_lets_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large batch for large audiences is no reason to wait; nor is it sent twice when it is repeated meanwhile."""
    monkeypatch.setattr(store_module, "SLICE_SECONDS", 0.0)

    async def scenario() -> tuple[int, list[str], bool]:
        hub = Hub(Settings(notification_interval=0, ping_interval=0))
        connection = FakeConnection()
        await hub.admit(connection, Newcomer("ann", topics=["t"]))
        requests = [NotifyRequest(message=str(number), topics=["t"]) for number in range(50)]
        first = asyncio.ensure_future(hub.publish(requests, Once("key", b"")))
        turns = 0
        while not first.done():
            await asyncio.sleep(0)
            turns += 1
            if turns == 5:
                again = asyncio.ensure_future(hub.publish(requests, Once("key", b"")))
        repeated = (await again).receipts == first.result().receipts
        await asyncio.sleep(0.1)
        await hub.stop()
        return turns, [message["data"]["message"] for message in connection.messages[1:]], repeated

    turns, messages, repeated = asyncio.run(scenario())
    assert turns > 20 and repeated
    assert messages == [str(number) for number in range(50)]


def test_after_a_gap_in_the_log_no_resume_is_complete(loop: VirtualLoop) -> None:
    """What this process could not read is in no replay, and is not passed over in silence."""
    hub = hub_on(loop)
    client = join(loop, hub, "ann")
    before = loop.run_until_complete(hub.notify("before"))
    loop.call(hub.missed)
    assert client.goodbye == (1013, "Notifications are missing; connect again and resume")
    after = loop.run_until_complete(hub.notify("after"))
    history = loop.run_until_complete(hub.history(before.id, 9, [], None))
    assert (history.complete, len(history.notifications), history.position) == (False, 1, after.id)
    assert loop.run_until_complete(hub.history(after.id, 9, [], None)).complete
