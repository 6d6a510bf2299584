"""What every store promises about limits: one bucket and one count for an address, however many processes ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from members import Member, Process, members
from redis_server import RedisServer
from test_store import SHORT_LEASE, _short_leases, any_store, on_loop, redis, shared, start_process  # noqa: F401

from errors import TooManyConnections
from seats import Seats
from store import SECOND, Rate

RATE = Rate(1, 3)


async def seat(member: Member, held: int) -> str:
    """Say that the member holds so many connections of an address; return what is said against it."""
    try:
        await member.store.seat("203.0.113.1", held)
    except TooManyConnections as error:
        return error.message
    return ""


def full(held: int) -> str:
    return f"Connection limit exceeded for this address: {held}/3"


# Buckets.


@on_loop
async def test_a_bucket_holds_its_burst(any_store: str) -> None:  # noqa: F811
    """As many as it holds, and after a while one more; another address has another bucket."""
    async with members(any_store) as [one]:
        drawn = [await one.store.draw("a", RATE) for _ in range(5)]
        assert [one.allowed for one in drawn] == [True] * 3 + [False] * 2
        assert 2 * SECOND < drawn[-1].until_full <= 3 * SECOND
        assert (await one.store.draw("b", RATE)) == (True, SECOND)
        await asyncio.sleep((drawn[-1].until_full - 2 * SECOND) / SECOND)
        assert (await one.store.draw("a", RATE)).allowed
        assert not (await one.store.draw("a", RATE)).allowed


@on_loop
async def test_a_bucket_is_of_all_processes(shared: str, start_process: Callable[..., Process]) -> None:  # noqa: F811
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
async def test_full_buckets_go_from_redis(redis: Callable[[], RedisServer]) -> None:  # noqa: F811
    """They expire when they are full."""
    redis().empty()
    async with members(redis().url) as [one]:
        for _ in range(3):
            await one.store.draw("a", RATE)
        [name] = [key for key in redis().keys(0) if "bucket" in key]
        assert 0 < redis().command("PTTL", name) <= 3000


# Seats.


@on_loop
async def test_an_address_has_so_many_seats(shared: str) -> None:  # noqa: F811
    """On all processes together; a refused one leaves the count as it was."""
    async with members(shared, 2, max_connections_per_ip=3) as [one, other]:
        assert [await seat(one, 1), await seat(other, 1), await seat(one, 2)] == ["", "", ""]
        assert [await seat(one, 3), await seat(other, 2)] == [full(3), full(3)]
        one.store.unseat("203.0.113.1", 1)
        await one.store.census()
        assert [await seat(other, 2), await seat(one, 2)] == ["", full(3)]
        await other.store.seat("203.0.113.2", 3)


@on_loop
async def test_who_is_refused_by_the_others_takes_no_seat(shared: str) -> None:  # noqa: F811
    """However often: when they have left, there is room for as many as ever."""
    async with members(shared, 2, max_connections_per_ip=3) as [one, other]:
        seats = Seats(one.store, 3)
        assert await seat(other, 3) == ""
        for _ in range(5):
            with pytest.raises(TooManyConnections):
                await seats.take("203.0.113.1")
        other.store.unseat("203.0.113.1", 0)
        await other.store.census()
        for _ in range(3):
            await seats.take("203.0.113.1")


@on_loop
async def test_of_many_who_sit_down_at_once_as_many_get_a_seat(shared: str) -> None:  # noqa: F811
    async with members(shared, 2, max_connections_per_ip=3) as [one, other]:
        answers = await asyncio.gather(*(seat(member, held) for held in (1, 2, 3) for member in (one, other)))
        assert answers.count("") == 3


@on_loop
async def test_a_closed_process_holds_no_seats(shared: str) -> None:  # noqa: F811
    async with members(shared, max_connections_per_ip=3) as [one]:
        other = await Member(shared, max_connections_per_ip=3).open()
        assert [await seat(other, held) for held in (1, 2, 3)] == ["", "", ""]
        assert await seat(one, 1) == full(3)
        await other.store.close()
        assert await seat(one, 1) == ""


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_killed_process_holds_no_seats(shared: str, start_process: Callable[..., Process]) -> None:  # noqa: F811
    """Once its lease has run out. It is no reason to refuse anyone for longer."""
    process = start_process(shared, SHORT_LEASE)
    async with members(shared, max_connections_per_ip=3) as [one]:
        # Over there nobody set a limit, so it is 0; putting down a count asks for none.
        process.ask("member.store.unseat('203.0.113.1', 3)")
        process.ask("member.store.census()")
        assert await seat(one, 1) == full(3)
        process.kill()

        async def is_free() -> bool:
            return await seat(one, 1) == ""

        await one.eventually(is_free)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_one_that_was_taken_for_dead_takes_its_seats_again(
    shared: str,  # noqa: F811
    start_process: Callable[..., Process],  # noqa: F811
) -> None:
    """When it goes on, its connections are still there."""
    process = start_process(shared, SHORT_LEASE)
    async with members(shared, max_connections_per_ip=3) as [one]:
        process.ask("member.store.unseat('203.0.113.1', 3)")
        process.ask("member.store.census()")
        process.stop()

        async def is_free() -> bool:
            return await seat(one, 1) == ""

        await one.eventually(is_free)
        process.go_on()

        async def is_full() -> bool:
            return await seat(one, 1) != ""

        await one.eventually(is_full)


@on_loop
async def test_a_closed_process_leaves_no_seats_in_redis(redis: Callable[[], RedisServer]) -> None:  # noqa: F811
    """Nobody would ever take them out."""
    redis().empty()
    async with members(redis().url, max_connections_per_ip=3) as [one]:
        await seat(one, 1)
        assert any("seats" in key for key in redis().keys(0))
    assert not any("seats" in key for key in redis().keys(0))


@on_loop
async def test_seats_survive_a_store_that_lost_its_data(redis: Callable[[], RedisServer]) -> None:  # noqa: F811
    """Each process enters its own again."""
    redis().empty()
    async with members(redis().url, 2, max_connections_per_ip=3) as [one, other]:
        assert [await seat(other, held) for held in (1, 2, 3)] == ["", "", ""]
        redis().empty()
        await one.until(lambda: one.store.failure is not None)
        await one.until(lambda: one.store.failure is None)
        await other.until(lambda: other.store.failure is None)
        assert await seat(one, 1) == full(3)


@on_loop
async def test_a_seat_that_is_left_while_redis_is_away_is_free(redis: Callable[[], RedisServer]) -> None:  # noqa: F811
    redis().empty()
    async with members(redis().url, 2, max_connections_per_ip=3, store_timeout=0.2) as both:
        one, other = both
        assert [await seat(one, held) for held in (1, 2, 3)] == ["", "", ""]
        redis().stop()
        for member in both:
            await member.until(lambda member=member: member.store.failure is not None)
        one.store.unseat("203.0.113.1", 0)
        redis().resume()
        for member in both:
            await member.until(lambda member=member: member.store.failure is None)
        assert await seat(other, 3) == ""
