"""GET /status: everything about the server, with one entry for each client."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import StartServer
from expected import CLIENT_ID, COUNT, SECONDS, TIME, answered, invalid
from processes import Server, eventually, worker_count
from virtual import FakeConnection, with_turns

import slices
from admission import Newcomer
from hub import Hub
from settings import Settings


def details(server: Server, query: str = "") -> list[Any]:
    listed = server.read(f"/status{query}")["connections"]["details"]
    assert isinstance(listed, list)
    return listed


def detail(server: Server, client_id: str) -> Any:
    (found,) = [entry for entry in details(server) if entry["client_id"] == client_id]
    return found


def test_the_answer_has_the_documented_fields_in_their_order(server: Server) -> None:
    """The body is the documented one, with the settings' defaults."""
    assert server.read("/status") == {
        "server": {
            "status": "running",
            "version": "0.1.0",
            "uptime_seconds": SECONDS,
            "start_time": TIME,
            "current_time": TIME,
        },
        "connections": {"active": 0, "total": COUNT, "max_allowed": 1000, "details": []},
        "notification_service": {"is_running": True, "notifications_sent": COUNT, "notification_interval": 0},
        "shutdown": {"shutdown_requested": False, "shutdown_timeout": 1800},
        "configuration": {
            "host": "127.0.0.1",
            "port": COUNT,
            "workers": worker_count(),
            "debug": False,
            "log_level": "INFO",
        },
    }


def test_each_client_has_the_documented_details(server: Server) -> None:
    """A client is listed with its id, its times and its user agent."""
    server.join("alice", user_agent_header="Mozilla/5.0 (compatible; WebSocket client)")
    assert details(server) == [
        {
            "client_id": "alice",
            "connected_at": TIME,
            "last_ping": TIME,
            "user_agent": "Mozilla/5.0 (compatible; WebSocket client)",
        }
    ]


def test_a_client_without_user_agent_has_null(server: Server) -> None:
    """user_agent is null when there is none."""
    server.join("alice", user_agent_header=None)
    assert detail(server, "alice")["user_agent"] is None


def test_a_long_user_agent_is_cut(server: Server) -> None:
    """The memory kept for each client is bounded, for WebSockets and streams."""
    server.join("alice", user_agent_header="a" * 5000)
    assert detail(server, "alice")["user_agent"] == "a" * 256
    with server.http.stream("GET", "/events?client_id=bob", headers={"User-Agent": "b" * 5000}):
        assert detail(server, "bob")["user_agent"] == "b" * 256


def test_connected_at_is_when_the_client_came(server: Server) -> None:
    """A client that came just now is shown so."""
    server.join("alice")
    came = datetime.fromisoformat(detail(server, "alice")["connected_at"])
    assert abs(datetime.now(UTC) - came) < timedelta(seconds=5)


@pytest.mark.parametrize("message", [{"type": "ping"}, {"type": "pong"}, {"type": "status_request"}, "nonsense"])
def test_last_ping_is_when_the_client_last_proved_alive(server: Server, message: object) -> None:
    """Anything heard from a client moves its last_ping."""
    client = server.join("alice")
    before = detail(server, "alice")["last_ping"]
    eventually(lambda: server.read("/metrics")["timestamp"] > before)
    client.send(message)
    eventually(lambda: detail(server, "alice")["last_ping"] > before)


def test_a_protocol_pong_moves_last_ping_too(server: Server) -> None:
    """An answer that the client's library gave by itself is a proof of life."""
    client = server.join("alice")
    before = detail(server, "alice")["last_ping"]
    eventually(lambda: server.read("/metrics")["timestamp"] > before)
    client.connection.pong(b"")
    eventually(lambda: detail(server, "alice")["last_ping"] > before)


def test_a_client_that_takes_its_backlog_is_alive(server: Server) -> None:
    """One that could not be pinged for all that waited for it need say nothing."""
    client = server.join_bare("alice", receive_buffer=65_536)
    before, began = detail(server, "alice")["last_ping"], time.monotonic()
    for number in range(150):
        server.notify(str(number), data={"pad": "x" * 60_000})
    eventually(lambda: time.monotonic() > began + 1.5)
    assert detail(server, "alice")["last_ping"] == before
    for _ in range(150):
        client.receive()
    eventually(lambda: detail(server, "alice")["last_ping"] > before)


def test_a_stream_that_takes_events_is_alive(server: Server) -> None:
    """It has no other way to show it."""
    read = server.raw(b"GET /events?client_id=alice HTTP/1.1\r\nHost: localhost\r\n\r\n").recv
    eventually(lambda: b"welcome" in read(65_536))
    before = detail(server, "alice")["last_ping"]
    eventually(lambda: server.read("/metrics")["timestamp"] > before)
    server.notify("hi")
    eventually(lambda: detail(server, "alice")["last_ping"] > before)


def test_everyone_is_listed(server: Server) -> None:
    """Details has one entry for each client, named or not."""
    server.join("alice")
    server.join("bob")
    server.join()
    assert sorted(entry["client_id"] for entry in details(server)) == ["alice", "bob", CLIENT_ID]


def test_a_client_that_has_left_is_not_listed(server: Server) -> None:
    """A client that leaves takes its details along."""
    server.join("alice").leave()
    eventually(lambda: details(server) == [])


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 1000])
def test_limit_caps_the_details(server: Server, limit: int) -> None:
    """?limit= is the most entries that are listed."""
    for _ in range(3):
        server.join()
    assert len(details(server, f"?limit={limit}")) == min(limit, 3)


def test_a_long_list_is_made_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have their turn meanwhile, however many are connected."""
    monkeypatch.setattr(slices, "SLICE_SECONDS", 0)
    hub = Hub(Settings())

    async def listed() -> tuple[int, int]:
        async with hub:
            for number in range(100):
                await hub.admit(FakeConnection(), Newcomer(str(number)))
            details, turns = await with_turns(hub.census.details(100))
            return len(details), turns

    found, turns = asyncio.run(listed())
    assert found == 100 and turns > 50


def test_limit_does_not_change_the_count(server: Server) -> None:
    """Active counts all clients, listed or not."""
    for _ in range(3):
        server.join()
    assert server.read("/status?limit=1")["connections"]["active"] == 3


@pytest.mark.parametrize("limit", ["-1", "many", "1.5", "%D9%A3"])
def test_a_bad_limit_is_refused_by_name(server: Server, limit: str) -> None:
    """A limit that is no whole number from 0 on is a validation error."""
    response = server.get(f"/status?limit={limit}")
    assert answered(response) == invalid("limit")


def test_notifications_sent_counts_notifications_not_deliveries(start_server: StartServer) -> None:
    """One notification to nobody and one to two clients are two notifications."""
    server = start_server()
    server.notify("to nobody")
    clients = [server.join(), server.join()]
    server.notify("to two")
    for client in clients:
        client.receive()
    assert server.read("/status")["notification_service"]["notifications_sent"] == 2


def test_a_refused_notification_is_not_counted(start_server: StartServer) -> None:
    """A notification answered with 400 was not sent."""
    server = start_server()
    server.post({"message": ""})
    assert server.read("/status")["notification_service"]["notifications_sent"] == 0


def test_test_notifications_are_counted(start_server: StartServer) -> None:
    """notifications_sent counts test notifications as well."""
    server = start_server("--notification-interval", "0.2")
    counter = server.join().receive()["data"]["counter"]
    assert server.read("/status")["notification_service"]["notifications_sent"] >= counter


def test_uptime_is_current_time_less_start_time(server: Server) -> None:
    """The three times in the answer agree."""
    told = server.read("/status")["server"]
    elapsed = datetime.fromisoformat(told["current_time"]) - datetime.fromisoformat(told["start_time"])
    assert told["uptime_seconds"] == pytest.approx(elapsed.total_seconds(), abs=0.5)


def test_start_time_is_the_same_in_metrics(server: Server) -> None:
    """The server started once."""
    started = server.read("/metrics")["notification_service"]["start_time"]
    assert server.read("/status")["server"]["start_time"] == started


@pytest.mark.parametrize("flags", [["--debug"], ["--debug", "--log-level", "ERROR"]])
def test_configuration_shows_the_level_that_is_logged(start_server: StartServer, flags: list[str]) -> None:
    """With --debug the level is DEBUG, with any --log-level."""
    server = start_server(*flags)
    server.wait_for_line(" DEBUG ")
    assert server.read("/status")["configuration"]["log_level"] == "DEBUG"


def test_configuration_shows_the_settings(start_server: StartServer) -> None:
    """The configuration is the one that the server was started with."""
    server = start_server("--debug", "--log-level", "DEBUG", "--shutdown-timeout", "12.5", "--host", "localhost")
    status = server.read("/status")
    assert status["shutdown"]["shutdown_timeout"] == 12.5
    assert {name: status["configuration"][name] for name in ("host", "debug", "log_level")} == {
        "host": "localhost",
        "debug": True,
        "log_level": "DEBUG",
    }
