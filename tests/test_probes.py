"""Probes: /health decides about new clients, and /health/live about a restart of the process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import StartServer
from expected import TIME
from processes import Server, eventually
from redis_server import RedisServer

from notifyd import create_app
from settings import Settings

ALIVE = {"status": "alive", "timestamp": TIME}


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()


def test_the_process_answers_that_it_is_alive(server: Server) -> None:
    """GET /health/live answers 200 with the documented body."""
    assert server.read("/health/live") == ALIVE


def test_a_server_that_drains_is_alive_and_not_ready(start_server: StartServer) -> None:
    """An orchestrator sends it nobody, and does not kill it."""
    server = start_server()
    server.join()
    server.drain()
    assert server.get("/health").json()["status"] == "shutting_down"
    assert server.read("/health/live") == ALIVE


def test_a_server_without_its_store_is_alive_and_not_ready(start_server: StartServer, redis: RedisServer) -> None:
    """Killed for it, it would lose its clients for nothing; when the store is back, it is ready."""
    server = start_server("--store", redis.url)
    redis.kill()
    eventually(lambda: server.get("/health").status_code == 503)
    assert server.get("/health").json()["status"] == "unhealthy"
    assert server.read("/health/live") == ALIVE
    redis.start()
    eventually(lambda: server.get("/health").status_code == 200)


def test_an_app_is_alive_even_while_its_store_is_away(tmp_path: Path) -> None:
    """In another server the Hub starts with the first request that needs it; this one does not."""
    app = create_app(Settings(store=f"sqlite:{tmp_path}/no/such/directory"))

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.get("/health/live")).status_code

    assert asyncio.run(ask()) == 200
