"""Newcomers that leave, clash or come too late at any point of their admission, and the Hub's own ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from virtual import FakeConnection, VirtualLoop, virtually

import heartbeat
from admission import Newcomer
from connection import ConnectionState, Receiver
from errors import ConnectionRefused, DuplicateClient, NotifydError, ShuttingDown
from hub import Hub, HubState
from settings import Settings
from store import Appended, Draft, MemoryStore, Node, Once, Registration


class GatedStore(MemoryStore):
    """A store that does each operation at once, and answers an admission or a publish when its gate is open."""

    def __init__(self, settings: Settings, loop: VirtualLoop) -> None:
        super().__init__(settings, loop.time)
        self.gate = asyncio.Event()
        self.gate.set()
        self.registered: list[str] = []

    async def admit(self, client: Registration) -> str:
        position = await super().admit(client)
        self.registered.append(client.client_id)
        await self.gate.wait()
        return position

    async def append(self, drafts: list[Draft], once: Once | None = None, counter: int | None = None) -> Appended:  # type: ignore[override]
        appended = await super().append(drafts, once, counter)
        await self.gate.wait()
        return appended

    def leave(self, client_id: str) -> None:
        super().leave(client_id)
        self.registered.remove(client_id)


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


@pytest.fixture
def hub(loop: VirtualLoop) -> Hub:
    quiet = Settings(notification_interval=0, ping_interval=0, shutdown_timeout=10)
    return Hub(quiet, GatedStore(quiet, loop), loop.time)


def store_of(hub: Hub) -> GatedStore:
    assert isinstance(hub.store, GatedStore)
    return hub.store


async def outcome(admission: asyncio.Future[Any]) -> NotifydError | None:
    """Return the error that refuses an admission, or None."""
    [result] = await asyncio.gather(admission, return_exceptions=True)
    return result if isinstance(result, NotifydError) else None


async def cancel(work: asyncio.Future[Any]) -> None:
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def stand_at_the_gate(hub: Hub, connection: FakeConnection, client_id: str = "ann") -> asyncio.Future[Any]:
    """Return an admission that the store has done and not answered yet."""
    await hub.start()
    store_of(hub).gate.clear()
    admission = asyncio.ensure_future(hub.admit(connection, Newcomer(client_id)))
    await asyncio.sleep(0.01)
    assert store_of(hub).registered[-1:] == [client_id]
    return admission


@virtually
async def test_a_newcomer_that_leaves_while_it_is_registered_is_unregistered(loop: VirtualLoop, hub: Hub) -> None:
    """The registry and the directory forget it, and its id can be taken at once."""
    connection = FakeConnection()
    admission = await stand_at_the_gate(hub, connection)
    connection.state = ConnectionState.CLOSED
    store_of(hub).gate.set()
    assert isinstance(await outcome(admission), ConnectionRefused)
    assert (store_of(hub).registered, len(hub.clients), connection.messages) == ([], 0, [])
    await hub.admit(FakeConnection(), Newcomer("ann"))


@virtually
async def test_a_drain_that_begins_while_a_newcomer_is_registered_refuses_it(loop: VirtualLoop, hub: Hub) -> None:
    """The drain does not wait for a newcomer, and no client is left behind it."""
    connection = FakeConnection()
    admission = await stand_at_the_gate(hub, connection)
    drain = asyncio.ensure_future(hub.drain())
    await asyncio.sleep(0.01)
    store_of(hub).gate.set()
    assert isinstance(await outcome(admission), ShuttingDown)
    await drain
    assert (store_of(hub).registered, len(hub.clients), connection.messages) == ([], 0, [])


@virtually
async def test_a_newcomer_whose_connection_fails_is_unregistered(loop: VirtualLoop, hub: Hub) -> None:
    """An unexpected error of its connection leaves nothing in the registry or the directory, and the id is free."""

    class Broken(FakeConnection):
        def accept(self, receiver: Receiver, greeting: bytes, position: str) -> None:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await hub.admit(Broken(), Newcomer("ann", topics=["red"]))
    assert (store_of(hub).registered, len(hub.clients), hub.admission.empty.is_set()) == ([], 0, True)
    await hub.admit(FakeConnection(), Newcomer("ann"))


@virtually
async def test_a_newcomer_waits_for_another_that_registers_the_same_id(loop: VirtualLoop, hub: Hub) -> None:
    """When the first is admitted, the second contests the id; when the first has gone, the second gets it."""
    first, second = FakeConnection(), FakeConnection()
    admission = await stand_at_the_gate(hub, first)
    other = asyncio.ensure_future(hub.admit(second, Newcomer("ann")))
    await asyncio.sleep(0.01)
    assert store_of(hub).registered == ["ann"]
    first.state = ConnectionState.CLOSED
    store_of(hub).gate.set()
    assert isinstance(await outcome(admission), ConnectionRefused)
    assert await outcome(other) is None
    assert [client.connection for client in hub.clients] == [second]


@virtually
async def test_a_newcomer_that_leaves_during_the_probe_is_not_registered(loop: VirtualLoop, hub: Hub) -> None:
    """The dead incumbent is dropped all the same, and its id is free."""
    incumbent, newcomer = FakeConnection(), FakeConnection()
    await hub.admit(incumbent, Newcomer("ann"))
    incumbent.is_alive = False
    admission = asyncio.ensure_future(hub.admit(newcomer, Newcomer("ann")))
    await asyncio.sleep(1)
    newcomer.state = ConnectionState.CLOSED
    assert isinstance(await outcome(admission), ConnectionRefused)
    assert incumbent.goodbye == (1011, "Ping timeout")
    assert (store_of(hub).registered, len(hub.clients)) == ([], 0)


@virtually
async def test_so_many_newcomers_wait_for_a_probe_and_no_more(
    loop: VirtualLoop, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next is refused at once."""
    monkeypatch.setattr(heartbeat, "MAX_WAITING", 2)
    incumbent = FakeConnection()
    await hub.admit(incumbent, Newcomer("ann"))
    incumbent.is_alive = False
    waiting = [asyncio.ensure_future(hub.admit(FakeConnection(), Newcomer("ann"))) for _ in range(2)]
    await asyncio.sleep(0.1)
    began = loop.time()
    with pytest.raises(DuplicateClient):
        await hub.admit(FakeConnection(), Newcomer("ann"))
    assert loop.time() - began < 0.1
    await asyncio.gather(*waiting, return_exceptions=True)


@virtually
async def test_an_admission_keeps_the_log_only_while_it_lasts(loop: VirtualLoop, hub: Hub) -> None:
    """Nothing of an admission is left, whether it succeeds, is refused or is cancelled."""
    admission = await stand_at_the_gate(hub, FakeConnection())
    assert len(hub.fanout.admitting) == 1
    await cancel(admission)
    assert not hub.fanout.admitting
    gone = FakeConnection()
    refused = await stand_at_the_gate(hub, gone, "bob")
    gone.state = ConnectionState.CLOSED
    store_of(hub).gate.set()
    await outcome(refused)
    await hub.admit(FakeConnection(), Newcomer("cat"))
    assert not hub.fanout.admitting


@pytest.mark.parametrize("seconds", [0, 0.5, 5, 10.5])
@virtually
async def test_a_drain_that_is_cancelled_closes_every_client_at_once(
    loop: VirtualLoop, hub: Hub, seconds: float
) -> None:
    """While it announces, waits or closes: all are told and closed, and the fan-out is free again."""
    hub.settings = Settings(notification_interval=0, ping_interval=0, max_connections=2000, shutdown_timeout=10)
    hub.store = GatedStore(hub.settings, loop)
    connections = [FakeConnection() for _ in range(2000)]
    for number, connection in enumerate(connections):
        await hub.admit(connection, Newcomer(f"c{number}"))
    drain = asyncio.ensure_future(hub.drain())
    await asyncio.sleep(seconds)
    await cancel(drain)
    assert (len(hub.clients), hub.fanout.passing.locked()) == (0, False)
    assert {connection.goodbye for connection in connections} == {(1001, "Server shutting down")}


@virtually
async def test_a_drain_that_is_cancelled_while_the_store_is_slow_closes_every_client(
    loop: VirtualLoop, hub: Hub
) -> None:
    """A client that was not told of the shutdown is at least told by its close."""
    connection = FakeConnection()
    await hub.admit(connection, Newcomer("ann"))
    store_of(hub).gate.clear()
    drain = asyncio.ensure_future(hub.drain())
    await asyncio.sleep(1)
    await cancel(drain)
    assert connection.goodbye == (1001, "Server shutting down")


@virtually
async def test_a_second_drain_waits_for_the_first(loop: VirtualLoop, hub: Hub) -> None:
    """A host that drains by itself may do so beside a signal; the clients are told once and closed at one deadline."""
    connection, began = FakeConnection(), loop.time()
    await hub.admit(connection, Newcomer("ann"))
    first = asyncio.ensure_future(hub.drain())
    await asyncio.sleep(1)
    await hub.drain()
    assert connection.goodbye is not None and loop.time() - began == pytest.approx(10, abs=0.5)
    await first
    await hub.drain()
    await asyncio.gather(hub.stop(), hub.drain())
    assert [message["type"] for message in connection.messages] == ["welcome", "system", "shutdown"]


@virtually
async def test_background_work_that_fails_is_started_again(
    loop: VirtualLoop, hub: Hub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure of one task is logged and delays only that task, by a second."""
    failures = [RuntimeError("broken"), RuntimeError("broken again")]
    report = hub.census.report_regularly

    async def fail_twice() -> None:
        if failures:
            raise failures.pop()
        await report()

    monkeypatch.setattr(hub.census, "report_regularly", fail_twice)
    connection = FakeConnection()
    await hub.admit(connection, Newcomer("ann"))
    await hub.notify("meanwhile")
    await asyncio.sleep(0.5)
    assert [message["type"] for message in connection.messages] == ["welcome", "custom"]
    await asyncio.sleep(2)
    assert not failures
    messages = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(messages) == 2 and all("failed and is started again" in message for message in messages)
    await hub.stop()
    assert asyncio.all_tasks(loop) == {asyncio.current_task()}


@virtually
async def test_a_hub_that_has_stopped_is_started_by_the_next_verb(loop: VirtualLoop, hub: Hub) -> None:
    """Stopping twice changes nothing, and a publish afterwards is in the log."""
    await hub.start()
    await hub.stop()
    await hub.stop()
    assert hub.state is HubState.STOPPED
    receipt = await hub.notify("hello")
    assert (hub.state, hub.fanout.log.position) == (HubState.READY, receipt.id)
    await hub.stop()


def test_a_hub_that_never_started_stops(loop: VirtualLoop, hub: Hub) -> None:
    """A host whose lifespan fails before its first request stops it all the same."""
    loop.run_until_complete(hub.stop())
    assert hub.state is HubState.STARTING


@virtually
async def test_a_stop_waits_for_a_start_under_way(loop: VirtualLoop, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is cancelled while it starts leaves no Hub that runs on."""
    opened = store_of(hub).open

    async def open_slowly(node: Node) -> None:
        await asyncio.sleep(1)
        await opened(node)

    monkeypatch.setattr(store_of(hub), "open", open_slowly)
    start = asyncio.ensure_future(hub.start())
    await asyncio.sleep(0.5)
    await hub.stop()
    await start
    assert hub.state is HubState.STOPPED
    assert asyncio.all_tasks(loop) == {asyncio.current_task()}


@virtually
async def test_a_publish_during_the_stop_is_refused(loop: VirtualLoop, hub: Hub) -> None:
    """A notification that nobody could be handed is not accepted; the next publish starts the Hub anew."""
    await hub.start()
    stop = asyncio.ensure_future(hub.stop())
    await asyncio.sleep(0)
    with pytest.raises(ShuttingDown):
        await hub.notify("too late")
    await stop
    await hub.notify("in time again")
    await hub.stop()


def test_a_newcomer_of_an_event_loop_that_is_gone_leaves_nothing_behind(hub: Hub) -> None:
    """Its claim went with the loop, and the same id is admitted on the next."""

    first = asyncio.new_event_loop()
    first.run_until_complete(stand_at_the_gate(hub, FakeConnection()))
    first.close()

    async def scenario() -> int:
        store_of(hub).gate = asyncio.Event()
        store_of(hub).gate.set()
        await hub.admit(FakeConnection(), Newcomer("ann"))
        await hub.stop()
        return len(hub.fanout.admitting)

    assert asyncio.run(scenario()) == 0
