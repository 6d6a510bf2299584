"""The ASGI servers of others that carry the hosts of hosts.py, each in a process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from processes import Server, free_port

QUIET = {"NOTIFYD_NOTIFICATION_INTERVAL": "0", "NOTIFYD_PING_INTERVAL": "0", "NOTIFYD_MAX_CONNECTIONS": "4"}


def uvicorn(app: str, port: int, *flags: str) -> list[str]:
    return ["uvicorn", f"hosts:{app}", "--port", str(port), *flags]


def fast_uvicorn(app: str, port: int, http: str) -> list[str]:
    return ["fast_uvicorn", str(port), http]


def hypercorn(app: str, port: int) -> list[str]:
    return ["hypercorn", f"hosts:{app}", "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "1"]


def granian(app: str, port: int) -> list[str]:
    return ["granian", f"hosts:{app}", "--interface", "asgi", "--port", str(port)]


def gunicorn(app: str, port: int) -> list[str]:
    worker = ["--worker-class", "uvicorn_worker.UvicornWorker"]
    return ["gunicorn", f"hosts:{app}", "--bind", f"127.0.0.1:{port}", *worker, "--graceful-timeout", "20"]


def host(command: Callable[..., list[str]], app: str, *flags: str, prefix: str = "", **variables: str) -> Server:
    """Start one of the hosts in hosts.py; the server's URL has the prefix of the mounted app."""
    port = free_port()
    module, *arguments = command(app, port, *flags)
    url = f"http://127.0.0.1:{port}{prefix}"
    return Server([Server.python, "-m", module, *arguments], QUIET | variables, url=url)


CARRIERS: dict[str, tuple[Callable[..., list[str]], str, tuple[str, ...], str]] = {
    "uvicorn-websockets": (uvicorn, "in_starlette", ("--ws", "websockets"), "/notifications"),
    "uvicorn-sansio-asyncio": (
        uvicorn,
        "in_starlette",
        ("--ws", "websockets-sansio", "--loop", "asyncio"),
        "/notifications",
    ),
    "uvicorn-wsproto-h11": (uvicorn, "in_fastapi", ("--ws", "wsproto", "--http", "h11"), "/notifications"),
    "uvicorn-alone": (uvicorn, "alone", (), ""),
    "uvicorn-lifespan": (uvicorn, "with_lifespan", (), "/notifications"),
    "uvicorn-fast-h11": (fast_uvicorn, "alone", ("h11",), ""),
    "uvicorn-fast-httptools": (fast_uvicorn, "alone", ("httptools",), ""),
    "hypercorn": (hypercorn, "in_starlette", (), "/notifications"),
    "granian": (granian, "in_starlette", (), "/notifications"),
}


def first_quick(names: Iterable[str]) -> list[Any]:
    """Return these as parameters of a test; `make test` leaves all but the first to `make test-all`."""
    return [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(names)]


def client_of(app: Any) -> Any:
    """A TestClient without its warning about an HTTP library: notifyd is not its subject."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `httpx` with")
        from starlette.testclient import TestClient

    return TestClient(app)
