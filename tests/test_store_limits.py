"""Limits in every store: all processes together give an address one token bucket and one count of clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from members import SHORT_LEASE, Member, Process, audience, members, on_loop
from redis_server import RedisServer

from errors import ConnectionRefused, StoreUnavailable, TooManyConnections
from store import SECOND, ClientIdTaken, Draft, Rate

RATE = Rate(1, 3)


ALICE, BOB = "203.0.113.1", "203.0.113.2"
FULL = "Connection limit exceeded for this address: 3/3"


async def refusal(member: Member, client_id: str, address: str = ALICE) -> str:
    """Admit a client, and return the text of the refusal, or nothing if it was admitted."""
    try:
        await member.admit(client_id, address=address)
    except ConnectionRefused as error:
        return error.message
    return ""


async def fill(member: Member) -> None:
    """Admit as many clients of one address as may be."""
    for client_id in ("a", "b", "c"):
        await member.admit(client_id, address=ALICE)


async def is_free(member: Member) -> bool:
    """Return whether the address has room, without taking it."""
    if await refusal(member, "probe"):
        return False
    member.leave("probe")
    return True


async def is_full(member: Member) -> bool:
    return not await is_free(member)


# Buckets.


@on_loop
async def test_a_bucket_holds_its_burst(any_store: str) -> None:
    """A bucket gives as many as it holds, and after a while one more; another address has another bucket."""
    async with members(any_store) as [one]:
        drawn = [await one.store.draw("a", RATE) for _ in range(5)]
        assert [one.allowed for one in drawn] == [True] * 3 + [False] * 2
        assert 2 * SECOND < drawn[-1].until_full <= 3 * SECOND
        assert (await one.store.draw("b", RATE)) == (True, SECOND)
        await asyncio.sleep((drawn[-1].until_full - 2 * SECOND) / SECOND)
        assert (await one.store.draw("a", RATE)).allowed
        assert not (await one.store.draw("a", RATE)).allowed


@on_loop
async def test_a_bucket_is_of_all_processes(shared: str, start_process: Callable[..., Process]) -> None:
    """Two that draw at once get no more together than one would."""
    processes = [start_process(shared), start_process(shared)]
    async with asyncio.timeout(5):
        for process in processes:
            process.begin("asyncio.gather(*(member.store.draw('a', Rate(1, 30)) for _ in range(30)))")
        drawn = [one for process in processes for one in process.result()]
    assert 30 <= sum(one.allowed for one in drawn) <= 32


@on_loop
async def test_full_buckets_go_from_the_file(tmp_path: Path) -> None:
    """A flood of addresses leaves nothing behind."""
    import sqlite3

    path = tmp_path / "log.db"
    async with members(f"sqlite:{path}") as [one]:
        for number in range(100):
            await one.store.draw(f"address {number}", Rate(1000, 20))

        def count() -> int:
            with sqlite3.connect(path) as db:
                return int(db.execute("SELECT count(*) FROM bucket").fetchone()[0])

        assert count() > 0
        await one.until(lambda: count() == 0)


@on_loop
async def test_full_buckets_go_from_redis(redis: RedisServer) -> None:
    """They expire when they are full."""
    async with members(redis.url) as [one]:
        for _ in range(3):
            await one.store.draw("a", RATE)
        [name] = [key for key in redis.keys(0) if "bucket" in key]
        assert 0 < redis.command("PTTL", name) <= 3000


# Clients of an address.


@on_loop
async def test_an_address_has_a_limit_of_clients(any_store: str) -> None:
    """The refusal states the count and the limit, and changes nothing; other addresses are not affected."""
    async with members(any_store, max_connections_per_ip=3) as [one]:
        await fill(one)
        with pytest.raises(TooManyConnections, match=FULL):
            await one.admit("d", address=ALICE)
        assert await refusal(one, "d", BOB) == ""
        census = await one.store.census()
        assert (census.active, census.total) == (4, 4)


@on_loop
async def test_the_limit_of_an_address_spans_all_processes(shared: str) -> None:
    """A client that leaves one process makes room on every other."""
    async with members(shared, 2, max_connections_per_ip=3) as [one, other]:
        assert [await refusal(member, name) for member, name in ((one, "a"), (other, "b"), (one, "c"))] == [""] * 3
        assert [await refusal(one, "d"), await refusal(other, "e")] == [FULL, FULL]
        one.leave("a")
        await one.active()
        assert [await refusal(other, "e"), await refusal(one, "d")] == ["", FULL]


@on_loop
async def test_a_client_that_leaves_makes_room(any_store: str) -> None:
    """Leaving twice frees one place."""
    async with members(any_store, max_connections_per_ip=3) as [one]:
        await fill(one)
        one.leave("a")
        one.store.leave("a")
        assert await refusal(one, "d") == ""
        assert await refusal(one, "e") == FULL


@on_loop
async def test_without_the_setting_an_address_has_no_limit(any_store: str) -> None:
    async with members(any_store) as [one]:
        assert [await refusal(one, str(number)) for number in range(20)] == [""] * 20


@on_loop
async def test_a_client_without_an_address_has_no_limit(any_store: str) -> None:
    """The guard gives every client of a server an address; only an embedder may omit it."""
    async with members(any_store, max_connections_per_ip=3) as [one]:
        assert [await refusal(one, str(number), "") for number in range(5)] == [""] * 5


@on_loop
async def test_a_taken_id_is_reported_before_the_limit_of_the_address(shared: str) -> None:
    """The id before the address, and the address before the limit of all clients."""
    async with members(shared, 2, max_connections=3, max_connections_per_ip=3) as [one, other]:
        await fill(one)
        with pytest.raises(ClientIdTaken):
            await other.admit("a", address=ALICE)
        assert await refusal(other, "d") == FULL
        assert await refusal(other, "d", BOB) == "Connection limit exceeded: 3/3"


@on_loop
async def test_a_refusal_counts_for_nothing(shared: str) -> None:
    """Refused for its id, its address or the limit of all clients: a newcomer takes no place of its address."""
    async with members(shared, 2, max_connections=3, max_connections_per_ip=3) as [one, other]:
        await fill(other)
        for _ in range(5):
            assert await refusal(one, "d") == FULL
            assert await refusal(one, "d", BOB) == "Connection limit exceeded: 3/3"
            with pytest.raises(ClientIdTaken):
                await one.admit("a", address=BOB)
        for client_id in ("a", "b", "c"):
            other.leave(client_id)
        await other.active()
        assert [await refusal(one, name, BOB) for name in "def"] == [""] * 3


@on_loop
async def test_of_many_simultaneous_admissions_as_many_as_the_limit_succeed(shared: str) -> None:
    async with members(shared, 2, max_connections_per_ip=3) as [one, other]:
        newcomers = [(member, f"{place} {number}") for place, member in enumerate((one, other)) for number in range(20)]
        answers = await asyncio.gather(*(refusal(*newcomer) for newcomer in newcomers))
        assert sorted(answers) == [""] * 3 + [FULL] * 37


@on_loop
async def test_a_process_that_claims_an_id_again_takes_no_second_place(shared: str) -> None:
    """A client that comes back from another address counts for that address only."""
    async with members(shared, max_connections_per_ip=3) as [one]:
        await fill(one)
        assert await refusal(one, "a") == ""
        assert await refusal(one, "a", BOB) == ""
        assert [await refusal(one, "d"), await refusal(one, "e")] == ["", FULL]
        assert [await refusal(one, name, BOB) for name in "fgh"] == ["", "", FULL]


@on_loop
async def test_an_admission_that_was_cancelled_holds_no_place(shared: str) -> None:
    async with members(shared, 2, max_connections_per_ip=3) as [one, other]:
        for number in range(5):
            admission = asyncio.create_task(one.store.admit(f"c{number}", (), ALICE))
            await asyncio.sleep(0)
            admission.cancel()
            with pytest.raises(asyncio.CancelledError):
                await admission
        assert await one.active() == 0
        await fill(other)


@on_loop
async def test_a_closed_process_holds_no_place(shared: str) -> None:
    async with members(shared, max_connections_per_ip=3) as [one]:
        other = await Member(shared, max_connections_per_ip=3).open()
        await fill(other)
        assert not await is_free(one)
        await other.store.close()
        assert await is_free(one)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_killed_process_holds_no_place(shared: str, start_process: Callable[..., Process]) -> None:
    """Its clients count until its lease has run out, and no longer."""
    process = start_process(shared, SHORT_LEASE, 3)
    async with members(shared, max_connections_per_ip=3) as [one]:
        process.ask(f"asyncio.gather(*(member.admit(name, address={ALICE!r}) for name in 'abc'))")
        assert not await is_free(one)
        process.kill()
        await one.eventually(lambda: is_free(one))


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_process_that_was_taken_for_dead_takes_its_places_again(
    shared: str,
    start_process: Callable[..., Process],
) -> None:
    """Its connections are still there when it goes on."""
    process = start_process(shared, SHORT_LEASE, 3)
    async with members(shared, max_connections_per_ip=3) as [one]:
        process.ask(f"asyncio.gather(*(member.admit(name, address={ALICE!r}) for name in 'abc'))")
        process.stop()
        await one.eventually(lambda: is_free(one))
        process.go_on()
        await one.eventually(lambda: is_full(one))


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_change_of_topics_while_the_lease_ends_keeps_the_address(
    shared: str,
    start_process: Callable[..., Process],
) -> None:
    """The change may come before the process has entered its clients again, and knows no address."""
    process = start_process(shared, SHORT_LEASE, 3)
    async with members(shared, max_connections_per_ip=3) as [one]:
        process.ask(f"asyncio.gather(*(member.admit(name, address={ALICE!r}) for name in 'abc'))")
        process.stop()
        await one.eventually(lambda: is_free(one))
        for name in "abc":
            process.begin(f"member.store.subscribe('{name}', ['t'])")
        process.go_on()

        async def have_subscribed() -> bool:
            return (await one.store.append([Draft(b"{}", audience([], ["t"]))])).receipts[0].recipients == 3

        for _ in "abc":
            # Redis refuses a change that the next join would undo.
            with suppress(StoreUnavailable):
                process.result()
        if shared.startswith("sqlite"):
            await one.eventually(have_subscribed)
        await one.eventually(lambda: is_full(one))


@on_loop
async def test_nothing_of_an_address_is_left_in_redis(redis: RedisServer) -> None:
    """A client that left and a process that closed leave no key."""
    async with members(redis.url, max_connections_per_ip=3) as [one]:
        await fill(one)
        assert any("address" in key for key in redis.keys(0))
        for client_id in ("a", "b", "c"):
            one.leave(client_id)
        await one.active()
        assert not any("address" in key for key in redis.keys(0))


@on_loop
async def test_addresses_survive_a_store_that_lost_its_data(redis: RedisServer) -> None:
    """Each process enters its own clients again."""
    async with members(redis.url, 2, max_connections_per_ip=3) as [one, other]:
        await fill(other)
        redis.empty()
        await one.until(lambda: one.store.failure is not None)
        await one.until(lambda: one.store.failure is None)
        await other.until(lambda: other.store.failure is None)
        assert await refusal(one, "d") == FULL


@on_loop
async def test_a_place_that_is_left_while_redis_is_away_is_free(redis: RedisServer) -> None:
    async with members(redis.url, 2, max_connections_per_ip=3, store_timeout=0.2) as both:
        one, other = both
        await fill(one)
        redis.stop()
        for member in both:
            await member.until(lambda member=member: member.store.failure is not None)
        for client_id in ("a", "b", "c"):
            one.leave(client_id)
        redis.resume()
        for member in both:
            await member.until(lambda member=member: member.store.failure is None)
        assert [await refusal(other, name) for name in "def"] == [""] * 3
