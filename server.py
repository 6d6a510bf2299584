"""The server: sockets, TLS, signals, and uvicorn between them and the app.

Owns the listening sockets, the certificate, the limit of open files and the collector's settings. It is imported only
to serve, because it needs uvicorn and httptools. Several processes are server_workers.py's.

1. Signals drain: uvicorn by itself would close every socket at once.
2. A certificate and its key are read whole before they are used: a bad pair changes nothing.
3. A connection keeps the certificate that it began with. Each new handshake gets the newest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import gc
import importlib
import logging
import os
import resource
import signal
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import uvicorn

from guard_auth import authenticator_of, warnings_of
from server_logs import AccessLog, tell
from server_workers import ParentLink, WorkerStart, check_store, signals_to, supervise
from settings import VERSION, Settings, SettingsError, extra
from wire import WireProtocol
from wire_http import REQUEST_SECONDS, HttpProtocol

if TYPE_CHECKING:
    from notifyd import App

logger = logging.getLogger("notifyd")

LISTEN_BACKLOG = 2048
# Of each family the address that stands for all.
ANY = ("0.0.0.0", "::")  # noqa: S104 - a comparison
FREE_PORT_ATTEMPTS = 20
# asyncio tries so often in a row to accept, also when each attempt fails for want of descriptors.
ACCEPTS_AT_ONCE = 100
# Descriptors that are no clients: listeners, log, HTTP requests.
SPARE_FILES = 64
# In-flight HTTP requests get this long after the last client has gone.
REQUESTS_GRACE_SECONDS = 5
# How long a worker that got a SIGTERM waits for an order of the parent, which may have got a SIGTERM as well.
LEAVE_SECONDS = 0.5

# The same as `notifyd.create_app`, which is handed in: notifyd.py may be the main module and must not load twice.
CreateApp = Callable[[Settings], "App"]
# As the socket module has it: host, port, and for IPv6 flow and scope.
Address = tuple[Any, ...]


class ListenError(Exception):
    """The address cannot be listened on; its text is one line for the user."""


class Certificate:
    """The certificate and key that the settings name. `context` is the listeners', for as long as they listen."""

    def __init__(self, settings: Settings) -> None:
        """Read both files. Raises SettingsError, which names the flag."""
        self._settings = settings
        self._newest = self.context = _read_pair(settings)
        self.context.sni_callback = self._present

    def _present(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        # OpenSSL asks in every handshake, also where the client names no host.
        connection.context = self._newest

    def reload(self) -> None:
        """Read both files again. A bad pair is logged and changes nothing."""
        try:
            self._newest = _read_pair(self._settings)
        except SettingsError as error:
            logger.error("The certificate stays as it is: %s", error)
        else:
            logger.info("The certificate has been read again")


def _read_pair(settings: Settings) -> ssl.SSLContext:
    """Return a context with the certificate and its key. Raises SettingsError."""
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile or settings.ssl_certfile
    for flag, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise SettingsError(f"{flag}: cannot read {path}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # The defaults of Python with OpenSSL 3, unless the machine's configuration differs. OpenSSL 1.1.1 allows any number
    # of handshakes on one connection, and each costs the server more than the client.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        # An empty password is passed too: without a password OpenSSL would ask at the terminal.
        context.load_cert_chain(certificate, key, settings.ssl_keyfile_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(f"--ssl-keyfile: the key in {key} is not that of {certificate}") from None
        if not _has_certificate(certificate):
            raise SettingsError(f"--ssl-certfile: no PEM certificate in {certificate}") from None
        raise SettingsError(f"--ssl-keyfile: no PEM key in {key} that --ssl-keyfile-password opens") from None
    return context


def _has_certificate(path: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return False
    return True


class Server(uvicorn.Server):
    """uvicorn, with signals that drain instead of closing every socket at once."""

    def __init__(
        self, app: App, settings: Settings, certificate: Certificate | None, url: str, parent: ParentLink | None
    ) -> None:
        """Serve on the URL for Ctrl+C to end, or with a link as one worker of a parent."""
        super().__init__(_config(app, settings))
        # The internal port speaks plain HTTP: a probe or a scraper in the same network knows no certificate.
        self._internal = _config(app.internal(), settings)
        self._certificate = certificate
        self._hub = app.hub
        self._url = url
        self._parent = parent
        self._signals = contextlib.ExitStack()
        self._drain: asyncio.Task[None] | None = None
        self._finishing: asyncio.Task[None] | None = None
        self._complains_again_at = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._handle_exception)
        # Before the lifespan does: a store that is a wrong setting is one line, and no traceback.
        await self._hub.start()
        # Listening is ours: uvicorn has one app for all sockets, and no deadline for a TLS handshake.
        await super().startup([])
        internal_port = self._hub.settings.internal_port
        for listener in sockets or ():
            is_internal = listener.getsockname()[1] == internal_port
            context = None if is_internal or self._certificate is None else self._certificate.context
            await self._listen(listener, self._internal if is_internal else self.config, context)
        _quiet_collector()
        _reserve_files(self._hub.settings.max_connections)
        if self._parent is None:
            announce(self._url)
        else:
            await self._parent.follow(self)

    async def _listen(self, listener: socket.socket, config: uvicorn.Config, context: ssl.SSLContext | None) -> None:
        if not config.loaded:
            config.load()
        self.servers.append(
            await asyncio.get_running_loop().create_server(
                lambda: HttpProtocol(config, self.server_state, self.lifespan.state, repeats=True),
                sock=listener,
                ssl=context,
                ssl_handshake_timeout=REQUEST_SECONDS if context else None,
                backlog=ACCEPTS_AT_ONCE,
            )
        )
        # The loop has set its number of accepts as the backlog.
        listener.listen(LISTEN_BACKLOG)

    def _handle_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log an uncaught exception. Without descriptors, log one line a second instead of one for each attempt."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() >= self._complains_again_at:
            self._complains_again_at = loop.time() + 1
            logger.error("Cannot accept connections: %s", error.strerror)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # A parent passes a SIGHUP on to its workers.
        reload = self.reload if self._certificate is not None and self._parent is None else None
        with signals_to(self._signalled, reload):
            yield

    def install_signal_handlers(self) -> None:
        """Take the signals as capture_signals() does: uvicorn before 0.29 calls this, and nothing at the end."""
        self._signals.enter_context(self.capture_signals())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._signals.close()

    def _signalled(self) -> None:
        if self._parent is None and self._drain is not None:
            self.close_now()
            return
        self.drain()
        if self._parent is not None:
            # This worker leaves alone, unless the parent was signalled too. The other workers then take newcomers.
            asyncio.get_running_loop().call_later(LEAVE_SECONDS, self._leave)

    def _leave(self) -> None:
        assert self._parent is not None
        if not self._parent.stops:
            self.stop_listening()

    # --- the orders of a parent; each may come again, and at any time

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
            # Not at once: a task that is cancelled before its first step closes no client.
            asyncio.get_running_loop().call_soon(self._drain.cancel)

    def reload(self) -> None:
        if self._certificate is not None:
            self._certificate.reload()

    def stop_listening(self) -> None:
        for server in self.servers:
            server.close()

    # --- the end

    def _drained(self, drain: asyncio.Task[None]) -> None:
        if not drain.cancelled() and (error := drain.exception()):
            logger.error("The drain failed", exc_info=error)
        self._finishing = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        await self._hub.wait_closed()
        if self._parent is not None:
            await self._parent.drained()
        self.should_exit = True


def serve(settings: Settings, create_app: CreateApp) -> int:
    """Serve until told to stop, drain, and return the exit status: 0, or 1 with a line on stderr if it cannot listen.

    Raises SettingsError for a setting that is wrong only together with other settings, with files or with the store.
    """
    check_store(settings)
    if settings.loop == "uvloop":
        with extra("server", "--loop"):
            importlib.import_module("uvloop")
    is_open = authenticator_of(settings) is None
    certificate = certificate_of(settings)
    if certificate is not None:
        # A reload that comes before the server can handle it waits, and does not end the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    raise_file_limit(settings.max_connections)
    try:
        listeners = bind_all(settings)
    except ListenError as error:
        tell(str(error), logging.ERROR, "notifyd: ")
        return 1
    addresses = [listener.getsockname()[:2] for listener in listeners]
    settings = msgspec.structs.replace(settings, port=addresses[0][1])
    for warning in warnings_of(settings, [host for host, _ in addresses], is_open=is_open):
        logger.warning(warning)
    scheme = "https" if certificate else "http"
    public = [address for address in addresses if address[1] == settings.port]
    url = " and ".join(f"{scheme}://{_shown(*address)}" for address in public)
    if settings.workers > 1:
        return supervise(settings, listeners, lambda: announce(f"{url} with {settings.workers} workers"))
    Server(create_app(settings), settings, certificate, url, None).run(listeners)
    return 0


def work(start: WorkerStart, create_app: CreateApp) -> int:
    """Serve as one worker of a parent, and return the exit status."""
    settings = start.settings
    listeners = [socket.socket(fileno=listener) for listener in start.listeners]
    app = create_app(settings)
    Server(app, settings, certificate_of(settings), "", ParentLink(start)).run(listeners)
    return 0


def announce(where: str) -> None:
    tell(f"notifyd {VERSION} listens on {where} (Ctrl+C stops it)")


def certificate_of(settings: Settings) -> Certificate | None:
    if settings.ssl_certfile:
        return Certificate(settings)
    if settings.ssl_keyfile:
        raise SettingsError("--ssl-keyfile: expected --ssl-certfile as well")
    return None


def _config(app: App, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        AccessLog(app) if settings.access_log else app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        loop=settings.loop,
        http=HttpProtocol,
        ws=WireProtocol,
        # The Hub's heartbeat pings, and knows which client has proved alive.
        ws_ping_interval=None,
        timeout_keep_alive=settings.keep_alive_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=REQUESTS_GRACE_SECONDS,
        ws_per_message_deflate=False,
        ws_max_size=settings.max_message_size,
    )


def bind_all(settings: Settings) -> list[socket.socket]:
    """Return the bound sockets of the port and of the internal port. Raises ListenError."""
    internal = []
    if settings.internal_port:
        if settings.internal_port == settings.port:
            raise SettingsError("--internal-port: expected another port than --port")
        # First, or a port 0 could become this one.
        internal = bind(settings, settings.internal_host, settings.internal_port)
    return [*bind(settings, settings.host, settings.port), *internal]


def bind(settings: Settings, hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Return bound sockets for all addresses of the hosts, on one port. Raises ListenError.

    Bound here and not in uvicorn, so that a taken port is one clear line and port 0 has a number.
    """
    addresses = _addresses(hosts, port)
    for _ in range(FREE_PORT_ATTEMPTS if port == 0 else 0):
        # The port that the system chooses for the first address may be taken on the next.
        with contextlib.suppress(ListenError):
            return _bind_each(settings, addresses)
    return _bind_each(settings, addresses)


def _addresses(hosts: Sequence[str], port: int) -> dict[Address, str]:
    """Return the addresses of the hosts, each with its host. Raises ListenError."""
    found: dict[Address, str] = {}
    for host in hosts:
        name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            resolved = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except UnicodeError:
            raise ListenError(f"cannot listen on {_shown(host, port)}: not a host name") from None
        except OSError as error:
            raise ListenError(f"cannot listen on {_shown(host, port)}: {error.strerror or error}") from None
        addresses = [address for *_, address in resolved]
        # A machine without IPv6 may resolve localhost to ::1.
        for address in list(filter(_is_here, addresses)) or addresses:
            found.setdefault(address, host)
    # `::` and 0.0.0.0 cover the other addresses of their family, which could not be bound beside them.
    whole = {":" in address[0] for address in found if address[0] in ANY}
    return {address: host for address, host in found.items() if address[0] in ANY or (":" in address[0]) not in whole}


def _is_here(address: Address) -> bool:
    """Whether this machine has the address."""
    try:
        with _socket_for(address) as probe:
            probe.bind((address[0], 0, *address[2:]))
    except OSError:
        return False
    return True


def _socket_for(address: Address) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)


def _bind_each(settings: Settings, addresses: Mapping[Address, str]) -> list[socket.socket]:
    has_ipv4 = any(":" not in address[0] for address in addresses)
    with contextlib.ExitStack() as stack:
        listeners: list[socket.socket] = []
        for address, host in addresses.items():
            port = listeners[0].getsockname()[1] if listeners else address[1]
            try:
                listener = stack.enter_context(_socket_for(address))
                _bind(listener, (address[0], port, *address[2:]), settings, only_ipv6=has_ipv4)
            except OSError as error:
                where = _shown(host, port) + ("" if host.strip("[]") == address[0] else f" ({address[0]})")
                raise ListenError(f"cannot listen on {where}: {error.strerror or error}") from None
            listeners.append(listener)
        stack.pop_all()
        return listeners


def _bind(listener: socket.socket, address: Address, settings: Settings, *, only_ipv6: bool) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_ipv6)
    listener.bind(address)
    if settings.workers == 1:
        listener.listen(LISTEN_BACKLOG)
    # Accepted sockets inherit these. uvloop sets TCP_NODELAY by itself, asyncio does not for a socket made here, and
    # Nagle's algorithm would delay every second small write by 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # The kernel drops a peer that takes no byte for so long, whichever process holds the descriptor.
        milliseconds = int((settings.ping_timeout + 5) * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(milliseconds, 2**31 - 1))


def _shown(host: str, port: int) -> str:
    """Return host and port as in a URL."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _quiet_collector() -> None:
    """Keep the garbage collector from walking every live connection again and again.

    Objects of the start live for ever, so they are moved out of the collector's sight. A connection is about six
    tracked objects and makes no cycles, so the oldest are hardly ever walked. A collection holds the event loop for as
    long as it takes, so the younger ones are collected in small numbers.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2000, 4, 100_000)


def _reserve_files(max_connections: int) -> None:
    """Have the kernel's table of this process's descriptors grow now.

    It grows by doubling. In a process with threads, such as that of a store, each time holds the loop for 5 to 20 ms.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max_connections + SPARE_FILES
    if limit != resource.RLIM_INFINITY:
        files = min(files, limit)
    with contextlib.suppress(OSError), socket.socket() as any_file:
        os.close(fcntl.fcntl(any_file, fcntl.F_DUPFD_CLOEXEC, files - 1))


def raise_file_limit(max_connections: int) -> None:
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
