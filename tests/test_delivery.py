"""Who got a notification: the counts of all processes, the lists of clients, and publishers that wait for them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import socket
from typing import Any

import pytest
from bytes import read_until
from conftest import EVERY_KIND, StartServer
from credentials import SECRET, bearer, token
from expected import parse
from processes import Server, eventually
from ws_clients import Client

from log import Entry, Log
from routes import MAX_WAIT_SECONDS
from store import Counts
from tally import PARTS_NOTED, Tally

KEY = "tests:the-key-of-these-tests"

# Far more than a socket and a transport take of a client that does not read.
LARGE = "x" * 8000
FLOOD, SMALL_BUFFER = 1000, 16_384


def publish(server: Server, **fields: Any) -> str:
    """Publish, and return the id."""
    answered = server.http.post("/notify", json={"message": "hello", **fields})
    assert answered.status_code == 200, answered.text
    return str(answered.headers["notification-id"])


def delivery(server: Server, id: str) -> list[int]:
    """Return addressed, written, acknowledged and pending."""
    return list(server.http.get(f"/notifications/{id}").json()["delivery"].values())


def listed(server: Server, id: str, state: str) -> list[str]:
    page = server.http.get(f"/notifications/{id}/clients?state={state}").json()
    return [client["client_id"] for client in page["clients"]]


@pytest.fixture(scope="module", params=EVERY_KIND)
def servers(request: pytest.FixtureRequest, start_together: Callable[..., list[Server]]) -> list[Server]:
    return start_together(request.param, "--history-size", "100000")


def test_every_process_counts_the_clients_of_all(servers: list[Server]) -> None:
    """At once, by topic and by name, by a resume, and after a client has left."""
    first, last = servers[0], servers[-1]
    clients = [
        (first, last)[number % 2].join(query=f"client_id=c{number}" + "&topics=red" * (number < 3))
        for number in range(6)
    ]
    everyone, red, one = publish(first), publish(last, topics=["red"]), publish(last, clients=["c5", "nobody"])
    for client, count in zip(clients, (2, 2, 2, 1, 1, 2), strict=True):
        client.receive_many(count)
    for server in servers:
        assert [delivery(server, id) for id in (everyone, red, one)] == [[6, 6, 0, 0], [3, 3, 0, 0], [1, 1, 0, 0]]
        assert [listed(server, id, "written") for id in (red, one)] == [["c0", "c1", "c2"], ["c5"]]
        assert listed(server, everyone, "pending") == []
    late = last.join(query=f"client_id=late&since={everyone}&topics=red")
    assert [one.get("id") for one in late.receive_many(2)] == [None, red]
    again = first.join(query="client_id=again&since=00000000-0000-0000-0000-000000000000")
    assert again.receive()["data"]["replayed"] == 1
    again.receive()
    clients[0].leave()
    eventually(lambda: first.get("/health").json()["connections"]["active"] == 7)
    for server in servers:
        assert [delivery(server, id) for id in (everyone, red, one)] == [[6, 7, 0, 0], [3, 4, 0, 0], [1, 1, 0, 0]]
        assert listed(server, red, "written") == ["c1", "c2", "late"]
    for client in (*clients, late, again):
        client.leave()
    eventually(lambda: first.get("/health").json()["connections"]["active"] == 0)


def test_a_client_that_does_not_read_is_pending_and_a_publisher_waits_for_it(servers: list[Server]) -> None:
    """Whichever process has it; `written` counts it as soon as the server has handed it over."""
    first, last = servers[0], servers[-1]
    reading = first.join("reads")
    stalled = last.join_bare("stalled")
    for _ in range(FLOOD // 100):
        batch = [{"message": LARGE} for _ in range(100)]
        first.http.post("/notify/batch", json=batch).raise_for_status()
    began = time.monotonic()
    answered = first.http.post("/notify", json={"message": "last"}, headers={"Prefer": "wait=1"})
    assert time.monotonic() - began >= 1
    assert answered.headers["preference-applied"] == "wait=1"
    id = answered.headers["notification-id"]
    assert answered.json()["delivery"] == {"addressed": 2, "written": 1, "acknowledged": 0, "pending": 1}
    assert list(answered.json())[-1] == "delivery"
    for server in servers:
        assert (listed(server, id, "pending"), listed(server, id, "written")) == (["stalled"], ["reads"])
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(first.http.post, "/notify", json={"message": "hi"}, headers={"Prefer": "wait=30"})
        # Reads everything that it is owed.
        read_until(stalled.socket, b'"message":"hi"')
        assert waits.result().json()["delivery"] == {"addressed": 2, "written": 2, "acknowledged": 0, "pending": 0}
    assert delivery(last, id) == [2, 2, 0, 0]
    stalled.socket.close()
    reading.leave()
    eventually(lambda: first.get("/health").json()["connections"]["active"] == 0)


def test_a_client_that_is_replayed_a_topic_is_listed(servers: list[Server]) -> None:
    """Though the notification is older than its connection."""
    first, last = servers[0], servers[-1]
    start, id = publish(first), publish(first, topics=["dusk"])
    client = last.join("follower")
    client.send({"type": "subscribe", "topics": ["dusk"], "since": start})
    eventually(lambda: delivery(first, id) == [0, 1, 0, 0])
    for server in servers:
        assert listed(server, id, "written") == ["follower"]
    client.leave()
    eventually(lambda: first.get("/health").json()["connections"]["active"] == 0)


def test_acknowledgements_count_for_as_much_as_was_handed_over(servers: list[Server]) -> None:
    """Up to the id, also of a client that has left, and of one whose client_id the server has made up."""
    first, last = servers[0], servers[-1]
    ids = [publish(first)]
    named, nameless = last.join(query="client_id=named&user=ann&topics=red"), first.join()
    ids += [publish(first), publish(last, topics=["red"]), publish(last)]
    named.receive_many(3)
    nameless.receive_many(2)
    named.send({"type": "ack", "id": ids[2]})
    nameless.send({"type": "ack", "id": ids[3]})
    # Each answer comes behind the acknowledgement.
    for client in (named, nameless):
        assert client.ask({"type": "status_request"})["type"] == "status_response"
    for server in servers:
        assert [delivery(server, id)[2] for id in ids] == [0, 2, 1, 1]
        assert listed(server, ids[2], "acknowledged") == ["named"]
        assert len(listed(server, ids[1], "acknowledged")) == len(listed(server, ids[1], "written")) == 2
    named.leave()
    nameless.leave()
    eventually(lambda: first.get("/health").json()["connections"]["active"] == 0)
    for server in servers:
        assert [delivery(server, id) for id in ids] == [[0, 0, 0, 0], [2, 2, 1, 0], [1, 1, 1, 0], [2, 2, 0, 0]]
        assert listed(server, ids[1], "written") == listed(server, ids[1], "acknowledged") == ["named"]


def test_an_id_that_the_log_does_not_have_is_404(servers: list[Server]) -> None:
    """However it looks."""
    for id in ("550e8400-e29b-41d4-a716-446655440000", "x", "%2F", "..%2f"):
        for path in (f"/notifications/{id}", f"/notifications/{id}/clients"):
            assert servers[0].http.get(path).status_code == 404, path


def test_the_list_of_clients_has_pages(servers: list[Server]) -> None:
    """In the order of the names, each client once; every process has the same."""
    clients = [servers[number % len(servers)].join(query=f"client_id=p{number}&user=ann") for number in range(7)]
    id, found, after = publish(servers[0]), list[str](), ""
    for client in clients:
        client.receive()
    while after is not None:
        page = servers[-1].http.get(f"/notifications/{id}/clients?limit=3&after={after}").json()
        found += [client["client_id"] for client in page["clients"]]
        assert all(client["user"] == "ann" for client in page["clients"])
        after = page["next"]
    assert found == [f"p{number}" for number in range(7)]
    for client in clients:
        client.leave()
    eventually(lambda: servers[0].get("/health").json()["connections"]["active"] == 0)


def test_test_and_system_notifications_are_counted_too(start_server: StartServer, tmp_path: Path) -> None:
    """The system notification of a drain is asked for at a server that goes on."""
    store = f"sqlite:{tmp_path / 'log.db'}"
    stays = start_server("--store", store, "--notification-interval", "1")
    leaves = start_server("--store", store, "--notification-interval", "1", "--drain-rate", "1000")
    clients: list[Client] = [leaves.join("ann"), leaves.join("bob"), stays.join("cat")]
    test = clients[0].receive()
    assert test["type"] == "test_notification"
    eventually(lambda: delivery(stays, test["id"])[1] == delivery(stays, test["id"])[0])
    leaves.drain()
    system = next(one for one in iter(clients[0].receive, None) if one["type"] == "system")
    assert delivery(stays, system["id"]) == [2, 2, 0, 0]
    for client in clients[:2]:
        client.leave()
    leaves.stop()
    # Counted in the store by now.
    assert delivery(stays, system["id"]) == [2, 2, 0, 0]
    clients[2].leave()


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_counts_outlive_the_memory_and_the_process(
    kind: str, start_together: Callable[..., list[Server]], start_server: StartServer
) -> None:
    """They go to the store before the notification leaves the memory; a client that reads the store counts as well."""
    servers = start_together(kind, "--cache-bytes", "20000", "--history-size", "100000")
    first, last = servers
    ann, bob = first.join("ann"), last.join(query="client_id=bob&topics=red")
    everyone, red = publish(first), publish(first, topics=["red"])
    for _ in range(10):
        first.http.post("/notify/batch", json=[{"message": "x"} for _ in range(100)]).raise_for_status()
    ann.receive_many(1001)
    bob.receive_many(1002)
    assert [delivery(last, id) for id in (everyone, red)] == [[2, 2, 0, 0], [1, 1, 0, 0]]
    late = last.join(query="client_id=late&since=00000000-0000-0000-0000-000000000000&topics=red")
    assert late.receive()["data"]["replayed"] == 1002
    late.receive_many(1002)
    assert [delivery(first, id) for id in (everyone, red)] == [[2, 3, 0, 0], [1, 2, 0, 0]]
    assert listed(first, red, "written") == ["bob", "late"]
    for client in (ann, bob, late):
        client.leave()
    last.stop()
    assert [delivery(first, id) for id in (everyone, red)] == [[2, 3, 0, 0], [1, 2, 0, 0]]


def test_counts_are_handed_in_in_parts_and_kept_until_then() -> None:
    """Readers that are handed the same are counted together; what the store has not been told of is not lost."""
    tally = Tally(Log(10, 1000, 1.0), is_stored=True)
    entries = [Entry(-1, str(number), b"", 0, 0.0, True, None) for number in range(PARTS_NOTED + 2)]
    shared = [(entry, 1) for entry in entries]
    tally.read(shared, ("a", "b"))
    for entry in entries:
        tally.read([(entry, 2)], None)
        tally.read(shared, None)
    counts = tally.take()
    each = len(entries) + 3
    assert counts == Counts({"a": 1, "b": -1}, {entry.id: each for entry in entries}, {})
    parts = counts.parts(2)
    assert [next(parts), next(parts)] == [Counts(counts.steps, {}, {}), Counts({}, {"0": each, "1": each}, {})]
    tally.read([(entries[0], 1), (entries[-1], 1)], None)
    for part in parts:
        tally.put_back(part)
    rest = {entry.id: each for entry in entries[2:]}
    assert tally.take() == Counts({}, rest | {"0": 1, entries[-1].id: each + 1}, {})
    assert not any(tally.take())


@pytest.mark.slow
def test_a_process_that_is_killed_loses_no_count_that_it_has_handed_in(
    start_together: Callable[..., list[Server]],
) -> None:
    """Whoever asks meanwhile waits until its lease is over."""
    first, last = start_together("sqlite")
    ann, bob = first.join("ann"), last.join("bob")
    id = publish(first)
    ann.receive()
    bob.receive()
    assert delivery(first, id) == [2, 2, 0, 0]
    last.kill()
    assert delivery(first, id) == [2, 2, 0, 0]
    assert listed(first, id, "written") == ["ann"]
    ann.leave()


# --- the wait of a publisher


@pytest.mark.parametrize(
    ("header", "applied"),
    [
        ("wait=5", "wait=5"),
        ('Wait = "7"', "wait=7"),
        ("respond-async, wait=5; foo=bar", "wait=5"),
        ("wait=500", f"wait={MAX_WAIT_SECONDS}"),
        ("wait=0", "wait=0"),
        ("wait=5, wait=6", "wait=5"),
        ('foo="a, wait=5"', None),
        ("wait", None),
        ("wait=-1", None),
        ("wait=soon", None),
        ("waiting=5", None),
    ],
)
def test_a_preference_is_read_as_the_rfc_has_it(server: Server, header: str, applied: str | None) -> None:
    """RFC 7240, section 2: the first one counts, and one that cannot be understood is ignored."""
    answered = server.http.post("/notify", json={"message": "hi"}, headers={"Prefer": header})
    assert answered.headers.get("preference-applied") == applied
    assert ("delivery" in answered.json()) is (applied is not None)


def test_a_repeated_request_waits_each_time(server: Server) -> None:
    """A head that repeats is answered from its body alone, but for one that asks to wait."""
    client = server.join("ann")
    for _ in range(5):
        answered = server.http.post("/notify", json={"message": "hi"}, headers={"Prefer": "wait=5"})
        assert answered.json()["delivery"]["written"] == 1
        client.receive()


def test_a_publisher_that_hangs_up_waits_no_longer(start_server: StartServer) -> None:
    """Its place is free again, and so is one that the drain has answered."""
    server = start_server("--history-size", "100000", constants={"delivery.MAX_WAITING": 1})
    server.join_bare("stalled", receive_buffer=SMALL_BUFFER)
    for _ in range(FLOOD // 100):
        server.http.post("/notify/batch", json=[{"message": LARGE} for _ in range(100)]).raise_for_status()

    def published() -> int:
        return int(server.get("/status").json()["notification_service"]["notifications_sent"])

    def is_applied() -> bool:
        answered = server.http.post("/notify", json={"message": "hi"}, headers={"Prefer": "wait=0"})
        return "preference-applied" in answered.headers

    body = json.dumps({"message": "hi"}).encode()
    head = b"POST /notify HTTP/1.1\r\nHost: x\r\nPrefer: wait=60\r\nContent-Length: %d\r\n\r\n" % len(body)

    def begin_to_wait() -> socket:
        count = published()
        publisher = server.raw(head + body)
        eventually(lambda: published() > count)
        assert not is_applied()
        return publisher

    begin_to_wait().close()
    eventually(is_applied)
    publisher = begin_to_wait()
    server.drain()
    answered = read_until(publisher, b'"pending":1}}')
    assert b"HTTP/1.1 200" in answered and b"preference-applied: wait=60" in answered
    publisher.close()


# --- rights


def test_who_may_publish_a_notification_may_ask_for_its_delivery(start_server: StartServer) -> None:
    """An admin for each; others by the topics that they may publish to."""
    server = start_server("--jwt-secret", SECRET, "--api-key", KEY)

    def status(path: str, **claims: Any) -> int:
        headers = bearer(token(**claims)) if claims else {}
        return int(server.http.get(path, headers=headers).status_code)

    ids = {}
    for name, fields in {"all": {}, "red": {"topics": ["red"]}, "ann": {"clients": ["ann"], "topics": ["red"]}}.items():
        answered = server.http.post("/notify", json={"message": "hi", **fields}, headers=bearer(KEY))
        ids[name] = answered.headers["notification-id"]
    for path in ("", "/clients"):
        statuses = {
            name: [
                status(f"/notifications/{id}{path}", **claims)
                for claims in ({"admin": True}, {"publish": True}, {"publish": ["red"]}, {"sub": "ann"})
            ]
            for name, id in ids.items()
        }
        assert statuses == {"all": [200, 200, 403, 403], "red": [200, 200, 200, 403], "ann": [200, 200, 403, 403]}
        assert status(f"/notifications/{ids['red']}{path}") == 401
    assert parse(server.http.get("/notifications/x", headers=bearer(token(publish=True))).content)["error"]["message"]
