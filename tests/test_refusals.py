"""No refusal is lost to a peer that is still sending: with curl, urllib and bare sockets, over TCP and TLS.

A close with unread data resets the connection, and a reset destroys the answer on its way. Behind nginx: test_nginx.py.
"""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

import pytest
from bytes import rest
from certificates import Pair
from processes import QUIET, Server, program
from ws_clients import PATIENCE

RUNS = 20
SECRET = "sesame-open"
BODY = b"x" * 200_000
KEY = {"X-API-Key": SECRET}
TEXT = {"Content-Type": "text/plain"}
# Method, target and headers of a request with a body that is not wanted.
REFUSED: dict[str, tuple[int, str, str, dict[str, str]]] = {
    "too large": (413, "POST", "/notify", KEY | TEXT),
    "no such path": (404, "POST", "/nowhere", {}),
    "wrong method": (405, "POST", "/health", {}),
    "another wrong method": (405, "PUT", "/notify", KEY),
    "no key": (401, "POST", "/notify", {}),
    "foreign page": (403, "POST", "/notify", KEY | {"Origin": "https://evil.example"}),
}
# Read by wire_http.py, and refused before any app.
UNREADABLE = {
    "a coding": (400, "Transfer-Encoding: gzip"),
    "two lengths": (400, f"Content-Length: {len(BODY)}\r\nContent-Length: 1"),
    "a long head": (431, "X-Long: " + "x" * 66_000),
}
SIZED = f"Content-Length: {len(BODY)}\r\n"
WAYS = {
    "sized": ("1.1", "Connection: close\r\n" + SIZED, BODY),
    "chunked": (
        "1.1",
        "Connection: close\r\nTransfer-Encoding: chunked\r\n",
        b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY),
    ),
    "in 1.0": ("1.0", SIZED, BODY),
}

refused = pytest.mark.parametrize("name", REFUSED)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command"),
]


class Target:
    """A server with a key, and how to reach it."""

    def __init__(self, loop: str, pair: Pair | None) -> None:
        self.pair = pair
        self.server = Server.notifyd(*QUIET, "--loop", loop, "--api-key", f"ci:{SECRET}", *(pair.flags if pair else ()))

    def connect(self) -> socket.socket:
        connection = self.server.raw(b"")
        if self.pair is None:
            return connection
        context = ssl.create_default_context(cafile=self.pair.certificate)
        return context.wrap_socket(connection, server_hostname="localhost")

    def answer_to(self, head: str, body: bytes, pause: float = 0) -> bytes:
        """Send everything, and only then read; return the answer up to the end of the connection."""
        with self.connect() as connection:
            connection.sendall(head.encode())
            half = len(body) // 2 if pause else len(body)
            connection.sendall(body[:half])
            time.sleep(pause)
            connection.sendall(body[half:])
            return rest(connection)


@pytest.fixture(
    scope="module",
    params=[(loop, tls) for loop in ("uvloop", "asyncio") for tls in (False, True)],
    ids=lambda each: f"{each[0]}{' TLS' * each[1]}",
)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server on each loop, with and without TLS."""
    loop, tls = request.param
    target = Target(loop, Pair(tmp_path_factory.mktemp("tls"), "localhost") if tls else None)
    yield target
    target.server.stop()


def statuses(ask: Callable[[], bytes | int]) -> list[str]:
    """Ask so often, a few at a time; return each status, or the error."""

    def once(_: int) -> str:
        try:
            answer = ask()
        except OSError as error:
            return repr(error)
        return str(answer) if isinstance(answer, int) else answer[9:12].decode()

    with ThreadPoolExecutor(5) as pool:
        return list(pool.map(once, range(RUNS)))


@pytest.mark.parametrize("pause", [0, 0.02], ids=["at once", "in two parts"])
@pytest.mark.parametrize("way", WAYS)
@refused
def test_a_peer_that_sends_first_and_reads_afterwards_sees_the_refusal(
    target: Target, name: str, way: str, pause: float
) -> None:
    """Whether the connection ends because the request says so, or its version; with the end right behind the answer."""
    status, method, path, headers = REFUSED[name]
    version, framing, body = WAYS[way]
    fields = "".join(f"{field}: {value}\r\n" for field, value in headers.items())
    head = f"{method} {path} HTTP/{version}\r\nHost: localhost\r\n{fields}{framing}\r\n"
    assert statuses(lambda: target.answer_to(head, body, pause)) == [str(status)] * RUNS


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_refusal_of_the_head_is_seen_too(target: Target, name: str) -> None:
    """Its body is not read as a request either."""
    status, fields = UNREADABLE[name]
    head = f"POST /notify HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n"
    assert statuses(lambda: target.answer_to(head, BODY)) == [str(status)] * RUNS


@refused
def test_urllib_sees_the_refusal(target: Target, name: str) -> None:
    """It asks for the end of the connection, and sends everything before it reads."""
    status, method, path, headers = REFUSED[name]
    context = ssl.create_default_context(cafile=target.pair.certificate if target.pair else None)
    context.check_hostname = False
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=context))

    def ask() -> int:
        request = Request(target.server.url + path, BODY, headers, method=method)
        try:
            return int(opener.open(request, timeout=PATIENCE).status)
        except HTTPError as error:
            with error:
                error.read()
            return error.code

    assert statuses(ask) == [str(status)] * RUNS


@pytest.mark.parametrize("flags", ["--http1.0", "--http1.1 -H Connection:close", "--http1.1"])
@refused
def test_curl_sees_the_refusal(target: Target, tmp_path: Path, name: str, flags: str) -> None:
    """With its usual `Expect: 100-continue` for a large body, and without."""
    status, method, path, headers = REFUSED[name]
    (tmp_path / "body").write_bytes(BODY * 10)
    fields = [word for field, value in headers.items() for word in ("-H", f"{field}: {value}")]
    command = [program("curl"), "-sSk", "--noproxy", "*", "-X", method, *flags.split(), *fields]
    command += ["-w", "%{http_code}", "-o", "/dev/null", "--data-binary", f"@{tmp_path / 'body'}"]

    def ask() -> int:
        # Where the server has answered, curl may stop sending, and does not call that an error.
        done = subprocess.run([*command, target.server.url + path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return int(done.stdout)

    assert statuses(ask) == [str(status)] * RUNS
