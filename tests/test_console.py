"""The console in a browser, as a person uses it, with an eye on the browser's own console and on axe-core."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browser import Browser
from carriers import host, uvicorn
from conftest import StartServer
from credentials import SECRET, token
from event_stream import Stream
from processes import ROOT, Server, environment, eventually, free_port, node_with, program
from ws_clients import PATIENCE

pytestmark = pytest.mark.slow

PANELS = ["Live", "Publish", "Clients", "History", "Server"]
WIDE, NARROW = (1200, 800), (360, 740)
# Characters that no subprotocol of a WebSocket may have.
KEY = "base64/secret+with=equals=="
KEYED = ("--api-key", f"ops:{KEY}")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37}


class Console:
    """The page in a tab. What it has is asked for by role and name, as a screen reader knows it."""

    def __init__(self, browser: Browser, size: tuple[int, int] = WIDE, *, is_dark: bool = False) -> None:
        self.tab = browser.open("about:blank")
        self.tab.listen()
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.tab.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.tab.call("Emulation.setEmulatedMedia", features=[scheme])

    def go(self, url: str) -> Console:
        self.tab.call("Page.navigate", url=url)
        eventually(lambda: self.evaluate("document.readyState === 'complete'"))
        return self

    def evaluate(self, expression: str) -> Any:
        return self.tab.evaluate(expression)

    def text(self, place: str = "body") -> str:
        """Return the text that is shown at a place."""
        return str(self.evaluate(f"document.querySelector({json.dumps(place)})?.innerText ?? ''"))

    def sees(self, text: str, place: str = "body") -> None:
        eventually(lambda: text in self.text(place), 2 * PATIENCE)

    def _found(self, role: str, name: str) -> list[int]:
        root = self.tab.call("DOM.getDocument", depth=0)["result"]["root"]["nodeId"]
        asked = self.tab.call("Accessibility.queryAXTree", nodeId=root, role=role, accessibleName=name)
        # None while another page is loaded.
        nodes = asked.get("result", {}).get("nodes", ())
        return [node["backendDOMNodeId"] for node in nodes if not node["ignored"]]

    def has(self, role: str, name: str) -> bool:
        """Whether there is an element of this role and name, for everybody."""
        return bool(self._found(role, name))

    def _do(self, role: str, name: str, act: str) -> None:
        eventually(lambda: self._done(role, name, act))

    def _done(self, role: str, name: str, act: str) -> bool:
        """Do it, unless the element is not there, or has just been replaced."""
        found = self._found(role, name)
        resolved = self.tab.call("DOM.resolveNode", backendNodeId=found[0]).get("result") if found else None
        if resolved is None:
            return False
        function = {"objectId": resolved["object"]["objectId"], "functionDeclaration": f"function () {{ {act} }}"}
        self.tab.call("Runtime.callFunctionOn", **function)
        return True

    def click(self, role: str, name: str) -> None:
        self._do(role, name, "this.focus(); this.click()")

    def open(self, panel: str) -> None:
        self.click("tab", panel)
        eventually(lambda: self.has("tabpanel", panel))

    def fill(self, name: str, text: str, role: str = "textbox") -> None:
        """Type a text into the field of this label, in the place of the text that it has."""
        self._do(role, name, "this.focus(); this.select()")
        self.tab.call("Input.insertText", text=text)
        self._do(role, name, "this.dispatchEvent(new Event('change', { bubbles: true }))")

    def press(self, *keys: str, modifiers: int = 0) -> None:
        for key in keys:
            event = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
            self.tab.call("Input.dispatchKeyEvent", type="keyDown", text="\r" * (key == "Enter"), **event)
            self.tab.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def focus(self) -> str:
        return str(self.evaluate("document.activeElement.id || document.activeElement.innerText"))


Open = Callable[..., Console]


@pytest.fixture
def browse(browser: Browser) -> Iterator[Open]:
    """Open a page; when the test has ended, the browser's console has no line."""
    consoles: list[Console] = []

    def open_page(url: str, size: tuple[int, int] = WIDE, *, is_dark: bool = False) -> Console:
        consoles.append(Console(browser, size, is_dark=is_dark))
        return consoles[-1].go(url)

    yield open_page
    lines = [line for console in consoles for line in console.tab.console]
    for console in consoles:
        console.tab.stop()
    assert lines == []


def rows(console: Console, place: str = "#live-list") -> list[str]:
    """Return the messages of a list, the newest first."""
    return list(console.evaluate(f"[...document.querySelectorAll('{place} .message')].map((each) => each.textContent)"))


# The first minute.


def test_a_newcomer_publishes_and_sees_it(server: Server, browse: Open) -> None:
    """Without a word of explanation: the empty page leads to the form, and the form to the notification."""
    console = browse(server.url)
    console.sees("Connected as client_")
    console.click("link", "Publish one")
    assert console.focus() == "publish-message"
    console.fill("Message", "hello <b>world</b>")
    console.click("button", "Publish")
    console.sees("Published. It is for 1 connected client.")
    console.sees("hello <b>world</b>", "#publish-answer")
    console.click("link", "Live")
    eventually(lambda: rows(console) == ["hello <b>world</b>"])


# Live.


def test_live_shows_a_notification_whole(server: Server, browse: Open) -> None:
    """Time, type, topics and message in a row, and its JSON on request; texts stay texts."""
    console = browse(server.url)
    console.fill("Topics", "builds, team.a")
    eventually(lambda: server.read("/topics")["topics"])
    server.notify("<img src=x onerror=alert(1)>", type="<i>", data={"a": ["<script>"]}, topics=["builds", "other"])
    console.sees("<img src=x onerror=alert(1)>", "#live-list")
    row = console.text("#live-list").split("\n")
    assert [part for part in row if part][1:] == ["<i>", "<img src=x onerror=alert(1)>", "builds other"]
    console.evaluate("document.querySelector('#live-list summary').click()")
    console.sees('"<script>"', "#live-list pre")
    assert console.evaluate("document.querySelectorAll('#live-list :is(img, i, script)').length") == 0


def test_a_name_turns_nothing_beside_it(start_server: StartServer, browse: Open) -> None:
    """Characters that nobody sees are written out, wherever a type, topic or user stands, and each name is isolated."""
    server = start_server()
    turned, shown = "a\u202eb\u2066", "a\\u202eb\\u2066"
    server.join(query=f"client_id=phone&user={quote(turned)}&topics={quote(turned)}")
    console = browse(server.url)
    console.fill("Topics", turned)
    eventually(lambda: [topic["clients"] for topic in server.read("/topics")["topics"]] == [2])
    server.notify("hi", type=f"{turned}\x9b\n", topics=[turned], users=[turned], data={"\u202e": "\u200f\x7f"})
    console.sees(f"{shown}\\u009b\\u000a\nhi\n{shown}", "#live-list")
    console.evaluate("document.querySelector('#live-list summary').click()")
    console.sees('"\\u202e": "\\u200f\\u007f"\n', "#live-list pre")
    console.open("Clients")
    console.sees(f"{shown}\tphone", "#clients-table")
    console.evaluate("document.querySelector('[aria-describedby=client-phone]').click()")
    console.sees(f"It belongs to {shown}. It is closed", "#ask-text")
    console.press("Escape")
    console.open("History")
    console.fill("Topics", turned)
    console.click("button", "Show")
    console.sees("1 notification.")
    console.evaluate("document.querySelector('#history-list summary').click()")
    console.sees(f"phone of {shown}", "#history-list")
    assert not re.search("[\u202e\u2066\u200f\x9b]", console.evaluate("document.body.outerHTML"))
    assert console.evaluate("getComputedStyle(document.querySelector('bdi')).unicodeBidi") == "isolate"


def test_live_is_filtered_and_paused(server: Server, browse: Open) -> None:
    """By type, text and topic; nothing that comes during a pause is lost."""
    console = browse(server.url)
    console.fill("Topics", "builds")
    eventually(lambda: server.read("/topics")["topics"])
    server.publish("disk full", type="alert")
    server.publish("build 17", topics=["builds"])
    console.sees("2 notifications")
    console.fill("Type", "ALE")
    console.sees("1 of 2 notifications shown")
    eventually(lambda: rows(console) == ["disk full"])
    console.fill("Type", "")
    console.fill("Text", "17", "searchbox")
    eventually(lambda: rows(console) == ["build 17"])
    console.fill("Text", "", "searchbox")
    console.click("checkbox", "Hide those for everyone")
    eventually(lambda: rows(console) == ["build 17"])
    console.click("checkbox", "Hide those for everyone")
    console.click("button", "Pause")
    server.publish("meanwhile")
    console.sees("Paused: 1 notification waiting")
    assert rows(console) == ["build 17", "disk full"]
    console.click("button", "Pause")
    eventually(lambda: rows(console) == ["meanwhile", "build 17", "disk full"])


def test_live_keeps_a_bounded_list(server: Server, browse: Open) -> None:
    """Ten thousand notifications leave the newest rows, and a few summaries for screen readers."""
    console = browse(server.url)
    console.sees("Connected as client_")
    console.evaluate(
        "const told = () => said++; said = 0;"
        "new MutationObserver(told).observe(document.getElementById('live-said'), { childList: true })"
    )
    for batch in range(10):
        body = [{"message": f"number {batch * 1000 + each}"} for each in range(1000)]
        assert server.request("POST", "/notify/batch", json=body).status_code == 200
    eventually(lambda: (rows(console) or [""])[0] == "number 9999", 4 * PATIENCE)
    console.sees("200 of 2,000 notifications shown")
    assert len(rows(console)) == 200
    assert console.evaluate("said") < 10


def test_live_resumes_and_says_what_it_has_missed(start_server: StartServer, browse: Open, tmp_path: Path) -> None:
    """Notifications of the other process of the store come as soon as the page's own is back."""
    store = ("--store", f"sqlite:{tmp_path / 'notifyd.db'}")
    port = ("--port", str(free_port()))
    first, second = start_server(*store, *port), start_server(*store)
    console = browse(first.url)
    console.sees("Connected as client_")
    first.kill()
    console.sees("The connection is lost")
    second.publish("missed")
    start_server(*store, *port)
    console.sees("1 notification came meanwhile and is here now.")
    eventually(lambda: rows(console) == ["missed"])
    console.sees("Connected as client_")
    # Each attempt to reach the server is a line of the browser's own.
    assert all("net::ERR_CONNECTION" in line for line in console.tab.console)
    console.tab.console.clear()


# Publish.


def test_publish_reaches_topics_users_and_clients(server: Server, browse: Open) -> None:
    """Each field has its clients, and the request is as it was typed, to the last digit."""
    client = server.join("phone", query="client_id=phone&user=alice&topics=builds")
    console = browse(server.url)
    console.open("Publish")
    for name, text in {
        "Message": 'it\'s "quoted"',
        "Type": "alert",
        "Data": '{"big": 9007199254740993,\n "text": "a  b"}',
        "Topics": "builds, none",
        "Users": "alice",
        "Clients": "phone,phone",
    }.items():
        console.fill(name, text)
    console.sees("For those who follow builds, none, and for all clients of alice, and for the client phone.")
    console.click("button", "Publish")
    console.sees("It is for 1 connected client.")
    console.sees("Addressed\n1\nWritten\n1\nAcknowledged\n0\nPending\n0", "#publish-delivery")
    received = client.receive()
    assert received["type"] == "alert"
    assert received["data"] == {"message": 'it\'s "quoted"', "big": 9007199254740993, "text": "a  b"}
    line = console.text("#publish-curl")
    shell, variables = ["sh", "-c", line], environment({"NO_PROXY": "*"})
    ended = subprocess.run(shell, env=variables, capture_output=True, timeout=PATIENCE, check=True)
    assert b'"success"' in ended.stdout
    assert client.receive()["data"] == received["data"]


def test_publish_shows_mistakes_where_they_are(server: Server, browse: Open) -> None:
    """Those of the page before it asks, and those of the server at the field that it names."""
    console = browse(server.url)
    console.open("Publish")
    console.click("button", "Publish")
    console.sees("Write a message", "#publish-message-error")
    assert console.focus() == "publish-message"
    console.fill("Message", "hi")
    console.fill("Data", '{"a": 1,\n "b": [1, 2,]}')
    console.click("button", "Publish")
    console.sees("Line 2, column 12: no comma before ]", "#publish-data-error")
    assert console.text("#publish-data-place").splitlines() == [' "b": [1, 2,]}', "           ^"]
    assert console.focus() == "publish-data"
    assert console.evaluate("[document.activeElement.selectionStart, document.activeElement.ariaInvalid]") == [
        20,
        "true",
    ]
    console.fill("Data", "")
    console.fill("Type", "ping")
    console.click("button", "Publish")
    console.sees("own types", "#publish-type-error")
    assert console.focus() == "publish-type"
    assert "400" in "".join(console.tab.console)
    console.tab.console.clear()


def test_json_is_refused_where_the_browser_refuses_it() -> None:
    """The place of a mistake is the one that V8 names, for texts with one character more, less or another."""
    script = r"""
    import { checkObject } from "./console/json.js";
    const whole = '{"a": [1, -0.5e+3, true, null, {"b": "\\u00e9\\n\\"x"}], "": {}, "c": [[]] }';
      for (let at = 0; at <= whole.length; at++) {
      for (const other of ["", ..."{}[]:,\"\\x0-.e \n\t"]) {
        for (const rest of [at, at + 1]) {
          const text = whole.slice(0, at) + other + whole.slice(rest);
          const refusals = [JSON.parse, checkObject].map((read) => {
            try { return read(text), ""; } catch (error) { return error.message; }
          });
          if (!refusals[0] !== !refusals[1]) throw new Error(`${text}\n${refusals.join("\n")}`);
        }
      }
    }
    for (const text of ['{"a":1} x', '{"\t": 1}', "{'a': 1}", "{a: 1}", '{"a": 01}', "[1]", "", '{"a":\n\n}'])
      try { checkObject(text); } catch ({ line, column, message }) { console.log(line, column, message); }
    """
    ended = subprocess.run(
        [program("node"), "--input-type=module", "-e", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        '1 9 expected nothing behind the object, got "x"',
        "1 3 a text cannot have a line break or a tab: write \\n or \\t",
        '1 2 expected a name in double quotes, got "\'"',
        '1 2 expected a name in double quotes, got "a"',
        '1 8 expected , or }, got "1"',
        '1 1 expected an object, such as {"priority": "high"}, got "["',
        '1 1 expected an object, such as {"priority": "high"}, the text ends',
        '3 1 expected a value, got "}"',
    ]


# Clients.


def test_clients_are_found_and_put_out(server: Server, browse: Open) -> None:
    """The page asks first, and does nothing when the answer is no."""
    alice = server.join(query="client_id=phone&user=alice&topics=builds")
    server.join("other")
    console = browse(server.url)
    console.open("Clients")
    console.sees("3 clients connected")
    console.fill("Text", "ALICE", "searchbox")
    console.sees("1 of 3 clients")
    cells = console.evaluate(
        "[...document.querySelectorAll('#clients-table tbody tr > *')].map((each) => each.innerText)"
    )
    assert cells[0] == "alice" and cells[1].startswith("phone") and cells[2] == "builds" and cells[-1] == "Disconnect"
    console.click("button", "Disconnect")
    eventually(lambda: console.has("dialog", "Disconnect phone?"))
    console.press("Escape")
    eventually(lambda: not console.has("dialog", "Disconnect phone?"))
    assert console.focus() == "Disconnect"
    console.press("Enter")
    eventually(lambda: console.has("dialog", "Disconnect phone?"))
    console.press("Tab", "Enter")
    assert alice.closed() == (1008, "Disconnected")
    console.sees("phone is disconnected.")
    assert console.focus() == "clients-refresh"


def test_a_client_id_that_is_taken_over_shows_its_new_connection(start_server: StartServer, browse: Open) -> None:
    server = start_server("--on-duplicate", "replace", "--trusted-proxies", "127.0.0.1")
    Stream(server, "client_id=phone&user=alice", {"X-Forwarded-For": "10.1.1.1"})
    console = browse(f"{server.url}/#clients")
    console.sees("phone\nstream · 10.1.1.1", "#clients-table")
    server.join(query="client_id=phone&user=bob", additional_headers={"X-Forwarded-For": "10.2.2.2"})
    console.click("button", "Refresh")
    console.sees("phone\nwebsocket · 10.2.2.2", "#clients-table")
    console.evaluate("document.querySelector('[aria-describedby=client-phone]').click()")
    console.sees("It belongs to bob.", "#ask-text")


# History.


def test_history_goes_back_page_by_page(start_server: StartServer, browse: Open) -> None:
    """By topic and user and time, newest first; the focus stays at the place of reading, and a row tells who got it."""
    server = start_server()
    server.join(query="client_id=phone&user=alice")
    server.publish(*(f"number {each}" for each in range(70)))
    server.publish("for builds", topics=["builds"])
    server.publish("for alice", users=["alice"])
    console = browse(f"{server.url}/#history")
    console.sees("50 notifications, and more.")
    assert rows(console, "#history-list")[0] == "number 69"
    console.click("button", "Older")
    console.sees("70 notifications.")
    assert console.evaluate("document.activeElement.innerText").split("\n")[-1].strip() == "number 19"
    console.fill("Topics", "builds")
    console.fill("User", "alice")
    console.click("button", "Show")
    eventually(lambda: rows(console, "#history-list")[:2] == ["for alice", "for builds"])
    console.evaluate("document.querySelector('#history-list summary').click()")
    console.sees("Written\nphone of alice", "#history-list")
    console.evaluate("document.getElementById('history-until').value = '2020-01-01T00:00'")
    console.click("button", "Show")
    console.sees("The log has nothing for these.")
    console.evaluate("document.getElementById('history-until').value = ''")
    console.evaluate("document.getElementById('history-from').value = '2020-01-01T00:00'")
    console.click("button", "Show")
    eventually(lambda: rows(console, "#history-list")[:2] == ["for alice", "for builds"])


# Server.


def test_server_plots_its_figures(server: Server, browse: Open) -> None:
    """The plots have a sentence each, and the settings are those in force."""
    console = browse(f"{server.url}/#server")
    server.publish("hi")
    eventually(lambda: console.has("image", "Clients: now 1, at most 1 in the last 5 minutes"))
    lines = "document.querySelectorAll('.plot path.line[d^=M]').length"
    eventually(lambda: console.evaluate(lines) >= 5, 2 * PATIENCE)
    # How long a publish takes is known once one has come between two readings.
    server.publish("hi again")
    eventually(lambda: console.evaluate(lines) == 6, 2 * PATIENCE)
    assert "running" in console.text("#server-figures")
    assert str(server.port) in console.text("#server-settings")
    eventually(lambda: re.search(r"In memory, with test ones\n[1-9]", console.text("#server-figures")))


def test_the_drain_is_shown_while_it_goes_on(start_server: StartServer, browse: Open) -> None:
    """On every panel, with the clients that are left."""
    server = start_server()
    stays = server.join_bare("stays")
    console = browse(f"{server.url}/#publish")
    console.sees("Connected as client_")
    server.signal()
    console.sees("The server is shutting down: it takes no notifications and no new clients.")
    console.sees("still connected")
    stays.socket.close()
    console.sees("The server does not answer.")
    console.open("Server")
    console.sees("away", "#server-figures")
    assert "answers" not in console.text("#server-figures")
    console.tab.console.clear()


@pytest.mark.parametrize("port", ["main", "internal"])
def test_each_port_shows_its_own_panels(start_server: StartServer, browse: Open, port: str) -> None:
    """The others say where they are."""
    inside = free_port()
    server = start_server("--internal-port", str(inside))
    server.join("phone")
    console = browse(server.url if port == "main" else f"http://127.0.0.1:{inside}/")
    if port == "main":
        console.sees("Connected as client_")
        console.open("Server")
        console.sees("The figures are on a separate port of this server")
        console.open("Clients")
        console.sees("This is on a separate port of the server")
    else:
        console.sees("This is on the main port of the server.")
        console.open("Server")
        console.sees("1 of 1,000", "#server-figures")
        console.open("Clients")
        console.sees("phone", "#clients-table")


# Keys.


def test_a_key_opens_the_page(start_server: StartServer, browse: Open) -> None:
    """Nothing is shown before, and the key stands in no URL; the tab forgets it on request."""
    server = start_server(*KEYED)
    console = browse(server.url)
    eventually(lambda: console.has("textbox", "Key or token"))
    assert not [panel for panel in PANELS if console.has("tab", panel)]
    assert console.tab.console == []
    console.fill("Key or token", "wrong")
    console.press("Enter")
    console.sees("The server does not know this key or token. Type another.")
    assert "401" in "".join(console.tab.console)
    console.tab.console.clear()
    console.fill("Key or token", KEY)
    console.press("Enter")
    console.sees("Connected as client_")
    assert console.focus() == "tab-live"
    server.post({"message": "secret"}, headers={"X-API-Key": KEY})
    eventually(lambda: rows(console) == ["secret"])
    for panel in PANELS:
        console.open(panel)
    assert "needs" not in console.text()
    console.open("Publish")
    assert "$NOTIFYD_KEY" in console.text("#publish-curl")
    assert KEY not in console.evaluate("document.documentElement.outerHTML + location.href")
    urls = console.evaluate("performance.getEntries().map((each) => each.name).join()")
    assert KEY not in urls and quote(KEY, safe="") not in urls
    console.go(f"{server.url}/#history")
    console.evaluate("location.reload()")
    console.sees("secret", "#history-list")
    console.click("button", "Forget key")
    eventually(lambda: console.has("textbox", "Key or token"))
    assert console.evaluate("sessionStorage.length") == 0


def test_a_token_shows_what_it_may(start_server: StartServer, browse: Open) -> None:
    """A refusal says which right is missing."""
    server = start_server("--jwt-secret", SECRET)
    console = browse(server.url)
    eventually(lambda: console.has("textbox", "Key or token"))
    assert console.tab.console == []
    console.fill("Key or token", token(sub="alice", topics=["builds"]))
    console.press("Enter")
    console.sees("of alice")
    console.fill("Topics", "secrets")
    console.sees("Not allowed: topic secrets. Change the topics above.")
    console.fill("Topics", "builds")
    console.sees("of alice")
    console.open("Publish")
    console.fill("Message", "hi")
    console.click("button", "Publish")
    console.sees("Publishing needs a key, or a token with the right “publish”.")
    for panel in ("Clients", "History", "Server"):
        console.open(panel)
        console.sees("a token with the right “admin”.", f"#{panel.lower()}")
    assert all("403" in line for line in console.tab.console)
    console.tab.console.clear()


def test_a_refused_request_says_how_long_to_wait(start_server: StartServer, browse: Open) -> None:
    """The files of the page count for no rate, so it loads whatever the address has asked for."""
    server = start_server("--rate-limit")
    console = browse(f"{server.url}/#publish")
    console.sees("Connected as client_")
    console.fill("Message", "hi")

    def answer() -> str:
        console.click("button", "Publish")
        eventually(lambda: not console.evaluate("document.querySelector('#publish-send').ariaDisabled"))
        return console.text()

    def is_refused() -> bool:
        # On a busy machine the bucket holds a request again by the time of the click.
        while server.get("/topics").status_code != 429:
            pass
        return "Rate limit exceeded: 10 requests a second, 20 at once. Wait 1 s, then try again." in answer()

    eventually(is_refused)
    eventually(lambda: "Published." in answer())
    console.tab.console.clear()


# Where it is.


def test_the_console_works_under_a_mount(browse: Open) -> None:
    """In a host, whose own address without the slash leads there too."""
    server = host(uvicorn, "in_fastapi", prefix="/notifications")
    try:
        console = browse(server.url)
        console.sees("Connected as client_")
        console.open("Publish")
        console.fill("Message", "hello")
        console.click("button", "Publish")
        console.sees("It has arrived here")
        assert "/notifications/notify'" in console.text("#publish-curl")
        for panel in PANELS:
            console.open(panel)
    finally:
        server.kill()


# For everybody.


@pytest.mark.parametrize(("size", "is_dark"), [(WIDE, False), (NARROW, True)], ids=["wide-light", "narrow-dark"])
def test_axe_finds_nothing(server: Server, browse: Open, size: tuple[int, int], is_dark: bool) -> None:
    """On any panel, with something on it; and nothing is wider than the screen."""
    node_with("axe-core")
    axe = (ROOT / "tests" / "node_modules" / "axe-core" / "axe.min.js").read_text()
    server.join(query="client_id=phone&user=alice&topics=builds")
    console = browse(server.url, size, is_dark=is_dark)
    console.sees("Connected as client_")
    server.publish("a longer text " * 20, type="a-long-type-without-a-space" * 2, topics=["builds"])
    server.publish("a longer text " * 20, data={"word": "x" * 300})
    console.sees("1 notification")
    console.evaluate(f"{axe}; 1")
    for panel in PANELS:
        console.open(panel)
        console.evaluate(f"document.querySelector('#{panel.lower()} summary')?.click()")
        if panel == "Publish":
            console.fill("Message", "hi")
            console.fill("Data", "{")
            console.sees("Line 1, column 2")
        found = console.evaluate(
            "axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)]))"
        )
        assert found == [], panel
        assert console.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_an_address_of_a_panel_shows_the_page_from_its_top(server: Server, browse: Open) -> None:
    console = browse(f"{server.url}/#publish", NARROW)
    console.sees("Connected as client_")
    assert console.evaluate("document.documentElement.scrollHeight - innerHeight") > 0
    assert console.evaluate("scrollY") == 0


def test_the_keyboard_reaches_everything(server: Server, browse: Open) -> None:
    """From the top of the page to a published notification."""
    console = browse(server.url)
    console.sees("Connected as client_")
    console.press("Tab")
    assert console.focus() == "Skip to the panel"
    console.press("Tab", "ArrowRight")
    assert console.focus() == "tab-publish"
    console.press("Tab")
    assert console.focus() == "publish-message"
    console.tab.call("Input.insertText", text="by hand")
    console.press("Tab", "Tab", "Tab", "Tab", "Tab", "Tab")
    assert console.focus() == "publish-send"
    console.press("Enter")
    console.sees("It has arrived here")


def test_the_files_say_nothing_about_anybody() -> None:
    """The page is public: it has no address of elsewhere."""
    for path in (ROOT / "console").iterdir():
        assert set(re.findall(r"https?://[^\"]*", path.read_text())) <= {"http://www.w3.org/2000/svg"}, path.name
