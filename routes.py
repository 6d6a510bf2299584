"""The routes: plain handlers, each of which reads a request, calls the Hub and answers.

Owns HTTP: methods, sizes, content types, and the one place where an error becomes an answer. Policy is the Hub's.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection

from msgspec import Struct
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

import schemas
from connection import PROBE_EXTENSION, WIRE_EXTENSION, Connection, SendConnection
from errors import (
    Forbidden,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    NotifydError,
    TooLarge,
    UnsupportedMediaType,
    UpgradeRequired,
)
from guard import origin_allowed
from hub import Hub
from schemas import encode, timestamp

logger = logging.getLogger("notifyd.routes")

PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATUS_DETAILS = 1000


class ClientGone(Exception):
    """The other side left before its request was whole; there is nobody to answer."""


class Request:
    """One HTTP request as the handlers see it."""

    __slots__ = ("_receive", "headers", "scope")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.headers = Headers(scope=scope)
        self._receive = receive

    def parameters(self) -> QueryParams:
        return QueryParams(self.scope["query_string"])

    async def body(self, limit: int) -> bytes:
        """Return the whole body. Raises TooLarge as soon as it is known to be, before it is read."""
        too_large = TooLarge(f"request body: larger than the limit of {limit} bytes")
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts = []
        size, more = 0, True
        while more:
            event = await self._receive()
            if event["type"] == "http.disconnect":
                raise ClientGone
            parts.append(event.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise too_large
            more = event.get("more_body", False)
        return b"".join(parts)


Handler = Callable[[Hub, Request], Awaitable[Response]]


def answer(body: Struct, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode(body), status, headers, "application/json")


# --- handlers


async def health(hub: Hub, request: Request) -> Response:
    return answer(hub.health(), 200 if hub.is_ready() else 503)


async def notify(hub: Hub, request: Request) -> Response:
    body = await request.body(hub.settings.max_message_size)
    _check_content_type(request.headers.get("content-type", ""))
    wanted = schemas.decode(body, schemas.NotifyRequest)
    response = schemas.NotifyResponse(recipients=0, notification=wanted, timestamp=timestamp())
    encode(response)
    response.recipients = hub.publish(wanted).recipients
    return answer(response)


async def metrics(hub: Hub, request: Request) -> Response:
    return answer(hub.metrics())


async def prometheus(hub: Hub, request: Request) -> Response:
    return Response(hub.prometheus(), media_type=PROMETHEUS_TYPE)


async def status(hub: Hub, request: Request) -> Response:
    limit = request.parameters().get("limit", str(STATUS_DETAILS))
    if not limit.isdecimal() or len(limit) > 9:
        raise InvalidRequest(f"limit: expected a whole number, got {limit[:64]!r}")
    return answer(hub.status(int(limit)))


async def upgrade_required(hub: Hub, request: Request) -> Response:
    raise UpgradeRequired("Expected a WebSocket handshake", {"Upgrade": "websocket", "Connection": "Upgrade"})


async def connect(hub: Hub, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one WebSocket: on the fast path until it is admitted or refused, else until its end."""
    extensions = scope.get("extensions") or {}
    wire: Connection | None = extensions.get(WIRE_EXTENSION)
    connection = wire or SendConnection(receive, send, extensions.get(PROBE_EXTENSION))
    client_id = QueryParams(scope["query_string"]).get("client_id")
    try:
        await hub.admit(connection, client_id, Headers(scope=scope).get("user-agent"))
    except NotifydError as refusal:
        connection.close(refusal.close_code, refusal.message)
    if isinstance(connection, SendConnection):
        await connection.serve()


def _check_content_type(content_type: str) -> None:
    media_type = content_type.partition(";")[0].strip().lower()
    plain = media_type in ("", "application/json", "application/x-www-form-urlencoded")
    if not plain and not media_type.startswith("text/") and not media_type.endswith("+json"):
        raise UnsupportedMediaType(f"content-type: expected application/json, got {media_type[:64]!r}")


# --- where an error becomes an answer


class Endpoint:
    """One path as an ASGI app: its methods, and the documented body for whatever goes wrong."""

    def __init__(self, hub: Hub, **handlers: Handler) -> None:
        self.hub = hub
        self.handlers = handlers
        if "GET" in handlers:
            self.handlers["HEAD"] = handlers["GET"]
        self.allow = ", ".join([*self.handlers, "OPTIONS"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._respond(scope, receive)
        except ClientGone:
            return
        except NotifydError as error:
            response = error_response(error)
        except Exception as error:
            response = unexpected_response(error)
        await response(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        method = scope["method"]
        if method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": self.allow})
        if (handler := self.handlers.get(method)) is None:
            raise MethodNotAllowed(f"Method {method[:32]} is not allowed here", {"Allow": self.allow})
        return await handler(self.hub, Request(scope, receive))


def error_response(error: NotifydError, category: str | None = None, error_id: str | None = None) -> Response:
    body = schemas.error_body(error.message, category or error.category, error_id)
    return answer(body, error.status, error.headers)


def unexpected_response(error: Exception) -> Response:
    """Log what nobody expected under the id that the other side is told."""
    error_id = schemas.new_error_id()
    logger.error("Unexpected error %s", error_id, exc_info=error)
    return error_response(NotifydError("Internal server error"), error_id=error_id)


class Socket:
    """The WebSocket path as an ASGI app: the border at which one connection's unexpected error stops."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await connect(self.hub, scope, receive, send)
        except Exception as error:
            logger.error("Unexpected error %s", schemas.new_error_id(), exc_info=error)


class OriginGuard:
    """Refuses, before anything else, what comes from a page of a foreign origin."""

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app = app
        self.allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            await self.app(scope, receive, send)
            return
        error = Forbidden("Origin not allowed; --allow-origin names those that are")
        if scope["type"] == "websocket":
            await refuse_handshake(error, scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        origin = host = None
        for name, value in scope["headers"]:
            if name == b"origin":
                origin = value.decode("latin-1")
            elif name == b"host":
                host = value.decode("latin-1")
        return origin_allowed(origin, host or "", self.allowed)


async def refuse_handshake(error: NotifydError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a WebSocket handshake with an HTTP error, where the server can."""
    await receive()
    if "websocket.http.response" in scope.get("extensions", {}):
        await error_response(error, "connection")(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": error.close_code, "reason": error.message})


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer for every path that has no route."""
    error = NotFound(f"There is nothing at {scope['path'][:200]}")
    if scope["type"] == "websocket":
        await refuse_handshake(error, scope, receive, send)
    else:
        await error_response(error)(scope, receive, send)


def routes(hub: Hub) -> list[BaseRoute]:
    """Return the route table."""
    return [
        Route("/health", Endpoint(hub, GET=health)),
        Route("/notify", Endpoint(hub, POST=notify)),
        Route("/metrics", Endpoint(hub, GET=metrics)),
        Route("/metrics/prometheus", Endpoint(hub, GET=prometheus)),
        Route("/status", Endpoint(hub, GET=status)),
        Route("/ws", Endpoint(hub, GET=upgrade_required)),
        WebSocketRoute("/ws", Socket(hub)),
    ]
