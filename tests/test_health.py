"""GET /health: whether the server serves, and how many are connected."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from conftest import StartServer
from expected import COUNT, TIME
from processes import Server, eventually, worker_count


def test_the_answer_has_the_documented_fields_in_their_order(server: Server) -> None:
    """A healthy server answers 200 with the documented body."""
    assert server.read("/health") == {
        "status": "healthy",
        "message": "WebSocket Notification Server is running",
        "timestamp": TIME,
        "connections": {"active": 0, "total": COUNT, "max_allowed": 1000},
        "server_info": {"version": "0.1.0", "workers": worker_count(), "notification_interval": 0},
    }


def test_the_answer_is_json(server: Server) -> None:
    """The content type of the answer is JSON."""
    assert server.get("/health").headers["content-type"] == "application/json"


def test_the_timestamp_is_now_in_utc(server: Server) -> None:
    """The timestamp is the time of the answer."""
    told = datetime.fromisoformat(server.read("/health")["timestamp"])
    assert abs(datetime.now(UTC) - told) < timedelta(seconds=5)


def test_active_counts_the_clients_that_are_connected(server: Server) -> None:
    """Two clients are two active connections."""
    server.join()
    server.join()
    assert server.active() == 2


def test_active_goes_down_when_a_client_leaves(server: Server) -> None:
    """A client that has closed is not counted any more."""
    server.join()
    server.join().leave()
    eventually(lambda: server.active() == 1)


def test_active_goes_down_when_a_client_breaks_off(server: Server) -> None:
    """A reset connection is not counted any more, although nothing was said."""
    server.join_bare().reset()
    eventually(lambda: server.active() == 0)


def test_total_counts_everyone_who_was_ever_admitted(server: Server) -> None:
    """Total goes on growing when clients leave."""
    before = server.read("/health")["connections"]["total"]
    for _ in range(3):
        server.join().leave()
    assert server.read("/health")["connections"]["total"] == before + 3


def test_a_plain_request_is_no_connection(server: Server) -> None:
    """HTTP requests don't count as connections."""
    before = server.read("/health")["connections"]["total"]
    assert server.read("/health")["connections"]["total"] == before


def test_the_figures_are_the_settings(start_server: StartServer) -> None:
    """Limit and interval are those that the server was started with."""
    health = start_server("--max-connections", "7", "--notification-interval", "2.5").read("/health")
    assert (health["connections"]["max_allowed"], health["server_info"]["notification_interval"]) == (7, 2.5)


def test_whole_seconds_are_shown_as_integers(start_server: StartServer) -> None:
    """An interval of 20.0 s is shown as 20."""
    shown = start_server("--notification-interval", "20.0").read("/health")["server_info"]["notification_interval"]
    assert repr(shown) == "20"
