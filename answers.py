"""From a request to its answer: what a handler is given, and the one place where an error becomes an answer.

Owns the documented body of errors, the methods of a path, and how much of a body is read.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

from msgspec import Struct
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import schemas
from connection import EventStream
from errors import (
    MethodNotAllowed,
    NotFound,
    NotifydError,
    TooLarge,
)
from guard_auth import Authenticator
from guard_identity import Identity
from hub import Hub
from schemas import encode

logger = logging.getLogger("notifyd.answers")

# When to try again where the limit is reached or the server drains.
RETRY_AFTER_SECONDS = 5


# How long a browser need not ask again what a page may do.
PREFLIGHT_SECONDS = 600


class ClientGone(Exception):
    """The other side left before its request was whole; there is nobody to answer."""


class Request:
    """One HTTP request as the handlers see it."""

    __slots__ = ("headers", "identity", "receive", "scope")

    def __init__(self, scope: Scope, receive: Receive, identity: Identity | None = None) -> None:
        self.scope = scope
        self.headers = Headers(scope=scope)
        self.receive = receive
        # None where there is no authentication.
        self.identity = identity

    def check_publish(self, requests: Sequence[schemas.NotifyRequest]) -> None:
        """Raise Forbidden where its sender may not publish one of these."""
        if self.identity is not None:
            self.identity.check_publish(requests)

    def parameters(self) -> QueryParams:
        return QueryParams(self.scope["query_string"])

    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def body(self, limit: int) -> bytes:
        """Return the whole body. Raises TooLarge as soon as it is known to be, before it is read."""
        too_large = TooLarge(f"request body: larger than the limit of {limit} bytes")
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts = []
        size, more = 0, True
        while more:
            event = await self.receive()
            if event["type"] == "http.disconnect":
                raise ClientGone
            parts.append(event.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise too_large
            more = event.get("more_body", False)
        return b"".join(parts)


Handler = Callable[[Hub, Request], Awaitable[Response | EventStream]]


# Raises Forbidden or Unauthorized.
Check = Callable[[Identity], None]


def answer(body: Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # The line end is for whoever reads it in a terminal.
    return Response(encode(body) + b"\n", status, headers, "application/json")


class Endpoint:
    """One path as an ASGI app: its methods, and the documented body for whatever goes wrong."""

    def __init__(
        self,
        hub: Hub,
        authenticator: Authenticator | None = None,
        check: Check | None = None,
        *,
        starts: bool = True,
        **handlers: Handler,
    ) -> None:
        """With an authenticator, run the check on the sender. `starts`: whether the Hub must have started."""
        self.hub = hub
        self.authenticator = authenticator
        self.check = check
        self.starts = starts
        self.handlers = handlers
        if "GET" in handlers:
            self.handlers["HEAD"] = handlers["GET"]
        self.allow = ", ".join([*self.handlers, "OPTIONS"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response: Response | EventStream = await self._respond(scope, receive)
        except ClientGone:
            return
        except NotifydError as error:
            response = error_response(error)
        except Exception as error:
            response = unexpected_response(error)
        await response(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive) -> Response | EventStream:
        method = scope["method"]
        if method == "OPTIONS":
            return self._options(Headers(scope=scope))
        if (handler := self.handlers.get(method)) is None:
            raise MethodNotAllowed(f"Method {method[:32]} is not allowed here", {"Allow": self.allow})
        schemas.check_query(scope["query_string"])
        identity = None if self.authenticator is None else await self.authenticator.identify(scope)
        if identity is not None and self.check is not None:
            self.check(identity)
        if self.starts:
            await self.hub.start()
        return await handler(self.hub, Request(scope, receive, identity))

    def _options(self, asked: Headers) -> Response:
        """Tell the methods; a preflight (https://fetch.spec.whatwg.org/#http-cors-protocol) may send any header."""
        headers = {"Allow": self.allow}
        if "access-control-request-method" in asked:
            headers["Access-Control-Allow-Methods"] = self.allow
            headers["Access-Control-Allow-Headers"] = asked.get("access-control-request-headers", "")
            headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
        return Response(status_code=204, headers=headers)


def error_response(error: NotifydError, category: str | None = None, error_id: str | None = None) -> Response:
    body = schemas.error_body(error.message, category or error.category, error_id)
    retry = {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.status in (429, 503) else {}
    return answer(body, error.status, retry | error.headers)


def unexpected_response(error: Exception) -> Response:
    """Log what nobody expected under the id that the other side is told."""
    error_id = schemas.new_error_id()
    logger.error("Unexpected error %s", error_id, exc_info=error)
    return error_response(NotifydError("Internal server error"), error_id=error_id)


async def refuse(error: NotifydError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with an HTTP error; a WebSocket handshake too, where the server can."""
    if scope["type"] == "http":
        await error_response(error)(scope, receive, send)
        return
    await receive()
    await refuse_handshake(error, scope, receive, send)


async def refuse_handshake(error: NotifydError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a handshake that has been received with an HTTP error, where the server can."""
    if "websocket.http.response" in scope.get("extensions", {}):
        await error_response(error, "connection")(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": error.close_code, "reason": error.message})


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer for every path that has no route."""
    await refuse(NotFound(f"There is nothing at {scope['path'][:200]}"), scope, receive, send)
