"""From a request to its answer: the methods of a path, and the only place where an error of the app becomes an answer.

Owns the documented body of errors, and the two borders at which an unexpected error stops: `Endpoint` for a request,
`Socket` for a WebSocket. Handlers raise; they never answer with an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Set
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import Struct
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

import schemas
from errors import Category, MethodNotAllowed, NotFound, NotifydError, StoreUnavailable
from guard_identity import Identity, Right
from hub import Hub
from query import NO_PARAMETERS, QUERY_KEY, Query, segments
from schemas import TRY_AGAIN_LATER, encode
from streams import STREAM_HEADERS, closed

if TYPE_CHECKING:
    from guard_auth import Authenticator

logger = logging.getLogger("notifyd.answers")

# When to try again after reaching a limit, or while the server drains.
RETRY_AFTER_SECONDS = 5
# The statuses of refusals that do not last. For a browser's EventSource every status but 200 is the end for good.
TEMPORARY = frozenset((409, 429, 500, 503))
# In Accept: the weight of a media range (RFC 9110, section 12.4.2).
_WEIGHT = re.compile(r"q\s*=\s*([01](?:\.\d*)?)\Z")
# For so long a browser reuses the answer to a preflight.
PREFLIGHT_SECONDS = 600

# The X-Request-ID of the request that is under way, for the log; empty where there is none.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")

# The identity is None where there is no authentication.
Handler = Callable[[Hub, Request, Identity | None], Awaitable[ASGIApp]]
SocketHandler = Callable[[Hub, "Authenticator | None", Set[str], Scope, Receive, Send], Awaitable[None]]


Body = TypeVar("Body", bound=Struct)


class ReceiveError(Exception):
    """Reading a request has failed outside of this app: in a host's middleware that limits bodies, for example."""

    def __init__(self, cause: Exception) -> None:
        super().__init__()
        self.cause = cause


class Endpoint:
    """One path as an ASGI app: its methods, parameters and right, and the documented body of every error."""

    def __init__(
        self,
        hub: Hub,
        authenticator: Authenticator | None = None,
        right: Right | None = None,
        parameters: Mapping[str, Any] | None = None,
        **handlers: Handler,
    ) -> None:
        """Without an authenticator the path is open to everybody; without parameters it ignores its query."""
        self._hub = hub
        self.authenticator = authenticator
        self.right = right
        self.kinds = parameters or {}
        self.parameters = None if parameters is None else known(parameters, authenticator)
        self.handlers = handlers
        if "GET" in handlers:
            handlers["HEAD"] = handlers["GET"]
        self._allow = ", ".join([*handlers, "OPTIONS"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, query, identity = scope["method"], scope["query_string"], None
        try:
            if method == "OPTIONS":
                response: ASGIApp = self._options(Headers(scope=scope))
            elif (handler := self.handlers.get(method)) is None:
                raise MethodNotAllowed(f"Method {method[:32]} is not allowed here", {"Allow": self._allow})
            else:
                ignores_query = self.parameters is None or not query
                scope[QUERY_KEY] = NO_PARAMETERS if ignores_query else Query(query, self.parameters)
                if self.authenticator is not None:
                    identity = await self.authenticator.identify(scope, self.right)
                response = await handler(self._hub, Request(scope, receive), identity)
        except ClientDisconnect:
            # The client left before its request was complete, so nobody reads an answer.
            return
        except ReceiveError as error:
            # The host's own exception as it was, for the host to answer.
            raise error.cause from error.cause.__cause__
        except NotifydError as error:
            self._hub.counts.refuse(error)
            response = refusal(error, scope)
        except Exception as error:
            response = unexpected_response(error, scope)
        await response(scope, receive, send)

    def _options(self, asked: Headers) -> Response:
        """Return the methods; a preflight (https://fetch.spec.whatwg.org/#http-cors-protocol) may send any header."""
        headers = {"Allow": self._allow}
        if "access-control-request-method" in asked:
            headers["Access-Control-Allow-Methods"] = self._allow
            headers["Access-Control-Allow-Headers"] = asked.get("access-control-request-headers", "")
            headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        return Response(status_code=204, headers=headers)


def known(parameters: Collection[str], authenticator: Authenticator | None) -> Set[str]:
    """Return the parameters of a path together with those that authentication reads."""
    return frozenset(parameters).union(() if authenticator is None else authenticator.parameters)


class SegmentRoute(Route):
    """A route with a {name} for each segment that is a value. Its handler gets these still encoded."""

    def __init__(self, path: str, app: ASGIApp) -> None:
        _, first, *self._names = path.split("/")
        super().__init__(f"/{first}/{{rest:path}}", app)
        # As it is documented.
        self.path = path

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is Match.NONE:
            return match, child
        values: dict[str, str] = child["path_params"]
        found = segments(scope.get("raw_path") or b"", values.pop("rest"), len(self._names))
        pairs = list(zip(self._names, found or (), strict=False))
        if not pairs or any(name[0] != "{" and name != given for name, given in pairs):
            return Match.NONE, {}
        values |= {name[1:-1]: given for name, given in pairs if name[0] == "{"}
        return match, child


class Socket:
    """The WebSocket path as an ASGI app: an unexpected error ends one connection, and is logged."""

    def __init__(
        self, hub: Hub, authenticator: Authenticator | None, parameters: Mapping[str, Any], handler: SocketHandler
    ) -> None:
        self._hub = hub
        self.authenticator = authenticator
        self.kinds = parameters
        self.parameters = known(parameters, authenticator)
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._handler(self._hub, self.authenticator, self.parameters, scope, receive, send)
        except Exception as error:
            logger.error("Unexpected error %s", schemas.new_error_id(), exc_info=error)


# --- the answers


class Answer(Response, Generic[Body]):
    """A response that carries this Struct as JSON; the contracts read its type off the handlers."""


def answer(body: Body, status: int = 200, headers: dict[str, str] | None = None) -> Answer[Body]:
    # The line end is for readers at a terminal.
    return Answer(encode(body) + b"\n", status, headers, "application/json")


def error_response(error: NotifydError, category: Category | None = None, error_id: str | None = None) -> Response:
    body = schemas.error_body(error.message, category or error.category, error_id)
    retry = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.status in (429, 503) else {}
    return answer(body, error.status, retry | error.headers)


def refusal(error: NotifydError, scope: Scope, error_id: str | None = None) -> Response:
    """Return the answer to a request that is refused; where it asks for a stream, the end of one if that may pass."""
    if error.status not in TEMPORARY or not _asks_for_a_stream(scope):
        return error_response(error, error_id=error_id)
    if isinstance(error, StoreUnavailable):
        # The reason is for the operator, on /health.
        end = closed(TRY_AGAIN_LATER, "Try again later")
    else:
        end = closed(error.close_code, error.message, int(error.headers.get("Retry-After", 0)))
    return stream_of(end)


def stream_of(body: bytes, headers: Iterable[tuple[bytes, bytes]] = STREAM_HEADERS) -> Response:
    """Return a stream that has ended."""
    response = Response(body)
    response.raw_headers += headers
    return response


def _asks_for_a_stream(scope: Scope) -> bool:
    """Whether a request names the media type of streams, as a browser's EventSource does, and has the path of one."""
    if scope["method"] != "GET" or not scope["path"].endswith("/events"):
        return False
    return _ranges(Headers(scope=scope)).get("text/event-stream", 0.0) > 0


def preferred(headers: Headers, offered: Collection[str]) -> str:
    """Return the media type that a request prefers (RFC 9110, section 12.5.1): of equal ones the first that is offered.

    The most specific range counts for a type. A request without the header, or that excludes all types, gets the first.
    """
    ranges = _ranges(headers)

    def weight(kind: str) -> float:
        spelled = (kind, f"{kind.partition('/')[0]}/*", "*/*")
        return next((ranges[each] for each in spelled if each in ranges), 0.0)

    return max(offered, key=weight)


def _ranges(headers: Headers) -> dict[str, float]:
    """Return the media ranges in Accept with their weights."""
    ranges = {}
    for part in ",".join(headers.getlist("accept")).lower().split(","):
        kind, *parameters = [text.strip() for text in part.split(";")]
        weights = [float(found[1]) for text in parameters if (found := _WEIGHT.match(text))]
        ranges[kind] = weights[0] if weights else 1.0
    return ranges


def unexpected_response(error: Exception, scope: Scope) -> Response:
    """Log an unexpected error, under the id that the client gets."""
    error_id = schemas.new_error_id()
    logger.error("Unexpected error %s", error_id, exc_info=error)
    return refusal(NotifydError("Internal server error"), scope, error_id)


async def refuse(error: NotifydError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or a handshake where the server can, with an HTTP error."""
    if scope["type"] == "http":
        await refusal(error, scope)(scope, receive, send)
        return
    await receive()  # websocket.connect
    await refuse_handshake(error, scope, receive, send)


async def refuse_handshake(error: NotifydError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a handshake that has been received with an HTTP error, or with a close where the server cannot."""
    if "websocket.http.response" in (scope.get("extensions") or {}):
        # Starlette's own Response answers handshakes since 0.37 only.
        answer = error_response(error, "connection")
        start = {"type": "websocket.http.response.start", "status": answer.status_code, "headers": answer.raw_headers}
        await send(start)
        await send({"type": "websocket.http.response.body", "body": answer.body})
    else:
        await send({"type": "websocket.close", "code": error.close_code, "reason": error.message})


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer for every path without a route."""
    await refuse(NotFound(f"There is nothing at {scope['path'][:200]}"), scope, receive, send)
