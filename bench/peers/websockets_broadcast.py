"""`broadcast()` of the websockets library, on uvloop.

The library answers no POST, so publishes come in on the next port, through minimal HTTP: their number per second is no
figure of the library.

Usage: websockets_broadcast.py PORT
"""

import asyncio
import sys

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


async def publish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            broadcast(clients, (await reader.readexactly(length)).decode())
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    except asyncio.IncompleteReadError:
        writer.close()


async def main(port: int) -> None:
    publishing = await asyncio.start_server(publish, "127.0.0.1", port + 1)
    # Pings and compression off: the other peers send none and have none.
    serving = serve(handle, "127.0.0.1", port, ping_interval=None, compression=None, backlog=BACKLOG)
    async with publishing, serving:
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
