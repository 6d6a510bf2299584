"""The log with --log-format json: an object on each line, from the first to the last, and no secret in any."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from typing import Any

import pytest
from conftest import StartServer
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
