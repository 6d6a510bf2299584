"""The URL of a request: the parameters that each path knows with their values, the segments of a path, and cursors.

Owns the names of all parameters, once for the check and for docs/protocol.md, and the decoding. Knows no request, and
not the meaning of a value.

1. A path refuses an unknown parameter by name: a misspelt `topics` must not become a subscription to nothing.
2. Of several values the last counts, but `topics` is the union of all.
3. A path is divided before it is decoded: a slash in a segment is %2F (RFC 3986, section 2.4).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Container, Mapping
from typing import Any, NamedTuple, get_args
from urllib.parse import parse_qsl, quote, unquote

from errors import InvalidRequest
from schemas import MAX_SHOWN, Before, ClientId, Cursor, DeliveryState, Order, Since, Topic, Topics, User

# A URL has room for tens of thousands of parameters, and reading those would take 50 ms.
MAX_PARAMETERS = 100
_BROKEN = re.compile("%(?![0-9A-Fa-f]{2})")
# In the scope of a request: its Query.
QUERY_KEY = "notifyd.query"


class Limit(NamedTuple):
    """The values of `limit` on one path."""

    default: int
    least: int
    most: int


HISTORY_LIMIT, STATUS_LIMIT, PAGE_LIMIT = Limit(100, 1, 1000), Limit(1000, 0, 1_000_000), Limit(100, 1, 1000)

# Known also without authentication, so that a client needs no other URL for it.
_CREDENTIALS = {"token": str}
_FOLLOWING = {
    "client_id": ClientId,
    "user": User,
    "since": Since,
    "lastEventId": Since,
    "topics": Topics,
    **_CREDENTIALS,
}
# By path, each with the type of its value. Every other path ignores its query, for the sake of probes and scrapers.
PARAMETERS: dict[str, Mapping[str, Any]] = {
    "/ws": _FOLLOWING,
    "/events": _FOLLOWING,
    "/notifications": _FOLLOWING | {"before": Before, "order": Order, "limit": HISTORY_LIMIT},
    "/notifications/{id}": _CREDENTIALS,
    "/notifications/{id}/clients": _CREDENTIALS | {"state": DeliveryState, "limit": PAGE_LIMIT, "after": Cursor},
    "/status": _CREDENTIALS | {"limit": STATUS_LIMIT},
    "/clients": _CREDENTIALS | {"user": User, "topic": Topic, "limit": PAGE_LIMIT, "after": Cursor},
    "/clients/{client_id}": _CREDENTIALS,
    "/users/{user}": _CREDENTIALS,
    "/users/{user}/topics": _CREDENTIALS,
    "/users/online": _CREDENTIALS,
    "/topics": _CREDENTIALS | {"prefix": str, "limit": PAGE_LIMIT, "after": Cursor},
    # Addressees stand in the body: in the URL they would be ignored, and the notification go to everyone.
    "/notify": _CREDENTIALS,
    "/notify/batch": _CREDENTIALS,
}


class Query(dict[str, str]):
    """The parameters of one URL by name: the last value of each, and of `topics` all, joined by commas."""

    __slots__ = ()

    def __init__(self, encoded: bytes, known: Container[str] | None = None) -> None:
        """Decode a query with no other than the known parameters; None is any. Raises InvalidRequest."""
        if encoded.count(b"&") >= MAX_PARAMETERS:
            raise InvalidRequest(f"Query: more than {MAX_PARAMETERS} parameters")
        try:
            text = encoded.decode()
            if _BROKEN.search(text):
                raise InvalidRequest("Query: a % without two hex digits; %25 is a percent sign")
            pairs = parse_qsl(text, keep_blank_values=True, errors="strict")
        except UnicodeDecodeError:
            raise InvalidRequest("Query: not valid UTF-8") from None
        for name, value in pairs:
            if known is not None and name not in known:
                raise InvalidRequest(f"Unknown parameter: {name[:MAX_SHOWN] or 'without a name'}")
            earlier = self.get(name) if name == "topics" else None
            self[name] = f"{earlier},{value}" if earlier and value else earlier or value

    def since(self, header: str | None = None) -> str | None:
        """Return the position to resume from. An empty Last-Event-ID, in the header or the URL, counts as none."""
        return header or self.get("lastEventId") or self.get("since")

    def topics(self) -> list[str]:
        """Return the names in all `topics`."""
        names = self.get("topics")
        return names.split(",") if names else []

    def limit(self, limit: Limit) -> int:
        """Return the number in `limit`. Raises InvalidRequest."""
        given, (default, least, most) = self.get("limit"), limit
        if given is None:
            return default
        if not (given.isascii() and given.isdecimal() and len(given) <= 9 and least <= int(given) <= most):
            raise InvalidRequest(f"limit: expected a whole number from {least} to {most}, got {given[:MAX_SHOWN]!r}")
        return int(given)

    def one_of(self, name: str, values: Any, default: str) -> Any:
        """Return a parameter that is one of some values, a Literal. Raises InvalidRequest."""
        given, known = self.get(name, default), get_args(values)
        if given not in known:
            raise InvalidRequest(f"{name}: expected {' or '.join(known)}, got {given[:MAX_SHOWN]!r}")
        return given

    def after(self) -> str:
        """Return the name in `after`, a cursor; empty for the beginning. Raises InvalidRequest."""
        given = self.get("after") or ""
        try:
            return base64.b64decode(given + "=" * (-len(given) % 4), altchars=b"-_", validate=True).decode()
        except ValueError:
            raise InvalidRequest("after: expected the `next` of an earlier answer") from None


def cursor(name: str) -> str:
    """Return an opaque cursor for `after`: the page behind this name."""
    return base64.urlsafe_b64encode(name.encode()).rstrip(b"=").decode()


NO_PARAMETERS = Query(b"")


# --- paths


def segments(raw_path: bytes, decoded: str, count: int) -> list[str] | None:
    """Return the last `count` segments of a path, still encoded; None where there are not so many, or an empty one.

    `decoded` is this end of the path as the server has decoded it. A server without a raw path cannot tell a slash from
    an encoded one.
    """
    encoded = raw_path.partition(b"?")[0].decode("latin-1").split("/")[-count:]
    if "/".join(map(unquote, encoded)) != decoded:
        encoded = [] if raw_path else list(map(quote, decoded.split("/")))
    return encoded if len(encoded) == count and all(encoded) else None


def segment(encoded: str, name: str) -> str:
    """Return a segment decoded. Raises InvalidRequest, with the name of its value."""
    if _BROKEN.search(encoded):
        raise InvalidRequest(f"{name}: a % without two hex digits; %25 is a percent sign")
    try:
        return unquote(encoded, errors="strict")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name}: not valid UTF-8") from None
