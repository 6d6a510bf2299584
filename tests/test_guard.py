"""The guard of the rates by itself: its questions to the store, its work without them, and every kind of server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from carriers import CARRIERS, first_quick, host
from conftest import StartServer
from expected import http_error, naming, parse
from processes import Server, worker_count
from websockets.exceptions import InvalidStatus

from buckets import Buckets, Draw, Rate
from counts import Counts
from errors import StoreUnavailable
from guard import Guard
from settings import Settings, SettingsError


class FakeStore:
    """A store that counts its calls, and may be away."""

    def __init__(self) -> None:
        self.asked = 0
        self.is_away = False
        self.buckets = Buckets()

    async def draw(self, bucket: str, rate: Rate) -> Draw:
        self.asked += 1
        if self.is_away:
            raise StoreUnavailable("The store is away")
        return self.buckets.draw(bucket, rate, time.monotonic_ns() // 1000)


async def show_address(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the address that the scope names."""
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": str(scope["client"][0]).encode()})


def answers(store: FakeStore, count: int, *, client: Any = ("192.0.2.1", 1), **settings: Any) -> list[httpx.Response]:
    """Return the answers to so many requests, one after the other."""

    async def ask() -> list[httpx.Response]:
        guard = Guard(show_address, Settings(**settings), store, Counts())  # type: ignore[arg-type]
        transport = httpx.ASGITransport(guard, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            header = {"X-Forwarded-For": "6.6.6.6, 203.0.113.1"}
            return [await http.get("/", headers=header) for _ in range(count)]

    return asyncio.run(ask())


def test_a_flood_costs_the_store_no_more_than_the_allowed_requests() -> None:
    """An address known to be over the limit is refused without a call to the store."""
    store = FakeStore()
    statuses = [answer.status_code for answer in answers(store, 1000, rate_limit=True)]
    assert statuses.count(200) >= 20
    assert statuses.count(429) > 500
    assert store.asked <= statuses.count(200) + 1


def test_without_the_store_each_process_has_its_own_limits() -> None:
    """Nobody is locked out while it is away, and nobody is let in without end."""
    store = FakeStore()
    store.is_away = True
    found = answers(store, 100, rate_limit=True)
    assert 20 <= [answer.status_code for answer in found].count(200) <= 30
    assert found[0].headers["x-ratelimit-remaining"] == "19"


def test_a_peer_on_a_unix_socket_may_be_a_proxy() -> None:
    """With `unix` among the trusted proxies the app sees the address of the header, with limits or without."""
    trusting, careful = {"trusted_proxies": ("unix",)}, {"rate_limit": True}
    assert [answer.text for answer in answers(FakeStore(), 1, client=None, **trusting)] == ["203.0.113.1"]
    assert [answer.text for answer in answers(FakeStore(), 1, client=None, **careful)] == ["unix"]


@pytest.mark.parametrize("carrier", first_quick(["uvicorn-websockets", "uvicorn-wsproto-h11", "hypercorn", "granian"]))
def test_other_servers_limit_as_well(carrier: str) -> None:
    """A mounted app limits as well; a handshake is refused with the body where the server lets an app do that."""
    command, app, flags, prefix = CARRIERS[carrier]
    server = host(command, app, *flags, prefix=prefix, NOTIFYD_RATE_LIMIT="true", NOTIFYD_MAX_CONNECTIONS="100")
    try:
        statuses = [server.get("/notifications").status_code]
        while statuses[-1] == 200:
            statuses.append(server.get("/notifications").status_code)
        assert len(statuses) > 20 and statuses[-1] == 429
        assert server.get("/health").status_code == 200
        with pytest.raises(InvalidStatus) as refused:
            list(map(server.connect, [None] * 100))
        response = refused.value.response
        if response.status_code == 429:
            assert parse(response.body or b"") == http_error("connection", naming("Rate limit exceeded"))
            assert response.headers["X-RateLimit-Remaining"] == "0"
        else:
            assert (response.status_code, carrier) == (403, "granian")
    finally:
        server.kill()


@pytest.mark.parametrize("carrier", first_quick(["uvicorn-websockets", "hypercorn"]))
def test_other_servers_count_clients_as_well(carrier: str) -> None:
    """The limit of an address is known before the upgrade."""
    command, app, flags, prefix = CARRIERS[carrier]
    server = host(command, app, *flags, prefix=prefix, NOTIFYD_MAX_CONNECTIONS_PER_IP="1")
    try:
        server.join()
        with pytest.raises(InvalidStatus) as refused:
            server.connect()
        assert refused.value.response.status_code == 429
        assert parse(refused.value.response.body or b"") == http_error("connection", naming("for this address: 1/1"))
    finally:
        server.kill()


def test_a_refused_address_is_logged_once(start_server: StartServer) -> None:
    """The log names the address that the proxy reports, once: a flood of requests does not flood the log."""
    server = start_server("--rate-limit", "--trusted-proxies", "127.0.0.1")
    for _ in range(60):
        server.get("/status", headers={"X-Forwarded-For": "203.0.113.9"})
    server.signal()
    server.wait_for_line("Shutting down")
    lines = [line.partition("WARNING ")[2] for line in server.stderr if "WARNING" in line]
    assert set(lines) == {"The address 203.0.113.9 sends too many requests and is refused"}
    assert len(lines) <= worker_count()


# The settings.


@pytest.mark.parametrize("value", ["10.0.0.0/33", "proxy.example", "10.0.0.1/8", ""])
def test_a_proxy_is_an_address_or_a_network(value: str) -> None:
    """A proxy is an address or a network. A name is refused, since it could be anybody's tomorrow."""
    with pytest.raises(SettingsError, match="trusted_proxies: expected addresses, networks"):
        Settings(trusted_proxies=(value,))


def test_the_variable_is_a_comma_list(start_server: StartServer) -> None:
    """NOTIFYD_TRUSTED_PROXIES names several."""
    variables = {"NOTIFYD_TRUSTED_PROXIES": "10.0.0.0/8, 127.0.0.1,unix", "NOTIFYD_RATE_LIMIT": "true"}
    server: Server = start_server(variables=variables)
    for number in range(3):
        answer = server.get("/status", headers={"X-Forwarded-For": f"203.0.113.{number}"})
        assert answer.headers["x-ratelimit-remaining"] == "19"
