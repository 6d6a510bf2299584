"""Rate limits: each address has a bucket for handshakes and one for other requests, on every process and server."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import httpx
import pytest
from conftest import StartServer
from expected import answered, http_error, limits, parse
from processes import QUIET, Server, eventually, worker_count
from websockets.exceptions import InvalidStatus

from buckets import SECOND, Buckets, Rate, draw
from guard import Proxies, subscriber
from settings import Settings, SettingsError

HANDSHAKES, REQUESTS = (5, 10), (10, 20)
ALICE, BOB = {"X-Forwarded-For": "203.0.113.1"}, {"X-Forwarded-For": "203.0.113.2"}
RATE = Rate(10, 20)
APP = "https://app.example"
NUMBERS = count(1)


@pytest.fixture(scope="module")
def _limited() -> Iterator[Server]:
    server = Server.notifyd(
        *(*QUIET, "--allow-origin", APP),
        *("--rate-limit", "--trusted-proxies", "127.0.0.1"),
    )
    yield server
    server.stop()


@pytest.fixture
def limited(_limited: Server) -> Server:
    """A server with limits; each test has another address."""
    number = next(NUMBERS)
    _limited.http.headers["X-Forwarded-For"] = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
    return _limited


def forwarded(server: Server) -> dict[str, str]:
    """Return the header with the address of the test."""
    return {"X-Forwarded-For": server.http.headers["X-Forwarded-For"]}


def knock(server: Server, **headers: str) -> Any:
    """Ask for a WebSocket and return the response."""
    try:
        return server.connect(additional_headers=headers or forwarded(server)).connection.response
    except InvalidStatus as refused:
        return refused.response


def exhaust(server: Server, path: str = "/status?limit=0", method: str = "GET", **options: Any) -> httpx.Response:
    """Ask until it is too often, and return the refusal."""
    for _ in range(400):
        response = server.request(method, path, **options)
        if response.status_code == 429:
            return response
    raise AssertionError("never refused")


# The bucket.


def test_a_full_bucket_holds_its_burst() -> None:
    """A full bucket allows its burst at once, and not one more."""
    full_at, allowed = 0, []
    for _ in range(25):
        drawn = draw(full_at, 1000, RATE)
        full_at = 1000 + drawn.until_full
        allowed.append(drawn.allowed)
    assert allowed == [True] * 20 + [False] * 5


def test_it_is_refilled_at_its_rate() -> None:
    """A request more each tenth of a second, and no more than the burst however long nobody comes."""
    empty = RATE.depth
    assert not draw(empty, 99_999, RATE).allowed
    assert draw(empty, 100_000, RATE) == (True, 2 * SECOND)
    assert draw(empty, 3600 * SECOND, RATE) == (True, 100_000)


def test_a_refusal_costs_nothing() -> None:
    """A client that goes on asking gets the same rate as one that waits."""
    full_at = RATE.depth
    allowed = 0
    for now in range(0, 10 * SECOND, 1000):
        drawn = draw(full_at, now, RATE)
        full_at, allowed = now + drawn.until_full, allowed + drawn.allowed
    assert allowed == 99


def test_a_clock_that_was_put_back_locks_nobody_out() -> None:
    """The bucket is empty at the worst."""
    assert draw(10**15, 0, RATE) == (False, RATE.depth)
    assert draw(RATE.depth, RATE.cost, RATE).allowed


def test_full_buckets_are_forgotten() -> None:
    """Addresses that came once take no memory once they are gone."""
    buckets = Buckets()
    for number in range(200_000):
        buckets.draw(f"address {number}", RATE, number * 100)
    assert len(buckets) < 30_000


# Requests.


def test_without_the_switch_nothing_is_limited(server: Server) -> None:
    """Without the switch no request is refused and no header tells a limit."""
    answers = [server.get("/notifications") for _ in range(50)]
    assert {answer.status_code for answer in answers} == {200}
    assert not [name for name in answers[0].headers if name.startswith("x-ratelimit")]


def test_as_many_requests_as_the_bucket_holds(limited: Server) -> None:
    """20 at once, and then 10 a second."""
    began, allowed, left = time.monotonic(), 0, 20
    for _ in range(30):
        response = limited.get("/notifications")
        limit, remaining, _reset = limits(response.headers)
        allowed += response.status_code == 200
        assert limit == 10
        assert remaining == 0 if response.status_code == 429 else remaining >= left - 1
        left = remaining
    assert 20 <= allowed <= 20 + 10 * (time.monotonic() - began)


def test_a_refusal_has_the_documented_body_and_headers(limited: Server) -> None:
    """429, when to come back, and when the bucket is full."""
    began, refusal = time.time(), exhaust(limited)
    assert parse(refusal.content) == http_error("application", "Rate limit exceeded: 10 requests a second, 20 at once")
    assert refusal.headers["retry-after"] == "1"
    limit, remaining, reset = limits(refusal.headers)
    assert (limit, remaining) == (10, 0)
    # Nothing is left of two seconds' worth, up to the next request.
    assert began + 1.9 <= reset <= time.time() + 3


def test_a_client_that_waits_for_retry_after_gets_in(limited: Server) -> None:
    """After the seconds in Retry-After the next request is let in."""
    time.sleep(int(exhaust(limited).headers["retry-after"]))
    assert limited.get("/status").status_code == 200


def test_reset_is_when_the_bucket_is_full(limited: Server) -> None:
    """A Unix second: right after the first request, a tenth of a second from now."""
    before = time.time()
    limit, remaining, reset = limits(limited.get("/metrics").headers)
    assert (limit, remaining) == (10, 19)
    assert math.ceil(before + 0.1) <= reset <= math.ceil(time.time() + 0.1)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("GET", "/notify"),
        ("POST", "/notify"),
        ("OPTIONS", "/status"),
        ("GET", "/ws"),
        ("GET", "/"),
        ("GET", "/healthz"),
        ("GET", "/health/"),
    ],
)
def test_everything_counts(limited: Server, method: str, path: str) -> None:
    """Unknown paths, wrong methods and invalid bodies count too, and their answers carry the headers."""
    limit, remaining, _ = limits(limited.request(method, path).headers)
    assert (limit, remaining) == (10, 19)
    exhaust(limited, path, method)


def test_one_bucket_is_for_all_of_them(limited: Server) -> None:
    """All methods and paths share the bucket."""
    began, asked = time.monotonic(), [("POST", "/notify"), ("HEAD", "/metrics"), ("OPTIONS", "/status"), ("PUT", "/")]
    exhaust(limited)
    statuses = [limited.request(method, path).status_code for method, path in asked * 5]
    assert len(statuses) - statuses.count(429) <= 1 + 10 * (time.monotonic() - began)


def test_a_foreign_page_counts_too(limited: Server) -> None:
    """The limit comes before the origin, so guessing one is not free."""
    evil = {"Origin": "https://evil.example"}
    assert limits(limited.get("/status", headers=evil).headers)[:2] == (10, 19)
    exhaust(limited, headers=evil)


@pytest.mark.parametrize("path", ["/health", "/health/live", "/client.js", "/console/app.js"])
def test_probes_and_static_files_are_exempt(limited: Server, path: str) -> None:
    """A monitor can ask /health however many requests come from its address, and a page loads however often."""
    exhaust(limited)
    answers = [limited.get(path) for _ in range(30)]
    assert {answer.status_code for answer in answers} == {200}
    assert "x-ratelimit-limit" not in answers[0].headers


def test_a_page_may_read_the_refusal(limited: Server) -> None:
    """A page of an allowed origin can read the refusal and its headers."""
    refusal = exhaust(limited, headers={"Origin": APP})
    assert refusal.headers["access-control-allow-origin"] == APP
    exposed = ", ".join(refusal.headers.get_list("access-control-expose-headers"))
    assert "Retry-After" in exposed and "X-RateLimit-Remaining" in exposed


def test_a_stream_tells_its_limits(limited: Server) -> None:
    """It is a request like any other."""
    with limited.http.stream("GET", "/events") as response:
        assert limits(response.headers)[:2] == (10, 19)


# Handshakes.


def test_as_many_handshakes_as_the_bucket_holds(limited: Server) -> None:
    """10 at once, and then 5 a second; each answer tells."""
    began, answers = time.monotonic(), [knock(limited)]
    while answers[-1].status_code == 101:
        answers.append(knock(limited))
    assert answers[-1].status_code == 429
    assert 10 <= len(answers) - 1 <= 10 + 5 * (time.monotonic() - began)
    assert limits(answers[0].headers)[:2] == (5, 9)


def test_a_handshake_is_refused_before_the_upgrade(limited: Server) -> None:
    """A handshake is refused before the upgrade, with the documented body and the headers."""
    while (refusal := knock(limited)).status_code == 101:
        pass
    assert refusal.status_code == 429
    assert parse(refusal.body) == http_error("connection", "Rate limit exceeded: 5 handshakes a second, 10 at once")
    assert refusal.headers["Retry-After"] == "1"
    assert limits(refusal.headers)[:2] == (5, 0)


def test_handshakes_and_requests_have_buckets_of_their_own(limited: Server) -> None:
    """With an empty bucket of requests a client may still connect."""
    exhaust(limited)
    assert knock(limited).status_code == 101


def test_a_handshake_that_is_refused_counts(limited: Server) -> None:
    """A client_id that will not do is closed, and a path where nothing is refused, as often as a bucket holds."""
    began = time.monotonic()
    assert limited.connect("not an id", additional_headers=forwarded(limited)).closed()[1] == "Invalid client_id"
    with pytest.raises(InvalidStatus) as refused:
        limited.connect(url=limited.ws_url + "/nowhere", additional_headers=forwarded(limited))
    assert refused.value.response.status_code == 404
    assert limits(refused.value.response.headers)[1] == 8 or time.monotonic() - began > 0.2


# The address of a request.


def test_each_address_has_its_own_bucket(limited: Server) -> None:
    """A flood from one address does not count for another."""
    exhaust(limited, headers=ALICE)
    assert limits(limited.get("/status", headers=BOB).headers)[:2] == (10, 19)


def test_a_header_of_nobodys_proxy_is_not_believed(start_server: StartServer) -> None:
    """Without --trusted-proxies an address cannot make up others."""
    server = start_server("--rate-limit")
    exhaust(server, headers=ALICE)
    assert limits(server.get("/status", headers=BOB).headers)[1] < 10


PROXIES = Proxies(["127.0.0.1", "10.0.0.0/8", "2001:db8:1::/48"])


@pytest.mark.parametrize(
    ("peer", "hops", "address"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["203.0.113.1"], "192.0.2.1"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["203.0.113.1"], "203.0.113.1"),
        ("127.0.0.1", ["6.6.6.6, 203.0.113.1"], "203.0.113.1"),
        ("127.0.0.1", ["6.6.6.6", "203.0.113.1"], "203.0.113.1"),
        ("127.0.0.1", ["6.6.6.6, 203.0.113.1, 10.1.2.3"], "203.0.113.1"),
        ("127.0.0.1", ["6.6.6.6, 203.0.113.1", "10.1.2.3,2001:db8:1::5"], "203.0.113.1"),
        ("127.0.0.1", ["10.9.9.9, 10.1.2.3"], "10.9.9.9"),
        ("127.0.0.1", ["203.0.113.1, unknown"], "127.0.0.1"),
        ("127.0.0.1", ["203.0.113.1, unknown, 10.1.2.3"], "10.1.2.3"),
        ("127.0.0.1", [""], "127.0.0.1"),
        ("127.0.0.1", ["203.0.113.1,"], "127.0.0.1"),
        ("127.0.0.1", ["203.0.113.1:4711"], "203.0.113.1"),
        ("127.0.0.1", ["[2001:DB8::7]:4711"], "2001:db8::7"),
        ("127.0.0.1", ["2001:0db8:0:0::7"], "2001:db8::7"),
        ("127.0.0.1", ["::ffff:203.0.113.1"], "203.0.113.1"),
        ("127.0.0.1", ["203.0.113.1\x00"], "127.0.0.1"),
        ("::ffff:127.0.0.1", ["203.0.113.1"], "203.0.113.1"),
        ("2001:db8:1::9", ["203.0.113.1"], "203.0.113.1"),
        ("fe80::1%eth0", ["203.0.113.1"], "fe80::1"),
        ("unix", ["203.0.113.1"], "unix"),
        ("testclient", ["203.0.113.1"], "testclient"),
    ],
)
def test_the_list_is_read_from_the_right_past_trusted_hops(peer: str, hops: list[str], address: str) -> None:
    """Entries to the left of the first untrusted address may be made up."""
    headers = [(b"x-forwarded-for", value.encode()) for value in hops]
    assert PROXIES.address_of(peer, headers) == address


@pytest.mark.parametrize("trusted", ["::ffff:127.0.0.1", "::ffff:127.0.0.0/104", "::ffff:0:0/96"])
@pytest.mark.parametrize("peer", ["127.0.0.1", "::ffff:127.0.0.1"])
def test_an_ipv4_proxy_may_be_named_as_a_socket_for_both_families_does(trusted: str, peer: str) -> None:
    """Otherwise all clients behind the proxy would count as one address."""
    assert Proxies([trusted]).address_of(peer, [(b"x-forwarded-for", b"203.0.113.1")]) == "203.0.113.1"


def test_a_proxy_may_come_through_a_unix_socket() -> None:
    """It has no address, so it has a word of its own."""
    headers = [(b"x-forwarded-for", b"6.6.6.6, 203.0.113.1")]
    assert Proxies(["unix"]).address_of("unix", headers) == "203.0.113.1"
    assert Proxies(["unix"]).address_of("127.0.0.1", headers) == "127.0.0.1"


# An IPv6 subscriber has a whole network.


@pytest.mark.parametrize(
    ("address", "prefix", "name"),
    [
        ("203.0.113.1", 64, "203.0.113.1"),
        ("2001:db8:1:2:3:4:5:6", 64, "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", 64, "2001:db8:1:2::/64"),
        ("2001:db8:1:2ff::1", 56, "2001:db8:1:200::/56"),
        ("2001:db8:1:2::1", 128, "2001:db8:1:2::1"),
        ("::ffff:203.0.113.1", 64, "203.0.113.1"),
        ("64:ff9b::203.0.113.1", 64, "203.0.113.1"),
        ("fe80::1%eth0", 64, "fe80::1"),
        ("::1", 64, "::1"),
        ("unix", 64, "unix"),
        ("testclient", 64, "testclient"),
        ("", 64, ""),
    ],
)
def test_an_ipv6_network_is_one_subscriber(address: str, prefix: int, name: str) -> None:
    """Not on the link, where each address is a machine, nor behind NAT64, where each is an IPv4 subscriber."""
    assert subscriber(address, prefix) == name


def of_network(network: str, count: int) -> Iterator[dict[str, str]]:
    """Yield the headers of requests from so many addresses of a network."""
    for number in range(1, count + 1):
        yield {"X-Forwarded-For": f"{network}{number:x}:{number}::{number}"}


def test_a_network_has_one_bucket(start_server: StartServer) -> None:
    """Another address of the network is refused, another network is not; each process warns of the network."""
    server = start_server("--rate-limit", "--trusted-proxies", "127.0.0.1")
    addresses = of_network("2001:db8:1:2:", 400)
    assert any(server.get("/notifications", headers=headers).status_code == 429 for headers in addresses)
    assert any(knock(server, **headers).status_code == 429 for headers in addresses)
    assert server.get("/status", headers={"X-Forwarded-For": "2001:db8:1:3::1"}).status_code == 200
    server.signal()
    server.wait_for_line("Shutting down")
    warnings = [line.partition("WARNING ")[2] for line in server.stderr if "WARNING" in line]
    assert {warning.partition(" sends too many ")[0] for warning in warnings} == {"The address 2001:db8:1:2::/64"}
    assert len(warnings) <= worker_count()
    assert len(warnings) <= worker_count()


def test_a_network_has_so_many_clients_and_no_more(start_server: StartServer) -> None:
    """WebSockets and streams of all its addresses together."""
    server = start_server("--max-connections-per-ip", "2", "--trusted-proxies", "127.0.0.0/8")
    one, two, three, four = of_network("2001:db8:1:2:", 4)
    assert knock(server, **one).status_code == 101
    with server.http.stream("GET", "/events", headers=two) as stream:
        assert stream.status_code == 200
        assert knock(server, **three).status_code == 429
        assert server.get("/events", headers=four).status_code == 429
        assert knock(server, **{"X-Forwarded-For": "2001:db8:1:3::1"}).status_code == 101


def test_the_length_of_the_prefix_is_a_setting(start_server: StartServer) -> None:
    """With 128 bits every address counts by itself."""
    flags = ("--rate-limit", "--max-connections-per-ip", "1", "--trusted-proxies", "127.0.0.1", "--ipv6-prefix", "128")
    server = start_server(*flags)
    for headers in of_network("2001:db8:1:2:", 9):
        assert limits(server.get("/status", headers=headers).headers)[:2] == (10, 19)
        assert knock(server, **headers).status_code == 101


@pytest.mark.parametrize("value", [0, 129, "64"])
def test_a_prefix_has_1_to_128_bits(value: object) -> None:
    """0 would make one subscriber of all."""
    with pytest.raises(SettingsError, match="ipv6_prefix: expected an integer"):
        Settings(ipv6_prefix=value)  # type: ignore[arg-type]


# Connections of one address.


@pytest.fixture
def crowded(start_server: StartServer) -> Server:
    """A server with room for two clients of an address."""
    return start_server("--max-connections-per-ip", "2", "--trusted-proxies", "127.0.0.0/8")


def test_an_address_has_so_many_clients_and_no_more(crowded: Server) -> None:
    """WebSockets and streams together; the next gets 429 before the upgrade, another address gets in."""
    crowded.join(additional_headers=ALICE)
    with crowded.http.stream("GET", "/events", headers=ALICE) as stream:
        assert stream.status_code == 200
        refusal = knock(crowded, **ALICE)
        message = "Connection limit exceeded for this address: 2/2"
        assert (refusal.status_code, parse(refusal.body)) == (429, http_error("connection", message))
        assert refusal.headers["Retry-After"] == "5"
        response = crowded.get("/events", headers=ALICE)
        assert answered(response) == (429, http_error("application", message))
        assert knock(crowded, **BOB).status_code == 101


def test_a_client_that_leaves_makes_room(crowded: Server) -> None:
    """The address may connect again after each pair of clients has left."""
    for _ in range(5):
        gone = [crowded.join(additional_headers=ALICE) for _ in range(2)]
        assert knock(crowded, **ALICE).status_code == 429
        for client in gone:
            client.leave()
        eventually(lambda: crowded.active() == 0)


def test_a_refused_client_does_not_count_for_its_address(start_server: StartServer) -> None:
    """A client refused by another limit, or for a taken id, does not count for its address."""
    server = start_server("--max-connections-per-ip", "2", "--max-connections", "1")
    server.join("one")
    for _ in range(5):
        assert server.connect("two").closed()[1] == "Connection limit exceeded: 1/1"
        assert server.connect("one").closed()[1] == "Client one is already connected"


def test_the_limit_is_of_all_processes(start_server: StartServer) -> None:
    """Whichever of two workers a client comes to."""
    server = start_server("--workers", "2", "--max-connections-per-ip", "3")
    statuses = [knock(server, **ALICE).status_code for _ in range(12)]
    assert sorted(statuses) == [101] * 3 + [429] * 9


def test_the_rate_is_of_all_processes(start_server: StartServer) -> None:
    """Each request has a new connection, so that the kernel spreads them over three workers."""
    server = start_server("--workers", "3", "--rate-limit")
    began, request = time.monotonic(), b"GET /notifications HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    statuses = [server.response_to(request)[0] for _ in range(60)]
    assert 20 <= statuses.count(200) <= 20 + 10 * (time.monotonic() - began)
