"""The commands beside serving: publish, listen, token and check, as processes against real servers."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from certificates import Pair
from conftest import StartServer
from expected import parse
from processes import ROOT, Ended, Server, call, environment, eventually, free_port, program
from redis_server import RedisServer
from ws_clients import PATIENCE

SECRET = "a secret of 32 characters or more"
NOBODY = "http://127.0.0.1:9"


def words(*given: str) -> list[str]:
    return [Server.python, str(ROOT / "notifyd.py"), *given]


def run(*given: str, stdin: bytes = b"", variables: Mapping[str, str] | None = None) -> Ended:
    """Run a command that ends by itself."""
    ended = subprocess.run(
        words(*given), cwd=ROOT, env=environment(variables), input=stdin, capture_output=True, timeout=60, check=False
    )
    return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


class Listening:
    """A `notifyd listen` that has been welcomed."""

    def __init__(self, *given: str, variables: Mapping[str, str] | None = None, stdout: int = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(
            words("listen", *given), env=environment(variables), stdout=stdout, stderr=subprocess.PIPE, text=True
        )
        self.heard()

    def heard(self) -> str:
        """Return the next line on stderr."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def next(self) -> Any:
        """Return the next notification."""
        assert self.process.stdout is not None
        return parse(self.process.stdout.readline())

    def end(self) -> tuple[int, str]:
        """Press Ctrl+C; return the status, and the rest of stderr."""
        self.process.send_signal(signal.SIGINT)
        _, stderr = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, stderr


@pytest.fixture
def listen() -> Iterator[Callable[..., Listening]]:
    started: list[Listening] = []

    def start(*given: str, **options: Any) -> Listening:
        started.append(Listening(*given, **options))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()


# Publish.


def test_a_publish_has_all_that_its_flags_say(server: Server) -> None:
    """The receipt has the id that the addressee gets; a slash at the end of the URL does not matter."""
    client = server.join(query="user=alice")
    flags = ["--type", "alert", "--data", '{"a": 1}', "--topic", "builds,team.a", "--topics", "b", "--user", "alice"]
    ended = run("publish", "disk full", *flags, "--client", "bob", variables={"NOTIFYD_URL": f"{server.url}/"})
    got = client.receive()
    assert (ended.status, ended.stderr) == (0, "")
    assert json.loads(ended.stdout) == {"id": got["id"], "recipients": 1}
    assert (got["type"], got["data"], got["topics"]) == (
        "alert",
        {"message": "disk full", "a": 1},
        ["b", "builds", "team.a"],
    )


def test_standard_input_is_one_message_without_its_newline(server: Server) -> None:
    client = server.join()
    assert run("publish", "-", "--url", server.url, stdin="zwölf\nLinien\n".encode()).status == 0
    assert client.receive()["data"] == {"message": "zwölf\nLinien"}


def test_a_refused_line_is_named_and_the_others_are_published(server: Server) -> None:
    """Blank lines are skipped; each published line has its receipt, in order, and the last needs no newline."""
    client = server.join()
    lines = [b"one", b"", b"two\r", b"x" * 8193, b"\xff", *(b"%d" % n for n in range(6, 1506)), b"end"]
    ended = run("publish", "--lines", "--url", server.url, stdin=b"\n".join(lines))
    assert ended.status == 1
    assert sorted(ended.stderr.splitlines()) == [
        "notifyd: line 4: message: expected string of length <= 8192 (400)",
        "notifyd: line 5: expected UTF-8",
    ]
    got = [client.receive() for _ in range(1503)]
    assert [one["data"]["message"] for one in got] == ["one", "two", *map(str, range(6, 1506)), "end"]
    assert [json.loads(line)["id"] for line in ended.stdout.splitlines()] == [one["id"] for one in got]


def test_lines_are_published_as_they_come(server: Server) -> None:
    """A pipe that goes on, as that of `tail -f`, holds nothing back."""
    client = server.join()
    command = words("publish", "-", "--lines", "--url", server.url)
    with subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        for message in ("one", "two"):
            process.stdin.write(f"{message}\n".encode())
            process.stdin.flush()
            assert client.receive()["data"] == {"message": message}
        process.stdin.close()
    assert process.returncode == 0


def test_all_lines_are_refused_at_once_where_the_reason_is_not_in_one(start_server: StartServer) -> None:
    server = start_server("--api-key", "ci:secret")
    line = "notifyd: Authentication required (401); line 1 and those after it are not published\n"
    assert run("publish", "--lines", "--url", server.url, stdin=b"one\ntwo\n") == (1, "", line)


class Losing(BaseHTTPRequestHandler):
    """Passes requests on; of the first answers to each key one is lost, and one is 503."""

    server_url = ""
    asked: list[tuple[str, str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Idempotency-Key"]
        type(self).asked.append((self.path, key))
        tries = sum(one == key for _, one in self.asked)
        if tries == 2:
            self.send_response(503)
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        import httpx

        answer = httpx.post(
            f"{self.server_url}{self.path}", content=body, headers={"Idempotency-Key": key}, trust_env=False
        )
        if tries == 1:
            self.close_connection = True
            return
        self.send_response(answer.status_code)
        self.send_header("Notification-Id", answer.headers["Notification-Id"])
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("flags", [["one"], ["--lines"]], ids=["message", "lines"])
def test_a_lost_answer_publishes_nothing_twice(server: Server, flags: list[str]) -> None:
    """The request is repeated with its key, and the receipt is that of the first."""
    client = server.join()
    handler = type("Handler", (Losing,), {"server_url": server.url, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        ended = run("publish", *flags, "--url", f"http://127.0.0.1:{proxy.server_port}", stdin=b"one\n")
        proxy.shutdown()
    got = client.receive()
    assert (ended.status, json.loads(ended.stdout)) == (0, {"id": got["id"], "recipients": 1})
    assert len(handler.asked) == 3 and len(set(handler.asked)) == 1
    assert server.next_for(client) == "marker"


UNREACHABLE = {
    "nobody listens": (NOBODY, "Connection refused"),
    "no such host": ("http://no-such-host.invalid", "not known|resolution|No address"),
}


@pytest.mark.parametrize("command", [["publish", "hi"], ["listen"]], ids=["publish", "listen"])
@pytest.mark.parametrize("case", UNREACHABLE)
def test_an_unreachable_server_is_one_line(command: list[str], case: str) -> None:
    url, reason = UNREACHABLE[case]
    ended = run(*command, "--url", url)
    assert ended.in_one_line == (1, 1)
    assert re.match(rf"notifyd: cannot reach {url}: .*({reason})", ended.stderr)


@pytest.mark.parametrize("command", [["publish", "hi"], ["listen"]], ids=["publish", "listen"])
def test_a_refused_key_is_one_line_without_it(start_server: StartServer, command: list[str]) -> None:
    server = start_server("--api-key", "ci:secret", "--jwt-secret", SECRET)
    variables = {"NOTIFYD_URL": server.url, "NOTIFYD_KEY": "hush-hush"}
    assert run(*command, variables=variables) == (1, "", "notifyd: Invalid token (401)\n")


class Another(BaseHTTPRequestHandler):
    """A web server that is no notifyd: a page for every GET, and a redirect for every POST."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<p>Welcome")

    def do_POST(self) -> None:
        self.send_response(301)
        self.send_header("Location", "https://push.example/\x1b[31m")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_another_program_at_the_url_is_one_line() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Another) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        assert run("listen", "--url", url) == (1, "", f"notifyd: no notifyd answers at {url}\n")
        line = "notifyd: Moved Permanently, to https://push.example/\\x1b[31m (301)\n"
        assert run("publish", "hi", "--url", url) == (1, "", line)
        other.shutdown()


MISUSE = [
    (["publish"], "publish: expected a message, or - for standard input"),
    (["publish", "hi", "--lines"], "--lines: expected no message: the lines are read from standard input"),
    (["publish", "hi", "--data", "[1]"], "--data: expected a JSON object"),
    (["publish", "hi", "--data", "{"], "--data: expected a JSON object: "),
    (["publish", "hi", "--topic", " , "], "--topic: expected a name"),
    (["publish", "hi", "--type", "a", "--type", "b"], "--type: expected one value, got several"),
    (["publish", "hi", "--url", "localhost:8000"], "--url: expected a URL such as http://localhost:8000, "),
    (["publish", "hi", "--url", "http://me:hush@localhost"], "--url: expected a URL such as http://localhost:8000, "),
    (["publish", "hi", "--url", "http://localhost:65536"], "--url: expected a URL such as http://localhost:8000, "),
    (["listen", "--url", "http://[:::::]"], "--url: expected a URL such as http://localhost:8000, "),
    (["listen", "--url", "http://no..host"], "--url: expected a URL such as http://localhost:8000, "),
    (["publish", "hi", "--key", "hush hush"], "--key: expected a key or token without spaces"),
    (["publish", "hi", "--no-such-flag=hush"], "unrecognized arguments: --no-such-flag (--help"),
    (["listen", "--since", "yesterday"], "--since: expected a duration such as 90s, 10m, 1h or 7d"),
    (["token", "--jwt-secret", SECRET, "--expires", "0s"], "--expires: expected a duration such as 90s, 10m, 1h or 7d"),
    (["token", "--sub", "alice"], "--jwt-secret: expected the secret of the server's tokens"),
    (["token", "--jwt-secret", "hush"], "--jwt-secret: expected 32 bytes or more"),
    (["token", "--jwt-secret", SECRET, "--sub", "a\nb"], "--sub: expected 1 to 255 characters"),
    (["serve"], "invalid choice: 'serve'"),
]


@pytest.mark.parametrize(("given", "line"), MISUSE, ids=[" ".join(given)[:40] for given, _ in MISUSE])
def test_a_misuse_is_one_line(given: list[str], line: str) -> None:
    ended = call_command(*given)
    assert ended.in_one_line == (2, 1)
    assert line in ended.stderr and "hush" not in ended.stderr


def call_command(*given: str, **options: Any) -> Ended:
    """Run a command in this process, without the flags that the tests append for servers."""
    before, Server.extra_flags = Server.extra_flags, []
    try:
        return call(*given, **options)
    finally:
        Server.extra_flags = before


# Listen.


def test_listening_goes_on_where_it_stopped(
    start_server: StartServer, listen: Callable[..., Listening], tmp_path: Path
) -> None:
    """Each notification is one line, in order and once, over the end of a server; Ctrl+C ends it with 0."""
    flags = ["--port", str(free_port()), "--store", f"sqlite:{tmp_path / 'log'}"]
    server = start_server(*flags)
    listening = listen("--topics", "builds", "--url", server.url)
    server.publish("one", topics=["builds"])
    assert listening.next()["data"] == {"message": "one"}
    server.kill()
    assert "connects again" in listening.heard()
    server = start_server(*flags)
    server.publish("two", "three", topics=["builds"])
    assert "connected" in listening.heard()
    server.publish("four")
    assert [listening.next()["data"]["message"] for _ in range(3)] == ["two", "three", "four"]
    assert listening.end() == (0, "")


def test_a_lost_stretch_is_said(start_server: StartServer, listen: Callable[..., Listening]) -> None:
    """A server that has another log than before cannot tell what was missed."""
    flags = ["--port", str(free_port())]
    server = start_server(*flags)
    listening = listen("--url", server.url)
    server.publish("one")
    listening.next()
    server.kill()
    listening.heard()
    start_server(*flags)
    assert "connected" in listening.heard()
    assert "may be missing" in listening.heard()


def test_listening_begins_with_the_past(
    start_server: StartServer, listen: Callable[..., Listening], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an id, or with all of a time that the log has not."""
    server = start_server()
    first, second = server.publish("one", "two")
    assert listen("--since", first, "--url", server.url).next()["id"] == second
    listening = listen("--since", "1h", "--url", server.url)
    assert [listening.next()["id"] for _ in range(2)] == [first, second]
    # A notification of before the time that is asked for stays out, although the log replays all that it has.
    eventually(lambda: age(server, second) > 1.2)
    listening = listen("--since", "1s", "--url", server.url)
    [third] = server.publish("three")
    assert listening.next()["id"] == third
    assert listening.end() == (0, "")


def age(server: Server, id: str) -> float:
    """Return how many seconds ago a notification was published."""
    [newest] = server.publish("tick", clients=["nobody"])
    return (int(newest.replace("-", "")[:12], 16) - int(id.replace("-", "")[:12], 16)) / 1000


@pytest.mark.parametrize("way", ["client", "replaced", "token"])
def test_a_final_end_is_told(start_server: StartServer, listen: Callable[..., Listening], way: str) -> None:
    """A client that is put out, replaced by another, or whose token ends, does not come back."""
    server = start_server("--jwt-secret", SECRET, "--api-key", "ci:secret")
    key = call_command("token", "--jwt-secret", SECRET, "--sub", "bob", "--expires", "7s").stdout.strip()
    variables = {"NOTIFYD_KEY": key if way == "token" else "secret", "NOTIFYD_URL": server.url}
    listening = listen("--client-id", "bob", variables=variables)
    if way == "client":
        server.request("DELETE", "/clients/bob", headers={"X-API-Key": "secret"}, json={"reason": "Disconnected: bye"})
    if way == "replaced":
        listen("--client-id", "bob", variables=variables)
    _, stderr = listening.process.communicate(timeout=PATIENCE)
    assert listening.process.returncode == 1
    assert stderr.splitlines()[-1].startswith(
        {"client": "notifyd: Disconnected", "replaced": "notifyd: Replaced by", "token": "notifyd: Token expired"}[way]
    )


def test_a_reader_that_has_enough_ends_it_quietly(start_server: StartServer) -> None:
    """As in `notifyd listen | head -1`, although nothing more comes to be written."""
    server = start_server()
    server.publish("one")
    pipe = '"$@" | head -1; echo "${PIPESTATUS[@]}"'
    command = ["bash", "-c", pipe, "-", *words("listen", "--since", "1h", "--url", server.url)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    first, statuses = ended.stdout.splitlines()
    assert json.loads(first)["data"] == {"message": "one"} and statuses == "0 0"
    assert ended.stderr.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_ends_it_with_the_first_notification_that_it_loses(server: Server) -> None:
    server.publish("before")
    for command in (["publish", "hi"], ["listen", "--since", "1h"]):
        with open("/dev/full", "w") as full:
            ended = subprocess.run(
                words(*command, "--url", server.url),
                env=environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )
        assert (ended.returncode, "Traceback" in ended.stderr) == (1, False)
        assert ended.stderr.endswith("notifyd: standard output: No space left on device\n")


def test_a_shell_may_close_the_standard_streams(server: Server) -> None:
    command = ["bash", "-c", '"$@" <&- >&- 2>&-', "-", *words("publish", "quiet", "--url", server.url)]
    assert subprocess.run(command, env=environment(), timeout=60, check=False).returncode == 0
    (newest,) = server.read("/notifications?order=desc&limit=1")["notifications"]
    assert newest["data"] == {"message": "quiet"}


def test_json_is_in_utf8_whatever_the_locale(start_server: StartServer, listen: Callable[..., Listening]) -> None:
    server = start_server()
    server.publish("größer")
    listening = listen("--url", server.url, "--since", "1h", variables={"PYTHONIOENCODING": "ascii"})
    assert listening.next()["data"]["message"] == "größer"
    assert listening.end() == (0, "")


def test_a_terminal_gets_short_lines_without_control_characters(
    server: Server, listen: Callable[..., Listening]
) -> None:
    """Time, type, topics, message and the rest; a message cannot act on the terminal."""
    inner, outer = pty.openpty()
    listening = listen("--topics", "builds", "--url", server.url, stdout=outer)
    server.notify("disk\x1b[2J full\nx", type="alert", data={"a": 1}, topics=["builds"])
    with os.fdopen(inner, "rb", buffering=0) as terminal:
        line = terminal.read(1000).decode().rstrip()
    os.close(outer)
    time, _, rest = line.partition(" ")
    assert len(time) == 8 and rest == 'alert [builds] disk\\x1b[2J full\\nx {"a":1}'
    assert listening.end() == (0, "")


def test_a_mounted_server_behind_tls_is_found(tmp_path: Path, listen: Callable[..., Listening]) -> None:
    """A prefix in the URL works, and the certificate must be one that the system trusts."""
    pair, port = Pair(tmp_path, "localhost"), free_port()
    files = ["--ssl-certfile", str(pair.certificate), "--ssl-keyfile", str(pair.key)]
    app = [Server.python, "-m", "uvicorn", "hosts:in_starlette", "--port", str(port), *files]
    host = Server(app, url=f"https://localhost:{port}/notifications")
    url = f"{host.url}/"
    try:
        line = f"notifyd: cannot reach {host.url}: its certificate is refused: self-signed certificate\n"
        assert run("publish", "hi", "--url", url) == (1, "", line)
        variables = {"SSL_CERT_FILE": str(pair.certificate), "NOTIFYD_URL": url}
        listening = listen(variables=variables)
        assert run("publish", "hi", variables=variables).status == 0
        assert listening.next()["data"] == {"message": "hi"}
        assert listening.end() == (0, "")
    finally:
        host.kill()


# Token.


def test_a_token_is_what_its_flags_say(start_server: StartServer) -> None:
    """The server that shares the secret and the names takes it, and keeps to its claims."""
    names = ["--jwt-audience", "push", "--jwt-issuer", "me", "--jwt-user-claim", "email"]
    server = start_server("--jwt-secret", SECRET, *names)
    flags = ["--sub", "alice", "--topics", "builds,team.*", "--subscribe", "news", "--publish-topics", "builds"]
    variables = {"NOTIFYD_JWT_SECRET": SECRET, "NOTIFYD_PORT": "http"}
    ended = call_command("token", *flags, "--expires", "90s", *names, variables=variables)
    assert (ended.status, ended.stderr) == (0, "")
    headers = {"Authorization": f"Bearer {ended.stdout.strip()}"}
    client = server.connect(query="topics=team.a", additional_headers=headers)
    assert client.receive()["user"] == "alice"
    assert server.post({"message": "hi", "topics": ["builds"]}, headers=headers).status_code == 200
    assert server.post({"message": "hi"}, headers=headers).status_code == 403
    assert server.get("/status", headers=headers).status_code == 403


# Check.


def odd_or_wrong(*flags: str, variables: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    ended = call_command("check", "--port", "0", *flags, variables=variables)
    return ended.status, ended.stdout.splitlines()


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    """The variables of other commands are no settings; no file is made for the store."""
    variables = {"NOTIFYD_URL": "http://localhost:1", "NOTIFYD_KEY": "secret"}
    pair = Pair(tmp_path, "localhost")
    store = tmp_path / "stores"
    store.mkdir()
    keys = tmp_path / "keys"
    keys.write_text("ci:0123456789abcdef012345\n")
    keys.chmod(0o600)
    flags = ["--store", f"sqlite:{store}/log", "--api-key-file", str(keys), "--host", "0.0.0.0"]
    found = odd_or_wrong(*flags, variables=variables)
    assert found == (0, []) and list(store.iterdir()) == []
    assert odd_or_wrong(*pair.flags) == (
        0,
        [f"odd: --ssl-certfile: the certificate in {pair.certificate} ends in 2 days"],
    )


ODD = {
    "unknown variable": ([], {"NOTIFYD_FOO": "1"}, "NOTIFYD_FOO is unknown and ignored"),
    "secret in a flag": (
        ["--jwt-secret", SECRET],
        {},
        "--jwt-secret: lists of processes show the secret in a flag; best in NOTIFYD_JWT_SECRET",
    ),
    "pings": (["--ping-interval", "70"], {}, "--ping-timeout: 60 s end before a ping, every 70 s"),
    "history": (
        ["--history-ttl", "20"],
        {},
        "--history-ttl: shorter than --ping-interval, so silent clients cannot resume completely",
    ),
    "reach": (
        ["--host", "0.0.0.0"],
        {},
        "0.0.0.0 is not this machine alone, and there is no authentication: see --api-key-file and --jwks-url",
    ),
    "pages": (
        ["--allow-origin", "*"],
        {},
        "--allow-origin: with * and without keys or tokens every web page reads and publishes",
    ),
}


def test_a_short_secret_is_odd_and_is_not_shown(tmp_path: Path) -> None:
    """Of each key with its place; a token's secret is refused by its length alone."""
    keys = tmp_path / "keys"
    keys.write_text("# here\nci:0123456789abcdef012345\nops:0123456789abcdef01234\n")
    keys.chmod(0o600)
    status, found = odd_or_wrong("--api-key-file", str(keys), variables={"NOTIFYD_API_KEY": "dev:secret"})
    rest = "is short: 22 random characters or more"
    assert (status, found) == (
        0,
        [
            f"odd: --api-key: the secret of dev {rest}",
            f"odd: --api-key-file: {keys}, line 3: the secret of ops {rest}",
        ],
    )
    short = "0123456789abcdef0123456789abcde"
    status, found = odd_or_wrong(variables={"NOTIFYD_JWT_SECRET": short})
    assert (status, found) == (1, ["wrong: NOTIFYD_JWT_SECRET: expected 32 bytes or more"])


@pytest.mark.parametrize("case", ODD)
def test_the_odd_is_a_warning(case: str) -> None:
    flags, variables, line = ODD[case]
    assert odd_or_wrong(*flags, variables=variables) == (0, [f"odd: {line}"])


WRONG = {
    "keys": (["--api-key-file", "/nonexistent"], "--api-key-file: cannot read /nonexistent: No such file or directory"),
    "certificate": (
        ["--ssl-certfile", "/nonexistent"],
        "--ssl-certfile: cannot read /nonexistent: No such file or directory",
    ),
    "key set": (["--jwks-url", f"{NOBODY}/keys"], "--jwks-url: the keys cannot be fetched: "),
    "no store": (["--store", "sqlite:/nonexistent/log"], "store: cannot make /nonexistent/log: "),
    "no Redis": (["--store", "redis://127.0.0.1:9"], "--store: Connection refused"),
    "memory of two": (["--store", "memory", "--workers", "2"], "--store: memory is for one process"),
    "host": (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1:0: "),
    "ports": (["--internal-port", "18"], "cannot listen on 127.0.0.1:18: Permission denied"),
}


@pytest.mark.parametrize("case", [case for case in WRONG if case != "ports" or os.getuid()])
def test_the_wrong_is_status_1(case: str) -> None:
    flags, line = WRONG[case]
    status, found = odd_or_wrong(*flags)
    assert status == 1
    assert any(one.startswith(f"wrong: {line}") for one in found)


def test_each_bad_setting_is_a_finding() -> None:
    """None hides another, and all of them keep their sources."""
    flags = ["--max-connections", "many", "--store", "redis://x", "--store-replicas", "2"]
    assert odd_or_wrong(*flags, variables={"NOTIFYD_LOG_LEVEL": "LOUD"}) == (
        1,
        [
            "wrong: NOTIFYD_LOG_LEVEL: expected one of DEBUG, INFO, WARNING, ERROR, CRITICAL, got 'LOUD'",
            "wrong: --max-connections: expected an integer, got 'many'",
        ],
    )


def test_a_running_server_is_found_by_its_port_and_goes_on(start_server: StartServer, tmp_path: Path) -> None:
    """Its file is read, and neither changed nor locked."""
    store = f"sqlite:{tmp_path / 'log'}"
    server = start_server("--store", store)
    server.publish("one")
    files = {path.name for path in tmp_path.iterdir()}
    ended = call_command("check", "--store", store, "--port", str(server.port))
    line = f"wrong: cannot listen on 127.0.0.1:{server.port}: Address already in use\n"
    assert (ended.status, ended.stdout) == (1, line)
    server.publish("two")
    assert {path.name for path in tmp_path.iterdir()} == files
    server.stop()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert odd_or_wrong("--store", store) == (0, [])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_another_file_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("a diary, and no database")
    assert odd_or_wrong("--store", f"sqlite:{path}") == (
        1,
        [f"wrong: store: cannot use {path}: file is not a database"],
    )


def test_a_certificate_that_clients_refuse_is_wrong(tmp_path: Path) -> None:
    """Such as one that has ended."""
    pair = Pair(tmp_path, "localhost")
    command = ["openssl", "x509", "-in", str(pair.certificate), "-signkey", str(pair.key), "-days", "-1"]
    ended = subprocess.run(command, check=True, capture_output=True)
    pair.certificate.write_bytes(ended.stdout)
    line = f"wrong: --ssl-certfile: clients refuse {pair.certificate}: certificate has expired"
    assert odd_or_wrong(*pair.flags) == (1, [line])


@pytest.mark.slow
def test_redis_is_reached_without_harm() -> None:
    """A wrong password and missing replicas have their reason, without the secret; nothing is written."""
    redis = RedisServer(flags=("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"))
    try:
        evicts = "odd: The store may forget what it has acknowledged: its maxmemory-policy is allkeys-lru"
        assert odd_or_wrong(variables={"NOTIFYD_STORE": redis.url}) == (0, [evicts])
        status, found = odd_or_wrong("--store-replicas", "1", variables={"NOTIFYD_STORE": redis.url})
        assert (status, found[0]) == (1, "wrong: --store: replicas: 1 needed, 0 answered")
        redis.command("ACL", "SETUSER", "ops", "on", ">right", "~*", "+@all")
        wrong = redis.url.replace("://", "://ops:hush@")
        status, found = odd_or_wrong(variables={"NOTIFYD_STORE": wrong})
        assert status == 1 and "invalid username-password" in found[0] and "hush" not in "".join(found)
        assert redis.keys(0) == set()
    finally:
        redis.close()


# Beside them.


def test_a_server_warns_of_no_variable_of_the_commands(start_server: StartServer) -> None:
    server = start_server(variables={"NOTIFYD_URL": "http://localhost:8000", "NOTIFYD_KEY": "secret"})
    server.read("/health")
    assert [line for line in server.stderr if "NOTIFYD" in line] == []


def test_a_shell_completes_commands_and_flags() -> None:
    """shtab makes that from the parser."""
    script = subprocess.run(
        [program("shtab"), "--shell=bash", "command.parser"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ask = 'complete_with() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_command; echo "${COMPREPLY[@]}"; }'
    asked = "complete_with notifyd pub; complete_with notifyd listen --sin; complete_with notifyd --store-p"
    shown = subprocess.run(["bash", "-c", f"{script}\n{ask}\n{asked}"], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["publish", "--since", "--store-prefix"]


def test_serving_imports_no_command(server: Server) -> None:
    """The start pays nothing for them."""
    program = "import sys, notifyd, server; print([name for name in sys.modules if name.startswith('command')])"
    ended = subprocess.run(
        [Server.python, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert ended.stdout == "[]\n"
