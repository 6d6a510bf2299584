"""The clients, from their packages and as the examples use them: against the real server, and scripted ones."""

from __future__ import annotations

import asyncio
import json
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial, partialmethod
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import jwt
import pytest
from browser import Browser
from conftest import StartServer
from notifyd_client import AsyncNotifyd, Notifyd, NotifydError, backoff
from notifyd_client.publishing import retry_after
from notifyd_client.waiting import BASE_SECONDS
from pages import Page
from processes import ROOT, Server, environment, eventually, free_port, node_with
from scripted import BUSY, HANG_UP, REFUSED, SENT, Reply, ScriptedHttp, Site
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve
from ws_clients import PATIENCE

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"
NO_PROXY = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

# As examples/listen.py, without an event loop.
LISTEN_SYNC = """
import json, logging, sys
from notifyd_client import SyncNotifydClient
from websockets.exceptions import WebSocketException
logging.basicConfig(level=logging.INFO, format="%(message)s")
try:
    for notification in SyncNotifydClient(sys.argv[1]):
        print(json.dumps(notification), flush=True)
except WebSocketException as error:
    raise SystemExit(f"refused: {error}")
"""


# The packages, as they are installed.


@pytest.fixture
def oldest(pythons: Callable[..., str]) -> str:
    """With the lowest versions that the extras allow."""
    return pythons("oldest", "[all]", "websockets==14.0", "httpx==0.25.0")


# The programs that listen, told apart by nothing but how they are started and watched.


class Listener(Protocol):
    """A running client."""

    def receive(self) -> str:
        """Wait for the next notification; return its type and message."""

    def wait_until(self, state: str) -> None:
        """Wait until it is "connected", "disconnected" or "refused"."""

    def stop(self) -> None: ...


class Program:
    """A program that prints notifications to stdout and its state to stderr, in a process of its own."""

    def __init__(self, *command: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(NO_PROXY | variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.printed: list[str] = []  # Everything, for the report of a failure.
        self._notifications: queue.Queue[str] = queue.Queue()
        self._states: queue.Queue[str] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self._notifications)),
            threading.Thread(target=self._read, args=(self.process.stderr, self._states)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], lines: queue.Queue[str]) -> None:
        with stream:
            for line in stream:
                self.printed.append(line)
                lines.put(line)

    def _next(self, lines: queue.Queue[str]) -> str:
        try:
            return lines.get(timeout=PATIENCE)
        except queue.Empty:
            pytest.fail(f"not within {PATIENCE} s; it printed:\n{''.join(self.printed)}")

    def receive(self) -> str:
        notification = json.loads(self._next(self._notifications))
        return f"{notification['type']}: {notification['data']['message']}"

    def wait_until(self, state: str) -> None:
        if state == "refused":
            assert self.process.wait(PATIENCE) == 1
            return
        while not re.match(state, self._next(self._states)):
            pass

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join()


STATES = {"connected": "open", "disconnected": "waiting", "refused": "closed"}  # of the JavaScript client


class ListeningPage:
    """The client in a page."""

    def __init__(self, browser: Browser, site: str, url: str) -> None:
        show = "onNotification: ({ type, data }) => void said.push(`${type}: ${data.message}`)"
        self._page = Page(browser, f"{site}/clients/js/client.js", url, show, "/clients/js/client.js")
        self._received = self._states = 0

    def receive(self) -> str:
        self._received += 1
        self._page.until(f"said.length >= {self._received}")
        return self._page.said[self._received - 1]

    def wait_until(self, state: str) -> None:
        """Wait for the next of this kind."""
        found = f"states.findIndex((each, at) => at >= {self._states} && each.startsWith('{STATES[state]}')) + 1"
        self._page.until(f"({found}) > 0")
        self._states = self._page.evaluate(found)

    def stop(self) -> None:
        failed = self._page.evaluate("failed")
        self._page.tab.stop()
        assert not failed


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The origin of a page, which is not the server's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(ROOT))) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


Listen = Callable[[str], Listener]
WAYS = ["listen.py", "sync", "listen.js", "page"]
EVERYWHERE = [*WAYS, "oldest", "deno", "bun"]


@pytest.fixture
def command_of(request: pytest.FixtureRequest) -> Callable[[str], list[str]]:
    """Return the command of a program that listens."""

    def of(way: str) -> list[str]:
        fixture = request.getfixturevalue
        match way:
            case "listen.py":
                return [fixture("python"), str(EXAMPLES / "listen.py")]
            case "oldest":
                return [fixture("oldest"), str(EXAMPLES / "listen.py")]
            case "sync":
                return [fixture("python"), "-c", LISTEN_SYNC]
            case "listen.js":
                runner = fixture("node")
            case _:
                places = {"deno": ["run", "--allow-net", "--allow-env"], "bun": []}
                node_with(way)
                runner = [str(ROOT / "tests" / "node_modules" / ".bin" / way), *places[way]]
        return [*runner, str(fixture("npm_package") / "listen.js")]

    return of


@pytest.fixture(params=WAYS)
def listen(request: pytest.FixtureRequest, command_of: Callable[[str], list[str]]) -> Iterator[Listen]:
    """Run one of the clients on a server's URL."""
    listeners: list[Listener] = []

    def start(url: str) -> Listener:
        if request.param == "page":
            site, browser = request.getfixturevalue("site"), request.getfixturevalue("browser")
            listeners.append(ListeningPage(browser, site, url))
        else:
            listeners.append(Program(*command_of(request.param), url))
        return listeners[-1]

    yield start
    for listener in listeners:
        listener.stop()


# Against the real server.


@pytest.mark.parametrize("listen", EVERYWHERE, indirect=True)
def test_receives_published_notifications(start_server: StartServer, site: str, listen: Listen) -> None:
    server = start_server("--allow-origin", site)
    listener = listen(server.ws_url)
    listener.wait_until("connected")
    server.notify("<b>5 > 4</b> & 'so on' \u2603", type="alert")
    assert listener.receive() == "alert: <b>5 > 4</b> & 'so on' \u2603"


@pytest.mark.parametrize("listen", EVERYWHERE, indirect=True)
def test_comes_back_by_itself_after_the_server_was_killed(start_server: StartServer, site: str, listen: Listen) -> None:
    flags = ("--allow-origin", site, "--port", str(free_port()))
    first = start_server(*flags)
    listener = listen(first.ws_url)
    listener.wait_until("connected")
    first.notify("before")
    assert listener.receive() == "custom: before"
    first.signal(signal.SIGKILL)
    first.exit_status()
    listener.wait_until("disconnected")
    second = start_server(*flags)
    listener.wait_until("connected")
    second.notify("after")
    assert listener.receive() == "custom: after"


def test_leaves_a_server_that_shuts_down(start_server: StartServer, site: str, listen: Listen) -> None:
    server = start_server("--allow-origin", site)
    listener = listen(server.ws_url)
    listener.wait_until("connected")
    server.signal(signal.SIGTERM)
    assert server.exit_status() == 0  # It waits for its clients, by default for half an hour.


@pytest.mark.parametrize("listen", EVERYWHERE, indirect=True)
def test_gives_up_when_the_real_server_refuses_its_id(start_server: StartServer, site: str, listen: Listen) -> None:
    listen(start_server("--allow-origin", site).address("not an id")).wait_until("refused")


def test_a_user_is_put_out_of_all_tabs_for_good(start_server: StartServer, site: str, browser: Browser) -> None:
    """Two tabs and a stream with one token receive what is for the user. One DELETE ends them, and none comes back."""
    secret = "a secret of 32 characters or more"
    server = start_server("--allow-origin", site, "--jwt-secret", secret, "--api-key", "ci:a-key")
    user, ends = "auth0|5f7c", "window.said = [], window.ends = []"
    shown = jwt.encode({"sub": user, "iat": int(time.time())}, secret)
    tabs = [browser.open(f"{site}/clients/js/client.js") for _ in range(3)]
    for tab in tabs:
        eventually(lambda tab=tab: tab.evaluate("document.readyState === 'complete'"))
    options = f"""{{ token: {json.dumps(shown)}, onNotification: ({{ data }}) => said.push(data.message),
        onState: (state, {{ reason }}) => ends.push(reason ? `${{state}}: ${{reason}}` : state) }}"""
    for tab in tabs[:2]:
        tab.evaluate(f"""{ends}; import("/clients/js/client.js").then(({{ NotifydClient }}) =>
            window.client = new NotifydClient({json.dumps(server.ws_url)}, {options})); 1""")
    tabs[2].evaluate(f"""{ends}; window.source = new EventSource({json.dumps(f"{server.url}/events?token={shown}")});
        source.onmessage = ({{ data }}) => said.push(JSON.parse(data).data.message);
        source.addEventListener("closed", ({{ data }}) => ends.push(JSON.parse(data).reason));
        source.onerror = () => ends.push(source.readyState); 1""")
    server.http.headers["X-API-Key"] = "a-key"
    path = f"/users/{quote(user, safe='')}"
    eventually(lambda: server.read(path)["clients"] == 3)
    assert server.notify("for all tabs", users=[user])["recipients"] == 3
    for tab in tabs:
        eventually(lambda tab=tab: tab.evaluate("said.join()") == "for all tabs")
    assert server.request("DELETE", path, json={"revoke": True}).json()["disconnected"] == 3
    for tab in tabs[:2]:
        eventually(lambda tab=tab: tab.evaluate("ends.join()") == "connecting,open,closed: Disconnected")
    # It comes back once after its wait, is refused, and is CLOSED.
    eventually(lambda: tabs[2].evaluate("ends.join()") == "Disconnected,0,2", 2 * PATIENCE)
    assert server.read(path)["clients"] == 0
    for tab in tabs:
        tab.stop()


@pytest.mark.parametrize("way", ["listen.py", "listen.js"])
def test_a_token_does_no_harm_where_none_is_needed(
    start_server: StartServer, command_of: Callable[[str], list[str]], way: str
) -> None:
    """The same client works on a server without authentication."""
    server = start_server()
    program = Program(*command_of(way), server.ws_url, TOKEN="a-key")
    try:
        program.wait_until("connected")
    finally:
        program.stop()


@pytest.mark.parametrize("way", ["listen.py", "listen.js"])
def test_shows_a_token(start_server: StartServer, command_of: Callable[[str], list[str]], way: str) -> None:
    """A token goes in the header, in JavaScript as a subprotocol. Without a token the refusal is final."""
    secret = "a secret of 32 characters or more"
    server = start_server("--jwt-secret", secret, "--api-key", "ci:a-key")
    connected = r"connected as client_\w+ of alice$"
    for variables, state in (({"TOKEN": jwt.encode({"sub": "alice"}, secret)}, connected), ({}, "refused")):
        program = Program(*command_of(way), server.ws_url, **variables)
        try:
            program.wait_until(state)
            if state == connected:
                with Notifyd(server.url, token="a-key") as notifyd:
                    notifyd.notify("for alice", users=["alice"])
                assert program.receive() == "custom: for alice"
        finally:
            program.stop()


def test_python_names_a_user(server: Server, python: str) -> None:
    """Where no token does."""
    program = Program(python, str(EXAMPLES / "listen.py"), server.ws_url, "--user", "auth0|eve")
    try:
        program.wait_until(r"connected as client_\w+ of auth0\|eve$")
    finally:
        program.stop()


@pytest.mark.parametrize(
    ("offered", "outcome"), [(["bearer", "a-token"], ["bearer", "welcome"]), (["json"], [1006]), ([], ["", "welcome"])]
)
def test_a_page_shows_a_token_where_none_is_needed(
    start_server: StartServer, site: str, browser: Browser, offered: list[str], outcome: list[object]
) -> None:
    """Chromium gets the subprotocol that it offered; where it offered only others, it fails with 1006."""
    server = start_server("--allow-origin", site)
    page = browser.open(site)
    script = f"""
        window.outcome = null;
        window.socket = new WebSocket({json.dumps(server.ws_url)}, {json.dumps(offered)});
        socket.onmessage = ({{ data }}) => {{ window.outcome ??= [socket.protocol, JSON.parse(data).type]; }};
        socket.onclose = ({{ code }}) => {{ window.outcome ??= [code]; }};
    """
    try:
        eventually(lambda: page.evaluate("document.readyState + location.origin") == f"complete{site}")
        page.evaluate(f"{{{script}}}")
        eventually(lambda: page.evaluate("outcome"))
        assert page.evaluate("outcome") == outcome
    finally:
        page.stop()


@pytest.mark.parametrize("state", ["connected", "disconnected"])
def test_python_ends_quietly_at_ctrl_c(server: Server, python: str, state: str) -> None:
    """While it listens, and while it waits to try again."""
    url = server.ws_url if state == "connected" else f"ws://127.0.0.1:{free_port()}/ws"
    program = Program(python, str(EXAMPLES / "listen.py"), url)
    try:
        program.wait_until(state)
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(PATIENCE) == 0
    finally:
        program.stop()
    assert "Traceback" not in "".join(program.printed)


# Against a WebSocket server with a script, for messages that the real server sends only after a failure.


class Close(NamedTuple):
    code: int
    reason: str = ""


WELCOME = {"type": "welcome", "client_id": "client_1", "notification_interval": 0}


def identified(position: int) -> str:
    return f"018f{position:04x}-0000-7000-8000-000000000000"


def notification(position: int) -> dict[str, Any]:
    """The notification at this place in the log."""
    return {
        "id": identified(position),
        "type": "custom",
        "timestamp": "2023-12-01T12:00:00.000Z",
        "data": {"message": str(position)},
        "sender": "notification_service",
    }


def resume(position: int, *, complete: bool = True) -> dict[str, Any]:
    return {"type": "resume", "data": {"position": identified(position), "replayed": 0, "complete": complete}}


class Scripted:
    """Plays one script to each connection, in turn: sends the messages, then closes, or listens."""

    def __init__(self, *scripts: Sequence[dict[str, Any] | Close]) -> None:
        self._scripts = iter(scripts)
        self.targets: list[str] = []
        self.queries: list[dict[str, list[str]]] = []
        self.received: queue.Queue[Any] = queue.Queue()
        self._server = serve(self._play, "127.0.0.1", 0, compression=None, ping_interval=None)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}/ws"

    def _play(self, connection: ServerConnection) -> None:
        assert connection.request
        self.targets.append(connection.request.path)
        self.queries.append(parse_qs(urlsplit(connection.request.path).query))
        for step in next(self._scripts):
            if isinstance(step, Close):
                connection.close(*step)
            else:
                connection.send(json.dumps(step))
        try:
            while True:
                self.received.put(json.loads(connection.recv()))
        except ConnectionClosed as closed:
            self.received.put(closed.rcvd and closed.rcvd.code)

    def stop(self) -> None:
        self._server.shutdown()


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(*scripts: Sequence[dict[str, Any] | Close]) -> Scripted:
        servers.append(Scripted(*scripts))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_resumes_after_the_last_notification_and_drops_repetitions(
    scripted: Callable[..., Scripted], listen: Listen
) -> None:
    lost = Close(1008, "Slow consumer: 9 notifications behind; resume with since=...")
    server = scripted(
        [WELCOME, notification(1), notification(2), lost],
        [
            WELCOME,
            resume(2),
            notification(2),
            notification(1),
            notification(3),
            notification(3),
            notification(4),
        ],
    )
    listener = listen(server.url)
    assert [listener.receive() for _ in range(4)] == ["custom: 1", "custom: 2", "custom: 3", "custom: 4"]
    assert [query.get("since") for query in server.queries] == [None, [identified(2)]]


def test_resumes_from_the_log_s_position_before_anything_was_received(
    scripted: Callable[..., Scripted], listen: Listen
) -> None:
    server = scripted([WELCOME, resume(7), Close(1011)], [WELCOME, notification(8)])
    assert listen(server.url).receive() == "custom: 8"
    assert [query.get("since") for query in server.queries] == [None, [identified(7)]]


def test_begins_with_an_empty_since(scripted: Callable[..., Scripted], listen: Listen) -> None:
    """An empty since makes the server tell its position before the first notification."""
    server = scripted([WELCOME, notification(1)])
    assert listen(server.url).receive() == "custom: 1"
    assert server.targets == ["/ws?since="]


def test_resumes_from_the_url_s_since(scripted: Callable[..., Scripted], listen: Listen) -> None:
    server = scripted([WELCOME, notification(8)])
    assert listen(f"{server.url}?since={identified(7)}").receive() == "custom: 8"
    assert server.targets == [f"/ws?since={identified(7)}"]


def test_resumes_from_a_position_that_it_was_told(scripted: Callable[..., Scripted], listen: Listen) -> None:
    """While it receives nothing, that keeps it in the history."""
    told = {"type": "position", "position": identified(9)}
    server = scripted([WELCOME, resume(7), told, Close(1011)], [WELCOME, notification(10)])
    assert listen(server.url).receive() == "custom: 10"
    assert [query.get("since") for query in server.queries] == [None, [identified(9)]]


def test_keeps_its_place_until_another_log_has_told_a_new_one(
    scripted: Callable[..., Scripted], listen: Listen
) -> None:
    """A connection that is lost before the replay must not begin from now on."""
    lost = [WELCOME, resume(2, complete=False), Close(1011)]
    server = scripted([WELCOME, notification(9), Close(1011)], lost, [WELCOME, resume(2), notification(1)])
    listener = listen(server.url)
    assert [listener.receive() for _ in range(2)] == ["custom: 9", "custom: 1"]
    assert [query.get("since") for query in server.queries] == [None, [identified(9)], [identified(9)]]


def test_misses_nothing_that_comes_while_it_is_away(
    start_server: StartServer, site: str, listen: Listen, tmp_path: Path
) -> None:
    """A client that had received nothing before misses nothing either."""
    flags, port = ("--allow-origin", site, "--store", f"sqlite:{tmp_path}/log.db"), str(free_port())
    first, other = start_server(*flags, "--port", port), start_server(*flags)
    listener = listen(first.ws_url)
    listener.wait_until("connected")
    first.signal(signal.SIGKILL)
    first.exit_status()
    other.notify("meanwhile")
    start_server(*flags, "--port", port)
    assert listener.receive() == "custom: meanwhile"


def test_takes_older_ids_from_another_log(scripted: Callable[..., Scripted], listen: Listen) -> None:
    server = scripted(
        [WELCOME, notification(9), Close(1001, "Server shutting down")],
        [WELCOME, resume(2, complete=False), notification(1), notification(2), notification(3)],
    )
    listener = listen(server.url)
    assert [listener.receive() for _ in range(4)] == ["custom: 9", "custom: 1", "custom: 2", "custom: 3"]


def test_answers_pings(scripted: Callable[..., Scripted], listen: Listen) -> None:
    server = scripted([WELCOME, {"type": "ping", "timestamp": "2023-12-01T12:00:00.000Z"}])
    listen(server.url)
    assert server.received.get(timeout=PATIENCE) == {"type": "pong"}


def test_closes_on_shutdown_and_comes_back(scripted: Callable[..., Scripted], listen: Listen) -> None:
    server = scripted([WELCOME, {"type": "shutdown", "message": "Server is shutting down"}], [notification(1)])
    assert listen(server.url).receive() == "custom: 1"
    assert server.received.get(timeout=PATIENCE) == 1000


def test_tries_again_after_a_refusal_that_passes(scripted: Callable[..., Scripted], listen: Listen) -> None:
    full = Close(1008, "Connection limit exceeded: 1000/1000")
    taken = Close(1008, "Client Invalid is already connected")
    assert listen(scripted([full], [taken], [notification(1)]).url).receive() == "custom: 1"


def test_gives_up_after_a_refusal_that_stays(scripted: Callable[..., Scripted], listen: Listen) -> None:
    server = scripted([Close(1008, "Invalid since")])
    listen(server.url).wait_until("refused")
    assert len(server.queries) == 1


# client.js by itself, with the clock and the network in the test's hands.

RunNode = Callable[[str], Any]

FAKES = """
    const timers = [];
    globalThis.setTimeout = (callback) => timers.push(callback);
    globalThis.clearTimeout = () => {};
    const sockets = [];
    class WebSocket {
        readyState = 1;
        sent = [];
        constructor(url) { this.url = url; sockets.push(this); }
        send(text) { this.sent.push(JSON.parse(text)); }
        close() { this.closed = true; }
    }
    const client = new NotifydClient("ws://server/ws", { WebSocket, clientId: "a", user: "e|1", topics: ["b", "c"] });
"""


@pytest.fixture(scope="module")
def run_node(node: list[str]) -> RunNode:
    """Run statements with client.js in scope; return the value of the last line, an expression."""

    def run(script: str) -> Any:
        *statements, result = script.strip().splitlines()
        lines = [
            f"import {{ NotifydClient, backoff }} from {json.dumps((ROOT / 'clients' / 'js' / 'client.js').as_uri())};",
            *statements,
            f"console.log(JSON.stringify({result}));",
        ]
        command = [*node, "--no-warnings", "--input-type=module", "--eval", "\n".join(lines)]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    return run


def test_javascript_asks_for_its_id_user_and_topics(run_node: RunNode) -> None:
    assert run_node(FAKES + "sockets[0].url") == "ws://server/ws?client_id=a&user=e%7C1&topics=b%2Cc&since="


def test_javascript_pings_a_silent_server_and_then_gives_it_up(run_node: RunNode) -> None:
    welcome = "sockets[0].onmessage({ data: JSON.stringify({ type: 'welcome' }) }); "
    waited = "timers.at(-1)(); " * 3  # In silence, for an answer, and to connect again.
    result = run_node(FAKES + welcome + waited + "\n [sockets[0].sent, sockets[0].closed, sockets.length]")
    assert result == [[{"type": "ping"}], True, 2]


def test_javascript_bounds_what_waits_for_a_handler(run_node: RunNode) -> None:
    """With 10,000 messages it closes the connection, and comes back for the rest when half of them are dealt with."""
    result = run_node(
        FAKES.partition("const client")[0]
        + """
        const ends = [], seen = [], states = [];
        const onNotification = ({ id }) => (seen.push(id), new Promise((end) => ends.push(end)));
        const client = new NotifydClient("ws://server/ws", { WebSocket, onNotification });
        const send = (id) => sockets.at(-1).onmessage({ data: JSON.stringify({ id: String(id), type: "custom" }) });
        for (let id = 20000; id < 30001; id++) send(id); // the handler has the first of them
        states.push(client.state, sockets[0].closed);
        while (client.state === "waiting") { ends.at(-1)(); await null; await null; await null; }
        send(30001);
        [...states, seen.length, sockets[1].url]"""
    )
    assert result == ["waiting", True, 5002, "ws://server/ws?since=30000"]


def test_javascript_stays_closed(run_node: RunNode) -> None:
    closed = "const before = timers.length; client.close(); sockets[0].onclose({ code: 1000 }); client.close();"
    result = run_node(FAKES + closed + "\n [client.state, sockets[0].closed, timers.length - before]")
    assert result == ["closed", True, 0]


# Backoff: any delay up to a limit that doubles and is capped.


@pytest.fixture(params=["python", "javascript"])
def delays(request: pytest.FixtureRequest) -> Callable[[int], list[float]]:
    """200 delays after this many failures, for a base of 1 and a cap of 30."""
    if request.param == "javascript":
        run_node = request.getfixturevalue("run_node")
        return lambda failures: run_node(f"Array.from({{ length: 200 }}, () => backoff({failures}, 1, 30))")
    return lambda failures: [backoff(failures, 1, 30) for _ in range(200)]


@pytest.mark.parametrize(("failures", "limit"), [(0, 1), (1, 2), (4, 16), (5, 30), (100_000, 30)])
def test_backoff_is_jittered_and_capped(delays: Callable[[int], list[float]], failures: int, limit: float) -> None:
    drawn = delays(failures)
    assert 0 <= min(drawn) < 0.1 * limit
    assert 0.9 * limit < max(drawn) <= limit


# Publishing, against the real server and against an HTTP server with a script.

RunPublish = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run_publish(server: Server, python: str) -> RunPublish:
    return lambda *arguments: run_script(python, server, *arguments)


def run_script(python: str, server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [python, str(EXAMPLES / "publish.py"), "--url", server.url, *arguments]
    return subprocess.run(command, env=environment(NO_PROXY), capture_output=True, text=True, check=False)


def test_publishes(server: Server, run_publish: RunPublish) -> None:
    client = server.join()
    done = run_publish("notify", "disk full", "--type", "alert", "--data", '{"priority": "high"}')
    received = client.receive()
    assert json.loads(done.stdout)["recipients"] == 1
    assert (received["type"], received["data"]) == ("alert", {"message": "disk full", "priority": "high"})


@pytest.mark.parametrize("command", ["health", "metrics", "status"])
def test_shows_health_metrics_and_status(server: Server, run_publish: RunPublish, command: str) -> None:
    assert json.loads(run_publish(command).stdout).keys() == server.read(f"/{command}").keys()


def test_shows_the_server_s_own_words_for_an_error(run_publish: RunPublish) -> None:
    failed = run_publish("notify", "", "--data", "[]")
    assert failed.returncode == 1
    assert failed.stderr.startswith("failed: 400 ")


Publisher = Callable[..., tuple[Any, ScriptedHttp]]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the publisher wanted to wait; it doesn't."""
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("asyncio.sleep", wait)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return waits


class Awaiting:
    """AsyncNotifyd, awaited."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._make = lambda: AsyncNotifyd(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            async with self._make() as notifyd:
                return await getattr(notifyd, name)(*arguments, **options)

        return lambda *arguments, **options: asyncio.run(call(*arguments, **options))


@pytest.fixture(params=[Notifyd, Awaiting], ids=["sync", "async"])
def publisher(request: pytest.FixtureRequest, waits: list[float]) -> Iterator[Publisher]:
    """A publisher, and the server with its scripted replies."""
    servers: list[ScriptedHttp] = []

    def start(*replies: Reply, **options: Any) -> tuple[Any, ScriptedHttp]:
        servers.append(ScriptedHttp(*replies))
        return request.param(servers[-1].url, **options), servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_tries_again_with_the_same_key_until_the_server_is_back(publisher: Publisher) -> None:
    notifyd, server = publisher(BUSY, HANG_UP, SENT)
    assert notifyd.notify("once")["recipients"] == 3
    assert len(server.keys) == 3 and len(set(server.keys)) == 1


def test_gives_each_publish_a_key_of_its_own(publisher: Publisher) -> None:
    notifyd, server = publisher(SENT, SENT, SENT)
    notifyd.notify("same words")
    notifyd.notify("same words")
    notifyd.notify("same words", key="order-1")
    assert len(set(server.keys)) == 3 and server.keys[2] == "order-1"


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_tries_again_after_an_answer_that_may_change(publisher: Publisher, status: int) -> None:
    """The server's own answer, or the page of a proxy in front."""
    notifyd, server = publisher(Reply(status, b"<h1>Later</h1>"), Reply(status, BUSY.body), SENT)
    assert notifyd.notify("once")["recipients"] == 3
    assert len(server.keys) == 3 and len(set(server.keys)) == 1 and server.keys[0]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 415, 422, 500, 501, 505])
def test_does_not_try_again_after_another_answer(publisher: Publisher, status: int) -> None:
    notifyd, server = publisher(Reply(status, b"<h1>No</h1>"), SENT)
    with pytest.raises(NotifydError, match=f"^{status} "):
        notifyd.notify("once")
    assert len(server.keys) == 1


@pytest.mark.parametrize("kind", [Notifyd, Awaiting])
def test_tries_again_after_every_network_error(kind: Any, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is not there, resets, or falls silent; the key stays the same."""
    errors = [httpx.ConnectError, httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError]
    errors += [httpx.ConnectTimeout, httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout, httpx.ProxyError]
    left, keys = iter(errors), set()

    def answer(request: httpx.Request) -> httpx.Response:
        keys.add(request.headers["Idempotency-Key"])
        if (error := next(left, None)) is not None:
            raise error("lost")
        return httpx.Response(200, json=SENT.body)

    for client in (httpx.Client, httpx.AsyncClient):
        monkeypatch.setattr(client, "__init__", partialmethod(client.__init__, transport=httpx.MockTransport(answer)))
    assert kind("http://server", attempts=len(errors) + 1).notify("once")["recipients"] == 3
    assert len(keys) == 1


def test_tries_again_where_nobody_listens(waits: list[float]) -> None:
    with pytest.raises(httpx.ConnectError):
        Notifyd(f"http://127.0.0.1:{free_port()}", attempts=3).notify("in vain")
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("3", 3, 3),
        ("60", 60, 60),
        ("9" * 5000, 0, 120),
        ("99999", 120, 120),
        ("0", 0, 0),
        ("soon", 0, 0),
        ("-5", 0, 0),
        ("3.5", 0, 0),
        ("", 0, 0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0, 0),
        ("Fri, 31 Dec 2199 23:59:59 GMT", 120, 120),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str, least: float, most: float) -> None:
    """Both forms count, up to two minutes."""
    assert least <= retry_after(httpx.Response(503, headers={"Retry-After": header})) <= most


def test_retry_after_a_date_is_the_time_until_then() -> None:
    header = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 1 <= retry_after(httpx.Response(503, headers={"Retry-After": header})) <= 100


def test_waits_as_long_as_the_server_asks(publisher: Publisher, waits: list[float]) -> None:
    notifyd, _ = publisher(BUSY._replace(status=429, headers=(("Retry-After", "3"),)), SENT)
    notifyd.notify("patience")
    assert len(waits) == 1 and 3 <= waits[0] <= 3 + BASE_SECONDS


def test_gives_up_after_so_many_attempts(publisher: Publisher) -> None:
    notifyd, server = publisher(HANG_UP, BUSY, SENT, attempts=2)
    with pytest.raises(NotifydError, match="503 Server is shutting down"):
        notifyd.notify("in vain")
    assert len(server.keys) == 2


def test_does_not_repeat_a_refused_request(publisher: Publisher) -> None:
    notifyd, server = publisher(REFUSED, SENT)
    with pytest.raises(NotifydError) as refused:
        notifyd.notify("")
    error = refused.value
    assert (error.status, error.message, error.category, error.id) == (
        400,
        "message: required",
        "validation",
        "error_2",
    )
    assert len(server.keys) == 1


def test_shows_an_error_that_a_proxy_made_up(publisher: Publisher) -> None:
    notifyd, _ = publisher(Reply(502, b"<h1>Bad Gateway</h1>"), attempts=1)
    with pytest.raises(NotifydError, match="502 Bad Gateway"):
        notifyd.status()


def test_reads_the_health_of_a_server_that_shuts_down(publisher: Publisher) -> None:
    notifyd, _ = publisher(Reply(503, {"status": "shutting_down"}))
    assert notifyd.health() == {"status": "shutting_down"}
