"""Publishing for libraries that answer no POST: minimal HTTP, on a port of its own."""

import asyncio
from collections.abc import Callable


async def listen(port: int, publish: Callable[[bytes], None]) -> asyncio.Server:
    """Hand the body of each request to `publish`, and answer it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
                publish(await reader.readexactly(length))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        except asyncio.IncompleteReadError:
            writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", port)
