"""The log in a store, read in pages: against a list, with records for many names, bounds, and readers at each place."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hub_model import ListedLog
from hypothesis import HealthCheck, Phase, given, settings
from members import Member, audience, members, on_loop
from redis_server import RedisServer

from log import Audience
from settings import Settings
from store import Draft, Record

NOBODY_ELSE = "ffffffff-ffff-7fff-bfff-ffffffffffff"
NAMES = ["ann", "bob", "red"]
audiences = st.none() | st.builds(audience, st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
rests = st.binary(max_size=60).map(lambda rest: b"," + rest)
to_replay = st.tuples(rests, audiences, st.just(True))
not_to_replay = st.tuples(rests, st.sampled_from([None, audience()]), st.just(False))
drafts = st.one_of(to_replay, to_replay, not_to_replay).map(lambda fields: Draft(*fields))
interests = st.builds(audience, st.sets(st.sampled_from([*NAMES, "eve"])), st.sets(st.sampled_from(NAMES)))
places = st.integers(-2, 30)


async def pages(member: Member, interest: Audience, after: str, until: str, **order: bool) -> list[Record]:
    """Read from page to page."""
    found, log = [], member.store.log
    assert log is not None
    while after < until:
        page = await log.read(interest, after, until, **order)
        found += page.records
        assert after <= page.until < until if order else after < page.until <= until
        if order:
            until = page.until
        else:
            after = page.until
    return found


async def compare(url: str, batches: list[list[Draft]], interest: Audience, spans: list[tuple[int, int]]) -> None:
    """Append, and compare the store with a list at each of these spans."""
    bounds: dict[str, Any] = {"history_size": 12, "history_bytes": 700}
    async with members(url, **bounds) as [one]:
        log = one.store.log
        assert log is not None
        model = ListedLog(one.opening.before, Settings(**bounds), one.publish_for_ever)
        for batch in batches:
            await one.store.append(batch)
        model.records = list(one.records)
        ids = [one.opening.before, *one.ids, NOBODY_ELSE, "00000000-0000-0000-0000-000000000000"]
        now = time.time()
        for first, last in spans:
            since, until = ids[min(first, len(ids) - 1)], ids[min(abs(last), len(one.ids))]
            reach = await log.reach(since, interest, until)
            expected = model.reach_at(now, since, interest, until)
            assert reach == expected._replace(interest=reach.interest)
            for names in (interest, reach.interest):
                found = model.for_interest(names, reach.position, until)
                assert await pages(one, names, reach.position, until) == found
            assert await pages(one, interest, reach.position, until, newest_first=True) == found[::-1]
        assert await log.reach(None, interest, until) == model.reach_at(now, None, interest, until)._replace(
            interest=(await log.reach(None, interest, until)).interest
        )


@pytest.mark.parametrize("page", [1, 3, 500])
@pytest.mark.parametrize("kind", ["sqlite", "redis"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
@given(
    batches=st.lists(st.lists(drafts, min_size=1, max_size=6), max_size=8),
    interest=interests,
    spans=st.lists(st.tuples(places, places), min_size=1, max_size=6),
)
def test_a_stored_log_is_a_list(
    common_redis: Callable[[], RedisServer],
    kind: str,
    page: int,
    batches: list[list[Draft]],
    interest: Audience,
    spans: list[tuple[int, int]],
) -> None:
    """Whatever the pages, the names and the places: each record once, in order, and counted beforehand."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("store_sqlite_log.PAGE_ENTRIES", page)
        patch.setattr("store_sqlite_log.COUNTED_AT_ONCE", page)
        patch.setattr("store_redis_log.PAGE_RECORDS", page)
        url = f"sqlite:{folder}/log.db"
        if kind == "redis":
            common_redis().empty()
            url = common_redis().url
        asyncio.run(compare(url, batches, interest, spans))


@on_loop
async def test_a_file_of_version_1_gets_its_index(tmp_path: Path) -> None:
    """Its records are found by their names and counted, beside those that follow."""
    url = f"sqlite:{tmp_path}/log.db"
    appended = [Draft(b"1"), Draft(b"2", audience(["ann"], ["red"])), Draft(b"3", None, False), Draft(b"4")]
    async with members(url) as [one]:
        await one.store.append(appended)
    with contextlib.closing(sqlite3.connect(tmp_path / "log.db")) as db:
        db.executescript(
            "DROP INDEX log_everyone; DROP TABLE addressed; ALTER TABLE log DROP COLUMN everyone_before;"
            "ALTER TABLE log DROP COLUMN recipients;"
            "UPDATE state SET json = json_remove(CAST(json AS TEXT), '$.everyone'); PRAGMA user_version = 1"
        )
    async with members(url) as [late]:
        newest = await late.publish(Draft(b"5"), Draft(b"6", audience(["ann"])))
        interest = audience(["ann", "bob"], ["red"])
        reach = await late.store.log.reach(None, interest, newest)
        assert reach == (late.opening.before, True, 5, audience(["ann"], ["red"]), newest)
        found = await late.store.log.read(interest, reach.position, newest)
        assert [record.rest for record in found.records] == [b"1", b"2", b"3", b"4", b"5", b"6"]
