"""The routes: plain handlers, each of which reads a request, calls the Hub and answers.

Owns HTTP: methods, sizes, content types, and the one place where an error becomes an answer. Policy is the Hub's.
"""

from __future__ import annotations

import hashlib
import logging

import orjson
from msgspec import Struct
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import Receive, Scope, Send

import figures
import schemas
from admission import Newcomer
from answers import Endpoint, Request, answer, refuse_handshake
from connection import WIRE_EXTENSION, Connection, EventStream, SendConnection
from errors import (
    InvalidRequest,
    NotifydError,
    StoreUnavailable,
    TooManyConnections,
    UnsupportedMediaType,
    UpgradeRequired,
)
from guard_auth import SUBPROTOCOL, Authenticator
from guard_identity import Identity
from hub import Hub
from schemas import TRY_AGAIN_LATER, encode, timestamp
from slices import in_slices
from store import Appended, Once

logger = logging.getLogger("notifyd.routes")

PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATUS_DETAILS, MAX_STATUS_DETAILS = 1000, 1_000_000
HISTORY_LIMIT, MAX_HISTORY_LIMIT = 100, 1000
MAX_BATCH_BYTES = 1_048_576
MAX_KEY_LENGTH = 255
# It is kept for each client.
MAX_USER_AGENT = 256


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
    return answer(await hub.history(since, limit, _topics(parameters), client_id))


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
    newcomer = _newcomer(request.scope, request.identity, request.headers.get("last-event-id"))
    stream = EventStream(request.receive)
    await hub.admit(stream, newcomer)
    return stream


async def upgrade_required(hub: Hub, request: Request) -> Response:
    raise UpgradeRequired("Expected a WebSocket handshake", {"Upgrade": "websocket", "Connection": "Upgrade"})


async def connect(hub: Hub, authenticator: Authenticator | None, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve one WebSocket: on the fast path until it is admitted or refused, else until its end."""
    extensions = scope.get("extensions") or {}
    try:
        if (wire := extensions.get(WIRE_EXTENSION)) is not None:
            await _admit_or_close(hub, authenticator, wire, scope)
            return
        await receive()  # websocket.connect
        connection = SendConnection(receive, send)
        await _admit_or_close(hub, authenticator, connection, scope)
    except TooManyConnections as refusal:
        await refuse_handshake(refusal, scope, receive, send)
        return
    await connection.serve()


async def _admit_or_close(hub: Hub, authenticator: Authenticator | None, connection: Connection, scope: Scope) -> None:
    if authenticator is not None and SUBPROTOCOL in scope.get("subprotocols", ()):
        # Also for a refusal: a browser whose subprotocols are not answered does not see it.
        connection.choose(SUBPROTOCOL)
    try:
        schemas.check_query(scope["query_string"])
        identity = None if authenticator is None else await authenticator.identify(scope)
        await hub.admit(connection, _newcomer(scope, identity))
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


def _newcomer(scope: Scope, identity: Identity | None, since: str | None = None) -> Newcomer:
    """Read a request to become a client; a position in the headers counts before the query's."""
    parameters, user_agent = QueryParams(scope["query_string"]), Headers(scope=scope).get("user-agent")
    return Newcomer(
        client_id=parameters.get("client_id", ""),
        since=since or parameters.get("since"),
        topics=_topics(parameters),
        user_agent=user_agent and user_agent[:MAX_USER_AGENT],
        identity=identity,
        address=(scope.get("client") or ("",))[0],
    )


def _topics(parameters: QueryParams) -> list[str]:
    given = parameters.get("topics")
    return given.split(",") if given else []


def _check_content_type(media_type: str) -> None:
    plain = media_type in ("", "application/json", "application/x-www-form-urlencoded")
    if not plain and not media_type.startswith("text/") and not media_type.endswith("+json"):
        raise UnsupportedMediaType(f"content-type: expected application/json, got {media_type[:64]!r}")


# --- where an error becomes an answer


class Socket:
    """The WebSocket path as an ASGI app: the border at which one connection's unexpected error stops."""

    def __init__(self, hub: Hub, authenticator: Authenticator | None) -> None:
        self.hub = hub
        self.authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await connect(self.hub, self.authenticator, scope, receive, send)
        except Exception as error:
            logger.error("Unexpected error %s", schemas.new_error_id(), exc_info=error)


def routes(hub: Hub, authenticator: Authenticator | None = None) -> list[BaseRoute]:
    """Return the route table; with an authenticator it also says what each route needs."""
    publisher = Identity.check_publisher
    return [
        *_probes(hub),
        *([] if hub.settings.internal_port else _figures(hub, authenticator)),
        Route("/notify", Endpoint(hub, authenticator, publisher, POST=notify)),
        Route("/notify/batch", Endpoint(hub, authenticator, publisher, POST=notify_batch)),
        Route("/notifications", Endpoint(hub, authenticator, Identity.check_admin, GET=notifications)),
        Route("/events", Endpoint(hub, authenticator, GET=events)),
        Route("/ws", Endpoint(hub, GET=upgrade_required)),
        WebSocketRoute("/ws", Socket(hub, authenticator)),
    ]


def internal_routes(hub: Hub, authenticator: Authenticator | None = None) -> list[BaseRoute]:
    """Return the route table of the internal port."""
    return [*_probes(hub), *_figures(hub, authenticator)]


def _probes(hub: Hub) -> list[BaseRoute]:
    return [Route("/health", Endpoint(hub, GET=health)), Route("/health/live", Endpoint(hub, starts=False, GET=live))]


def _figures(hub: Hub, authenticator: Authenticator | None) -> list[BaseRoute]:
    admin = Identity.check_admin
    return [
        Route("/metrics", Endpoint(hub, authenticator, admin, GET=metrics)),
        Route("/metrics/prometheus", Endpoint(hub, authenticator, admin, GET=prometheus)),
        Route("/status", Endpoint(hub, authenticator, admin, GET=status)),
    ]
