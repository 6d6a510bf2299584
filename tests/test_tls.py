"""--ssl-certfile: clients over TLS, errors of a certificate, and a new certificate at SIGHUP."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGHUP
from typing import Any

import pytest
from certificates import Pair
from conftest import StartServer
from processes import QUIET, Server, call, eventually, free_port, notifyd_command
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from ws_clients import PATIENCE, parse_message

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")

# A server that gets a SIGHUP between reading its certificate and listening.
EARLY = """
import signal, sys, notifyd, server
raise_limit = server.raise_file_limit
server.raise_file_limit = lambda limit: (signal.raise_signal(signal.SIGHUP), raise_limit(limit))
sys.exit(notifyd.main())
"""


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path, "first")


@pytest.fixture
def other(tmp_path: Path) -> Pair:
    return Pair(tmp_path, "second")


@pytest.fixture(
    scope="module",
    params=["", "--loop asyncio", "--workers 2"],
)
def secure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with TLS."""
    flags = [*QUIET, *request.param.split()]
    server = Server.notifyd(*flags, *Pair(tmp_path_factory.mktemp("tls"), "localhost").flags)
    yield server
    server.stop()


def connect(server: Server, **options: Any) -> connect_async:
    """Connect over TLS, without a client that reads and writes in two threads: OpenSSL forbids that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    quiet: dict[str, Any] = {"compression": None, "proxy": None, "ping_interval": None, "close_timeout": 1}
    return connect_async(server.ws_url, ssl=context, max_queue=None, **(quiet | options))


async def receive(client: ClientConnection) -> Any:
    return parse_message(await asyncio.wait_for(client.recv(), PATIENCE))


def talk(conversation: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(conversation(), 3 * PATIENCE))


# Clients.


def test_the_line_at_the_start_says_https(secure: Server) -> None:
    """The address can be pasted."""
    assert f"listens on https://127.0.0.1:{secure.port}" in secure.stderr[0]


def test_http_and_websockets_go_over_tls(secure: Server) -> None:
    """The same as without, for everyone."""

    async def conversation() -> None:
        async with connect(secure) as client:
            assert (await receive(client))["type"] == "welcome"
            await client.send('{"type": "ping"}')
            assert (await receive(client))["type"] == "pong"
            await asyncio.to_thread(secure.notify, "over TLS")
            assert (await receive(client))["data"]["message"] == "over TLS"

    talk(conversation)


def test_a_burst_reaches_every_client_whole_and_in_order(secure: Server) -> None:
    """Nothing is written past TLS, also when a client's transport is full for a while."""
    batch = [{"message": str(number), "data": {"pad": "x" * 600}} for number in range(1000)]
    expected = [str(number) for _ in range(3) for number in range(1000)]

    async def read(client: ClientConnection) -> list[str]:
        return [(await receive(client))["data"]["message"] for _ in expected]

    async def conversation() -> None:
        clients = [await connect(secure) for _ in range(4)]
        for client in clients:
            assert (await receive(client))["type"] == "welcome"
        reading = [asyncio.create_task(read(client)) for client in clients]
        for _ in range(3):
            answer = await asyncio.to_thread(secure.http.post, "/notify/batch", json=batch)
            assert answer.status_code == 200
        assert await asyncio.gather(*reading) == [expected] * len(clients)
        for client in clients:
            await client.close()

    talk(conversation)


def test_bytes_other_than_tls_are_dropped(secure: Server) -> None:
    """Plain HTTP, garbage, and a peer that leaves in the middle: nothing is logged, and others are served."""
    for data in (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(300)):
        assert not secure.answer_to(data).startswith(b"HTTP")
    secure.raw(b"\x16\x03\x01").close()
    assert secure.get("/health").status_code == 200
    assert not [line for line in secure.stderr if "SSL" in line]


def s_client(server: Server, *flags: str, say: str = "") -> subprocess.CompletedProcess[str]:
    """Connect with OpenSSL's own client, at its lowest level of security, and type this."""
    command = ["openssl", "s_client", "-connect", f"{server.host}:{server.port}", "-cipher", "ALL:@SECLEVEL=0", *flags]
    return subprocess.run(command, input=say, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.parametrize(("version", "is_served"), [("1", False), ("1_1", False), ("1_2", True), ("1_3", True)])
def test_only_versions_of_tls_that_are_not_broken_are_spoken(secure: Server, version: str, is_served: bool) -> None:
    """RFC 8996: TLS 1.0 and 1.1 must not be used."""
    assert (s_client(secure, f"-tls{version}").returncode == 0) == is_served


def test_a_client_cannot_renegotiate(secure: Server) -> None:
    """Each handshake costs the server more than the client, and nobody would count them."""
    said = s_client(secure, "-tls1_2", say="R\n")
    assert "RENEGOTIATING" in said.stdout + said.stderr and "no renegotiation" in said.stderr


def test_a_silent_peer_is_dropped_after_the_deadline_of_a_request(start_server: StartServer, pair: Pair) -> None:
    """Before its handshake there is no request, and uvicorn would wait for a minute."""
    silent = start_server(*pair.flags, constants={"wire_http.REQUEST_SECONDS": 0.5}).raw(b"")
    silent.settimeout(PATIENCE)
    with suppress(ConnectionResetError):
        assert silent.recv(1) == b""


@pytest.mark.parametrize("flags", [[], ["--workers", "2"]])
def test_a_drain_over_tls(start_server: StartServer, pair: Pair, flags: list[str]) -> None:
    """Clients are told, and the process ends when the last has left."""
    server = start_server(*flags, *pair.flags)

    async def conversation() -> None:
        async with connect(server) as client:
            assert (await receive(client))["type"] == "welcome"
            server.signal()
            assert [(await receive(client))["type"] for _ in range(2)] == ["system", "shutdown"]

    talk(conversation)
    assert server.exit_status() == 0


def test_the_end_of_a_drain_closes_over_tls(start_server: StartServer, pair: Pair) -> None:
    """A client that stays gets the documented close."""
    server = start_server("--shutdown-timeout", "0.2", *pair.flags)

    async def conversation() -> None:
        async with connect(server) as client:
            server.signal()
            with suppress(ConnectionClosed):
                while True:
                    await client.recv()
            assert (client.close_code, client.close_reason) == (1001, "Server shutting down")

    talk(conversation)
    assert server.exit_status() == 0


def test_the_internal_port_speaks_plain_http(start_server: StartServer, pair: Pair) -> None:
    """A probe in the same place knows no certificate."""
    port = free_port()
    start_server("--internal-port", str(port), *pair.flags)
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as probe:
        probe.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert probe.recv(15) == b"HTTP/1.1 200 OK"


# A new certificate.


@pytest.mark.parametrize("flags", [[], ["--workers", "2"]])
def test_a_sighup_replaces_the_certificate_and_drops_nobody(
    start_server: StartServer, pair: Pair, other: Pair, flags: list[str]
) -> None:
    """New handshakes get the new one, with every worker; clients stay and are served on."""
    server = start_server(*flags, *pair.flags)
    assert pair.is_shown_by(server)

    async def conversation() -> None:
        clients = [await connect(server) for _ in range(4)]
        for client in clients:
            assert (await receive(client))["type"] == "welcome"
        pair.become(other)
        server.signal(SIGHUP)
        await asyncio.to_thread(eventually, lambda: other.is_shown_by(server))
        await asyncio.to_thread(server.notify, "still here")
        for client in clients:
            assert (await receive(client))["data"]["message"] == "still here"
            await client.close()

    talk(conversation)


@pytest.mark.parametrize("flags", [[], ["--workers", "2"]])
def test_a_bad_pair_is_logged_and_the_old_one_stays(
    start_server: StartServer, pair: Pair, other: Pair, tmp_path: Path, flags: list[str]
) -> None:
    """A key that came before its certificate costs nobody anything; the next SIGHUP finds both."""
    first = Pair(tmp_path, "the same")
    first.become(pair)
    server = start_server(*flags, *pair.flags)
    shutil.copy(other.key, pair.key)
    server.signal(SIGHUP)
    server.wait_for_line(r"The certificate stays as it is: --ssl-keyfile: the key in .* is not that of ")
    assert first.is_shown_by(server)
    pair.become(other)
    server.signal(SIGHUP)
    eventually(lambda: other.is_shown_by(server))


def test_a_terminal_that_hangs_up_ends_no_worker(start_server: StartServer, pair: Pair, other: Pair) -> None:
    """Its SIGHUP goes to the whole group; workers hear of it from their parent."""
    server = start_server("--workers", "2", *pair.flags)
    before = server.processes()
    pair.become(other)
    os.killpg(server.pid, SIGHUP)
    eventually(lambda: other.is_shown_by(server))
    assert server.processes() == before


def test_a_sighup_at_the_start_waits_until_it_can_be_heard(pair: Pair) -> None:
    """A renewal in that moment neither ends the server nor is lost."""
    _, _, *flags = notifyd_command("--port", "0", "--notification-interval", "0", *pair.flags)
    server = Server([sys.executable, "-c", EARLY, *flags])
    try:
        server.wait_for_line("The certificate has been read again")
        assert server.get("/health").status_code == 200
    finally:
        server.stop()


# Errors at the start.

MISTAKES = {
    "certificate missing": (["--ssl-certfile", "no.crt"], "--ssl-certfile: cannot read no.crt: No such file"),
    "key missing": (["--ssl-certfile", "first.crt", "--ssl-keyfile", "no.key"], "--ssl-keyfile: cannot read no.key: "),
    "a directory": (["--ssl-certfile", "."], "--ssl-certfile: cannot read .: Is a directory"),
    "no certificate": (["--ssl-certfile", "junk", "--ssl-keyfile", "first.key"], "--ssl-certfile: no PEM certificate"),
    "no key": (["--ssl-certfile", "first.crt", "--ssl-keyfile", "junk"], "--ssl-keyfile: no PEM key in junk "),
    "key of another": (["--ssl-certfile", "first.crt", "--ssl-keyfile", "second.key"], "--ssl-keyfile: the key in "),
    "no password": (["--ssl-certfile", "first.crt", "--ssl-keyfile", "locked.key"], "--ssl-keyfile: no PEM key in lo"),
    "key alone": (["--ssl-keyfile", "first.key"], "--ssl-keyfile: expected --ssl-certfile as well"),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two pairs, a key with a password, one file that has both, and one that has neither."""
    directory = tmp_path_factory.mktemp("shelf")
    first = Pair(directory, "first")
    Pair(directory, "second")
    lock = ["openssl", "pkey", "-in", first.key, "-aes256", "-passout", "pass:secret", "-out", directory / "locked.key"]
    subprocess.run(lock, check=True, capture_output=True)
    (directory / "both.pem").write_text(first.certificate.read_text() + first.key.read_text())
    (directory / "junk").write_text("junk")
    return directory


def at(shelf: Path, flags: list[str]) -> list[str]:
    return [flag if flag.startswith("--") else str(shelf / flag) for flag in flags]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_stops_the_start_with_one_line(shelf: Path, mistake: str, workers: str) -> None:
    """It names the flag; the status is 2. Nobody is asked for a password."""
    flags, said = MISTAKES[mistake]
    ended = call("--port", "0", "--workers", workers, *at(shelf, flags))
    assert ended.in_one_line == (2, 1)
    assert said in ended.stderr.replace(f"{shelf}/", "").replace(str(shelf), ".")


@pytest.mark.parametrize(
    ("flags", "password"),
    [(["--ssl-certfile", "both.pem"], ""), (["--ssl-certfile", "first.crt", "--ssl-keyfile", "locked.key"], "secret")],
)
def test_other_forms_of_a_pair(start_server: StartServer, shelf: Path, flags: list[str], password: str) -> None:
    """Both in one file; and a key with a password, given in a variable because lists of processes show flags."""
    server = start_server(*at(shelf, flags), variables={"NOTIFYD_SSL_KEYFILE_PASSWORD": password})
    assert server.get("/health").status_code == 200
