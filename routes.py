"""The routes: plain handlers, each of which reads a request, calls the Hub and answers.

Owns HTTP: methods, sizes, content types, and the one place where an error becomes an answer. Policy is the Hub's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence

import orjson
from msgspec import Struct
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import figures
import schemas
from auth import SUBPROTOCOL, Door
from connection import PROBE_EXTENSION, WIRE_EXTENSION, Connection, SendConnection
from errors import (
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    NotifydError,
    StoreUnavailable,
    TooLarge,
    TooManyConnections,
    UnsupportedMediaType,
    UpgradeRequired,
)
from events import EventStream
from guard import Origins
from hub import Hub
from identity import Identity
from keys import Appended, Once
from schemas import TRY_AGAIN_LATER, encode, timestamp
from turns import in_slices

logger = logging.getLogger("notifyd.routes")

PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATUS_DETAILS, MAX_STATUS_DETAILS = 1000, 1_000_000
HISTORY_LIMIT, MAX_HISTORY_LIMIT = 100, 1000
MAX_BATCH_BYTES = 1_048_576
MAX_KEY_LENGTH = 255
# It is kept for each client.
MAX_USER_AGENT = 256
# When to try again where the limit is reached or the server drains.
RETRY_AFTER_SECONDS = 5
# How long a browser need not ask again what a page may do.
PREFLIGHT_SECONDS = 600
# The headers of ours that a page from elsewhere may read.
EXPOSED = b"Notification-Id, Idempotent-Replayed, Retry-After"


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


# --- handlers


async def health(hub: Hub, request: Request) -> Response:
    body = await figures.health(hub)
    return answer(body, 200 if body.status == "healthy" else 503)


async def live(hub: Hub, request: Request) -> Response:
    return answer(schemas.Live(timestamp=timestamp()))


async def notify(hub: Hub, request: Request) -> Response:
    body = await request.body(hub.settings.max_message_size)
    hub.check_ready()
    wanted = _read_notification(request, body)
    request.check_publish([wanted])
    # What could not be written back must be refused before it is sent.
    understood = orjson.Fragment(encode(wanted))
    appended = await hub.publish([wanted], _once(request, body))
    response = schemas.NotifyResponse(
        recipients=appended.receipts[0].recipients, notification=understood, timestamp=timestamp(appended.at)
    )
    return _published(response, appended)


async def notify_batch(hub: Hub, request: Request) -> Response:
    body = await request.body(MAX_BATCH_BYTES)
    hub.check_ready()
    _check_content_type(request.media_type())
    wanted = []
    async for place, value in in_slices(schemas.decode(body, schemas.NotifyRequests)):
        wanted.append(schemas.check(value, schemas.NotifyRequest, f"[{place}]"))
    request.check_publish(wanted)
    appended = await hub.publish(wanted, _once(request, body), numbered=True)
    receipts = [schemas.BatchReceipt(id=one.id, recipients=one.recipients) for one in appended.receipts]
    response = schemas.BatchResponse(count=len(receipts), notifications=receipts, timestamp=timestamp(appended.at))
    return _published(response, appended)


async def notifications(hub: Hub, request: Request) -> Response:
    parameters = request.parameters()
    limit = _whole_number(parameters, "limit", HISTORY_LIMIT, least=1, most=MAX_HISTORY_LIMIT)
    since, client_id = parameters.get("since"), parameters.get("client_id") or None
    return answer(await hub.history(since, limit, parameters.get("topics", ""), client_id))


async def metrics(hub: Hub, request: Request) -> Response:
    return answer(await figures.metrics(hub))


async def prometheus(hub: Hub, request: Request) -> Response:
    return Response(await figures.prometheus(hub), media_type=PROMETHEUS_TYPE)


async def status(hub: Hub, request: Request) -> Response:
    limit = _whole_number(request.parameters(), "limit", STATUS_DETAILS, least=0, most=MAX_STATUS_DETAILS)
    return answer(await figures.status(hub, limit))


async def events(hub: Hub, request: Request) -> EventStream | Response:
    """Admit a stream; it is then the response."""
    if request.scope["method"] == "HEAD":
        return Response(media_type="text/event-stream")
    parameters = request.parameters()
    since = request.headers.get("last-event-id") or parameters.get("since")
    stream = EventStream(request.receive)
    await hub.admit(
        stream,
        parameters.get("client_id"),
        _user_agent(request.headers),
        since,
        parameters.get("topics", ""),
        request.identity,
        _address(request.scope),
    )
    return stream


async def upgrade_required(hub: Hub, request: Request) -> Response:
    raise UpgradeRequired("Expected a WebSocket handshake", {"Upgrade": "websocket", "Connection": "Upgrade"})


async def connect(hub: Hub, door: Door | None, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one WebSocket: on the fast path until it is admitted or refused, else until its end."""
    extensions = scope.get("extensions") or {}
    try:
        if (wire := extensions.get(WIRE_EXTENSION)) is not None:
            await _admit_or_close(hub, door, wire, scope)
            return
        await receive()  # websocket.connect
        connection = SendConnection(receive, send, extensions.get(PROBE_EXTENSION))
        await _admit_or_close(hub, door, connection, scope)
    except TooManyConnections as refusal:
        await refuse_handshake(refusal, scope, receive, send)
        return
    await connection.serve()


async def _admit_or_close(hub: Hub, door: Door | None, connection: Connection, scope: Scope) -> None:
    if door is not None and SUBPROTOCOL in scope.get("subprotocols", ()):
        # Also for a refusal: a browser whose subprotocols are not answered does not see it.
        connection.choose(SUBPROTOCOL)
    try:
        schemas.check_query(scope["query_string"])
        parameters = QueryParams(scope["query_string"])
        identity = None if door is None else await door.identify(scope)
        await hub.admit(
            connection,
            parameters.get("client_id"),
            _user_agent(Headers(scope=scope)),
            parameters.get("since"),
            parameters.get("topics", ""),
            identity,
            _address(scope),
        )
    except TooManyConnections:
        raise
    except StoreUnavailable:
        # What is wrong inside is for the operator, on /health.
        connection.close(TRY_AGAIN_LATER, "Try again later")
    except NotifydError as refusal:
        connection.close(refusal.close_code, refusal.message)


# --- what handlers share


def _once(request: Request, body: bytes) -> Once | None:
    """Return the request's Idempotency-Key with what it stands for, if it has one. Raises InvalidRequest."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    if len(keys) > 1:
        raise InvalidRequest("Idempotency-Key: expected one, got several")
    [key] = keys
    if not 1 <= len(key) <= MAX_KEY_LENGTH:
        raise InvalidRequest(f"Idempotency-Key: expected 1 to {MAX_KEY_LENGTH} characters, got {len(key)}")
    stated = (request.scope["path"].encode(), request.media_type().encode(), body)
    return Once(key, hashlib.sha256(b"\0".join(stated)).digest())


def _published(response: Struct, appended: Appended) -> Response:
    """Return the answer to a publisher, the same for each repetition of its request."""
    headers = {"Notification-Id": appended.receipts[-1].id}
    if appended.repeated:
        headers["Idempotent-Replayed"] = "true"
    return answer(response, headers=headers)


def _read_notification(request: Request, body: bytes) -> schemas.NotifyRequest:
    media_type = request.media_type()
    _check_content_type(media_type)
    if media_type != "text/plain":
        wanted: schemas.NotifyRequest = schemas.decode(body, schemas.NotifyRequest)
        return wanted
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("message: not valid UTF-8") from None
    plain: schemas.NotifyRequest = schemas.check({"message": text}, schemas.NotifyRequest)
    return plain


def _whole_number(parameters: QueryParams, name: str, default: int, *, least: int, most: int) -> int:
    given = parameters.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and len(given) <= 9 and least <= int(given) <= most):
        raise InvalidRequest(f"{name}: expected a whole number from {least} to {most}, got {given[:64]!r}")
    return int(given)


def _user_agent(headers: Headers) -> str | None:
    given = headers.get("user-agent")
    return given and given[:MAX_USER_AGENT]


def _address(scope: Scope) -> str:
    return (scope.get("client") or ("",))[0]


def _check_content_type(media_type: str) -> None:
    plain = media_type in ("", "application/json", "application/x-www-form-urlencoded")
    if not plain and not media_type.startswith("text/") and not media_type.endswith("+json"):
        raise UnsupportedMediaType(f"content-type: expected application/json, got {media_type[:64]!r}")


# --- where an error becomes an answer


class Endpoint:
    """One path as an ASGI app: its methods, and the documented body for whatever goes wrong."""

    def __init__(self, hub: Hub, door: Door | None = None, check: Check | None = None, **handlers: Handler) -> None:
        """With a door it wants to know who asks, and whether they pass the check."""
        self.hub = hub
        self.door = door
        self.check = check
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
        identity = None if self.door is None else await self.door.identify(scope)
        if identity is not None and self.check is not None:
            self.check(identity)
        if handler is not live:
            # Which tells of the process alone, whatever the Hub and its store are up to.
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


class Socket:
    """The WebSocket path as an ASGI app: the border at which one connection's unexpected error stops."""

    def __init__(self, hub: Hub, door: Door | None) -> None:
        self.hub = hub
        self.door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await connect(self.hub, self.door, scope, receive, send)
        except Exception as error:
            logger.error("Unexpected error %s", schemas.new_error_id(), exc_info=error)


class OriginGuard:
    """Refuses, before anything else, what comes from a page of a foreign origin; one that is allowed may read answers.

    Also errors, and with the methods of each path: Starlette's CORSMiddleware stands before the routes and knows none.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self.app = app
        self.origins = Origins(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            page = self.origins.admit(scope["headers"])
        except NotifydError as error:
            await refuse(error, scope, receive, send)
            return
        if scope["type"] == "http" and self.origins.allowed:
            send = readable(send, page)
        await self.app(scope, receive, send)


def readable(send: Send, page: bytes | None) -> Send:
    """Return a `send` whose response a page of this origin may read, if there is one."""
    # Also without a page: a cache must not give one's answer to another.
    headers = [(b"vary", b"Origin")]
    if page:
        headers += [(b"access-control-allow-origin", page), (b"access-control-expose-headers", EXPOSED)]

    async def send_readable(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return send_readable


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


def routes(hub: Hub, door: Door | None = None) -> list[BaseRoute]:
    """Return the route table; with a door it also says what each route needs."""
    publisher = Identity.check_publisher
    return [
        *_probes(hub),
        *([] if hub.settings.internal_port else _figures(hub, door)),
        Route("/notify", Endpoint(hub, door, publisher, POST=notify)),
        Route("/notify/batch", Endpoint(hub, door, publisher, POST=notify_batch)),
        Route("/notifications", Endpoint(hub, door, Identity.check_admin, GET=notifications)),
        Route("/events", Endpoint(hub, door, GET=events)),
        Route("/ws", Endpoint(hub, GET=upgrade_required)),
        WebSocketRoute("/ws", Socket(hub, door)),
    ]


def internal_routes(hub: Hub, door: Door | None = None) -> list[BaseRoute]:
    """Return the route table of the internal port."""
    return [*_probes(hub), *_figures(hub, door)]


def _probes(hub: Hub) -> list[BaseRoute]:
    return [Route("/health", Endpoint(hub, GET=health)), Route("/health/live", Endpoint(hub, GET=live))]


def _figures(hub: Hub, door: Door | None) -> list[BaseRoute]:
    admin = Identity.check_admin
    return [
        Route("/metrics", Endpoint(hub, door, admin, GET=metrics)),
        Route("/metrics/prometheus", Endpoint(hub, door, admin, GET=prometheus)),
        Route("/status", Endpoint(hub, door, admin, GET=status)),
    ]
