"""The broadcast that every FastAPI tutorial teaches: `await send_text` to one client after the other.

Usage: fastapi_loop.py PORT
"""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import BaseModel

BACKLOG = 4096

app = FastAPI()
clients: set[WebSocket] = set()


class Notification(BaseModel):
    message: str
    type: str = "custom"
    data: dict[str, Any] = {}


@app.websocket("/ws")
async def ws(client: WebSocket) -> None:
    await client.accept()
    clients.add(client)
    try:
        while True:
            await client.receive_text()
    except WebSocketDisconnect:
        clients.discard(client)


@app.post("/notify")
async def notify(notification: Notification) -> dict[str, Any]:
    text = notification.model_dump_json()
    for client in list(clients):
        await client.send_text(text)
    return {"status": "success", "recipients": len(clients)}


if __name__ == "__main__":
    # Pings off: they would be measured too, and the other peers send none.
    uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", log_level="error", ws_ping_interval=None, backlog=BACKLOG)
