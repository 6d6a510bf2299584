"""The command line and the variables: each setting in both, and one clear line for every mistake."""

from __future__ import annotations

import re
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from conftest import StartServer
from expected import PONG, welcome
from processes import (
    ROOT,
    Server,
    call,
    environment,
    eventually,
    free_port,
    notifyd_command,
    run,
    with_one_and_two_workers,
)
from ws_clients import PATIENCE

from server import bind
from settings import Settings, SettingsError

DEFAULTS = {
    "host": "127.0.0.1",
    "port": "8000",
    "workers": "1",
    "debug": "false",
    "log_level": "INFO",
    "notification_interval": "10",
    "max_connections": "1000",
    "shutdown_timeout": "1800",
    "ping_interval": "30",
    "ping_timeout": "60",
    "history_size": "1000",
    "history_ttl": "300",
    "max_message_size": "65536",
    "allow_origin": "",
    "on_duplicate": "refuse",
    "drain_rate": "1000",
}

BAD = [
    ("port", "http"),
    ("port", "70000"),
    ("port", "-1"),
    ("workers", "0"),
    ("max_connections", "0"),
    ("max_connections", "many"),
    ("max_connections", "1.5"),
    ("notification_interval", "-1"),
    ("notification_interval", "nan"),
    ("ping_interval", "inf"),
    ("ping_timeout", "0"),
    ("shutdown_timeout", "-1"),
    ("log_level", "LOUD"),
    ("history_size", "0"),
    ("history_ttl", "-5"),
    ("max_message_size", "0"),
    ("on_duplicate", "maybe"),
    ("drain_rate", "0"),
    ("allow_origin", "not an origin"),
]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    return "NOTIFYD_" + name.upper()


@pytest.fixture(scope="module")
def shown() -> str:
    """The output of --help."""
    ended = call("--help")
    assert ended.status == 0
    return ended.stdout


# Help.


@pytest.mark.parametrize("name", DEFAULTS)
def test_help_shows_every_setting_with_its_default(shown: str, name: str) -> None:
    """The paragraph of each flag has the default in it."""
    found = re.search(rf"^ +{flag(name)}\b.*?(?=^ +-|\Z)", shown, re.DOTALL | re.MULTILINE)
    assert found and DEFAULTS[name].lower() in found[0].lower()


def test_help_mentions_the_variables(shown: str) -> None:
    """--help says that every flag has a variable."""
    assert "NOTIFYD_" in shown


# Mistakes.


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_flag_stops_the_start_with_one_line(name: str, value: str) -> None:
    """The line names the setting, and the exit status is 2."""
    ended = call(f"{flag(name)}={value}")
    assert ended.in_one_line == (2, 1)
    assert re.search(name.replace("_", "[-_]"), ended.stderr, re.IGNORECASE)


def test_a_mistake_ends_the_process_with_its_status() -> None:
    """The status and the line of main() are those of the process."""
    ended = run("--port=http")
    assert ended.in_one_line == (2, 1)
    assert "--port" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--log-level=foo", "--log-level: expected one of DEBUG, INFO, WARNING, ERROR, CRITICAL, got 'foo'"),
        ("--on-duplicate=Refuse", "--on-duplicate: expected one of refuse, replace, got 'Refuse'"),
        ("--host=", "--host: expected a text that is not empty, got ['']"),
        (
            "--host=127.0.0.1,::1",
            "--host: expected addresses or names, got ['127.0.0.1,::1']; repeat the flag for each",
        ),
        (
            "--trusted-proxies=10.0.0.1,unix",
            "--trusted-proxies: expected addresses, networks such as 10.0.0.0/8, or unix, got ['10.0.0.1,unix']; "
            "repeat the flag for each",
        ),
        ("--ping-interval=1e-6", "--ping-interval: expected 0 or a number >= 0.01, got '1e-6'"),
        ("--notification-interval=0.009", "--notification-interval: expected 0 or a number >= 0.01, got '0.009'"),
        ("--history-ttl=1e-6", "--history-ttl: expected a number >= 0.01, got '1e-6'"),
        ("--port=70000", "--port: expected an integer <= 65535, got '70000'"),
    ],
)
def test_an_error_names_the_expected_and_the_given_value(flags: str, line: str) -> None:
    """The error names the expected value, and the given one as it was given."""
    assert call(flags) == (2, "", f"notifyd: {line}\n")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_connections", "0"), ("debug", "perhaps"), ("port", "http"), ("allow_origin", "a,b")],
)
def test_a_bad_variable_stops_the_start_with_one_line(name: str, value: str) -> None:
    """A variable is checked like a flag."""
    ended = call(variables={variable(name): value})
    assert ended.in_one_line == (2, 1)
    assert re.search(name.replace("_", "[-_]"), ended.stderr, re.IGNORECASE)


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--max-connection", "5"], ["serve"], ["--port"]])
def test_an_unknown_flag_stops_the_start_with_one_line(flags: list[str]) -> None:
    """Unknown, abbreviated, superfluous and incomplete flags are told by name, with status 2."""
    ended = call(*flags)
    assert ended.in_one_line == (2, 1)
    assert flags[0] in ended.stderr


def test_a_port_in_use_stops_the_start_with_one_line(server: Server) -> None:
    """The line names the port, and the exit status is 1."""
    ended = run("--port", str(server.port))
    assert ended.in_one_line == (1, 1)
    assert str(server.port) in ended.stderr


@pytest.mark.parametrize(
    "host",
    ["203.0.113.1", "no such host", "x" * 64, "two..dots"],
    ids=["another machine's", "unknown", "too long", "empty label"],
)
def test_a_host_that_is_not_ours_stops_the_start_with_one_line(host: str) -> None:
    """Where nobody can listen, the line names it, and the exit status is 1."""
    ended = run("--host", host, "--port", "0")
    assert ended.in_one_line == (1, 1)
    assert host in ended.stderr


@with_one_and_two_workers
@pytest.mark.parametrize("store", ["sqlite:/nonexistent/log.db", "sqlite:/", "redis://:secret@host:port"])
def test_a_store_that_cannot_be_used_stops_the_start_with_one_line(store: str, workers: str) -> None:
    """A store that cannot be used is one line without the password, and the exit status is 2."""
    ended = run("--store", store, "--workers", workers, "--port", "0")
    assert ended.in_one_line == (2, 1)
    assert "store" in ended.stderr and "secret" not in ended.stderr


@pytest.mark.parametrize(
    "bad",
    [
        {"port": "8000"},
        {"port": b"8000"},
        {"debug": 1},
        {"host": None},
        {"host": "127.0.0.1"},
        {"host": ()},
        {"log_level": 5},
        {"ping_timeout": "60"},
        {"loop": []},
        {"allow_origin": "https://a.example"},
        {"allow_origin": ["nonsense"]},
        {"allow_origin": [5]},
    ],
    ids=str,
)
def test_a_bad_setting_of_a_program_is_named(bad: dict[str, Any]) -> None:
    """A host gets one kind of error, when it makes the settings."""
    with pytest.raises(SettingsError, match=f"^{next(iter(bad))}: expected .*, got "):
        Settings(**bad)


ONE_VALUE = [name for name in Settings.__struct_fields__ if not isinstance(getattr(Settings(), name), bool | tuple)]


@pytest.mark.parametrize("name", ONE_VALUE)
def test_a_second_value_is_refused(name: str) -> None:
    """The first would be ignored in silence; the line names the flag, and the exit status is 2."""
    ended = call(flag(name), "1", f"{flag(name)}=1")
    assert ended == (2, "", f"notifyd: {flag(name)}: expected one value, got several (--help shows every flag)\n")


@pytest.mark.parametrize("second", ["--debug", "--no-debug"])
def test_a_flag_and_its_opposite_are_two_values(second: str) -> None:
    """As of any other setting, neither wins."""
    line = "notifyd: --debug: expected one value, got several (--help shows every flag)\n"
    assert call("--debug", second) == (2, "", line)


# Flags and variables.


def test_every_setting_has_a_variable(start_server: StartServer) -> None:
    """Each variable changes the setting of that name."""
    values = {
        "host": "localhost",
        "workers": "1",
        "debug": "true",
        "log_level": "DEBUG",
        "notification_interval": "77",
        "max_connections": "55",
        "shutdown_timeout": "66",
        "ping_interval": "44",
        "ping_timeout": "99",
        "history_size": "10",
        "history_ttl": "20",
        "max_message_size": "1000",
        "allow_origin": "https://a.example,https://b.example",
        "on_duplicate": "replace",
        "drain_rate": "10",
    }
    server = start_server(quiet=False, variables={variable(name): value for name, value in values.items()})
    status = server.read("/status")
    assert status["configuration"] | {"port": 0} == {
        "host": "localhost",
        "port": 0,
        "workers": 1,
        "debug": True,
        "log_level": "DEBUG",
    }
    assert status["notification_service"]["notification_interval"] == 77
    assert (status["connections"]["max_allowed"], status["shutdown"]["shutdown_timeout"]) == (55, 66)
    assert server.post(b'{"message": "' + b"x" * 1000 + b'"}').status_code == 413
    assert server.get("/health", headers={"Origin": "https://b.example"}).status_code == 200


def test_a_flag_goes_before_a_variable(start_server: StartServer) -> None:
    """A flag overrides its variable."""
    server = start_server("--max-connections", "5", variables={"NOTIFYD_MAX_CONNECTIONS": "7"})
    assert server.read("/health")["connections"]["max_allowed"] == 5


def test_a_flag_heals_a_bad_variable(start_server: StartServer) -> None:
    """A variable that a flag overrides is not looked at."""
    server = start_server("--max-connections", "5", variables={"NOTIFYD_MAX_CONNECTIONS": "many"})
    assert server.read("/health")["connections"]["max_allowed"] == 5


@pytest.mark.parametrize(("value", "debug"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_a_variable_says_true_or_false(start_server: StartServer, value: str, debug: bool) -> None:
    """Booleans are written as people write them."""
    server = start_server(variables={"NOTIFYD_DEBUG": value})
    assert server.read("/status")["configuration"]["debug"] is debug


def test_an_unknown_variable_is_warned_about(start_server: StartServer) -> None:
    """A misspelt variable is told by name, and the server starts."""
    server = start_server(variables={"NOTIFYD_MAX_CONECTIONS": "7"})
    assert "WARNING" in server.wait_for_line("NOTIFYD_MAX_CONECTIONS").upper()


@pytest.mark.parametrize("variable", ["NOTIFYD_PORT", "NOTIFYD_INTERNAL_PORT"])
def test_the_port_that_kubernetes_injects_is_ignored_with_a_warning(start_server: StartServer, variable: str) -> None:
    """tcp://... is no port but a habit of Kubernetes, for services called notifyd and notifyd-internal."""
    server = start_server(variables={variable: "tcp://10.0.0.1:8000"})
    assert "WARNING" in server.wait_for_line(variable).upper()


def test_known_variables_are_not_warned_about(start_server: StartServer) -> None:
    """A start with a proper variable logs no warning."""
    server = start_server(variables={"NOTIFYD_MAX_CONNECTIONS": "7"})
    server.read("/health")
    assert [line for line in server.stderr if "warn" in line.lower()] == []


# Where it listens.


def test_the_server_listens_on_the_given_port(start_server: StartServer) -> None:
    """A server that is started on a port serves there, and shows it in its configuration."""
    port = free_port()
    server = start_server("--port", str(port))
    assert (server.port, server.read("/status")["configuration"]["port"]) == (port, port)


def test_ipv6_is_served(start_server: StartServer) -> None:
    """--host ::1 listens on the other loopback."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    server = start_server("--host", "::1")
    assert server.connect("bob").receive() == welcome("bob")


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs Linux")
@pytest.mark.parametrize("ping_interval", [30, 0])
def test_the_kernel_drops_a_peer_that_takes_nothing(ping_interval: int) -> None:
    """A little after the ping would have, and where there are no pings, too."""
    [listener] = bind(Settings(ping_interval=ping_interval, ping_timeout=7), ["127.0.0.1"], 0)
    with listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 12_000


@pytest.mark.parametrize("level", ["DEBUG", "WARNING", "ERROR", "CRITICAL"])
def test_the_address_is_told_at_every_log_level(start_server: StartServer, level: str) -> None:
    """Where the server can be reached is never a secret."""
    assert start_server("--log-level", level).read("/status")["configuration"]["log_level"] == level


# Open files.


@pytest.fixture
def limited() -> Iterator[Callable[..., Server]]:
    """Start servers under a shell's limits of open files."""
    servers = []

    def start(limits: str, *flags: str) -> Server:
        command = notifyd_command("--port", "0", "--notification-interval", "0", *flags)
        servers.append(Server(["sh", "-c", f'{limits}; exec "$@"', "sh", *command]))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_the_soft_limit_of_open_files_is_raised(limited: Callable[..., Server]) -> None:
    """A shell's low default doesn't limit the connections; the hard limit does."""
    server = limited("ulimit -S -n 64")
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


def test_too_low_a_hard_limit_is_warned_about(limited: Callable[..., Server]) -> None:
    """The log says it when there can't be as many connections as allowed."""
    assert "WARNING" in limited("ulimit -n 200").wait_for_line(r"(?i)open files|descriptors|nofile").upper()


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_connected_clients_are_served_without_free_descriptors(limited: Callable[..., Server], loop: str) -> None:
    """The lack of descriptors is logged in a few lines, and ends when some connections have left."""
    server = limited("ulimit -n 40", "--loop", loop)
    client, line = server.join(), len(server.stderr)
    crowd = [server.raw(b"") for _ in range(80)]
    if loop == "asyncio":
        assert "Too many open files" in server.wait_for_line("Cannot accept", after=line)
    assert client.ask({"type": "ping"}) == PONG
    for connection in crowd:
        connection.close()
    eventually(lambda: is_served(server))
    assert len(server.stderr[line:]) < 5


def is_served(server: Server) -> bool:
    with suppress(httpx.TransportError):
        return server.get("/health").status_code == 200
    return False


def test_a_signal_during_the_start_ends_it() -> None:
    """Ctrl+C before the server listens quits without a traceback from inside."""
    process = subprocess.Popen(notifyd_command("--port", "0"), cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.readline()  # The first line of the log: the server has just begun.
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in text and process.returncode == 0


def test_a_signal_while_the_modules_load_ends_it() -> None:
    """Ctrl+C right after the start is as quiet; its status is the one that shells give."""
    interpreter, *command = notifyd_command("--port", "0")
    process = subprocess.Popen(
        [interpreter, "-X", "importtime", *command], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "msgspec" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in text and process.returncode == 130
