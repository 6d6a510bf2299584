"""Limits in every store: over all processes an address has one token bucket, and a group one count of clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from members import SHORT_LEASE, Member, Process, audience, members, on_loop, registration
from redis_server import RedisServer

from buckets import SECOND, Rate
from errors import ConnectionRefused, StoreUnavailable
from store import ClientIdTaken, Draft

RATE = Rate(1, 3)


ALICE, BOB = "203.0.113.1", "203.0.113.2"


class Limited(NamedTuple):
    """The kind of group that is limited to three clients: of an address, or of a user."""

    kind: str
    setting: str

    @property
    def full(self) -> str:
        return f"Connection limit exceeded for this {self.kind}: 3/3"

    @property
    def settings(self) -> dict[str, int]:
        return {self.setting: 3}

    async def refusal(self, member: Member, client_id: str, name: str = ALICE) -> str:
        """Admit a client, and return the text of the refusal, or nothing if it was admitted."""
        try:
            await member.admit(client_id, **{self.kind: name})
        except ConnectionRefused as error:
            return error.message
        return ""

    async def fill(self, member: Member) -> None:
        """Admit as many clients of one group as may be."""
        for client_id in ("a", "b", "c"):
            await member.admit(client_id, **{self.kind: ALICE})

    async def is_free(self, member: Member) -> bool:
        """Return whether the group has room, without taking it."""
        if await self.refusal(member, "probe"):
            return False
        member.leave("probe")
        return True

    async def is_full(self, member: Member) -> bool:
        return not await self.is_free(member)

    def filling(self) -> str:
        """Return the expression with which another process fills the group."""
        return f"asyncio.gather(*(member.admit(name, {self.kind}={ALICE!r}) for name in 'abc'))"


@pytest.fixture(params=["address-max_connections_per_ip", "user-max_connections_per_user"])
def limited(request: pytest.FixtureRequest) -> Limited:
    return Limited(*request.param.split("-"))


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
    began = time.monotonic()
    for process in processes:
        process.begin("asyncio.gather(*(member.store.draw('a', Rate(1, 30)) for _ in range(30)))")
    drawn = [one for process in processes for one in process.result()]
    assert 30 <= sum(one.allowed for one in drawn) <= 30 + time.monotonic() - began


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


# Clients of an address, and of a user.


@on_loop
async def test_a_group_has_a_limit_of_clients(any_store: str, limited: Limited) -> None:
    """The refusal states the count and the limit, and changes nothing; other groups are not affected."""
    async with members(any_store, **limited.settings) as [one]:
        await limited.fill(one)
        with pytest.raises(ConnectionRefused, match=limited.full):
            await one.admit("d", **{limited.kind: ALICE})
        assert await limited.refusal(one, "d", BOB) == ""
        census = await one.store.census()
        assert (census.active, census.total) == (4, 4)


@on_loop
async def test_the_limit_of_a_group_spans_all_processes(shared: str, limited: Limited) -> None:
    """A client that leaves one process makes room on every other."""
    async with members(shared, 2, **limited.settings) as [one, other]:
        assert [await limited.refusal(member, name) for member, name in ((one, "a"), (other, "b"), (one, "c"))] == [
            ""
        ] * 3
        assert [await limited.refusal(one, "d"), await limited.refusal(other, "e")] == [limited.full, limited.full]
        one.leave("a")
        await one.active()
        assert [await limited.refusal(other, "e"), await limited.refusal(one, "d")] == ["", limited.full]


@on_loop
async def test_a_client_that_leaves_makes_room(any_store: str, limited: Limited) -> None:
    """Leaving twice frees one place."""
    async with members(any_store, **limited.settings) as [one]:
        await limited.fill(one)
        one.leave("a")
        one.store.leave("a")
        assert await limited.refusal(one, "d") == ""
        assert await limited.refusal(one, "e") == limited.full


@on_loop
async def test_without_the_setting_a_group_has_no_limit(any_store: str, limited: Limited) -> None:
    async with members(any_store) as [one]:
        assert [await limited.refusal(one, str(number)) for number in range(20)] == [""] * 20


@on_loop
async def test_a_client_without_a_group_has_no_limit(any_store: str, limited: Limited) -> None:
    """Only an embedder may omit the address; a client may have no user."""
    async with members(any_store, **limited.settings) as [one]:
        assert [await limited.refusal(one, str(number), "") for number in range(5)] == [""] * 5


@on_loop
async def test_a_taken_id_is_reported_before_the_limit_of_the_group(shared: str, limited: Limited) -> None:
    """The id before the group, and the group before the limit of all clients."""
    async with members(shared, 2, max_connections=3, **limited.settings) as [one, other]:
        await limited.fill(one)
        with pytest.raises(ClientIdTaken):
            await other.admit("a", **{limited.kind: ALICE})
        assert await limited.refusal(other, "d") == limited.full
        assert await limited.refusal(other, "d", BOB) == "Connection limit exceeded: 3/3"


@on_loop
async def test_a_refusal_counts_for_nothing(shared: str, limited: Limited) -> None:
    """Refused for its id, its group or the limit of all clients: a newcomer takes no place of its group."""
    async with members(shared, 2, max_connections=3, **limited.settings) as [one, other]:
        await limited.fill(other)
        for _ in range(5):
            assert await limited.refusal(one, "d") == limited.full
            assert await limited.refusal(one, "d", BOB) == "Connection limit exceeded: 3/3"
            with pytest.raises(ClientIdTaken):
                await one.admit("a", **{limited.kind: BOB})
        for client_id in ("a", "b", "c"):
            other.leave(client_id)
        await other.active()
        assert [await limited.refusal(one, name, BOB) for name in "def"] == [""] * 3


@on_loop
async def test_of_many_simultaneous_admissions_as_many_as_the_limit_succeed(shared: str, limited: Limited) -> None:
    async with members(shared, 2, **limited.settings) as [one, other]:
        newcomers = [(member, f"{place} {number}") for place, member in enumerate((one, other)) for number in range(20)]
        answers = await asyncio.gather(*(limited.refusal(*newcomer) for newcomer in newcomers))
        assert sorted(answers) == [""] * 3 + [limited.full] * 37


@on_loop
async def test_a_process_that_claims_an_id_again_takes_no_second_place(shared: str, limited: Limited) -> None:
    """A client that comes back from another address, or of another user, counts for that alone."""
    async with members(shared, **limited.settings) as [one]:
        await limited.fill(one)
        assert await limited.refusal(one, "a") == ""
        assert await limited.refusal(one, "a", BOB) == ""
        assert [await limited.refusal(one, "d"), await limited.refusal(one, "e")] == ["", limited.full]
        assert [await limited.refusal(one, name, BOB) for name in "fgh"] == ["", "", limited.full]


@on_loop
async def test_an_admission_that_was_cancelled_holds_no_place(shared: str, limited: Limited) -> None:
    async with members(shared, 2, **limited.settings) as [one, other]:
        for number in range(5):
            admission = asyncio.create_task(one.store.admit(registration(f"c{number}", **{limited.kind: ALICE})))
            await asyncio.sleep(0)
            admission.cancel()
            with pytest.raises(asyncio.CancelledError):
                await admission
        assert await one.active() == 0
        await limited.fill(other)


@on_loop
async def test_a_closed_process_holds_no_place(shared: str, limited: Limited) -> None:
    async with members(shared, **limited.settings) as [one]:
        other = await Member(shared, **limited.settings).open()
        await limited.fill(other)
        assert not await limited.is_free(one)
        await other.store.close()
        assert await limited.is_free(one)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_killed_process_holds_no_place(
    shared: str, start_process: Callable[..., Process], limited: Limited
) -> None:
    """Its clients count until its lease has run out, and no longer."""
    process = start_process(shared, SHORT_LEASE, **limited.settings)
    async with members(shared, **limited.settings) as [one]:
        process.ask(limited.filling())
        assert not await limited.is_free(one)
        process.kill()
        await one.eventually(lambda: limited.is_free(one))


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_process_that_was_taken_for_dead_takes_its_places_again(
    shared: str,
    start_process: Callable[..., Process],
    limited: Limited,
) -> None:
    """Its connections are still there when it goes on."""
    process = start_process(shared, SHORT_LEASE, **limited.settings)
    async with members(shared, **limited.settings) as [one]:
        process.ask(limited.filling())
        process.stop()
        await one.eventually(lambda: limited.is_free(one))
        process.go_on()
        await one.eventually(lambda: limited.is_full(one))


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_change_of_topics_while_the_lease_ends_keeps_the_place(
    shared: str,
    start_process: Callable[..., Process],
    limited: Limited,
) -> None:
    """The change may come before the process has entered its clients again."""
    process = start_process(shared, SHORT_LEASE, **limited.settings)
    async with members(shared, **limited.settings) as [one]:
        process.ask(limited.filling())
        process.stop()
        await one.eventually(lambda: limited.is_free(one))
        for name in "abc":
            process.begin(f"member.store.subscribe(member.clients['{name}']._replace(topics=['t']))")
        process.go_on()

        async def have_subscribed() -> bool:
            return (await one.store.append([Draft(b"{}", audience([], ["t"]))])).receipts[0].recipients == 3

        for _ in "abc":
            # Redis refuses a change that the next join would undo.
            with suppress(StoreUnavailable):
                process.result()
        if shared.startswith("sqlite"):
            await one.eventually(have_subscribed)
        await one.eventually(lambda: limited.is_full(one))


@on_loop
async def test_nothing_of_a_group_is_left_in_redis(redis: RedisServer, limited: Limited) -> None:
    """A client that left and a process that closed leave no key."""
    async with members(redis.url, **limited.settings) as [one]:
        await limited.fill(one)
        assert any(f"{limited.kind}:" in key for key in redis.keys(0))
        for client_id in ("a", "b", "c"):
            one.leave(client_id)
        await one.active()
        assert not any(f"{limited.kind}:" in key for key in redis.keys(0))


@on_loop
async def test_groups_survive_a_store_that_lost_its_data(redis: RedisServer, limited: Limited) -> None:
    """Each process enters its own clients again."""
    async with members(redis.url, 2, **limited.settings) as [one, other]:
        await limited.fill(other)
        redis.empty()
        await one.until(lambda: one.store.failure is not None)
        await one.until(lambda: one.store.failure is None)
        await other.until(lambda: other.store.failure is None)
        assert await limited.refusal(one, "d") == limited.full


@on_loop
async def test_a_place_that_is_left_while_redis_is_away_is_free(redis: RedisServer, limited: Limited) -> None:
    async with members(redis.url, 2, **limited.settings, store_timeout=0.2) as both:
        one, other = both
        await limited.fill(one)
        redis.stop()
        for member in both:
            await member.until(lambda member=member: member.store.failure is not None)
        for client_id in ("a", "b", "c"):
            one.leave(client_id)
        redis.resume()
        for member in both:
            await member.until(lambda member=member: member.store.failure is None)
        assert [await limited.refusal(other, name) for name in "def"] == [""] * 3
