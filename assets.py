"""Static files of ours: served as they are, under fixed paths, by name.

Owns where they lie, their media types, and what caches may keep. They lie beside the modules, in a checkout as in the
package. A name comes from the route table and never from a request.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from starlette.requests import Request
from starlette.responses import Response

# By path. Asking for them counts for no rate, and needs no key or token.
FILES = {
    "/client.js": "clients/js/client.js",
    **{
        f"/console/{name}": f"console/{name}"
        for name in (
            *("api.js", "app.js", "clients.js", "console.css", "elements.js", "history.js", "icon.svg", "json.js"),
            *("live.js", "notification.js", "plot.js", "publish.js", "server.js"),
        )
    },
}
# Of the files of the console: their route, and the page itself, which is a form of GET /.
CONSOLE, PAGE = "/console/{file}", "console/index.html"
_MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
# A cache may keep a file, and asks each time whether it is still the same: the paths have no version in them.
_HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


def asset(request: Request, name: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the file with these headers beside its own, or 304 where the client has it (RFC 9110, section 13.1.2)."""
    body, tag = _read(name)
    told = {"ETag": tag, **_HEADERS, **(headers or {})}
    held = ",".join(request.headers.getlist("if-none-match")).split(",")
    # A proxy that compresses makes tags weak, and the comparison is weak anyway.
    if any(each.strip().removeprefix("W/") in (tag, "*") for each in held):
        return Response(status_code=304, headers=told)
    return Response(body, headers=told, media_type=media_type_of(name))


def files_at(path: str) -> list[str]:
    """Return the names of the files that a path of the route table serves."""
    return [name for at, name in FILES.items() if fnmatchcase(at, path.replace("{file}", "*"))]


def media_type_of(name: str) -> str:
    return _MEDIA_TYPES[PurePath(name).suffix]


@functools.cache
def _read(name: str) -> tuple[bytes, str]:
    """Return a file with its tag, which is a hash of it."""
    body = (Path(__file__).parent / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
