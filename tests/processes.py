"""Processes for the tests: a server on a free port, used over loopback and ended by its pid, and the facts of /proc.

Clocks are shortened in a server, too: `Server.notifyd(constants={"store.LEASE_SECONDS": 1})`.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from email.message import Message
from http.client import HTTPResponse
from io import StringIO
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch
from urllib.parse import quote, urlsplit

import httpx
import pytest
from bytes import rest
from expected import parse
from forks import Forked
from websockets.sync.client import connect
from ws_clients import PATIENCE, BareClient, Client

from settings import Settings

ROOT = Path(__file__).resolve().parent.parent
# No test notifications and no pings.
QUIET = ("--notification-interval", "0", "--ping-interval", "0")
# Flags that may be repeated.
REPEATED = {name for name in Settings.__struct_fields__ if isinstance(getattr(Settings(), name), tuple)}
ALARMING = re.compile(r"Traceback|Exception|Task exception was never retrieved|was never awaited|ResourceWarning")


# A connection is known by the socket that its process did not have before.
ONE_AT_A_TIME = threading.Lock()

# Three processes for each of many cases are for `make test-all`.
with_one_and_two_workers = pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def eventually(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience} s: {condition}"
        time.sleep(0.01)


# Below the ports that the kernel gives to sockets without one: such a port could be taken before it is used. Each
# process of the tests begins at another.
_PORTS = itertools.cycle(range(10_000, 32_000))
for _ in range(os.getpid() * 211 % 22_000):
    next(_PORTS)


def free_port() -> int:
    """Return a port that is free, for servers that cannot choose one themselves."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def is_free(port: int) -> bool:
    """Whether a server could listen on this port."""
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("", port))
        return True
    return False


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment with these NOTIFYD_ variables and no others."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("NOTIFYD_")}
    return own | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | dict(variables or {})


class Server:
    """A running server and all the clients that a test opened to it.

    Rule 1: every connection is opened through it, so that `forget_clients` leaves none behind.
    Rule 2: only the process that was started here is ever signalled, by its pid, or its own group when it is killed.
    """

    started: ClassVar[list[Server]] = []  # For the check of the logs after each test, see conftest.py.
    extra_flags: ClassVar[list[str]] = []  # pytest --server-args="..."
    python: ClassVar[str] = sys.executable  # pytest --server-python=...

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str] | None = None,
        *,
        url: str | None = None,
        cwd: Path = ROOT,
        is_forked: bool = False,
    ) -> None:
        """Start the command in `cwd`, and wait until it serves: at `url`, or at the one that it logs."""
        self.command = command
        self.test = os.environ.get("PYTEST_CURRENT_TEST", "nobody")
        self.stderr: list[str] = []
        self.asked_to_stop = False
        self._killed = False
        self._shown = 0
        self._line = threading.Condition()
        self._clients = ExitStack()
        self.process: subprocess.Popen[str] | Forked
        if is_forked:
            self.process = Forked(command, environment(variables))
        else:
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment(variables),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()
        Server.started.append(self)
        try:
            self.url = url or self._logged_url()
            self.ws_url = "ws" + self.url.removeprefix("http") + "/ws"
            self.http = httpx.Client(base_url=self.url, trust_env=False, verify=False, timeout=PATIENCE)
            if url is not None:
                eventually(self._serves)
        except BaseException:
            self.kill()
            raise

    def __str__(self) -> str:
        return f"{' '.join(self.command[1:])} (started by {self.test})"

    @classmethod
    def notifyd(
        cls, *flags: str, variables: Mapping[str, str] | None = None, constants: Mapping[str, float] | None = None
    ) -> Server:
        """Start `python notifyd.py` on a free port with these flags, and with other values for some constants."""
        command = notifyd_command(*_last_of_each(["--port", "0", *flags]), constants=constants)
        # A library that is loaded first changes only a process that starts from the beginning.
        can_fork = hasattr(os, "pidfd_open") and "LD_PRELOAD" not in os.environ
        return cls(command, variables, is_forked=can_fork)

    def _collect(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._line:
                self.stderr.append(line.rstrip("\n"))
                self._line.notify_all()
        with self._line:
            self._line.notify_all()

    def _logged_url(self) -> str:
        found = re.search(r"https?://(\[[^\]]+\]|[^\s:/]+):\d+", self.wait_for_line(r"https?://\S+:\d+"))
        assert found
        return found[0]

    def _serves(self) -> bool:
        assert self.process.poll() is None, f"ended with {self.process.returncode}"
        with suppress(httpx.TransportError):
            return self.http.get("/health").status_code == 200
        return False

    # The process.

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def host(self) -> str:
        return str(urlsplit(self.url).hostname)

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def wait_for_line(self, pattern: str, patience: float = PATIENCE, *, after: int = 0) -> str:
        """Return the first line of the log, from line `after` on, with a match of the pattern."""
        deadline = time.monotonic() + patience
        with self._line:
            while True:
                for line in self.stderr[after:]:
                    if re.search(pattern, line):
                        return line
                left = deadline - time.monotonic()
                ended = self.process.poll() is not None and not self._reader.is_alive()
                assert left > 0 and not ended, f"no line like {pattern!r} in the log:\n" + "\n".join(self.stderr)
                self._line.wait(min(left, 0.2))

    def signal(self, number: Signals = SIGTERM) -> None:
        os.kill(self.pid, number)

    def drain(self, number: Signals = SIGTERM) -> None:
        """Ask the server to shut down, and return when it has begun."""
        self.signal(number)
        eventually(lambda: self.get("/health").status_code == 503)

    def exit_status(self, patience: float = PATIENCE) -> int:
        """Wait for the end of the process and return its status."""
        status = self.process.wait(patience)
        self._reader.join(PATIENCE)
        return status

    def ask_to_stop(self) -> None:
        """Let all clients go and end the process as an operator does, without waiting for it."""
        self.forget_clients()
        if self.process.poll() is None:
            self.asked_to_stop = True
            self.signal()

    def complaints(self) -> Iterator[str]:
        """Let all clients go, print the new lines of the log, and return the faults of log and process."""
        self.forget_clients()
        if self.process.poll() is not None:
            self._reader.join(PATIENCE)
            if self.asked_to_stop and self.process.returncode != 0:
                yield f"{self}: exit status {self.process.returncode}"
        elif not self.asked_to_stop:
            try:
                eventually(lambda: self.active() == 0)
            except AssertionError:
                yield f"{self}: {self.active()} clients are still counted after all have left"
        log = self.new_log()
        if log:
            print(log)
        if ALARMING.search(log):
            yield f"{self} logged:\n{log}"

    def stop(self) -> None:
        """End the process as an operator does, and wait for it; without clients that takes no time."""
        self.ask_to_stop()
        with suppress(subprocess.TimeoutExpired):
            self.exit_status()
        self.kill()

    def kill(self) -> None:
        """End the process at once and close everything that belongs to it."""
        self.forget_clients()
        if self._killed:
            return
        self._killed = True
        with suppress(ProcessLookupError):  # Its workers too: the process leads their group.
            os.killpg(self.pid, SIGKILL)
        self.process.wait()
        self._reader.join(PATIENCE)
        if self.process.stderr is not None:
            self.process.stderr.close()
        if hasattr(self, "http"):
            self.http.close()

    def new_log(self) -> str:
        """Return the lines logged since the last call."""
        with self._line:
            lines, self._shown = self.stderr[self._shown :], len(self.stderr)
        return "\n".join(lines)

    def processes(self) -> list[int]:
        """Return the pid of the server and those of its workers."""
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
        return [pid for pid in pids if _group(pid) == self.pid]

    def memory(self) -> int:
        """Return the bytes that its processes hold in memory."""
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in self.processes()]
        return sum(int(size) * 1024 for text in texts for size in re.findall(r"VmRSS:\s+(\d+) kB", text))

    def descriptors(self) -> int:
        """Return the number of sockets and pipes that its processes have open.

        Files are left out: the SQLite library closes some only with its next transaction.
        """
        count = 0
        for pid in self.processes():
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with suppress(FileNotFoundError):
                    count += not os.readlink(entry.path).startswith("/")
        return count

    def holds(self, connection: socket.socket) -> bool:
        """Return whether the process has its end of this connection open."""
        ends = [f":{port:04X}" for port in (self.port, connection.getsockname()[1])]
        for line in Path("/proc/net/tcp").read_text().splitlines():
            _, ours, theirs, *fields = line.split()
            if [ours[-5:], theirs[-5:]] == ends:
                return fields[6] != "0"  # The inode: 0 for a socket that only the kernel still knows.
        return False

    # HTTP.

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.http.request(method, path, **options)

    def read(self, path: str) -> Any:
        """Return the parsed body of a GET that must succeed."""
        response = self.get(path)
        assert response.status_code == 200, response.text
        return parse(response.content)

    def post(self, body: object, **options: Any) -> httpx.Response:
        """POST to /notify: bytes as they are, anything else as JSON."""
        if isinstance(body, bytes):
            options.setdefault("headers", {"Content-Type": "application/json"})
            return self.http.post("/notify", content=body, **options)
        return self.http.post("/notify", json=body, **options)

    def notify(self, message: str, **fields: Any) -> Any:
        """Publish a notification and return the parsed answer; it must be accepted."""
        response = self.post({"message": message} | fields)
        assert response.status_code == 200, response.text
        return parse(response.content)

    def publish(self, *messages: str, **fields: Any) -> list[str]:
        """Publish these messages and return their ids; they must be accepted."""
        responses = [self.post({"message": message} | fields) for message in messages]
        assert {response.status_code for response in responses} <= {200}, [response.text for response in responses]
        return [response.headers["Notification-Id"] for response in responses]

    def next_for(self, client: Client) -> str:
        """Publish a marker, and return the message of the notification that the client gets next."""
        self.notify("marker")
        return str(client.receive()["data"]["message"])

    def active(self) -> int:
        """Return how many clients the server says are connected."""
        return int(parse(self.get("/health").content)["connections"]["active"])

    def raw(self, data: bytes) -> socket.socket:
        """Open a TCP connection, send these bytes and return the socket."""
        connection = socket.create_connection((self.host, self.port), PATIENCE)
        self._clients.callback(connection.close)
        connection.sendall(data)
        return connection

    def response_to(self, data: bytes) -> tuple[int, Message, bytes]:
        """Send these bytes over a connection of their own; return status, headers and body of the first answer."""
        response = HTTPResponse(self.raw(data), method=data.partition(b" ")[0].decode("latin-1"))
        response.begin()
        with response:
            return response.status, response.headers, response.read()

    def answer_to(self, data: bytes) -> bytes:
        """Send these bytes over a connection of their own and return all that comes back until it ends."""
        return rest(self.raw(data))

    # WebSocket.

    def address(self, client_id: str | None = None, *, query: str = "") -> str:
        """Return the URL for a client with this client_id, or with a query of any kind."""
        query = query or ("" if client_id is None else f"client_id={quote(client_id, safe='')}")
        return f"{self.ws_url}?{query}" if query else self.ws_url

    def connect(self, client_id: str | None = None, *, query: str = "", **options: Any) -> Client:
        """Connect and read nothing yet: a welcome or the reason of a refusal is still to come."""
        defaults = {"compression": None, "proxy": None, "ping_interval": None, "close_timeout": 1}
        defaults |= {"max_queue": None, "max_size": None, "open_timeout": PATIENCE}
        address = options.pop("url", "") or self.address(client_id, query=query)
        return Client(self._clients.enter_context(connect(address, **(defaults | options))))

    def join(self, client_id: str | None = None, **options: Any) -> Client:
        """Connect and be welcomed."""
        client = self.connect(client_id, **options)
        assert client.receive()["type"] == "welcome"
        return client

    def connect_bare(self, client_id: str | None = None, *, receive_buffer: int | None = None) -> BareClient:
        """Connect on a bare socket and read nothing yet."""
        client = BareClient(self.address(client_id), receive_buffer=receive_buffer)
        self._clients.callback(client.socket.close)
        return client

    def join_bare(self, client_id: str | None = None, *, receive_buffer: int | None = None) -> BareClient:
        """Connect on a bare socket and be welcomed."""
        client = self.connect_bare(client_id, receive_buffer=receive_buffer)
        assert client.receive()["type"] == "welcome"
        return client

    def forget_clients(self) -> None:
        """Close every connection that the test opened."""
        self._clients.close()


def notifyd_command(*flags: str, constants: Mapping[str, float] | None = None) -> list[str]:
    """Return the command line that starts notifyd, where some constants of its modules may have other values.

    A constant is named where it is defined. It is set before other modules import it, in every worker as well.
    """
    # A store of its own for each server: those on one store are one server.
    own = secrets.token_hex(8)
    extra = [flag.replace("{new}", own) for flag in Server.extra_flags]
    program = [str(ROOT / "notifyd.py")]
    if constants is not None:
        program = ["-c", "; ".join([*_assignments(constants), "import sys, notifyd", "sys.exit(notifyd.main())"])]
    return [Server.python, *program, *(_last_of_each([*flags, *extra]) if extra else flags)]


def _last_of_each(words: Sequence[str]) -> list[str]:
    """Return the flags with the last of each that takes one value: notifyd refuses several."""
    flags: dict[str, list[str]] = {}
    for number, word in enumerate(words):
        if word.startswith("--"):
            name = word.partition("=")[0]
            # As given, so that each stays.
            key = f"{name} {number}" if name[2:].replace("-", "_") in REPEATED else name
            flags.pop(key, None)
            flags[key] = [word]
        else:
            flags[key].append(word)
    return [word for flag in flags.values() for word in flag]


def _assignments(constants: Mapping[str, float]) -> Iterator[str]:
    for name, value in constants.items():
        module, _, constant = name.partition(".")
        assert hasattr(importlib.import_module(module), constant), f"there is no {name}"
        yield f"import {module}; {name} = {value}"


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def workers(server: Server) -> set[int]:
    """Return the process ids of the server's workers."""
    with suppress(ProcessLookupError, FileNotFoundError):
        return {int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()}
    return set()


def sockets(pid: int) -> set[str]:
    """Return the identities of the open sockets of a process."""
    names = set()
    with suppress(FileNotFoundError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                names.add(str(descriptor.readlink()))
    return {name for name in names if name.startswith("socket:")}


def runs(pid: int) -> bool:
    """Whether the process is there, and not only its exit status for a parent that is slow to ask for it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def listens(pid: int, port: int) -> bool:
    """Whether the process listens on the port of 127.0.0.1."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return any(
        f"socket:[{row[9]}]" in sockets(pid) for row in rows if row[1] == f"0100007F:{port:04X}" and row[3] == "0A"
    )


def serving(server: Server) -> list[int]:
    """Return the ids of the processes that serve, the oldest first."""
    return sorted(workers(server)) or [server.pid]


def connected(server: Server) -> tuple[socket.socket, int]:
    """Open a TCP connection; return it, and the process that has accepted it."""
    deadline = time.monotonic() + PATIENCE
    with ONE_AT_A_TIME:
        while time.monotonic() < deadline:
            before = {pid: sockets(pid) for pid in serving(server)}
            connection = server.raw(b"")
            # Where a process is replaced meanwhile, its successor may have taken it: start afresh.
            while serving(server) == list(before) and time.monotonic() < deadline:
                if owners := [pid for pid in before if sockets(pid) - before[pid]]:
                    return connection, owners[0]
            connection.close()
    raise AssertionError("nobody accepts")


def program(*names: str) -> str:
    """Return the path of the first of these programs that is installed.

    Without any, the test is skipped; in CI, where all tests have to run, it fails.
    """
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = next(filter(None, (shutil.which(name, path=places) for name in names)), None)
    if found is None:
        reason = f"{names[0]} is not installed"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return found


def node_with(package: str) -> str:
    """Return the path of node, for a script in tests/ that uses an npm package; skip or fail where it is missing."""
    if not (ROOT / "tests" / "node_modules" / package).exists():
        reason = f"the npm package {package} is not installed: npm install --prefix tests"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    return program("node")


class Ended(NamedTuple):
    """The end of a command line that did not serve: its status and output."""

    status: int
    stdout: str
    stderr: str

    @property
    def in_one_line(self) -> tuple[int, int]:
        """The status, and the number of lines on stderr."""
        return self.status, len(self.stderr.splitlines())


def run(*flags: str, variables: Mapping[str, str] | None = None) -> Ended:
    """Run notifyd in a process that must end by itself."""
    command, variables = notifyd_command(*flags), environment(variables)
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def call(*flags: str, variables: Mapping[str, str] | None = None) -> Ended:
    """Run notifyd's command line in this process: it must end before it serves."""
    import notifyd

    _, _, *words = notifyd_command(*flags)
    before = list(logging.root.handlers)
    with (
        redirect_stdout(StringIO()) as stdout,
        redirect_stderr(StringIO()) as stderr,
        patch.object(sys, "argv", ["notifyd.py", *words]),
        patch.dict(os.environ, environment(variables), clear=True),
        patch("uvicorn.Server.run", side_effect=AssertionError("it serves")),
        patch("server.supervise", side_effect=AssertionError("it serves")),
    ):
        logging.root.handlers.clear()
        try:
            status = notifyd.main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            logging.root.handlers[:] = before
            logging.root.setLevel(logging.WARNING)
    return Ended(status, stdout.getvalue(), stderr.getvalue())


def worker_count() -> int:
    """Return how many processes serve, where a test does not say it."""
    found = re.search(r"--workers (\d+)", " ".join(Server.extra_flags))
    return int(found[1]) if found else 1


def use_extra_flags(flags: str) -> None:
    """Append these flags to every notifyd command line from now on."""
    Server.extra_flags += shlex.split(flags)
