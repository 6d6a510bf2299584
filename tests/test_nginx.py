"""deploy/nginx.conf in a real nginx, in front of a server: its clients see the same as without it."""

from __future__ import annotations

import calendar
import itertools
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from bytes import HANDSHAKE
from conftest import StartServer
from expected import http_error, limits, parse
from processes import ROOT, Server, eventually, free_port, needs_proc, program
from ws_clients import PATIENCE, Client

from guard import HANDSHAKES, REQUESTS
from settings import Settings

pytestmark = pytest.mark.slow

CONF = (ROOT / "deploy" / "nginx.conf").read_text()
SECRET = "sesame-open"
ADDRESSES = itertools.count(1)
TEXT = {"Content-Type": "text/plain"}
# The origin of a page that the server and nginx let in.
PAGE = "http://localhost:18080"


class Nginx:
    """An nginx with deploy/nginx.conf, with other paths, ports and address only."""

    def __init__(self, directory: Path, upstream: int, *, more: str = "") -> None:
        """`more`: directives for its http block."""
        self.directory = directory
        self.port, plain = free_port(), free_port()
        self.plain_url, self.url = f"http://127.0.0.1:{plain}", f"https://127.0.0.1:{self.port}"
        pair = ("-keyout", str(directory / "key.pem"), "-out", str(directory / "cert.pem"))
        words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
        subject = ("-addext", "subjectAltName=IP:127.0.0.1")
        subprocess.run([program("openssl"), *words.split(), *subject, *pair], check=True, capture_output=True)
        text = CONF
        for ours, theirs in (
            ("/run/", f"{directory}/"),
            ("/var/log/nginx/", f"{directory}/"),
            ("/etc/ssl/certs/push.example.com.pem", f"{directory}/cert.pem"),
            ("/etc/ssl/private/push.example.com.key", f"{directory}/key.pem"),
            ("listen 80;", f"listen 127.0.0.1:{plain};"),
            ("listen 443 ssl http2;", f"listen 127.0.0.1:{self.port} ssl http2;"),
            ("server 127.0.0.1:8000;", f"server 127.0.0.1:{upstream};"),
            ("# https://app.example.com $http_origin;", f"{PAGE} $http_origin; null $http_origin;"),
        ):
            assert ours in text, ours
            text = text.replace(ours, theirs)
        text = text.replace("http {\n", f"http {{\n{more}\n", 1)
        text, listeners = re.subn(r"\n *listen \[::\].*", "", text)
        assert listeners == 2  # Not every machine has IPv6.
        (directory / "nginx.conf").write_text(text)
        self.command = [program("nginx"), "-p", str(directory), "-c", str(directory / "nginx.conf")]
        environment = os.environ | {"TZ": "Asia/Tokyo"}
        self.process = subprocess.Popen([*self.command, "-g", "daemon off;"], env=environment)
        self.tls = ssl.create_default_context(cafile=str(directory / "cert.pem"))
        self.be("127.0.0.1")
        eventually(self._serves)

    def be(self, address: str) -> None:
        """Come from this address of the loopback from now on: each has buckets of its own."""
        if hasattr(self, "http"):
            self.http.close()
        transport = httpx.HTTPTransport(local_address=address, verify=self.tls)
        self.http = httpx.Client(base_url=self.url, transport=transport, trust_env=False, timeout=PATIENCE)
        self.address = address

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.logs()
        try:
            return self.http.get("/health").status_code in (200, 502)
        except httpx.TransportError:
            return False

    def logs(self) -> str:
        return "".join(path.read_text() for path in self.directory.glob("*.log"))

    def connect(self, server: Server, path: str = "/ws") -> Client:
        """Open a WebSocket to the server behind it."""
        url = f"wss://127.0.0.1:{self.port}{path}"
        return server.connect(url=url, ssl=self.tls, source_address=(self.address, 0))

    def knock(self) -> tuple[int, Any, bytes]:
        """Ask for a WebSocket; return status, headers and body of the answer."""
        with (
            socket.create_connection(("127.0.0.1", self.port), PATIENCE, (self.address, 0)) as plain,
            self.tls.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            connection.sendall(HANDSHAKE)
            response = HTTPResponse(connection)
            response.begin()
            with response:
                return response.status, response.headers, b"" if response.status == 101 else response.read()

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture(scope="module")
def backend() -> Iterator[Server]:
    """A server that counts the requests through nginx by the address that nginx names."""
    server = Server.notifyd(
        *("--notification-interval", "0", "--ping-interval", "0.2"),
        *("--rate-limit", "--trusted-proxies", "127.0.0.1", "--allow-origin", PAGE),
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def _nginx(backend: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    proxy = Nginx(tmp_path_factory.mktemp("nginx"), backend.port)
    yield proxy
    proxy.close()


@pytest.fixture
def nginx(_nginx: Nginx) -> Nginx:
    """An nginx in front of a server; each test has an address of its own."""
    _nginx.be(f"127.0.1.{next(ADDRESSES)}")
    return _nginx


def test_nginx_takes_the_file(nginx: Nginx) -> None:
    """nginx takes the file without a warning, even with the usual limit of open files."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = ["sh", "-c", f'ulimit -Sn {min(1024, most)}; exec "$@"', "sh", *nginx.command, "-t"]
    tested = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (tested.returncode, re.findall(r"warn|emerg|error", tested.stderr)) == (0, []), tested.stderr


def test_a_request_goes_through(nginx: Nginx) -> None:
    """The longest message, too; with the server's limits on its answer, once."""
    response = nginx.http.post("/notify", json={"message": "x" * 8192})
    assert response.status_code == 200
    assert limits(response.headers)[:2] == (10, 19)


def test_a_user_in_a_path_goes_through_as_it_was_sent(nginx: Nginx, backend: Server) -> None:
    """With %2F and %2E, which nginx decodes to choose its own location."""
    for user in ("a/b", "..", "a//b", "/"):
        name = quote(user, safe="").replace(".", "%2E")
        client = nginx.connect(backend, f"/ws?user={name}")
        assert client.receive()["user"] == user
        assert parse(nginx.http.get(f"/users/{name}").content)["user"] == user
        assert nginx.http.request("DELETE", f"/users/{name}", json={"reason": "Bye"}).json()["disconnected"] == 1
        assert client.closed() == (1008, "Bye")


def test_nginx_refuses_as_the_server_does(nginx: Nginx) -> None:
    """After as many requests, with the same body and headers; the server is not asked."""
    began, since, allowed = time.monotonic(), time.time(), 0
    while (refusal := nginx.http.get("/metrics")).status_code == 200:
        allowed += 1
    assert refusal.status_code == 429
    assert 20 <= allowed <= 20 + 10 * (time.monotonic() - began)
    assert refusal.headers["content-type"] == "application/json"
    assert parse(refusal.content) == http_error("application", "Rate limit exceeded: 10 requests a second, 20 at once")
    assert refusal.headers["retry-after"] == "1"
    limit, remaining, reset = limits(refusal.headers)
    assert (limit, remaining) == (10, 0)
    assert since + 1 <= reset <= time.time() + 3.1
    stamp = time.strptime(parse(refusal.content)["error"]["timestamp"][:19], "%Y-%m-%dT%H:%M:%S")
    assert abs(calendar.timegm(stamp) - time.time()) < 10


def test_the_limits_are_the_servers() -> None:
    """Both rates and both bursts; nginx lets one more through than it calls the burst."""
    rates = dict(re.findall(r"zone=(\w+):\w+ rate=(\d+)r/s;", CONF))
    bursts = dict(re.findall(r"limit_req zone=(\w+) burst=(\d+) nodelay;", CONF))
    found = {zone: (int(rates[zone]), int(bursts[zone]) + 1) for zone in rates}
    stated = {"handshakes": HANDSHAKES, "requests": REQUESTS}
    assert found == {zone: (rate.per_second, rate.burst) for zone, rate in stated.items()}


def test_an_ipv6_network_is_one_subscriber(start_server: StartServer, tmp_path: Path) -> None:
    """Its addresses share a bucket, and another network has its own. A header stands for real addresses here."""
    proxy = Nginx(tmp_path, start_server().port, more="set_real_ip_from 127.0.0.1; real_ip_header X-Real;")

    def status(address: str) -> int:
        return proxy.http.get("/metrics", headers={"X-Real": address}).status_code

    try:
        assert any(status(f"2001:db8:a:a0a:{number:x}::{number:x}") == 429 for number in range(1, 400))
        assert status("2001:db8:a:b0a::1") == status("192.0.2.1") == 200
        assert {status(f"192.0.2.{number}") for number in range(2, 40)} == {200}
    finally:
        proxy.close()


@pytest.mark.parametrize("ask", ["get", "knock"])
def test_the_refusals_are_nginx_own(nginx: Nginx, ask: str) -> None:
    """nginx refuses these by itself: the server has not seen them."""
    began, refused = time.monotonic(), 0
    while refused < 5:
        refused += (nginx.knock()[0] if ask == "knock" else nginx.http.get("/metrics").status_code) == 429
    seconds = time.monotonic() - began
    lines = [line for line in nginx.logs().splitlines() if line.startswith(f"{nginx.address} ") and " 429 " in line]
    # One that is let through just when the bucket is refilled may come to the server a moment too soon.
    assert lines and sum(not re.search(r" - \w+$", line) for line in lines) <= 10 * seconds


def test_a_handshake_is_refused_as_the_server_does(nginx: Nginx) -> None:
    """Before the upgrade, after as many."""
    began, answers = time.monotonic(), [nginx.knock()]
    while answers[-1][0] == 101:
        answers.append(nginx.knock())
    status, headers, body = answers[-1]
    assert status == 429
    assert 10 <= len(answers) - 1 <= 10 + 5 * (time.monotonic() - began)
    assert parse(body) == http_error("connection", "Rate limit exceeded: 5 handshakes a second, 10 at once")
    assert (headers["Content-Type"], headers["Retry-After"]) == ("application/json", "1")
    assert limits(headers)[:2] == (5, 0)
    assert limits(answers[0][1])[:2] == (5, 9)


def test_each_address_has_buckets_of_its_own(nginx: Nginx) -> None:
    """A flood from one address does not count for another."""
    for ask in (nginx.knock, lambda: nginx.http.get("/metrics")):
        for _ in range(30):
            ask()
    nginx.be(f"127.0.2.{next(ADDRESSES)}")
    assert nginx.knock()[0] == 101
    assert nginx.http.get("/metrics").status_code == 200


@pytest.mark.parametrize("path", ["/health", "/health/live"])
def test_health_is_exempt(nginx: Nginx, path: str) -> None:
    """/health is answered for an address that has used up its requests."""
    statuses = [nginx.http.get(path).status_code for _ in range(50)]
    assert set(statuses) == {200}


@pytest.mark.parametrize("path", ["/healthz", "/health/", "/health%20x"])
def test_nothing_else_is_exempt(nginx: Nginx, path: str) -> None:
    """nginx refuses paths that only begin like /health by itself, and names no upstream."""
    while nginx.http.get(path).status_code != 429:
        pass
    eventually(lambda: re.search(rf"^{nginx.address} .* 429 \d+ \S+ - ", nginx.logs(), re.MULTILINE))


def test_a_client_is_welcomed_and_gets_notifications(nginx: Nginx, backend: Server) -> None:
    """Through TLS and the upgrade."""
    client = nginx.connect(backend)
    assert client.receive()["type"] == "welcome"
    backend.notify("through")
    while (message := client.receive())["type"] == "ping":
        pass
    assert message["data"]["message"] == "through"


def test_an_event_is_not_held_back(nginx: Nginx, backend: Server) -> None:
    """A stream passes on each event as it comes."""
    with nginx.http.stream("GET", "/events") as stream:
        lines = stream.iter_lines()
        assert any("welcome" in line for line in lines)
        backend.notify("at once")
        assert any("at once" in line for line in lines)


BROWSER = {"Accept": "text/event-stream"}


def end_of(answer: httpx.Response) -> tuple[int, str]:
    """Return the retry and the data of a stream that has ended at once."""
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
    assert answer.headers["cache-control"] == "no-store, no-transform"
    found = re.fullmatch(r"retry: (\d+)\nevent: closed\ndata: (.*)\n\n", answer.text)
    assert found, answer.text
    return int(found[1]), found[2]


def refused_stream(nginx: Nginx) -> httpx.Response:
    """Return nginx's own answer to a stream over the rate; each tenth of a second lets another stream through."""
    while True:
        with nginx.http.stream("GET", "/events", headers=BROWSER) as answer:
            if "content-length" in answer.headers:
                answer.read()
                return answer


def test_a_flood_does_not_end_a_browsers_stream_for_good(nginx: Nginx) -> None:
    """nginx refuses it as the server does: 200, a wait that differs, and the code with the reason."""
    while nginx.http.get("/metrics").status_code != 429:
        pass
    ends = [end_of(refused_stream(nginx)) for _ in range(5)]
    text = '{"code":1008,"reason":"Rate limit exceeded: 10 requests a second, 20 at once"}'
    assert {data for _, data in ends} == {text}
    waits = {retry for retry, _ in ends}
    assert 3000 <= min(waits) < max(waits) < 6000

    def status() -> int:
        with nginx.http.stream("GET", "/events") as answer:
            return answer.status_code

    eventually(lambda: status() == 429)


def test_a_restart_does_not_end_a_browsers_stream_for_good(tmp_path: Path) -> None:
    """Without a server the page's EventSource comes back later; all others get the status."""
    proxy = Nginx(tmp_path, free_port())
    try:
        for path in ("/events", "/events?since="):
            for accept in ("text/event-stream", "application/json, Text/Event-Stream;q=0.9"):
                answer = proxy.http.get(path, headers={"Accept": accept})
                assert end_of(answer)[1] == '{"code":1013,"reason":"Try again later"}'
            for accept in ("*/*", "text/html, text/event-stream;q=0"):
                assert proxy.http.get(path, headers={"Accept": accept}).status_code == 502
        assert proxy.http.get("/status", headers=BROWSER).status_code == 502
    finally:
        proxy.close()


def page_may_read(answer: httpx.Response) -> tuple[int, list[str]]:
    """Return the status, and the origins that may read the answer and send credentials."""
    origins = answer.headers.get_list("access-control-allow-origin")
    assert answer.headers.get_list("access-control-allow-credentials") == ["true"] * len(origins)
    return answer.status_code, origins


@pytest.mark.parametrize(("origin", "allowed"), [(PAGE, [PAGE]), ("https://evil.example", [])])
def test_a_page_reads_the_answers_of_nginx_itself(
    nginx: Nginx, tmp_path: Path, origin: str, allowed: list[str]
) -> None:
    """Without the headers of CORS a browser would hide them, and tell the page of a broken network."""
    nginx.http.headers["Origin"] = origin
    assert page_may_read(nginx.http.get("/health")) == ((200, [PAGE]) if allowed else (403, []))
    assert page_may_read(nginx.http.post("/notify", content=b"x" * 3_000_000)) == (413, allowed)
    while (limited := nginx.http.get("/metrics")).status_code != 429:
        pass
    assert page_may_read(limited) == (429, allowed)
    assert ("Retry-After" in limited.headers.get("access-control-expose-headers", "")) == bool(allowed)
    assert page_may_read(refused_stream(nginx)) == (200, allowed)
    alone = Nginx(tmp_path, free_port())
    try:
        alone.http.headers["Origin"] = origin
        assert page_may_read(alone.http.get("/status")) == (502, allowed)
        assert page_may_read(alone.http.get("/events", headers=BROWSER)) == (200, allowed)
    finally:
        alone.close()


def test_a_browsers_stream_goes_through(nginx: Nginx, backend: Server) -> None:
    """So do its headers: the server knows the address, and refuses in its own words."""
    with nginx.http.stream("GET", "/events?client_id=ann", headers=BROWSER) as stream:
        assert any("welcome" in line for line in stream.iter_lines())
    assert nginx.http.get("/events?since=x", headers=BROWSER).status_code == 400


def test_a_clients_own_forwarded_header_is_replaced(nginx: Nginx) -> None:
    """The server counts the address that nginx sees, with any X-Forwarded-For."""
    headers = ({"X-Forwarded-For": f"203.0.113.{n}"} for n in range(250))
    assert any(limits(nginx.http.get("/metrics", headers=each).headers)[1] <= 18 for each in headers)


def test_a_page_of_its_own_is_let_in(nginx: Nginx) -> None:
    """The server sees the Host that the browser asked for, with its port."""
    assert nginx.http.get("/status", headers={"Origin": nginx.url}).status_code == 200
    assert nginx.http.get("/status", headers={"Origin": "https://evil.example"}).status_code == 403


def test_plain_http_is_sent_to_tls(nginx: Nginx) -> None:
    response = httpx.get(f"{nginx.plain_url}/status?limit=1", trust_env=False)
    assert response.status_code == 301
    assert response.headers["location"].startswith("https://127.0.0.1/status")


def test_timeouts_are_longer_than_the_ping_interval() -> None:
    """There is some room, so that a silent client stays connected."""
    timeouts = re.findall(r"proxy_(?:read|send)_timeout (\d+)s;", CONF)
    assert len(timeouts) == 2
    assert min(map(int, timeouts)) >= 2 * Settings().ping_interval


def test_no_log_has_a_query_string(start_server: StartServer, tmp_path: Path) -> None:
    """This holds for requests passed on, refused, redirected, malformed, and without a server."""
    server = start_server()
    proxy = Nginx(tmp_path, server.port)
    try:
        query = f"?token={SECRET}"
        for _ in range(400):
            if proxy.http.get(f"/metrics{query}", headers={"Referer": f"https://a.example/{query}"}).status_code == 429:
                break
        assert proxy.connect(server, f"/ws{query}").receive()["type"] == "welcome"
        httpx.get(f"{proxy.plain_url}/status{query}", trust_env=False)
        proxy.http.post(f"/notify{query}", content=b"x" * 3_000_000)
        httpx.get(f"http://127.0.0.1:{proxy.port}/status{query}", trust_env=False)
        server.stop()
        assert proxy.http.get(f"/health{query}").status_code == 502
    finally:
        proxy.close()
    statuses = set(re.findall(r'" (\d{3}) ', proxy.logs()))
    assert statuses >= {"200", "101", "301", "400", "413", "429", "502"}
    assert SECRET not in proxy.logs()


# The connections to the server.


def upstream(server: Server) -> set[str]:
    """Return the connections that programs of this machine have open to the server, by their own port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[2].endswith(f":{server.port:04X}") and row[3] == "01"}


@needs_proc
def test_a_pooled_connection_outlives_a_pause(start_server: StartServer, tmp_path: Path) -> None:
    """nginx gives a POST to a kept connection only once: where the server had closed it meanwhile, that would be a 502.

    uvicorn closes after five seconds.
    """
    server = start_server()
    proxy = PlainNginx(tmp_path, server.port, POOL)
    try:
        server.http.close()
        assert proxy.http.post("/notify", json={"message": "before"}).status_code == 200
        before = upstream(server)
        time.sleep(6)
        assert proxy.http.post("/notify", json={"message": "after"}).status_code == 200
        assert before and upstream(server) == before
    finally:
        proxy.close()


def test_nginx_is_the_first_to_close_an_idle_connection() -> None:
    """Its time is below keep_alive_timeout, with room for a request on its way."""
    [seconds] = re.findall(r"keepalive_timeout (\d+)s;", CONF)
    assert int(seconds) + 5 <= Settings().keep_alive_timeout


def test_many_posts_through_the_pool_are_all_answered(start_server: StartServer, tmp_path: Path) -> None:
    """Also while nginx opens, keeps and closes connections, with bodies of all sizes and refusals in between."""
    server = start_server("--max-message-size", "100000")
    proxy = PlainNginx(tmp_path, server.port, POOL)

    def post(number: int) -> tuple[int, int]:
        size = (10, 8_000, 99_000, 150_000)[number % 4]
        return size, proxy.http.post("/notify", content=b"x" * size, headers=TEXT).status_code

    try:
        with ThreadPoolExecutor(8) as pool:
            found = Counter(pool.map(post, range(200)))
        assert found == {(10, 200): 50, (8_000, 200): 50, (99_000, 400): 50, (150_000, 413): 50}
    finally:
        proxy.close()


class PlainNginx:
    """An nginx with the least configuration that works."""

    def __init__(self, directory: Path, upstream: int, lines: str) -> None:
        port = free_port()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE)
        # In memory: the worker may be another user, who cannot write here.
        server = f"listen 127.0.0.1:{port}; client_max_body_size 4m; client_body_buffer_size 4m;"
        (directory / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; pid {directory}/pid; error_log {directory}/error.log; events {{}}"
            f"http {{ access_log off; upstream app {{ server 127.0.0.1:{upstream}; keepalive 4; }}"
            f"server {{ {server} location / {{ proxy_pass http://app; {lines} }} }} }}"
        )
        self._process = subprocess.Popen([program("nginx"), "-p", str(directory), "-c", str(directory / "nginx.conf")])
        eventually(self._serves)

    def _serves(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self.http.close()
        self._process.terminate()
        self._process.wait(PATIENCE)


POOL = 'proxy_http_version 1.1; proxy_set_header Connection "";'
DEFAULTS = "proxy_http_version 1.0; proxy_set_header Connection close;"
WITHOUT_BUFFERS = "proxy_request_buffering off; proxy_buffering off;"


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize(
    "lines",
    [DEFAULTS, DEFAULTS + WITHOUT_BUFFERS, POOL + WITHOUT_BUFFERS],
    ids=["defaults", "without buffers", "pool without buffers"],
)
def test_a_refusal_comes_through_nginx(start_server: StartServer, tmp_path: Path, lines: str, loop: str) -> None:
    """nginx speaks HTTP/1.0 and ends each connection by default. It makes a reset a 502."""
    server = start_server("--api-key", "ci:sesame-open", "--loop", loop)
    proxy = PlainNginx(tmp_path, server.port, lines)
    refused = {
        413: ("POST", "/notify", TEXT | {"X-API-Key": "sesame-open"}),
        404: ("POST", "/nowhere", {}),
        405: ("PUT", "/notify", {}),
        401: ("POST", "/notify", {}),
    }
    try:
        for status, (method, path, headers) in refused.items():
            found = [
                # nginx itself may end a connection after an early answer, without saying so in it.
                proxy.http.request(method, path, content=b"x" * size, headers=headers | {"Connection": "close"})
                for size in (100_000, 3_000_000)
                for _ in range(10)
            ]
            assert [answer.status_code for answer in found] == [status] * 20
            assert all(b'"error"' in answer.content for answer in found)
    finally:
        proxy.close()


def test_nginx_with_its_defaults_passes_a_stream_on(start_server: StartServer, tmp_path: Path) -> None:
    """To an HTTP/1.0 client a stream comes without chunks: nginx would hand on their sizes as data."""
    server = start_server()
    proxy = PlainNginx(tmp_path, server.port, DEFAULTS + "proxy_buffering off;")
    try:
        with proxy.http.stream("GET", "/events") as stream:
            lines = stream.iter_lines()
            fields = {next(lines).partition(":")[0] for _ in range(5)}
            server.notify("through")
            for line in lines:
                fields.add(line.partition(":")[0])
                if "through" in line:
                    break
        assert fields <= {"id", "event", "data", "retry", ""}
    finally:
        proxy.close()


def test_three_seconds_are_added_by_hand() -> None:
    """For every carry there can be: the maps of the file, applied to seconds here."""
    maps = {
        name: re.findall(r'"~(\S+)"\s+(\S+);', body)
        for name, body in re.findall(r"map \$msec \$(\w+) \{(.*?)\n    \}", CONF, re.DOTALL)
    }
    for seconds in [1_700_000_000, 1_799_999_999, 1_999_999_998, 1_709_999_997, *range(1_700_009_890, 1_700_010_110)]:
        parts = []
        for name in ("unchanged", "carried", "zeros", "last_digit"):
            for pattern, value in maps[name]:
                if found := re.search(pattern.replace("?<", "?P<"), f"{seconds}.123"):
                    parts.append(found[1] if value.startswith("$") else value)
                    break
        assert int("".join(parts)) == seconds + 3


# HTTP/2.


def curl(nginx: Nginx, *arguments: str) -> list[str]:
    """Run curl with HTTP/2 from the address of nginx's client, and return the lines of its output."""
    command = [program("curl"), "--silent", "--http2", "--cacert", str(nginx.directory / "cert.pem")]
    command += ["--interface", nginx.address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def test_more_than_six_streams_share_a_connection(nginx: Nginx, backend: Server) -> None:
    """A browser has six HTTP/1.1 connections to an origin, and each stream fills one."""
    nginx.http.get("/health")
    urls = [f"{nginx.url}/events?client_id=h2-{number}" for number in range(8)]
    outputs = [word for url in urls for word in ("--output", os.devnull, url)]
    shown = ("--write-out", "%{http_version} %{num_connects}\n", "--parallel", "--max-time", "60")
    with ThreadPoolExecutor() as pool:
        lines = pool.submit(curl, nginx, *shown, *outputs)
        eventually(lambda: backend.active() == 8)
        for number in range(8):
            assert backend.request("DELETE", f"/clients/h2-{number}").status_code == 200
    assert sorted(lines.result()) == ["2 0"] * 7 + ["2 1"]


def test_http2_events_come_at_once(nginx: Nginx, backend: Server) -> None:
    """The first byte and every later one, as over HTTP/1.1."""
    process = subprocess.Popen(
        [program("curl"), "-sN", "--http2", "-k", "--interface", nginx.address, f"{nginx.url}/events"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert any("welcome" in line for line in process.stdout)
        backend.notify("over HTTP/2")
        assert any("over HTTP/2" in line for line in process.stdout)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_http2_keeps_the_host_for_the_check_of_origins(nginx: Nginx) -> None:
    """A browser's own page is let in, another's is not."""
    for origin, status in ((nginx.url, "200"), ("https://elsewhere.example", "403")):
        shown = ("--output", os.devnull, "--write-out", "%{http_version} %{http_code}\n")
        sent = ("--header", f"Origin: {origin}", "--json", '{"message": "hi"}')
        assert curl(nginx, *shown, *sent, f"{nginx.url}/notify") == [f"2 {status}"]


STREAMS = """<script>
const url = new URLSearchParams(location.search).get("url");
for (let number = 0; number < 8; number++) new EventSource(`${url}/events?client_id=page-${number}`);
</script>"""


# A page that tells another server of the end of its stream, as a client there.
TOLD = """<script>
const [url, other] = new URLSearchParams(location.search).get("url").split(" ");
new EventSource(`${url}/events`).addEventListener("closed", ({ data }) => {
  new EventSource(`${other}/events?client_id=told-${JSON.parse(data).code}`);
});
</script>"""


@contextmanager
def page_of_streams(url: str, directory: Path, page: str = STREAMS) -> Iterator[None]:
    """Open a page with eight streams of a server in Chromium, or another page."""
    (directory / "page.html").write_text(page)
    flags = "--headless --no-sandbox --no-proxy-server --no-first-run --remote-debugging-port=0 --disable-gpu"
    flags += f" --ignore-certificate-errors --disable-background-networking --user-data-dir={directory}/profile"
    command = [program("chromium", "chromium-browser", "google-chrome"), *flags.split()]
    process = subprocess.Popen(
        [*command, f"file://{directory}/page.html?url={url}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_browser_opens_more_than_six_streams_over_http2_alone(start_server: StartServer, tmp_path: Path) -> None:
    """Over HTTP/1.1 the seventh waits for ever."""
    server = start_server("--allow-origin", "null", "--ping-interval", "0")
    with page_of_streams(server.url, tmp_path):
        eventually(lambda: server.active() == 6, 4 * PATIENCE)
        with pytest.raises(AssertionError):
            eventually(lambda: server.active() > 6, 1)
    eventually(lambda: server.active() == 0)
    proxy = Nginx(tmp_path, server.port)
    try:
        with page_of_streams(proxy.url, tmp_path):
            eventually(lambda: server.active() == 8, 4 * PATIENCE)
    finally:
        proxy.close()


def test_a_page_of_another_origin_is_told_of_a_restart(start_server: StartServer, tmp_path: Path) -> None:
    """Chromium shows it the answer that nginx gives by itself."""
    other = start_server("--allow-origin", "null")
    proxy = Nginx(tmp_path, free_port())
    try:
        with page_of_streams(f"{proxy.url} {other.url}", tmp_path, TOLD):
            eventually(lambda: other.active() == 1, 4 * PATIENCE)
            assert other.read("/status")["connections"]["details"][0]["client_id"] == "told-1013"
    finally:
        proxy.close()
