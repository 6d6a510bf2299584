"""notifyd: the command line, the app, and the names for hosts.

    python notifyd.py --port 8000

`create_app()` returns the same server as an ASGI app, to be mounted or served by any ASGI server. A host imports from
here alone. Serving needs more packages than the app does, so they are imported when the command line serves.
"""

from __future__ import annotations

import os
import signal
import sys

# A script of this name is the console script of the package.
if __name__ == "__main__" or os.path.basename(sys.argv[0]) == "notifyd" or sys.orig_argv[1:3] == ["-m", "notifyd"]:
    # Ctrl+C while the modules load, and until the server takes signals. Shells use status 130 for SIGINT.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.authentication import AuthenticationBackend
from starlette.datastructures import State
from starlette.middleware import Middleware
from starlette.routing import Router

from answers import not_found
from contract_routes import described, servers_of
from errors import InvalidRequest, NotifydError, ShuttingDown, StoreUnavailable, TooLarge
from flags import load
from guard import Guard
from guard_auth import Authenticator, authenticator_of
from hub import Hub
from routes import internal_route_table, route_table
from settings import Settings, SettingsError, extra, from_environ
from store import Receipt, Store

if TYPE_CHECKING:
    from wire import WireProtocol

__all__ = [
    "App",
    "Hub",
    "InvalidRequest",
    "NotifydError",
    "Receipt",
    "Settings",
    "SettingsError",
    "ShuttingDown",
    "StoreUnavailable",
    "TooLarge",
    "WireProtocol",
    "create_app",
    "drains_on_signal",
]

logger = logging.getLogger("notifyd")


class App(Router):
    """The ASGI app: the route table on one Hub."""

    def __init__(self, hub: Hub, authenticator: Authenticator | None = None, *, internal: bool = False) -> None:
        @contextlib.asynccontextmanager
        async def lifespan(_: object) -> AsyncIterator[None]:
            async with hub:
                yield

        table = internal_route_table if internal else route_table
        super().__init__(
            described(hub, table(hub, authenticator)),
            redirect_slashes=False,
            default=not_found,
            middleware=[Middleware(Guard, settings=hub.settings, store=hub.store, counts=hub.counts)],
            lifespan=lifespan,
        )
        self.state = State({"hub": hub})
        self._authenticator = authenticator

    @property
    def hub(self) -> Hub:
        """The Hub, for publishing: `await app.hub.notify(...)`."""
        hub: Hub = self.state.hub
        return hub

    def openapi(self, mount: str = "") -> dict[str, Any]:
        """Return the contract of the routes, in OpenAPI 3.1.

        With a mount it is made for a host that shows these routes beside its own: the mount stands before each path,
        and the operations and components have `notifyd.` before their names.
        """
        from contract import openapi  # noqa: PLC0415 - for the few that ask

        made = openapi(self.hub.settings, self.routes, mount, "notifyd." if mount else "")
        return {"servers": [{"url": "/"}], **made}

    def asyncapi(self, mount: str = "") -> dict[str, Any]:
        """Return the contract of the WebSocket and the streams, in AsyncAPI 3.0."""
        from contract_messages import asyncapi  # noqa: PLC0415 - for the few that ask

        settings = self.hub.settings
        servers = servers_of(f"localhost:{settings.port}", mount, is_secure=bool(settings.ssl_certfile))
        return {"servers": servers, **asyncapi(settings, self.routes)}

    def internal(self) -> App:
        """Return the app of the internal port: figures and health, on the same Hub."""
        return App(self.hub, self._authenticator, internal=True)


def create_app(settings: Settings | None = None, auth: AuthenticationBackend | None = None) -> App:
    """Return a new server as an ASGI app, with a Hub of its own in `app.hub`.

    Without settings the NOTIFYD_* variables are read. `auth` replaces the keys and tokens of the settings. Raises
    SettingsError for a bad setting.
    """
    if settings is None:
        settings, warnings = from_environ(os.environ)
        for warning in warnings:
            logger.warning(warning)
    authenticator = authenticator_of(settings, auth)
    renew = revocations = None
    if authenticator is not None:
        renew, revocations = authenticator.renew, authenticator.revocations
    return App(Hub(settings, _shared_store(settings), renew=renew, revocations=revocations), authenticator)


@contextlib.asynccontextmanager
async def drains_on_signal(hub: Hub) -> AsyncIterator[None]:
    """Run a Hub in the lifespan of a host, and drain it before the host's server hears SIGTERM or SIGINT.

    The drain takes shutdown_timeout at most, then the signal is passed on. A second signal closes the clients at once.
    A server that listens to signals on its event loop (Granian, Hypercorn) hears them while the drain runs.
    """
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {}
    drain: asyncio.Task[None] | None = None

    async def drain_first(number: int) -> None:
        try:
            await hub.drain()
            await hub.wait_closed()
        except Exception:
            logger.exception("The drain failed")
        finally:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    def signalled(number: int) -> None:
        nonlocal drain
        if drain is None:
            drain = loop.create_task(drain_first(number))
        else:
            # Not at once: a task that is cancelled before its first step neither closes clients nor passes signals on.
            loop.call_soon(drain.cancel)

    async with hub:
        # In another thread, such as that of a test client, a process hears no signals.
        if threading.current_thread() is threading.main_thread():
            handlers = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            # A handler that was not set by Python is None, and could not be put back.
            before = {number: handler for number, handler in handlers.items() if handler is not None}
            for number in before:
                signal.signal(number, lambda number, _: loop.call_soon_threadsafe(signalled, number))
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _shared_store(settings: Settings) -> Store | None:
    """Return the store that the settings name, or None for the Hub's own, in memory."""
    kind, _, path = settings.store.partition(":")
    if kind in ("auto", "memory"):
        return None
    if kind == "sqlite":
        from store_sqlite import SqliteStore  # noqa: PLC0415 - needs a thread and a file

        return SqliteStore(settings, path)
    with extra("redis", "store"):
        from store_redis import RedisStore  # noqa: PLC0415 - needs redis and hiredis

    return RedisStore(settings, settings.store)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader has seen enough; without this the rest in the buffer would fail at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    """Run the command line; return its exit status: 0 after a drain, 1 when it cannot listen, 2 for a bad setting."""
    from server_logs import configure_logging, tell  # noqa: PLC0415 - a host does not serve
    from server_workers import read_start  # noqa: PLC0415

    try:
        if sys.argv[1:] and not sys.argv[1].startswith("-"):
            from command import run  # noqa: PLC0415 - for a command beside serving, whose first word has no dash

            return run(sys.argv[1:], os.environ)
        start = read_start(os.environ)
        settings, warnings, contract = load(sys.argv[1:], os.environ) if start is None else (start.settings, (), "")
        configure_logging(settings)
        for warning in warnings:
            logger.warning(warning)
        if contract:
            # With the Hub's own store, which opens nothing.
            app = App(Hub(settings), authenticator_of(settings))
            _print(json.dumps(app.openapi() if contract == "openapi" else app.asyncapi(), indent=2))
            return 0
        with extra("server", "the command line"):
            from server import serve, work  # noqa: PLC0415 - needs uvicorn and httptools

        return serve(settings, create_app) if start is None else work(start, create_app)
    except SettingsError as error:
        tell(str(error), logging.ERROR, "notifyd: ")
        return 2


def __getattr__(name: str) -> Any:
    """Import WireProtocol on demand: it needs uvicorn, and a host may lack that."""
    if name == "WireProtocol":
        with extra("server", name):
            from wire import WireProtocol  # noqa: PLC0415 - needs uvicorn and websockets

        return WireProtocol
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
