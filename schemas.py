"""Every message, request and answer as a Struct, and how each is encoded and decoded.

The fields of a Struct stand in their order on the wire. orjson encodes, msgspec checks. This module knows no client,
no socket and no setting. Shapes and texts: the API reference, sections "HTTP API Endpoints" and "Message Formats".
"""

from __future__ import annotations

import re
import secrets
import time
import typing
from collections.abc import Collection, Set
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
import orjson
from msgspec import UNSET, Meta, Struct, UnsetType, field
from msgspec.structs import asdict

from errors import Category, InvalidPublish, InvalidRequest
from settings import VERSION

# Close codes, RFC 6455 section 7.4.1.
NORMAL_CLOSURE, GOING_AWAY, PROTOCOL_ERROR = 1000, 1001, 1002
NO_STATUS_RECEIVED, INVALID_DATA, POLICY_VIOLATION, MESSAGE_TOO_BIG, INTERNAL_ERROR = 1005, 1007, 1008, 1009, 1011
TRY_AGAIN_LATER = 1013  # IANA's registry of close codes
# The subprotocol that browsers offer before a token, since they can set no header on a WebSocket.
SUBPROTOCOL = "bearer"
# Clients act on the protocol's own types, so a publisher may not use them.
RESERVED_TYPES = frozenset(
    (
        "welcome",
        "ping",
        "pong",
        "status_response",
        "error",
        "shutdown",
        "resume",
        "position",
        "published",
        "subscribed",
        "authenticated",
    )
)
_NOT_RESERVED = {"not": {"enum": sorted(RESERVED_TYPES)}}
MAX_TOPICS = 100  # of a client
MAX_TARGET_CLIENTS, MAX_TARGET_TOPICS, MAX_TARGET_USERS = 1000, 100, 1000  # of a notification
MAX_USER = 255  # characters
MAX_BATCH = 1000  # requests
MAX_KEY_LENGTH = MAX_REF_LENGTH = 255  # characters
# The characters of a bad name or value that its error repeats.
MAX_SHOWN = 64

_CLIENT_ID = r"^[A-Za-z0-9._:@|+/=~-]{1,128}\Z"
# Of any script. Half a surrogate pair, as JSON may have it, is no character.
_USER = rf"^[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{{0,{MAX_USER}}}\Z"
_REASON = r"^[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+\Z"
# A comma separates names in a URL, and no name has a control character. Spaces around a name do not count.
_TOPIC = r"^ *[^ ,\x00-\x1f\x7f\ud800-\udfff][^,\x00-\x1f\x7f\ud800-\udfff]*\Z"
_POSITION = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")
CLIENT_ID, USER = re.compile(_CLIENT_ID), re.compile(_USER)
# Values from outside, which are checked. `extra_json_schema` is for the contracts alone (contract.py).
ClientId = Annotated[
    str, Meta(pattern=_CLIENT_ID, examples=["alice"], extra_json_schema={"minLength": 1, "maxLength": 128})
]
User = Annotated[str, Meta(min_length=1, pattern=_USER, examples=["alice"], extra_json_schema={"maxLength": MAX_USER})]
Topic = Annotated[str, Meta(min_length=1, max_length=128, pattern=_TOPIC, examples=["builds"])]
Topics = Annotated[list[Topic], Meta(min_length=1, max_length=MAX_TOPICS)]


def _form(pattern: str, example: str) -> Meta:
    return Meta(extra_json_schema={"pattern": pattern}, examples=[example])


# Values that the server tells, with their forms for the contracts; nothing checks these.
_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_ID = "019c13b5-7a00-7c3e-9d27-6f4b1e0a8c57"
Id = Annotated[str, _form(f"^{_UUID}$", _ID)]
Before = Annotated[str, _form(f"^({_UUID.replace('a-f', 'A-Fa-f')})?$", _ID)]
# The position that the client has acknowledged.
ACKED = "acked"
Since = Annotated[str, _form(f"^({_UUID.replace('a-f', 'A-Fa-f')}|{ACKED})?$", _ID)]
ErrorId = Annotated[str, _form("^error_[0-9a-f]{8,}$", "error_7c1f04be9a25d386")]
Time = Annotated[str, _form(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$", "2026-01-31T12:00:00.000Z")]
ToldClientId = Annotated[str, _form(_CLIENT_ID, "client_5f0c9a1be2d34876")]
ToldUser = Annotated[str, _form(_USER, "alice")]
ToldTopic = Annotated[str, _form(_TOPIC, "builds")]
# The order of GET /notifications by id: oldest first, or newest first.
Order = Literal["asc", "desc"]
# Of GET /notifications/{id}/clients.
DeliveryState = Literal["written", "acknowledged", "pending"]
Cursor = Annotated[str, _form("^[A-Za-z0-9_-]+$", "Y2xpZW50XzVmMGM5YTFiZTJkMzQ4NzY")]
Version = Annotated[str, Meta(examples=[VERSION])]
UserAgent = Annotated[str, Meta(examples=["Mozilla/5.0"])]
Count = Annotated[int, Meta(extra_json_schema={"minimum": 0}, examples=[42])]
Seconds = Annotated[float, Meta(extra_json_schema={"minimum": 0}, examples=[10])]
Uptime = Annotated[float, Meta(extra_json_schema={"minimum": 0}, examples=[3600.5])]
Sender = Literal["notification_service", "system"]
# Of the request that is answered; null where it had none.
Ref = Annotated[str | None, Meta(examples=["1"])]


def stripped(topics: Collection[str]) -> list[str]:
    """Return the names of topics, or patterns of such names, without the spaces around them."""
    return [name.strip(" ") for name in topics]


# --- from publishers and clients


class NotifyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /notify."""

    message: Annotated[str, Meta(min_length=1, max_length=8192, examples=["disk full"])]
    type: Annotated[str, Meta(min_length=1, max_length=64, examples=["alert"], extra_json_schema=_NOT_RESERVED)] = (
        "custom"
    )
    data: Annotated[dict[str, Any], Meta(examples=[{"priority": "high"}])] = field(default_factory=dict)
    clients: Annotated[list[ClientId], Meta(min_length=1, max_length=MAX_TARGET_CLIENTS)] | UnsetType = UNSET
    topics: Annotated[list[Topic], Meta(min_length=1, max_length=MAX_TARGET_TOPICS)] | UnsetType = UNSET
    users: Annotated[list[User], Meta(min_length=1, max_length=MAX_TARGET_USERS)] | UnsetType = UNSET
    # The name of `type` in JSON.
    _type_field: ClassVar[str] = "type"

    def __post_init__(self) -> None:
        if self.type in RESERVED_TYPES:
            raise ValueError(f"{self._type_field}: {self.type!r} is one of the protocol's own types")
        if self.topics is not UNSET:
            self.topics = stripped(self.topics)


class OnlineRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /users/online."""

    users: Annotated[list[User], Meta(min_length=1, max_length=MAX_TARGET_USERS)]


class DisconnectRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of DELETE /clients/{client_id} and DELETE /users/{user}."""

    reason: Annotated[str, Meta(pattern=_REASON, examples=["Disconnected"])] = "Disconnected"
    # The user's tokens.
    revoke: bool = False


class TopicsRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /users/{user}/topics."""

    subscribe: Annotated[list[Topic], Meta(max_length=MAX_TOPICS, examples=[["builds"]])] = []
    unsubscribe: Annotated[list[Topic], Meta(max_length=MAX_TOPICS, examples=[["team.a"]])] = []

    def __post_init__(self) -> None:
        if not (self.subscribe or self.unsubscribe):
            raise ValueError("subscribe: expected a topic here or in unsubscribe")
        self.subscribe, self.unsubscribe = stripped(self.subscribe), stripped(self.unsubscribe)


# The body of POST /notify/batch: requests, each to be checked by itself.
NotifyRequests = Annotated[list[Any], Meta(min_length=1, max_length=MAX_BATCH)]


class ClientPing(Struct, tag_field="type", tag="ping"):
    """Ask for a pong."""


class ClientPong(Struct, tag_field="type", tag="pong"):
    """Answer a ping of the server: the client is alive."""


class StatusRequest(Struct, tag_field="type", tag="status_request"):
    """Ask how many clients there are."""


class Subscribe(Struct, tag_field="type", tag="subscribe", kw_only=True):
    """Follow topics, from now on or from a position."""

    topics: Topics
    # The position after which the topics' earlier notifications are replayed.
    since: Since | UnsetType = UNSET

    def __post_init__(self) -> None:
        self.topics = stripped(self.topics)


class Unsubscribe(Struct, tag_field="type", tag="unsubscribe", kw_only=True):
    """Follow topics no longer."""

    topics: Topics

    def __post_init__(self) -> None:
        self.topics = stripped(self.topics)


class Acknowledge(Struct, tag_field="type", tag="ack", kw_only=True):
    """Say that everything up to a notification has been dealt with."""

    id: Annotated[str, _form(f"^{_UUID.replace('a-f', 'A-Fa-f')}$", _ID)]


class Authenticate(Struct, tag_field="type", tag="auth", kw_only=True):
    """Renew the token."""

    token: Annotated[str, Meta(examples=["TOKEN"])]


class Publish(NotifyRequest, tag_field="type", tag="publish", forbid_unknown_fields=True, kw_only=True):
    """Publish a notification, as POST /notify does."""

    # Of the notification: `type` is the message's own.
    type: Annotated[str, Meta(min_length=1, max_length=64, examples=["alert"], extra_json_schema=_NOT_RESERVED)] = (
        field(default="custom", name="notification_type")
    )
    # An Idempotency-Key.
    key: Annotated[str, Meta(min_length=1, max_length=MAX_KEY_LENGTH, examples=["order-18"])] | UnsetType = UNSET
    # The answer has it again.
    ref: Annotated[str, Meta(max_length=MAX_REF_LENGTH, examples=["1"])] | UnsetType = UNSET
    _type_field: ClassVar[str] = "notification_type"


# Fields that a Struct does not have are ignored, so that a newer client may say more. Not by `publish`, as by POST.
ClientMessage = ClientPing | ClientPong | StatusRequest | Subscribe | Unsubscribe | Acknowledge | Authenticate | Publish
CLIENT_TYPES = frozenset(each.__struct_config__.tag for each in typing.get_args(ClientMessage))


# --- to clients


class Welcome(Struct, kw_only=True):
    """The first message to a client."""

    type: Literal["welcome"] = "welcome"
    message: Literal["Connected to WebSocket Notification Server"] = "Connected to WebSocket Notification Server"
    client_id: ToldClientId
    server_time: Time
    notification_interval: Seconds
    user: ToldUser | UnsetType = UNSET


class Notification(Struct, kw_only=True):
    """A custom, test or system notification. The store gives the id."""

    id: Id = ""
    type: Annotated[str, Meta(examples=["custom"], extra_json_schema=_NOT_RESERVED)]
    timestamp: Time
    data: Annotated[
        dict[str, Any],
        Meta(
            examples=[{"message": "disk full"}],
            extra_json_schema={"properties": {"message": {"type": "string"}}, "required": ["message"]},
        ),
    ]
    topics: list[ToldTopic] | UnsetType = UNSET
    sender: Sender = "notification_service"


def compose(type: str, data: Any, sender: Sender = "notification_service") -> bytes:
    """Return the JSON of this server's own notification behind its id, which the store gives."""
    return b"," + encode({"type": type, "timestamp": timestamp(), "data": data, "sender": sender})[1:]


class TestData(Struct, kw_only=True):
    message: Annotated[str, Meta(examples=["Test notification #42"])]
    counter: Count
    uptime_seconds: Uptime
    active_connections: Count
    server_time: Time


class SystemData(Struct, kw_only=True):
    message: Literal["Server is shutting down. Please reconnect later."] = (
        "Server is shutting down. Please reconnect later."
    )
    priority: Literal["high"] = "high"
    system_time: Time


class Ping(Struct, kw_only=True):
    """Asks whether the client is alive."""

    type: Literal["ping"] = "ping"
    timestamp: Time


class Pong(Struct, kw_only=True):
    """The answer to a client's ping."""

    type: Literal["pong"] = "pong"
    timestamp: Time


class StatusData(Struct, kw_only=True):
    active_connections: Count
    total_connections: Count
    server_time: Time


class StatusMessage(Struct, kw_only=True):
    """The answer to a status request."""

    type: Literal["status_response"] = "status_response"
    data: StatusData
    timestamp: Time


class ResumeData(Struct, kw_only=True):
    position: Id
    replayed: Count
    complete: bool


class Resume(Struct, kw_only=True):
    """Comes before the replay."""

    type: Literal["resume"] = "resume"
    timestamp: Time
    data: ResumeData


class Position(Struct, kw_only=True):
    """From here a silent client resumes."""

    type: Literal["position"] = "position"
    position: Id
    timestamp: Time


class Subscribed(Struct, kw_only=True):
    """All topics of the client now."""

    type: Literal["subscribed"] = "subscribed"
    topics: list[ToldTopic]
    timestamp: Time


class Authenticated(Struct, kw_only=True):
    """The token is renewed."""

    type: Literal["authenticated"] = "authenticated"
    expires_at: Time | None
    timestamp: Time


class Published(Struct, kw_only=True):
    """The notification is in the log."""

    type: Literal["published"] = "published"
    id: Id
    recipients: Count
    ref: Ref
    timestamp: Time


class ErrorMessage(Struct, kw_only=True):
    """The message before changed nothing."""

    type: Literal["error"] = "error"
    error_id: ErrorId
    message: Annotated[str, Meta(examples=["Unknown message type: hello"])]
    # As of a close for this reason.
    code: Annotated[int, Meta(extra_json_schema={"enum": [1001, 1008, 1009, 1011, 1013]}, examples=[1008])] = 1008
    # In the answer to a `publish`.
    ref: Ref | UnsetType = UNSET
    timestamp: Time


class ShutdownMessage(Struct, kw_only=True):
    """The server drains: leave, and come back later."""

    type: Literal["shutdown"] = "shutdown"
    message: Literal["Server is shutting down"] = "Server is shutting down"
    timestamp: Time


class Closed(Struct, kw_only=True):
    """The end of a stream."""

    code: Annotated[int, Meta(examples=[GOING_AWAY])]
    reason: Annotated[str, Meta(examples=["Server shutting down"])]


# --- answers over HTTP


class Index(Struct, kw_only=True):
    """The answer of GET / to programs: by name, the path of each route."""

    name: Literal["notifyd"] = "notifyd"
    version: Version = VERSION
    links: Annotated[dict[str, str], Meta(examples=[{"notify": "/notify"}])]


class HealthConnections(Struct, kw_only=True):
    active: Count
    total: Count
    max_allowed: Count


class ServerInfo(Struct, kw_only=True):
    version: Version = VERSION
    workers: Count
    notification_interval: Seconds


class Health(Struct, kw_only=True):
    status: Literal["healthy", "unhealthy", "shutting_down"]
    message: Annotated[str, Meta(examples=["WebSocket Notification Server is running"])]
    timestamp: Time
    connections: HealthConnections
    server_info: ServerInfo


class Live(Struct, kw_only=True):
    status: Literal["alive"] = "alive"
    timestamp: Time


class NotifyResponse(Struct, kw_only=True):
    status: Literal["success"] = "success"
    message: Literal["Notification sent successfully"] = "Notification sent successfully"
    recipients: Count
    # The request as it was understood.
    notification: orjson.Fragment
    timestamp: Time
    # For a publisher that has waited.
    delivery: Delivery | UnsetType = UNSET


class Delivery(Struct, kw_only=True):
    """How many clients a notification was addressed to, and has reached."""

    # Connected when it was published; null for one of an earlier version.
    addressed: Count | None
    written: Count
    acknowledged: Count
    pending: Count


class DeliveredNotification(Notification, kw_only=True):
    """The answer of GET /notifications/{id}: the notification as it was sent."""

    delivery: Delivery


class DeliveryClient(Struct, kw_only=True):
    client_id: ToldClientId
    user: ToldUser | None


class DeliveryClients(Struct, kw_only=True):
    """The answer of GET /notifications/{id}/clients."""

    clients: list[DeliveryClient]
    next: Cursor | None
    timestamp: Time


class BatchReceipt(Struct, kw_only=True):
    id: Id
    recipients: Count


class BatchResponse(Struct, kw_only=True):
    status: Literal["success"] = "success"
    message: Literal["Notifications sent successfully"] = "Notifications sent successfully"
    count: Count
    notifications: list[BatchReceipt]
    timestamp: Time


class History(Struct, kw_only=True):
    """The answer of GET /notifications; the notifications stand in it as they were sent."""

    notifications: list[orjson.Fragment]
    position: Id
    complete: bool


class MetricsConnections(Struct, kw_only=True):
    active_connections: Count
    total_connections: Count
    messages_sent: Count
    uptime_seconds: Uptime


class MetricsService(Struct, kw_only=True):
    is_running: bool
    notification_interval: Seconds
    start_time: Time


class MetricsServer(Struct, kw_only=True):
    version: Version = VERSION
    workers: Count
    max_connections: Count
    debug_mode: bool


class Metrics(Struct, kw_only=True):
    connections: MetricsConnections
    notification_service: MetricsService
    server: MetricsServer
    timestamp: Time


class StatusServer(Struct, kw_only=True):
    status: Literal["running", "shutting_down"]
    version: Version = VERSION
    uptime_seconds: Uptime
    start_time: Time
    current_time: Time


class ClientDetails(Struct, kw_only=True):
    client_id: ToldClientId
    connected_at: Time
    last_ping: Time
    user_agent: UserAgent | None


class StatusConnections(Struct, kw_only=True):
    active: Count
    total: Count
    max_allowed: Count
    details: list[ClientDetails]


class StatusService(Struct, kw_only=True):
    is_running: bool
    notifications_sent: Count
    notification_interval: Seconds


class StatusShutdown(Struct, kw_only=True):
    shutdown_requested: bool
    shutdown_timeout: Seconds


class StatusConfiguration(Struct, kw_only=True):
    host: Annotated[str, Meta(examples=["127.0.0.1"])]
    port: Annotated[int, Meta(examples=[8000])]
    workers: Count
    debug: bool
    log_level: Annotated[str, Meta(examples=["INFO"])]


class Status(Struct, kw_only=True):
    server: StatusServer
    connections: StatusConnections
    notification_service: StatusService
    shutdown: StatusShutdown
    configuration: StatusConfiguration


class ConnectedClient(Struct, kw_only=True):
    """The answer of GET /clients/{client_id}."""

    client_id: ToldClientId
    user: ToldUser | None
    topics: list[ToldTopic]
    connected_at: Time
    last_ping: Time
    user_agent: UserAgent | None
    address: Annotated[str | None, Meta(examples=["203.0.113.7"])]
    transport: Literal["websocket", "sse"]


class ConnectedClients(Struct, kw_only=True):
    """The answer of GET /clients."""

    clients: list[ConnectedClient]
    total: Count
    next: Cursor | None
    timestamp: Time


class ConnectedUser(Struct, kw_only=True):
    """The answer of GET /users/{user}."""

    user: ToldUser
    online: bool
    clients: Count
    timestamp: Time


class Online(Struct, kw_only=True):
    """The answer of POST /users/online: by user, the number of clients."""

    online: Annotated[dict[str, Count], Meta(examples=[{"alice": 2}])]
    timestamp: Time


class Disconnected(Struct, kw_only=True):
    """The answer of DELETE /clients/{client_id} and DELETE /users/{user}."""

    status: Literal["success"] = "success"
    disconnected: Count
    timestamp: Time


class TopicsChanged(Struct, kw_only=True):
    """The answer of POST /users/{user}/topics."""

    status: Literal["success"] = "success"
    clients: Count
    timestamp: Time


class FollowedTopic(Struct, kw_only=True):
    topic: ToldTopic
    clients: Count


class FollowedTopics(Struct, kw_only=True):
    """The answer of GET /topics."""

    topics: list[FollowedTopic]
    next: Cursor | None
    timestamp: Time


class ErrorBody(Struct, kw_only=True):
    id: ErrorId
    message: Annotated[str, Meta(examples=["message: expected string, got integer"])]
    category: Category
    timestamp: Time


class ErrorResponse(Struct, kw_only=True):
    error: ErrorBody


# --- time and ids


def timestamp(seconds: float | None = None) -> str:
    """Return UTC as YYYY-MM-DDTHH:MM:SS.mmmZ, of `seconds` since the epoch or of now."""
    return _timestamp(time.time_ns() // 1_000_000 if seconds is None else round(seconds * 1_000_000) // 1000)


# Under load many messages have one timestamp, and making one takes 2 us (bench/run.py --measure publish).
@lru_cache(maxsize=8)
def _timestamp(milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03}Z"


def new_client_id() -> str:
    return f"client_{secrets.token_hex(8)}"


def new_error_id() -> str:
    return f"error_{secrets.token_hex(8)}"


# --- encode


def encode(message: Any) -> bytes:
    """Return a Struct, or plain values, as JSON. Raises InvalidRequest where its data has no JSON form."""
    try:
        return orjson.dumps(message, default=_given)
    except orjson.JSONEncodeError as error:
        raise _without_form(error) from None


def _without_form(error: orjson.JSONEncodeError) -> InvalidRequest:
    text = str(error)
    if "ecursion" in text:
        text = "nested deeper than 254 levels"
    elif "64-bit" in text:
        text = "integer out of the 64-bit range"
    return InvalidRequest(f"data: {text}")


def to_plain(value: Any) -> Any:
    """Return Structs as plain values."""
    return msgspec.to_builtins(value)


def _given(value: Any) -> dict[str, Any]:
    """Return the fields of a Struct without those that are unset. Raises TypeError for anything else."""
    fields = asdict(value)
    for name in _optional(type(value)):  # type: ignore[arg-type]
        if fields[name] is UNSET:
            del fields[name]
    return fields


@lru_cache
def _optional(kind: type[Struct]) -> list[str]:
    """Return the names of the fields that may be unset."""
    return [field.name for field in msgspec.structs.fields(kind) if field.default is UNSET]


# What follows is made for every publish. To fill in a form takes a fifth of the time of encoding a Struct (bench/run.py
# --measure publish).
_NOTIFY_RESPONSE = encode(NotifyResponse(recipients=0, notification=orjson.Fragment(b"%b"), timestamp="%b"))
_NOTIFY_RESPONSE = _NOTIFY_RESPONSE.replace(b'"recipients":0', b'"recipients":%d')


class Spelled(NamedTuple):
    """Fields of a request as JSON, which its notification and its answer have in common."""

    message: bytes
    type: bytes
    data: bytes


def spelled(request: NotifyRequest) -> Spelled:
    """Return fields of a request as JSON. Raises InvalidRequest where its data has no JSON form."""
    dumps = orjson.dumps
    try:
        # As deep as in a notification: there are levels that orjson does not write.
        return Spelled(dumps(request.message), _spelled_type(request.type), dumps([request.data])[1:-1])
    except orjson.JSONEncodeError as error:
        raise _without_form(error) from None


# Many notifications in a row have the same.
@lru_cache(maxsize=16)
def _spelled_type(type: str) -> bytes:
    return encode(type)


def notification(request: NotifyRequest, spelled: Spelled, topics: list[str]) -> bytes:
    """Return the notification of a request behind its id, which the store gives."""
    message, type, data = spelled
    if "message" in request.data:
        data = encode({name: value for name, value in request.data.items() if name != "message"})
    rest = b"}" if data == b"{}" else b"," + data[1:]
    named = b',"topics":' + encode(topics) if topics else b""
    form = b',"type":%b,"timestamp":"%b","data":{"message":%b%b%b,"sender":"notification_service"}'
    return form % (type, timestamp().encode(), message, rest, named)


def understood(request: NotifyRequest, spelled: Spelled) -> bytes:
    """Return a request as JSON, with its defaults."""
    named = b""
    if not (request.clients is request.topics is request.users is UNSET):
        for name in ("clients", "topics", "users"):
            if (names := getattr(request, name)) is not UNSET:
                named += b',"%b":%b' % (name.encode(), encode(names))
    return b'{"message":%b,"type":%b,"data":%b%b}' % (*spelled, named)


def notify_response(recipients: int, understood: bytes, at: str) -> bytes:
    """Return a NotifyResponse as JSON; `understood` is that of its notification."""
    return _NOTIFY_RESPONSE % (recipients, understood, at.encode())


_PUBLISHED = encode(Published(id="%b", recipients=0, ref=None, timestamp="%b"))
_PUBLISHED = _PUBLISHED.replace(b'"recipients":0,"ref":null', b'"recipients":%d,"ref":%b')


def published(id: str, recipients: int, ref: str | None, at: str) -> bytes:
    """Return a Published as JSON."""
    return _PUBLISHED % (id.encode(), recipients, orjson.dumps(ref), at.encode())


def error_message(message: str, ref: str | UnsetType | None = UNSET, code: int = POLICY_VIOLATION) -> ErrorMessage:
    """Return an error for a client; with the `ref` of its `publish`, where it answers one."""
    return ErrorMessage(error_id=new_error_id(), message=message, code=code, ref=ref, timestamp=timestamp())


def error_body(message: str, category: Category, error_id: str | None = None) -> ErrorResponse:
    """Return the documented body of an HTTP error."""
    body = ErrorBody(id=error_id or new_error_id(), message=message, category=category, timestamp=timestamp())
    return ErrorResponse(error=body)


# --- decode and check

_ZEROS = bytes(ord("0") if chr(byte) in "123456789" else byte for byte in range(256))
_STRING_OR_LONG_NUMBER = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[-+.0-9Ee]{19,}+')


def decode(body: bytes, kind: Any) -> Any:
    """Read JSON into a Struct. Raises InvalidRequest; its message names the field and the limit."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"Invalid JSON: {error}") from None
    decoded = check(value, kind)
    _check_integers(body)
    return decoded


def read_at_once(body: bytes) -> NotifyRequest | None:
    """Read a NotifyRequest in a third of the time of decode(); None where that has to say why not.

    What msgspec reads has the same value for orjson (tests/test_schemas.py), but for integers out of 64 bits, which
    are refused when they are encoded.
    """
    try:
        return _REQUESTS.decode(body)
    except _UNREAD:
        return None


_REQUESTS, _PUBLISHES = msgspec.json.Decoder(NotifyRequest), msgspec.json.Decoder(Publish)
_PUBLISH_BEGINS = '{"type":"publish"'
_UNREAD = (msgspec.MsgspecError, ValueError, RecursionError)


def _check_integers(body: bytes) -> None:
    """Refuse integers out of 64 bits: orjson reads them as floats. Only `data` can hold any number."""
    # 19 digits in a row are rare. Looking for them costs 0.3 us in 200 bytes.
    if b"0" * 19 not in body.translate(_ZEROS):
        return
    for token in _STRING_OR_LONG_NUMBER.findall(body):
        if token.lstrip(b"-").isdigit() and not (len(token) <= 20 and -(2**63) <= int(token) < 2**64):
            raise InvalidRequest(f"data: integer out of the 64-bit range: {token[:MAX_SHOWN].decode()}")


def check(value: Any, kind: Any, place: str = "") -> Any:
    """Make plain values into a Struct. Raises InvalidRequest as decode() does; the message begins with `place`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(explain(error, place)) from None


def read_message(message: str | bytes, types: Set[str]) -> ClientMessage:
    """Read a client's message; only these types are known. Raises InvalidRequest with the documented texts."""
    if message[: len(_PUBLISH_BEGINS)] == _PUBLISH_BEGINS:
        try:
            # As read_at_once() does.
            return _PUBLISHES.decode(message)
        except _UNREAD:
            pass
    try:
        value = orjson.loads(message)
    except orjson.JSONDecodeError:
        raise InvalidRequest("Invalid JSON format") from None
    if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str):
        raise InvalidRequest("Invalid message format")
    if kind not in types:
        raise InvalidRequest(f"Unknown message type: {kind[:MAX_SHOWN]}")
    if kind != "publish":
        return check(value, ClientMessage)  # type: ignore[no-any-return]
    try:
        publish: Publish = check(value, Publish)
        _check_integers(message.encode() if isinstance(message, str) else message)
    except InvalidRequest as error:
        ref = value.get("ref")
        has_ref = isinstance(ref, str) and len(ref) <= MAX_REF_LENGTH
        raise InvalidPublish(error.message, ref if has_ref else None) from None
    return publish


# --- URL parameters


def topics_of(names: Collection[str], granted: Collection[str] = ()) -> frozenset[str]:
    """Return the names in `?topics=a,b`, checked, with those that a client has without. Raises InvalidRequest."""
    if not names:
        return frozenset(granted)
    try:
        topics = frozenset(stripped(check(list(names), Topics, "topics"))).union(granted)
        check_topic_count(topics)
        return topics
    except InvalidRequest as error:
        raise InvalidRequest(f"Invalid topics: {error.message}") from None


def check_topic_count(topics: Collection[str]) -> None:
    """Raise InvalidRequest for more topics than a client may have."""
    if len(topics) > MAX_TOPICS:
        raise InvalidRequest(f"topics: at most {MAX_TOPICS} a client, and this would make {len(topics)}")


def position_of(parameter: str, name: str = "since") -> str:
    """Read an id; empty is now. Raises InvalidRequest unless it has the form of one."""
    if parameter and not is_position(parameter.lower()):
        raise InvalidRequest(f"Invalid {name}")
    return parameter.lower()


def since_of(parameter: str) -> str:
    """Read `?since=ID`, or ACKED. Raises InvalidRequest."""
    return parameter if parameter == ACKED else position_of(parameter)


def is_position(text: str) -> bool:
    """Return whether it has the form of an id, in small letters."""
    return _POSITION.match(text) is not None


# --- msgspec's errors in the words of JSON

_JSON_NAMES = {"`str`": "string", "`int`": "integer", "`float`": "number", "`bool`": "boolean"}
_RULES = {
    _CLIENT_ID: "1 to 128 of letters, digits and ._:@|+/=~-",
    _USER: f"1 to {MAX_USER} characters without control characters",
    _REASON: "a text without control characters",
    _TOPIC: "1 to 128 characters without comma and control characters, and not spaces alone",
}


def explain(error: msgspec.ValidationError, place: str = "") -> str:
    """Turn msgspec's "Expected `str`, got `int` - at `$.message`" into "message: expected string, got integer"."""
    text, _, path = str(error).partition(" - at ")
    path = place + path.strip("`").removeprefix("$")
    for name, json_name in _JSON_NAMES.items():
        text = text.replace(name, json_name)
    if missing := re.search(r"missing required field `(.+)`", text):
        path, text = f"{path}.{missing[1]}", "required, but missing"
    elif unknown := re.search(r"contains unknown field `(.+)`", text, re.DOTALL):
        path, text = f"{path}.{unknown[1][:MAX_SHOWN]}", "unknown field"
    elif own := re.match(r"(\w+): (.+)", text, re.DOTALL):
        # From a Struct's __post_init__, which knows the field.
        path, text = f"{path}.{own[1]}", own[2]
    for pattern, rule in _RULES.items():
        text = text.replace(f"string matching regex {pattern!r}", rule)
    text = text.replace("`", "")
    return f"{path.removeprefix('.') or 'request'}: {text[0].lower()}{text[1:]}"
