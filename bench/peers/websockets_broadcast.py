"""`broadcast()` of the websockets library, on uvloop.

Usage: websockets_broadcast.py PORT; publishes come in on the next port
"""

import asyncio
import sys

import publish_port
import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

BACKLOG = 4096

clients: set[ServerConnection] = set()


async def handle(client: ServerConnection) -> None:
    clients.add(client)
    try:
        await client.wait_closed()
    finally:
        clients.discard(client)


async def main(port: int) -> None:
    publishing = await publish_port.listen(port + 1, lambda body: broadcast(clients, body.decode()))
    # Pings and compression off: the other peers send none and have none.
    serving = serve(handle, "127.0.0.1", port, ping_interval=None, compression=None, backlog=BACKLOG)
    async with publishing, serving:
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
