"""A log larger than memory: readers, slow consumers and the history go on in the store where the memory ends."""

from __future__ import annotations

import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import StartServer
from expected import parse
from processes import QUIET, Server, eventually
from redis_server import RedisServer
from ws_clients import Client

# About a hundred notifications in memory, of 1,000 or more.
SMALL = ("--cache-bytes", "50000", "--history-size", "100000")
COUNT = 3000


@pytest.fixture(params=["sqlite", "redis"])
def flags(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ...]:
    """The flags of a server with a small cache on a store of its own."""
    if request.param == "sqlite":
        return *SMALL, "--store", f"sqlite:{tmp_path}/log.db"
    redis: RedisServer = request.getfixturevalue("redis")
    # A server of an earlier test may still be stopping.
    return *SMALL, "--store", redis.url, "--store-prefix", f"{tmp_path.name}:"


def fill(server: Server, count: int = COUNT, **fields: Any) -> list[str]:
    """Publish 0 to `count`, and return their ids."""
    ids = []
    for first in range(0, count, 200):
        batch = [{"message": str(number), **fields} for number in range(first, min(first + 200, count))]
        ids += [one["id"] for one in server.http.post("/notify/batch", json=batch).json()["notifications"]]
    return ids


def resumed(server: Server, since: str, query: str = "") -> tuple[dict[str, Any], list[str], Client]:
    """Resume; return the data of the `resume`, the replayed messages, and the client."""
    client = server.join(query=f"since={since}{query}")
    data = client.receive()["data"]
    return data, [one["data"]["message"] for one in client.receive_many(data["replayed"])], client


def in_memory(server: Server) -> int:
    found = re.search(r"^notifyd_log_notifications (\d+)$", server.get("/metrics/prometheus").text, re.MULTILINE)
    assert found
    return int(found[1])


def test_a_client_resumes_from_before_the_memory_and_passes_into_it(
    start_server: StartServer, flags: tuple[str, ...]
) -> None:
    """Everything comes once and in order, also what is published during the replay."""
    server = start_server(*flags)
    first, *_, last = fill(server)
    eventually(lambda: in_memory(server) < COUNT // 10)
    client = server.join(query=f"since={first}")
    server.publish(*map(str, range(COUNT, COUNT + 50)))
    assert client.receive()["data"] == {"position": last, "replayed": COUNT - 1, "complete": True}
    messages = [one["data"]["message"] for one in client.receive_many(COUNT + 49)]
    assert messages == [str(number) for number in range(1, COUNT + 50)]


def test_a_reader_gets_its_own_and_those_for_everyone_in_one_order(
    start_server: StartServer, flags: tuple[str, ...]
) -> None:
    """Notifications for others are left out, and none counts twice that is for two of its names."""
    server = start_server(*flags)
    [start] = server.publish("start")
    expected = []
    for round in range(3):
        fill(server, 1000, topics=["blue"])
        for fields in ({}, {"clients": ["ann"]}, {"topics": ["red"]}, {"clients": ["ann"], "topics": ["red", "blue"]}):
            server.publish(f"{round} {fields}", **fields)
            expected.append(f"{round} {fields}")
    data, replayed, _ = resumed(server, start, "&client_id=ann&topics=red")
    assert (data["complete"], replayed) == (True, expected)


def test_a_reader_may_leave_while_it_gives_way_to_a_publish(tmp_path: Path) -> None:
    """Before its page is read; the readers after it are served as ever."""
    store = ("--store", f"sqlite:{tmp_path}/log.db")
    server = Server.notifyd(*QUIET, *SMALL, *store, constants={"readers.GIVE_WAY_SECONDS": 0.1})
    try:
        first, *_ = fill(server)
        with ThreadPoolExecutor(1) as pool:
            publishing = pool.submit(fill, server, 20_000)
            for _ in range(10):
                server.join(query=f"since={first}").connection.socket.close()
            publishing.result()
        assert resumed(server, first)[0]["replayed"] == COUNT - 1 + 20_000
        assert "failed" not in "".join(server.stderr)
    finally:
        server.stop()


def test_readers_wait_while_the_store_has_many_counts_to_hear_of(tmp_path: Path) -> None:
    """So a reader of a topic, with a count for each notification, takes no memory in proportion to the log."""
    path = tmp_path / "log.db"
    # Only a reader that waits has them told in this time.
    constants = {"census.REPORT_SECONDS": 1000.0, "delivery.UNTOLD_COUNTS": 500.0}
    server = Server.notifyd(*QUIET, *SMALL, "--store", f"sqlite:{path}", constants=constants)
    try:
        first, *_ = fill(server, topics=["blue"])
        assert resumed(server, first, "&topics=blue")[0]["replayed"] == COUNT - 1
        with closing(sqlite3.connect(path)) as file:
            eventually(lambda: file.execute("SELECT count(*) FROM counted").fetchone()[0] > COUNT // 2)
    finally:
        server.stop()


def test_a_subscription_replays_from_before_the_memory(start_server: StartServer, flags: tuple[str, ...]) -> None:
    """Nothing comes twice that came in person, and live notifications follow the replay."""
    server = start_server(*flags)
    [start] = server.publish("start")
    client = server.join("ann")
    server.publish("both", clients=["ann"], topics=["red"])
    fill(server, 1000, topics=["red"])
    fill(server, 500, topics=["blue"])
    assert client.receive()["data"]["message"] == "both"
    client.send({"type": "subscribe", "topics": ["red"], "since": start})
    assert client.receive()["type"] == "subscribed"
    assert client.receive()["data"]["replayed"] == 1000
    server.publish("live", topics=["red"])
    messages = [one["data"]["message"] for one in client.receive_many(1001)]
    assert messages == [*map(str, range(1000)), "live"]


def test_a_slow_consumer_goes_on_from_the_store(start_server: StartServer, flags: tuple[str, ...]) -> None:
    """It is not closed, and when it reads on it has missed nothing."""
    server = start_server(*flags)
    slow = server.join_bare(receive_buffer=4096)
    pad = {"pad": "x" * 4000}
    ids = fill(server, COUNT, data=pad)
    eventually(lambda: in_memory(server) < 100)
    assert server.active() == 1
    messages = [slow.receive()["data"]["message"] for _ in range(COUNT)]
    assert messages == [str(number) for number in range(len(ids))]
    server.publish("live")
    assert slow.receive()["data"]["message"] == "live"


def test_a_slow_consumer_is_closed_when_the_log_has_let_go_of_its_own(
    start_server: StartServer, flags: tuple[str, ...]
) -> None:
    """The close has the id to resume from, directly behind the last one that it received."""
    server = start_server(*flags, "--history-size", "2000")
    slow = server.join_bare(receive_buffer=4096)
    ids: list[str] = []
    while server.active():
        ids += fill(server, 500, data={"pad": "x" * 4000})
    received = [one["id"] for one in slow.rest()]
    code, reason = slow.closed()
    named = re.fullmatch(r"Slow consumer: (\d+) notifications behind; resume with since=(\S+)", str(reason))
    assert code == 1008 and named and received == ids[: len(received)]
    # More was published after its end.
    assert 2000 < int(named[1]) <= len(ids) - len(received)
    assert named[2] == received[-1]


def history(server: Server, **parameters: Any) -> Any:
    return parse(server.get("/notifications", params=parameters).content)


def test_the_history_has_pages_over_the_whole_log(start_server: StartServer, flags: tuple[str, ...]) -> None:
    """In both orders, between any two ids, and for a new process that has read little of it."""
    server = start_server(*flags)
    ids = fill(server)
    for url in (server, start_server(*flags)):
        found: list[str] = []
        position = ids[0]
        while page := history(url, since=position, limit=700)["notifications"]:
            found += [one["id"] for one in page]
            position = found[-1]
        assert found == ids[1:]
        found, position = [], ""
        while page := history(url, before=position, since=ids[9], limit=700, order="desc")["notifications"]:
            found += [one["id"] for one in page]
            position = found[-1]
        assert found == ids[:9:-1]
        between = history(url, since=ids[100], before=ids[104])
        assert [one["id"] for one in between["notifications"]] == ids[101:104]
        assert (between["position"], between["complete"]) == (ids[104], True)


@pytest.mark.parametrize("bound", [("--history-bytes", "200000"), ("--history-ttl", "3")])
def test_the_whole_log_has_bounds_beyond_the_memory(
    start_server: StartServer, flags: tuple[str, ...], bound: tuple[str, ...]
) -> None:
    """By bytes and by age: memory has a part of it, a resume from before its front is not complete."""
    server = start_server(*flags, *bound)
    ids = fill(server)

    def first() -> str:
        page = history(server, limit=1)["notifications"]
        return page[0]["id"] if page else ""

    if bound[0] == "--history-bytes":
        # Each has between 100 and 200 bytes.
        kept = COUNT - ids.index(first())
        eventually(lambda: in_memory(server) < 200)
        assert 1000 <= kept <= 2000
    else:
        eventually(lambda: first() == "")
        kept = 0
    data, replayed, _ = resumed(server, ids[0])
    assert (data["complete"], replayed) == (False, [str(number) for number in range(COUNT - kept, COUNT)])
