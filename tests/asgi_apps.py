"""Ordinary ASGI apps, one for each path, and a process of uvicorn that serves them with our protocol classes.

For test_wire.py and the Autobahn TestSuite. The apps know ASGI and nothing of notifyd; they write every event and error
to stderr. `/health` counts the WebSocket apps that run; `/wake` wakes those that wait for it.

    python tests/asgi_apps.py --loop uvloop
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import sys
from typing import Any

import uvicorn

from wire import WireProtocol
from wire_http import HttpProtocol

MAX_MESSAGE_BYTES = 2**20
PAGE = b"x" * 65_536


class State:
    running = 0
    wake = asyncio.Event()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def accept(receive: Any, send: Any, **answer: Any) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", **answer})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Send back every message, and print the last event."""
    await accept(receive, send)
    await _echo(receive, send)


async def compressed(scope: Any, receive: Any, send: Any) -> None:
    """Echo to clients that may compress their messages."""
    scope["extensions"]["notifyd.wire"].compress()
    await echo(scope, receive, send)


async def _echo(receive: Any, send: Any) -> None:
    while (event := await receive())["type"] == "websocket.receive":
        await send({**event, "type": "websocket.send"})
    say(f"disconnect {event['code']} {event.get('reason')!r}")


async def late(scope: Any, receive: Any, send: Any) -> None:
    """Answer the handshake only when woken; then echo."""
    woken = State.wake
    assert (await receive())["type"] == "websocket.connect"
    await woken.wait()
    await send({"type": "websocket.accept"})
    await _echo(receive, send)


async def describe(scope: Any, receive: Any, send: Any) -> None:
    """Choose the last subprotocol offered, add headers of both forms, and send the scope."""
    headers = [[b"x-list", b"1"], (b"x-tuple", b"2")]
    await accept(receive, send, subprotocol=scope["subprotocols"][-1], headers=headers)
    told = ("type", "http_version", "scheme", "root_path", "path", "query_string", "raw_path", "subprotocols")
    shown = {name: value.decode() if isinstance(value := scope[name], bytes) else value for name in told}
    await send({"type": "websocket.send", "text": json.dumps(shown)})


async def deny(scope: Any, receive: Any, send: Any) -> None:
    """Refuse with a response of its own, in two parts."""
    headers = [[b"content-type", b"text/plain"], (b"x-why", b"short and stout")]
    await send({"type": "websocket.http.response.start", "status": 418, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": b"tea", "more_body": True})
    await send({"type": "websocket.http.response.body", "body": b"pot"})


async def forbid(scope: Any, receive: Any, send: Any) -> None:
    """Refuse in the way that ASGI has always had."""
    await receive()
    await send({"type": "websocket.close"})


async def forget(scope: Any, receive: Any, send: Any) -> None:
    """Return without an answer."""


async def crash_early(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("on purpose")


async def crash(scope: Any, receive: Any, send: Any) -> None:
    await accept(receive, send)
    raise RuntimeError("on purpose")


async def lose_a_file(scope: Any, receive: Any, send: Any) -> None:
    """Fail with an OSError that has nothing to do with the connection."""
    await accept(receive, send)
    raise FileNotFoundError("on purpose")


async def finish(scope: Any, receive: Any, send: Any) -> None:
    """Return on an open connection."""
    await accept(receive, send)


async def close(scope: Any, receive: Any, send: Any) -> None:
    """Close with a code and a reason when woken, without having read anything."""
    woken = State.wake
    await accept(receive, send)
    await woken.wait()
    await send({"type": "websocket.close", "code": 4000, "reason": "Enough"})
    await receive()


async def send_too_late(scope: Any, receive: Any, send: Any) -> None:
    """Send on a connection after its peer has gone, and print the outcome."""
    await accept(receive, send)
    await receive()
    try:
        await send({"type": "websocket.send", "text": "too late"})
    except Exception as error:
        say(f"send raised an OSError: {isinstance(error, OSError)}")
        raise


async def dawdle(scope: Any, receive: Any, send: Any) -> None:
    """Read nothing until woken; then count to the message "end", and tell the number."""
    woken, count = State.wake, 0
    await accept(receive, send)
    await woken.wait()
    while (await receive()).get("text") != "end":
        count += 1
    await send({"type": "websocket.send", "text": str(count)})


async def answer_in_its_own_time(scope: Any, receive: Any, send: Any) -> None:
    """Read a message, and echo it when woken."""
    woken = State.wake
    await accept(receive, send)
    event = await receive()
    say("has read")
    await woken.wait()
    await send({**event, "type": "websocket.send"})
    await _echo(receive, send)


async def flood(scope: Any, receive: Any, send: Any) -> None:
    """Send 16 MiB, whether anybody reads or not, and close."""
    await accept(receive, send)
    for _ in range(256):
        await send({"type": "websocket.send", "bytes": PAGE})
    await send({"type": "websocket.close", "code": 4001, "reason": "All said"})


async def flood_from_two_tasks(scope: Any, receive: Any, send: Any) -> None:
    """Send 8 MiB from each of two tasks at once."""

    async def talk() -> None:
        for _ in range(128):
            await send({"type": "websocket.send", "bytes": PAGE})

    await accept(receive, send)
    await asyncio.gather(talk(), talk())


APPS = (echo, compressed, late, describe, deny, forbid, forget, crash_early, crash, lose_a_file, finish, close)
APPS += (send_too_late, dawdle, answer_in_its_own_time, flood, flood_from_two_tasks)
BY_PATH = {"/ws": echo} | {f"/{app.__name__}": app for app in APPS}


async def over_http(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/wake":
        State.wake.set()
        State.wake = asyncio.Event()
    body = json.dumps({"connections": {"active": State.running}}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        return await over_http(scope, receive, send)
    State.running += 1
    try:
        return await BY_PATH.get(scope["path"], describe)(scope, receive, send)
    finally:
        State.running -= 1


class Server(uvicorn.Server):
    """uvicorn; it prints when and where it serves."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        scheme = "https" if self.config.is_ssl else "http"
        say("serves {}://{}:{}".format(scheme, *self.servers[0].sockets[0].getsockname()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--certificate", help="a PEM file with key and certificate: serve TLS")
    options = parser.parse_args()
    # uvicorn ends as its signal would have ended it. A test wants to see whether all went well until then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = uvicorn.Config(
        app,
        port=options.port,
        loop=options.loop,
        http=HttpProtocol,
        ws=WireProtocol,
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        ws_ping_interval=None,
        lifespan="off",
        log_level="error",
        # Some apps wait to be woken, and nobody does when the server ends.
        timeout_graceful_shutdown=2,
        ssl_certfile=options.certificate,
    )
    Server(config).run()


if __name__ == "__main__":
    main()
