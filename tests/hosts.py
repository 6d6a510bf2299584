"""Applications that have notifyd inside, for test_embedding to run under several servers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    AuthenticationError,
    BaseUser,
    SimpleUser,
)
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from notifyd import create_app, drains_on_signal

alone = create_app()

in_fastapi = FastAPI()
in_fastapi.mount("/notifications", create_app())

mounted = create_app()


async def announce(request: Request) -> JSONResponse:
    """Publish from inside the process, and show the receipt."""
    receipt = await mounted.state.hub.notify("from inside", type="alert", data={"priority": "high"})
    return JSONResponse({"id": str(receipt.id), "recipients": receipt.recipients})


async def shout(request: Request) -> JSONResponse:
    """Publish with nothing but a message."""
    return JSONResponse({"recipients": (await mounted.state.hub.notify("hi")).recipients})


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    async with exact.state.hub:
        yield


exact = create_app()

in_starlette = Starlette(
    routes=[
        Route("/announce", announce, methods=["POST"]),
        Route("/shout", shout, methods=["POST"]),
        Mount("/notifications", app=mounted),
        Mount("/other/hub", app=create_app()),
    ]
)
with_lifespan = Starlette(routes=[Mount("/notifications", app=exact)], lifespan=lifespan)


drained = create_app()


@asynccontextmanager
async def draining_lifespan(_: Starlette) -> AsyncIterator[None]:
    async with drains_on_signal(drained.hub):
        yield


draining = Starlette(routes=[Mount("/notifications", app=drained)], lifespan=draining_lifespan)


SCOPES = {
    "alice": ["subscribe:builds", "publish:builds"],
    "root": ["subscribe", "publish", "admin"],
    "brief": [],
}


class Names(AuthenticationBackend):
    """Takes a name for a proof of it, also one in the query."""

    query_parameters = ("name",)

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        name = conn.headers.get("authorization", "").removeprefix("Bearer ") or "".join(
            conn.scope.get("subprotocols", [])[1:]
        )
        name = name or conn.query_params.get("name", "")
        if not name:
            return None
        if name == "nobody knows":
            raise RuntimeError("on purpose")
        if name not in SCOPES:
            raise AuthenticationError(f"{name} is a secret")
        credentials = AuthCredentials(SCOPES[name])
        if name == "brief":
            credentials.expires_at = time.time() + 1
        return credentials, SimpleUser(name)


guarded = Starlette(routes=[Mount("/notifications", app=create_app(auth=Names()))])
