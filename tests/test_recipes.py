"""The recipes of docs/embedding.md, in their hosts."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import run
from carriers import client_of
from fastapi import Depends, FastAPI, HTTPException
from processes import ROOT, program
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.routing import Mount

from notifyd import Settings, create_app

SILENT: Any = {"notification_interval": 0, "ping_interval": 0}
APP, ELSEWHERE = "https://app.example.com", "https://evil.example"


# Origins.


@pytest.fixture
def cross_origin() -> Any:
    """A host that names one origin in its CORSMiddleware and in allow_origin."""
    notifications = create_app(Settings(**SILENT, allow_origin=(APP,)))
    return Starlette(
        routes=[Mount("/notifications", app=notifications)],
        middleware=[Middleware(CORSMiddleware, allow_origins=[APP])],
    )


def test_the_cors_of_the_host_and_ours_work_together(cross_origin: Any) -> None:
    """A page of the origin may read each answer; each names the origin once."""
    answer = client_of(cross_origin).get("/notifications/health", headers={"Origin": APP})
    assert answer.status_code == 200
    assert answer.headers.get_list("access-control-allow-origin") == [APP]


def test_a_page_of_the_named_origin_connects(cross_origin: Any) -> None:
    """The middleware of the host never sees a WebSocket."""
    with client_of(cross_origin).websocket_connect("/notifications/ws", headers={"Origin": APP}) as websocket:
        assert websocket.receive_json()["type"] == "welcome"


def test_a_page_of_another_origin_is_refused(cross_origin: Any) -> None:
    assert client_of(cross_origin).get("/notifications/health", headers={"Origin": ELSEWHERE}).status_code == 403


# Users.


class Sessions(AuthenticationBackend):
    """Reads the session of a host from its cookie."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        session = conn.cookies.get("session")
        if session is None:
            return None
        if session != "random":
            raise AuthenticationError
        return AuthCredentials(["subscribe", "admin"]), SimpleUser("alice")


def stranger() -> None:
    raise HTTPException(401)


def test_dependencies_of_the_host_do_not_guard_a_mount() -> None:
    """FastAPI runs them for its own routes alone."""
    app = FastAPI(dependencies=[Depends(stranger)])
    app.get("/mine")(stranger)
    app.mount("/notifications", create_app(Settings(**SILENT)))
    client = client_of(app)
    assert [client.get(path).status_code for path in ("/mine", "/notifications/status")] == [401, 200]


@pytest.mark.parametrize(
    ("cookies", "status"), [({}, 401), ({"session": "guessed"}, 401), ({"session": "random"}, 200)]
)
def test_the_session_of_the_host_guards_a_mount(cookies: dict[str, str], status: int) -> None:
    """A stranger and a wrong cookie are refused."""
    app = FastAPI()
    app.mount("/notifications", create_app(Settings(**SILENT), auth=Sessions()))
    client = client_of(app)
    client.cookies.update(cookies)
    assert client.get("/notifications/status").status_code == status


def test_a_handshake_carries_the_session_of_the_host() -> None:
    """The client belongs to the user of the host's session."""
    app = Starlette(routes=[Mount("/n", app=create_app(Settings(**SILENT), auth=Sessions()))])
    with client_of(app).websocket_connect("/n/ws", headers={"Cookie": "session=random"}) as websocket:
        assert websocket.receive_json()["user"] == "alice"


# Publishing.


def test_an_endpoint_in_a_thread_publishes() -> None:
    """A plain `def` of FastAPI runs in a thread, and the Hub on the event loop."""
    notifications = create_app(Settings(**SILENT))
    app = FastAPI()
    app.mount("/notifications", notifications)

    @app.post("/order")
    def order() -> int:
        return run(partial(notifications.hub.notify, "A new order", type="order")).recipients

    with client_of(app) as client, client.websocket_connect("/notifications/ws") as websocket:
        assert websocket.receive_json()["type"] == "welcome"
        assert client.post("/order").json() == 1
        assert websocket.receive_json()["type"] == "order"


def test_another_process_publishes_through_a_shared_store(tmp_path: Path) -> None:
    """A script reaches the clients of the host, and leaves the store as it found it."""
    store = f"sqlite:{tmp_path}/notifications.db"
    script = (
        "import asyncio\nfrom notifyd import Settings, create_app\n"
        "async def report():\n"
        f"    async with create_app(Settings(store={store!r}, notification_interval=0)).hub as hub:\n"
        "        print((await hub.notify('The report is ready', type='report')).recipients)\n"
        "asyncio.run(report())\n"
    )
    notifications = create_app(Settings(store=store, **SILENT))

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        async with notifications.hub:
            yield

    app = Starlette(routes=[Mount("/n", app=notifications)], lifespan=lifespan)
    with client_of(app) as client, client.websocket_connect("/n/ws") as websocket:
        assert websocket.receive_json()["type"] == "welcome"
        ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")
        assert websocket.receive_json()["type"] == "report"


# Logging.


@pytest.fixture
def loggers() -> Iterator[None]:
    """Undo a configuration of the logging after the test."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("notifyd")]
    before = {name: logging.getLogger(name).disabled for name in names}
    yield
    for name, disabled in before.items():
        logging.getLogger(name).disabled = disabled


@pytest.mark.usefixtures("loggers")
@pytest.mark.parametrize("silences", [True, False])
def test_a_dict_config_silences_our_loggers_unless_told_otherwise(silences: bool) -> None:
    """Disabling loggers that exist is the default of the standard library."""
    logging.config.dictConfig({"version": 1} if silences else {"version": 1, "disable_existing_loggers": False})
    assert logging.getLogger("notifyd").disabled == silences


# The ranges, for a host that has older versions.


def test_a_refused_handshake_is_answered_over_http() -> None:
    """No version of Starlette has a part in the messages."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/nothing", "headers": [], "query_string": b"", "subprotocols": []}
    app: Any = create_app(Settings(**SILENT))
    asyncio.run(app({**scope, "extensions": {"websocket.http.response": {}}}, receive, send))
    assert [message["type"].removeprefix("websocket.http.response.") for message in sent] == ["start", "body"]
    assert sent[0]["status"] == 404


# make run.


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile with nothing to install."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    return tmp_path


def make(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = [program("make"), *words]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_a_python_without_ensurepip_leaves_no_environment_behind(checkout: Path) -> None:
    """Debian's error names the package to install; then the same command works."""
    poor = checkout / "python"
    poor.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\n'
        "mkdir -p $3/bin; touch $3/bin/python; echo apt install python3-venv; exit 1\n"
    )
    poor.chmod(0o755)
    refused = make(checkout, ".venv/run", f"PYTHON={poor}")
    assert refused.returncode != 0 and "apt install python3-venv" in refused.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.slow
def test_a_half_made_environment_is_completed(checkout: Path) -> None:
    """One that an earlier Makefile has left has a python and no pip."""
    bin = checkout / ".venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "python").symlink_to(sys.executable)
    made = make(checkout, ".venv/run", f"PYTHON={sys.executable}")
    assert made.returncode == 0, made.stderr
    assert (bin / "pip").exists()


def test_make_run_takes_a_port(checkout: Path) -> None:
    """PORT is a variable of make or of the shell."""
    assert make(checkout, "-n", "run", "PORT=9000").stdout.splitlines()[-1].endswith("notifyd.py --port 9000 ")
