"""The middleware before the routes: the address of a request or handshake, its rate and its origin, in this order.

Owns the trusted proxies, the rates, the allowed origins, and the headers that report them. Knows no credentials
(guard_auth.py) and no route but those. Every refusal leaves here the same way, with the same headers.

1. Every request counts against the rate of its address, except the probes and static files: also an unknown path, a
   wrong method and a foreign origin. Bytes that are no HTTP request are refused by the server before they come here.
2. The buckets are the store's, shared by all processes. While the store is away each process has its own, starting
   from the last known level: limits are then N times as wide, and no address is locked out.
3. Where the bucket is known to be empty, a request is refused without asking the store: other processes can only have
   taken more out of it. So a flood costs the store no more than the requests that are let through.
"""

from __future__ import annotations

import ipaddress
import math
import re
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from answers import REQUEST_ID, refuse
from assets import FILES
from buckets import SECOND, Buckets, Draw, Rate
from connection import REPEAT_EXTENSION, SUBSCRIBER, WIRE_EXTENSION
from counts import Counts
from errors import Forbidden, InvalidRequest, NotifydError, RateExceeded, StoreUnavailable
from guard_peers import MAX_ADDRESS_LENGTH, UNIX, Address, RefusalLog, parsed, subscriber
from settings import Settings, is_origin, named_origin, normal_origin
from store import Store

HANDSHAKES, REQUESTS = Rate(5, 10), Rate(10, 20)
EXEMPT = ("/health", "/health/live", *FILES)
# The headers of ours that a page of an allowed origin may read.
EXPOSED = (
    b"Accept-Encoding, Allow, ETag, Idempotent-Replayed, Notification-Id, Preference-Applied, Retry-After, Upgrade, "
    b"WWW-Authenticate, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset"
)


_REQUEST_ID = re.compile(rb"[!-~]{1,128}\Z")
Headers = list[tuple[bytes, bytes]]
_ANSWERS = ("http.response.start", "websocket.accept", "websocket.http.response.start")


class Guard:
    """Check the address, the rate and the origin, and let the routes answer, or refuse."""

    def __init__(self, app: ASGIApp, settings: Settings, store: Store, counts: Counts) -> None:
        self._app = app
        self._counts = counts
        uses_addresses = settings.rate_limit or settings.trusted_proxies or settings.max_connections_per_ip
        self._proxies = Proxies(settings.trusted_proxies) if uses_addresses else None
        self._ipv6_prefix = settings.ipv6_prefix
        self._limiter = Limiter(store) if settings.rate_limit else None
        self._origins = Origins(settings.allow_origin)
        self._names_requests = settings.log_format == "json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if self._names_requests:
            REQUEST_ID.set(_request_id(scope["headers"]))
        if scope["path"].endswith("/"):
            _drop_added_slash(scope)
        if self._proxies is not None:
            _locate(scope, self._proxies, self._ipv6_prefix)
        headers: Headers = []
        refusal: NotifydError | None = None
        if self._limiter is not None and scope["path"].removeprefix(scope.get("root_path", "")) not in EXEMPT:
            refusal = await self._limiter.draw(scope, headers)
        page = None
        try:
            page = self._origins.admit(scope["headers"])
        except NotifydError as error:
            refusal = refusal or error
        if self._origins.allowed and scope["type"] == "http":
            _permit(page, headers)
        if headers:
            send = _telling(headers, scope, send)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            self._counts.refuse(refusal)
            await refuse(refusal, scope, receive, send)


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the id that a proxy or publisher has given to a request, empty for none or for one of another form."""
    given = [value for name, value in headers if name == b"x-request-id"]
    return given[0].decode("ascii") if len(given) == 1 and _REQUEST_ID.match(given[0]) else ""


def _drop_added_slash(scope: Scope) -> None:
    """Remove the slash that Litestar adds to a path under a mount. The client's own slash is in raw_path, too."""
    raw_path = (scope.get("raw_path") or b"/").partition(b"?")[0]
    if scope["path"] != scope.get("root_path", "") + "/" and not raw_path.endswith((b"/", b"%2F", b"%2f")):
        scope["path"] = scope["path"].removesuffix("/")


def _telling(headers: Headers, scope: Scope, send: Send) -> Send:
    """Return a `send` that adds these headers to the answer."""
    extensions = scope.get("extensions") or {}
    extensions.pop(REPEAT_EXTENSION, None)
    if (wire := extensions.get(WIRE_EXTENSION)) is not None:
        # The fast wire accepts a handshake without `send`, and adds them to every answer itself.
        wire.tell(headers)
        return send

    async def send_telling(message: Message) -> None:
        if message["type"] in _ANSWERS:
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return send_telling


# --- the address


class Proxies:
    """The trusted proxies: addresses, networks, and UNIX for any peer on a Unix socket."""

    def __init__(self, trusted: Collection[str]) -> None:
        self._networks = [_network(text) for text in trusted if text != UNIX]
        self._trusts_unix = UNIX in trusted

    def address_of(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return the address that a request comes from; `peer` is the other end of the connection, or UNIX.

        X-Forwarded-For is read from the right, past trusted proxies: a client may have invented all to the left.
        """
        address = parsed(peer)
        if not (self._trusts(address) if address else peer == UNIX and self._trusts_unix):
            return str(address or peer)
        hops = b",".join(value for name, value in headers if name == b"x-forwarded-for").decode("latin-1").split(",")
        # Behind a proxy that names no address (RFC 7239 calls this obfuscated), the proxy is the last known address.
        while hops and (hop := parsed(hops.pop().strip()[:MAX_ADDRESS_LENGTH])) is not None:
            address = hop
            if not self._trusts(hop):
                break
        return str(address or peer)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Return the network in a text, of IPv4 also if it stands in the form of IPv6, as parsed() has its addresses."""
    network = ipaddress.ip_network(text)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    return network if mapped is None else ipaddress.IPv4Network((mapped, network.prefixlen - 96))


def _locate(scope: Scope, proxies: Proxies, ipv6_prefix: int) -> None:
    """Put the client's own address into the scope, for logs, and the subscriber that its limits count for."""
    peer = (scope.get("client") or ("",))[0]
    address = proxies.address_of(peer or UNIX, scope["headers"])
    if address != peer:
        scope["client"] = (address, 0)
    scope[SUBSCRIBER] = subscriber(address, ipv6_prefix)


# --- the rate


class Limiter:
    """Two buckets for each subscriber: one for handshakes, one for requests."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # Of every bucket the last known level.
        self._buckets = Buckets()
        self._log = RefusalLog("The address %s sends too many %s and is refused")

    async def draw(self, scope: Scope, headers: Headers) -> RateExceeded | None:
        """Take one request out of the bucket of the scope's subscriber, and add the headers that tell about the bucket.

        Returns the refusal where the bucket is empty.
        """
        kind, address = scope["type"], scope[SUBSCRIBER]
        rate, counted = (HANDSHAKES, "handshakes") if kind == "websocket" else (REQUESTS, "requests")
        drawn = await self._draw(f"{kind} {address}", rate)
        # Requests a second, whole requests left now, and the Unix second at which the bucket is full.
        headers += [
            (b"x-ratelimit-limit", b"%d" % rate.per_second),
            (b"x-ratelimit-remaining", b"%d" % ((rate.depth - drawn.until_full) // rate.cost)),
            (b"x-ratelimit-reset", b"%d" % math.ceil(time.time() + drawn.until_full / SECOND)),
        ]
        if drawn.allowed:
            return None
        name = repr(address)[1:-1]
        self._log.warn(name, name, counted)
        wait = math.ceil((drawn.until_full + rate.cost - rate.depth) / SECOND)
        text = f"Rate limit exceeded: {rate.per_second} {counted} a second, {rate.burst} at once"
        return RateExceeded(text, {"Retry-After": str(wait)})

    async def _draw(self, bucket: str, rate: Rate) -> Draw:
        now = time.monotonic_ns() // 1000
        if refused := self._buckets.refusal(bucket, rate, now):
            return refused
        try:
            drawn = await self._store.draw(bucket, rate)
        except StoreUnavailable:
            return self._buckets.draw(bucket, rate, now)
        self._buckets.put(bucket, drawn, now)
        return drawn


# --- the origin


class Page(NamedTuple):
    """A page that --allow-origin lets in: the Origin that it sent, and whether the setting names it.

    A `*` for the first label counts as a name, a lone `*` and `null` do not.
    """

    origin: bytes
    is_named: bool


MAX_ORIGIN_SHOWN = 200
_LABEL = re.compile(r"[\w-]+\Z", re.ASCII)


class Origins:
    """The allowed origins, beside the server's own. `allowed` has them in the form of normal_origin()."""

    def __init__(self, allowed: Collection[str]) -> None:
        self.allowed = frozenset(allowed)
        # A browser does not tell the page why it was refused, so the log does.
        self._log = RefusalLog("The origin %s is refused%s")

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> Page | None:
        """Return the page that has sent a request; None for programs and the server's own pages.

        Raises Forbidden for any other page, and InvalidRequest for several hosts (RFC 9112, section 3.2). Host and port
        are compared with the Host header, the scheme is not: behind a proxy that ends TLS the server does not know it.
        """
        origins, hosts = [], []
        for name, value in headers:
            if name == b"origin":
                origins.append(value)
            elif name == b"host":
                hosts.append(value)
        if len(hosts) > 1:
            raise InvalidRequest("Host: expected one header, got several")
        if not origins:
            return None
        page = normal_origin(b", ".join(origins).decode("latin-1"))
        if len(origins) == 1:
            is_named = self._names(page)
            if is_named or "*" in self.allowed or (page == "null" and page in self.allowed):
                return Page(origins[0], is_named)
            scheme = page.partition("://")[0]
            if hosts and hosts[0] and page == normal_origin(f"{scheme}://{hosts[0].decode('latin-1')}"):
                return None
        shown = repr(page)[:MAX_ORIGIN_SHOWN]
        self._log.warn(shown, shown, "; --allow-origin lets it in" if _can_be_named(page) else "")
        raise Forbidden("Origin not allowed; --allow-origin names those that are")

    def _names(self, page: str) -> bool:
        """Whether the setting has this origin, or a * for its first label."""
        scheme, separator, host = page.partition("://")
        label, _, parent = host.partition(".")
        is_known = page in self.allowed or (_LABEL.match(label) and f"{scheme}://*.{parent}" in self.allowed)
        return bool(separator and is_known) and "*" not in page


def _can_be_named(page: str) -> bool:
    """Whether --allow-origin with this text lets in a page that sends it."""
    return is_origin(page) and named_origin(page) == page and "*" not in page and len(repr(page)) <= MAX_ORIGIN_SHOWN


def _permit(page: Page | None, headers: Headers) -> None:
    """Add the headers of CORS: for the page of an allowed origin, and for caches, also without a page.

    Unlike Starlette's CORSMiddleware this covers errors, and leaves the methods of a path to the routes.
    """
    headers.append((b"vary", b"Origin"))
    if page is not None:
        headers += [(b"access-control-allow-origin", page.origin), (b"access-control-expose-headers", EXPOSED)]
        if page.is_named:
            # A page may send the cookies and the password that a proxy in front asks for.
            headers.append((b"access-control-allow-credentials", b"true"))
