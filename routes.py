"""The routes: a Router maps plain handlers onto one Hub.

A handler decodes its request, calls one method of the Hub and encodes the answer. Handlers raise errors; answers.py
answers them. The table names the right that opens a path; the Hub then checks the notification or the newcomer with
the sender's identity.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from asyncio import FIRST_COMPLETED, create_task, ensure_future, wait
from collections.abc import Set
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

import figures
import ndjson
import schemas
from admission import Newcomer
from answers import Answer, Endpoint, Handler, SegmentRoute, Socket, answer, refuse_handshake, stream_of
from bodies import MAX_BATCH_BYTES, TEXT_TYPE, UTF_8, Content, body_of, content_of, json_in, text_in
from connection import REPEAT_EXTENSION, SUBSCRIBER, WIRE_EXTENSION, SendConnection, WebSocket, WebSocketCarrier
from errors import (
    InvalidRequest,
    NotifydError,
    ShuttingDown,
    StoreUnavailable,
    TooManyConnections,
    UnsupportedMediaType,
    UpgradeRequired,
)
from guard_identity import Identity, Right
from hub import Hub, HubState
from people import people_route_table
from query import HISTORY_LIMIT, PAGE_LIMIT, PARAMETERS, QUERY_KEY, STATUS_LIMIT, Query, cursor, segment
from schemas import MAX_KEY_LENGTH, SUBPROTOCOL, TRY_AGAIN_LATER, DeliveryState, Order, encode, timestamp
from slices import in_slices
from store import Appended, Once
from streams import PUT_OUT_ID, REPLACED_ID, EventStream, StreamCarrier

if TYPE_CHECKING:
    from guard_auth import Authenticator


def route_table(hub: Hub, authenticator: Authenticator | None = None) -> list[BaseRoute]:
    """Return the routes of the public port, the most frequent first. Without an authenticator all are open."""
    publisher, admin, reader = Identity.check_publisher, Identity.check_admin, Identity.check_admin_or_publisher
    return [
        _route("/notify", hub, authenticator, publisher, POST=notify),
        _route("/notify/batch", hub, authenticator, publisher, POST=notify_batch),
        WebSocketRoute("/ws", Socket(hub, authenticator, PARAMETERS["/ws"], connect)),
        Route("/ws", Endpoint(hub, GET=upgrade_required)),
        _route("/events", hub, authenticator, GET=events),
        _route("/notifications", hub, authenticator, admin, GET=notifications),
        _route("/notifications/{id}", hub, authenticator, reader, GET=notification),
        _route("/notifications/{id}/clients", hub, authenticator, reader, GET=delivery_clients),
        *(_probes(hub) if hub.settings.internal_port else internal_route_table(hub, authenticator)),
    ]


def internal_route_table(hub: Hub, authenticator: Authenticator | None = None) -> list[BaseRoute]:
    """Return the routes of the internal port; without such a port they are part of the public table."""
    admin = Identity.check_admin
    return [
        *_probes(hub),
        _route("/metrics", hub, authenticator, admin, GET=metrics),
        _route("/metrics/prometheus", hub, authenticator, admin, GET=prometheus),
        _route("/status", hub, authenticator, admin, GET=status),
        *people_route_table(hub, authenticator),
    ]


def _probes(hub: Hub) -> list[BaseRoute]:
    return [_route("/health", hub, GET=health), _route("/health/live", hub, GET=live)]


def _route(
    path: str, hub: Hub, authenticator: Authenticator | None = None, right: Right | None = None, **handlers: Handler
) -> Route:
    kind = SegmentRoute if "{" in path else Route
    return kind(path, Endpoint(hub, authenticator, right, PARAMETERS.get(path), **handlers))


PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Its request may be a repeat, so it is read also during the drain.
KEY_HEADER = "idempotency-key"
# The credentials of a request that repeats are read again after so long: a key may be gone from --jwks-url.
TRUSTED_SECONDS = 60.0
# The seconds that a publisher may wait for the delivery.
MAX_WAIT_SECONDS = 60
# In Prefer: a preference with its parameters, and the value of `wait` as a token or as a quoted string.
_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*+"?)++')
_WHOLE_NUMBER = re.compile(r'"?([0-9]{1,9})"?')
# Kept for each client.
MAX_USER_AGENT = 256


# --- publishing


async def notify(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.NotifyResponse]:
    """Publish a notification."""
    body = await _body_of(hub, request, hub.settings.max_message_size)
    content = content_of(request, body)
    once = _once(request, content, body) if KEY_HEADER in request.headers else None
    wanted = text_in(content) if content.media_type == TEXT_TYPE else json_in(content, schemas.NotifyRequest)
    # Encoded before it is published: data without a JSON form is refused.
    understood = schemas.understood(wanted, schemas.spelled(wanted))
    address = (request.scope.get("client") or ("",))[0]
    appended = await hub.publish([wanted], once, sender, address=address)
    repeat = (request.scope.get("extensions") or {}).get(REPEAT_EXTENSION)
    is_lasting = sender is None or sender.is_lasting
    is_plain = once is None and is_lasting and content.media_type != TEXT_TYPE and content.charset == UTF_8
    if (preferred := request.headers.getlist("prefer")) and (seconds := _wait_in(preferred)) is not None:
        return await _published_and_known(hub, request, understood, appended, seconds)
    if repeat is not None and is_plain and hub.publishes_at_once:
        repeat(partial(_notify_again, hub, sender, time.time() + TRUSTED_SECONDS))
    recipients, at = appended.receipts[0].recipients, timestamp(appended.at)
    return _published(schemas.notify_response(recipients, understood, at), appended)


def _wait_in(preferred: list[str]) -> int | None:
    """Return the seconds that a publisher would wait (RFC 7240, section 4.3); None where it does not say that."""
    for preference in _PREFERENCE.findall(",".join(preferred)):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            # The first one counts, and one that cannot be understood counts as none.
            number = _WHOLE_NUMBER.fullmatch(value.strip())
            return None if number is None else min(int(number[1]), MAX_WAIT_SECONDS)
    return None


async def _published_and_known(
    hub: Hub, request: Request, understood: bytes, appended: Appended, seconds: int
) -> Answer[schemas.NotifyResponse]:
    """Answer a publisher once no client is behind its notification, or the time is over; or once it has left."""
    receipt = appended.receipts[0]
    waiting, left = create_task(hub.deliveries.settled(receipt.id, seconds)), ensure_future(request.receive())
    try:
        await wait((waiting, left), return_when=FIRST_COMPLETED)
        delivery = waiting.result() if waiting.done() else None
    finally:
        waiting.cancel()
        left.cancel()
    response = schemas.notify_response(receipt.recipients, understood, timestamp(appended.at))
    answered = _published(response if delivery is None else _with_delivery(response, delivery), appended)
    if delivery is not None:
        answered.raw_headers.append((b"preference-applied", b"wait=%d" % seconds))
    return answered


def _with_delivery(body: bytes, delivery: schemas.Delivery) -> bytes:
    """Return a JSON object with the delivery as its last field."""
    return b'%b,"delivery":%b}' % (body[:-1], encode(delivery))


# The headers of _published() as they are sent, and the body.
_ANSWER = b"notification-id: %b\r\ncontent-length: %d\r\ncontent-type: application/json\r\n\r\n%b\n"


def _notify_again(hub: Hub, sender: Identity | None, until: float, body: bytes) -> bytes | None:
    """Answer a request with the head of one before, all at once; None where notify() has to, with nothing done.

    The sender is known by that head, up to `until`.
    """
    if len(body) > hub.settings.max_message_size or (sender is not None and not hub.trusts(sender, until)):
        return None
    try:
        if (wanted := schemas.read_at_once(body)) is None:
            return None
        if sender is not None:
            sender.check_publish((wanted,))
        spelled = schemas.spelled(wanted)
        if (receipt := hub.publish_at_once(wanted, spelled)) is None:
            return None
    except NotifydError:
        return None
    id, recipients = receipt
    response = schemas.notify_response(recipients, schemas.understood(wanted, spelled), timestamp())
    return _ANSWER % (id.encode(), len(response) + 1, response)


async def notify_batch(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.BatchResponse]:
    """Publish many notifications: all of them, or none; those in lines each by itself, as they arrive."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == ndjson.MEDIA_TYPE:
        return await _lines(hub, request, sender)  # type: ignore[return-value]
    body = await _body_of(hub, request, MAX_BATCH_BYTES)
    content = content_of(request, body)
    once = _once(request, content, body) if KEY_HEADER in request.headers else None
    wanted = []
    async for place, value in in_slices(json_in(content, schemas.NotifyRequests)):
        wanted.append(schemas.check(value, schemas.NotifyRequest, f"[{place}]"))
    address = (request.scope.get("client") or ("",))[0]
    appended = await hub.publish(wanted, once, sender, address=address, numbered=True)
    receipts = [schemas.BatchReceipt(id=receipt.id, recipients=receipt.recipients) for receipt in appended.receipts]
    count, at = len(receipts), timestamp(appended.at)
    return _published(encode(schemas.BatchResponse(count=count, notifications=receipts, timestamp=at)), appended)


async def _lines(hub: Hub, request: Request, sender: Identity | None) -> ndjson.Lines:
    """Return the answer to lines, which reads them. Raises ShuttingDown."""
    if content_of(request, b"", [ndjson.MEDIA_TYPE]).charset != UTF_8:
        raise UnsupportedMediaType("content-type: lines are UTF-8")
    if KEY_HEADER in request.headers:
        raise InvalidRequest("Idempotency-Key: not for lines, which are published one by one")
    await hub.start()
    if not hub.is_ready:
        raise ShuttingDown
    return ndjson.Lines(hub, sender, (request.scope.get("client") or ("",))[0])


async def _body_of(hub: Hub, request: Request, limit: int) -> bytes:
    """Return the whole body of a publisher's request. Raises ShuttingDown while the Hub drains, unless it has a key."""
    body = await body_of(request, limit)
    if hub.state is HubState.DRAINING and KEY_HEADER not in request.headers:
        raise ShuttingDown
    return body


def _once(request: Request, content: Content, body: bytes) -> Once:
    """Return the Idempotency-Key with a digest of its request. Raises InvalidRequest."""
    keys = request.headers.getlist(KEY_HEADER)
    if len(keys) > 1:
        raise InvalidRequest("Idempotency-Key: expected one, got several")
    [key] = keys
    if not 1 <= len(key) <= MAX_KEY_LENGTH:
        raise InvalidRequest(f"Idempotency-Key: expected 1 to {MAX_KEY_LENGTH} characters, got {len(key)}")
    # The same bytes in another charset are another text.
    form = content.media_type if content.charset == UTF_8 else f"{content.media_type};{content.charset}"
    stated = (request.scope["path"].encode(), form.encode(), body)
    return Once(key, hashlib.sha256(b"\0".join(stated)).digest())


def _published(response: bytes, appended: Appended) -> Answer[Any]:
    """Return the answer to a publisher, the same for each repetition of its request."""
    # Starlette would take 3 us to make the headers.
    answered: Answer[Any] = Answer()
    answered.body = response + b"\n"
    answered.raw_headers = [
        (b"notification-id", appended.receipts[-1].id.encode()),
        (b"content-length", b"%d" % len(answered.body)),
        (b"content-type", b"application/json"),
    ]
    if appended.repeated:
        answered.raw_headers.append((b"idempotent-replayed", b"true"))
    return answered


# --- receiving


async def connect(
    hub: Hub, authenticator: Authenticator | None, known: Set[str], scope: Scope, receive: Receive, send: Send
) -> None:
    """Serve a WebSocket: on the fast wire until it is admitted or refused, elsewhere until its end."""
    wire: WebSocket | None = (scope.get("extensions") or {}).get(WIRE_EXTENSION)
    if wire is None:
        await receive()  # websocket.connect
    connection = wire or SendConnection(WebSocketCarrier())
    try:
        await _admit_or_close(hub, authenticator, known, connection, scope)
    except TooManyConnections as refusal:
        await refuse_handshake(refusal, scope, receive, send)
        return
    if isinstance(connection, SendConnection):
        await connection.serve(receive, send)


async def _admit_or_close(
    hub: Hub, authenticator: Authenticator | None, known: Set[str], connection: WebSocket, scope: Scope
) -> None:
    if hub.settings.compression != "off":
        connection.compress()
    if SUBPROTOCOL in (scope.get("subprotocols") or ()):
        # Also for a refusal, and without authentication: a browser fails where no subprotocol of its offer is chosen.
        connection.choose(SUBPROTOCOL)
    try:
        query = Query(scope["query_string"], known)
        identity = None if authenticator is None else await authenticator.identify(scope)
        await hub.admit(connection, _newcomer(hub, scope, query, query.since(), identity))
    except NotifydError as refusal:
        hub.counts.refuse(refusal)
        if isinstance(refusal, TooManyConnections):
            raise
        if isinstance(refusal, StoreUnavailable):
            # The reason is for the operator, on /health.
            connection.close(TRY_AGAIN_LATER, "Try again later")
            return
        connection.close(refusal.close_code, refusal.message)


async def upgrade_required(hub: Hub, request: Request, sender: Identity | None) -> Response:
    """Refuse a request without a WebSocket handshake."""
    raise UpgradeRequired("Expected a WebSocket handshake", {"Upgrade": "websocket", "Connection": "Upgrade"})


async def events(hub: Hub, request: Request, sender: Identity | None) -> ASGIApp:
    """Follow notifications as Server-Sent Events; the stream is the response."""
    last_id = request.headers.get("last-event-id")
    if last_id in (REPLACED_ID, PUT_OUT_ID):
        return Response(status_code=204)
    query: Query = request.scope[QUERY_KEY]
    newcomer = _newcomer(hub, request.scope, query, query.since(last_id), sender)
    carrier = _carrier(hub, request)
    if request.method == "HEAD":
        newcomer.checked()
        return stream_of(b"", carrier.headers)
    stream = EventStream(carrier)
    await hub.admit(stream, newcomer)
    return stream


def _carrier(hub: Hub, request: Request) -> StreamCarrier:
    if hub.settings.compression != "off":
        from deflate import GzipCarrier, takes_gzip  # noqa: PLC0415 - for an option

        if takes_gzip(",".join(request.headers.getlist("accept-encoding"))):
            return GzipCarrier()
    return StreamCarrier()


def _newcomer(hub: Hub, scope: Scope, query: Query, since: str | None, identity: Identity | None) -> Newcomer:
    """Read a request to become a client."""
    user_agent = Headers(scope=scope).get("user-agent")
    return Newcomer(
        client_id=query.get("client_id") or "",
        user=query.get("user") or "",
        since=since,
        topics=query.topics() if "topics" in query else (),
        # Interned, as the address of a proxy is: among thousands of clients there are a few programs.
        user_agent=user_agent and sys.intern(user_agent[:MAX_USER_AGENT]),
        identity=identity,
        address=scope.get(SUBSCRIBER, "") if hub.settings.max_connections_per_ip else "",
        peer=sys.intern(str((scope.get("client") or ("",))[0] or "")),
    )


# --- reading


async def notifications(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.History]:
    """Return the history: the notifications that a client with these parameters would be replayed."""
    query: Query = request.scope[QUERY_KEY]
    limit, order = query.limit(HISTORY_LIMIT), query.one_of("order", Order, "asc")
    client_id, user, before = query.get("client_id") or None, query.get("user") or "", query.get("before")
    is_descending = order == "desc"
    found = await hub.history(query.since(), limit, query.topics(), client_id, user, before, newest_first=is_descending)
    return answer(found)


async def notification(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.DeliveredNotification]:
    """Return a notification as it was sent, and how many clients have it."""
    sent, delivery = await hub.deliveries.notification(segment(request.path_params["id"], "id"), sender)
    return Answer(_with_delivery(sent, delivery) + b"\n", media_type="application/json")


async def delivery_clients(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.DeliveryClients]:
    """Return the clients that have a notification, have acknowledged it or are still behind it, page by page."""
    query: Query = request.scope[QUERY_KEY]
    state, limit, after = query.one_of("state", DeliveryState, "written"), query.limit(PAGE_LIMIT), query.after()
    id = segment(request.path_params["id"], "id")
    page, next = await hub.deliveries.clients(id, state, after, limit, sender)
    goes_on = None if next is None else cursor(next)
    return answer(schemas.DeliveryClients(clients=page, next=goes_on, timestamp=timestamp()))


async def metrics(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.Metrics]:
    """Return the counters of all processes."""
    return answer(await figures.metrics(hub))


async def prometheus(hub: Hub, request: Request, sender: Identity | None) -> Response:
    """Return the counters of all processes, and more, in Prometheus' text format."""
    return Response(await figures.prometheus(hub), media_type=PROMETHEUS_TYPE)


async def status(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.Status]:
    """Return the state of the server, with a list of its clients."""
    query: Query = request.scope[QUERY_KEY]
    limit = query.limit(STATUS_LIMIT)
    return answer(await figures.status(hub, limit))


async def health(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.Health]:
    """Tell whether the server takes notifications and clients."""
    body = await figures.health(hub)
    return answer(body, 200 if body.status == "healthy" else 503)


async def live(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.Live]:
    """Tell whether the process can answer at all."""
    return answer(schemas.Live(timestamp=timestamp()))
