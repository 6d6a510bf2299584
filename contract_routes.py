"""The routes that describe an app: its index at /, to browsers the console, the contracts, and the files of pages.

All of them are open to everybody: the console shows nothing without the rights of a key or token that it is given.

Owns the addresses that depend on a request: a mount, a host. The contracts are made when they are first asked for, in a
thread since that takes 20 ms, and kept as bytes.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

import schemas
from answers import Answer, Endpoint, answer, preferred
from assets import CONSOLE, FILES, PAGE, asset
from errors import NotFound
from guard_identity import Identity
from hub import Hub

JSON_TYPE = "application/json"
# Caches keep a form of the index for each Accept.
_VARY = {"Vary": "Accept"}
# The console loads nothing from elsewhere, runs no text as a script or as HTML, and is in no frame. No address of it is
# told to others.
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self'; style-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_PAGE_HEADERS = {**_VARY, "Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"}


def described(hub: Hub, routes: Sequence[BaseRoute]) -> list[BaseRoute]:
    """Return these routes with those that describe them all."""

    async def index(hub: Hub, request: Request, sender: Identity | None) -> Answer[schemas.Index]:
        """Return the name and version of the server, and the paths of its routes; to a browser the console."""
        form: Answer[schemas.Index] = forms[preferred(request.headers, forms)](request)
        return form

    def index_in_json(request: Request) -> Answer[schemas.Index]:
        mount, paths = request.scope.get("root_path", ""), [route.path for route in table if isinstance(route, Route)]
        return answer(schemas.Index(links={link_name(path): mount + path for path in paths}), headers=_VARY)

    async def openapi(hub: Hub, request: Request, sender: Identity | None) -> Response:
        """Return this contract, in OpenAPI 3.1."""
        return _at([{"url": request.scope.get("root_path") or "/"}], await asyncio.to_thread(of_routes))

    async def asyncapi(hub: Hub, request: Request, sender: Identity | None) -> Response:
        """Return the contract of the WebSocket and the streams, in AsyncAPI 3.0."""
        url, mount = request.url, request.scope.get("root_path", "")
        servers = servers_of(url.netloc or "localhost", mount, is_secure=url.scheme == "https")
        return _at(servers, await asyncio.to_thread(of_messages))

    def console(request: Request) -> Response:
        path = (request.scope.get("raw_path") or b"/").partition(b"?")[0].decode("latin-1")
        if not path.endswith("/"):
            # A host has added the slash. The page's own addresses begin behind it.
            return RedirectResponse(f"./{path.rpartition('/')[2]}/", headers=_VARY)
        return asset(request, PAGE, _PAGE_HEADERS)

    async def console_file(hub: Hub, request: Request, sender: Identity | None) -> Response:
        """Return a file of the console."""
        path = f"/console/{request.path_params['file']}"
        if path not in FILES:
            raise NotFound(f"There is nothing at {path[:200]}")
        return asset(request, FILES[path])

    async def client_js(hub: Hub, request: Request, sender: Identity | None) -> Response:
        """Return the client for pages, an ES module."""
        return asset(request, FILES["/client.js"])

    @functools.cache
    def of_routes() -> bytes:
        from contract import openapi  # noqa: PLC0415 - for the few that ask

        return orjson.dumps(openapi(hub.settings, table))

    @functools.cache
    def of_messages() -> bytes:
        from contract_messages import asyncapi  # noqa: PLC0415 - for the few that ask

        return orjson.dumps(asyncapi(hub.settings, table))

    # By media type; the first is for requests that prefer none.
    forms: dict[str, Callable[[Request], Any]] = {JSON_TYPE: index_in_json}
    handlers = {"/": index, "/openapi.json": openapi, "/asyncapi.json": asyncapi, "/client.js": client_js}
    if hub.settings.console:
        forms["text/html"] = console
        handlers[CONSOLE] = console_file
    table = [*routes, *(Route(path, Endpoint(hub, GET=handler)) for path, handler in handlers.items())]
    return table


def link_name(path: str) -> str:
    """Return the name of a path among the links: `notify_batch`, `clients_client_id`, `openapi`."""
    return re.sub(r"\W+", "_", path.removesuffix(".json").strip("/{}")) or "index"


def servers_of(host: str, mount: str, *, is_secure: bool) -> dict[str, Any]:
    """Return the `servers` of AsyncAPI."""
    server = {"host": host, "protocol": "wss" if is_secure else "ws"}
    return {"notifyd": server | ({"pathname": mount} if mount else {})}


def _at(servers: Any, contract: bytes) -> Response:
    """Return a contract with the addresses of this request."""
    return Response(b'{"servers":' + orjson.dumps(servers) + b"," + contract[1:] + b"\n", media_type=JSON_TYPE)
