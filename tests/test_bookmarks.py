"""Bookmarks: the contract of each store for what clients have acknowledged, and the notifications that it covers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, cycle, islice

import pytest
from members import Member, audience, members, on_loop
from redis_server import RedisServer

import bookmarks
from bookmarks import MOST_SPANS, NOWHERE, PAGE_BOOKMARKS, Bookmark, Owner, Span
from log import Audience
from settings import Settings
from store import ClientIdTaken

ANN = Owner("ann", "")


def bookmark(position: str, *spans: tuple[str, str, str], owner: Owner = ANN) -> Bookmark:
    """A bookmark at a position, for everything since "0" unless told."""
    return Bookmark(owner, position, tuple(Span(*span) for span in spans or [("", "0", "")]))


async def kept(member: Member, *marks: Bookmark) -> Bookmark | None:
    member.store.bookmarks.keep(marks)
    return await member.store.bookmarks.find(marks[-1].owner)


async def pages(member: Member, least: str = "") -> list[list[Bookmark]]:
    found, after = await member.store.bookmarks.page(None, least)
    every = [found]
    while after is not None:
        found, after = await member.store.bookmarks.page(after, least)
        every.append(found)
    return every


# What it covers.


@pytest.mark.parametrize(
    ("id", "addressees", "covered"),
    [
        ("2", None, True),
        ("5", None, True),
        ("6", None, False),
        ("1", None, False),
        ("2", audience(["ann"]), True),
        ("2", audience(users=["a"]), True),
        ("2", audience(["bob"], ["blue"], ["b"]), False),
        ("3", audience(topics=["red"]), True),
        ("2", audience(topics=["red"]), False),
        ("4", audience(topics=["red"]), False),
        ("4", audience(["ann"], ["red"]), True),
    ],
)
def test_a_bookmark_covers_what_was_for_its_client(id: str, addressees: Audience | None, covered: bool) -> None:
    """Up to its position, since the client came, and for topics only while it followed them."""
    mark = bookmark("5", ("red", "2", "3"), ("", "1", ""), owner=Owner("ann", "a"))
    assert mark.covers(id, addressees) is covered


# Of every store.


def follows(earlier: Sequence[tuple[str, str, str]], later: Sequence[tuple[str, str, str]]) -> list[Bookmark]:
    return [bookmark("5", *earlier), bookmark("8", *later)]


@pytest.mark.parametrize(
    ("earlier", "later", "spans"),
    [
        ([("", "1", "")], [("", "1", "")], [("", "1", "")]),
        ([("", "1", "")], [("", "5", "")], [("", "1", "")]),
        ([("", "3", "")], [("", "1", "")], [("", "1", "")]),
        ([("", "1", "")], [("", "6", "")], [("", "1", "5"), ("", "6", "")]),
        ([("red", "1", ""), ("", "1", "")], [("", "5", "")], [("red", "1", "5"), ("", "1", "")]),
        ([("red", "1", "3"), ("", "1", "")], [("red", "4", "")], [("red", "1", "3"), ("", "1", "5"), ("red", "4", "")]),
        ([("red", "1", "")], [("red", "1", "6"), ("red", "7", "")], [("red", "1", "6"), ("red", "7", "")]),
    ],
)  # fmt: skip
@on_loop
async def test_spans_that_meet_become_one(
    any_store: str,
    earlier: list[tuple[str, str, str]],
    later: list[tuple[str, str, str]],
    spans: list[tuple[str, str, str]],
) -> None:
    """A client that has come back without a gap has never been away."""
    async with members(any_store) as [one]:
        assert await kept(one, *follows(earlier, later)) == bookmark("8", *spans)


@on_loop
async def test_a_bookmark_moves_forward_only(any_store: str) -> None:
    async with members(any_store) as [one]:
        assert await one.store.bookmarks.find(ANN) is None
        assert await kept(one, bookmark("5"), bookmark("3", ("", "9", ""))) == bookmark("5")


@on_loop
async def test_a_user_has_bookmarks_of_its_own(any_store: str) -> None:
    """Somebody else with the client_id neither gets nor moves that of a user."""
    async with members(any_store) as [one]:
        await kept(one, bookmark("5", owner=Owner("ann", "a")))
        assert await one.store.bookmarks.find(ANN) is None
        await kept(one, bookmark("7"))
        assert await one.store.bookmarks.find(Owner("ann", "a")) == bookmark("5", owner=Owner("ann", "a"))


@on_loop
async def test_the_spans_of_a_bookmark_are_bounded(any_store: str) -> None:
    """The oldest go first: the client still speaks for what comes now."""
    async with members(any_store) as [one]:
        gaps = [bookmark(f"{number:03}5", ("", f"{number:03}0", "")) for number in range(MOST_SPANS + 9)]
        found = await kept(one, *gaps)
        assert found is not None
        assert len(found.spans) == MOST_SPANS
        assert found.spans[-1] == Span("", f"{MOST_SPANS + 8}0", "")


@on_loop
async def test_all_are_listed_in_the_order_of_their_owners(any_store: str) -> None:
    """Page by page, each with a bounded number, those from an id on."""
    owners = sorted(Owner(f"c{number % 600:03}", f"{number % 2}") for number in range(PAGE_BOOKMARKS + 100))
    async with members(any_store) as [one]:
        marks = [bookmark(str(place % 3), owner=owner) for place, owner in enumerate(owners)]
        one.store.bookmarks.keep(marks)
        assert await pages(one) == [marks[:PAGE_BOOKMARKS], marks[PAGE_BOOKMARKS:]]
        assert [*chain(*await pages(one, "2"))] == [mark for mark in marks if mark.position >= "2"]


@on_loop
async def test_those_beyond_the_bound_are_said_to_be_lost(any_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go first. An owner without a bookmark may be one of them, and resumes from before everything."""
    monkeypatch.setattr(bookmarks, "KEPT_FOR_EACH_CONNECTION", 10)
    monkeypatch.setattr(bookmarks, "LEAST_KEPT", 10)
    async with members(any_store, max_connections=1) as [one]:
        for number in range(11):
            await kept(one, bookmark("5", owner=Owner(f"c{number}", "")))
        assert await one.store.bookmarks.find(Owner("c0", "")) == Bookmark(Owner("c0", ""), NOWHERE, ())
        assert await one.store.bookmarks.find(Owner("c1", "")) == bookmark("5", owner=Owner("c1", ""))
        assert len([*chain(*await pages(one))]) == 10


@on_loop
async def test_they_are_kept_for_twice_the_history(any_store: str) -> None:
    """So one that was written down once in that time outlives its connection by once."""
    async with members(any_store, history_ttl=0.2) as [one]:
        await kept(one, bookmark("5"))

        async def is_gone() -> bool:
            return await pages(one) == [[]] and await one.store.bookmarks.find(ANN) is None

        await one.eventually(is_gone)


# Of the shared stores.


@on_loop
async def test_they_outlive_all_processes(shared: str) -> None:
    async with members(shared) as [one]:
        one.store.bookmarks.keep([bookmark("5")])
    async with members(shared) as [late]:
        assert await late.store.bookmarks.find(ANN) == bookmark("5")


@on_loop
async def test_the_next_process_of_a_client_finds_its_bookmark(shared: str) -> None:
    """It is there before the client_id is free."""
    async with members(shared, 2) as [one, other]:
        await one.admit("ann")
        for number, (this, next_one) in enumerate(islice(cycle(((one, other), (other, one))), 20)):
            this.store.bookmarks.keep([bookmark(f"{number:02}")])
            this.leave("ann")
            await admit_when_free(next_one, "ann")
            found = await next_one.store.bookmarks.find(ANN)
            assert found is not None
            assert found.position == f"{number:02}"


async def admit_when_free(member: Member, client_id: str) -> None:
    while client_id not in member.clients:
        with suppress(ClientIdTaken):
            await member.admit(client_id)


@on_loop
async def test_a_redis_that_lost_its_data_gets_them_back(redis: RedisServer) -> None:
    """From the processes that have written them down; others may be lost, and an owner without one is told so."""
    async with members(redis.url) as [gone]:
        await kept(gone, bookmark("3", owner=Owner("gone", "")))
        async with members(redis.url) as [one]:
            await kept(one, bookmark("5"), *(bookmark("5", owner=Owner(f"c{number}", "")) for number in range(1000)))
            await gone.store.close()
            redis.empty()
            await one.until(lambda: one.store.failure is not None)
            await one.until(lambda: one.store.failure is None)

            async def is_back() -> bool:
                return await one.store.bookmarks.find(ANN) == bookmark("5")

            # They were put back in parts, the newest first.
            await one.eventually(is_back)
            assert await one.store.bookmarks.find(Owner("gone", "")) == Bookmark(Owner("gone", ""), NOWHERE, ())


def test_the_number_is_in_proportion_to_the_connections() -> None:
    assert bookmarks.bounds(Settings(max_connections=100, history_ttl=60)) == (10_000, 120)
    assert bookmarks.bounds(Settings(max_connections=20_000, history_ttl=60)) == (200_000, 120)
