"""The JavaScript client in pages: one connection for many tabs, and what a browser does to a page."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from browser import Browser
from conftest import StartServer
from pages import Page
from processes import ROOT, Server, eventually, free_port, node_with
from scripted import BUSY, HANG_UP, SENT, Reply, ScriptedHttp
from ws_clients import PATIENCE

pytestmark = pytest.mark.slow

SECRET = "a secret of 32 characters or more"


OpenPage = Callable[..., Page]


def page_of(browser: Browser, server: Server, options: str) -> Page:
    """Open a page of the server's own origin."""
    return Page(browser, f"{server.url}/health/live", "/ws", options)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    pages: list[Page] = []

    def start(server: Server, options: str = "", *, until: str = "client.state === 'open'") -> Page:
        pages.append(page_of(browser, server, options))
        pages[-1].until(until)
        return pages[-1]

    yield start
    failed = [page.evaluate("failed") for page in pages]
    for page in pages:
        page.tab.stop()
    assert not any(failed), failed


def clients(server: Server) -> list[dict[str, Any]]:
    return list(server.read("/clients")["clients"])


# One connection for all tabs.


def test_tabs_share_one_connection(server: Server, open_page: OpenPage) -> None:
    """Each tab gets what is for everyone, and what is for its own topics."""
    pages = [open_page(server, f"shared: true, topics: ['t{number}']") for number in range(3)]
    eventually(lambda: [client["topics"] for client in clients(server)] == [["t0", "t1", "t2"]])
    for topic in ("t2", "t1", "t0", "t7"):
        server.notify(topic, topics=[topic])
    server.notify("all")
    for number, page in enumerate(pages):
        page.until("said.includes('all')")
        assert page.said == [f"t{number}", "all"]


def test_a_tab_changes_its_topics_and_no_others(server: Server, open_page: OpenPage) -> None:
    """A topic that another tab follows too stays subscribed to."""
    first, second = open_page(server, "shared: true, topics: ['a']"), open_page(server, "shared: true")
    for page in (first, second):
        page.evaluate("client.subscribe('b').then(() => states.push('subscribed')); 1")
        page.until("states.at(-1) === 'subscribed'")
    second.evaluate("client.unsubscribe('b').then(() => states.push('unsubscribed')); 1")
    second.until("states.at(-1) === 'unsubscribed'")
    assert clients(server)[0]["topics"] == ["a", "b"]
    server.notify("b", topics=["b"])
    server.notify("all")
    for page, said in ((first, ["b", "all"]), (second, ["all"])):
        page.until("said.includes('all')")
        assert page.said == said


@pytest.mark.parametrize("end", ["stop", "crash"])
def test_a_tab_that_ends_hands_over_without_loss(server: Server, browser: Browser, end: str) -> None:
    """The next tab resumes after the last message that it has heard; its topics are subscribed to, and no others."""
    pages = [page_of(browser, server, f"shared: true, topics: ['t{number}']") for number in range(3)]
    for page in pages:
        page.until("client.state === 'open'")
    sent = 0
    before = clients(server)
    getattr(pages[0].tab, end)()
    while (now := clients(server)) == before or not now:
        sent += 1
        server.notify(f"{sent}")
        server.notify(f"t2 {sent}", topics=["t2"])
    eventually(lambda: [client["topics"] for client in clients(server)] == [["t1", "t2"]], 2 * PATIENCE)
    server.notify("end")
    numbers = [f"{number}" for number in range(1, sent + 1)]
    both = [text for number in numbers for text in (number, f"t2 {number}")]
    for page, said in ((pages[1], numbers), (pages[2], both)):
        page.until("said.includes('end')")
        assert page.said == [*said, "end"]
        page.tab.stop()


def test_a_tab_may_resume_from_earlier_than_the_others(server: Server, open_page: OpenPage) -> None:
    """The others get nothing twice."""
    first = open_page(server, "shared: true")
    for text in ("one", "two"):
        server.notify(text)
    first.until("said.length === 2")
    since = server.read("/notifications?order=desc&limit=2")["notifications"][1]["id"]
    second = open_page(server, f"shared: true, since: {json.dumps(since)}")
    server.notify("three")
    for page in (first, second):
        page.until("said.includes('three')")
    assert (first.said, second.said) == (["one", "two", "three"], ["two", "three"])
    assert len(clients(server)) == 1


def test_a_tab_with_a_bad_since_is_closed_and_the_others_stay(server: Server, open_page: OpenPage) -> None:
    first = open_page(server, "shared: true")
    second = open_page(server, "shared: true, since: '18'", until="client.state === 'closed'")
    assert second.states[-1] == "closed: Invalid since"
    assert first.states[-1] == "open"


def test_tabs_of_two_users_share_nothing(start_server: StartServer, open_page: OpenPage) -> None:
    """With another token a tab has a connection of its own, and topics that its token does not allow stay out."""
    server = start_server("--jwt-secret", SECRET, "--api-key", "ci:a-key")
    server.http.headers["X-API-Key"] = "a-key"
    tokens = [jwt.encode({"sub": user, "topics": ["a"]}, SECRET) for user in ("alice", "bob", "alice")]
    pages = [open_page(server, f"shared: true, token: {json.dumps(token)}") for token in tokens]
    assert sorted(client["user"] for client in clients(server)) == ["alice", "bob"]
    pages[2].evaluate("client.subscribe('b').catch(({ message }) => states.push(message)); 1")
    pages[2].until("states.at(-1) === 'Not allowed: topic b'")
    server.notify("for alice", users=["alice"])
    server.notify("all")
    for page, said in zip(pages, (["for alice", "all"], ["all"], ["for alice", "all"]), strict=True):
        page.until("said.includes('all')")
        assert page.said == said


def test_a_client_that_is_put_out_is_put_out_of_all_tabs(server: Server, open_page: OpenPage) -> None:
    """For good."""
    pages = [open_page(server, "shared: true, clientId: 'page'") for _ in range(3)]
    assert server.request("DELETE", "/clients/page", json={"reason": "Disconnected: go away"}).status_code == 200
    for page in pages:
        page.until("client.state === 'closed'")
        assert page.states[-1] == "closed: Disconnected: go away"
    # The last of them gives up the lead when the others have heard.
    held = "navigator.locks.query().then(({ held }) => (window.held = held.length)), window.held"
    pages[0].until(f"({held}) === 0")
    assert clients(server) == []
    assert len([state for page in pages for state in page.states if state == "open"]) == 3


def test_a_tab_that_closes_its_client_leaves_the_others_connected(server: Server, open_page: OpenPage) -> None:
    pages = [open_page(server, "shared: true") for _ in range(2)]
    pages[0].evaluate("client.close()")
    pages[1].until("states.length > 2 && client.state === 'open'")
    server.notify("hi")
    pages[1].until("said.includes('hi')")
    assert (pages[0].said, pages[0].states[-1]) == ([], "closed")


def test_tabs_come_back_after_the_server_was_away(start_server: StartServer, open_page: OpenPage) -> None:
    port = ("--port", str(free_port()))
    first = start_server(*port)
    pages = [open_page(first, "shared: true") for _ in range(2)]
    first.kill()
    for page in pages:
        page.until("client.state === 'waiting'")
    second = start_server(*port)
    for page in pages:
        page.until("client.state === 'open'")
    second.notify("again")
    for page in pages:
        page.until("said.includes('again')")


# A page on its own.


def test_a_page_that_hears_of_a_network_connects_at_once(start_server: StartServer, open_page: OpenPage) -> None:
    """It does not wait for the end of its delay; once it is connected it asks whether the server is there."""
    port = ("--port", str(free_port()))
    first = start_server(*port)
    page = open_page(first)
    page.evaluate("const random = Math.random; Math.random = () => 50; 1")  # seconds until its next attempt
    first.kill()
    page.until("client.state === 'waiting'")
    start_server(*port)
    page.evaluate("dispatchEvent(new Event('online')); 1")
    page.until("client.state === 'open'")
    page.evaluate("dispatchEvent(new Event('online')); 1")
    page.until("told.includes('pong')")


def test_a_token_is_renewed_before_it_expires(start_server: StartServer, open_page: OpenPage) -> None:
    """A function gives the tokens: no connection ends, and none is opened, for a new one."""
    server = start_server("--jwt-secret", SECRET, "--api-key", "ci:a-key")
    server.http.headers["X-API-Key"] = "a-key"
    now = int(time.time())
    tokens = [jwt.encode({"sub": "alice", "exp": now + seconds}, SECRET) for seconds in (9, 3600)]
    page = open_page(server, f"token: () => {json.dumps(tokens)}[window.asked = (window.asked ?? -1) + 1]")
    page.until("told.includes('authenticated')")
    server.notify("hi")
    page.until("said.includes('hi')")
    assert page.states == ["connecting", "open"]


def test_a_new_token_is_asked_for_after_a_refusal(start_server: StartServer, open_page: OpenPage) -> None:
    """The refusal is final when there is no other."""
    server = start_server("--jwt-secret", SECRET)
    good = jwt.encode({"sub": "alice"}, SECRET)
    page = open_page(server, f"token: async () => (window.asked = (window.asked ?? 0) + 1) === 1 ? 'bad' : '{good}'")
    assert page.states == ["connecting", "waiting: Invalid token", "connecting", "open"]
    page = open_page(server, "token: async () => 'bad'", until="client.state === 'closed'")
    assert page.states == ["connecting", "waiting: Invalid token", "connecting", "closed: Invalid token"]


def test_a_handler_that_throws_holds_up_nothing(server: Server, open_page: OpenPage) -> None:
    """Its errors are reported, and the next notification comes; so with promises, one after the other."""
    page = open_page(
        server,
        """onError: ({ message }) => told.push(message), onMessage: () => { throw new Error("message"); },
        onNotification: async ({ data }) => {
            await new Promise((resolve) => setTimeout(resolve, data.message === "1" ? 50 : 0));
            said.push(data.message);
            if (data.message === "1") throw new Error("one");
        }""",
    )
    for text in ("1", "2", "3"):
        server.notify(text)
    page.until("said.includes('3')")
    assert page.said == ["1", "2", "3"]
    assert page.evaluate("told.join()") == "message,message,one"


# Acknowledgements.

HANDLER = """clientId: "page", ack: true, onError: ({ message }) => told.push(message),
    onNotification: ({ data: { message } }) => {
        said.push(message);
        if (window.breaks === message) throw new Error(`failed ${message}`);
        if (window.holds === message) return new Promise((resolve, reject) => (window.end = { resolve, reject }));
    }"""


def unacknowledged(server: Server) -> list[str]:
    found = server.read("/notifications?since=acked&client_id=page")["notifications"]
    return [each["data"]["message"] for each in found]


def test_a_page_acknowledges_what_its_handler_is_done_with(start_server: StartServer, open_page: OpenPage) -> None:
    """Not before its promise is fulfilled. Another page goes on from there."""
    server = start_server()
    page = open_page(server, HANDLER)
    page.evaluate("window.holds = 'two'")
    for text in ("one", "two", "three"):
        server.notify(text)
    page.until("window.end !== undefined")
    eventually(lambda: unacknowledged(server) == ["two", "three"])
    page.evaluate("end.resolve()")
    eventually(lambda: unacknowledged(server) == [])
    page.evaluate("holds = 'four'; end = undefined")
    server.notify("four")
    page.until("end !== undefined")
    page.evaluate("client.close()")
    again = open_page(server, HANDLER)
    server.notify("five")
    again.until("said.includes('five')")
    assert (page.said, again.said) == (["one", "two", "three", "four"], ["four", "five"])


@pytest.mark.parametrize("failure", ["window.breaks = 'two'", "window.holds = 'two'"])
def test_a_page_comes_back_for_a_notification_over_which_its_handler_failed(
    start_server: StartServer, open_page: OpenPage, failure: str
) -> None:
    """And for all after it; those before it do not come again."""
    server = start_server()
    page = open_page(server, HANDLER)
    page.evaluate(failure)
    for text in ("one", "two", "three"):
        server.notify(text)
    page.until("said.includes('two')")
    page.evaluate("breaks = holds = undefined; window.end?.reject(new Error('failed two')); 1")
    page.until("said.includes('three')")
    eventually(lambda: unacknowledged(server) == [])
    assert page.said == ["one", "two", "two", "three"]
    assert page.evaluate("told.includes('failed two')")
    assert "waiting: the handler has failed" in page.states


# Publishing.

PUBLISH = """
    import {{ Notifyd }} from "notifyd-client";
    Math.random = () => 0; // no delay but the one that the server asks for
    const began = performance.now();
    const notifyd = new Notifyd({url}, {{ token: "a-key", attempts: 3 }});
    const shown = ({{ name, status, id, category, message }}) => ({{ name, status, id, category, message }});
    const outcome = await {call}.catch(shown);
    console.log(JSON.stringify({{ outcome, waited: performance.now() - began }}));
"""


def published(node: list[str], npm_package: Path, url: str, call: str) -> Any:
    """Return the outcome of a call in Node.js, and its milliseconds."""
    script = PUBLISH.format(url=json.dumps(url), call=call)
    command = [*node, "--no-warnings", "--input-type=module", "--eval", script]
    ended = subprocess.run(command, cwd=npm_package, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_javascript_publishes(start_server: StartServer, node: list[str], npm_package: Path) -> None:
    """To everyone and to some, with a key of its own; and reads the figures."""
    server = start_server("--api-key", "ci:a-key")
    client = server.join("ann")
    options = '{ type: "alert", data: { priority: "high" }, clients: ["ann"], key: "k1" }'
    for _ in range(2):
        assert (
            published(node, npm_package, f"{server.url}/", f'notifyd.notify("m", {options})')["outcome"]["recipients"]
            == 1
        )
    published(node, npm_package, server.url, 'notifyd.notify("end")')
    received = [client.receive() for _ in range(2)]
    assert [each["data"] for each in received] == [{"message": "m", "priority": "high"}, {"message": "end"}]
    for name in ("health", "metrics", "status"):
        answer = published(node, npm_package, server.url, f"notifyd.{name}()")["outcome"]
        assert answer.keys() == server.request("GET", f"/{name}", headers={"X-API-Key": "a-key"}).json().keys()
    refused = published(node, npm_package, server.url, 'notifyd.notify("")')["outcome"]
    assert (refused["name"], refused["status"], refused["category"]) == ("NotifydError", 400, "validation")
    assert refused["message"].startswith("400 message: ") and refused["id"].startswith("error_")


def test_javascript_tries_again_with_the_same_key(node: list[str], npm_package: Path) -> None:
    """As long as the answer may change, and after the time that the server asks for."""
    later = Reply(429, {"error": {"message": "Later"}}, (("Retry-After", "1"),))
    for replies, outcome in (
        ((later, HANG_UP, SENT), SENT.body),
        ((HANG_UP, BUSY, BUSY), {"name": "NotifydError", "status": 503, "message": "503 Server is shutting down"}),
    ):
        server = ScriptedHttp(*replies)
        found = published(node, npm_package, server.url, 'notifyd.notify("once")')
        server.stop()
        assert found["outcome"].items() >= outcome.items()
        assert len(server.keys) == 3 and len(set(server.keys)) == 1 and server.keys[0]
        assert found["waited"] >= 1000 or later not in replies


# The rest.


@pytest.mark.parametrize("options", ["topics: ['a,b']", "topics: [' ']", "topics: [1]", "ack: true"])
def test_bad_options_are_refused(server: Server, open_page: OpenPage, options: str) -> None:
    """With a clear error."""
    page = open_page(server)
    page.evaluate(f"""import("/client.js").then(({{ NotifydClient }}) => new NotifydClient("/ws", {{ {options} }}))
        .catch(({{ message }}) => said.push(message)); 1""")
    page.until("said.length === 1")
    assert page.said[0].startswith(("topics: expected names", "ack needs a clientId"))


# The package.


def test_the_readme_and_the_types_have_the_same_options() -> None:
    """And the same members."""
    types, readme = ((ROOT / "clients" / "js" / name).read_text() for name in ("client.d.ts", "README.md"))

    def declared(name: str) -> set[str]:
        [body] = re.findall(rf"export (?:interface|class) {name}[^{{]*{{\n(.*?)^}}", types, re.MULTILINE | re.DOTALL)
        return set(re.findall(r"^  (?:readonly )?(\w+)\??[<(:]", body, re.MULTILINE)) - {"constructor"}

    rows = re.findall(r"^\| (`.*?`) \|", readme, re.MULTILINE)
    shown = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert shown == declared("ClientOptions") | declared("NotifydClient")


def test_a_frozen_page_hears_what_came_meanwhile(server: Server, open_page: OpenPage) -> None:
    """As a browser freezes tabs that nobody looks at; the others of its connection go on."""
    pages = [open_page(server, "shared: true") for _ in range(2)]
    pages[1].tab.call("Page.setWebLifecycleState", state="frozen")
    server.notify("meanwhile")
    pages[0].until("said.includes('meanwhile')")
    pages[1].tab.call("Page.setWebLifecycleState", state="active")
    pages[1].until("said.includes('meanwhile')")
    pages[1].until("told.includes('pong')")  # It has asked whether the server is still there.


def test_the_types_are_those_of_the_module(npm_package: Path) -> None:
    """A program with every option and member compiles in strict mode, and one with a misspelt option does not."""
    program = """
        import { Notifyd, NotifydClient, NotifydError, backoff, retryAfter, type Notification } from "notifyd-client";
        const seen: string[] = [];
        const client = new NotifydClient(new URL("ws://localhost:8000/ws"), {
            clientId: "a", user: "alice", topics: ["b"], since: "", token: async () => "t", shared: true,
            onNotification: async ({ id, data }: Notification) => void seen.push(id, data.message),
            onMessage: ({ type, data }) => type === "resume" && data.complete,
            onState: (state, detail) => console.log(state, "delay" in detail && detail.delay.toFixed()),
            onError: console.error, WebSocket,
        });
        const done: Promise<void> = client.subscribe("c").then(() => client.unsubscribe(["c"], "d"));
        client.authenticate("t").catch((error: NotifydError) => error.status);
        const place: string[] = [client.last, client.state, ...client.topics, String(backoff(1) + retryAfter(null))];
        const notifyd = new Notifyd("http://localhost:8000", { token: "t", attempts: 3, fetch });
        notifyd.notify("m", { type: "t", data: {}, topics: [], users: [], clients: [], key: "k" })
            .then(({ recipients }) => recipients.toFixed());
        client.close();
    """
    node_with("typescript")
    tsc = ROOT / "tests" / "node_modules" / ".bin" / "tsc"
    flags = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext", "--types", "--pretty", "false"]

    def compiled(text: str, name: str) -> str:
        path = npm_package / f"{name}.ts"
        path.write_text(text)
        return subprocess.run([tsc, *flags, path], cwd=npm_package, capture_output=True, text=True, check=False).stdout

    assert compiled(program, "right") == ""
    assert "'topic' does not exist" in compiled(program.replace('topics: ["b"]', 'topic: ["b"]'), "wrong")
