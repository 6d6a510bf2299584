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
import logging
import math
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from addresses import UNIX, Proxies
from connection import WIRE_EXTENSION
from errors import NotifydError, RateExceeded, StoreUnavailable
from guard import MAX_WARNED, WARN_SECONDS, Origins
from rates import SECOND, Buckets, Draw, Rate
from routes import readable, refuse
from settings import Settings
from store import Store

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
