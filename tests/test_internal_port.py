"""--internal-port: the operator's figures, on a separate port."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from conftest import StartServer
from processes import QUIET, Server, call, free_port, run
from ws_clients import PATIENCE

from notifyd import App, create_app
from settings import Settings

PRIVATE = ["/metrics", "/metrics/prometheus", "/status", "/clients", "/users/ann", "/topics"]
PROBES = ["/health", "/health/live"]


class Inside:
    """The internal port of a server."""

    def __init__(self, server: Server, port: int, host: str = "127.0.0.1") -> None:
        self.server = server
        self.url = f"http://{host}:{port}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, trust_env=False, timeout=PATIENCE)


@pytest.fixture(scope="module", params=["1", "2"])
def inside(request: pytest.FixtureRequest) -> Iterator[Inside]:
    """A server with an internal port, of one process and of two."""
    port = free_port()
    server = Server.notifyd(*QUIET, "--workers", request.param, "--internal-port", str(port))
    yield Inside(server, port)
    server.stop()


@pytest.mark.parametrize("path", PRIVATE)
def test_the_figures_are_on_the_internal_port_alone(inside: Inside, path: str) -> None:
    """The public port knows nothing of that path."""
    assert inside.get(path).status_code == 200
    assert inside.server.get(path).status_code == 404


@pytest.mark.parametrize("path", PROBES)
def test_health_is_on_both(inside: Inside, path: str) -> None:
    """Probes may use either port."""
    assert inside.get(path).status_code == 200
    assert inside.server.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/notify", "/notify/batch", "/notifications", "/events", "/ws"])
def test_nothing_else_is_on_the_internal_port(inside: Inside, path: str) -> None:
    """It is for looking, and takes neither clients nor notifications."""
    assert inside.get(path).status_code == 404


def test_the_figures_are_of_the_whole_server(inside: Inside) -> None:
    """Clients of the public port are counted, whichever worker has them."""
    clients = [inside.server.join() for _ in range(6)]
    assert inside.get("/metrics").json()["connections"]["active_connections"] == len(clients)
    assert len(inside.get("/status").json()["connections"]["details"]) == len(clients)


def test_a_foreign_page_may_not_look(inside: Inside) -> None:
    """The check of the Origin is on both ports."""
    response = httpx.get(f"{inside.url}/status", headers={"Origin": "https://evil.example"}, trust_env=False)
    assert response.status_code == 403


@pytest.mark.parametrize("flags", [[], ["--workers", "2"]])
def test_it_answers_until_the_drain_is_over(start_server: StartServer, flags: list[str]) -> None:
    """A drain can be watched; the port is free when the process has ended."""
    port = free_port()
    server = start_server(*flags, "--internal-port", str(port))
    inside = Inside(server, port)
    client = server.join()
    server.drain()
    assert inside.get("/health").status_code == 503
    assert inside.get("/status").json()["server"]["status"] == "shutting_down"
    client.leave()
    assert server.exit_status() == 0
    with pytest.raises(httpx.ConnectError):
        inside.get("/health")


def test_it_listens_on_internal_host(start_server: StartServer) -> None:
    """The internal port is on loopback by default, with any public address."""
    port = free_port()
    server = start_server("--internal-port", str(port), "--internal-host", "127.0.0.2")
    assert Inside(server, port, "127.0.0.2").get("/metrics").status_code == 200
    with pytest.raises(httpx.ConnectError):
        Inside(server, port).get("/metrics")


def test_an_internal_port_that_is_taken_is_one_line(inside: Inside) -> None:
    """One line names the address, with status 1, as for the public port."""
    port = inside.url.rpartition(":")[2]
    said = f"notifyd: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert run("--port", "0", "--internal-port", port) == (1, "", said)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_one_port_cannot_be_both(workers: str) -> None:
    """Sockets that share it would answer by chance."""
    port = str(free_port())
    ended = call("--port", port, "--internal-port", port, "--workers", workers)
    assert ended.in_one_line == (2, 1)
    assert "--internal-port" in ended.stderr


def test_in_a_host_the_figures_are_an_app_of_their_own() -> None:
    """The host decides where that is served; the app for everyone lacks them."""
    app = create_app(Settings(internal_port=9000))
    inside = app.internal()

    async def ask(one: App) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(one), base_url="http://localhost") as client:
            return (await client.get("/metrics")).status_code

    async def ask_both() -> tuple[int, int]:
        async with app.state.hub:
            return await ask(app), await ask(inside)

    assert asyncio.run(ask_both()) == (404, 200)
