"""The end of a stream, and its refusal: a browser's EventSource lives on, unless it must stay away."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import httpx
import pytest
from conftest import StartServer
from credentials import SECRET, token
from cryptography.hazmat.primitives.asymmetric import ec
from event_stream import REPLACED, Stream, closed, join
from processes import Server, eventually, free_port
from redis_server import RedisServer

BROWSER = {"Accept": "text/event-stream"}


def refused(server: Server, query: str = "", accept: str = "text/event-stream", **headers: str) -> Stream:
    """Ask for a stream as a browser does."""
    return Stream(server, query, {"Accept": accept, **headers})


@pytest.fixture(scope="module")
def full() -> Iterator[Server]:
    """A server with a client too many."""
    server = Server.notifyd("--notification-interval", "0", "--ping-interval", "0", "--max-connections", "1")
    server.join("ann")
    yield server
    server.stop()


@pytest.fixture
def taken(full: Server) -> Server:
    if not full.active():
        full.join("ann")
    return full


# Where coming back helps.


def test_the_limit_ends_the_stream_of_a_browser(taken: Server) -> None:
    """200 with the wait, an event with code and reason, and the end."""
    stream = refused(taken)
    assert stream.response.status == 200
    assert stream.response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert stream.response.headers["Cache-Control"] == "no-store, no-transform"
    assert stream.rest() == [closed(1008, "Connection limit exceeded: 1/1")]
    assert 3000 <= (stream.retry or 0) <= 6000


def test_the_wait_differs_from_browser_to_browser(taken: Server) -> None:
    """A fleet that was refused does not return in one wave."""
    waits = set()
    for _ in range(10):
        stream = refused(taken)
        stream.rest()
        waits.add(stream.retry)
    assert len(waits) > 5


@pytest.mark.parametrize(
    "accept",
    [
        *("text/event-stream", "Text/Event-Stream;q=0.9", "application/json, text/event-stream"),
        *("text/html;q=0,text/event-stream;q=0.001", "text/event-stream, text/html;q=0"),
    ],
)
def test_a_browser_is_known_by_the_type_that_it_accepts(taken: Server, accept: str) -> None:
    """Anywhere in the list, with parameters and in any case."""
    assert refused(taken, accept=accept).response.status == 200


@pytest.mark.parametrize(
    "accept",
    [
        *("*/*", "text/*", "text/html", "", "text/event-stream;q=0", "text/html, text/event-stream ; x=y; Q=0.00, */*"),
        *("application/text/event-stream", "text/event-streams"),
    ],
)
def test_all_others_get_the_status(taken: Server, accept: str) -> None:
    """curl and programs see the documented status and body."""
    response = taken.get("/events", headers={"Accept": accept})
    assert (response.status_code, response.json()["error"]["message"]) == (503, "Connection limit exceeded: 1/1")


def test_a_claimed_id_ends_the_stream_of_a_browser(taken: Server) -> None:
    """The WebSocket that has it may leave soon."""
    assert refused(taken, "client_id=ann").rest() == [closed(1008, "Client ann is already connected")]


def test_a_drain_ends_the_stream_of_a_browser(start_server: StartServer) -> None:
    """The code is the one that the clients of the drain get."""
    server = start_server()
    server.join()
    server.drain()
    assert refused(server).rest() == [closed(1001, "Server shutting down")]


def test_the_limit_of_an_address_ends_the_stream_of_a_browser(start_server: StartServer) -> None:
    """429 is a status, too, and would be the end for good."""
    server = start_server("--max-connections-per-ip", "1")
    server.join()
    assert refused(server).rest() == [closed(1008, "Connection limit exceeded for this address: 1/1")]


def test_the_rate_ends_the_stream_of_a_browser(start_server: StartServer) -> None:
    """The middleware refuses in the same way, and its headers and CORS stay."""
    server = start_server("--rate-limit", "--allow-origin", "https://app.example")
    streams: list[Stream] = []

    def is_refused() -> bool:
        while server.get("/nothing").status_code != 429:
            pass
        # On a busy machine the bucket has room again by now.
        streams.append(refused(server, Origin="https://app.example"))
        return streams[-1].event() == closed(1008, "Rate limit exceeded: 10 requests a second, 20 at once")

    eventually(is_refused)
    assert streams[-1].response.headers["X-RateLimit-Remaining"] == "0"
    assert streams[-1].response.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert streams[-1].rest() == []


def test_other_paths_keep_their_status(start_server: StartServer) -> None:
    """Only a path of streams answers as a stream."""
    server = start_server("--rate-limit")
    assert 429 in [server.get("/status", headers=BROWSER).status_code for _ in range(200)]


def test_a_store_that_is_away_ends_the_stream_of_a_browser(start_server: StartServer, redis: RedisServer) -> None:
    """The cause is for the operator."""
    server = start_server("--store", redis.url)
    redis.kill()
    try:
        eventually(lambda: server.get("/health").status_code == 503)
        assert refused(server).rest() == [closed(1013, "Try again later")]
    finally:
        redis.start()


def test_keys_that_cannot_be_fetched_end_the_stream_of_a_browser(start_server: StartServer) -> None:
    """A token that cannot be checked now may be good."""
    server = start_server("--jwks-url", f"http://127.0.0.1:{free_port()}/jwks.json")
    signed = token(ec.generate_private_key(ec.SECP256R1()), "ES256", sub="ann")
    assert refused(server, f"token={signed}").rest() == [closed(1013, "The keys for tokens cannot be fetched")]


# Where it does not.


@pytest.mark.parametrize(
    ("query", "status"), [("since=x", 400), ("client_id=not%20an%20id", 400), ("topics=a,,b", 400)]
)
def test_a_mistake_stays_a_status(server: Server, query: str, status: int) -> None:
    """The same request would be refused for ever."""
    response = server.get(f"/events?{query}", headers=BROWSER)
    assert (response.status_code, response.headers["Content-Type"]) == (status, "application/json")


def test_a_right_that_is_missing_stays_a_status(start_server: StartServer) -> None:
    """401 without a token or with an expired one, 403 for another's topic or page, 404 for another path."""
    server = start_server("--jwt-secret", SECRET)
    expired, other = token(sub="ann", exp=1), token(sub="ann", topics=[])
    for query in ("", f"token={expired}"):
        assert server.get(f"/events?{query}", headers=BROWSER).status_code == 401
    assert server.get(f"/events?token={other}&topics=ops", headers=BROWSER).status_code == 403
    assert server.get("/events", headers=BROWSER | {"Origin": "https://evil.example"}).status_code == 403
    assert server.get("/event", headers=BROWSER).status_code == 404


def test_a_browser_whose_stream_was_replaced_stays_away(server: Server) -> None:
    """It comes back with the id of the last event, and gets the status that ends an EventSource for good."""
    old = join(server, "client_id=ann")
    new = join(server, "client_id=ann")
    assert old.rest() == [REPLACED]
    response = server.get("/events?client_id=ann", headers=BROWSER | {"Last-Event-ID": old.last_id})
    assert (response.status_code, response.content) == (204, b"")
    # event-source-polyfill, which has the id in the URL, fails at an answer without a body, and tries for ever.
    assert server.get(f"/events?client_id=ann&lastEventId={old.last_id}", headers=BROWSER).status_code == 400
    server.publish("still here")
    assert new.event().data["data"]["message"] == "still here"


def test_a_stream_that_is_opened_anew_is_admitted(server: Server) -> None:
    """A page that is loaded again takes its client_id back."""
    join(server, "client_id=ann")
    second = join(server, "client_id=ann")
    join(server, "client_id=ann")
    assert second.rest() == [REPLACED]


def test_a_stream_whose_network_changed_is_admitted(server: Server) -> None:
    """The server has not noticed yet that the old connection is dead; the browser comes back with a position."""
    dead = join(server, "client_id=ann")
    back = join(server, "client_id=ann", BROWSER | {"Last-Event-ID": dead.last_id})
    assert back.event().name == "resume"


# The token.


def test_a_page_renews_its_token_with_another_stream(start_server: StartServer) -> None:
    """It opens the next stream where the last one stands: nothing is missed, and the old one is told to stay away."""
    server = start_server("--jwt-secret", SECRET, "--api-key", "ci:a-key")
    old = join(server, f"client_id=ann&token={token(sub='ann', exp=time.time() + 60)}")
    httpx.post(f"{server.url}/notify", json={"message": "one"}, headers={"X-API-Key": "a-key"}, trust_env=False)
    first = old.event()
    httpx.post(f"{server.url}/notify", json={"message": "two"}, headers={"X-API-Key": "a-key"}, trust_env=False)
    new = join(server, f"client_id=ann&since={first.id}&token={token(sub='ann', exp=time.time() + 120)}")
    assert [event.name for event in new.events(2)] == ["resume", "message"]
    assert old.rest()[-1] == REPLACED


def test_the_end_of_a_token_is_told(start_server: StartServer) -> None:
    """The browser comes back with the same token, and gets 401, which is final."""
    server = start_server("--jwt-secret", SECRET)
    query = f"token={token(sub='ann', exp=time.time() + 4)}"
    assert join(server, query).rest() == [closed(1008, "Token expired")]
    assert server.get(f"/events?{query}", headers=BROWSER).status_code == 401


def test_no_end_is_a_comment(server: Server) -> None:
    """Pages cannot see comments."""
    old = join(server, "client_id=ann")
    join(server, "client_id=ann")
    old.rest()
    assert not re.search("closed", "".join(old.comments))
