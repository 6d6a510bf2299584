"""The routes of the clients, users and topics that are there: looked at and changed by an admin.

Handlers as in routes.py: decode, call one method of the Hub's presence, encode.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

import schemas
from answers import Answer, Endpoint, Handler, SegmentRoute, answer
from bodies import MAX_BATCH_BYTES, body_of, content_of, json_in
from errors import InvalidRequest
from guard_identity import Identity, origin_of
from hub import Hub
from presence import Wanted
from query import PAGE_LIMIT, PARAMETERS, QUERY_KEY, Query, cursor, segment
from schemas import MAX_SHOWN, timestamp

if TYPE_CHECKING:
    from guard_auth import Authenticator

logger = logging.getLogger("notifyd.people")


def people_route_table(hub: Hub, authenticator: Authenticator | None = None) -> list[BaseRoute]:
    def endpoint(path: str, **handlers: Handler) -> Endpoint:
        return Endpoint(hub, authenticator, Identity.check_admin, PARAMETERS[path], **handlers)

    def segment_route(path: str, **handlers: Handler) -> SegmentRoute:
        return SegmentRoute(path, endpoint(path, **handlers))

    return [
        Route("/clients", endpoint("/clients", GET=clients)),
        segment_route("/clients/{client_id}", GET=client, DELETE=disconnect_client),
        # Every other method is for a user of this name.
        Route("/users/online", endpoint("/users/online", POST=online), methods=["POST", "OPTIONS"]),
        segment_route("/users/{user}", GET=user, DELETE=disconnect_user),
        segment_route("/users/{user}/topics", POST=change_topics),
        Route("/topics", endpoint("/topics", GET=topics)),
    ]


# --- the parts of a request


def _named(request: Request, name: str, kind: Any) -> str:
    """Return the value of a segment of the path. Raises InvalidRequest."""
    value: str = schemas.check(segment(request.path_params[name], name), kind, name)
    return value


def _filter(query: Query, name: str, kind: Any) -> str:
    """Return a parameter, empty for none. Raises InvalidRequest."""
    value: str = schemas.check(given, kind, name) if (given := query.get(name)) else ""
    return value


async def _json_of(hub: Hub, request: Request, sender: Identity | None, kind: Any, absent: bytes = b"") -> Any:
    """Return the value of the body, `absent` for an empty one. Raises Unauthorized for a token revoked meanwhile."""
    body = await body_of(request, MAX_BATCH_BYTES)
    if sender is not None:
        hub.check_revoked(sender)
    return json_in(content_of(request, body or absent), kind)


async def _disconnect_request(hub: Hub, request: Request, sender: Identity | None) -> schemas.DisconnectRequest:
    wanted: schemas.DisconnectRequest = await _json_of(hub, request, sender, schemas.DisconnectRequest, b"{}")
    return wanted


def _note(act: str, name: str, count: int, request: Request, sender: Identity | None) -> None:
    """Log the act of an admin, as the Hub logs a publish."""
    if logger.isEnabledFor(logging.DEBUG):
        address = (request.scope.get("client") or ("",))[0]
        logger.debug("%s %r (%d) from %s", act, name[:MAX_SHOWN], count, origin_of(address, sender))


# --- clients


async def clients(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.ConnectedClients]:
    """Return the clients of all processes, page by page."""
    query: Query = request.scope[QUERY_KEY]
    [topic] = schemas.stripped([_filter(query, "topic", schemas.Topic)])
    wanted = Wanted(user=_filter(query, "user", schemas.User), topic=topic)
    page, total, next = await hub.presence.clients(wanted, query.after(), query.limit(PAGE_LIMIT))
    goes_on = None if next is None else cursor(next)
    return answer(schemas.ConnectedClients(clients=page, total=total, next=goes_on, timestamp=timestamp()))


async def client(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.ConnectedClient]:
    """Return one client."""
    return answer(await hub.presence.client(_named(request, "client_id", schemas.ClientId)))


async def disconnect_client(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.Disconnected]:
    """Put a client out."""
    client_id = _named(request, "client_id", schemas.ClientId)
    wanted = await _disconnect_request(hub, request, sender)
    if wanted.revoke:
        raise InvalidRequest("revoke: only for a user")
    await hub.presence.disconnect(client_id, wanted.reason)
    _note("Put out client", client_id, 1, request, sender)
    return answer(schemas.Disconnected(disconnected=1, timestamp=timestamp()))


# --- users


async def disconnect_user(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.Disconnected]:
    """Put all clients of a user out, and revoke tokens."""
    name = _named(request, "user", schemas.User)
    wanted = await _disconnect_request(hub, request, sender)
    count = await hub.presence.disconnect_user(name, wanted.reason, revoke=wanted.revoke)
    _note("Revoked the tokens of, and put out, user" if wanted.revoke else "Put out user", name, count, request, sender)
    return answer(schemas.Disconnected(disconnected=count, timestamp=timestamp()))


async def user(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.ConnectedUser]:
    """Tell whether a user is online."""
    name = _named(request, "user", schemas.User)
    [count] = await hub.presence.online([name])
    return answer(schemas.ConnectedUser(user=name, online=count > 0, clients=count, timestamp=timestamp()))


async def online(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.Online]:
    """Return how many clients each of many users has."""
    wanted: schemas.OnlineRequest = await _json_of(hub, request, sender, schemas.OnlineRequest)
    counts = await hub.presence.online(wanted.users)
    return answer(schemas.Online(online=dict(zip(wanted.users, counts, strict=True)), timestamp=timestamp()))


async def change_topics(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.TopicsChanged]:
    """Change the topics of a user's clients."""
    name = _named(request, "user", schemas.User)
    wanted: schemas.TopicsRequest = await _json_of(hub, request, sender, schemas.TopicsRequest)
    count = await hub.presence.change_topics(name, wanted.subscribe, wanted.unsubscribe)
    _note("Changed the topics of user", name, count, request, sender)
    return answer(schemas.TopicsChanged(clients=count, timestamp=timestamp()))


# --- topics


async def topics(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.FollowedTopics]:
    """Return the topics of all processes, page by page."""
    query: Query = request.scope[QUERY_KEY]
    found, next = await hub.presence.topics(query.get("prefix") or "", query.after(), query.limit(PAGE_LIMIT))
    page = [schemas.FollowedTopic(topic=name, clients=count) for name, count in found.items()]
    goes_on = None if next is None else cursor(next)
    return answer(schemas.FollowedTopics(topics=page, next=goes_on, timestamp=timestamp()))
