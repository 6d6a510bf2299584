"""Clients of Server-Sent Events that people use: a browser, npm packages and PyPI packages, against the real server."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Tab
from conftest import StartServer
from processes import ROOT, Server, environment, eventually, free_port, node_with
from ws_clients import PATIENCE

pytestmark = pytest.mark.slow

NAMES = '["welcome", "resume", "position", "message", "shutdown", "closed"]'
FOLLOW = f"""
function follow(source, tell) {{
  for (const name of {NAMES})
    source.addEventListener(name, (event) => tell([name, event.data ?? null, event.lastEventId]));
  source.onerror = () => tell(["state", source.readyState, null]);
}}
"""
PRINT = "(line) => console.log(JSON.stringify(line))"
NODE = {
    "eventsource": f"""{FOLLOW}
const {{ EventSource }} = require("eventsource");
follow(new EventSource(process.argv[1]), {PRINT});
""",
    "event-source-polyfill": f"""{FOLLOW}
const {{ EventSourcePolyfill }} = require("event-source-polyfill");
follow(new EventSourcePolyfill(process.argv[1]), {PRINT});
""",
}
PYTHON = {
    "httpx_sse": """
import json, sys, httpx, httpx_sse
with httpx.Client(timeout=30, trust_env=False) as client, httpx_sse.connect_sse(client, "GET", sys.argv[1]) as source:
    for event in source.iter_sse():
        print(json.dumps([event.event, event.data, event.id]), flush=True)
""",
    "sseclient": """
import json, sys, httpx, sseclient
headers = {"Accept": "text/event-stream"}
with httpx.stream("GET", sys.argv[1], headers=headers, timeout=30, trust_env=False) as response:
    for event in sseclient.SSEClient(response.iter_bytes()).events():
        print(json.dumps([event.event, event.data, event.id]), flush=True)
""",
}

# The name of an event or "state", its data, and the id that the client would come back with.
Told = list[Any]


class Program:
    """A client in a process, which prints each event as a line."""

    def __init__(self, *command: str) -> None:
        self._process = subprocess.Popen(
            command, cwd=ROOT / "tests", env=environment(), stdout=subprocess.PIPE, text=True
        )
        self._told: queue.Queue[Told] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._told.put(json.loads(line))

    def next(self) -> Told:
        return self._told.get(timeout=2 * PATIENCE)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()


class Page:
    """A browser's EventSource, on a page of the server's own origin."""

    def __init__(self, tab: Tab, url: str) -> None:
        self._tab = tab
        self._read = 0
        eventually(lambda: tab.evaluate("document.body.innerText.includes('alive')"))
        tab.evaluate(f"{FOLLOW} told = []; follow(new EventSource({json.dumps(url)}), (line) => told.push(line)); 1")

    def next(self) -> Told:
        eventually(lambda: self._tab.evaluate(f"told.length > {self._read}"), 2 * PATIENCE)
        self._read += 1
        return list(self._tab.evaluate(f"told[{self._read - 1}]"))

    def stop(self) -> None:
        self._tab.stop()


Client = Program | Page
Open = Callable[..., Client]


def opened(request: pytest.FixtureRequest, kind: str, server: Server, query: str) -> Client:
    url = f"{server.url}/events?{query}"
    if kind == "chromium":
        browser: Browser = request.getfixturevalue("browser")
        return Page(browser.open(f"{server.url}/health/live"), url)
    if kind in NODE:
        return Program(node_with(kind), "-e", NODE[kind], url)
    if importlib.util.find_spec(kind) is None:
        reason = f"{kind} is not installed"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return Program(sys.executable, "-c", PYTHON[kind], url)


def opener(request: pytest.FixtureRequest) -> Iterator[Open]:
    clients: list[Client] = []

    def start(server: Server, query: str = "") -> Client:
        clients.append(opened(request, request.param, server, query))
        return clients[-1]

    yield start
    for client in clients:
        client.stop()


follow = pytest.fixture(opener, params=["chromium", *NODE, *PYTHON])
follow_for_ever = pytest.fixture(opener, params=["chromium", *NODE])


def event(client: Client, name: str) -> Told:
    """Wait for an event of this name; every event before it must have data."""
    while (told := client.next())[0] != name:
        assert told[0] == "state" or told[1], f"an event without data: {told}"
    return told


def test_every_event_has_data_and_an_id(start_server: StartServer, follow: Open) -> None:
    """Heartbeats make no event, and the client knows its position before and behind each notification."""
    server = start_server("--ping-interval", "0.1")
    [first] = server.publish("before")
    client = follow(server, "client_id=ann")
    assert event(client, "welcome")[2] == first
    time.sleep(0.5)  # Some heartbeats, which must not be events.
    [for_bob] = server.publish("for bob", clients=["bob"])
    assert event(client, "position")[2] == for_bob
    [last] = server.publish("for all")
    _, data, id = event(client, "message")
    assert (json.loads(data)["data"]["message"], id) == ("for all", last)


def test_a_stream_in_gzip_is_read_as_it_comes(start_server: StartServer, follow: Open) -> None:
    """By the clients that ask for it, each notification before the next is published; the others get it as it is."""
    server = start_server("--compression", "auto")
    client = follow(server)
    event(client, "welcome")
    for number in range(3):
        server.publish(str(number), data={"text": "long enough " * 40})
        assert json.loads(event(client, "message")[1])["data"]["message"] == str(number)


def test_a_client_that_received_nothing_misses_nothing(
    start_server: StartServer, follow_for_ever: Open, tmp_path: Path
) -> None:
    """The server dies, and another has a notification when the client comes back by itself."""
    flags, port = ("--store", f"sqlite:{tmp_path}/log.db"), str(free_port())
    first, other = start_server(*flags, "--port", port), start_server(*flags)
    client = follow_for_ever(first)
    event(client, "welcome")
    first.signal(signal.SIGKILL)
    first.exit_status()
    other.publish("meanwhile")
    start_server(*flags, "--port", port)
    assert json.loads(event(client, "resume")[1])["data"]["complete"] is True
    assert json.loads(event(client, "message")[1])["data"]["message"] == "meanwhile"


def test_a_full_server_is_tried_again(start_server: StartServer, follow_for_ever: Open) -> None:
    """The refusal is told to the page, and the client is in as soon as there is room."""
    server = start_server("--max-connections", "1")
    place = server.join()
    client = follow_for_ever(server)
    assert json.loads(event(client, "closed")[1]) == {"code": 1008, "reason": "Connection limit exceeded: 1/1"}
    place.leave()
    event(client, "welcome")


def test_a_replaced_stream_stays_away(start_server: StartServer, follow_for_ever: Open) -> None:
    """Of two pages with one client_id the second stays, and the first gives up."""
    server = start_server()
    first = follow_for_ever(server, "client_id=ann")
    event(first, "welcome")
    second = follow_for_ever(server, "client_id=ann")
    event(second, "welcome")
    assert json.loads(event(first, "closed")[1])["reason"] == "Replaced by a new connection"
    while (told := first.next())[:2] != ["state", 2]:
        assert told[0] == "state", f"it came back: {told}"
    server.publish("still here")
    assert event(second, "message")
    assert server.read("/health")["connections"]["total"] == 2


def test_a_mistake_is_final(server: Server, follow_for_ever: Open) -> None:
    """The client does not try for ever what can never succeed."""
    client = follow_for_ever(server, "since=x")
    assert client.next()[:2] == ["state", 2]
