"""The log with --log-format json: an object on each line, from the first to the last, and no secret in any."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime
from typing import Any

import pytest
from conftest import StartServer
from event_stream import Stream
from processes import Server, call, eventually

from answers import REQUEST_ID
from server_logs import JsonFormat


def events(server: Server) -> list[dict[str, Any]]:
    """Return the lines of the log as objects; each line must be one."""
    return [json.loads(line) for line in server.stderr]


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_every_line_is_an_object_with_time_level_and_message(start_server: StartServer, workers: str) -> None:
    """The same events as in the lines for people, also those of the start and of a drain."""
    server = start_server("--log-format", "json", "--log-level", "DEBUG", "--workers", workers)
    server.join("bob")
    server.notify("hi")
    server.join("eve").leave()
    server.stop()
    log = events(server)
    messages = " ".join(event["message"] for event in log)
    for said in ("listens on http://", "Client bob has connected", "Published", "Shutting down"):
        assert said in messages
    assert {"INFO", "DEBUG"} <= {event["level"] for event in log}
    assert all(datetime.fromisoformat(event["time"]).tzinfo for event in log)
    assert all(("process" in event) == (workers == "2") for event in log)


def test_lines_about_a_request_have_its_id(start_server: StartServer) -> None:
    """That of its X-Request-ID, where it has one of a proper form; other requests and later lines have none."""
    server = start_server("--log-format", "json", "--log-level", "DEBUG", "--api-key", "ci:hush")
    key = {"X-API-Key": "hush"}
    for given in ("first", "of another form", "x" * 129, ""):
        server.post({"message": "hi"}, headers=key | {"X-Request-ID": given})
    server.connect("bob", additional_headers={"X-Request-ID": "second"}).receive()
    server.get("/status?token=wrong", headers={"X-Request-ID": "third"})
    eventually(lambda: any("refused" in event["message"] for event in events(server)))
    log = events(server)
    assert [event.get("request_id") for event in log if "Published" in event["message"]] == ["first", None, None, None]
    [connected] = [event for event in log if "bob has connected" in event["message"]]
    [refused] = [event for event in log if "are refused" in event["message"]]
    assert (connected["request_id"], refused["request_id"]) == ("second", "third")
    assert "hush" not in "".join(server.stderr) and "wrong" not in "".join(server.stderr)


def test_the_access_log_has_a_line_for_each_answer(start_server: StartServer) -> None:
    """Also for one that repeats the request before it, and for a stream; never the query, where a token may be."""
    server = start_server(
        "--access-log", "--log-format", "json", "--api-key", "ci:hush", "--trusted-proxies", "127.0.0.1"
    )
    server.http.headers["X-Forwarded-For"] = "10.1.1.1"
    for _ in range(3):
        server.post({"message": "hi"}, headers={"X-API-Key": "hush", "X-Request-ID": "one"})
    server.get("/no%0Awhere?token=hush")
    server.get("/status?token=wrong")
    server.join(query="token=hush")
    Stream(server, "token=hush")
    server.raw(
        b"GET /ws HTTP/1.1\r\nHost: a\r\nOrigin: http://b\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    ).recv(1)
    eventually(lambda: any(event.get("status") == 403 for event in events(server)))
    log = [event for event in events(server) if "seconds" in event]
    assert [(event["address"], event["method"], event["path"], event["status"]) for event in log] == [
        *[("10.1.1.1", "POST", "/notify", 200)] * 3,
        ("10.1.1.1", "GET", r"/no\nwhere", 404),
        ("10.1.1.1", "GET", "/status", 401),
        ("127.0.0.1", "GET", "/ws", 101),
        ("127.0.0.1", "GET", "/events", 200),
        ("127.0.0.1", "GET", "/ws", 403),
    ]
    assert [event.get("request_id") for event in log[:4]] == ["one"] * 3 + [None]
    assert all(0 <= event["seconds"] < 60 for event in log)
    assert "hush" not in "".join(server.stderr) and "wrong" not in "".join(server.stderr)


def test_the_access_log_is_off_by_default_and_has_lines_for_people(start_server: StartServer) -> None:
    silent, server = start_server("--log-level", "DEBUG"), start_server("--access-log")
    for each in (silent, server):
        each.get("/topics")
    assert re.search(r" INFO 127\.0\.0\.1 GET /topics 200 \d+\.\d ms$", server.wait_for_line("GET /topics"))
    assert not any("/topics" in line for line in silent.stderr)


def test_a_mistake_at_the_start_is_an_object_too(server: Server) -> None:
    ended = call("--log-format", "json", "--port", str(server.port), "--ssl-keyfile", "key")
    assert ended.status == 2 and json.loads(ended.stderr)["level"] == "ERROR"
    assert "--ssl-certfile" in json.loads(ended.stderr)["message"]


def test_a_traceback_and_any_text_stay_on_one_line() -> None:
    """With their control characters and half characters escaped."""
    try:
        raise ValueError("line\nbreak")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    token = REQUEST_ID.set("one")
    record = logging.LogRecord("notifyd", logging.ERROR, "", 0, "a %s", ("\n\x1b\ud800",), info)
    line = JsonFormat(names_process=False).format(record)
    REQUEST_ID.reset(token)
    event = json.loads(line)
    assert "\n" not in line and "\x1b" not in line
    assert event["error"].splitlines()[-1] == "break" and event["request_id"] == "one"
