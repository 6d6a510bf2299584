"""GET /events: the stream, for curl and for a browser that resumes by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
from http.client import IncompleteRead
from typing import Any

import httpx
import pytest
from bytes import read_until
from conftest import StartServer
from event_stream import REPLACED, Event, Stream, closed, join
from expected import CLIENT_ID, SHUTDOWN, SYSTEM, TIME, UUID7, answered, http_error, invalid, naming, welcome
from processes import ROOT, Server, eventually, needs_proc, node_with


def texts(events: list[Event]) -> list[str]:
    return [event.data["data"]["message"] for event in events]


def refusal(server: Server, query: str = "", **headers: str) -> tuple[int, Any]:
    """The status and the parsed body of a refusal."""
    response = server.get(f"/events?{query}", headers=headers)
    return answered(response)


def is_told_when_to_retry(response: httpx.Response) -> bool:
    return response.status_code == 503 and int(response.headers["Retry-After"]) > 0


# The format.


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_shows_each_notification(server: Server) -> None:
    """curl shows each notification as soon as it arrives, in the documented lines."""
    command = ["curl", "--silent", "--no-buffer", "--max-time", "60", "--noproxy", "*", f"{server.url}/events"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        lines = iter(curl.stdout.readline, "")
        assert [line.partition(" ")[0] for line in (next(lines), next(lines))] == ["retry:", "id:"]
        assert next(lines) == "event: welcome\n"
        assert [next(lines)[:6], next(lines)] == ["data: ", "\n"]
        [id] = server.publish("disk full")
        assert [next(lines) for _ in range(2)] == [f"id: {id}\n", "event: message\n"]
        assert json.loads(next(lines).removeprefix("data: "))["data"] == {"message": "disk full"}
        curl.terminate()


def test_the_answer_is_an_event_stream_that_no_cache_stores(server: Server) -> None:
    """The media type that browsers want; no cache stores it, and no proxy compresses it, which would hold it back."""
    stream = join(server)
    assert stream.response.status == 200
    assert str(stream.response.headers["Content-Type"]).startswith("text/event-stream")
    assert stream.response.headers["Cache-Control"] == "no-store, no-transform"


def test_first_comes_the_welcome(server: Server) -> None:
    """An event of that name with the documented message, and the position as its id."""
    assert Stream(server, "client_id=ann").event() == Event("welcome", welcome("ann"), UUID7)
    assert Stream(server).event() == Event("welcome", welcome(CLIENT_ID), UUID7)


def test_the_browser_is_told_when_to_come_back(server: Server) -> None:
    """With the first event comes a `retry` in milliseconds, not the same for all: a fleet must not return at once."""
    waits = {join(server).retry or 0 for _ in range(20)}
    assert 3000 <= min(waits) < max(waits) <= 6000


def test_a_notification_is_the_same_json_as_on_the_websocket(server: Server) -> None:
    """A message event with the notification's id."""
    client, stream = server.join(query="topics=red"), join(server, "topics=red")
    [id] = server.publish("größer\nthan\r\ntwo lines\u2028", type="alert", topics=["red"], data={"id: x": "\n\n"})
    assert stream.event() == Event("message", client.receive(), id)


def test_everything_arrives_in_order(server: Server) -> None:
    """A burst, too."""
    stream = join(server)
    server.request("POST", "/notify/batch", json=[{"message": str(number)} for number in range(1000)])
    assert texts(stream.events(1000)) == [str(number) for number in range(1000)]


def test_test_notifications_arrive(start_server: StartServer) -> None:
    """Test notifications have an id, like every notification."""
    event = join(start_server("--notification-interval", "0.1")).event()
    assert (event.name, event.data["type"], event.id) == ("message", "test_notification", event.data["id"])


def test_the_heartbeat_is_a_comment(start_server: StartServer) -> None:
    """It keeps proxies from closing the stream, and is no event."""
    server = start_server("--ping-interval", "0.1", quiet=False)
    stream = join(server)
    eventually(lambda: _has_a_comment(stream, server))


def _has_a_comment(stream: Stream, server: Server) -> bool:
    server.notify("go on")
    stream.event()
    return bool(stream.comments)


# Resume, topics and client_id, as on the WebSocket.


def test_after_the_welcome_come_the_resume_and_the_missed_notifications(server: Server) -> None:
    """The resume is an event of that name without an id: a stream that is cut during the replay must not skip it."""
    first, second, last = server.publish("one", "two", "three")
    stream = join(server, f"since={first}")
    data = {"position": last, "replayed": 2, "complete": True}
    assert stream.event() == Event("resume", {"type": "resume", "timestamp": TIME, "data": data}, None)
    assert [event.id for event in stream.events(2)] == [second, last]
    server.publish("four")
    assert texts(stream.events(1)) == ["four"]


def test_last_event_id_resumes(server: Server) -> None:
    """The stream resumes from the header that a browser sends by itself."""
    first, _ = server.publish("one", "two")
    stream = join(server, headers={"Last-Event-ID": first})
    assert stream.event().name == "resume"
    assert texts(stream.events(1)) == ["two"]


def test_last_event_id_wins_over_since(server: Server) -> None:
    """A browser that reconnects still sends the URL that it was given at first."""
    first, second, _ = server.publish("one", "two", "three")
    stream = join(server, f"since={first}", {"Last-Event-ID": second})
    assert stream.event().data["data"]["replayed"] == 1


def test_last_event_id_in_the_url_wins_over_since(server: Server) -> None:
    """A polyfill adds it to the URL that it was given; empty, it counts as none, and the header wins over both."""
    ids = server.publish("one", "two", "three", "four")
    streams = [
        join(server, f"lastEventId={ids[1]}&since={ids[0]}"),
        join(server, f"since={ids[0]}&lastEventId={ids[1]}"),
        join(server, f"since={ids[0]}&lastEventId="),
        join(server, f"since={ids[0]}&lastEventId={ids[1]}", {"Last-Event-ID": ids[2]}),
        join(server, f"since={ids[0]}&lastEventId={ids[1]}", {"Last-Event-ID": ""}),
    ]
    assert [stream.event().data["data"]["replayed"] for stream in streams] == [2, 2, 3, 1, 2]


@pytest.mark.parametrize("query", ["lastEventId=x", "lastEventId=x&since=", "lastEventId=%20"])
def test_a_bad_last_event_id_in_the_url_is_refused(server: Server, query: str) -> None:
    """A bad position is refused in the same words under each of its names."""
    assert refusal(server, query) == (400, http_error("validation", "Invalid since"))


POLYFILL = """
const { EventSourcePolyfill } = require("event-source-polyfill");
// Its heartbeat of 45 s and its waits pass a hundred times as fast: it takes a quiet stream for dead, and comes back.
const later = setTimeout;
globalThis.setTimeout = (action, wait, ...rest) => later(action, wait / 100, ...rest);
const source = new EventSourcePolyfill(process.argv[1]);
for (const name of ["message", "resume"])
  source.addEventListener(name, ({ data }) => console.log(JSON.stringify([name, JSON.parse(data)])));
"""


def test_a_polyfill_resumes_by_itself(server: Server) -> None:
    """event-source-polyfill sets no header when it comes back; it has the position in the URL."""
    command = [node_with("event-source-polyfill"), "-e", POLYFILL, f"{server.url}/events"]
    with subprocess.Popen(command, cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True) as polyfill:
        try:
            assert polyfill.stdout is not None
            eventually(lambda: server.active() == 1)
            [id] = server.publish("one")
            told = (json.loads(line) for line in polyfill.stdout)
            # On a busy machine it has come back before, too.
            [_, notification] = next(each for each in told if each[0] == "message")
            resumed, resume = next(told)
            assert notification["id"] == id
            assert (resumed, resume["data"]) == ("resume", {"position": id, "replayed": 0, "complete": True})
        finally:
            polyfill.kill()


def test_an_empty_last_event_id_counts_as_none(server: Server) -> None:
    """It does not undo the since of the URL, and asks for no resume by itself."""
    first, _ = server.publish("one", "two")
    stream = join(server, f"since={first}", {"Last-Event-ID": ""})
    assert stream.event().data["data"]["replayed"] == 1
    stream = join(server, headers={"Last-Event-ID": ""})
    server.publish("three")
    assert texts(stream.events(1)) == ["three"]


def test_a_stream_is_told_that_its_replay_may_be_incomplete(server: Server) -> None:
    """An id that the log never gave is not complete."""
    stream = join(server, "since=550e8400-e29b-41d4-a716-446655440000")
    assert stream.event().data["data"]["complete"] is False


def test_an_empty_since_tells_the_position(server: Server) -> None:
    """An empty since starts from now, and the position is told."""
    [last] = server.publish("one")
    assert join(server, "since=").event().data["data"] == {"position": last, "replayed": 0, "complete": True}


def test_a_stream_gets_only_notifications_addressed_to_it(server: Server) -> None:
    """A stream gets notifications for its client_id, its user, its topics and everyone."""
    stream = join(server, "client_id=ann&topics=red,blue&user=eve")
    recipients = [
        server.notify("own", clients=["ann"])["recipients"],
        server.notify("bob's", clients=["bob"])["recipients"],
        server.notify("eve's", users=["eve"])["recipients"],
        server.notify("ann's", users=["ann"])["recipients"],
        server.notify("blue", topics=["blue"])["recipients"],
        server.notify("grey", topics=["grey"])["recipients"],
        server.notify("all")["recipients"],
    ]
    assert recipients == [1, 0, 1, 0, 1, 0, 1]
    assert texts(stream.events(4)) == ["own", "eve's", "blue", "all"]


# It counts as a connection.


def test_it_is_in_the_status(server: Server) -> None:
    """/status lists a stream with its client_id and user agent."""
    join(server, "client_id=ann", {"User-Agent": "a browser"})
    [details] = server.read("/status")["connections"]["details"]
    assert (details["client_id"], details["user_agent"]) == ("ann", "a browser")
    assert server.active() == 1


def test_its_notifications_are_counted(start_server: StartServer) -> None:
    """Notifications to a stream count as messages sent, like those to a WebSocket."""
    server = start_server()
    stream = join(server)
    server.publish("one", "two")
    stream.events(2)
    assert server.read("/metrics")["connections"] | {"uptime_seconds": 0} == {
        "active_connections": 1,
        "total_connections": 1,
        "messages_sent": 2,
        "uptime_seconds": 0,
    }


def test_a_client_that_leaves_is_gone(server: Server) -> None:
    """A stream is gone as soon as its connection ends."""
    join(server).leave()
    eventually(lambda: server.active() == 0)


def test_the_limit_counts_streams_and_refuses_them(start_server: StartServer) -> None:
    """503 with Retry-After; a WebSocket is refused for a stream, too."""
    server = start_server("--max-connections", "1")
    join(server)
    assert is_told_when_to_retry(server.get("/events"))
    assert refusal(server) == (503, http_error("system", "Connection limit exceeded: 1/1"))
    assert server.connect().closed() == (1008, "Connection limit exceeded: 1/1")


def test_the_drain_tells_streams(start_server: StartServer) -> None:
    """The system notification, then the shutdown as an event of that name; the server waits until it has left."""
    server = start_server()
    stream = join(server)
    server.drain()
    system, shutdown = stream.events(2)
    assert (system.name, system.data, system.id) == ("message", SYSTEM, system.data["id"])
    assert shutdown == Event("shutdown", SHUTDOWN, None)
    assert server.process.poll() is None
    stream.leave()
    assert server.exit_status() == 0


def test_the_end_of_the_drain_ends_streams(start_server: StartServer) -> None:
    """After shutdown_timeout the stream is over, in good order."""
    server = start_server("--shutdown-timeout", "0.2")
    stream = join(server)
    server.signal()
    *announced, last = stream.rest()
    assert [event.name for event in announced] == ["message", "shutdown"]
    assert last == closed(1001, "Server shutting down")
    assert server.exit_status() == 0


def test_a_draining_server_refuses_streams(start_server: StartServer) -> None:
    """503 with Retry-After."""
    server = start_server()
    server.join()
    server.drain()
    assert is_told_when_to_retry(server.get("/events"))
    assert refusal(server) == (503, http_error("system", naming("shutting down")))


def test_a_stream_that_is_not_read_is_a_slow_consumer(start_server: StartServer) -> None:
    """The stream is closed, does not delay the others, and can resume from the last event it read."""
    server = start_server("--history-size", "20")
    slow, reader = join(server), server.join()
    count = 0
    while server.active() == 2:
        server.publish(str(count), data={"pad": "x" * 60_000})
        count += 1
    assert len(reader.receive_many(count)) == count
    *read, _ = slow.rest()
    assert texts(read) == [str(number) for number in range(len(read))]
    assert "notifyd_slow_consumers_total 1" in server.get("/metrics/prometheus").text
    resumed = join(server, headers={"Last-Event-ID": str(read[-1].id)})
    assert resumed.event().data["data"] | {"position": ""} == {"position": "", "replayed": 20, "complete": False}


def test_a_stream_that_is_not_read_is_told_where_to_resume(start_server: StartServer) -> None:
    """The close of a slow consumer names the id."""
    server = start_server("--history-size", "20")
    slow = join(server)
    while server.active():
        server.publish("big", data={"pad": "x" * 60_000})
    *_, read, last = slow.rest()
    assert last == closed(1008, naming("Slow consumer: ", f"resume with since={read.id}"))


@needs_proc
def test_a_stream_that_takes_no_goodbye_is_aborted(start_server: StartServer) -> None:
    """After a deadline nothing is left of it, though it reads nothing."""
    server = start_server(constants={"connection.CLOSE_DEADLINE_SECONDS": 1})
    stalled = join(server, "client_id=ann")
    line = len(server.stderr)
    server.publish(*["large"] * 250, data={"pad": "x" * 60_000})
    join(server, "client_id=ann")
    assert server.holds(stalled.socket)
    eventually(lambda: not server.holds(stalled.socket))
    with pytest.raises((IncompleteRead, ConnectionResetError)):
        stalled.response.read()
    assert [each for each in server.stderr[line:] if "ERROR" in each] == []


# The owner of a client_id.


def test_a_newcomer_replaces_a_stream(start_server: StartServer) -> None:
    """It cannot be asked whether it is alive, so it gives way at once, to a stream."""
    server = start_server(constants={"heartbeat.PROBE_SECONDS": 60.0})
    old = join(server, "client_id=ann")
    new = join(server, "client_id=ann")
    assert old.rest() == [REPLACED]
    server.publish("for the new")
    assert texts(new.events(1)) == ["for the new"]
    assert server.active() == 1


def test_a_websocket_replaces_a_stream(server: Server) -> None:
    """The newcomer may be of either kind."""
    old = join(server, "client_id=ann")
    client = server.join("ann")
    assert old.rest() == [REPLACED]
    assert client.ask({"type": "ping"})["type"] == "pong"
    assert server.active() == 1


def test_a_websocket_refuses_a_stream(server: Server) -> None:
    """409, and the WebSocket stays."""
    client = server.join("ann")
    assert refusal(server, "client_id=ann") == (
        409,
        http_error("application", "Client ann is already connected"),
    )
    assert client.ask({"type": "ping"})["type"] == "pong"


def test_a_dead_websocket_gives_way_to_a_stream(server: Server) -> None:
    """A WebSocket that does not answer the probe is dropped, as for a WebSocket newcomer."""
    server.join_bare("ann")
    join(server, "client_id=ann")
    assert server.active() == 1


# Refused.


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("client_id=not%20an%20id", naming("client_id")),
        ("since=x", naming("since")),
        ("topics=a,,b", naming("topics")),
        (f"topics={'x' * 129}", naming("topics", "128")),
        (f"topics={','.join(map(str, range(101)))}", naming("topics", "100")),
    ],
)
def test_a_bad_parameter_is_refused(server: Server, query: str, message: object) -> None:
    """400, and nobody is admitted."""
    before = server.read("/health")["connections"]["total"]
    assert refusal(server, query) == (400, http_error("validation", message))
    assert server.read("/health")["connections"]["total"] == before


def test_a_bad_last_event_id_is_refused(server: Server) -> None:
    """A bad Last-Event-ID is refused in the same words as a bad since."""
    assert refusal(server, **{"Last-Event-ID": "x"}) == invalid("since")


def test_head_admits_nobody(server: Server) -> None:
    """It answers the headers and is over."""
    before = server.read("/health")["connections"]["total"]
    response = server.request("HEAD", "/events")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["Cache-Control"] == "no-store, no-transform"
    assert server.read("/health")["connections"]["total"] == before


def test_other_methods_are_not_allowed(server: Server) -> None:
    """The answer is the documented body and names the methods that are allowed."""
    response = server.request("POST", "/events")
    assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")


def test_a_stream_says_that_its_connection_ends_with_it(server: Server) -> None:
    """A pool of connections would send its next request on it, and lose that."""
    stream = server.raw(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"\r\nconnection: close\r\n" in read_until(stream, b"welcome").lower()
