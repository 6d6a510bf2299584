"""GET /metrics and GET /metrics/prometheus: the same figures, for people and for monitoring systems."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest
from conftest import StartServer
from expected import COUNT, SECONDS, TIME
from processes import Server, worker_count

# The reference, to the letter, with every number left open.
DOCUMENTED = """\
# HELP websocket_active_connections Number of active WebSocket connections
# TYPE websocket_active_connections gauge
websocket_active_connections N

# HELP websocket_total_connections Total number of connections since server start
# TYPE websocket_total_connections counter
websocket_total_connections N

# HELP websocket_notifications_sent Total number of notifications sent
# TYPE websocket_notifications_sent counter
websocket_notifications_sent N

# HELP websocket_server_uptime_seconds Server uptime in seconds
# TYPE websocket_server_uptime_seconds gauge
websocket_server_uptime_seconds N
"""


def prometheus(server: Server) -> str:
    response = server.get("/metrics/prometheus")
    assert response.status_code == 200
    return response.text


def sample(server: Server, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", prometheus(server), re.MULTILINE)
    assert found, f"no sample {name}"
    return float(found[1])


def sent(server: Server) -> Any:
    return server.read("/metrics")["connections"]["messages_sent"]


def test_the_answer_has_the_documented_fields_in_their_order(server: Server) -> None:
    """The body is the documented one."""
    assert server.read("/metrics") == {
        "connections": {
            "active_connections": 0,
            "total_connections": COUNT,
            "messages_sent": COUNT,
            "uptime_seconds": SECONDS,
        },
        "notification_service": {"is_running": True, "notification_interval": 0, "start_time": TIME},
        "server": {"version": "0.1.0", "workers": worker_count(), "max_connections": 1000, "debug_mode": False},
        "timestamp": TIME,
    }


def test_uptime_is_the_time_since_the_start(server: Server) -> None:
    """Uptime, start time and timestamp agree with each other."""
    metrics = server.read("/metrics")
    started = datetime.fromisoformat(metrics["notification_service"]["start_time"])
    elapsed = (datetime.fromisoformat(metrics["timestamp"]) - started).total_seconds()
    assert metrics["connections"]["uptime_seconds"] == pytest.approx(elapsed, abs=0.5)


def test_uptime_grows(server: Server) -> None:
    """Of two answers the later one has the longer uptime."""
    first = server.read("/metrics")["connections"]["uptime_seconds"]
    while server.read("/metrics")["timestamp"] == server.read("/metrics")["timestamp"]:
        pass
    assert server.read("/metrics")["connections"]["uptime_seconds"] > first


def test_messages_sent_counts_one_for_each_client(server: Server) -> None:
    """Two notifications to three clients are six messages."""
    clients, before = [server.join() for _ in range(3)], sent(server)
    server.notify("one")
    server.notify("two")
    for client in clients:
        client.receive_many(2)
    assert sent(server) == before + 6


def test_messages_sent_counts_notifications_alone(server: Server) -> None:
    """Welcomes, pongs, status responses and errors aren't counted."""
    before = sent(server)
    client = server.join()
    for message in ({"type": "ping"}, {"type": "status_request"}, "nonsense"):
        client.ask(message)
    assert sent(server) == before


def test_a_notification_to_nobody_sends_no_message(server: Server) -> None:
    """Without clients the counter stays."""
    before = sent(server)
    server.notify("hello?")
    assert sent(server) == before


def test_debug_mode_is_the_setting(start_server: StartServer) -> None:
    """With --debug the debug mode is true."""
    assert start_server("--debug").read("/metrics")["server"]["debug_mode"] is True


def test_prometheus_begins_with_the_documented_text(server: Server) -> None:
    """The four documented metrics come first, to the letter."""
    open_numbers = re.sub(r"^(websocket_\w+) [0-9.]+$", r"\1 N", prometheus(server), flags=re.MULTILINE)
    assert open_numbers[: len(DOCUMENTED)] == DOCUMENTED


def test_further_prometheus_metrics_have_our_prefix(server: Server) -> None:
    """All metrics after the four are called notifyd_something, and have HELP and TYPE."""
    further = prometheus(server).splitlines()[DOCUMENTED.count("\n") :]
    assert [line for line in further if not re.match(r"$|# (HELP|TYPE) notifyd_\w+ |notifyd_\w+(\{.*\})? ", line)] == []


def test_prometheus_is_text_in_the_exposition_format(server: Server) -> None:
    """A scraper recognises the format by its content type."""
    content_type = server.get("/metrics/prometheus").headers["content-type"]
    assert content_type.startswith("text/plain") and "version=0.0.4" in content_type


def test_prometheus_ends_with_a_line_feed(server: Server) -> None:
    """The last line must end with a line feed, says the exposition format."""
    assert prometheus(server).endswith("\n")


@pytest.mark.parametrize(
    ("metric", "field"),
    [
        ("websocket_active_connections", "active_connections"),
        ("websocket_total_connections", "total_connections"),
        ("websocket_notifications_sent", "messages_sent"),
    ],
)
def test_prometheus_and_json_agree(server: Server, metric: str, field: str) -> None:
    """Both views show the same count."""
    for client in (server.join(), server.join()):
        server.notify("a notification")
        client.receive()
    assert sample(server, metric) == server.read("/metrics")["connections"][field]


def test_prometheus_uptime_is_the_uptime(server: Server) -> None:
    """The gauge is in seconds, and is that of /metrics."""
    uptime = server.read("/metrics")["connections"]["uptime_seconds"]
    assert sample(server, "websocket_server_uptime_seconds") == pytest.approx(uptime, abs=1)


def test_active_and_total_are_the_same_everywhere(server: Server) -> None:
    """/health, /metrics and /status agree with each other."""
    server.join()
    health, metrics, status = (server.read(path)["connections"] for path in ("/health", "/metrics", "/status"))
    assert (health["active"], health["total"]) == (status["active"], status["total"])
    assert (health["active"], health["total"]) == (
        metrics["active_connections"],
        metrics["total_connections"],
    )
