"""The Python client in a program: what it acknowledges, its topics and tokens, and its extras."""

from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import notifyd_client
import pytest
from conftest import StartServer
from notifyd_client import NotifydClient, SyncNotifydClient
from processes import ROOT, Server, eventually
from websockets.exceptions import ConnectionClosedError

pytestmark = pytest.mark.slow

PACKAGE = ROOT / "clients" / "python"
SECRET = "a secret of 32 characters or more"


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class Awaited:
    """NotifydClient, iterated from outside of its event loop."""

    def __init__(self, runner: asyncio.Runner, *arguments: Any, **options: Any) -> None:
        self._client = NotifydClient(*arguments, **options)
        self._runner = runner

    def __iter__(self) -> Iterator[Any]:
        notifications = aiter(self._client)
        try:
            while True:
                yield self._runner.run(anext(notifications))
        finally:
            self._runner.run(notifications.aclose())

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        return (lambda *given: self._runner.run(found(*given))) if inspect.iscoroutinefunction(found) else found


Make = Callable[..., Any]


@pytest.fixture(params=["async", "sync"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Make a client."""
    if request.param == "sync":
        yield SyncNotifydClient
        return
    with asyncio.Runner() as runner:
        yield lambda *arguments, **options: Awaited(runner, *arguments, **options)


def texts(client: Any, until: str) -> list[str]:
    """Return the messages that come until this one, with which the loop ends."""
    found = []
    for notification in client:
        found.append(notification["data"]["message"])
        if found[-1] == until:
            break
    return found


def publishing(server: Server, *messages: str) -> Callable[[Any], None]:
    """Publish these when a client has its first place in the log."""
    left = list(messages)

    def on_message(message: Any) -> None:
        while left and message["type"] == "resume":
            server.notify(left.pop(0))

    return on_message


def unacknowledged(server: Server, client_id: str) -> list[str]:
    found = server.read(f"/notifications?since=acked&client_id={client_id}")["notifications"]
    return [each["data"]["message"] for each in found]


# Acknowledgements.


def test_a_notification_that_ended_the_loop_comes_again(start_server: StartServer, make: Make, tmp_path: Path) -> None:
    """Nobody knows whether it was dealt with. Those before it do not, in the next run after a crash either."""
    flags = ("--store", f"sqlite:{tmp_path}/log.db")
    first = start_server(*flags)
    client = make(first.ws_url, client_id="ann", ack=True, on_message=publishing(first, "one", "two", "three"))
    assert texts(client, "two") == ["one", "two"]
    eventually(lambda: unacknowledged(first, "ann") == ["two", "three"])
    assert texts(client, "three") == ["two", "three"]
    eventually(lambda: unacknowledged(first, "ann") == ["three"])
    first.kill()
    second = start_server(*flags)
    second.notify("four")
    assert texts(make(second.ws_url, client_id="ann", ack=True), "four") == ["three", "four"]


def test_a_notification_over_which_the_loop_failed_comes_again(start_server: StartServer, make: Make) -> None:
    """The client knows its place itself."""
    server = start_server()
    client = make(server.ws_url, client_id="ann", ack=True, on_message=publishing(server, "one", "two"))

    def listen() -> None:
        for notification in client:
            if notification["data"]["message"] == "two":
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        listen()
    assert texts(client, "two") == ["two"]


def test_without_ack_the_next_loop_goes_on_behind(start_server: StartServer, make: Make) -> None:
    """A client without `ack` has no memory but its own."""
    server = start_server()
    client = make(server.ws_url, client_id="ann", on_message=publishing(server, "one", "two", "three"))
    assert texts(client, "two") == ["one", "two"]
    assert texts(client, "three") == ["three"]


# Topics and tokens.


def test_topics_change_while_it_listens(start_server: StartServer, make: Make) -> None:
    """And stay after a reconnect; a refused one is not asked for again."""
    token = jwt.encode({"sub": "ann", "topics": ["a", "b"], "publish": True}, SECRET)
    server = start_server("--jwt-secret", SECRET, "--api-key", "ci:a-key")
    server.http.headers["X-API-Key"] = "a-key"
    errors: list[str] = []
    publish = publishing(server, "begin")

    def on_message(message: Any) -> None:
        if message["type"] == "error":
            errors.append(message["message"])
        publish(message)

    client = make(server.ws_url, client_id="ann", topics="a", token=token, on_message=on_message)
    client.subscribe("c")
    client.unsubscribe("c")
    seen: list[str] = []
    for notification in client:
        seen.append(notification["data"]["message"])
        match seen[-1]:
            case "begin":
                client.subscribe("b", "a")
                client.subscribe("d")
                client.unsubscribe("a")
                client.authenticate(token)
                eventually(lambda: server.read("/clients/ann")["topics"] == ["b"])
                server.notify("for b", topics=["b"])
            case "for b":
                assert client.topics == ["b"]
                assert errors == ["Not allowed: topic d"]
                server.request("DELETE", "/clients/ann", json={"reason": "Come back"})
                eventually(lambda: not server.read("/clients")["clients"])
                server.notify("missed", topics=["b"])
            case "missed":
                break
    assert seen == ["begin", "for b", "missed"]


def test_a_new_token_is_asked_for_when_the_old_one_is_refused(start_server: StartServer, make: Make) -> None:
    """The refusal is final when there is no other."""
    server = start_server("--jwt-secret", SECRET, "--api-key", "ci:a-key")
    server.http.headers["X-API-Key"] = "a-key"
    tokens = iter(["bad", jwt.encode({"sub": "ann"}, SECRET)])
    client = make(server.ws_url, token=lambda: next(tokens), on_message=publishing(server, "hi"))
    assert texts(client, "hi") == ["hi"]
    with pytest.raises(ConnectionClosedError, match="Invalid token"):
        texts(make(server.ws_url, token=lambda: "bad"), "nothing")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ack": True}, "ack needs a client_id"),
        ({"topics": ["a,b"]}, "topics: expected names without commas, got 'a,b'"),
        ({"topics": [" "]}, "topics: expected names"),
        ({"topics": [1]}, "topics: expected names"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        NotifydClient("ws://localhost/ws", **options)


# The package.


@pytest.mark.parametrize(("name", "extra"), [("NotifydClient", "websockets"), ("Notifyd", "httpx")])
def test_a_missing_extra_is_named(pythons: Callable[..., str], name: str, extra: str) -> None:
    """The package itself needs nothing, and its names are there for `dir` and type checkers."""
    program = f"import notifyd_client\ntry: notifyd_client.{name}\nexcept ImportError as error: print(error)"
    bare = pythons("bare", "")
    ended = subprocess.run([bare, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == f"{name} needs {extra}: pip install 'notifyd-client[{extra}]'\n"


def test_a_program_type_checks(python: str, tmp_path: Path) -> None:
    """The installed package has its types."""
    program = tmp_path / "program.py"
    program.write_text(
        "from notifyd_client import AsyncNotifyd, Notifyd, NotifydClient, NotifydError, SyncNotifydClient\n"
        "async def main() -> None:\n"
        "    async for notification in NotifydClient('ws://localhost/ws', topics=['a'], ack=True, client_id='a'):\n"
        "        reveal_type(notification)\n"
        "    async with AsyncNotifyd(token='t') as notifyd:\n"
        "        reveal_type(await notifyd.notify('m', topics=['a']))\n"
        "for notification in SyncNotifydClient('ws://localhost/ws'):\n"
        "    Notifyd().notify(1)\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "--cache-dir", str(tmp_path)]
    ended = subprocess.run([*mypy, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stdout.count('Revealed type is "dict[str, Any]"') == 2, ended.stdout
    assert "Found 1 error" in ended.stdout and '"notify"' in ended.stdout


def test_the_readme_has_every_option_and_name() -> None:
    """Its table is that of NotifydClient."""
    text = (PACKAGE / "README.md").read_text()
    rows = [name for row in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(rows) == sorted(set(inspect.signature(NotifydClient).parameters) - {"url"})
    assert [name for name in notifyd_client.__all__ if name != "backoff" and name not in text] == []
