"""The contract of the HTTP routes, in OpenAPI 3.1; and the schemas of all contracts.

Made of the tables that the code itself uses: the routes with their handlers, rights and parameters, the annotations of
the handlers, the Structs of schemas.py, and the tree of errors. Owns the rest: the Structs of request bodies, headers,
links. Knows an app's routes and settings, but no request. Imported only when a contract is asked for.

1. A field that always comes is required, and a value that never changes is a const.
2. Patterns are those of ECMA-262, with and without its flag u.
3. Only the operations that need credentials on this server have `security`.
"""

from __future__ import annotations

import functools
import operator
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from http import HTTPStatus
from typing import Annotated, Any, NamedTuple

import msgspec
import orjson
from msgspec import UNSET, Meta
from starlette.routing import BaseRoute, Route

import errors
import schemas
from answers import RETRY_AFTER_SECONDS, Answer, Endpoint, Handler
from assets import CONSOLE, files_at, media_type_of
from bodies import JSON_TYPE, MAX_BATCH_BYTES, TEXT_TYPE
from errors import NotifydError
from guard import EXEMPT
from guard_identity import Identity, Right
from ndjson import MEDIA_TYPE as LINES_TYPE
from query import Limit
from routes import MAX_WAIT_SECONDS, PROMETHEUS_TYPE
from schemas import MAX_KEY_LENGTH, Before, Id, NotifyRequest, Since
from settings import VERSION, Settings
from streams import PUT_OUT_ID, REPLACED_ID

Schema = dict[str, Any]

STREAM_TYPE = "text/event-stream"
INFO = {"title": "notifyd", "version": VERSION, "license": {"name": "MIT", "identifier": "MIT"}}
DESCRIPTION = (
    "A WebSocket notification server: POST /notify, and every connected client knows at once. HEAD works where GET "
    "does; OPTIONS answers 204 with Allow. Every parameter that is not listed is refused by name."
)
SECURITY_SCHEMES: dict[str, Schema] = {
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "SECRET or NAME:SECRET of a key"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "a JSON Web Token, or a key"},
    "basic": {"type": "http", "scheme": "basic", "description": "NAME and SECRET of a key"},
    "token": {
        "type": "apiKey",
        "in": "query",
        "name": "token",
        "description": "a token or a key, for EventSource, which can set no header",
    },
}
RIGHTS: dict[Right, str] = {
    Identity.check_publisher: "publish",
    Identity.check_admin: "admin",
    Identity.check_admin_or_publisher: "publish",
}


class Note(NamedTuple):
    """Facts about an operation that no table of the code has."""

    body: Any = None
    # Whether the body may be missing.
    is_optional: bool = False
    # Whether a text is the body, too.
    is_text: bool = False
    # Whether an Idempotency-Key counts.
    has_key: bool = False
    # Whether the publisher may wait for the delivery.
    may_wait: bool = False
    # Beside those that every operation may have.
    errors: tuple[type[NotifydError], ...] = ()
    # Whether it is refused while the store is away or the server drains.
    needs_store: bool = True
    # By name, links from the answer: the operation, its parameter, and the place in the answer.
    links: Mapping[str, tuple[str, str, str]] = {}


_BATCH = Annotated[list[NotifyRequest], Meta(min_length=1, max_length=schemas.MAX_BATCH)]
# One topic at least, in either list.
_CHANGE = Annotated[
    schemas.TopicsRequest,
    Meta(
        extra_json_schema={
            "anyOf": [
                {"required": [name], "properties": {name: {"minItems": 1}}} for name in ("subscribe", "unsubscribe")
            ]
        }
    ),
]
# No tokens to revoke: a client has none, and some servers know none.
_DISCONNECT = Annotated[schemas.DisconnectRequest, Meta(extra_json_schema={"properties": {"revoke": {"const": False}}})]
_NEXT = "$response.body#/next"
_NO_STORE = Note(needs_store=False)
# By handler; every other one is a plain read.
NOTES = {
    "notify": Note(
        NotifyRequest,
        is_text=True,
        has_key=True,
        may_wait=True,
        links={
            "later": ("notifications", "since", "$response.header.Notification-Id"),
            "delivery": ("notification", "id", "$response.header.Notification-Id"),
        },
    ),
    "notify_batch": Note(_BATCH, has_key=True),
    "events": Note(errors=(errors.DuplicateClient, errors.TooManyConnections)),
    "notifications": Note(links={"next": ("notifications", "since", "$response.body#/position")}),
    "notification": Note(links={"clients": ("delivery_clients", "id", "$response.body#/id")}),
    "delivery_clients": Note(links={"next": ("delivery_clients", "after", _NEXT)}),
    "clients": Note(
        links={
            "next": ("clients", "after", _NEXT),
            "first": ("client", "client_id", "$response.body#/clients/0/client_id"),
        },
    ),
    "online": Note(schemas.OnlineRequest),
    "change_topics": Note(_CHANGE),
    "disconnect_client": Note(_DISCONNECT, is_optional=True),
    "disconnect_user": Note(schemas.DisconnectRequest, is_optional=True),
    "topics": Note(
        links={"next": ("topics", "after", _NEXT), "first": ("clients", "topic", "$response.body#/topics/0/topic")},
    ),
    "upgrade_required": Note(errors=(errors.UpgradeRequired,), needs_store=False),
    **dict.fromkeys(("live", "index", "openapi", "asyncapi", "client_js", "console_file"), _NO_STORE),
}
_PLAIN = Note()


# --- schemas


class Schemas:
    """The schemas of one contract: those of Structs stand in `named`, and are referred to."""

    def __init__(self, prefix: str = "") -> None:
        self.named: dict[str, Schema] = {}
        self._prefix = prefix

    def of(self, kind: Any) -> Schema:
        """Return the schema of a type."""
        template = f"#/components/schemas/{self._prefix}{{name}}"
        [schema], named = msgspec.json.schema_components([kind], schema_hook=_of_fragment, ref_template=template)
        for name, found in named.items():
            if self._prefix + name not in self.named:
                # Before it is complete, since Structs may refer to each other.
                self.named[self._prefix + name] = {}
                self.named[self._prefix + name] |= self._of_struct(getattr(schemas, name), _plain(found))
        plain: Schema = _plain(schema)
        return plain

    def _of_struct(self, struct: Any, schema: Schema) -> Schema:
        config = struct.__struct_config__
        if config.forbid_unknown_fields or config.tag is not None:
            # From outside: a field with a default may be left out.
            return schema
        optional = {field.encode_name for field in msgspec.structs.fields(struct) if field.default is UNSET}
        properties = schema["properties"]
        schema["required"] = [name for name in properties if name not in optional]
        for value in properties.values():
            value.pop("default", None)
        # The two places for JSON that is there already.
        if struct is schemas.NotifyResponse:
            properties["notification"] = self.of(NotifyRequest) | {"required": ["message", "type", "data"]}
        elif struct is schemas.History:
            properties["notifications"]["items"] = self.of(schemas.Notification)
        return schema

    def example(self, schema: Schema) -> Any:
        """Return a value of a schema: of an object, all fields."""
        match schema:
            case {"$ref": ref}:
                value = self.example(self.named[ref.rpartition("/")[2]])
            case {"allOf": parts}:
                value = functools.reduce(operator.or_, map(self.example, parts))
            case {"examples": [value, *_]} | {"const": value} | {"default": value} | {"enum": [value, *_]}:
                pass
            case {"anyOf": [first, *_]}:
                value = self.example(first)
            case {"type": "array", "items": items}:
                value = [self.example(items)]
            case {"type": "object", "properties": properties}:
                value = {name: self.example(of) for name, of in properties.items()}
            case {"type": "boolean"}:
                value = True
        return value


def _of_fragment(kind: type) -> Schema:
    assert kind is orjson.Fragment, kind
    return {"type": "object"}


def _plain(schema: Any) -> Any:
    """Return a schema of msgspec's without its titles, with consts, and with the patterns of ECMA-262."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {"examples", "default", "enum", "const"}
    plain = {word: value if word in kept else _plain(value) for word, value in schema.items()}
    if isinstance(plain.get("title"), str):
        del plain["title"]
    if isinstance(pattern := plain.get("pattern"), str):
        # Half a surrogate pair is no character there, and without the flag u this range would be half of all others.
        plain["pattern"] = pattern.replace(r"\Z", "$").replace(r"\ud800-\udfff", "")
    if isinstance(values := plain.get("enum"), list) and len(values) == 1:
        plain = {"const": plain.pop("enum")[0]} | plain
    return plain


def query_parameters(found: Schemas, kinds: Mapping[str, Any], known: Set[str] | None) -> Iterator[tuple[str, Schema]]:
    """Yield the parameters of a path with their schemas; those of a host's own authentication are texts."""
    for name, kind in kinds.items():
        if isinstance(kind, Limit):
            yield name, {"type": "integer", "minimum": kind.least, "maximum": kind.most, "default": kind.default}
        elif name != "token":
            schema = found.of(kind)
            # An empty name counts as none.
            is_text = schema.get("type") == "string" and (schema.get("minLength") or "pattern" in schema)
            yield name, {"anyOf": [schema, {"const": ""}]} if is_text and kind not in (Before, Since) else schema
    for name in sorted((known or set()) - kinds.keys()):
        yield name, {"type": "string"}


# --- OpenAPI


def _is_exempt(path: str) -> bool:
    """Whether a path of the route table counts for no rate."""
    return path in EXEMPT or bool(files_at(path))


def openapi(settings: Settings, routes: Sequence[BaseRoute], prefix: str = "", names: str = "") -> Schema:
    """Return the contract of an app's routes.

    The prefix stands before all paths, and `names` before the names of the components: for a host that shows them
    beside its own. The caller adds `servers`.
    """
    return _OpenAPI(settings, routes, names).document(prefix)


class _OpenAPI:
    def __init__(self, settings: Settings, routes: Sequence[BaseRoute], names: str) -> None:
        self._settings = settings
        self._names = names
        self._schemas = Schemas(names)
        self._responses: dict[str, Schema] = {}
        self._headers: dict[str, Schema] = {}
        self._operations = list(operations(routes))
        self._ids = {handler.__name__ for _, _, _, handler in self._operations}

    def document(self, prefix: str) -> Schema:
        paths: dict[str, Schema] = {}
        for path, endpoint, method, handler in self._operations:
            item = paths.setdefault(prefix + path, self._path(path))
            item[method.lower()] = self._operation(path, endpoint, handler)
        components = {
            "schemas": self._schemas.named,
            "responses": self._responses,
            "headers": self._headers,
            "securitySchemes": {self._names + name: scheme for name, scheme in SECURITY_SCHEMES.items()},
        }
        return {
            "openapi": "3.1.0",
            "info": INFO | {"description": DESCRIPTION},
            "paths": paths,
            "components": {kind: named for kind, named in components.items() if named},
        }

    def _path(self, path: str) -> Schema:
        kinds = {
            "client_id": schemas.ClientId,
            "user": schemas.User,
            "id": Id,
            "file": typing.Literal[*(name.rpartition("/")[2] for name in files_at(CONSOLE))],
        }
        parameters = [
            {"name": name, "in": "path", "required": True, "schema": self._schemas.of(kinds[name])}
            for name in re.findall(r"{(\w+)}", path)
        ]
        return {"parameters": parameters} if parameters else {}

    def _operation(self, path: str, endpoint: Endpoint, handler: Handler) -> Schema:
        note = NOTES.get(handler.__name__, _PLAIN)
        summary, _, more = (handler.__doc__ or "").partition("\n")
        operation: Schema = {"operationId": self._names + handler.__name__, "summary": summary}
        if self._names:
            operation["tags"] = ["notifyd"]
        if more.strip():
            operation["description"] = " ".join(more.split())
        if endpoint.authenticator is not None and (endpoint.right or not endpoint.authenticator.lets_strangers_listen):
            roles = [RIGHTS[endpoint.right]] if endpoint.right else []
            operation["security"] = [{self._names + name: roles} for name in SECURITY_SCHEMES]
        if parameters := [*self._parameters(endpoint, handler, note)]:
            operation["parameters"] = parameters
        revokes = endpoint.authenticator is not None and endpoint.authenticator.revocations is not None
        if handler.__name__ == "disconnect_user" and not revokes:
            note = note._replace(body=_DISCONNECT)
        if note.body is not None:
            operation["requestBody"] = self._body(note, handler)
        operation["responses"] = self._responses_of(path, endpoint, handler, note)
        return operation

    def _parameters(self, endpoint: Endpoint, handler: Handler, note: Note) -> Iterator[Schema]:
        for name, schema in query_parameters(self._schemas, endpoint.kinds, endpoint.parameters):
            parameter: Schema = {"name": name, "in": "query", "schema": schema}
            if name == "topics":
                # Repeated ones count as well.
                parameter |= {"style": "form", "explode": False}
            yield parameter
        if handler.__name__ == "events":
            text = "The id of the last event that has come; it wins over the parameters."
            yield {"name": "Last-Event-ID", "in": "header", "description": text, "schema": {"type": "string"}}
        if note.has_key:
            of_key = {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH}
            text = "Makes repeating safe: a request with a key that was used before gets the first answer again."
            named = {"name": "Idempotency-Key", "in": "header", "description": text}
            yield {**named, "schema": of_key, "example": "order-18"}
        if note.may_wait:
            text = (
                f"wait=SECONDS, {MAX_WAIT_SECONDS} at most: the answer comes with `delivery`, once no client is behind."
            )
            yield {"name": "Prefer", "in": "header", "description": text, "schema": {"type": "string"}}

    def _body(self, note: Note, handler: Handler) -> Schema:
        is_list = handler.__name__ in (
            "notify_batch",
            "online",
            "change_topics",
            "disconnect_client",
            "disconnect_user",
        )
        limit = MAX_BATCH_BYTES if is_list else self._settings.max_message_size
        size = f"{limit} bytes at most"
        content = {JSON_TYPE: self._media(self._schemas.of(note.body))}
        if note.is_text:
            text = self._schemas.named[f"{self._names}NotifyRequest"]["properties"]["message"]
            content[TEXT_TYPE] = self._media(text)
        if handler.__name__ == "notify_batch":
            content[LINES_TYPE] = {"schema": {"type": "string"}, "example": '{"message":"disk full"}\n'}
            size += f"; as {LINES_TYPE} any number of lines, each of {self._settings.max_message_size} bytes at most"
        return {"required": not note.is_optional, "description": size, "content": content}

    def _media(self, schema: Schema) -> Schema:
        return {"schema": schema, "example": self._schemas.example(schema)}

    # --- answers

    def _responses_of(self, path: str, endpoint: Endpoint, handler: Handler, note: Note) -> Schema:
        answers: Schema = {"200": self._answer(path, handler, note)}
        if handler.__name__ == "upgrade_required":
            answers = {"101": {"description": "The handshake of a WebSocket: see /asyncapi.json"}}
        elif handler.__name__ == "events":
            text = f"Stay away: `Last-Event-ID` is {REPLACED_ID} or {PUT_OUT_ID}, from the end of an earlier stream."
            answers["204"] = {"description": text}
        elif files_at(path) or self._has_page(path):
            answers["304"] = {"description": "`If-None-Match` has the ETag of the file."}
        elif handler.__name__ == "health":
            answers["503"] = answers["200"] | {"description": "The server drains, or its store is away."}
        for status in sorted({each.status for each in self._errors_of(path, endpoint, note)}):
            answers.setdefault(str(status), self._error(status))
        answers["default"] = self._error(None)
        return answers

    def _answer(self, path: str, handler: Handler, note: Note) -> Schema:
        headers = {}
        if note.has_key:
            # An answer in lines has none.
            id, may_be_lines = self._schemas.of(Id), handler.__name__ == "notify_batch"
            sent = {"required": False, "schema": id} if may_be_lines else self._header("Notification-Id", id)
            headers["Notification-Id"] = sent
            headers["Idempotent-Replayed"] = self._header("Idempotent-Replayed", {"const": "true"}, is_required=False)
        if note.may_wait:
            applied = {"type": "string", "pattern": "^wait=[0-9]+$"}
            headers["Preference-Applied"] = self._header("Preference-Applied", applied, is_required=False)
        if files_at(path):
            headers["ETag"] = self._header("ETag", {"type": "string", "pattern": '^"[0-9a-f]+"$'})
        answer: Schema = {"description": "Done.", "content": self._content(path, handler)}
        if headers := headers | self._rate_headers(path):
            answer["headers"] = headers
        links = {
            name: {"operationId": self._names + operation, "parameters": {parameter: place}}
            for name, (operation, parameter, place) in note.links.items()
            if operation in self._ids
        }
        return answer | ({"links": links} if links else {})

    def _content(self, path: str, handler: Handler) -> Schema:
        if files := files_at(path):
            return {media_type_of(name): {"schema": {"type": "string"}} for name in files}
        if handler.__name__ == "prometheus":
            return {PROMETHEUS_TYPE: {"schema": {"type": "string"}}}
        if handler.__name__ == "events":
            text = "Server-Sent Events; the data of each is a message of /asyncapi.json"
            return {STREAM_TYPE: {"schema": {"type": "string", "description": text}}}
        kind = typing.get_type_hints(handler)["return"]
        if typing.get_origin(kind) is not Answer:
            return {JSON_TYPE: {"schema": {"type": "object"}}}
        in_json = {JSON_TYPE: self._media(self._schemas.of(typing.get_args(kind)[0]))}
        if handler.__name__ == "notify_batch":
            in_json[LINES_TYPE] = {"schema": {"type": "string"}}
        return in_json | ({"text/html": {"schema": {"type": "string"}}} if self._has_page(path) else {})

    def _has_page(self, path: str) -> bool:
        return path == "/" and self._settings.console

    def _errors_of(self, path: str, endpoint: Endpoint, note: Note) -> Iterable[type[NotifydError]]:
        yield from note.errors
        if note.needs_store:
            yield errors.ShuttingDown
            yield errors.StoreUnavailable
        yield errors.InvalidRequest
        yield errors.Forbidden
        yield NotifydError
        if endpoint.authenticator is not None:
            yield errors.Unauthorized
            yield errors.KeysUnavailable
        if self._settings.rate_limit and not _is_exempt(path):
            yield errors.RateExceeded
        if "{" in path:
            yield errors.NotFound
        if note.body is not None:
            yield errors.TooLarge
            yield errors.UnsupportedMediaType
        if note.has_key:
            yield errors.KeyReused

    def _error(self, status: int | None) -> Schema:
        """Return a reference to the response of all errors with a status; None is every other status."""
        name = self._names + ("Error" if status is None else HTTPStatus(status).phrase.replace(" ", ""))
        if name not in self._responses:
            # Before it is complete, since it is referred to.
            self._responses[name] = self._error_response(status)
        return {"$ref": f"#/components/responses/{name}"}

    def _error_response(self, status: int | None) -> Schema:
        schema = self._schemas.of(schemas.ErrorResponse)
        example = self._schemas.example(schema)
        if status is None:
            text = "Every other error: of the method, and of the request as such."
            return {"description": text, "content": {JSON_TYPE: {"schema": schema, "example": example}}}
        found = [each for each in tree(NotifydError) if each.status == status]
        category = found[0].category
        of_status = {"properties": {"error": {"properties": {"category": {"const": category}}}}}
        example = {"error": example["error"] | {"message": HTTPStatus(status).phrase, "category": category}}
        response: Schema = {
            "description": " ".join(str(each.__doc__).split("\n")[0] for each in found),
            "content": {JSON_TYPE: {"schema": {"allOf": [schema, of_status]}, "example": example}},
        }
        headers = {}
        if status in (429, 503):
            seconds = {"type": "integer", "minimum": 1, "examples": [RETRY_AFTER_SECONDS]}
            headers["Retry-After"] = self._header("Retry-After", seconds)
        elif status == 401:
            headers["WWW-Authenticate"] = self._header("WWW-Authenticate", {"type": "string", "pattern": "^Bearer "})
        elif status == 426:
            headers["Upgrade"] = self._header("Upgrade", {"const": "websocket"})
        if headers := headers | self._rate_headers(""):
            response["headers"] = headers
        return response

    def _rate_headers(self, path: str) -> Schema:
        """Return the headers that tell of the bucket: in every answer of a limited path, and in many errors."""
        if not self._settings.rate_limit or _is_exempt(path):
            return {}
        number = {"type": "integer", "minimum": 0}
        return {
            name: self._header(name, number, is_required=False)
            for name in ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
        }

    def _header(self, name: str, schema: Schema, *, is_required: bool = True) -> Schema:
        self._headers[self._names + name] = {"required": is_required, "schema": schema}
        return {"$ref": f"#/components/headers/{self._names}{name}"}


def operations(routes: Sequence[BaseRoute]) -> Iterator[tuple[str, Endpoint, str, Handler]]:
    """Yield path, endpoint, method and handler of each operation, without HEAD."""
    for route in routes:
        if isinstance(route, Route) and isinstance(route.app, Endpoint):
            for method, handler in route.app.handlers.items():
                if method != "HEAD":
                    yield route.path, route.app, method, handler


def tree(root: type[NotifydError]) -> Iterator[type[NotifydError]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)
