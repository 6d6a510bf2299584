"""Where the server listens: the addresses of both families, and one port for all of them."""

from __future__ import annotations

import asyncio
import errno
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import StartServer
from processes import call, free_port, run, with_one_and_two_workers
from ws_clients import PATIENCE

import server
from server import bind
from settings import Settings
from wire_message import peer_of


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")


def answers(host: str, port: int, path: str = "/health") -> bool:
    try:
        return httpx.get(f"http://{host}:{port}{path}", trust_env=False, timeout=PATIENCE).status_code == 200
    except httpx.ConnectError:
        return False


def served(port: int, path: str = "/health") -> tuple[bool, bool]:
    """Whether the port answers over IPv4, and whether over IPv6."""
    return answers("127.0.0.1", port, path), answers("[::1]", port, path)


def hosts(*names: str) -> list[str]:
    return [word for name in names for word in ("--host", name)]


# Both families.


@needs_ipv6
@with_one_and_two_workers
@pytest.mark.parametrize(
    ("names", "families"),
    [
        (["::"], (True, True)),
        (["[::]"], (True, True)),
        (["0.0.0.0"], (True, False)),
        (["0.0.0.0", "::"], (True, True)),
        (["::", "0.0.0.0", "127.0.0.1", "::1"], (True, True)),
        (["::", "127.0.0.1"], (True, True)),
        (["::", "127.0.0.2"], (False, True)),
        (["127.0.0.1", "[::1]", "127.0.0.1"], (True, True)),
        (["::1"], (False, True)),
    ],
    ids=str,
)
def test_a_host_may_be_repeated(
    start_server: StartServer, names: list[str], families: tuple[bool, bool], workers: str
) -> None:
    """All addresses are on one port. `::` takes IPv4 too, unless an IPv4 address is named beside it."""
    server = start_server(*hosts(*names), "--workers", workers)
    assert served(server.port) == families
    assert server.read("/status")["configuration"]["host"] == ", ".join(names)


@needs_ipv6
def test_the_variable_is_a_comma_list(start_server: StartServer) -> None:
    server = start_server(variables={"NOTIFYD_HOST": "127.0.0.1, ::1"})
    assert served(server.port) == (True, True)
    assert server.read("/status")["configuration"]["host"] == "127.0.0.1, ::1"


@needs_ipv6
@with_one_and_two_workers
@pytest.mark.parametrize("names", [["::"], ["127.0.0.1", "::1"]], ids=str)
def test_the_internal_port_is_on_both_families(start_server: StartServer, names: list[str], workers: str) -> None:
    """Its figures are there alone, on each of its addresses."""
    port = free_port()
    flags = [word for name in names for word in ("--internal-host", name)]
    server = start_server(*hosts("127.0.0.1", "::1"), "--workers", workers, "--internal-port", str(port), *flags)
    assert served(port, "/status") == (True, True)
    assert served(server.port) == (True, True)
    assert served(server.port, "/status") == (False, False)


@needs_ipv6
def test_the_log_names_every_address(start_server: StartServer) -> None:
    """The log names each as a URL."""
    server = start_server(*hosts("127.0.0.1", "::1"))
    server.wait_for_line(rf"listens on http://127\.0\.0\.1:{server.port} and http://\[::1\]:{server.port} \(Ctrl")


# Names.


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let every name stand for these addresses."""
    real = socket.getaddrinfo

    def fake(_: str, *arguments: Any, **options: Any) -> list[Any]:
        return [found for address in addresses for found in real(address, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", fake)


def bound(*names: str) -> list[tuple[str, int]]:
    listeners = bind(Settings(), names, 0)
    found = [listener.getsockname()[:2] for listener in listeners]
    for listener in listeners:
        listener.close()
    return found


@needs_ipv6
def test_a_name_stands_for_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """localhost is ::1 and 127.0.0.1 on most machines: browsers try both, other programs the first."""
    resolve_to(monkeypatch, "::1", "127.0.0.1")
    (first, port), second = bound("localhost")
    assert (first, second) == ("::1", ("127.0.0.1", port))


def test_an_address_of_a_name_that_is_not_here_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without IPv6 may still resolve localhost to ::1; 2001:db8::1 is nobody's."""
    resolve_to(monkeypatch, "2001:db8::1", "127.0.0.1")
    assert [host for host, _ in bound("localhost")] == ["127.0.0.1"]


# One port.


@needs_ipv6
def test_a_free_port_is_free_on_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system's choice for the first address is taken on the second, another is asked for."""
    real, ports = server._bind, []

    def taken_once(listener: socket.socket, address: Any, *arguments: Any, **options: Any) -> None:
        ports.append(address[1])
        if len(ports) == 2:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        real(listener, address, *arguments, **options)

    monkeypatch.setattr(server, "_bind", taken_once)
    (_, first), (_, second) = bound("127.0.0.1", "::1")
    assert first == second
    assert [port == 0 for port in ports] == [True, False, True, False]


@needs_ipv6
@with_one_and_two_workers
@pytest.mark.parametrize(
    ("names", "taken", "shown"),
    [
        (["127.0.0.1", "::1"], "::1", "[::1]:{port}"),
        (["[::1]"], "::1", "[::1]:{port}"),
        (["::"], "127.0.0.1", "[::]:{port}"),
        (["0.0.0.0", "::"], "127.0.0.1", "0.0.0.0:{port}"),
        (["localhost"], "127.0.0.1", "localhost:{port} (127.0.0.1)"),
    ],
    ids=str,
)
def test_a_port_that_is_taken_on_one_address_is_one_line(
    names: list[str], taken: str, shown: str, workers: str
) -> None:
    """The line names the address as it was given, and the exit status is 1."""
    with socket.create_server((taken, 0), family=socket.AF_INET6 if ":" in taken else socket.AF_INET) as listener:
        port = listener.getsockname()[1]
        ended = run(*hosts(*names), "--port", str(port), "--workers", workers)
    assert ended == (1, "", f"notifyd: cannot listen on {shown.format(port=port)}: Address already in use\n")


@pytest.mark.parametrize("name", ["nobody.invalid", "[nobody.invalid]", "[::1]:8000", "::g"])
def test_an_unknown_host_beside_a_known_one_is_one_line(name: str) -> None:
    """The line names it, and nothing is served."""
    ended = run(*hosts("127.0.0.1", name), "--port", "0")
    assert ended.in_one_line == (1, 1)
    assert name in ended.stderr


def test_a_comma_list_in_a_flag_is_refused() -> None:
    """The line says how to name several."""
    ended = call("--host", "127.0.0.1,::1")
    assert ended.in_one_line == (2, 1)
    assert "repeat the flag for each" in ended.stderr


@pytest.mark.parametrize(("variable", "value"), [("NOTIFYD_HOST", ""), ("NOTIFYD_INTERNAL_HOST", " , ")])
def test_an_empty_list_of_hosts_is_refused(variable: str, value: str) -> None:
    said = f"notifyd: {variable}: expected a list that is not empty, got []\n"
    assert call(variables={variable: value}) == (2, "", said)


# The peer.


@needs_ipv6
def test_a_socket_for_both_families_shows_an_ipv4_address_as_such() -> None:
    """Not as ::ffff:127.0.0.1, which logs, limits and apps would take for another address."""

    async def peer() -> Any:
        heard: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        class Listener(asyncio.Protocol):
            def connection_made(self, transport: Any) -> None:
                heard.set_result(peer_of(transport))
                transport.close()

        [listener] = bind(Settings(), ["::"], 0)
        async with await asyncio.get_running_loop().create_server(Listener, sock=listener):
            with closing(await asyncio.to_thread(socket.create_connection, ("127.0.0.1", listener.getsockname()[1]))):
                return await heard

    assert asyncio.run(peer()).client[0] == "127.0.0.1"


def test_the_table_of_descriptors_has_room_for_all_connections(start_server: StartServer) -> None:
    """Where it grows later, each time holds the loop of a process with threads."""
    server = start_server("--max-connections", "3000")
    status = Path(f"/proc/{server.pid}/status").read_text()
    assert int(status.split("FDSize:")[1].split()[0]) >= 3000
