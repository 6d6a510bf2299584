"""The real Hub through any interleaving: nobody misses, repeats or overhears a notification.

The state machine of hub_model.py, and cases that chance would take long to find. A longer run:

    HUB_EXAMPLES=3000 HUB_STEPS=100 pytest tests/test_hub.py --timeout 0
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from operator import is_
from random import Random
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
from hub_model import HubMachine, LaggingStore, Registered
from hypothesis import HealthCheck, given, settings
from virtual import FakeConnection, VirtualLoop

import fanout as fanout_module
import log as log_module
import publishers as publishers_module
import readers as readers_module
import replay as replay_module
import schemas
import store as store_module
from admission import Newcomer
from connection import ConnectionState
from errors import DuplicateClient
from hub import Hub
from log import Audience
from schemas import NotifyRequest
from settings import Settings
from store import Draft, Once

QUICK = settings(
    max_examples=int(os.environ.get("HUB_EXAMPLES", "50")),
    stateful_step_count=int(os.environ.get("HUB_STEPS", "50")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    deadline=None,
)

TestHub = HubMachine.TestCase
TestHub.settings = QUICK


@pytest.mark.slow
class TestHubForLonger(HubMachine.TestCase):  # type: ignore[misc]
    settings = settings(QUICK, max_examples=300)


async def each_delivery_is_counted(hub: Hub, store: LaggingStore, connections: list[FakeConnection]) -> None:
    """The counts of the log are those of the clients, also of what has left the memory long ago."""
    seen = Counter(one["id"] for connection in connections for one in connection.messages if "id" in one)
    for record in store.log.records:
        delivery = await hub.delivery(record.id)
        assert (delivery.addressed, delivery.written, delivery.pending) == (record.addressed, seen[record.id], 0)


AUDIENCES = [
    *(None, None, Audience(frozenset(["a", "b"]), frozenset()), Audience(frozenset(), frozenset(["red"]))),
    Audience(frozenset(), frozenset(), frozenset(["uma"])),
]


@settings(max_examples=int(os.environ.get("HUB_EXAMPLES", "100")), deadline=None)
@given(
    seed=st.integers(0, 2**32), history_size=st.sampled_from([2, 1000]), cache_bytes=st.sampled_from([1, 2000, 10**8])
)
def test_with_a_shared_store_each_client_gets_its_notifications(seed: int, history_size: int, cache_bytes: int) -> None:
    """Each gets its own, however slowly the store answers and the log comes, and despite publishes elsewhere."""
    chance, loop = Random(seed), VirtualLoop()
    quiet = Settings(notification_interval=0, ping_interval=0, history_size=history_size, cache_bytes=cache_bytes)
    store = LaggingStore(quiet, loop.time, chance)
    hub = Hub(quiet, store, loop.time)
    met: list[tuple[FakeConnection, Registered]] = []

    async def come_and_go(client_id: str) -> None:
        for _ in range(3):
            await asyncio.sleep(chance.choice([0, 0.003, 0.3]))
            connection = FakeConnection(one_at_a_time=chance.random() < 0.5)
            with suppress(DuplicateClient):
                since, topics, user = (chance.choice(each) for each in ([None, ""], [[], ["red"]], ["", "uma"]))
                await hub.admit(connection, Newcomer(client_id, since, topics, user=user))
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
        loop.run_until_complete(each_delivery_is_counted(hub, store, [connection for connection, _ in met]))
        loop.run_until_complete(hub.stop())
    finally:
        loop.close()


@settings(max_examples=int(os.environ.get("HUB_EXAMPLES", "100")), deadline=None)
@given(seed=st.integers(0, 2**32), cache_bytes=st.sampled_from([1, 3000]), near=st.sampled_from([0, 3]))
def test_a_client_that_comes_and_goes_misses_nothing_of_a_log_larger_than_memory(
    seed: int, cache_bytes: int, near: int
) -> None:
    """Whatever it reads from the store, from memory or live: each of its own once and in order, as was promised."""
    chance, loop = Random(seed), VirtualLoop()
    quiet = Settings(notification_interval=0, ping_interval=0, cache_bytes=cache_bytes)
    store = LaggingStore(quiet, loop.time, chance)
    hub = Hub(quiet, store, loop.time)
    received: list[str] = []
    began: list[str] = []
    connections: list[FakeConnection] = []

    async def come_and_go() -> None:
        position = ""
        while True:
            connection = FakeConnection(one_at_a_time=chance.random() < 0.5, room=chance.choice([1, 3, 9, 10**6]))
            connections.append(connection)
            await hub.admit(connection, Newcomer("ann", position, ["red"]))
            await asyncio.sleep(chance.choice([0.001, 0.1, 1]))
            if connection.room < 1:
                connection.read_on()
                await asyncio.sleep(chance.choice([0.001, 0.5]))
            _, resume, *rest = connection.messages
            received.extend(message["id"] for message in rest)
            assert resume["data"]["complete"]
            began.append(resume["data"]["position"])
            position = received[-1] if received else began[0]
            connection.end()
            await asyncio.sleep(chance.choice([0, 0.3]))

    async def scenario() -> list[str]:
        await hub.start()
        coming = asyncio.ensure_future(come_and_go())
        await asyncio.sleep(0.9)

        for number in range(80):
            rest = b',"type":"custom","data":{"message":"%d"}}' % number
            audience = chance.choice([*AUDIENCES, Audience(frozenset(["bob"]), frozenset(["blue"]))])
            store.add([Draft(rest, audience)] * chance.choice([1, 1, 5]))
            await asyncio.sleep(chance.choice([0, 0, 0.001, 0.05]))
        await asyncio.sleep(30)
        assert not coming.done()
        coming.cancel()
        ann = Audience(frozenset(["ann"]), frozenset(["red"]))
        return [one.id for one in store.log.for_interest(ann, began[0], "g")]

    try:
        with (
            mock.patch.object(readers_module, "NEAR_ENTRIES", near),
            mock.patch.object(replay_module, "NEAR_ENTRIES", near),
        ):
            expected = loop.run_until_complete(scenario())
            assert received == expected
            loop.run_until_complete(each_delivery_is_counted(hub, store, connections))
            loop.run_until_complete(hub.stop())
    finally:
        loop.close()


# --- cases that chance would take long to find


@settings(max_examples=int(os.environ.get("HUB_EXAMPLES", "100")), deadline=None)
@given(seed=st.integers(0, 2**32))
def test_with_a_shared_store_a_subscription_replays_all_and_nothing_twice(seed: int) -> None:
    """However slowly the store answers: each notification for red after `since` comes, and in the order of the log."""
    chance, loop = Random(seed), VirtualLoop()
    quiet = Settings(notification_interval=0, ping_interval=0)
    store = LaggingStore(quiet, loop.time, chance)
    hub = Hub(quiet, store, loop.time)
    connection = FakeConnection(one_at_a_time=chance.random() < 0.5)
    red = AUDIENCES[3]

    async def scenario() -> list[str]:
        await hub.start()
        published = [store._newest]
        begin = chance.randrange(40)
        for number in range(60):
            store.add([Draft(b',"type":"custom","data":{"message":"%d"}}' % number, red)])
            published.append(store._newest)
            await asyncio.sleep(chance.choice([0, 0, 0.001, 0.05]))
            if number == begin:
                await hub.admit(connection, Newcomer("ann"))
                since = chance.choice(published)
                connection.say(json.dumps({"type": "subscribe", "topics": ["red"], "since": since}))
        await asyncio.sleep(5)
        return [id for id in published if id > since]

    try:
        expected = loop.run_until_complete(scenario())
        types = [message["type"] for message in connection.messages]
        assert types[:3] == ["welcome", "subscribed", "resume"]
        assert [message["id"] for message in connection.messages[3:]] == expected
        loop.run_until_complete(hub.stop())
    finally:
        loop.close()


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


def test_a_client_that_leaves_during_a_pass_is_owed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass still holds clients that leave between its slices; they must not come back among the owed."""
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
        owed = list(hub.fanout.owed)
        await hub.stop()
        return hub, owed

    assert asyncio.run(scenario())[1] == []


def test_a_batch_for_a_topic_is_one_list_for_all_its_subscribers(loop: VirtualLoop) -> None:
    """A thousand clients share one list of owed entries, also when they are owed others already."""
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
        fanout_module.PendingLists().owe(client, [*range(300)])
    for common in ([300], [301]):
        before: list[Any] = [client.pending for client in hub.clients]
        lists = fanout_module.PendingLists()
        for client in hub.clients:
            lists.owe(client, common)
    after = [client.pending for client in hub.clients]
    assert all(pending == [*range(302)] for pending in after)
    assert sum(map(is_, before, after)) > 80


def test_each_client_gets_its_part_of_a_batch_for_many_topics(loop: VirtualLoop) -> None:
    """A client gets its part by topic, by name and by both, each once and in order, behind all it was owed before."""
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


def test_the_window_of_a_publisher_is_counted_in_bytes(loop: VirtualLoop) -> None:
    """Not in characters, of which some have three."""
    hub = hub_on(loop, publish_over_websocket=True)
    ann = join(loop, hub, "ann")
    request = json.dumps({"type": "publish", "message": "中" * 5000}, ensure_ascii=False)

    def fill() -> int:
        """Say it until the window is full, and return the bytes. Nothing is published meanwhile."""
        said = 0
        while not ann.is_held:
            ann.say(request)
            said += len(request.encode())
        return said

    assert 0 <= loop.call(fill) - publishers_module.WINDOW_BYTES < len(request.encode())


def test_a_publisher_that_is_not_read_is_not_silent(loop: VirtualLoop) -> None:
    """It stays until it reads its answers; from then on its silence counts as any other's."""
    hub = hub_on(loop, ping_interval=6, ping_timeout=25, publish_over_websocket=True)
    ann = join(loop, hub, "ann")
    ann.stall()
    loop.call(ann.say, '{"type": "publish", "message": "hi", "topics": ["x"]}')
    assert ann.is_held
    loop.run_until_complete(asyncio.sleep(600))
    ann.is_alive = False
    loop.call(ann.read_on)
    loop.run_until_complete(asyncio.sleep(20))
    assert not ann.is_held and ann.messages[-1]["type"] in ("ping", "published") and ann.goodbye is None
    loop.run_until_complete(asyncio.sleep(20))
    assert ann.goodbye == (1011, "Ping timeout")


def test_a_pause_of_the_process_does_not_count_as_silence(loop: VirtualLoop) -> None:
    """A live client stays; a dead one is closed after another full ping_timeout of silence."""
    hub = hub_on(loop, ping_interval=6, ping_timeout=25)
    alive, dead = join(loop, hub, "ann"), join(loop, hub, "bob")
    loop.run_until_complete(asyncio.sleep(7))
    loop.pause(600)
    dead.is_alive = False
    loop.run_until_complete(asyncio.sleep(20))
    assert (alive.goodbye, dead.goodbye) == (None, None)
    loop.run_until_complete(asyncio.sleep(20))
    assert (alive.goodbye, dead.goodbye) == (None, (1011, "Ping timeout"))


def test_the_pings_that_a_pause_has_delayed_are_not_made_up_for(loop: VirtualLoop) -> None:
    """A hundred intervals are missed; a client gets the ping under way at most beside its next one."""
    hub = hub_on(loop, ping_interval=6, ping_timeout=25)
    client = join(loop, hub, "ann")
    loop.pause(600)
    loop.run_until_complete(asyncio.sleep(0.1))
    assert [message["type"] for message in client.messages[:2]] == ["welcome", "ping"] and len(client.messages) < 4


def test_a_pause_is_told_once(loop: VirtualLoop, caplog: pytest.LogCaptureFixture) -> None:
    """A pause is logged once, however many pings it has delayed."""
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
    """Clients not yet told by then are told when they are closed, at the same rate."""
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


def test_many_short_pauses_do_not_count_as_silence_either(loop: VirtualLoop) -> None:
    """Late pings go out at once: pauses do not add up to a longer interval."""
    hub = hub_on(loop, ping_interval=1, ping_timeout=2)
    connections = [join(loop, hub, f"c{number}") for number in range(20)]
    for _ in range(30):
        loop.pause(0.45)
        loop.run_until_complete(asyncio.sleep(0.1))
    assert [connection.goodbye for connection in connections] == [None] * 20


def test_a_notification_is_encoded_once_for_all(loop: VirtualLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoding is shared by any number of clients."""
    hub = hub_on(loop)
    for number in range(100):
        join(loop, hub, f"c{number}")
    encoded, dumps = list[Any](), schemas.orjson.dumps
    monkeypatch.setattr(schemas.orjson, "dumps", lambda value, *_, **options: encoded.append(value) or dumps(value))
    loop.run_until_complete(hub.notify("hello", data={"a": 1}))
    loop.run_until_complete(asyncio.sleep(1))
    assert encoded == ["hello", [{"a": 1}]]
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
    """A record that this process could not read is in no replay, and the resume is not called complete."""
    quiet = Settings(notification_interval=0, ping_interval=0)
    store = LaggingStore(quiet, loop.time, Random(1))
    hub = Hub(quiet, store, loop.time)
    client = join(loop, hub, "ann")
    before = loop.run_until_complete(hub.notify("before"))
    store.log.records, store.log.before = [], store._positions.next()
    loop.call(lambda: hub.missed(store.log.before))
    assert client.goodbye == (1013, "Notifications are missing; connect again and resume")
    after = loop.run_until_complete(hub.notify("after"))
    history = loop.run_until_complete(hub.history(before.id, 9, [], None))
    assert (history.complete, len(history.notifications), history.position) == (False, 1, after.id)
    assert loop.run_until_complete(hub.history(after.id, 9, [], None)).complete


def test_the_replay_of_a_subscription_behind_a_backlog_tells_the_position() -> None:
    """A client that has been handed both knows the newest position."""
    state = HubMachine()
    stalled: Any = {"ann": ("", frozenset(), {"room": 1})}
    state.open(crowd=stalled, batch_bytes=1, near_entries=2, page_entries=1)  # type: ignore[call-arg]
    for topic in ("green", "red"):
        state.subscribe_after_a_publish(index=0, topic=topic, ago=1, padding=0)  # type: ignore[call-arg]
    state.read_on(index=0)  # type: ignore[call-arg]
    state.let_time_pass(steps=1)  # type: ignore[call-arg]
    state.nothing_is_wrong()
    state.teardown()
