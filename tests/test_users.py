"""A user in a browser: tabs and a stream with one token."""

from __future__ import annotations

import json

import pytest
from browser import Browser
from conftest import StartServer
from credentials import SECRET, bearer, token
from processes import eventually

pytestmark = pytest.mark.slow

KEY = "a-key"
# Each evaluates to 1: the answer of a tab must have a form in JSON.
SOCKET = """
    told = []; socket = new WebSocket({url}, ["bearer", {token}]);
    socket.onmessage = ({{ data }}) => told.push(JSON.parse(data).data?.message ?? "welcome"); 1
"""
STREAM = """
    streamed = []; source = new EventSource("/events?token=" + {token});
    source.addEventListener("welcome", () => streamed.push("welcome"));
    source.onmessage = ({{ data }}) => streamed.push(JSON.parse(data).data.message); 1
"""


def test_two_tabs_and_a_stream_with_one_token_receive_the_same(start_server: StartServer, browser: Browser) -> None:
    """All three are clients of the user that the token names."""
    server = start_server("--jwt-secret", SECRET, "--api-key", f"ci:{KEY}")
    shown = json.dumps(token(sub="auth0|5f7c"))
    tabs = [browser.open(f"{server.url}/health/live") for _ in range(2)]
    try:
        for tab in tabs:
            eventually(lambda tab=tab: tab.evaluate("document.body.innerText.includes('alive')"))
            tab.evaluate(SOCKET.format(url=json.dumps(server.ws_url), token=shown))
        tabs[1].evaluate(STREAM.format(token=shown))
        heard = [(tabs[0], "told"), (tabs[1], "told"), (tabs[1], "streamed")]
        for tab, where in heard:
            eventually(lambda tab=tab, where=where: tab.evaluate(where) == ["welcome"])
        for users, recipients in ((["auth0|5f7c"], 3), (["auth0"], 0), (["auth0|5f7c", "bob"], 3)):
            answer = server.post({"message": users[-1], "users": users}, headers=bearer(KEY))
            assert answer.json()["recipients"] == recipients
        for tab, where in heard:
            eventually(lambda tab=tab, where=where: len(tab.evaluate(where)) == 3)
            assert tab.evaluate(where) == ["welcome", "auth0|5f7c", "bob"]
    finally:
        for tab in tabs:
            tab.stop()
