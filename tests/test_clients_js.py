"""The JavaScript client in pages: one connection for many tabs, and what a browser does to a page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
from browser import Browser
from conftest import StartServer
from processes import Server, eventually
from ws_clients import PATIENCE

pytestmark = pytest.mark.slow

SECRET = "a secret of 32 characters or more"


class Page:
    """A tab at the server's own origin with a client."""

    def __init__(self, browser: Browser, server: Server, options: str = "") -> None:
        self.tab = browser.open(f"{server.url}/health/live")
        eventually(lambda: self.evaluate("location.origin + document.readyState") == f"{server.url}complete")
        self.evaluate(f"""
            window.said = [], window.states = [], window.told = [], window.failed = [];
            window.onerror = (text) => failed.push(text);
            window.onunhandledrejection = ({{ reason }}) => failed.push(String(reason));
            import("/client.js").then(({{ NotifydClient }}) => (window.client = new NotifydClient("/ws", {{
                onNotification: ({{ data }}) => void said.push(data.message),
                onMessage: ({{ type }}) => void told.push(type),
                onState: (state, {{ reason }}) => void states.push(reason ? `${{state}}: ${{reason}}` : state),
                {options}
            }})));
            1
        """)

    def evaluate(self, expression: str) -> Any:
        return self.tab.evaluate(expression)

    def wait_until(self, condition: str) -> None:
        eventually(lambda: self.evaluate(condition), 2 * PATIENCE)

    @property
    def said(self) -> list[str]:
        return list(self.evaluate("said"))

    @property
    def states(self) -> list[str]:
        return list(self.evaluate("states"))


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    pages: list[Page] = []

    def start(server: Server, options: str = "", *, until: str = "client.state === 'open'") -> Page:
        pages.append(Page(browser, server, options))
        pages[-1].wait_until(until)
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
    [client] = clients(server)
    assert client["topics"] == ["t0", "t1", "t2"]
    for topic in ("t2", "t1", "t0", "t7"):
        server.notify(topic, topics=[topic])
    server.notify("all")
    for number, page in enumerate(pages):
        page.wait_until("said.includes('all')")
        assert page.said == [f"t{number}", "all"]


def test_a_tab_changes_its_topics_and_no_others(server: Server, open_page: OpenPage) -> None:
    """A topic that another tab follows too stays subscribed to."""
    first, second = open_page(server, "shared: true, topics: ['a']"), open_page(server, "shared: true")
    for page in (first, second):
        page.evaluate("client.subscribe('b').then(() => states.push('subscribed')); 1")
        page.wait_until("states.at(-1) === 'subscribed'")
    second.evaluate("client.unsubscribe('b').then(() => states.push('unsubscribed')); 1")
    second.wait_until("states.at(-1) === 'unsubscribed'")
    assert clients(server)[0]["topics"] == ["a", "b"]
    server.notify("b", topics=["b"])
    server.notify("all")
    for page, said in ((first, ["b", "all"]), (second, ["all"])):
        page.wait_until("said.includes('all')")
        assert page.said == said


@pytest.mark.parametrize("end", ["stop", "crash"])
def test_a_tab_that_ends_hands_over_without_loss(server: Server, browser: Browser, end: str) -> None:
    """The next tab resumes after the last message that it has heard; its topics are subscribed to, and no others."""
    pages = [Page(browser, server, f"shared: true, topics: ['t{number}']") for number in range(3)]
    for page in pages:
        page.wait_until("client.state === 'open'")
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
        page.wait_until("said.includes('end')")
        assert page.said == [*said, "end"]
        page.tab.stop()


def test_a_tab_may_resume_from_earlier_than_the_others(server: Server, open_page: OpenPage) -> None:
    """The others get nothing twice."""
    first = open_page(server, "shared: true")
    for text in ("one", "two"):
        server.notify(text)
    first.wait_until("said.length === 2")
    since = server.read("/notifications?order=desc&limit=2")["notifications"][1]["id"]
    second = open_page(server, f"shared: true, since: {json.dumps(since)}")
    server.notify("three")
    for page in (first, second):
        page.wait_until("said.includes('three')")
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
    pages[2].wait_until("states.at(-1) === 'Not allowed: topic b'")
    server.notify("for alice", users=["alice"])
    server.notify("all")
    for page, said in zip(pages, (["for alice", "all"], ["all"], ["for alice", "all"]), strict=True):
        page.wait_until("said.includes('all')")
        assert page.said == said


def test_a_client_that_is_put_out_is_put_out_of_all_tabs(server: Server, open_page: OpenPage) -> None:
    """For good, with the admin's own reason."""
    pages = [open_page(server, "shared: true, clientId: 'page'") for _ in range(3)]
    assert server.request("DELETE", "/clients/page", json={"reason": "Go away"}).status_code == 200
    for page in pages:
        page.wait_until("client.state === 'closed'")
        assert page.states[-1] == "closed: Go away"
    # The last of them gives up the lead when the others have heard.
    held = "navigator.locks.query().then(({ held }) => (window.held = held.length)), window.held"
    pages[0].wait_until(f"({held}) === 0")
    assert clients(server) == []
    assert len([state for page in pages for state in page.states if state == "open"]) == 3


def test_a_tab_that_closes_its_client_leaves_the_others_connected(server: Server, open_page: OpenPage) -> None:
    pages = [open_page(server, "shared: true") for _ in range(2)]
    pages[0].evaluate("client.close()")
    pages[1].wait_until("states.length > 2 && client.state === 'open'")
    server.notify("hi")
    pages[1].wait_until("said.includes('hi')")
    assert (pages[0].said, pages[0].states[-1]) == ([], "closed")


def test_tabs_come_back_after_the_server_was_away(start_server: StartServer, open_page: OpenPage) -> None:
    first = start_server()
    pages = [open_page(first, "shared: true") for _ in range(2)]
    first.kill()
    for page in pages:
        page.wait_until("client.state === 'waiting'")
    second = start_server("--port", str(first.port))
    for page in pages:
        page.wait_until("client.state === 'open'")
    second.notify("again")
    for page in pages:
        page.wait_until("said.includes('again')")


# A page on its own.


def test_a_page_that_hears_of_a_network_connects_at_once(start_server: StartServer, open_page: OpenPage) -> None:
    """It does not wait for the end of its delay; once it is connected it asks whether the server is there."""
    first = start_server()
    page = open_page(first)
    page.evaluate("const random = Math.random; Math.random = () => 50; 1")  # seconds until its next attempt
    first.kill()
    page.wait_until("client.state === 'waiting'")
    start_server("--port", str(first.port))
    page.evaluate("dispatchEvent(new Event('online')); 1")
    page.wait_until("client.state === 'open'")
    page.evaluate("dispatchEvent(new Event('online')); 1")
    page.wait_until("told.includes('pong')")


def test_a_token_is_renewed_before_it_expires(start_server: StartServer, open_page: OpenPage) -> None:
    """A function gives the tokens: no connection ends, and none is opened, for a new one."""
    server = start_server("--jwt-secret", SECRET, "--api-key", "ci:a-key")
    server.http.headers["X-API-Key"] = "a-key"
    now = int(time.time())
    tokens = [jwt.encode({"sub": "alice", "exp": now + seconds}, SECRET) for seconds in (4, 3600)]
    page = open_page(server, f"token: () => {json.dumps(tokens)}[window.asked = (window.asked ?? -1) + 1]")
    page.wait_until("told.includes('authenticated')")
    server.notify("hi")
    page.wait_until("said.includes('hi')")
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
    page.wait_until("said.includes('3')")
    assert page.said == ["1", "2", "3"]
    assert page.evaluate("told.join()") == "message,message,one"


@pytest.mark.parametrize("options", ["topics: ['a,b']", "topics: [' ']", "topics: [1]", "ack: true"])
def test_bad_options_are_refused(server: Server, open_page: OpenPage, options: str) -> None:
    """With a clear error."""
    page = open_page(server)
    page.evaluate(f"""import("/client.js").then(({{ NotifydClient }}) => new NotifydClient("/ws", {{ {options} }}))
        .catch(({{ message }}) => said.push(message)); 1""")
    page.wait_until("said.length === 1")
    assert page.said[0].startswith(("topics: expected names", "ack needs a clientId"))
