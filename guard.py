"""Who may come in: for now, pages of which origin.

A browser lets any web page open a WebSocket to any host, and send simple requests. Without this check every page
that a developer visits could read the server on their machine. Programs send no Origin and are let in.
"""

from __future__ import annotations

from collections.abc import Collection

from settings import normal_origin


def origin_allowed(origin: str | None, host: str, allowed: Collection[str]) -> bool:
    """Return whether a request with this Origin header may be answered by the server at this Host header.

    `allowed` are origins in their normal form. Host and port are compared, the scheme is not: behind a proxy that
    ends TLS the server does not know it.
    """
    if origin is None or "*" in allowed or normal_origin(origin) in allowed:
        return True
    scheme = origin.partition("://")[0]
    return bool(host) and normal_origin(origin) == normal_origin(f"{scheme}://{host}")
