"""Origin: a foreign web page may neither read nor write, unless it is allowed to."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from bytes import handshake
from conftest import StartServer
from expected import answered, http_error, naming, parse, welcome
from processes import Server, program
from websockets.exceptions import InvalidStatus
from ws_clients import PATIENCE

from settings import Settings, SettingsError

APP = "https://app.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}


@pytest.fixture(scope="module")
def open_to_two() -> Iterator[Server]:
    """A server that two foreign origins may use."""
    server = Server.notifyd("--allow-origin", APP, "--allow-origin", "http://localhost:3000")
    yield server
    server.stop()


# Each origin in the setting, and one that it lets in.
NAMED = {
    "capacitor://localhost": "capacitor://localhost",
    "ionic://localhost:8100": "ionic://localhost:8100",
    "tauri://localhost": "tauri://localhost",
    "chrome-extension://abcdefghijklmnopabcdefghijklmnop": "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
    "file://": "file://",
    "app://.": "app://.",
    "https://slash.example/": "https://slash.example",
    "http://[2001:db8::1]:8080": "http://[2001:db8::1]:8080",
    "https://*.wild.example": "https://a-1.wild.example",
    "http://*.wild.example:8080/": "http://b.wild.example:8080",
    "https://*.xn--exmple-cua.example:443": "https://a.xn--exmple-cua.example",
}


@pytest.fixture(scope="module")
def open_to_named() -> Iterator[Server]:
    """A server that these origins may use, and pages without an origin."""
    server = Server.notifyd(*(flag for one in [*NAMED, "null"] for flag in ("--allow-origin", one)))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def open_to_all() -> Iterator[Server]:
    """A server that every page may use."""
    server = Server.notifyd("--allow-origin", "*")
    yield server
    server.stop()


def met(server: Server, origin: str, **headers: str) -> Any:
    """The first message to a client with this origin, or the status and the parsed body of the refusal."""
    try:
        return server.connect("bob", additional_headers={"Origin": origin} | headers).receive()
    except InvalidStatus as refused:
        return refused.response.status_code, parse(refused.response.body or b"")


def cors(server: Server, origin: str) -> tuple[str, str | None]:
    """Return the origin that may read the answer, and whether it may send credentials."""
    headers = server.get("/health", headers={"Origin": origin}).headers
    return headers["access-control-allow-origin"], headers.get("access-control-allow-credentials")


def foreign(server: Server) -> list[str]:
    """Origins that are not the server's, though some look like it."""
    here = f"http://127.0.0.1:{server.port}"
    return [
        "https://evil.example",
        "null",
        "http://127.0.0.1",
        f"http://127.0.0.1:{server.port + 1}",
        f"http://localhost:{server.port}",
        f"{here}.evil.example",
        f"{here}@evil.example",
        f"http://evil.example/{here}",
        f"http://evil.example#{here}",
        "nonsense",
        "http://",
    ]


def test_without_an_origin_everyone_is_let_in(server: Server) -> None:
    """curl and other servers send none."""
    assert server.get("/health").status_code == 200
    assert server.connect("bob").receive() == welcome("bob")


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_servers_own_pages_are_let_in(server: Server, scheme: str) -> None:
    """Host and port are compared, the scheme isn't: a proxy may speak TLS."""
    assert met(server, f"{scheme}://127.0.0.1:{server.port}") == welcome("bob")


def test_the_name_that_was_asked_for_counts(server: Server) -> None:
    """Behind a proxy the Host header has the public name, and so has the origin."""
    headers = {"Host": "push.example", "Origin": "https://push.example"}
    assert server.get("/health", headers=headers).status_code == 200


def test_a_foreign_handshake_is_refused_before_the_upgrade(server: Server) -> None:
    """A page from elsewhere gets 403, with the documented body."""
    assert met(server, "https://evil.example") == (403, http_error("connection", naming("rigin")))


def test_a_foreign_request_is_refused(server: Server) -> None:
    """A page from elsewhere cannot read a developer's local server."""
    response = server.get("/status", headers={"Origin": "https://evil.example"})
    assert answered(response) == (
        403,
        http_error("application", naming("rigin")),
    )


def test_an_origin_must_be_the_same_to_the_letter(server: Server) -> None:
    """Another port, another name for the same machine, and every look-alike are foreign."""
    answers = {origin: server.get("/health", headers={"Origin": origin}).status_code for origin in foreign(server)}
    assert answers == dict.fromkeys(foreign(server), 403)


def test_a_refused_origin_is_named_in_the_log_once(start_server: StartServer) -> None:
    """A browser shows its page only 1006; the log line names the setting, and a flood of requests logs it once."""
    server = start_server()
    long = "https://" + "x" * 1000
    for origin in (long, "https://evil\x85.example", "https://other.example"):
        for _ in range(3):
            assert server.get("/health", headers={"Origin": origin.encode("latin-1")}).status_code == 403
    server.signal()
    server.wait_for_line("Shutting down")
    lines = [line for line in server.stderr if "WARNING" in line]
    assert [line.partition("WARNING ")[2] for line in lines] == [
        f"The origin {repr(long)[:200]} is refused",
        r"The origin 'https://evil\x85.example' is refused",
        "The origin 'https://other.example' is refused; --allow-origin lets it in",
    ]


def test_made_up_origins_do_not_flood_the_log(start_server: StartServer) -> None:
    """After a hundred within a minute it is quiet; they are refused as before."""
    server = start_server()
    for number in range(150):
        assert server.get("/health", headers={"Origin": f"https://{number}.example"}).status_code == 403
    server.signal()
    server.wait_for_line("Shutting down")
    assert sum("--allow-origin" in line for line in server.stderr) == 100


def test_a_look_alike_cannot_open_a_websocket(server: Server) -> None:
    """The handshake compares as strictly."""
    for origin in foreign(server):
        assert met(server, origin) == (403, http_error("connection", naming("rigin")))


HEADS = {
    "application": b"GET /health HTTP/1.1\r\nConnection: close\r\n",
    "connection": handshake(Host=None).removesuffix(b"\r\n"),
}


@pytest.mark.parametrize("category", HEADS)
@pytest.mark.parametrize("origins", [(APP, APP), (APP, "https://evil.example"), ("http://a.example", APP)])
def test_several_origins_are_refused(open_to_all: Server, category: str, origins: tuple[str, str]) -> None:
    """Several origins are refused even where every origin is allowed: nobody can tell which one is true."""
    headers = "Host: a.example\r\nOrigin: {}\r\nOrigin: {}\r\n".format(*origins).encode()
    status, _, body = open_to_all.response_to(HEADS[category] + headers + b"\r\n")
    assert (status, parse(body)) == (403, http_error(category, naming("rigin")))


@pytest.mark.parametrize("category", HEADS)
def test_several_hosts_are_a_bad_request(server: Server, category: str) -> None:
    """RFC 9112, section 3.2: with an Origin that is one of them or without."""
    for origin in (b"", b"Origin: https://evil.example\r\n"):
        headers = b"Host: evil.example\r\nHost: localhost\r\n" + origin
        status, _, body = server.response_to(HEADS[category] + headers + b"\r\n")
        kind = "validation" if category == "application" else category
        assert (status, parse(body)) == (400, http_error(kind, naming("Host")))


def test_a_foreign_page_cannot_publish(server: Server) -> None:
    """A simple POST needs no preflight: it is refused and reaches no client."""
    client = server.join()
    headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    assert server.post(b'{"message": "evil"}', headers=headers).status_code == 403
    server.notify("good")
    assert client.receive()["data"]["message"] == "good"


def test_the_origin_is_checked_before_the_id(server: Server) -> None:
    """A foreign page does not even learn whether its client_id would do."""
    with pytest.raises(InvalidStatus):
        server.connect("not an id", additional_headers={"Origin": "https://evil.example"})


@pytest.mark.parametrize("origin", [APP, "http://localhost:3000"])
def test_an_allowed_origin_is_let_in(open_to_two: Server, origin: str) -> None:
    """--allow-origin may be repeated, and each is allowed."""
    assert met(open_to_two, origin)["type"] == "welcome"


@pytest.mark.parametrize("origin", [APP, "https://APP.example:443"])
def test_case_and_the_schemes_own_port_do_not_count(start_server: StartServer, origin: str) -> None:
    """Case and the scheme's own port do not count in the setting and the header, for the check and the answer."""
    server = start_server("--allow-origin", "HTTPS://App.Example:443")
    assert met(server, origin) == welcome("bob")
    assert server.get("/health", headers={"Origin": origin}).headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(("origin", "host"), [("https://push.example", "Push.example:443"), ("http://a:80", "a")])
def test_they_do_not_count_for_the_own_pages_either(server: Server, origin: str, host: str) -> None:
    """The Host header may have both."""
    assert server.get("/health", headers={"Origin": origin, "Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    ["http://app.example", "https://app.example:8443", "https://app.example.evil.example", "https://example"],
)
def test_allowed_origins_are_full_origins(open_to_two: Server, origin: str) -> None:
    """Scheme, host and port must all be those that were allowed."""
    assert met(open_to_two, origin)[0] == 403


def test_allowing_others_does_not_shut_out_the_own(open_to_two: Server) -> None:
    """The server's own pages stay allowed."""
    assert met(open_to_two, open_to_two.url)["type"] == "welcome"


@pytest.mark.parametrize("origin", [APP, "http://anything.example:1234", "null"])
def test_a_star_lets_everyone_in(open_to_all: Server, origin: str) -> None:
    """--allow-origin '*' turns the check off."""
    assert met(open_to_all, origin)["type"] == "welcome"


@pytest.mark.parametrize("origin", NAMED.values())
def test_any_scheme_and_a_first_label_can_be_named(open_to_named: Server, origin: str) -> None:
    """Packaged apps have schemes of their own; a * stands for the first label."""
    assert met(open_to_named, origin)["type"] == "welcome"
    assert cors(open_to_named, origin) == (origin, "true")


@pytest.mark.parametrize(
    "origin",
    [
        "capacitor://localhost:80",
        "capacitor://other",
        "ionic://localhost",
        "https://localhost",
        "file://a",
        "file:",
        "app://",
        "http://slash.example",
        "https://wild.example",
        "https://.wild.example",
        "https://a.b.wild.example",
        "https://a.wild.example:8443",
        "http://a.wild.example",
        "https://*.wild.example",
        "https://a.wild.example.evil.example",
        "https://evil.example/a.wild.example",
        "https://evil.example#.wild.example",
        "https://user@a.wild.example",
        "https://a\xb7.wild.example",
    ],
)
def test_a_named_origin_lets_no_other_in(open_to_named: Server, origin: str) -> None:
    """Scheme, port and every other label must be those that are named, and the * is one label."""
    response = open_to_named.get("/health", headers={"Origin": origin.encode("latin-1")})
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/health", "/status?limit=x", "/nothing"])
def test_only_a_named_page_may_send_credentials(open_to_named: Server, open_to_all: Server, path: str) -> None:
    """A proxy in front may ask for them; `*` and `null` name nobody. Answer, error and preflight agree."""
    for server, origin, allowed in (
        (open_to_named, "capacitor://localhost", "true"),
        (open_to_named, "https://a.wild.example", "true"),
        (open_to_named, "null", None),
        (open_to_all, APP, None),
        (open_to_all, "null", None),
    ):
        for method in ("GET", "OPTIONS"):
            answer = server.request(method, path, headers={"Origin": origin} | (PREFLIGHT if method != "GET" else {}))
            assert answer.headers["access-control-allow-origin"] == origin
            assert answer.headers.get("access-control-allow-credentials") == allowed


def test_a_star_beside_names_names_nobody_else(start_server: StartServer) -> None:
    """With both, the named page alone may send credentials."""
    server = start_server("--allow-origin", "*", "--allow-origin", APP)
    assert (cors(server, APP), cors(server, "https://b.example")) == ((APP, "true"), ("https://b.example", None))


def test_a_page_may_read_every_header_of_ours(start_server: StartServer) -> None:
    """Every header of an answer is exposed, but for those that any page may read, and those of HTTP itself."""
    readable = {"cache-control", "content-length", "content-type", "connection", "date", "server", "vary"}
    readable |= {"transfer-encoding", "x-accel-buffering"}
    server = start_server("--rate-limit", "--allow-origin", APP, "--api-key", "ci:secret")
    page, found = {"Origin": APP, "X-API-Key": "secret"}, set[str]()
    for method, path, headers in (
        *(("POST", "/notify", {"Idempotency-Key": "exposed"}),) * 2,
        ("POST", "/notify", {"Content-Encoding": "gzip"}),
        ("GET", "/notify", {}),
        ("GET", "/ws", {}),
        ("GET", "/metrics", {"X-API-Key": "wrong"}),
        *(("GET", "/metrics", {}),) * 200,
    ):
        answer = server.request(method, path, content=b'{"message": "hi"}', headers=page | headers)
        exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
        found |= set(answer.headers)
        assert {name for name in answer.headers if not name.startswith("access-control-")} <= exposed | readable
    wanted = {"idempotent-replayed", "notification-id", "accept-encoding", "allow", "retry-after", "upgrade"}
    assert wanted | {"www-authenticate", "x-ratelimit-reset"} <= found


@pytest.mark.parametrize(
    "origin",
    [
        "https://*",
        "https://*:8080",
        "*.example.com",
        "https://*.*.example.com",
        "https://a.*.example.com",
        "https://a*.example.com",
        "https://*example.com",
        "https://app.example/path",
        "https://app.example//",
        "https://app.example?",
        "https://user@app.example",
        "https://app.example:port",
        "https://app.example:",
        "https://a.example,https://b.example",
        "https://größer.example",
        "https:///",
        "https://",
        "https:app.example",
        "chrome-extension://*",
        "://app.example",
        "app.example",
        "null/",
        "",
    ],
)
def test_a_setting_that_is_no_origin_is_refused(origin: str) -> None:
    """The start ends with a line that shows the form of an origin, and of a wildcard."""
    with pytest.raises(SettingsError, match=r"allow_origin: expected origins such as .*https://\*\.example\.com"):
        Settings(allow_origin=(origin,))


@pytest.mark.parametrize("origin", ["capacitor://localhost", "file://", "null", "https://evil.example:8443"])
def test_the_advice_of_the_log_can_be_followed(start_server: StartServer, origin: str) -> None:
    """The flag takes the origin as the log shows it, and lets the page in."""
    server = start_server()
    assert server.get("/health", headers={"Origin": origin}).status_code == 403
    shown = re.findall(r"origin '(.+)' is refused; --allow-origin", server.wait_for_line("WARNING"))
    assert met(start_server("--allow-origin", *shown), origin) == welcome("bob")


@pytest.mark.parametrize(
    "origin",
    [
        *("https://evil\x85.example", "https://user@evil.example", "nonsense", "https://", "*"),
        *("https://*.wild.example", "https://evil.example/", f"https://{'evil.' * 40}example"),
    ],
)
def test_the_log_advises_no_flag_that_would_be_refused(start_server: StartServer, origin: str) -> None:
    """Such a header comes from no browser, nor does a wildcard that the setting has."""
    server = start_server("--allow-origin", "https://*.wild.example")
    assert server.get("/health", headers={"Origin": origin.encode("latin-1")}).status_code == 403
    assert server.wait_for_line("WARNING").endswith(f"The origin {repr(origin)[:200]} is refused")


def test_the_variable_is_a_comma_list(start_server: StartServer) -> None:
    """NOTIFYD_ALLOW_ORIGIN names several origins."""
    server = start_server(variables={"NOTIFYD_ALLOW_ORIGIN": f"http://localhost:3000, {APP}"})
    assert met(server, APP) == welcome("bob")


# CORS.


def test_an_allowed_page_may_read_the_answer(open_to_two: Server) -> None:
    """The answer names the origin, and says that it depends on it."""
    headers = open_to_two.get("/health", headers={"Origin": APP}).headers
    assert (headers["access-control-allow-origin"], "Origin" in headers["vary"]) == (APP, True)


@pytest.mark.parametrize(
    ("path", "status"), [("/notify", 405), ("/nothing", 404), ("/status?limit=x", 400), ("/ws", 426)]
)
def test_an_allowed_page_may_read_an_error(open_to_two: Server, path: str, status: int) -> None:
    """Without the header a browser would hide the reason from its page."""
    response = open_to_two.get(path, headers={"Origin": APP})
    assert (response.status_code, response.headers.get("access-control-allow-origin")) == (status, APP)


def test_a_preflight_of_an_allowed_page_succeeds(open_to_two: Server) -> None:
    """A page that wants to POST JSON is told that it may."""
    response = open_to_two.request("OPTIONS", "/notify", headers={"Origin": APP} | PREFLIGHT)
    assert response.status_code in (200, 204)
    assert response.headers["access-control-allow-origin"] == APP
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "content-type" in response.headers["access-control-allow-headers"].lower()


@pytest.mark.parametrize("path", ["/notify", "/status", "/ws"])
def test_a_preflight_is_told_the_methods_of_the_path(open_to_two: Server, path: str) -> None:
    """The preflight names these methods and no others, and allows any header."""
    wanted = {"Access-Control-Request-Method": "DELETE", "Access-Control-Request-Headers": "authorization,x-own"}
    response = open_to_two.request("OPTIONS", path, headers={"Origin": APP} | wanted)
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["access-control-allow-methods"] == response.headers["allow"]
    assert response.headers["access-control-allow-headers"] == "authorization,x-own"


def test_a_preflight_where_nothing_is_has_the_documented_body(open_to_two: Server) -> None:
    """It is an error like any other, and the page may read it."""
    response = open_to_two.request("OPTIONS", "/nothing", headers={"Origin": APP} | PREFLIGHT)
    assert answered(response) == (404, http_error("application", naming("/nothing")))
    assert response.headers["access-control-allow-origin"] == APP


def test_an_allowed_page_may_read_a_stream(open_to_two: Server) -> None:
    """An EventSource of a page from elsewhere needs the header, too."""
    with open_to_two.http.stream("GET", "/events", headers={"Origin": APP}) as response:
        assert response.headers["access-control-allow-origin"] == APP


def test_a_preflight_of_a_foreign_page_fails(open_to_two: Server) -> None:
    """A page that is not allowed gets no permission."""
    response = open_to_two.request("OPTIONS", "/notify", headers={"Origin": "https://evil.example"} | PREFLIGHT)
    assert answered(response) == (403, http_error("application", naming("rigin")))
    assert "access-control-allow-origin" not in response.headers


def test_a_foreign_page_may_not_read_the_refusal(server: Server) -> None:
    """No permission header goes to an origin that is not allowed."""
    response = server.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_a_star_permits_every_page(open_to_all: Server) -> None:
    """Any page may read the answer."""
    allowed = open_to_all.get("/health", headers={"Origin": APP}).headers["access-control-allow-origin"]
    assert allowed in ("*", APP)


def test_credentials_are_not_permitted(open_to_all: Server) -> None:
    """Where every page is let in, none is trusted with them."""
    headers = open_to_all.get("/health", headers={"Origin": APP}).headers
    assert "access-control-allow-credentials" not in headers


# In Chromium.

PAGE = b"""<script type="module">
const url = new URLSearchParams(location.search).get("url"), found = [];
const body = JSON.stringify({ message: "hi", clients: ["alice"] });
const post = (headers) => fetch(`${url}/notify`, { method: "POST", body, headers, credentials: "include" });
const opened = (stream) => new Promise((end) => {
    stream.onopen = () => end("open");
    stream.onerror = () => end("no");
});
try {
    found.push((await post({})).status);
    const answer = await post({ "Content-Type": "application/json", "Idempotency-Key": "page" });
    found.push(answer.status, answer.headers.has("Notification-Id"));
    found.push(await opened(new EventSource(`${url}/events`, { withCredentials: true })));
} catch { found.push("blocked"); }
await fetch("/", { method: "POST", body: JSON.stringify(found) });
</script>"""


class Site(BaseHTTPRequestHandler):
    """A page, which posts its findings to its own server."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE)

    def do_POST(self) -> None:
        self.server.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
        self.do_GET()


def test_a_page_of_a_named_subdomain_may_send_credentials(start_server: StartServer, tmp_path: Path) -> None:
    """It may read answers, headers and streams; without a name Chromium keeps them from it.

    The first request has a string for its body, which Chromium labels as text.
    """
    flags = "--headless --no-sandbox --no-proxy-server --no-first-run --remote-debugging-port=0 --disable-gpu"
    command = [program("chromium", "chromium-browser", "google-chrome"), *flags.split()]
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        site.found = found = queue.Queue[Any]()  # type: ignore[attr-defined]
        threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
        for allowed, expected in (
            (f"http://*.localhost:{site.server_port}/", [400, 200, True, "open"]),
            ("*", ["blocked"]),
        ):
            server = start_server("--allow-origin", allowed)
            url = f"http://app.localhost:{site.server_port}/?url={server.url}"
            process = subprocess.Popen(
                [*command, f"--user-data-dir={tmp_path}/{server.port}", url],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                assert found.get(timeout=4 * PATIENCE) == expected
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        site.shutdown()
