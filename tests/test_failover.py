"""A Redis that fails over: with sentinels, as a cluster, and behind one address."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from members import SOMETHING, Member, members, on_loop
from redis_group import SERVICE, Group
from redis_server import RedisServer

from errors import StoreUnavailable
from settings import Settings, SettingsError
from store import Once
from store_redis import RedisStore

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
    ],
)
def test_a_wrong_url_or_prefix_is_refused_without_a_secret(url: str, prefix: str) -> None:
    with pytest.raises(SettingsError, match=r"\A--store(-prefix)?: [^\n]*\Z") as error:
        RedisStore(Settings(store_prefix=prefix), url)
    assert "secret" not in str(error.value)
    assert ("prefix" in str(error.value)) == (prefix != "{n}")


@pytest.mark.parametrize("value", ["-1", "x", "1.5", "101"])
def test_the_number_of_replicas_is_small(value: str) -> None:
    with pytest.raises(SettingsError, match="store_replicas"):
        Settings(store="redis://host", store_replicas=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("store", ["auto", "memory", "sqlite:x"])
def test_only_redis_has_replicas(store: str) -> None:
    with pytest.raises(SettingsError, match="store_replicas: only a store in Redis has replicas"):
        Settings(store=store, store_replicas=1)


# Sentinels.


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.close()


class Publisher:
    """A member that publishes all the time, repeats with the same key until it is answered, and notes when."""

    def __init__(self, member: Member, name: str) -> None:
        self.answered: list[tuple[float, str]] = []
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
                with contextlib.suppress(StoreUnavailable):
                    answer = await self._member.store.append([SOMETHING], Once(f"{self._name}-{number}", b""))
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
    """Every member was delivered the same, once and in order, and all that was answered."""
    answered = set[str]().union(*[await publisher.stop() for publisher in publishers])
    for member in everyone:
        await member.until(lambda member=member: member.ids[-1:] >= [max(answered)])
        assert member.ids == sorted(set(member.ids)) == everyone[0].ids
        assert answered <= set(member.ids)
        assert member.times_missed == 0


def serves(redis: RedisServer) -> bool:
    """Whether the log goes on in this Redis."""
    run, restoring = redis.command("HMGET", "{notifyd}:meta", "run", "restoring")
    return bool(run == redis.command("INFO", "server")["run_id"] and restoring is None)


def kill(group: Group, old: RedisServer) -> None:
    old.kill()


def order(group: Group, old: RedisServer) -> None:
    group.sentinels[0].command("SENTINEL", "FAILOVER", SERVICE)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [kill, order])
@on_loop
async def test_another_primary_is_found(group: Group, fault: Callable[[Group, RedisServer], None]) -> None:
    """All that was answered is put back, and publishing is answered again soon after the promotion."""
    async with members(group.url, 3) as everyone:
        publishers = [Publisher(member, str(number)) for number, member in enumerate(everyone)]
        await publishers[0].is_answered_after(time.monotonic())
        old = group.primary
        fault(group, old)
        new = await asyncio.to_thread(group.promoted, old)
        promoted_at = time.monotonic()
        await everyone[0].until(lambda: serves(new))
        await publishers[0].is_answered_after(time.monotonic())
        assert time.monotonic() - promoted_at < LEVEL
        await is_whole(publishers, everyone)
