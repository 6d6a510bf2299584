"""Who may come in: for now, pages of which origin.

A browser lets any web page open a WebSocket to any host, and send simple requests. Without this check every page
that a developer visits could read the server on their machine. Programs send no Origin and are let in.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}


def origin_allowed(origin: str | None, host: str, allowed: Collection[str]) -> bool:
    """Return whether a request with this Origin header may be answered by the server at this Host header.

    Host and port are compared, the scheme is not: behind a proxy that ends TLS the server does not know it.
    """
    if origin is None or "*" in allowed:
        return True
    if origin.lower() in {entry.lower() for entry in allowed}:
        return True
    scheme = origin.partition("://")[0].lower()
    own, other = _authority(f"{scheme}://{host}"), _authority(origin)
    return own is not None and own == other


def _authority(url: str) -> tuple[str, int | None] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and parts.scheme else None
