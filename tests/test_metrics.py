"""GET /metrics and GET /metrics/prometheus: the same figures, for people and for monitoring systems."""

from __future__ import annotations

import re
import subprocess
from datetime import datetime
from typing import Any

import pytest
from conftest import StartServer
from expected import COUNT, SECONDS, TIME
from processes import ROOT, Server, eventually, program, worker_count

from contract_closes import CLOSES
from counts import Counts, Durations

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


def of_processes(server: Server, family: str, labels: str = "") -> float:
    """Return the sum over all processes of a figure with these labels, or of all with that name."""
    found = re.findall(rf"^notifyd_process_{family}{{(.*)}} (\S+)$", prometheus(server), re.MULTILINE)
    assert all(given.startswith('process="') for given, _ in found)
    return sum(float(value) for given, value in found if labels in given)


def test_promtool_finds_fault_with_the_documented_names_alone(server: Server) -> None:
    """Units, types and suffixes are those of Prometheus' conventions."""
    server.notify("hi")
    ended = subprocess.run(
        [program("promtool"), "check", "metrics"], input=prometheus(server), capture_output=True, text=True, check=False
    )
    documented = re.findall(r"^# TYPE (\S+)", DOCUMENTED, re.MULTILINE)
    assert {line.split()[0] for line in (ended.stdout + ended.stderr).splitlines()} <= set(documented)


def test_a_histogram_counts_each_publish_and_pass(start_server: StartServer) -> None:
    """The buckets are cumulative, and each publish is accepted, repeated or refused."""
    server = start_server("--publish-over-websocket")
    client = server.join()
    for _ in range(5):
        server.notify("hi")
        client.receive()
    server.post({"message": "hi"}, headers={"Idempotency-Key": "a"})
    server.post({"message": "hi"}, headers={"Idempotency-Key": "a"})
    server.post({"message": "another"}, headers={"Idempotency-Key": "a"})
    client.receive()
    for _ in range(2):
        client.ask({"type": "publish", "message": "hi", "topics": ["x"], "key": "b"})
    eventually(
        lambda: (
            of_processes(server, "delivery_duration_seconds_count")
            == of_processes(server, "pass_duration_seconds_count")
        )
    )
    assert of_processes(server, "publish_duration_seconds_count") == 9
    assert of_processes(server, "publish_duration_seconds_bucket", 'le="+Inf"') == 9
    assert 0 < of_processes(server, "publish_duration_seconds_sum") < 9
    assert of_processes(server, "publishes_total", 'result="accepted"') == 7
    assert of_processes(server, "publishes_total", 'result="repeated"') == 2
    assert of_processes(server, "publishes_total", 'result="refused"') == 1
    assert of_processes(server, "sent_bytes_total") > 6 * 100


def test_the_ends_of_clients_are_counted_by_code_and_kind(start_server: StartServer) -> None:
    """With refusals, resumes and failed keys beside them; no label is a text from outside."""
    server = start_server("--api-key", "ci:secret", "--on-duplicate", "replace")
    key = {"X-API-Key": "secret"}
    bob, again = server.join("bob"), server.join("bob", query="client_id=bob&since=")
    bob.connection.close()
    server.join("eve").connection.close()
    server.request("DELETE", "/clients/bob", headers=key, json={"reason": 'Disconnected "quoted"'})
    again.connection.close()
    server.get("/status", headers={"X-API-Key": "wrong"})
    server.connect(query="nonsense=1").closed()
    server.connect(query="since=00000000-0000-0000-0000-000000000000").receive()
    server.http.headers.update(key)
    eventually(lambda: of_processes(server, "closes_total", 'kind="left"') == 1)
    assert of_processes(server, "closes_total", 'code="1008",kind="replaced"') == 1
    assert of_processes(server, "closes_total", 'code="1008",kind="put_out"') == 1
    assert of_processes(server, "refusals_total", 'kind="unauthorized"') == 1
    assert of_processes(server, "refusals_total", 'kind="invalid_request"') == 1
    assert of_processes(server, "auth_failures_total", 'reason="invalid_token"') == 1
    assert of_processes(server, "resumes_total", 'complete="true"') == 1
    assert of_processes(server, "resumes_total", 'complete="false"') == 1
    assert "quoted" not in prometheus(server)


def test_the_log_in_memory_says_that_it_has_the_test_notifications_too(start_server: StartServer) -> None:
    """The history leaves them out, so the two differ, and the words say why."""
    server = start_server("--notification-interval", "0.01")
    eventually(lambda: sample(server, "notifyd_log_notifications") > 2)
    assert server.read("/notifications")["notifications"] == []
    assert "# HELP notifyd_log_notifications Notifications in memory, also of tests\n" in prometheus(server)


def test_every_close_of_a_client_has_a_kind() -> None:
    """The kinds are those of the documented reasons, but for those of newcomers and of broken frames."""
    counts = Counts()
    for close in CLOSES:
        for reason in close.reasons:
            counts.close(close.code, reason, is_put_out=reason == "Disconnected")
    kinds = {
        labels.partition("kind=")[2].strip('"')
        for family, labels, _ in counts.samples(Durations())
        if family == "closes_total"
    }
    [row] = re.findall(
        r"^\| `notifyd_process_closes_total` .*$", (ROOT / "docs" / "protocol.md").read_text(), re.MULTILINE
    )
    assert kinds <= set(re.findall(r"`(\w+)`", row)) and len(kinds) == 11


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
    gauge = "websocket_server_uptime_seconds"
    before, uptime = sample(server, gauge), server.read("/metrics")["connections"]["uptime_seconds"]
    assert before - 0.1 <= uptime <= sample(server, gauge) + 0.1


def test_active_and_total_are_the_same_everywhere(server: Server) -> None:
    """/health, /metrics and /status agree with each other."""
    server.join()
    health, metrics, status = (server.read(path)["connections"] for path in ("/health", "/metrics", "/status"))
    assert (health["active"], health["total"]) == (status["active"], status["total"])
    assert (health["active"], health["total"]) == (
        metrics["active_connections"],
        metrics["total_connections"],
    )
