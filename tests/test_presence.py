"""The clients, users and topics that are there: on one process, on workers, and on servers that share a store."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from signal import SIGCONT, SIGSTOP
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
from bytes import rest
from conftest import EVERY_KIND, StartServer
from credentials import SECRET, bearer, token
from event_stream import join
from expected import TIME, answered, http_error, invalid, parse
from processes import Server, connected, eventually, serving
from virtual import FakeConnection, with_turns

import presence
import slices
from admission import Newcomer
from census import ANSWER_SECONDS
from hub import Hub
from presence import Wanted
from settings import Settings


class Together(NamedTuple):
    """The servers of one store: the last does not know the clients of the first but through it."""

    first: Server
    last: Server


@pytest.fixture(scope="module", params=EVERY_KIND)
def servers(request: pytest.FixtureRequest, start_together: Callable[..., list[Server]]) -> Together:
    started = start_together(request.param)
    return Together(started[0], started[-1])


@pytest.fixture
def together(servers: Together) -> Iterator[Together]:
    yield servers
    # All of them, before the check whether any is still counted.
    for server in servers:
        server.forget_clients()


def pages(server: Server, path: str, key: str) -> list[list[Any]]:
    """Return the items of all pages."""
    found, after = [], ""
    while True:
        answer = server.read(f"{path}&after={after}" if after else path)
        found.append(answer[key])
        if (after := answer["next"]) is None:
            return found


# Clients.


def test_every_client_is_listed_with_its_details(together: Together) -> None:
    """Wherever it is connected, a WebSocket or a stream, in the order of the client_ids."""
    stream = join(together.first, "client_id=b%2F1&user=ann&topics=red,blue", {"User-Agent": "curl"})
    together.last.join("a", user_agent_header=None)
    answer = together.last.read("/clients")
    assert list(answer) == ["clients", "total", "next", "timestamp"]
    assert (answer["total"], answer["next"], answer["timestamp"]) == (2, None, TIME)
    assert answer["clients"] == [
        {
            "client_id": "a",
            "user": None,
            "topics": [],
            "connected_at": TIME,
            "last_ping": TIME,
            "user_agent": None,
            "address": "127.0.0.1",
            "transport": "websocket",
        },
        {
            "client_id": "b/1",
            "user": "ann",
            "topics": ["blue", "red"],
            "connected_at": TIME,
            "last_ping": TIME,
            "user_agent": "curl",
            "address": "127.0.0.1",
            "transport": "sse",
        },
    ]
    for server in together:
        assert server.read("/clients/b%2F1") == answer["clients"][1]
    stream.leave()


@pytest.mark.parametrize("limit", [1, 3, 9, 10, 1000])
def test_pages_have_every_client_once(together: Together, limit: int) -> None:
    """In one order, of all processes, up to `limit` in each."""
    names = sorted(f"c{number}" for number in range(9))
    for number, name in enumerate(names):
        together[number % 2].join(name)
    found = pages(together.last, f"/clients?limit={limit}", "clients")
    assert [client["client_id"] for page in found for client in page] == names
    assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)


def test_pages_leave_out_nobody_who_stays(together: Together) -> None:
    """While others come and go between two pages."""
    staying = [f"s{number}" for number in range(6)]
    for number, name in enumerate(staying):
        together[number % 2].join(name)
    going = together.first.join("s2a")
    first = together.last.read("/clients?limit=3")
    going.leave()
    together.first.join("s0a")
    together.first.join("s9")
    eventually(lambda: together.last.get("/clients/s2a").status_code == 404)
    second = together.last.read(f"/clients?limit=1000&after={first['next']}")
    named = [client["client_id"] for page in (first, second) for client in page["clients"]]
    assert set(staying) <= set(named) and len(named) == len(set(named))


def test_a_filter_chooses_the_clients_and_their_number(together: Together) -> None:
    """By user, by topic, and by both."""
    together.first.join(query="client_id=a&user=ann&topics=red")
    together.last.join(query="client_id=b&user=ann&topics=blue")
    together.last.join(query="client_id=c&user=bob&topics=red")
    together.first.join("d")
    for query, expected in [
        ("user=ann", ["a", "b"]),
        ("topic=red", ["a", "c"]),
        ("topic=%20red%20", ["a", "c"]),
        ("user=ann&topic=red", ["a"]),
        ("user=nobody", []),
        ("user=&topic=", ["a", "b", "c", "d"]),
    ]:
        answer = together.last.read(f"/clients?{query}&limit=1")
        assert answer["total"] == len(expected)
        found = pages(together.last, f"/clients?{query}&limit=1", "clients")
        assert [client["client_id"] for page in found for client in page] == expected


def test_an_unknown_client_is_404(together: Together) -> None:
    assert answered(together.last.get("/clients/nobody")) == (
        404,
        http_error("application", "Client nobody is not connected"),
    )


# Users.


def test_a_user_is_online_while_a_client_is_connected(together: Together) -> None:
    """The number of clients on all processes, 0 for nobody."""
    clients = [server.join(query=f"user={quote('auth0|5f7c')}") for server in together]
    for server in together:
        answer = server.read("/users/auth0%7C5f7c")
        assert answer == {"user": "auth0|5f7c", "online": True, "clients": 2, "timestamp": TIME}
    for client in clients:
        client.leave()
    nobody = {"user": "auth0|5f7c", "online": False, "clients": 0, "timestamp": TIME}
    eventually(lambda: together.last.read("/users/auth0%7C5f7c") == nobody)


def test_many_users_are_asked_for_at_once(together: Together) -> None:
    """Each with the number of its clients, in the order of the question."""
    together.first.join(query="user=ann")
    together.last.join(query="user=ann")
    together.last.join(query="user=J%C3%BCrgen")
    response = together.last.http.post("/users/online", json={"users": ["bob", "Jürgen", "ann", "bob"]})
    assert parse(response.content) == {"online": {"bob": 0, "Jürgen": 1, "ann": 2}, "timestamp": TIME}
    # As many users, with as long names, as may be asked for.
    users = [f"{number:é>255}" for number in range(1000)]
    response = together.last.http.post("/users/online", json={"users": [*users[1:], "ann"]})
    assert parse(response.content)["online"] == dict.fromkeys(users[1:], 0) | {"ann": 2}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "users: required"),
        ({"users": []}, "users: expected array of length >= 1"),
        ({"users": [""]}, "users[0]"),
        ({"users": ["a\n"]}, "users[0]: expected 1 to 255 characters"),
        ({"users": ["a"] * 1001}, "users: expected array of length <= 1000"),
        ({"user": ["a"]}, "user"),
        ([], "expected object"),
    ],
)
def test_a_bad_question_is_refused(server: Server, body: object, said: str) -> None:
    assert answered(server.http.post("/users/online", json=body)) == invalid(said)


# Topics.


def test_topics_are_listed_with_the_number_of_their_clients(together: Together) -> None:
    """Summed over the processes, by name, and by the beginning of a name."""
    together.first.join(query="topics=team.a,team.b,builds")
    together.last.join(query="topics=team.b,%C3%BCber")
    answer = together.last.read("/topics")
    assert list(answer) == ["topics", "next", "timestamp"]
    counted = {"builds": 1, "team.a": 1, "team.b": 2, "über": 1}
    assert answer["topics"] == [{"topic": name, "clients": count} for name, count in counted.items()]
    found = pages(together.last, "/topics?limit=1", "topics")
    assert {topic["topic"]: topic["clients"] for page in found for topic in page} == counted
    found = pages(together.first, "/topics?prefix=team.&limit=1", "topics")
    assert [topic["topic"] for page in found for topic in page] == ["team.a", "team.b"]


def test_a_topic_without_clients_is_not_listed(together: Together) -> None:
    client = together.first.join(query="topics=brief")
    assert together.last.read("/topics")["topics"] != []
    client.leave()
    eventually(lambda: together.last.read("/topics")["topics"] == [])


# What may be asked, and by whom.


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/clients?limit=0", "limit"),
        ("/clients?limit=1001", "limit"),
        ("/clients?after=!", "after"),
        ("/clients?after=_w", "after"),
        ("/clients?user=%0A", "user"),
        ("/clients?topic=a,b", "topic"),
        ("/clients?users=ann", "Unknown parameter: users"),
        ("/clients?topics=a", "Unknown parameter: topics"),
        ("/topics?limit=x", "limit"),
        ("/topics?after=%20", "after"),
        ("/topics?user=ann", "Unknown parameter: user"),
        ("/clients/ann?limit=1", "Unknown parameter: limit"),
        ("/clients/not%20an%20id", "client_id"),
        ("/users/ann?client_id=a", "Unknown parameter: client_id"),
        ("/users/%00", "user: expected 1 to 255 characters"),
        ("/users/%FF", "user: not valid UTF-8"),
        ("/users/%zz", "user: a % without two hex digits"),
        (f"/users/{'a' * 256}", "user: expected 1 to 255 characters"),
    ],
)
def test_a_mistake_is_named(server: Server, path: str, said: str) -> None:
    assert answered(server.get(path)) == invalid(said)


@pytest.mark.parametrize(
    "path", ["/clients/", "/users/", "/users/ann/", "/users/ann/topics/", "/clients/a/b", "/users/ann/x", "/users//a"]
)
def test_other_paths_are_404(server: Server, path: str) -> None:
    assert server.get(path).status_code == 404


def raw_get(server: Server, target: str) -> Any:
    """GET a target as it is: clients leave out dots."""
    status, _, body = server.response_to(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert status == 200, body
    return parse(body)


@pytest.mark.parametrize(
    ("segment", "user"),
    [
        ("a%2Fb", "a/b"),
        ("a%2Ftopics", "a/topics"),
        ("%2F", "/"),
        ("a%252Fb", "a%2Fb"),
        ("a+b@example.com", "a+b@example.com"),
        ("a%3Fb%23c", "a?b#c"),
        ("J%C3%BCrgen%20%F0%9F%9A%80", "Jürgen 🚀"),
        ("%2E", "."),
        ("%2e%2e", ".."),
        ("..", ".."),
        ("online", "online"),
        ("%6Fnline", "online"),
        ("%20", " "),
    ],
)
def test_a_user_in_a_path_is_one_segment(server: Server, segment: str, user: str) -> None:
    """A slash is %2F, and any other character may be encoded too."""
    server.join(query=f"user={quote(user, safe='')}")
    answer = raw_get(server, f"/users/{segment}")
    assert (answer["user"], answer["clients"]) == (user, 1)


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/clients", "GET, HEAD, OPTIONS"),
        ("/clients/ann", "GET, DELETE, HEAD, OPTIONS"),
        ("/users/ann", "GET, DELETE, HEAD, OPTIONS"),
        ("/users/ann/topics", "POST, OPTIONS"),
        ("/users/online", "POST, OPTIONS"),
        ("/topics", "GET, HEAD, OPTIONS"),
    ],
)
def test_methods_are_as_elsewhere(server: Server, path: str, allow: str) -> None:
    """HEAD where GET is; OPTIONS tells the methods, and every other is 405 with them."""
    assert server.request("OPTIONS", path).headers["Allow"] == allow
    assert server.request("PATCH", path).status_code == 405
    if "GET" in allow:
        got, head = server.get(path), server.request("HEAD", path)
        assert (head.status_code, head.content) == (got.status_code, b"")


PATHS = ["/clients", "/clients/a", "/users/ann", "/topics"]


@pytest.mark.parametrize("path", PATHS)
def test_only_an_admin_may_look(start_server: StartServer, path: str) -> None:
    server = start_server("--jwt-secret", SECRET, "--api-key", "ci:a-key")
    for shown, status in [
        ({}, 401),
        (bearer(token(sub="ann")), 403),
        (bearer(token(sub="ann", publish=True)), 403),
        (bearer(token(sub="ann", admin=True)), 404 if path == "/clients/a" else 200),
        ({"X-API-Key": "a-key"}, 404 if path == "/clients/a" else 200),
    ]:
        assert server.get(path, headers=shown).status_code == status
    assert server.http.post("/users/online", json={"users": ["a"]}, headers=bearer(token())).status_code == 403


# Processes that stand still, and long lists.


@pytest.mark.parametrize(("patience", "status"), [(10.0, 200), (0.5, 503)])
def test_a_process_that_stands_still_leaves_no_gap(start_server: StartServer, patience: float, status: int) -> None:
    """A page waits for its clients, or is refused: each process lives for a while without a sign of life."""
    server = start_server("--workers", "2", constants={"census.EVERYONE_SECONDS": patience})
    for number in range(12):
        server.join(f"c{number}")
    connection, asked = connected(server)
    [other] = set(serving(server)) - {asked}
    os.kill(other, SIGSTOP)
    wake = threading.Timer(ANSWER_SECONDS + 0.5, os.kill, (other, SIGCONT))
    wake.start()
    connection.sendall(b"GET /clients HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    head, _, body = rest(connection).partition(b"\r\n\r\n")
    wake.join()
    assert int(head.split()[1]) == status
    if status == 200:
        assert (parse(body)["total"], len(parse(body)["clients"])) == (12, 12)


def test_a_part_that_is_too_long_shortens_the_page(start_server: StartServer) -> None:
    """And no client behind it is left out, of whichever process."""
    server = start_server("--workers", "2", constants={"presence.PART_BYTES": 1500})
    names = [f"c{number:02}" for number in range(20)]
    for name in names:
        server.join(query=f"client_id={name}&topics={name * 40}")
    found = pages(server, "/clients?limit=1000", "clients")
    assert [client["client_id"] for page in found for client in page] == names
    assert len(found) > 3


@pytest.mark.parametrize(
    "ask",
    [
        lambda hub: hub.presence.clients(Wanted(), "", 10),
        lambda hub: hub.presence.clients(Wanted(user="ann", topic="all"), "c", 10),
        lambda hub: hub.presence.topics("t", "t1", 10),
    ],
)
def test_long_lists_are_looked_through_in_portions(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[Hub], Awaitable[Any]]
) -> None:
    """Others have their turn meanwhile, however many are connected."""
    monkeypatch.setattr(slices, "SLICE_SECONDS", 0)
    monkeypatch.setattr(presence, "PORTION", 10)
    hub = Hub(Settings())

    async def listed() -> tuple[int, int]:
        async with hub:
            for number in range(500):
                await hub.admit(FakeConnection(), Newcomer(f"c{number}", topics=[f"t{number}", "all"], user="ann"))
            (found, *_), turns = await with_turns(ask(hub))
            return len(found), turns

    found, turns = asyncio.run(listed())
    assert found == 10 and turns > 50


# The topics of a user.


def change(server: Server, user: str, **body: object) -> Any:
    return server.http.post(f"/users/{quote(user, safe='')}/topics", json=body)


def test_an_admin_changes_the_topics_of_a_user(together: Together) -> None:
    """Of all clients that the user has now, on every process; each hears it, a stream by an event."""
    streams = [join(server, "user=a%2Fb&topics=old") for server in together]
    clients = [server.join(query="user=a%2Fb&topics=own") for server in together]
    other = together.first.join(query="user=b")
    changed = change(together.last, "a/b", subscribe=["new", " builds "], unsubscribe=["old"])
    assert answered(changed) == (200, {"status": "success", "clients": 4, "timestamp": TIME})
    for client in clients:
        assert client.receive() == {"type": "subscribed", "topics": ["builds", "new", "own"], "timestamp": TIME}
    for stream in streams:
        event = stream.event()
        assert (event.name, event.id, event.data["topics"]) == ("subscribed", None, ["builds", "new"])
    assert together.last.notify("for new", topics=["new"])["recipients"] == 4
    assert together.last.notify("for old", topics=["old"])["recipients"] == 0
    assert [client.receive()["data"]["message"] for client in clients] == ["for new"] * 2
    assert [stream.event().data["data"]["message"] for stream in streams] == ["for new"] * 2
    assert other.ask({"type": "ping"})["type"] == "pong"
    for stream in streams:
        stream.leave()


def test_an_absent_user_has_no_topics_to_change(server: Server) -> None:
    assert answered(change(server, "nobody", subscribe=["a"])) == (
        200,
        {"status": "success", "clients": 0, "timestamp": TIME},
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "subscribe: expected a topic here or in unsubscribe"),
        ({"subscribe": [], "unsubscribe": []}, "subscribe: expected a topic here or in unsubscribe"),
        ({"subscribe": ["a,b"]}, "subscribe[0]"),
        ({"unsubscribe": [""]}, "unsubscribe[0]"),
        ({"subscribe": [str(number) for number in range(101)]}, "subscribe: expected array of length <= 100"),
        ({"topics": ["a"]}, "topics: unknown field"),
    ],
)
def test_a_bad_change_is_refused(server: Server, body: dict[str, object], said: str) -> None:
    assert answered(change(server, "ann", **body)) == invalid(said)


def test_no_client_gets_too_many_topics(together: Together) -> None:
    """Then nothing is changed, for none of the user's clients."""
    few = together.first.join(query="user=ann&topics=few")
    together.last.join(query=f"user=ann&topics={','.join(map(str, range(99)))}")
    said = "subscribe: at most 100 topics a client, and this would make 101"
    assert answered(change(together.last, "ann", subscribe=["a", "b"])) == invalid(said)
    assert few.ask({"type": "subscribe", "topics": ["c"]})["topics"] == ["c", "few"]
    assert change(together.last, "ann", subscribe=["a", "b"], unsubscribe=["1"]).json()["clients"] == 2


def test_a_change_takes_its_turn_among_the_clients_own(together: Together) -> None:
    """However they meet, the topics at the end are those of all of them."""
    client = together.first.join(query="user=ann")
    for number in range(20):
        client.send({"type": "subscribe", "topics": [f"own{number}"]})
        assert change(together.last, "ann", subscribe=[f"set{number}"]).status_code == 200
    topics = [client.receive()["topics"] for _ in range(40)][-1]
    assert topics == sorted(f"{kind}{number}" for kind in ("own", "set") for number in range(20))
    assert together.last.read("/clients?user=ann")["clients"][0]["topics"] == topics


def test_topics_that_an_admin_has_set_outlive_a_renewal(start_server: StartServer) -> None:
    """The token need not allow them, now or later."""
    server = start_server("--jwt-secret", SECRET, "--api-key", "ci:a-key")
    client = server.join(additional_headers=bearer(token(sub="ann", topics=["own"])), query="topics=own")
    server.http.headers["X-API-Key"] = "a-key"
    assert change(server, "ann", subscribe=["set"]).status_code == 200
    assert client.receive()["topics"] == ["own", "set"]
    assert client.ask({"type": "auth", "token": token(sub="ann")})["type"] == "authenticated"
    assert client.receive()["topics"] == ["set"]
