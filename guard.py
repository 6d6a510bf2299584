"""Who may come in: for now, pages of which origin.

A browser lets any web page open a WebSocket to any host, and send simple requests. Without this check every page
that a developer visits could read the server on their machine. Programs send no Origin and are let in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable

from errors import Forbidden, InvalidRequest
from settings import normal_origin

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
