"""How often an address may come: the guard before everything else, installed only where a setting asks for it.

Owns the rates, and the headers that tell about them. Whose request it is, is addresses.py's.

1. Everything counts but /health: also what has no route, a wrong method or a foreign origin. Only what the wire refuses
   never comes here: what is no HTTP request or no handshake.
2. The buckets are the store's, so all processes share them. While it is away each process has its own, which begin
   as it last knew them: limits are N times as wide then, and nobody is locked out.
3. An address whose bucket is known to be empty is refused without asking the store. Others can only have taken more
   out of it meanwhile. So a flood costs the store no more than what it lets through.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import math
import time
from collections.abc import Collection, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from answers import readable, refuse
from connection import WIRE_EXTENSION
from errors import (
    Forbidden,
    InvalidRequest,
    NotifydError,
    RateExceeded,
    StoreUnavailable,
)
from settings import Settings, normal_origin
from store import SECOND, Buckets, Draw, Rate, Store

logger = logging.getLogger("notifyd.guard")

# A browser tells nobody why it was refused, so the log does: once a minute for each origin, and for so many at most,
# as anyone can make them up.
WARN_SECONDS = 60.0
MAX_WARNED = 100


class Origins:
    """The origins from which pages may come in, beside the server's own: `allowed`, in the form of normal_origin()."""

    def __init__(self, allowed: Collection[str]) -> None:
        self.allowed = frozenset(allowed)
        # When each of the last refused origins was told.
        self._warned: dict[str, float] = {}

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """Return the Origin of a request that --allow-origin lets in; None for programs and the server's own pages.

        Raises Forbidden for any other page, and InvalidRequest for several hosts (RFC 9112, section 3.2). Host and port
        are compared with the Host header, the scheme is not: behind a proxy that ends TLS the server does not know it.
        """
        origins, hosts = [], []
        for name, value in headers:
            if name == b"origin":
                origins.append(value)
            elif name == b"host":
                hosts.append(value.decode("latin-1"))
        if len(hosts) > 1:
            raise InvalidRequest("Host: expected one header, got several")
        if not origins:
            return None
        page = normal_origin(b", ".join(origins).decode("latin-1"))
        if len(origins) == 1:
            if not self.allowed.isdisjoint((page, "*")):
                return origins[0]
            scheme = page.partition("://")[0]
            if hosts and hosts[0] and page == normal_origin(f"{scheme}://{hosts[0]}"):
                return None
        self._warn(page)
        raise Forbidden("Origin not allowed; --allow-origin names those that are")

    def _warn(self, page: str) -> None:
        shown, now = repr(page)[:200], time.monotonic()
        self._warned = {known: at for known, at in self._warned.items() if now - at < WARN_SECONDS}
        if shown not in self._warned and len(self._warned) < MAX_WARNED:
            self._warned[shown] = now
            logger.warning("The origin %s is refused; --allow-origin lets it in", shown)


logger = logging.getLogger("notifyd.throttle")

HANDSHAKES, REQUESTS = Rate(5, 10), Rate(10, 20)
EXEMPT = ("/health", "/health/live")

Headers = list[tuple[bytes, bytes]]
_ANSWERS = ("http.response.start", "websocket.accept", "websocket.http.response.start")
# Browsers join this with the other list of readable headers.
_EXPOSED = (b"access-control-expose-headers", b"X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset")


class Throttle:
    """Refuses who comes too often; puts the address of who comes into the scope."""

    def __init__(self, app: ASGIApp, settings: Settings, store: Store) -> None:
        self.app = app
        self.limits = settings.rate_limit
        self.proxies = Proxies(settings.trusted_proxies)
        self.origins = Origins(settings.allow_origin)
        self.exposes = bool(settings.allow_origin)
        self.store = store
        self.buckets = Buckets()
        # When each of the last refused addresses was logged.
        self.logged: dict[str, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        peer = (scope.get("client") or ("",))[0]
        address = self.proxies.address_of(peer or UNIX, scope["headers"])
        if address != peer:
            # For whatever comes after this: the limit of connections, and logs.
            scope["client"] = (address, 0)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if not self.limits or path in EXEMPT:
            await self.app(scope, receive, send)
            return
        rate = HANDSHAKES if scope["type"] == "websocket" else REQUESTS
        drawn = await self._draw(f"{scope['type']} {address}", rate)
        headers = _headers(drawn, rate)
        if self.exposes:
            headers.append(_EXPOSED)
        if drawn.allowed:
            if (wire := (scope.get("extensions") or {}).get(WIRE_EXTENSION)) is not None:
                wire.tell(headers)
            await self.app(scope, receive, _telling(send, headers))
        else:
            wait = math.ceil((drawn.until_full + rate.cost - rate.depth) / SECOND)
            what = "handshakes" if rate is HANDSHAKES else "requests"
            self._log(address, what)
            error = RateExceeded(
                f"Rate limit exceeded: {rate.per_second} {what} a second, {rate.burst} at once",
                {"Retry-After": str(wait)},
            )
            send, page = _telling(send, headers), None
            with contextlib.suppress(NotifydError):
                page = self.origins.admit(scope["headers"])
            await refuse(error, scope, receive, readable(send, page) if page and scope["type"] == "http" else send)

    def _log(self, address: str, what: str) -> None:
        """Say who is refused: as for an origin, once a minute, and no more than so many."""
        now = time.monotonic()
        self.logged = {known: at for known, at in self.logged.items() if now - at < WARN_SECONDS}
        if address not in self.logged and len(self.logged) < MAX_WARNED:
            self.logged[address] = now
            logger.warning("The address %s sends too many %s and is refused", repr(address)[1:-1], what)

    async def _draw(self, bucket: str, rate: Rate) -> Draw:
        now = _now()
        if refused := self.buckets.refusal(bucket, rate, now):
            return refused
        try:
            drawn = await self.store.draw(bucket, rate)
        except StoreUnavailable:
            return self.buckets.draw(bucket, rate, now)
        self.buckets.put(bucket, drawn, now)
        return drawn


def _now() -> int:
    return time.monotonic_ns() // 1000


def _headers(drawn: Draw, rate: Rate) -> Headers:
    """Tell about a bucket: requests a second, whole requests left now, the Unix second at which it is full."""
    return [
        (b"x-ratelimit-limit", b"%d" % rate.per_second),
        (b"x-ratelimit-remaining", b"%d" % ((rate.depth - drawn.until_full) // rate.cost)),
        (b"x-ratelimit-reset", b"%d" % math.ceil(time.time() + drawn.until_full / SECOND)),
    ]


def _telling(send: Send, headers: Headers) -> Send:
    """Return a `send` whose answer, whatever it is, has these headers."""

    async def send_telling(message: Message) -> None:
        if message["type"] in _ANSWERS:
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return send_telling


Address = ipaddress.IPv4Address | ipaddress.IPv6Address

UNIX = "unix"
# No address with its port is longer; so what is remembered of made-up ones is little.
MAX_LENGTH = 64


class Proxies:
    """The trusted ones: addresses, networks, and UNIX for whoever comes through a Unix socket."""

    def __init__(self, trusted: Collection[str]) -> None:
        self._networks = [ipaddress.ip_network(text) for text in trusted if text != UNIX]
        self._trusts_unix = UNIX in trusted

    def address_of(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return whom a request is from; `peer` is the other end of the connection, UNIX for one without address."""
        address = _read(peer)
        if not (self._trusts(address) if address else peer == UNIX and self._trusts_unix):
            return str(address or peer)
        hops = b",".join(value for name, value in headers if name == b"x-forwarded-for").decode("latin-1").split(",")
        # A proxy that names no address (RFC 7239 calls it obfuscated) is itself as far as anybody knows.
        while hops and (hop := _read(hops.pop().strip()[:MAX_LENGTH])) is not None:
            address = hop
            if not self._trusts(hop):
                break
        return str(address or peer)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


# Asked for each request: to read an address takes some 10 us, to find it again less than one.
@functools.lru_cache(4096)
def _read(text: str) -> Address | None:
    """Return the address in a text, which may have a port; None where there is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        # The zone says which of this host's interfaces it is on, and is no part of the address elsewhere.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # What a socket for both families calls an IPv4 address.
    return getattr(address, "ipv4_mapped", None) or address


class OriginGuard:
    """Refuses, before anything else, what comes from a page of a foreign origin; one that is allowed may read answers.

    Also errors, and with the methods of each path: Starlette's CORSMiddleware stands before the routes and knows none.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app = app
        self.origins = Origins(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            page = self.origins.admit(scope["headers"])
        except NotifydError as error:
            await refuse(error, scope, receive, send)
            return
        if scope["type"] == "http" and self.origins.allowed:
            send = readable(send, page)
        await self.app(scope, receive, send)
