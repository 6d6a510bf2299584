"""picows (Cython), on uvloop: `send` to one client after the other.

Usage: picows_loop.py PORT; publishes come in on the next port
"""

import asyncio
import sys

import publish_port
import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

BACKLOG = 4096

clients: set[WSTransport] = set()


class Client(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        clients.add(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        clients.discard(transport)


def publish(body: bytes) -> None:
    for client in clients:
        client.send(WSMsgType.TEXT, body)


def accept(_: WSUpgradeRequest) -> WSListener:
    return Client()


async def main(port: int) -> None:
    publishing = await publish_port.listen(port + 1, publish)
    server = await ws_create_server(accept, "127.0.0.1", port, backlog=BACKLOG)
    async with publishing, server:
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
