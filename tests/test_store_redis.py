"""The store in Redis alone: its URL, its absence and the loss of its data."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from members import SHORT_LEASE, SOMETHING, Member, Process, audience, members, on_loop, registration
from redis_server import RedisServer
from ws_clients import PATIENCE

from errors import ConnectionRefused, KeyReused, StoreUnavailable
from hub import Hub
from settings import Settings, SettingsError
from store import Appended, Draft, Once, Report
from store_redis import RedisStore
from store_redis_records import chunks

pytestmark = pytest.mark.slow

StartRedis = Callable[..., RedisServer]


@pytest.fixture
def start_redis() -> Iterator[StartRedis]:
    servers: list[RedisServer] = []

    def start(*flags: str, append_only: bool = False) -> RedisServer:
        servers.append(RedisServer(flags=flags, append_only=append_only))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


async def publish_until_it_works(member: Member) -> str:
    """Publish as a publisher does that is answered 503: again."""
    while True:
        try:
            return await member.publish()
        except StoreUnavailable:
            await asyncio.sleep(0.05)


async def is_away(member: Member, reason: str) -> None:
    await member.until(lambda: member.store.failure == f"The store is away: {reason}")
    took = []
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=reason):
            await member.publish()
        took.append(time.monotonic() - began)
    assert min(took) < 0.1


async def is_back(*everyone: Member) -> None:
    for member in everyone:
        await member.until(lambda member=member: member.store.failure is None)


async def has_lost_nothing(answered: list[str], url: str, *everyone: Member, **settings: Any) -> None:
    """Every process was delivered all acknowledged notifications, once and in order; a late one finds the same."""
    for member in everyone:
        await member.until(lambda member=member: member.ids[-1:] >= answered[-1:])
        assert member.ids == sorted(set(member.ids))
        assert set(answered) <= set(member.ids)
        assert member.times_missed == 0
    async with members(url, **settings) as [late]:
        assert [record.id for record in late.opening.records] == everyone[0].ids
        for found, delivered in zip(late.opening.records, everyone[0].records, strict=True):
            assert found == delivered._replace(at=found.at)
            assert abs(found.at - delivered.at) < 1


# How it is reached.


@on_loop
async def test_a_user_a_password_a_database_and_a_prefix(start_redis: StartRedis) -> None:
    """All keys are in this database and begin with the prefix; a wrong password is told without it."""
    redis = start_redis()
    redis.command("ACL", "SETUSER", "notifyd", "on", ">pa:ss", "~mine:*", "+@all", "-info")
    url = f"redis://notifyd:pa%3Ass@127.0.0.1:{redis.port}/3"
    async with members(url, store_prefix="mine:") as [one]:
        await one.admit("a", "t")
        await one.publish()
        assert redis.keys(0) == set()
        assert redis.keys(3) and all(key.startswith("mine:") for key in redis.keys(3))
    async with members(url.replace("pa%3Ass", "guess")) as [one]:
        assert one.store.failure == "The store is away: invalid username-password pair or user is disabled."


@on_loop
async def test_a_password_that_is_missing_or_asked_for_later(start_redis: StartRedis) -> None:
    """It says so, and goes on when it may."""
    redis = start_redis()
    async with members(redis.url) as [one]:
        await one.publish()
        redis.command("ACL", "SETUSER", "admin", "on", "nopass", "+@all", "~*")
        redis.command("CONFIG", "SET", "requirepass", "secret")
        redis.command("CLIENT", "KILL", "TYPE", "normal", user="admin")
        await is_away(one, "Authentication required.")
        redis.command("CONFIG", "SET", "requirepass", "", user="admin")
        await is_back(one)


@on_loop
async def test_a_redis_that_evicts_is_warned_of(start_redis: StartRedis, caplog: pytest.LogCaptureFixture) -> None:
    """Once, where there is a limit that may make it."""
    redis = start_redis("--maxmemory-policy", "volatile-lru")
    async with members(redis.url) as [one]:
        assert not caplog.records
        redis.command("CONFIG", "SET", "maxmemory", "1gb")
        for _ in range(2):
            redis.command("CLIENT", "KILL", "TYPE", "normal")
            await one.until(lambda: one.store.failure)
            await is_back(one)
    assert [record.message for record in caplog.records if "maxmemory" in record.message] == [
        "The store may forget what it has acknowledged: its maxmemory-policy is volatile-lru"
    ]


@on_loop
async def test_a_socket_in_the_file_system(start_redis: StartRedis) -> None:
    async with members(f"unix://{start_redis().socket}") as [one]:
        await one.publish()
        assert one.records


@pytest.mark.parametrize(
    "url",
    [
        *("redis:nowhere", "http://:secret@host/", "redis://:sec:ret@host:port/", "redis://:secret@host:0/"),
        *("redis://host/?secret=1", "rediss://host/?ssl_cert_reqs=secret"),
    ],
)
def test_a_wrong_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(SettingsError) as error:
        RedisStore(Settings(), url)
    assert "secret" not in str(error.value)
    assert "sec:ret" not in str(error.value)


@on_loop
async def test_all_keys_are_in_one_slot(start_redis: StartRedis) -> None:
    """By the default prefix."""
    redis = start_redis()
    async with members(redis.url) as [one]:
        await one.admit("a", "t")
        await one.store.append([SOMETHING], Once("key", b"r"))
        assert redis.keys(0)
        assert all(key.startswith("{notifyd}:") for key in redis.keys(0))


@on_loop
async def test_the_script_is_loaded_again(start_redis: StartRedis) -> None:
    redis = start_redis()
    async with members(redis.url) as [one]:
        await one.publish()
        redis.command("SCRIPT", "FLUSH")
        await one.publish()
        assert len(one.ids) == 2
        assert one.store.failure is None


# While it is away.


@on_loop
async def test_it_may_come_later(start_redis: StartRedis, caplog: pytest.LogCaptureFixture) -> None:
    """open() returns, the reason is known, and one line each is logged."""
    caplog.set_level(logging.INFO, "notifyd")
    redis = start_redis()
    redis.kill()
    async with members(redis.url) as [one]:
        await is_away(one, "Connection refused")
        assert one.openings == []
        await asyncio.sleep(0.6)
        redis.start()
        await one.until(lambda: one.openings)
        await one.publish()
        assert [record.message for record in caplog.records] == [
            "The store is away: Connection refused",
            "The store is back",
        ]


@on_loop
async def test_it_may_come_later_with_a_log(start_redis: StartRedis, caplog: pytest.LogCaptureFixture) -> None:
    """That takes several reads; the store is away until the last."""
    caplog.set_level(logging.WARNING, "notifyd")
    redis = start_redis(append_only=True)
    async with members(redis.url) as [one]:
        await one.publish(*[SOMETHING] * 1000)
    redis.kill()
    caplog.clear()
    async with members(redis.url) as [late]:
        redis.start()
        await late.until(lambda: late.openings)
        assert late.opening.records == one.records
        assert [record.levelname for record in caplog.records] == ["WARNING"]


@on_loop
async def test_killed_and_started_with_its_file(start_redis: StartRedis) -> None:
    """After a kill in the middle of publishing, acknowledged notifications are there once, and so are the clients."""
    redis = start_redis(append_only=True)
    async with members(redis.url, 2) as [one, other]:
        await one.admit("a", "t")
        await other.admit("b")
        await other.admit("c")
        await one.store.report(Report(7, 1))
        answered = []

        async def publish() -> None:
            with contextlib.suppress(StoreUnavailable):
                while True:
                    answered.append(await one.publish())

        publishers = [asyncio.create_task(publish()) for _ in range(5)]
        await one.until(lambda: len(answered) > 50)
        redis.kill()
        await asyncio.gather(*publishers)
        # A client that leaves now has left afterwards.
        other.leave("c")
        redis.start()
        answered.append(await publish_until_it_works(one))
        await is_back(one, other)
        census = await other.store.census()
        assert (census.active, census.total, census.messages_sent) == (2, 3, 7)
        assert (await one.store.append([SOMETHING])).receipts[0].recipients == 2
        await has_lost_nothing(sorted(answered), redis.url, one, other)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_stopped_for_longer_than_a_lease(start_redis: StartRedis) -> None:
    """It is given up on after store_timeout, also where nobody asks for anything."""
    redis = start_redis()
    async with members(redis.url, 2, store_timeout=0.3) as [one, other]:
        await one.admit("a")
        await other.admit("b")
        await one.store.report(Report(7, 1))
        answered = [await one.publish()]
        redis.stop()
        began = time.monotonic()
        await is_away(other, "no answer within 0.3 s")
        assert time.monotonic() - began < 5
        await asyncio.sleep(2 * SHORT_LEASE)
        redis.resume()
        answered.append(await publish_until_it_works(one))
        await is_back(one, other)
        assert await one.store.census() == (2, 2, 2, 7, 1, [other.store.node_id])
        assert one.lost_clients == other.lost_clients == []
        await has_lost_nothing(answered, redis.url, one, other)


async def loses_everything(lose: Callable[[], None], url: str) -> None:
    async with members(url, 2) as [one, other]:
        await one.admit("a")
        await other.admit("b", "t")
        await one.store.report(Report(7, 1))
        answered = [await member.publish() for member in (one, other) for _ in range(20)]
        assert await one.store.lead() == 0
        answered += [receipt.id for receipt in (await one.store.append([SOMETHING], None, 1)).receipts]
        # The counters are as old as the last renewal.
        await asyncio.sleep(0.3)
        lose()
        answered.append(await publish_until_it_works(other))
        await is_back(one, other)
        assert await one.store.census() == (2, 2, 42, 7, 1, [other.store.node_id])
        assert await one.store.lead() == 1
        assert (await one.store.append([SOMETHING])).receipts[0].recipients == 2
        await has_lost_nothing(answered, url, one, other)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_emptied(start_redis: StartRedis) -> None:
    """The processes put everything back, and nobody is told anything twice."""
    redis = start_redis()
    await loses_everything(redis.empty, redis.url)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_counters_do_not_go_back_when_redis_is_emptied(start_redis: StartRedis) -> None:
    """Counts after the last renewal are included."""
    redis = start_redis()
    async with members(redis.url, 2) as [one, other]:
        await one.admit("a")
        await publish_until_it_works(other)
        stated = await one.store.census()
        redis.empty()
        await publish_until_it_works(one)
        await is_back(one, other)
        assert await one.store.census() == stated._replace(notifications_sent=2)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_started_without_its_file(start_redis: StartRedis) -> None:
    redis = start_redis()

    def lose() -> None:
        redis.kill()
        redis.start()

    await loses_everything(lose, redis.url)


@on_loop
async def test_started_with_an_old_file(start_redis: StartRedis) -> None:
    """Redis starts with a snapshot, or as a replica that was behind: the missing records are put back."""
    redis = start_redis()
    async with members(redis.url, 2) as [one, other]:
        answered = [await one.publish() for _ in range(20)]
        redis.command("SAVE")
        answered += [await other.publish() for _ in range(20)]
        redis.kill()
        redis.start()
        answered.append(await publish_until_it_works(one))
        await is_back(one, other)
        await has_lost_nothing(answered, redis.url, one, other)


@on_loop
async def test_a_hub_puts_its_records_back(start_redis: StartRedis) -> None:
    """Each notification is whole, at any size, with its clients and topics, and as old as it was."""
    redis = start_redis()
    settings = Settings(notification_interval=0, max_message_size=100_000)
    async with Hub(settings, RedisStore(settings, redis.url)) as hub:
        for size in (1, 200, 70_000):
            await hub.notify("m", data={"x": "x" * size}, clients=["a"], topics=["t"])
        async with members(redis.url) as [early]:
            before = early.opening
        redis.empty()
        while True:
            try:
                await hub.notify("once more")
                break
            except StoreUnavailable:
                await asyncio.sleep(0.05)
        async with members(redis.url) as [late]:
            *back, _ = late.opening.records
        assert (late.opening.before, [record._replace(at=0) for record in back]) == (
            before.before,
            [record._replace(at=0) for record in before.records],
        )
        assert all(abs(one.at - other.at) < 1 for one, other in zip(back, before.records, strict=True))


async def begin_to_append(redis: RedisServer, member: Member, once: Once | None) -> asyncio.Task[Appended]:
    """Return when Redis has a batch that is read in several portions, and the member has not read the second yet."""
    appending = asyncio.create_task(member.store.append([SOMETHING] * 1000, once))
    while not redis.command("XLEN", "{notifyd}:log"):
        await asyncio.sleep(0)
    return appending


@on_loop
async def test_a_record_lost_before_it_was_read_is_not_answered(start_redis: StartRedis) -> None:
    """This holds without other requests too, and later records have greater numbers."""
    redis = start_redis()
    async with members(redis.url) as [one]:
        appending = await begin_to_append(redis, one, None)
        redis.empty()
        with pytest.raises(StoreUnavailable):
            await appending
        await is_back(one)
        newest = await one.publish()
        await has_lost_nothing([newest], redis.url, one)


@on_loop
async def test_emptied_before_the_publisher_is_answered(
    start_redis: StartRedis,
    start_process: Callable[..., Process],
) -> None:
    """Another process has read it all, so it is put back. A repetition is told, and delivers nothing more."""
    redis, once = start_redis(), Once("key", b"request")
    process = start_process(redis.url)
    async with members(redis.url) as [one]:
        appending = await begin_to_append(redis, one, once)
        # Without await: meanwhile this process reads nothing.
        process.ask("member.until(lambda: len(member.records) == 1000)")
        redis.empty()
        with pytest.raises(StoreUnavailable):
            await appending
        await is_back(one)
        answer = await one.store.append([SOMETHING] * 1000, once)
        assert answer.repeated
        assert [receipt.id for receipt in answer.receipts] == one.ids == process.ask("member.ids")
        with pytest.raises(KeyReused):
            await one.store.append([SOMETHING], Once("key", b"another"))


@on_loop
async def test_emptied_before_anybody_has_read_a_batch_with_a_key(start_redis: StartRedis) -> None:
    """No process delivers the part that it has read: the repetition delivers it all."""
    redis, once = start_redis(), Once("key", b"request")
    async with members(redis.url) as [one]:
        appending = await begin_to_append(redis, one, once)
        redis.empty()
        with pytest.raises(StoreUnavailable):
            await appending
        await is_back(one)
        answer = await one.store.append([SOMETHING] * 1000, once)
        assert [receipt.id for receipt in answer.receipts] == one.ids


@on_loop
async def test_keys_outlive_being_emptied_as_long_as_their_records(start_redis: StartRedis) -> None:
    """Every process keeps a key as long as its record, and no longer."""
    redis = start_redis()
    async with members(redis.url, 2, history_ttl=6) as [one, other]:
        first = await one.store.append([SOMETHING], Once("key", b"request"))
        await other.until(lambda: other.ids)
        redis.empty()
        await publish_until_it_works(one)
        await is_back(one, other)
        assert await other.store.append([SOMETHING], Once("key", b"request")) == first._replace(repeated=True)
        assert 0 < redis.command("PTTL", "{notifyd}:once:key") <= 6000
        await asyncio.sleep(6)
        assert not (await other.store.append([SOMETHING], Once("key", b"request"))).repeated


@on_loop
async def test_a_key_that_is_used_again_outlives_its_first_record(start_redis: StartRedis) -> None:
    """That record may stay until somebody joins, a moment longer than the key."""
    redis, once = start_redis(), Once("key", b"request")
    async with members(redis.url, history_ttl=2) as [one]:
        await one.store.append([SOMETHING], once)
        await asyncio.sleep(2.02)
        assert not (await one.store.append([SOMETHING], once)).repeated
        async with members(redis.url, history_ttl=2) as [late]:
            assert [record.id for record in late.opening.records] == one.ids[1:]
            assert (await late.store.append([SOMETHING], once)).repeated


@on_loop
async def test_a_process_has_the_log_once(start_redis: StartRedis) -> None:
    """The records to put back are the same objects that its clients are served from."""
    settings = Settings(notification_interval=0)
    async with Hub(settings, RedisStore(settings, start_redis().url)) as hub:
        await hub.notify("first")
        tracemalloc.start()
        for _ in range(100):
            await hub.notify("m", data={"x": "x" * 50_000})
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert used < 1.5 * 100 * 50_000


@on_loop
async def test_emptied_while_everybody_publishes(start_redis: StartRedis) -> None:
    redis = start_redis()
    async with members(redis.url, 2) as everyone:
        answered = []

        async def publish(member: Member) -> None:
            while len(answered) < 800:
                answered.append(await publish_until_it_works(member))

        publishers = [asyncio.create_task(publish(member)) for member in everyone for _ in range(3)]
        await everyone[0].until(lambda: len(answered) > 300)
        redis.empty()
        await asyncio.gather(*publishers)
        await is_back(*everyone)
        await has_lost_nothing(sorted(answered), redis.url, *everyone)


@on_loop
async def test_a_long_history_is_put_back_in_parts(start_redis: StartRedis) -> None:
    """The parts keep each call short, and every process waits for the last part."""
    redis = start_redis()
    async with members(redis.url, 2, history_size=5000) as [one, other]:
        answered = [await one.publish(*[SOMETHING] * 1000) for _ in range(3)]
        redis.empty()
        await is_away(one, "it has lost data and is being filled again")
        await is_back(one, other)
        assert redis.command("INFO", "commandstats")["cmdstat_zremrangebyrank"]["calls"] >= 3
        answered.append(await publish_until_it_works(one))
        await has_lost_nothing(answered, redis.url, one, other, history_size=5000)


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [([1] * 1001, [500, 500, 1]), ([200_000, 50_000, 12_145, 1], [2, 2]), ([9, 300_000, 9], [1, 1, 1]), ([], [])],
)
def test_a_call_that_fills_redis_again_is_bounded(sizes: list[int], counts: list[int]) -> None:
    """By records and by bytes, so that Redis is never busy with it for long."""
    assert [len(chunk) for chunk in chunks((b"x" * size, 1) for size in sizes)] == counts


@on_loop
async def test_a_process_with_much_to_put_back_is_waited_for(
    start_redis: StartRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records and clients take longer than the time in which a process has to begin, and to go on, with them."""
    redis, many = start_redis(), {"history_size": 50_000, "max_connections": 100_000}
    async with members(redis.url, **many) as [busy]:
        for _ in range(20):
            await busy.publish(*[SOMETHING] * 1000)
        busy.clients = {f"c{number}": registration(f"c{number}", "t", user="u") for number in range(80_000)}
        # About half of the time that they take: a busy machine holds a process up between two of its calls.
        monkeypatch.setattr("store_redis.RESTORE_SECONDS", 0.8)
        redis.empty()
        await busy.until(lambda: redis.command("HEXISTS", "{notifyd}:meta", "restoring"))
        async with members(redis.url, **many) as [newcomer]:
            await newcomer.until(lambda: newcomer.openings)
            assert [record.id for record in newcomer.opening.records] == busy.ids
            assert await newcomer.active() == len(busy.clients)
        assert busy.times_missed == 0


@on_loop
async def test_a_newcomer_to_a_redis_that_was_emptied_does_not_begin_an_empty_log(
    start_redis: StartRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot know of the others, who notice within a second: their log goes on, also where it was first."""
    redis = start_redis()
    # A busy machine notices later.
    monkeypatch.setattr("store_redis.RESTORE_SECONDS", 4.0)
    async with members(redis.url, 2) as [one, other]:
        answered = [await one.publish() for _ in range(3)]
        await other.until(lambda: other.ids == answered)
        redis.empty()
        async with members(redis.url) as [newcomer]:
            await is_back(newcomer)
            answered.append(await publish_until_it_works(one))
            await is_back(one, other, newcomer)
            await has_lost_nothing(answered, redis.url, one, other)
            await newcomer.until(lambda: newcomer.ids[-1:] == answered[-1:])


@pytest.mark.parametrize("has_file", [False, True])
@on_loop
async def test_the_longest_memory_refills_the_log(start_redis: StartRedis, has_file: bool) -> None:
    """A process that remembers less does not shorten the log, be it empty or older than the memory of that process."""
    redis = start_redis()
    async with members(redis.url) as [one]:
        answered = [await one.publish() for _ in range(20)]
        redis.command("SAVE")
        answered += [await one.publish() for _ in range(20)]
        async with members(redis.url, cache_bytes=4096) as [late]:
            assert 0 < len(late.opening.records) < 15
            answered.append(await late.publish())
            redis.kill()
            if not has_file:
                redis.forget()
            redis.start()
            answered.append(await publish_until_it_works(one))
            await is_back(one, late)
            await has_lost_nothing(answered, redis.url, one)
            await late.until(lambda: late.ids[-1:] == answered[-1:])
            assert (late.ids, late.times_missed) == (answered[-2:], 0)


@on_loop
async def test_a_refilled_log_has_no_gap(start_redis: StartRedis, start_process: Callable[..., Process]) -> None:
    """A process that was behind the memory of all others offers older records. It begins anew behind the gap."""
    redis = start_redis()
    behind = start_process(redis.url)
    behind.ask("member.publish()")
    behind.stop()
    async with members(redis.url) as [one]:
        missed = [await one.publish() for _ in range(40)]
        async with members(redis.url, cache_bytes=4096) as [late]:
            await one.store.close()
            redis.empty()
            await late.until(lambda: redis.command("HEXISTS", "{notifyd}:meta", "restoring"))
            behind.go_on()
            await is_back(late)
            newest = await late.publish()
            behind.ask("member.until(lambda: member.times_missed)")
            behind.ask(f"member.until(lambda: member.ids[-1:] == [{newest!r}])")
            remembered = [record.id for record in late.opening.records]
            assert behind.ask("member.ids") == [*remembered, newest]
            assert missed[-len(remembered) :] == remembered
            assert late.times_missed == 0
            async with members(redis.url) as [newcomer]:
                assert [record.id for record in newcomer.opening.records] == [*remembered, newest]
                assert newcomer.opening.before == missed[-len(remembered) - 1]


@on_loop
async def test_a_full_redis(start_redis: StartRedis) -> None:
    """One that may not forget anything refuses to write."""
    redis = start_redis()
    async with members(redis.url, 2) as [one, other]:
        answered = [await one.publish()]
        redis.refuse_writes()
        await is_away(other, "command not allowed when used memory > 'maxmemory'.")
        redis.refuse_writes(refuse=False)
        answered.append(await publish_until_it_works(one))
        await is_back(one, other)
        await has_lost_nothing(answered, redis.url, one, other)


@on_loop
async def test_a_read_only_replica(start_redis: StartRedis) -> None:
    redis = start_redis()
    async with members(redis.url, 2) as [one, other]:
        answered = [await one.publish()]
        redis.follow_nobody()
        await is_away(other, "this Redis is a replica")
        redis.follow_nobody(follow=False)
        answered.append(await publish_until_it_works(one))
        await is_back(one, other)
        await has_lost_nothing(answered, redis.url, one, other)


# Clocks and processes.


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_the_clock_of_redis_jumps_back(start_redis: StartRedis, start_process: Callable[..., Process]) -> None:
    """By an hour: older records lie in the future. Ids go on, and a dead process is still freed."""
    redis = start_redis()
    async with members(redis.url) as [one]:
        process = start_process(redis.url, SHORT_LEASE)
        process.ask("member.admit('a')")
        dead = (await one.store.census()).others[0]
        process.kill()
        hour = 3600 * 1000
        redis.command("ZADD", "{notifyd}:nodes", "XX", round((time.time() + 3600) * 1e6), dead)
        later = f"{round(time.time() * 1000) + hour:012x}"
        newest = f"{later[:8]}-{later[8:]}-7fff-bfff-fffffffffff0"
        redis.command("HSET", "{notifyd}:meta", "newest", newest)
        ids = [newest, *[await one.publish() for _ in range(3)]]
        assert ids == sorted(set(ids))

        async def is_free() -> bool:
            return await one.active() == 0

        await one.eventually(is_free)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_process_that_finds_the_log_empty_goes_on(
    start_redis: StartRedis,
    start_process: Callable[..., Process],
) -> None:
    """It was taken for dead, and the records it missed have expired: there is nothing to wait for."""
    redis = start_redis()
    async with members(redis.url, history_ttl=0.2) as [one]:
        process = start_process(redis.url, SHORT_LEASE)
        process.stop()

        async def is_dead() -> bool:
            return not (await one.store.census()).others

        await one.eventually(is_dead)
        await one.publish()
        await one.until(lambda: redis.command("XLEN", "{notifyd}:log") == 0)
        process.go_on()
        process.ask("member.until(lambda: member.times_missed)")
        newest = process.ask("member.publish()")
        assert (process.ask("member.ids"), process.ask("member.times_missed")) == ([newest], 1)


MANY = 5000


async def admit_many(process: Process, member: Member) -> None:
    """More clients than are removed at once, each with two topics."""
    process.ask(f"asyncio.gather(*(member.admit(f'c{{number}}', 't', 'u') for number in range({MANY})))")
    assert await member.active() == MANY


async def recipients(member: Member) -> list[int]:
    """Of everyone, of topics, of clients, and of both."""
    audiences = [None, audience([], ["t"]), audience([], ["t", "u"]), audience(["c1", "c2"]), audience(["c1"], ["u"])]
    appended = await member.store.append([Draft(b"{}", audience) for audience in audiences])
    return [receipt.recipients for receipt in appended.receipts]


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_clients_of_a_dead_process_count_for_nothing_and_are_removed_later(
    start_redis: StartRedis,
    start_process: Callable[..., Process],
) -> None:
    """A few with each renewal, so that Redis is never busy with them for long; nothing is left in the end."""
    redis = start_redis()
    async with members(redis.url, max_connections=2) as [one]:
        process = start_process(redis.url, SHORT_LEASE)
        await admit_many(process, one)
        assert await recipients(one) == [MANY, MANY, MANY, 2, MANY]
        process.kill()
        await one.eventually(lambda: is_alone(one))
        assert redis.command("HLEN", "{notifyd}:clients") > MANY / 2
        assert await recipients(one) == [0, 0, 0, 0, 0]
        # The ids are free, and so are the slots.
        await one.admit("c1", "t")
        await one.admit("c2")
        with pytest.raises(ConnectionRefused, match="2/2"):
            await one.admit("c3")
        assert await recipients(one) == [2, 1, 1, 2, 1]
        await one.until(lambda: redis.command("HLEN", "{notifyd}:clients") == 2)
        await one.until(lambda: not redis.command("EXISTS", "{notifyd}:dead"))
        assert await recipients(one) == [2, 1, 1, 2, 1]
        assert {key.split(":")[1] for key in redis.keys(0) if one.store.node_id not in key} == {
            *("meta", "log", "for", "nodes", "tails", "clients", "groups", "folded")
        }


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_process_that_comes_back_before_its_clients_are_removed_has_them(
    start_redis: StartRedis,
    start_process: Callable[..., Process],
) -> None:
    """All but the one that another process has taken."""
    redis = start_redis()
    async with members(redis.url) as [one]:
        process = start_process(redis.url, SHORT_LEASE)
        await admit_many(process, one)
        process.stop()
        await one.eventually(lambda: is_alone(one))
        await one.admit("c1")
        assert redis.command("HLEN", "{notifyd}:clients") > MANY / 2
        process.go_on()
        process.ask("member.until(lambda: member.lost_clients)")
        assert process.ask("member.lost_clients") == ["c1"]
        assert await recipients(one) == [MANY, MANY - 1, MANY - 1, 2, MANY]


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_the_counters_of_a_process_that_came_back_count_once(
    start_redis: StartRedis,
    start_process: Callable[..., Process],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That holds for a process that connects again after it last read the sums while the other was gone."""
    redis = start_redis()
    async with members(redis.url) as [one]:

        async def connects_again() -> None:
            redis.command("CLIENT", "KILL", "TYPE", "normal")
            await one.until(lambda: one.store.failure)
            await is_back(one)

        process = start_process(redis.url, SHORT_LEASE)
        process.ask("member.store.report(Report(7, 2))")
        process.stop()
        await one.eventually(lambda: is_alone(one))
        # It asks for the sums when it is back, and not again.
        monkeypatch.setattr("store_redis.RENEW_SECONDS", 60)
        await connects_again()
        await one.store.census()
        process.go_on()

        async def is_there() -> bool:
            return not await is_alone(one)

        await one.eventually(is_there)
        process.ask("member.until(lambda: member.store.failure is None)")
        process.ask("member.store.report(Report(8, 2))")
        await connects_again()
        assert (await one.store.census())[3:5] == (8, 2)


@on_loop
async def test_an_admission_that_was_not_answered_before_the_lease_ended(
    start_redis: StartRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is told of its admission is in the registry."""
    redis = start_redis()
    # So that the log is read slowly.
    monkeypatch.setattr("store_redis.READ_RECORDS", 1)
    async with members(redis.url, 2) as [one, other]:
        publish = asyncio.create_task(other.publish(*[SOMETHING] * 1000))
        while not redis.command("EXISTS", "{notifyd}:log"):
            await asyncio.sleep(0)
        admission = asyncio.create_task(one.admit("a"))
        while not redis.command("HEXISTS", "{notifyd}:clients", "a"):
            await asyncio.sleep(0)
        redis.command("ZADD", "{notifyd}:nodes", 1, one.store.node_id)
        await one.store.report(Report(0, 0))
        with contextlib.suppress(StoreUnavailable):
            await admission
        await publish
        assert await other.active() == len(one.clients)


@on_loop
async def test_a_change_of_topics_that_was_refused_is_none(start_redis: StartRedis) -> None:
    """Where Redis lost everything at this moment: the client is entered again with the topics that it has."""
    redis = start_redis()
    async with members(redis.url) as [one]:
        await one.admit("a")
        redis.empty()
        # As a conversation does it: here first, and back where it is refused.
        one.clients["a"] = registration("a", "t")
        try:
            await one.store.subscribe(one.clients["a"])
        except StoreUnavailable:
            one.clients["a"] = registration("a")
        await is_back(one)
        appended = await one.store.append([Draft(b"{}", audience([], ["t"]))])
        assert appended.receipts[0].recipients == len(one.clients["a"].topics)


async def is_alone(member: Member) -> bool:
    return not (await member.store.census()).others


@on_loop
async def test_close_ends_operations_in_flight(start_redis: StartRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at the same moment must not swallow the end: renewals without a pause make for that."""
    monkeypatch.setattr("store_redis.RENEW_SECONDS", 0)
    redis = start_redis()
    for _ in range(50):
        member = await Member(redis.url).open()
        await asyncio.wait_for(member.store.close(), PATIENCE)


@on_loop
async def test_messages_to_a_process_that_does_not_read_are_bounded(
    start_redis: StartRedis,
    start_process: Callable[..., Process],
) -> None:
    redis = start_redis()
    async with members(redis.url) as [one]:
        process = start_process(redis.url)
        process.stop()
        (node,) = (await one.store.census()).others
        await asyncio.gather(*(one.store.post(node, b"%d" % number) for number in range(1100)))
        process.go_on()
        process.ask("member.until(lambda: member.mail and member.mail[-1][1] == b'1099')")
        assert process.ask("len(member.mail)") <= 1001


@on_loop
async def test_a_cancelled_admission_is_taken_back(start_redis: StartRedis) -> None:
    """The store may have done it by then."""
    async with members(start_redis().url, 2) as [one, other]:
        admission = asyncio.create_task(one.store.admit(registration("a", "t")))
        await asyncio.sleep(0)
        admission.cancel()
        await one.publish()
        assert await other.active() == 0
        await other.admit("a")


@on_loop
async def test_a_store_that_is_closed_answers_nothing(start_redis: StartRedis) -> None:
    async with members(start_redis().url) as [one]:
        await one.store.close()
        with pytest.raises(StoreUnavailable):
            await one.publish()


@on_loop
async def test_an_opening_that_was_given_up_leaves_nothing(start_redis: StartRedis) -> None:
    """The next request opens the store."""
    redis = start_redis()
    redis.stop()
    member = Member(redis.url)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(member.open(), 0.1)
    redis.resume()
    await member.open()
    await member.publish()
    await member.store.close()
    assert (len(member.openings), asyncio.all_tasks()) == (1, {asyncio.current_task()})
