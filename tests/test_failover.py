"""A Redis that fails over: with sentinels, as a cluster, and behind one address.

Each test ends with the verdict that everything answered 200 is at everyone, once and in one order; where a minority
went on by itself, its clients are told instead. The tests marked `long` run in `make test-all` alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import hiredis
import pytest
from certificates import Pair
from conftest import StartServer
from history import Publish, given_up
from members import SOMETHING, Member, audience, members, on_loop
from processes import ROOT, eventually, free_port
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoPermissionError
from redis_group import AT_ONCE, SERVICE, Cluster, Group, Sentinel, carry, replica_of, tls_lines, until
from redis_server import RedisServer
from traffic import Traffic
from ws_clients import PATIENCE

from errors import StoreUnavailable
from settings import Settings, SettingsError
from store import Once
from store_redis import LOST_DATA, RedisStore
from store_redis_primary import Primary, PrimaryMoved

# Seconds after the promotion within which publishing is answered again.
LEVEL = 5.0


# URLs.


@pytest.mark.parametrize(
    ("url", "prefix"),
    [
        *(("redis+sentinel://:secret@host", "{n}"), ("redis+sentinel://:secret@host:x/main", "{n}")),
        *(("redis+sentinel://:secret@host/main/x", "{n}"), ("redis+sentinel://:secret@,/main", "{n}")),
        *(("rediss+sentinel://host/main?secret=1", "{n}"), ("redis+cluster://:secret@host/1", "{n}")),
        *(("redis+cluster://:secret@host?db=1", "{n}"), ("redis+cluster://:secret@host", "n:")),
        *(("redis+cluster://host", "{}n:{secret}"), ("rediss+cluster://:secret@host", "}n{")),
        *(("redis+sentinel://:secret@host:0/main", "{n}"), ("redis+sentinel://a, secret/main", "{n}")),
        *(("redis+sentinel://:secret@host/main/3?db=4", "{n}"), ("redis+cluster://:secret@host:0", "{n}")),
        ("redis+cluster://host?sentinel_password=", "{n}"),
    ],
)
def test_a_wrong_url_or_prefix_is_refused_without_a_secret(url: str, prefix: str) -> None:
    with pytest.raises(SettingsError, match=r"\A--store(-prefix)?: [^\n]*\Z") as error:
        RedisStore(Settings(store_prefix=prefix), url)
    assert "secret" not in str(error.value)
    assert ("prefix" in str(error.value)) == (prefix != "{n}")


@pytest.mark.parametrize("password", ["a+b", "a%2Bb"])
def test_a_plus_in_a_url_is_a_plus(password: str) -> None:
    """Before the hosts and behind them."""
    url = f"redis+sentinel://:{password}@host,[::1]:26380/main?sentinel_password={password}&client_name={password}"
    options = Primary(url, "{n}", 1.0).options
    assert (options["password"], options["client_name"]) == ("a+b", "a+b")


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "101"])
def test_the_number_of_replicas_is_small(value: str) -> None:
    with pytest.raises(SettingsError, match="store_replicas"):
        Settings(store="redis://host", store_replicas=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("store", ["auto", "memory", "sqlite:x"])
def test_only_redis_has_replicas(store: str) -> None:
    with pytest.raises(SettingsError, match="store_replicas: only a store in Redis has replicas"):
        Settings(store=store, store_replicas=1)


# Witnesses.


class FakeWitness:
    """A sentinel or a node that says what it is told to: an epoch and a port, nothing of use, or nothing at all."""

    def __init__(self, word: tuple[int, int] | str, host: str = "127.0.0.1") -> None:
        self.word, self._host = word, host
        # How long each answer takes.
        self.seconds = 0.0
        self._conversations = set[asyncio.Task[None] | None]()

    async def start(self) -> FakeWitness:
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        if self.word == "dead":
            self._server.close()
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._conversations.add(asyncio.current_task())
        commands = hiredis.Reader()
        # One that leaves with an answer unread resets the connection.
        with contextlib.suppress(ConnectionResetError):
            while data := await reader.read(1000):
                commands.feed(data)
                await asyncio.sleep(self.seconds)
                while command := commands.gets():
                    writer.write(b"" if self.word == "silent" else self._answer(b" ".join(command)))
        writer.close()

    def _answer(self, command: bytes) -> bytes:
        if not command.startswith((b"SENTINEL", b"CLUSTER")):
            return b"+OK\r\n"
        if self.word == "forbidden":
            return b"-NOPERM this user has no permissions to run the 'sentinel|master' command\r\n"
        if isinstance(self.word, str):
            return b"-ERR No such master with that name\r\n"
        if command.startswith(b"CLUSTER"):
            node = b"%040d 127.0.0.1:%d@1 master - 0 0 %d connected 0-16383\n" % (1, self.word[1], self.word[0])
            return b"$%d\r\n%s\r\n" % (len(node), node)
        if command.startswith(b"SENTINEL MASTER"):
            return b"*2\r\n+config-epoch\r\n+%d\r\n" % self.word[0]
        return b"*2\r\n+127.0.0.1\r\n+%d\r\n" % self.word[1]

    async def close(self) -> None:
        """Listen no longer, and wait until the connections have ended."""
        self._server.close()
        await asyncio.gather(*filter(None, self._conversations))


Words = list[tuple[int, int] | str]


@contextlib.asynccontextmanager
async def primary_of(words: Words) -> AsyncIterator[tuple[Primary, list[FakeWitness]]]:
    sentinels = [await FakeWitness(word).start() for word in words]
    hosts = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
    primary = Primary(f"redis+sentinel://{hosts}/main", "{n}", 1.0)
    try:
        yield primary, sentinels
    finally:
        await primary.release()
        for one in sentinels:
            await one.close()


@pytest.mark.parametrize(
    ("words", "port"),
    [
        ([(1, 7001)], 7001),
        (["dead", (1, 7001)], 7001),
        (["silent", (1, 7001)], 7001),
        (["ignorant", (1, 7001)], 7001),
        ([(1, 7001), (2, 7002), (1, 7001)], 7002),
    ],
)
@on_loop
async def test_the_newest_word_of_all_sentinels_counts(words: Words, port: int) -> None:
    """A sentinel that is dead, silent, ignorant or behind misleads nobody."""
    async with primary_of(words) as (primary, _):
        assert await primary.find() == ("127.0.0.1", port)


@on_loop
async def test_the_newest_word_outlives_the_sentinels_that_have_said_it() -> None:
    """A sentinel that is behind does not take it back; all of them do, as after a reset."""
    async with primary_of([(2, 7002), (1, 7001)]) as (primary, sentinels):
        await primary.find()
        sentinels[0].word = "silent"
        assert await primary.find() == ("127.0.0.1", 7002)
        sentinels[0].word = (1, 7001)
        async with asyncio.timeout(PATIENCE):
            # The question that was not answered is given up first.
            while await primary.find() != ("127.0.0.1", 7001):
                pass


@pytest.mark.parametrize("word", ["dead", "silent", "ignorant"])
@on_loop
async def test_no_sentinel_names_a_primary(word: str) -> None:
    async with primary_of([word, word]) as (primary, _):
        with pytest.raises((RedisConnectionError, OSError)):
            await primary.find()


@on_loop
async def test_a_right_that_is_missing_is_named() -> None:
    """Not where another sentinel knows the primary."""
    async with primary_of(["dead", "forbidden", "ignorant"]) as (primary, sentinels):
        with pytest.raises(NoPermissionError, match=r"'sentinel\|master'"):
            await primary.find()
        sentinels[2].word = (1, 7001)
        assert await primary.find() == ("127.0.0.1", 7001)


@on_loop
async def test_a_sentinel_may_have_an_address_of_ipv6() -> None:
    try:
        sentinel = await FakeWitness((1, 7001), "::1").start()
    except OSError:
        pytest.skip("there is no IPv6 here")
    primary = Primary(f"redis+sentinel://[::1]:{sentinel.port}/main", "{n}", 1.0)
    assert await primary.find() == ("127.0.0.1", 7001)
    await primary.release()
    await sentinel.close()


@on_loop
async def test_the_nodes_of_the_url_are_asked_again_where_no_other_answers() -> None:
    """All nodes of the cluster get other addresses: those of the URL are names that lead to the new ones."""
    first, second, seed = [await FakeWitness((1, 0)).start() for _ in range(3)]
    primary = Primary(f"redis+cluster://127.0.0.1:{seed.port}", "{n}", 1.0)
    first.word = seed.word = (1, first.port)
    for _ in range(2):
        assert await primary.find() == ("127.0.0.1", first.port)
    await primary.release()
    await first.close()
    second.word = seed.word = (1, second.port)
    assert await primary.find() == ("127.0.0.1", second.port)
    await primary.release()
    for one in (second, seed):
        await one.close()


@pytest.mark.slow
@on_loop
async def test_a_slow_sentinel_is_heard_in_the_end() -> None:
    """One that takes longer for its first answer than a round of questions: with TLS, or a slow name server."""
    async with primary_of([(1, 7001), (2, 7002)]) as (primary, sentinels):
        sentinels[1].seconds = 0.2
        assert await primary.find() == ("127.0.0.1", 7001)
        with pytest.raises(PrimaryMoved):
            await asyncio.wait_for(primary.watch(), PATIENCE)
        await primary.release()
        assert await primary.find() == ("127.0.0.1", 7002)


@pytest.mark.slow
@on_loop
async def test_a_primary_is_left_for_a_newer_one_alone() -> None:
    """Neither for another name of it, nor because the sentinels are behind or away."""
    async with primary_of([(2, 7001), (2, 7001)]) as (primary, sentinels):
        await primary.find()
        watch = asyncio.create_task(primary.watch())
        for words in (["silent", "silent"], [(1, 7002), (2, 7009)]):
            sentinels[0].word, sentinels[1].word = words
            await asyncio.sleep(1)
            assert not watch.done()
        sentinels[1].word = (3, 7002)
        began = time.monotonic()
        with pytest.raises(PrimaryMoved):
            await watch
        assert time.monotonic() - began < 3


# Stores without a server.


class Publisher:
    """A member that publishes all the time, repeats with the same key until it is answered, and notes when."""

    def __init__(self, member: Member, name: str) -> None:
        self.answered: list[tuple[float, str]] = []
        self.reasons: set[str] = set()
        self._member, self._name = member, name
        self._stopped = False
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        for number in count():
            if self._stopped:
                return
            answer = None
            while answer is None:
                began = time.monotonic()
                try:
                    answer = await self._member.store.append([SOMETHING], Once(f"{self._name}-{number}", b""))
                except StoreUnavailable as error:
                    self.reasons.add(str(error).removeprefix("The store is away: "))
                await asyncio.sleep(0.005)
            self.answered.append((began, answer.receipts[0].id))

    async def is_answered_after(self, moment: float) -> float:
        """Wait for the answer to a request that began after the moment; return how long after."""
        await self._member.until(lambda: self.answered[-1:] and self.answered[-1][0] > moment)
        return next(began for began, _ in self.answered if began > moment) - moment

    async def stop(self) -> set[str]:
        self._stopped = True
        await self._task
        return {id for _, id in self.answered}


async def is_whole(publishers: list[Publisher], everyone: list[Member]) -> None:
    """Every member was delivered all that was answered and nothing else, once and in order."""
    answered = set[str]().union(*[await publisher.stop() for publisher in publishers])
    for member in everyone:
        await member.until(lambda member=member: member.ids[-1:] >= [max(answered)])
        assert member.ids == sorted(set(member.ids)) == everyone[0].ids
        assert answered == set(member.ids)
        assert member.times_missed == 0


def kill(group: Group | Cluster, old: RedisServer) -> None:
    old.kill()


def kill_with_a_process(group: Group | Cluster, old: RedisServer) -> None:
    """The others wait for its offers, as its lease has not ended."""
    old.command("ZADD", "{notifyd}:nodes", round((time.time() + 5) * 1e6), "0" * 16)
    old.command("WAIT", 1, 1000)
    old.kill()


def stop(group: Group | Cluster, old: RedisServer) -> None:
    old.stop()


def order(group: Group | Cluster, old: RedisServer) -> None:
    if isinstance(group, Group):
        group.sentinels[0].command("SENTINEL", "FAILOVER", SERVICE)
    else:
        deadline = 0.0
        while group.primary is old:
            # A busy machine may let an order time out.
            if time.monotonic() > deadline:
                group.replicas(old)[0].command("CLUSTER", "FAILOVER")
                deadline = time.monotonic() + 6
            time.sleep(0.05)


@pytest.fixture(params=[Group, Cluster])
def group(request: pytest.FixtureRequest) -> Iterator[Group | Cluster]:
    made = request.param()
    yield made
    made.close()


only_sentinels = pytest.mark.parametrize("group", [Group], indirect=True)
only_cluster = pytest.mark.parametrize("group", [Cluster], indirect=True)


def serves(redis: RedisServer) -> bool:
    """Whether the log goes on in this Redis."""
    run, restoring = redis.command("HMGET", "{notifyd}:meta", "run", "restoring")
    return bool(run == redis.command("INFO", "server")["run_id"] and restoring is None)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [kill, kill_with_a_process, stop, order])
@on_loop
async def test_another_primary_is_found(group: Group | Cluster, fault: Callable[..., None]) -> None:
    """All that was answered is put back, and publishing is answered again soon after the promotion."""
    async with members(group.url, 3) as everyone:
        publishers = [Publisher(member, str(number)) for number, member in enumerate(everyone)]
        await publishers[0].is_answered_after(time.monotonic())
        old = group.primary
        await asyncio.to_thread(fault, group, old)
        new = await asyncio.to_thread(group.promoted, old)
        promoted_at = time.monotonic()

        def goes_on() -> bool:
            nonlocal new, promoted_at
            # On a busy machine sentinels may give a promotion up and promote another.
            if (newest := group.promoted(old)) is not new:
                new, promoted_at = newest, time.monotonic()
            return serves(new)

        await everyone[0].until(goes_on)
        await publishers[0].is_answered_after(time.monotonic())
        assert time.monotonic() - promoted_at < LEVEL
        await is_whole(publishers, everyone)


@pytest.mark.slow
@only_sentinels
@on_loop
async def test_a_primary_without_sentinels_is_kept(group: Group) -> None:
    """Also by a process that has to connect again."""
    async with members(group.url, 2) as everyone:
        publishers = [Publisher(member, str(number)) for number, member in enumerate(everyone)]
        await publishers[0].is_answered_after(time.monotonic())
        for sentinel in group.sentinels:
            sentinel.kill()
        await publishers[0].is_answered_after(time.monotonic() + 1)
        assert not publishers[0].reasons
        group.servers[0].command("CLIENT", "KILL", "TYPE", "normal")
        await everyone[0].until(lambda: everyone[0].store.failure)
        await publishers[0].is_answered_after(time.monotonic())
        await is_whole(publishers, everyone)


def rights(secret: str) -> list[list[str]]:
    """Return the commands of docs/scaling.md that make a user on a Redis, and on a sentinel."""
    page = (ROOT / "docs" / "scaling.md").read_text().replace("SECRET", secret)
    return [line.split() for line in re.findall(r"^ACL SETUSER .*", page, re.MULTILINE)]


@pytest.mark.slow
@only_sentinels
@on_loop
async def test_credentials_and_a_database(group: Group) -> None:
    """A wrong secret is a reason, without the secret; so is a missing right, with its name."""
    sentinel = group.sentinels[0]
    on_redis, on_sentinel = rights("pa@ss")
    sentinel.command(*on_sentinel)
    for server in group.servers:
        server.command(*on_redis)
    url = f"redis+sentinel://notifyd:pa%40ss@localhost:{sentinel.port}/{SERVICE}/3?sentinel_username=notifyd"
    url += "&sentinel_password="
    async with members(url + "pa@ss", store_replicas=1) as [one]:
        await one.publish()
        assert group.primary.keys(3)
    for wrong in (url + "guess", url.replace("pa%40ss", "guess") + "pa@ss"):
        async with members(wrong) as [one]:
            assert one.store.failure and "guess" not in one.store.failure and "password" in one.store.failure
    sentinel.command("ACL", "SETUSER", "notifyd", "-sentinel|master")
    async with members(url + "pa@ss") as [one]:
        assert "no permissions to run the 'sentinel|master' command" in str(one.store.failure)


@pytest.mark.slow
@only_cluster
@on_loop
async def test_credentials_of_a_cluster(group: Cluster) -> None:
    [on_redis, _] = rights("secret")
    for server in group.servers:
        server.command(*on_redis)
    url = group.url.replace("//", "//notifyd:secret@")
    async with members(url, 2, store_replicas=1) as [one, other]:
        await one.admit("a", "t")
        assert await other.store.census()
        await one.store.append([SOMETHING], Once("key", b""))
        await other.until(lambda: other.ids == one.ids)
        assert (await one.store.log.reach(None, audience(["a"]), one.ids[0])).replayed == 1
    for server in group.servers:
        server.command("ACL", "SETUSER", "notifyd", "-cluster|nodes")
    async with members(url) as [one]:
        assert "no permissions to run the 'cluster|nodes' command" in str(one.store.failure)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "replicas"), [(Group, 0), (Group, 1), (Cluster, 0)], indirect=["group"])
@on_loop
async def test_an_old_primary_that_goes_on_makes_no_second_order(group: Group | Cluster, replicas: int) -> None:
    """A partition leaves it alone with one process. Without --store-replicas that process begins anew afterwards."""
    old, url = group.primary, group.url_behind_a_partition()
    async with members(url, store_replicas=replicas) as [alone], members(group.url, 2) as [one, other]:
        common = [await one.publish() for _ in range(5)]
        await alone.until(lambda: alone.ids == common)
        group.cut_off(old)
        publishers = [Publisher(alone, "alone"), Publisher(one, "one")]
        await asyncio.to_thread(group.promoted, old)
        await one.until(lambda: one.store.failure is None)
        await publishers[1].is_answered_after(time.monotonic())
        answered = bool(publishers[0].answered)
        assert answered == (replicas == 0) == (len(alone.ids) > len(common))
        group.heal(old)
        await alone.until(lambda: alone.times_missed or (replicas and alone.store.failure is None))
        lost = await publishers[0].stop()
        answered_by_most = await publishers[1].stop()
        newest = await one.publish()
        for member in (alone, one, other):
            await member.until(lambda member=member: member.ids[-1:] == [newest])
            assert member.ids == sorted(set(member.ids))
        assert alone.ids == one.ids
        assert one.ids == other.ids and answered_by_most <= set(one.ids)
        assert (alone.times_missed, one.times_missed, other.times_missed) == (int(replicas == 0), 0, 0)
        if replicas:
            assert lost <= set(one.ids)


@pytest.mark.slow
@on_loop
async def test_sentinel_and_primary_with_tls(tmp_path: Path) -> None:
    """A certificate that is not trusted is a reason; so with one address."""
    pair, other = Pair(tmp_path, "localhost"), Pair(tmp_path, "other")
    tls, ports = tls_lines(pair), (free_port(), free_port())
    primary = RedisServer(flags=tuple(f"--tls-port {ports[0]} --{' --'.join(tls)}".split()))
    sentinel = Sentinel(ports[0], f"tls-port {ports[1]}", *tls, quorum=1)
    for place in (f"rediss+sentinel://127.0.0.1:{ports[1]}/{SERVICE}", f"rediss://127.0.0.1:{ports[0]}"):
        async with members(f"{place}?ssl_ca_certs={pair.certificate}", 2) as [one, two]:
            newest = await one.publish()
            await two.until(lambda two=two, newest=newest: two.ids[-1:] == [newest])
        async with members(f"{place}?ssl_ca_certs={other.certificate}") as [one]:
            assert one.store.failure == "The store is away: TLS: CERTIFICATE_VERIFY_FAILED"
    sentinel.close()
    primary.close()


@pytest.mark.slow
@on_loop
async def test_a_cluster_with_tls(tmp_path: Path) -> None:
    """Its nodes are asked for the primary over TLS as well, and a failover finds another."""
    pair, other = Pair(tmp_path, "localhost"), Pair(tmp_path, "other")
    group = Cluster(pair)
    try:
        async with members(f"{group.url}?ssl_ca_certs={pair.certificate}", 2) as everyone:
            publishers = [Publisher(member, str(number)) for number, member in enumerate(everyone)]
            await publishers[0].is_answered_after(time.monotonic())
            old = group.primary
            await asyncio.to_thread(order, group, old)
            new = await asyncio.to_thread(group.promoted, old)
            await everyone[0].until(lambda: serves(new))
            await publishers[1].is_answered_after(time.monotonic())
            await is_whole(publishers, everyone)
            connections = new.command("CLIENT", "LIST")
            assert connections.count(f"laddr=127.0.0.1:{group.tls_ports[group.servers.index(new)]}") >= 4
        async with members(f"{group.url}?ssl_ca_certs={other.certificate}") as [one]:
            assert one.store.failure == "The store is away: TLS: CERTIFICATE_VERIFY_FAILED"
    finally:
        group.close()


# A slot that moves.


@pytest.mark.slow
@only_cluster
@on_loop
async def test_a_slot_that_is_moved(group: Cluster) -> None:
    """Redis refuses all while keys are on both sides, and nothing stays behind."""
    async with members(group.url, 2) as everyone:
        publishers = [Publisher(member, str(number)) for number, member in enumerate(everyone)]
        await publishers[0].is_answered_after(time.monotonic())
        old, new = await asyncio.to_thread(group.move)
        await everyone[0].until(lambda: serves(new))
        await is_whole(publishers, everyone)
        assert old.command("DBSIZE") == 0
        assert publishers[0].reasons <= {"the slot of its keys is moving", LOST_DATA}


# One address.


class Endpoint:
    """A managed address: a proxy to the present primary, that is told of another."""

    def __init__(self, target: RedisServer) -> None:
        self.target = target
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> Endpoint:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://localhost:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self.target.port)
            self._writers += writer, other_writer
            await asyncio.gather(carry(reader, other_writer), carry(other_reader, writer))
        writer.close()

    def turn_to(self, target: RedisServer) -> None:
        """Drop all connections, and lead new ones to another server."""
        self.target = target
        for writer in self._writers:
            writer.close()

    def close(self) -> None:
        self._server.close()
        self.turn_to(self.target)


@pytest.fixture
def start_replicated() -> Iterator[Callable[..., RedisServer]]:
    """Start a Redis, or with a primary a replica of it."""
    servers: list[RedisServer] = []

    def start(primary: RedisServer | None = None) -> RedisServer:
        servers.append(RedisServer(flags=AT_ONCE) if primary is None else replica_of(primary))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


StartReplicated = Callable[..., RedisServer]


def demote(_: object, old: RedisServer) -> None:
    """Old connections stay, and are answered READONLY."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", [kill, stop, demote])
@on_loop
async def test_the_server_behind_an_address_changes(
    start_replicated: StartReplicated, fault: Callable[..., None]
) -> None:
    """Whether the address drops the connections, is silent, or answers as a replica."""
    old = start_replicated()
    new = start_replicated(old)
    until(lambda: new.command("ROLE")[3] == "connected")
    endpoint = await Endpoint(old).start()
    async with members(endpoint.url, 2) as everyone:
        publishers = [Publisher(member, str(number)) for number, member in enumerate(everyone)]
        await publishers[0].is_answered_after(time.monotonic())
        fault(None, old)
        await asyncio.sleep(0.5)
        new.command("REPLICAOF", "NO", "ONE")
        if fault is demote:
            old.command("REPLICAOF", "127.0.0.1", new.port)
        await asyncio.sleep(0.5)
        endpoint.target, changed_at = new, time.monotonic()
        await everyone[0].until(lambda: serves(new))
        await publishers[0].is_answered_after(time.monotonic())
        assert time.monotonic() - changed_at < LEVEL
        await is_whole(publishers, everyone)
    endpoint.close()


@pytest.mark.slow
@pytest.mark.parametrize("meet", ["on the old primary", "on the new primary", "on a third server"])
@on_loop
async def test_two_histories_are_never_merged(start_replicated: StartReplicated, meet: str) -> None:
    """Two processes went on apart. One of them begins anew with the history of the other, and says so."""
    old = start_replicated()
    new, third = start_replicated(old), start_replicated(old)
    ends = [await Endpoint(old).start() for _ in range(2)]
    async with members(ends[0].url) as [one], members(ends[1].url) as [other]:
        await one.publish()
        until(lambda: old.command("WAIT", 2, 1000) == 2)
        for server in (new, third):
            server.command("REPLICAOF", "NO", "ONE")
        ends[1].turn_to(new)
        await other.until(lambda: serves(new) and other.store.failure is None)
        for member in (one, other, one, other) if meet == "on the old primary" else (other, one, other, one):
            await member.publish()
        first, second = one.ids, other.ids
        assert len(first) == len(second) == 3 and first[0] == second[0]
        if meet == "on the old primary":
            ends[1].turn_to(old)
        elif meet == "on the new primary":
            ends[0].turn_to(new)
        else:
            for end in ends:
                end.turn_to(third)
        beginner, kept = (other, first) if meet == "on the old primary" else (one, second)
        await one.until(lambda: beginner.times_missed and not (one.store.failure or other.store.failure))
        newest = await one.publish()
        await other.until(lambda: other.ids[-1:] == one.ids[-1:] == [newest])
        assert one.ids == other.ids == [*kept, newest]
        assert one.times_missed + other.times_missed == 1
    for end in ends:
        end.close()


@pytest.mark.slow
@on_loop
async def test_another_redis_behind_the_same_connection_is_noticed(redis: RedisServer) -> None:
    """Its data names the run of the Redis that it was copied from. The next call joins, and nothing is lost."""
    async with members(redis.url, 2) as [one, other]:
        answered = [await one.publish()]
        epoch = redis.command("HGET", "{notifyd}:meta", "epoch")
        redis.command("HSET", "{notifyd}:meta", "run", "the old primary")
        with pytest.raises(StoreUnavailable):
            await one.publish()
        await one.until(lambda: one.store.failure is None)
        assert redis.command("HGET", "{notifyd}:meta", "epoch") > epoch
        answered.append((await one.store.append([SOMETHING])).receipts[0].id)
        await other.until(lambda: other.ids[-1:] == answered[-1:])
        assert one.ids == other.ids and set(answered) <= set(one.ids)


# Replicas that are waited for.


@pytest.mark.slow
@on_loop
async def test_nothing_is_delivered_before_the_replica_has_it(start_replicated: StartReplicated) -> None:
    """A refused publish is answered with its first id once the replica goes on."""
    primary = start_replicated()
    async with members(primary.url, 2, store_replicas=1) as [one, other]:
        assert one.store.failure == "The store is away: replicas: 1 needed, 0 answered"
        replica = start_replicated(primary)
        await one.until(lambda: one.openings and other.openings)
        first = await one.publish()
        await other.until(lambda: other.ids == [first])
        replica.stop()
        with pytest.raises(StoreUnavailable, match="replica"):
            await one.store.append([SOMETHING], Once("key", b""))
        assert primary.command("XLEN", "{notifyd}:log") == 2
        await asyncio.sleep(1)
        assert one.ids == other.ids == [first]
        replica.resume()
        await one.until(lambda: one.store.failure is None)
        again = await one.store.append([SOMETHING], Once("key", b""))
        await other.until(lambda: len(other.ids) == 2)
        assert again.repeated and one.ids == other.ids == [first, again.receipts[0].id]


@pytest.mark.slow
def test_a_server_without_enough_replicas_answers_503(start_server: StartServer, redis: RedisServer) -> None:
    server = start_server("--store", redis.url, "--store-replicas", "1")
    answer = server.post({"message": "m"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.json()["error"]["message"] == "The store is away: replicas: 1 needed, 0 answered"
    assert server.get("/health/live").status_code == 200


# Servers with clients.


class Crowd(NamedTuple):
    """The size of a test: processes, clients, and the pause of each publisher."""

    servers: int
    clients: int
    pause: float


SMALL = Crowd(2, 20, 0.02)
LARGE = Crowd(4, 500, 0.2)
in_both_sizes = pytest.mark.parametrize(
    "crowd", [SMALL, pytest.param(LARGE, marks=pytest.mark.long)], ids=["20", "500"]
)


def traffic(start_server: StartServer, group: Group | Cluster, crowd: Crowd) -> Traffic:
    flags = ("--store", group.url, "--history-size", "100000")
    servers = [start_server(*flags) for _ in range(crowd.servers)]
    return Traffic(*servers, clients=crowd.clients, pause=crowd.pause)


def answered_after(running: Traffic, moment: float) -> float:
    """Wait for the first answer after a moment; return how long after."""

    def answers() -> list[float]:
        publishes = [event for event in list(running.history) if isinstance(event, Publish)]
        return [one.ended for one in publishes if one.id is not None and one.ended > moment]

    eventually(answers, 20)
    return min(answers()) - moment


@pytest.mark.slow
@in_both_sizes
def test_clients_stay_while_the_primary_is_killed(
    start_server: StartServer, group: Group | Cluster, crowd: Crowd
) -> None:
    """Publishers are answered 503 with the reason, and then 200 soon after the promotion."""
    with traffic(start_server, group, crowd) as running:
        old = group.primary
        old.kill()
        group.promoted(old)
        assert answered_after(running, time.monotonic()) < LEVEL
        running.is_whole(connections=1)
        assert running.reasons and all(reason.startswith("The store is away: ") for reason in running.reasons)


@pytest.mark.slow
@pytest.mark.long
@in_both_sizes
def test_clients_stay_during_a_failover_by_order(
    start_server: StartServer, group: Group | Cluster, crowd: Crowd
) -> None:
    with traffic(start_server, group, crowd) as running:
        old = group.primary
        order(group, old)
        new = group.promoted(old)
        eventually(lambda: serves(new))
        running.is_whole(connections=1)


@pytest.mark.slow
@pytest.mark.long
@in_both_sizes
def test_the_primary_is_stopped_for_20_s_and_comes_back(
    start_server: StartServer, group: Group | Cluster, crowd: Crowd
) -> None:
    """What it takes then is no second order: it is demoted, and nobody listens to it."""
    with traffic(start_server, group, crowd) as running:
        old = group.primary
        old.stop()
        stopped_at = time.monotonic()
        group.promoted(old)
        assert answered_after(running, time.monotonic()) < LEVEL
        time.sleep(max(0.0, stopped_at + 20 - time.monotonic()))
        old.resume()
        until(lambda: old.command("ROLE")[0] == "slave")
        running.is_whole(connections=1)


@pytest.mark.slow
@pytest.mark.long
@only_cluster
@in_both_sizes
def test_clients_stay_while_the_slot_moves(start_server: StartServer, group: Cluster, crowd: Crowd) -> None:
    with traffic(start_server, group, crowd) as running:
        _, new = group.move()
        eventually(lambda: serves(new))
        running.is_whole(connections=1)


@pytest.mark.slow
@pytest.mark.long
@only_sentinels
@in_both_sizes
def test_clients_behind_a_partition_stay_and_lose_nothing(
    start_server: StartServer, group: Group, crowd: Crowd
) -> None:
    """With --store-replicas: the old primary is left alone with a server, which answers 503."""
    old, flags = group.primary, ("--store-replicas", "1", "--history-size", "100000")
    urls = [group.url_behind_a_partition(), *[group.url] * (crowd.servers - 1)]
    servers = [start_server("--store", url, *flags) for url in urls]
    with Traffic(*servers, clients=crowd.clients, pause=crowd.pause) as running:
        group.cut_off(old)
        group.promoted(old)
        assert answered_after(running, time.monotonic()) < LEVEL
        assert servers[0].post({"message": "to the old primary"}).status_code == 503
        group.heal(old)
        running.is_whole(connections=1)


@pytest.mark.slow
@pytest.mark.long
@only_sentinels
def test_publishers_of_a_minority_repeat_with_their_keys(start_server: StartServer, group: Group) -> None:
    """Without --store-replicas: only clients that were told lack anything, and only they had what is given up."""
    old, size = group.primary, ("--history-size", "100000")
    other = start_server("--store", group.url, *size)
    alone = start_server("--store", group.url_behind_a_partition(), *size)
    with Traffic(other, alone, may_miss=True) as running:
        # The counters of the minority go back to those of the majority.
        running.stays_up = False
        group.cut_off(old)
        group.promoted(old)
        before = list(running.answers)
        # Both sides go on: half of the publishers each.
        eventually(lambda: all(now > then + 3 for now, then in zip(running.answers, before, strict=True)), 20)
        group.heal(old)
        eventually(running.told, 20)
        running.is_whole()
        assert running.told() == {listener.name for listener in running.listeners[1::2]}
        assert given_up(running.history)


@pytest.mark.slow
@pytest.mark.long
@only_sentinels
def test_clients_of_a_minority_that_went_on_are_told(start_server: StartServer, group: Group) -> None:
    """Without --store-replicas: a client that resumes from there is told that something is missing."""
    old = group.primary
    alone, other = start_server("--store", group.url_behind_a_partition()), start_server("--store", group.url)
    clients = alone.join("a"), other.join("b")
    alone.notify("common")
    group.cut_off(old)
    group.promoted(old)
    [lost] = alone.publish("for the minority")
    eventually(lambda: other.post({"message": "for the majority"}).status_code == 200, 20)
    assert [client.receive()["data"]["message"] for client in clients] == ["common"] * 2
    assert clients[0].receive()["data"]["message"] == "for the minority"
    assert clients[1].receive()["data"]["message"] == "for the majority"
    group.heal(old)
    assert clients[0].closed() == (1013, "Notifications are missing; connect again and resume")
    resumed = alone.join("a", query=f"client_id=a&since={lost}")
    assert resumed.receive()["data"]["complete"] is False
    assert [one["data"]["message"] for one in resumed.receive_many(2)] == ["common", "for the majority"]
    alone.notify("for all")
    assert resumed.receive()["data"]["message"] == clients[1].receive()["data"]["message"] == "for all"


@pytest.mark.slow
@pytest.mark.long
@only_sentinels
@in_both_sizes
def test_all_sentinels_are_away_while_the_primary_is_well(
    start_server: StartServer, group: Group, crowd: Crowd
) -> None:
    """Nobody notices: no publish is refused."""
    with traffic(start_server, group, crowd) as running:
        for sentinel in group.sentinels:
            sentinel.kill()
        time.sleep(3)
        assert not running.reasons
        group.servers[0].command("CLIENT", "KILL", "TYPE", "normal")
        running.is_whole(connections=1)


@pytest.mark.slow
@pytest.mark.long
@only_sentinels
def test_a_server_starts_without_sentinels(start_server: StartServer, group: Group) -> None:
    """It answers 503 until they are there."""
    for sentinel in group.sentinels:
        sentinel.kill()
    server = start_server("--store", group.url)
    assert server.post({"message": "m"}).status_code == 503
    for sentinel in group.sentinels:
        sentinel.start()
    eventually(lambda: server.get("/health").status_code == 200, 20)
    server.notify("m")
