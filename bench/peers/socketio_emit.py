"""`emit` of python-socketio to everyone, on uvicorn.

Usage: socketio_emit.py PORT
"""

import sys

import socketio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

BACKLOG = 4096
# Pings off, as far as it goes: the other peers send none.
server = socketio.AsyncServer(
    async_mode="asgi", transports=["websocket"], ping_interval=3600, http_compression=False, logger=False
)


async def notify(request: Request) -> JSONResponse:
    await server.emit("notification", await request.json())
    return JSONResponse({"status": "success"})


app = socketio.ASGIApp(server, Starlette(routes=[Route("/notify", notify, methods=["POST"])]))

if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        loop="uvloop",
        log_level="error",
        ws_ping_interval=None,
        ws_per_message_deflate=False,
        backlog=BACKLOG,
    )
