"""notifyd: the command line, the app, and the server's life from start to drain to stop.

    python notifyd.py --port 8000

`create_app()` gives the same as an ASGI app, to be mounted or served by any ASGI server.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":
    # Ctrl+C while the modules load, and until the server takes signals. Status 130 is what shells give for SIGINT.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import asyncio
import contextlib
import errno
import gc
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import uvicorn
from starlette.authentication import AuthenticationBackend
from starlette.datastructures import State
from starlette.middleware import Middleware
from starlette.routing import Router

from answers import not_found
from guard import OriginGuard, Throttle
from guard_auth import Door, backend_of, warnings_of
from hub import Hub
from routes import internal_routes, routes
from server_certificate import Certificate
from server_workers import Parent, check_store, read_post, signals_to, supervise, warning_of_islands
from settings import VERSION, Settings, SettingsError, from_environ, load
from wire import WireProtocol
from wire_http import REQUEST_SECONDS, HttpProtocol

try:
    import resource
except ImportError:
    # Windows has none, and no such limit.
    resource = None  # type: ignore[assignment]

logger = logging.getLogger("notifyd")

LISTEN_BACKLOG = 2048
# asyncio tries so often in a row to accept, also when each attempt fails for want of descriptors.
ACCEPTS_AT_ONCE = 100
# Descriptors that are no clients: listeners, log, HTTP requests.
SPARE_FILES = 64
# In-flight HTTP requests get this long after the last client has gone.
REQUESTS_GRACE_SECONDS = 5
# How long a worker that got a SIGTERM waits for the parent's word, which may have got one as well.
LEAVE_SECONDS = 0.5


class ListenError(Exception):
    """The address cannot be listened on; its text is one line for the user."""


class App(Router):
    """The ASGI app: the route table on one Hub, which is `app.state.hub`; `internal`: that of the internal port."""

    def __init__(self, hub: Hub, door: Door | None = None, *, internal: bool = False) -> None:
        @contextlib.asynccontextmanager
        async def lifespan(_: object) -> AsyncIterator[None]:
            async with hub:
                yield

        settings = hub.settings
        middleware = [Middleware(OriginGuard, allowed=settings.allow_origin)]
        if settings.rate_limit or settings.trusted_proxies or settings.max_connections_per_ip:
            middleware.insert(0, Middleware(Throttle, settings=settings, store=hub.store))
        super().__init__(
            internal_routes(hub, door) if internal else routes(hub, door),
            redirect_slashes=False,
            default=not_found,
            middleware=middleware,
            lifespan=lifespan,
        )
        self.state = State({"hub": hub})
        self.door = door


def create_app(settings: Settings | None = None, auth: AuthenticationBackend | None = None) -> App:
    """Return a new server as an ASGI app, with a Hub of its own in `app.state.hub`.

    Without settings the NOTIFYD_* variables are read. `auth` takes the place of the keys and tokens that they speak
    of. Raises SettingsError for a bad one.
    """
    if settings is None:
        settings, warnings = from_environ(os.environ)
        for warning in warnings:
            logger.warning(warning)
    if settings.store in ("auto", "memory") and (islands := warning_of_islands(os.environ, sys.argv)):
        logger.warning(islands)
    if (backend := auth or backend_of(settings)) is None:
        return App(Hub(settings))
    door = Door(backend)
    return App(Hub(settings, renew=door.renew), door)


class Server(uvicorn.Server):
    """uvicorn, with signals that drain instead of closing every socket at once."""

    def __init__(
        self,
        config: uvicorn.Config,
        internal: uvicorn.Config,
        certificate: Certificate | None,
        hub: Hub,
        url: str,
        parent: Parent | None,
    ) -> None:
        super().__init__(config)
        self._internal = internal
        self._certificate = certificate
        self._hub = hub
        self._url = url
        self._parent = parent
        self._drain: asyncio.Task[None] | None = None
        self._end: asyncio.Task[None] | None = None
        self._complains_again_at = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._handle_exception)
        # Before the lifespan does it: a store that is a wrong setting is one line, and no traceback.
        await self._hub.start()
        # Listening is ours: uvicorn has one app for all sockets, and no deadline for a TLS handshake.
        await super().startup([])
        for listener, config in zip(sockets or (), (self.config, self._internal), strict=False):
            await self._listen(listener, config)
        _quiet_collector()
        if self._parent is None:
            _announce(self._url)
        else:
            await self._parent.follow(self)

    async def _listen(self, listener: socket.socket, config: uvicorn.Config) -> None:
        if not config.loaded:
            config.load()
        self.servers.append(
            await asyncio.get_running_loop().create_server(
                lambda: HttpProtocol(config, self.server_state, self.lifespan.state),
                sock=listener,
                ssl=config.ssl,
                ssl_handshake_timeout=REQUEST_SECONDS if config.ssl else None,
                backlog=ACCEPTS_AT_ONCE,
            )
        )
        # The loop has taken its number of accepts for this one, too.
        listener.listen(LISTEN_BACKLOG)

    def _handle_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what nobody has caught; for want of descriptors, one line a second and not one for each attempt."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() >= self._complains_again_at:
            self._complains_again_at = loop.time() + 1
            logger.error("Cannot accept connections: %s", error.strerror)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # The parent has the signals of its workers, and passes a SIGHUP on.
        reload = self.reload if self._certificate is not None and self._parent is None else None
        with signals_to(self._signalled, reload):
            yield

    def _signalled(self) -> None:
        if self._parent is None and self._drain is not None:
            self.close_now()
            return
        self.drain()
        if self._parent is not None:
            # Alone in this, unless the parent was signalled as well. Newcomers are then for the other workers.
            asyncio.get_running_loop().call_later(LEAVE_SECONDS, self._leave)

    def _leave(self) -> None:
        assert self._parent is not None
        if not self._parent.stops:
            self.stop_listening()

    def drain(self) -> None:
        if self._drain is None:
            logger.info("Shutting down")
            host = self._parent.host if self._parent is not None and self._parent.stops else ""
            self._drain = asyncio.get_running_loop().create_task(self._hub.drain(host))
            self._drain.add_done_callback(self._drained)

    def close_now(self) -> None:
        self.drain()
        assert self._drain is not None
        if not self._drain.done() and not self._drain.cancelling():
            logger.info("Closing everyone now")
            # Not at once: a task that is cancelled before its first step closes nobody.
            asyncio.get_running_loop().call_soon(self._drain.cancel)

    def reload(self) -> None:
        if self._certificate is not None:
            self._certificate.reload()

    def stop_listening(self) -> None:
        for server in self.servers:
            server.close()

    def _drained(self, drain: asyncio.Task[None]) -> None:
        if not drain.cancelled() and (error := drain.exception()):
            logger.error("The drain failed", exc_info=error)
        self._end = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        await self._hub.wait_closed()
        if self._parent is not None:
            await self._parent.drained()
        self.should_exit = True


def serve(settings: Settings) -> int:
    """Run a server until it has been told to stop and has drained, and return the exit status.

    Raises ListenError, and SettingsError for what is wrong only with other settings or files.
    """
    check_store(settings)
    backend = backend_of(settings)
    certificate = _certificate(settings)
    if certificate is not None:
        # A reload before there is somebody to hear it waits, and does not end the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    _raise_file_limit(settings.max_connections)
    internal = []
    if settings.internal_port:
        if settings.internal_port == settings.port:
            raise SettingsError("--internal-port: expected another port than --port")
        # First, or a port 0 could become this one.
        internal = [_bind(settings, settings.internal_host, settings.internal_port)]
    listeners = [_bind(settings, settings.host, settings.port), *internal]
    host, port = listeners[0].getsockname()[:2]
    settings = msgspec.structs.replace(settings, port=port)
    addresses = [listener.getsockname()[0] for listener in listeners]
    for warning in warnings_of(settings, addresses, is_open=backend is None):
        logger.warning(warning)
    url = f"http{'s' if certificate else ''}://{f'[{host}]' if ':' in host else host}:{port}"
    if settings.workers > 1:
        return supervise(settings, listeners, lambda: _announce(f"{url} with {settings.workers} workers"))
    _serve_on(listeners, settings, certificate, backend, url)
    return 0


def _certificate(settings: Settings) -> Certificate | None:
    if settings.ssl_certfile:
        return Certificate(settings)
    if settings.ssl_keyfile:
        raise SettingsError("--ssl-keyfile: expected --ssl-certfile as well")
    return None


def _serve_on(
    listeners: list[socket.socket],
    settings: Settings,
    certificate: Certificate | None,
    backend: AuthenticationBackend | None,
    url: str = "",
    parent: Parent | None = None,
) -> None:
    app = create_app(settings, backend)
    hub = app.state.hub
    # What is private is spoken in plain HTTP: a probe or a scraper in the same place knows no certificate.
    internal = _config(App(hub, app.door, internal=True), settings, None)
    Server(_config(app, settings, certificate), internal, certificate, hub, url, parent).run(listeners)


def _config(app: App, settings: Settings, certificate: Certificate | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        loop=settings.loop,
        http=HttpProtocol,
        ws=WireProtocol,
        # The Hub's heartbeat does this, and knows who has proved alive.
        ws_ping_interval=None,
        timeout_graceful_shutdown=REQUESTS_GRACE_SECONDS,
        ws_per_message_deflate=False,
        ws_max_size=settings.max_message_size,
        ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
    )


def _announce(where: str) -> None:
    print(f"notifyd {VERSION} listens on {where} (Ctrl+C stops it)", file=sys.stderr, flush=True)


def _bind(settings: Settings, host: str, port: int) -> socket.socket:
    """Bind here and not in uvicorn, so that a taken port is one clear line and port 0 has a number."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        if settings.workers == 1:
            listener.listen(LISTEN_BACKLOG)
    except UnicodeError:
        raise ListenError(f"cannot listen on {host}:{port}: not a host name") from None
    except OSError as error:
        raise ListenError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    # Accepted sockets inherit these. uvloop sets the first by itself, asyncio does not for a socket made here, and
    # Nagle's algorithm would hold back every second small write for 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # A peer that takes nothing for so long is dropped by the kernel, whoever holds the descriptor.
        milliseconds = int((settings.ping_timeout + 5) * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(milliseconds, 2**31 - 1))
    return listener


def _quiet_collector() -> None:
    """Keep the garbage collector from walking every live connection again and again.

    What start-up made lives for ever, so it is taken out of the collector's sight. A connection is about six tracked
    objects and makes no cycles; with these thresholds ten thousand newcomers cost one young collection. Without them
    a handshake among 10,000 clients costs 60 to 69 us, with them 54 to 60 (bench/run.py).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 1000)


def _raise_file_limit(max_connections: int) -> None:
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    if soft != resource.RLIM_INFINITY and soft < max_connections + SPARE_FILES:
        logger.warning(
            "The limit of open files is %d, too low for max_connections %d; raise it with ulimit -n",
            soft,
            max_connections,
        )


def _configure_logging(settings: Settings) -> None:
    who = " [%(process)d]" if settings.workers > 1 else ""
    format = f"%(asctime)s{who} %(levelname)s %(message)s"
    logging.basicConfig(level=settings.log_level, format=format, stream=sys.stderr)
    # uvicorn logs a WebSocket's URL with its query at INFO, and the websockets library whole handshakes at
    # DEBUG: both may hold what nobody should read in a log.
    for name in ("uvicorn", "websockets", "asyncio"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> int:
    """Run the command line; return its exit status: 0 after a drain, 1 when it cannot listen, 2 for a bad setting."""
    try:
        if (post := read_post(os.environ)) is not None:
            _configure_logging(post.settings)
            listeners = [socket.socket(fileno=listener) for listener in post.listeners]
            _serve_on(listeners, post.settings, _certificate(post.settings), None, parent=Parent(post))
            return 0
        settings, warnings = load(sys.argv[1:], os.environ)
        _configure_logging(settings)
        for warning in warnings:
            logger.warning(warning)
        return serve(settings)
    except SettingsError as error:
        print(f"notifyd: {error}", file=sys.stderr)
        return 2
    except ListenError as error:
        print(f"notifyd: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
