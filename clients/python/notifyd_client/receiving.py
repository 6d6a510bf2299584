"""The WebSocket of notifyd as an iterator of notifications, async and sync.

`_Session` has all that a client knows, without a connection: the two iterators move its bytes and wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection as SyncConnection
from websockets.sync.client import connect as connect_sync

from notifyd_client.waiting import backoff

STABLE_SECONDS = 10.0  # a connection that lasted this long counts as a success: the next delay is short again
IDLE_SECONDS = 45.0  # after this much silence the client pings the server, after twice this much it gives it up

# The final closes in the table of docs/protocol.md: the same request would be refused again. Those of the code 1008
# begin with such a reason. Others are temporary: "Connection limit exceeded", "Client ... is already connected",
# "Slow consumer".
FINAL_CODES = (1002, 1007, 1009)
# Of these, the ones that another token may change.
OF_TOKENS = ("Authentication required", "Invalid token", "Token ", "Not allowed")
FINAL = ("Invalid ", "Query:", "Unknown ", "Replaced by", "Disconnected", *OF_TOKENS)
POLICY_VIOLATION = 1008

log = logging.getLogger("notifyd.client")

Message = dict[str, Any]
OnMessage = Callable[[Message], object]
Closed = (OSError, WebSocketException)


def is_final(error: Exception) -> bool:
    """Return whether the same request would only be refused again."""
    if isinstance(error, InvalidStatus):
        return 400 <= error.response.status_code < 500 and error.response.status_code not in (408, 429)
    if isinstance(error, ConnectionClosed) and error.rcvd is not None:
        code, reason = error.rcvd.code, error.rcvd.reason
        return code in FINAL_CODES or (code == POLICY_VIOLATION and reason.startswith(FINAL))
    return isinstance(error, InvalidURI)


def _names(topics: Iterable[str]) -> list[str]:
    """Return the names of topics without spaces around them. Raises ValueError."""
    found = [topics] if isinstance(topics, str) else list(topics)
    for name in found:
        if not isinstance(name, str) or not name.strip() or "," in name:
            raise ValueError(f"topics: expected names without commas, got {name!r}")
    return [name.strip() for name in found]


class _Session:
    """A client without its connection: its topics, its place in the log, and its part of the conversation."""

    def __init__(
        self,
        url: str,
        *,
        client_id: str | None = None,
        user: str | None = None,
        topics: Iterable[str] = (),
        since: str | None = None,
        token: str | Callable[[], Any] | None = None,
        ack: bool = False,
        on_message: OnMessage | None = None,
    ) -> None:
        """Options, all optional.

        `user`: where no token names one. `since`: the id to resume from. `token`: an API key or a JSON Web Token, or a
        function that returns one, which is called for each connection. `ack`: acknowledge each notification when the
        body of the loop is done with it, and begin after what `client_id` has acknowledged before. `on_message`: gets
        the other messages of the protocol. Raises ValueError.
        """
        if ack and not client_id:
            raise ValueError("ack needs a client_id: the server keeps the place under it")
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        of_url = [name for name in query.pop("topics", "").split(",") if name.strip()]
        since = since or query.pop("since", "")
        query |= {name: value for name, value in {"client_id": client_id, "user": user}.items() if value is not None}
        self.url = parts._replace(query=urlencode({**query, "since": ""})).geturl()
        #: The position to resume from: the id of the last notification, or a newer one. Empty: from now on.
        self.last = since
        self._topics = dict.fromkeys([*of_url, *_names(topics)])
        self._query = query
        self._token = token
        self._shown: str | None = None  # the last token
        self._refused: str | None = None  # the token that was refused
        self._acks = ack
        self._first = self._done = since  # the newest position that the body of the loop is done with
        self._on_message = on_message
        # The ids of another log may be older than `last`, and its next is no duplicate.
        self._is_another_log = False
        self._asked: list[Message] = []  # what the server has yet to answer, in order
        self._is_open = False
        self._opened = float("inf")
        self._failures = 0

    @property
    def topics(self) -> list[str]:
        """The topics that it has asked for and follows."""
        return list(self._topics)

    def _begin(self) -> None:
        """Start over: a notification that the loop did not get done with comes again."""
        if self._acks:
            self.last = self._done

    def _target(self, token: str | None) -> tuple[str, dict[str, str]]:
        """Return the URL and the headers of the next connection."""
        self._shown = token
        topics = {"topics": ",".join(self._topics)} if self._topics else {}
        query = {**self._query, **topics, "since": self.last or ("acked" if self._acks else "")}
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return urlsplit(self.url)._replace(query=urlencode(query)).geturl(), headers

    def _started(self) -> None:
        self._opened = time.monotonic()

    def _take(self, message: Message) -> tuple[bool, list[Message]]:
        """Take a message; return whether it is a notification that is new, and the messages to send."""
        if "id" in message:
            return self._advance(message["id"]), []
        replies: list[Message] = []
        match message:
            case {"type": "ping"}:
                replies = [{"type": "pong"}]
            case {"type": "welcome", "client_id": client_id}:
                log.info("connected as %s%s", client_id, f" of {message['user']}" if "user" in message else "")
                self._is_open, self._refused = True, None
                # The acknowledgement may have been lost with the connection before.
                replies = [*self._asked, *(self._acked(self._done) if self._done != self._first else [])]
            case {"type": "subscribed", "topics": topics}:
                self._subscribed(topics)
            case {"type": "authenticated"} if self._asked and self._asked[0]["type"] == "auth":
                self._asked.pop(0)
            case {"type": "error", "message": text}:
                log.error("error: %s", text)
                # In the order of the questions; an error of an ack is the answer to none.
                if self._asked and not text.startswith("id:"):
                    self._asked.pop(0)
            case {"type": "resume", "data": {"position": position, "replayed": replayed, "complete": complete}}:
                if not complete:
                    log.warning("some notifications are missed: too old for the server")
                if not self.last and not replayed:
                    # Nothing received yet and nothing to come: from here on nothing can be missed.
                    self.last = position
                    replies = self._acked(position)
                self._is_another_log = bool(self.last) and position < self.last
            case {"type": "position", "position": position} if self._advance(position):
                # Nothing for this client came before it.
                replies = self._acked(position)
        if self._on_message is not None:
            self._on_message(message)
        return False, replies

    def _advance(self, id: str) -> bool:
        """Go on to an id, and return whether it is new."""
        if id <= self.last and not self._is_another_log:
            return False
        self._is_another_log = False
        self.last = id
        return True

    def _acked(self, position: str) -> list[Message]:
        """Return the acknowledgement of a position."""
        self._done = position
        return [{"type": "ack", "id": position}] if self._acks and position else []

    def _subscribed(self, topics: list[str]) -> None:
        # Topics that an admin or a new token took away would be refused in the next URL.
        for topic in set(self._topics).difference(topics):
            del self._topics[topic]
        if not self._asked or "topics" not in self._asked[0]:
            return
        named, adds = self._asked[0]["topics"], self._asked[0]["type"] == "subscribe"
        if all((topic in topics) == adds for topic in named):
            self._asked.pop(0)
            self._topics |= dict.fromkeys(named if adds else ())

    def _ask(self, message: Message) -> list[Message]:
        """Return a message that the server answers; without a connection the next one has its content in the URL."""
        if message["type"] == "auth" and not callable(self._token):
            self._token = message["token"]
        if self._is_open:
            self._asked.append(message)
            return [message]
        if message["type"] == "subscribe":
            self._topics |= dict.fromkeys(message["topics"])
        for topic in message["topics"] if message["type"] == "unsubscribe" else ():
            self._topics.pop(topic, None)
        return []

    def _lost(self, error: Exception | None) -> float:
        """Return the seconds to wait after the end of a connection; raises the error where it is final."""
        if error is not None and is_final(error):
            reason = error.rcvd.reason if isinstance(error, ConnectionClosed) and error.rcvd else ""
            if not callable(self._token) or not reason.startswith(OF_TOKENS) or self._shown == self._refused:
                raise error
            self._refused = self._shown
        if time.monotonic() - self._opened >= STABLE_SECONDS:
            self._failures = 0
        self._is_open, self._opened = False, float("inf")
        delay = backoff(self._failures)
        self._failures += 1
        log.info("disconnected (%s), again in %.1f s", error or "closed", delay)
        return delay


class NotifydClient(_Session):
    """An async iterable of notifications, which reconnects and resumes by itself.

    A program that takes long over a notification stops the server's sending, and may be closed as a slow consumer; the
    rest then comes after a reconnect. Raises ConnectionClosed or InvalidStatus when the server refuses for good.
    """

    _websocket: ClientConnection | None = None

    async def __aiter__(self) -> AsyncIterator[Message]:
        self._begin()
        while True:
            failure: Exception | None = None
            try:
                url, headers = self._target(await self._token_now())
                async with connect(url, additional_headers=headers) as self._websocket:
                    self._started()
                    async for frame in self._websocket:
                        message = json.loads(frame)
                        if message["type"] == "shutdown":
                            break  # and, as after every close, come back after a while
                        is_new, replies = self._take(message)
                        await self._send(replies)
                        if is_new:
                            yield message
                            await self._send(self._acked(message["id"]))
            except Closed as error:
                failure = error
            finally:
                self._websocket = None
            await asyncio.sleep(self._lost(failure))

    async def _token_now(self) -> str | None:
        given = self._token() if callable(self._token) else self._token
        return await given if inspect.isawaitable(given) else given

    async def _send(self, messages: list[Message]) -> None:
        for message in messages:
            # Where there is no connection any more, the next one has it.
            with contextlib.suppress(*Closed):
                if self._websocket is not None:
                    await self._websocket.send(json.dumps(message))

    async def subscribe(self, *topics: str) -> None:
        """Follow more topics from now on. A refusal is logged, and `on_message` gets it."""
        await self._send(self._ask({"type": "subscribe", "topics": _names(topics)}))

    async def unsubscribe(self, *topics: str) -> None:
        await self._send(self._ask({"type": "unsubscribe", "topics": _names(topics)}))

    async def authenticate(self, token: str) -> None:
        """Go on with another token of the same user."""
        await self._send(self._ask({"type": "auth", "token": token}))


class SyncNotifydClient(_Session):
    """NotifydClient for a program without an event loop: an iterable of notifications."""

    _websocket: SyncConnection | None = None

    def __iter__(self) -> Iterator[Message]:
        self._begin()
        while True:
            failure: Exception | None = None
            try:
                url, headers = self._target(self._token() if callable(self._token) else self._token)
                with connect_sync(url, additional_headers=headers) as self._websocket:
                    self._started()
                    for message in self._messages(self._websocket):
                        if message["type"] == "shutdown":
                            break
                        is_new, replies = self._take(message)
                        self._send(replies)
                        if is_new:
                            yield message
                            self._send(self._acked(message["id"]))
            except Closed as error:
                failure = error
            finally:
                self._websocket = None
            time.sleep(self._lost(failure))

    def _messages(self, websocket: SyncConnection) -> Iterator[Message]:
        """Yield what comes; TimeoutError for a server that vanished without a close."""
        while True:
            try:
                frame = websocket.recv(IDLE_SECONDS)
            except TimeoutError:
                websocket.send('{"type":"ping"}')
                frame = websocket.recv(IDLE_SECONDS)
            yield json.loads(frame)

    def _send(self, messages: list[Message]) -> None:
        for message in messages:
            with contextlib.suppress(*Closed):
                if self._websocket is not None:
                    self._websocket.send(json.dumps(message))

    def subscribe(self, *topics: str) -> None:
        """Follow more topics from now on. A refusal is logged, and `on_message` gets it."""
        self._send(self._ask({"type": "subscribe", "topics": _names(topics)}))

    def unsubscribe(self, *topics: str) -> None:
        self._send(self._ask({"type": "unsubscribe", "topics": _names(topics)}))

    def authenticate(self, token: str) -> None:
        """Go on with another token of the same user."""
        self._send(self._ask({"type": "auth", "token": token}))
