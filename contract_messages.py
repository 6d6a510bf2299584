"""The contract of the WebSocket and of the streams, in AsyncAPI 3.0.

Made of the Structs of the messages, the parameters of query.py and the table of closes. Owns the answers to each
message. AsyncAPI has no word for closes, so they stand in the extension `x-closes` of each channel. Imported only when
the contract is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from msgspec import Struct, structs
from starlette.routing import BaseRoute, Route, WebSocketRoute

import schemas
from answers import Endpoint, Socket
from clients import MESSAGE_BURST, MESSAGES_PER_SECOND
from contract import INFO, SECURITY_SCHEMES, STREAM_TYPE, Schema, Schemas, query_parameters
from contract_closes import CLOSES
from publishers import WINDOW_REQUESTS
from schemas import RESERVED_TYPES
from settings import Settings
from streams import NAMED_EVENTS

DESCRIPTION = (
    "Each message is one JSON object in a text frame; clients may send binary frames as well. A client ignores types "
    "and fields that it does not know. A page offers the subprotocols `bearer` and its token."
)
# By message of a client: the messages that answer it, if not `error`.
REPLIES: dict[Any, tuple[Any, ...]] = {
    schemas.ClientPing: (schemas.Pong,),
    schemas.ClientPong: (),
    schemas.StatusRequest: (schemas.StatusMessage,),
    schemas.Subscribe: (schemas.Subscribed, schemas.Resume),
    schemas.Unsubscribe: (schemas.Subscribed,),
    schemas.Acknowledge: (),
    schemas.Authenticate: (schemas.Authenticated, schemas.Subscribed),
    schemas.Publish: (schemas.Published,),
}
# The notifications of publishers, and by their types the server's own: data and sender.
NOTIFICATIONS: dict[str, tuple[Any, str]] = {
    "notification": (None, "notification_service"),
    "test_notification": (schemas.TestData, "notification_service"),
    "system": (schemas.SystemData, "system"),
}


def asyncapi(settings: Settings, routes: Sequence[BaseRoute]) -> Schema:
    """Return the contract of an app's WebSocket and streams. The caller adds `servers`."""
    found = Schemas()
    sent = {name: _notification(name, found) for name in NOTIFICATIONS}
    sent |= {type_of(struct): found.of(struct) for struct in server_messages()}
    received = {_received(struct): found.of(struct) for struct in REPLIES}
    closed = {"closed": found.of(schemas.Closed)}
    channels: dict[str, Schema] = {}
    operations: dict[str, Schema] = {}
    for route in routes:
        if isinstance(route, WebSocketRoute) and isinstance(route.app, Socket):
            parameters = dict(query_parameters(found, route.app.kinds, route.app.parameters))
            query = {"type": "object", "properties": parameters}
            bindings = {"ws": {"method": "GET", "query": query, "bindingVersion": "0.1.0"}}
            channels["ws"] = _channel(route.path, bindings, [*sent, *received])
            channels["ws"]["description"] = (
                f"A message has {settings.max_message_size} bytes at most, in both directions. A client may send "
                f"{MESSAGE_BURST:.0f} messages at once, and {MESSAGES_PER_SECOND:.0f} a second, apart from those that "
                f"publish: of these {WINDOW_REQUESTS} may be without an answer."
            )
            operations["send"] = _operation(route.app, "send", "ws", sent, "Send notifications, and answers.")
            for struct, replies in REPLIES.items():
                operation = _operation(route.app, "receive", "ws", [_received(struct)], str(struct.__doc__))
                if replies:
                    answers = _messages("ws", [*map(type_of, replies), "error"])
                    operation["reply"] = {"channel": {"$ref": "#/channels/ws"}, "messages": answers}
                operations[type_of(struct)] = operation
        elif isinstance(route, Route) and route.path == "/events" and isinstance(route.app, Endpoint):
            streamed = [*NOTIFICATIONS, *(name.decode() for name in NAMED_EVENTS), *closed]
            channels["events"] = _channel(route.path, {"http": {"bindingVersion": "0.3.0"}}, streamed)
            channels["events"]["description"] = f"The data of {STREAM_TYPE}: see GET /events in /openapi.json."
            operations["stream"] = _operation(route.app, "send", "events", streamed, "Send notifications as events.")
    return {
        "asyncapi": "3.0.0",
        "info": {**INFO, "license": {"name": "MIT"}, "description": DESCRIPTION},
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {
            "messages": {name: _message(name, of, found) for name, of in (sent | received | closed).items()},
            "schemas": found.named,
            "securitySchemes": {name: _scheme(scheme) for name, scheme in SECURITY_SCHEMES.items()},
        },
    }


# --- messages


def server_messages() -> list[Any]:
    """Return the Structs of the protocol's own messages to clients."""
    kinds = [kind for kind in vars(schemas).values() if isinstance(kind, type) and issubclass(kind, Struct)]
    return [kind for kind in kinds if kind not in REPLIES and type_of(kind) in RESERVED_TYPES]


def type_of(struct: Any) -> str:
    """Return the `type` of a message, empty where it may be any."""
    if (tag := struct.__struct_config__.tag) is not None:
        return str(tag)
    return next((str(field.default) for field in structs.fields(struct) if field.name == "type"), "")


def _received(struct: Any) -> str:
    """Return the name of a client's message: `ping` and `pong` go both ways."""
    return f"client_{type_of(struct)}"


def _notification(name: str, found: Schemas) -> Schema:
    data, sender = NOTIFICATIONS[name]
    own: Schema = {"sender": {"const": sender}}
    if data is not None:
        own |= {"type": {"const": name}, "data": found.of(data)}
    return {"allOf": [found.of(schemas.Notification), {"type": "object", "properties": own}]}


def _message(name: str, schema: Schema, found: Schemas) -> Schema:
    message: Schema = {"name": name, "payload": schema, "examples": [{"payload": found.example(schema)}]}
    if "$ref" in schema:
        message["summary"] = found.named[schema["$ref"].rpartition("/")[2]].get("description", name)
    return message


# --- channels


def _channel(path: str, bindings: Schema, names: Iterable[str]) -> Schema:
    closes = [
        {
            "code": close.code,
            "reasons": close.reasons,
            "description": close.when,
            "comingBackHelps": close.coming_back_helps,
            "final": close.is_final,
        }
        for close in CLOSES
    ]
    messages = {name: {"$ref": f"#/components/messages/{name}"} for name in names}
    return {"address": path, "messages": messages, "bindings": bindings, "x-closes": closes}


def _messages(channel: str, names: Iterable[str]) -> list[Schema]:
    return [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in names]


def _operation(app: Endpoint | Socket, action: str, channel: str, names: Iterable[str], summary: str) -> Schema:
    operation: Schema = {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "summary": summary,
        "messages": _messages(channel, names),
    }
    if app.authenticator is not None and not app.authenticator.lets_strangers_listen:
        operation["security"] = [{"$ref": f"#/components/securitySchemes/{name}"} for name in SECURITY_SCHEMES]
    return operation


def _scheme(scheme: Schema) -> Schema:
    """Return a security scheme of OpenAPI as AsyncAPI has it."""
    return scheme | {"type": "httpApiKey"} if scheme["type"] == "apiKey" else scheme
