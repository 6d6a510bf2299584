"""The routes: a Router maps plain handlers onto one Hub.

A handler decodes its request, calls one method of the Hub and encodes the answer. Handlers raise errors; answers.py
answers them. The table names the right that opens a path; the Hub then checks the notification or the newcomer with
the sender's identity.
"""

from __future__ import annotations

import codecs
import encodings.aliases
import hashlib
import json
import pkgutil
import re
from collections.abc import Set
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from msgspec import Struct
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

import figures
import schemas
from admission import Newcomer
from answers import Endpoint, Handler, ReceiveError, Socket, answer, refuse_handshake, stream_of
from connection import (
    REPLACED_ID,
    SUBSCRIBER,
    WIRE_EXTENSION,
    EventStream,
    SendConnection,
    WebSocket,
    WebSocketCarrier,
)
from errors import (
    InvalidRequest,
    NotifydError,
    ShuttingDown,
    StoreUnavailable,
    TooLarge,
    TooManyConnections,
    UnsupportedMediaType,
    UpgradeRequired,
)
from guard_identity import Identity, Right
from hub import Hub, HubState
from query import PARAMETERS, QUERY_KEY, Query
from schemas import MAX_SHOWN, SUBPROTOCOL, TRY_AGAIN_LATER, encode, timestamp
from slices import in_slices
from store import Appended, Once

if TYPE_CHECKING:
    from guard_auth import Authenticator


def route_table(hub: Hub, authenticator: Authenticator | None = None) -> list[BaseRoute]:
    """Return the routes of the public port, the most frequent first. Without an authenticator all are open."""
    publisher, admin = Identity.check_publisher, Identity.check_admin
    return [
        _route("/notify", hub, authenticator, publisher, POST=notify),
        _route("/notify/batch", hub, authenticator, publisher, POST=notify_batch),
        WebSocketRoute("/ws", Socket(hub, authenticator, PARAMETERS["/ws"], connect)),
        Route("/ws", Endpoint(hub, GET=upgrade_required)),
        _route("/events", hub, authenticator, GET=events),
        _route("/notifications", hub, authenticator, admin, GET=notifications),
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
    ]


def _probes(hub: Hub) -> list[BaseRoute]:
    return [_route("/health", hub, GET=health), _route("/health/live", hub, GET=live)]


def _route(
    path: str, hub: Hub, authenticator: Authenticator | None = None, right: Right | None = None, **handlers: Handler
) -> Route:
    return Route(path, Endpoint(hub, authenticator, right, PARAMETERS.get(path), **handlers))


PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATUS_DETAILS, MAX_STATUS_DETAILS = 1000, 1_000_000
HISTORY_LIMIT, MAX_HISTORY_LIMIT = 100, 1000
MAX_BATCH_BYTES = 1_048_576
# Its request may be a repeat, so it is read also during the drain.
KEY_HEADER, MAX_KEY_LENGTH = "idempotency-key", 255
JSON_TYPE, FORM_TYPE, TEXT_TYPE = "application/json", "application/x-www-form-urlencoded", "text/plain"
UTF_8 = "utf-8"
# Kept for each client.
MAX_USER_AGENT = 256


# --- publishing


async def notify(hub: Hub, request: Request, sender: Identity | None) -> Response:
    body = await _body_of(hub, request, hub.settings.max_message_size)
    content = _content_of(request, body)
    once = _once(request, content, body) if KEY_HEADER in request.headers else None
    wanted = _text_in(content) if content.media_type == TEXT_TYPE else _json_in(content, schemas.NotifyRequest)
    # Encoded before it is published: data without a JSON form is refused.
    understood = orjson.Fragment(encode(wanted))
    address = request.client.host if request.client else ""
    appended = await hub.publish([wanted], once, sender, address=address)
    recipients, at = appended.receipts[0].recipients, timestamp(appended.at)
    return _published(schemas.NotifyResponse(recipients=recipients, notification=understood, timestamp=at), appended)


async def notify_batch(hub: Hub, request: Request, sender: Identity | None) -> Response:
    body = await _body_of(hub, request, MAX_BATCH_BYTES)
    content = _content_of(request, body)
    once = _once(request, content, body) if KEY_HEADER in request.headers else None
    wanted = []
    async for place, value in in_slices(_json_in(content, schemas.NotifyRequests)):
        wanted.append(schemas.check(value, schemas.NotifyRequest, f"[{place}]"))
    address = request.client.host if request.client else ""
    appended = await hub.publish(wanted, once, sender, address=address, numbered=True)
    receipts = [schemas.BatchReceipt(id=receipt.id, recipients=receipt.recipients) for receipt in appended.receipts]
    count, at = len(receipts), timestamp(appended.at)
    return _published(schemas.BatchResponse(count=count, notifications=receipts, timestamp=at), appended)


async def _body_of(hub: Hub, request: Request, limit: int) -> bytes:
    """Return the whole body of a publisher's request. Raises ShuttingDown while the Hub drains, unless it has a key.

    Raises TooLarge as soon as that is known: by Content-Length before reading any of it.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    try:
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise _too_large(limit)
    except (ClientDisconnect, TooLarge):
        raise
    except Exception as error:
        raise ReceiveError(error) from error
    if hub.state is HubState.DRAINING and KEY_HEADER not in request.headers:
        raise ShuttingDown
    return b"".join(parts)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"request body: larger than the limit of {limit} bytes")


class _Content(NamedTuple):
    """A body in UTF-8, and its declared form: the media type, empty where none is named, and Python's charset."""

    text: bytes
    media_type: str
    charset: str


def _content_of(request: Request, body: bytes) -> _Content:
    """Read a body as it is declared. Raises UnsupportedMediaType, or InvalidRequest for bytes of another charset."""
    for coding in ",".join(request.headers.getlist("content-encoding")).split(","):
        if coding.strip().lower() not in ("", "identity"):
            # RFC 9110, section 15.5.16.
            text = f"content-encoding: expected identity, got {coding.strip()[:MAX_SHOWN]!r}"
            raise UnsupportedMediaType(text, {"Accept-Encoding": "identity"})
    if len(types := set(request.headers.getlist("content-type"))) > 1:
        raise InvalidRequest("content-type: expected one header, got several")
    media_type, _, parameters = "".join(types).partition(";")
    media_type = media_type.strip().lower()
    known = media_type in ("", JSON_TYPE, FORM_TYPE) or media_type.startswith("text/") or media_type.endswith("+json")
    if not known or "," in media_type:
        text = f"content-type: expected {JSON_TYPE} or {TEXT_TYPE}, got {media_type[:MAX_SHOWN]!r}"
        raise UnsupportedMediaType(text)
    charset = _charset_in(parameters) if parameters else UTF_8
    in_utf_8 = body if charset == UTF_8 else _in_utf_8(body, charset)
    return _Content(in_utf_8.removeprefix(codecs.BOM_UTF8), media_type, charset)


_CHARSET = re.compile(r"(?:^|;)\s*charset\s*=\s*[\"']?([^\s\"';]+)", re.IGNORECASE)
# The codecs that are no charset: between bytes and bytes, or for Python's own use.
_NO_CHARSETS = {
    *("base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "rot_13", "uu_codec", "zlib_codec"),
    *("aliases", "charmap", "idna", "mbcs", "oem", "punycode", "raw_unicode_escape", "undefined", "unicode_escape"),
}
# Python remembers every unknown name that it is asked for, so it is asked for these alone.
_CHARSETS = {
    name
    for name in (*encodings.aliases.aliases, *(module.name for module in pkgutil.iter_modules(encodings.__path__)))
    if encodings.aliases.aliases.get(name, name) not in _NO_CHARSETS
}


def _charset_in(parameters: str) -> str:
    """Return Python's name of the charset in the parameters of a content type.

    Raises UnsupportedMediaType, or InvalidRequest for several.
    """
    if not (found := set(map(str.lower, _CHARSET.findall(parameters)))):
        return UTF_8
    if len(found) > 1:
        raise InvalidRequest("content-type: expected one charset, got several")
    [given] = found
    name = encodings.normalize_encoding(given)
    try:
        if name in _CHARSETS:
            return codecs.lookup(name).name
    except LookupError:
        # A charset of another platform.
        pass
    raise UnsupportedMediaType(f"content-type: unknown charset {given[:MAX_SHOWN]!r}")


def _in_utf_8(body: bytes, charset: str) -> bytes:
    if body.startswith(codecs.BOM_UTF8) and not charset.startswith(UTF_8):
        raise InvalidRequest(f"request body: not {charset}, but UTF-8 by its byte order mark")
    try:
        return body.decode(charset).encode()
    except UnicodeError:
        raise InvalidRequest(f"request body: not valid {charset}") from None


def _text_in(content: _Content) -> schemas.NotifyRequest:
    try:
        text = content.text.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("message: not valid UTF-8") from None
    if _is_json_of_requests(text):
        raise InvalidRequest(f"content-type: the text is a notification in JSON; send it as {JSON_TYPE}")
    plain: schemas.NotifyRequest = schemas.check({"message": text}, schemas.NotifyRequest)
    return plain


# A field with a value that can be text or a list, in JSON, in JSON within a string, and in the notations of programs.
# Without quotes a name stands right at the beginning of a field.
_NEARLY_JSON = re.compile(r"\s*[\"']?\s*(?:\[\s*)?\{")
_FIELD = re.compile(r"(?:[{,]\s*|[\"'“”])(?:message|clients|topics|users)\\?[\"'“”]?\s*:\s*\\?[\"'“”\[]")


def _is_json_of_requests(text: str) -> bool:
    """Whether a text is a notification in JSON, or several, maybe with a slip: as a message it would go to everyone.

    A browser's fetch() labels every string as text. Python's reader refuses less than orjson.
    """
    if not _NEARLY_JSON.match(text):
        return False
    try:
        value = json.loads(text, parse_int=float)
    except RecursionError:
        return True
    except ValueError:
        return _FIELD.search(text) is not None
    return any(map(_is_request, value if isinstance(value, list) else [value]))


def _is_request(value: Any) -> bool:
    """Whether plain values are meant for POST /notify: other JSON is a text like any, also with a number of clients."""
    if isinstance(value, str):
        return _is_json_of_requests(value)
    return isinstance(value, dict) and (
        "message" in value or any(isinstance(value.get(name), list | str) for name in ("clients", "topics", "users"))
    )


def _json_in(content: _Content, kind: Any) -> Any:
    try:
        return schemas.decode(content.text, kind)
    except InvalidRequest as error:
        if content.media_type != FORM_TYPE or not error.message.startswith("Invalid JSON"):
            raise
        advice = f"a form is not read; send JSON as {JSON_TYPE}, or to /notify a message as {TEXT_TYPE}"
        raise InvalidRequest(f"{error.message} ({advice})") from None


def _once(request: Request, content: _Content, body: bytes) -> Once:
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


def _published(response: Struct, appended: Appended) -> Response:
    """Return the answer to a publisher, the same for each repetition of its request."""
    headers = {"Notification-Id": appended.receipts[-1].id}
    if appended.repeated:
        headers["Idempotent-Replayed"] = "true"
    return answer(response, headers=headers)


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
    if SUBPROTOCOL in (scope.get("subprotocols") or ()):
        # Also for a refusal, and without authentication: a browser fails where no subprotocol of its offer is chosen.
        connection.choose(SUBPROTOCOL)
    try:
        query = Query(scope["query_string"], known)
        identity = None if authenticator is None else await authenticator.identify(scope)
        await hub.admit(connection, _newcomer(hub, scope, query, query.since(), identity))
    except TooManyConnections:
        raise
    except StoreUnavailable:
        # The reason is for the operator, on /health.
        connection.close(TRY_AGAIN_LATER, "Try again later")
    except NotifydError as refusal:
        connection.close(refusal.close_code, refusal.message)


async def upgrade_required(hub: Hub, request: Request, sender: Identity | None) -> Response:
    raise UpgradeRequired("Expected a WebSocket handshake", {"Upgrade": "websocket", "Connection": "Upgrade"})


async def events(hub: Hub, request: Request, sender: Identity | None) -> ASGIApp:
    """Admit a stream; the stream is the response."""
    last_id = request.headers.get("last-event-id")
    if last_id == REPLACED_ID:
        return Response(status_code=204)
    query: Query = request.scope[QUERY_KEY]
    newcomer = _newcomer(hub, request.scope, query, query.since(last_id), sender)
    if request.method == "HEAD":
        newcomer.checked()
        return stream_of(b"")
    stream = EventStream()
    await hub.admit(stream, newcomer)
    return stream


def _newcomer(hub: Hub, scope: Scope, query: Query, since: str | None, identity: Identity | None) -> Newcomer:
    """Read a request to become a client."""
    user_agent = Headers(scope=scope).get("user-agent")
    return Newcomer(
        client_id=query.get("client_id") or "",
        user=query.get("user") or "",
        since=since,
        topics=query.topics() if "topics" in query else (),
        user_agent=user_agent and user_agent[:MAX_USER_AGENT],
        identity=identity,
        address=scope.get(SUBSCRIBER, "") if hub.settings.max_connections_per_ip else "",
        peer=(scope.get("client") or ("",))[0],
    )


# --- reading


async def notifications(hub: Hub, request: Request, sender: Identity | None) -> Response:
    query: Query = request.scope[QUERY_KEY]
    limit = query.whole_number("limit", HISTORY_LIMIT, least=1, most=MAX_HISTORY_LIMIT)
    user = query.get("user") or ""
    return answer(await hub.history(query.since(), limit, query.topics(), query.get("client_id") or None, user))


async def metrics(hub: Hub, request: Request, sender: Identity | None) -> Response:
    return answer(await figures.metrics(hub))


async def prometheus(hub: Hub, request: Request, sender: Identity | None) -> Response:
    return Response(await figures.prometheus(hub), media_type=PROMETHEUS_TYPE)


async def status(hub: Hub, request: Request, sender: Identity | None) -> Response:
    query: Query = request.scope[QUERY_KEY]
    limit = query.whole_number("limit", STATUS_DETAILS, least=0, most=MAX_STATUS_DETAILS)
    return answer(await figures.status(hub, limit))


async def health(hub: Hub, request: Request, sender: Identity | None) -> Response:
    body = await figures.health(hub)
    return answer(body, 200 if body.status == "healthy" else 503)


async def live(hub: Hub, request: Request, sender: Identity | None) -> Response:
    return answer(schemas.Live(timestamp=timestamp()))
