"""A WebSocket client of notifyd: an async iterator of notifications.

    pip install 'websockets>=14'
    python examples/client.py ws://localhost:8000/ws --client-id my_client_123 --topics builds,alerts

prints each notification as a line of JSON until Ctrl-C. In a program:

    async for notification in NotifydClient("ws://localhost:8000/ws"):
        print(notification["type"], notification["data"]["message"])

It reconnects for ever, unless the server refuses in a way that every later attempt would get as well. After a
reconnect it resumes where it stopped, also before its first notification, and drops duplicates.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException

BASE_SECONDS = 0.5  # the first delay is at most this; each failure doubles it
CAP_SECONDS = 30.0
STABLE_SECONDS = 10.0  # a connection that lasted this long counts as a success: the next delay is short again

# Closes (1008) with such a reason are final: the same request would be refused again. Others are temporary:
# "Connection limit exceeded", "Client ... is already connected", "Slow consumer".
FINAL = ("Invalid ", "Query:", "Unknown ", "Replaced by", "Authentication required", "Token ", "Not allowed")
FINAL += ("Disconnected",)

log = logging.getLogger("notifyd.client")


def backoff(failures: int, base: float = BASE_SECONDS, cap: float = CAP_SECONDS) -> float:
    """Return the seconds to wait: anything up to a limit that doubles with each failure ("full jitter")."""
    return random.uniform(0, min(cap, base * 2.0 ** min(failures, 64)))


def is_final(error: Exception) -> bool:
    """Return whether the same request would only be refused again."""
    if isinstance(error, InvalidStatus):
        return 400 <= error.response.status_code < 500 and error.response.status_code not in (408, 429)
    if isinstance(error, ConnectionClosed):
        return error.rcvd is not None and error.rcvd.code == 1008 and error.rcvd.reason.startswith(FINAL)
    return isinstance(error, InvalidURI)


def with_query(url: str, **parameters: str | None) -> str:
    """Add query parameters to a URL, without those that are None."""
    parts = urlsplit(url)
    given = {key: value for key, value in parameters.items() if value is not None}
    return parts._replace(query=urlencode(dict(parse_qsl(parts.query, keep_blank_values=True)) | given)).geturl()


class NotifydClient:
    """An async iterable of notifications; `last` is the position to resume from, to be kept for `since` in a later run.

    A program that takes long over a notification stops the server's sending, and may be closed as a slow consumer; the
    rest then comes after a reconnect. Raises ConnectionClosed or InvalidStatus when the server refuses for good.
    """

    def __init__(
        self,
        url: str,
        *,
        client_id: str | None = None,
        user: str | None = None,
        topics: Iterable[str] = (),
        since: str | None = None,
        token: str | None = None,
    ) -> None:
        """`token`: an API key, or a JSON Web Token. `user`: for a client without a token, or with a key."""
        self.url = with_query(url, client_id=client_id, user=user, topics=",".join(topics) or None)
        # The id of the last notification, or a newer position. Empty: from now on.
        self.last = since or dict(parse_qsl(urlsplit(url).query)).get("since", "")
        # The ids of another log may be older than `last`, and its next is no duplicate.
        self._is_another_log = False
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        failures = 0
        while True:
            opened = float("inf")
            try:
                async with connect(
                    with_query(self.url, since=self.last), additional_headers=self._headers
                ) as websocket:
                    opened = time.monotonic()
                    async for frame in websocket:
                        message = json.loads(frame)
                        if message["type"] == "shutdown":
                            break  # and, as after every close, come back after a while
                        if "id" not in message:
                            await self._act_on(message, websocket)
                        elif self._advance(message["id"]):  # else a duplicate: ids are ordered by time
                            yield message
                reason = "closed"
            except (OSError, WebSocketException) as error:
                if is_final(error):
                    raise
                reason = str(error)
            if time.monotonic() - opened >= STABLE_SECONDS:
                failures = 0
            delay = backoff(failures)
            failures += 1
            log.info("disconnected (%s), again in %.1f s", reason, delay)
            await asyncio.sleep(delay)

    def _advance(self, id: str) -> bool:
        """Go on to an id, and return whether it is new."""
        if id <= self.last and not self._is_another_log:
            return False
        self._is_another_log = False
        self.last = id
        return True

    async def _act_on(self, message: dict[str, Any], websocket: ClientConnection) -> None:
        match message:
            case {"type": "ping"}:
                await websocket.send('{"type":"pong"}')
            case {"type": "welcome", "client_id": client_id}:
                log.info("connected as %s%s", client_id, f" of {message['user']}" if "user" in message else "")
            case {"type": "error", "message": text}:
                log.error("error: %s", text)
            case {"type": "resume", "data": {"position": position, "complete": complete}}:
                if not complete:
                    log.warning("some notifications are missed: too old for the server")
                if not self.last:
                    self.last = position  # nothing received yet: from here on nothing can be missed
                self._is_another_log = position < self.last
            case {"type": "position", "position": position}:
                self._advance(position)  # nothing for this client came before it


async def main() -> None:
    parser = argparse.ArgumentParser(description="Print notifications as they arrive.")
    parser.add_argument("url", nargs="?", default="ws://localhost:8000/ws")
    parser.add_argument("--client-id")
    parser.add_argument("--user", help="where no token names a user")
    parser.add_argument("--topics", default="", help="a comma list")
    parser.add_argument("--token", default=os.environ.get("TOKEN"), help="best in the variable TOKEN")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    topics = filter(None, args.topics.split(","))
    client = NotifydClient(args.url, client_id=args.client_id, user=args.user, topics=topics, token=args.token)
    try:
        async for notification in client:
            print(json.dumps(notification), flush=True)
    except WebSocketException as error:
        raise SystemExit(f"refused: {error}") from None


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
