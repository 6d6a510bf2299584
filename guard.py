"""Who may come in: for now, pages of which origin.

A browser lets any web page open a WebSocket to any host, and send simple requests. Without this check every page
that a developer visits could read the server on their machine. Programs send no Origin and are let in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from errors import Forbidden
from settings import normal_origin


class Origins:
    """The origins from which pages may come in, beside the server's own: `allowed`, in the form of normal_origin()."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """Return the Origin of a request that --allow-origin lets in; None for programs and the server's own pages.

        Raises Forbidden for any other page. Host and port are compared with the Host header, the scheme is not:
        behind a proxy that ends TLS the server does not know it.
        """
        origin, host = None, b""
        for name, value in headers:
            if name == b"origin":
                origin = value
            elif name == b"host":
                host = value
        if origin is None:
            return None
        page = normal_origin(origin.decode("latin-1"))
        if not self._allowed.isdisjoint((page, "*")):
            return origin
        scheme = page.partition("://")[0]
        if host and page == normal_origin(f"{scheme}://{host.decode('latin-1')}"):
            return None
        raise Forbidden("Origin not allowed; --allow-origin names those that are")
