"""The standard ASGI app on a connection of wire.py: its scope, its `receive` and its `send`.

Owns the handshake's state, and the queue between the wire and an app that reads and writes at its own pace. Knows
the connection as `Wire`, and neither the transport nor the Hub. When the app takes the connection over, the session
is dropped.

1. Reading goes on while an app is slow, until MAX_QUEUED_MESSAGES wait for it; it goes on when it has taken all.
2. `send` waits while the transport is full, and raises an OSError once the connection is closing.
3. Every end of the connection reaches `receive` as websocket.disconnect.
4. Messages before a broken frame are still answered: the failure waits until the app asks for more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from starlette.types import Message, Scope
from uvicorn.config import Config
from uvicorn.server import ServerState

from connection import WIRE_EXTENSION, ConnectionState, Receiver
from log import frame
from schemas import INTERNAL_ERROR, NORMAL_CLOSURE
from wire_exchange import error_response, http_response
from wire_frames import BINARY, FrameError
from wire_handshake import Handshake, check_handshake
from wire_message import (
    ClientDisconnected,
    Headers,
    Peer,
    RequestError,
    RequestParser,
    is_disconnect,
)

if TYPE_CHECKING:
    from wire_deflate import Agreement

logger = logging.getLogger("notifyd.wire")

MAX_QUEUED_MESSAGES = 32
# The code in websocket.disconnect for an end without a close frame (RFC 6455, section 7.1.5).
ABNORMAL_CLOSURE = 1006

CONNECTING, OPEN = ConnectionState.CONNECTING, ConnectionState.OPEN


class Wire(Protocol):
    """The connection, as a session asks for it."""

    state: ConnectionState
    writable: bool
    session: Session | None

    def accept(
        self,
        receiver: Receiver | None,
        greeting: bytes = b"",
        position: str = "",
        subprotocol: str | None = None,
        headers: Headers = (),
    ) -> None: ...
    def write(self, frames: bytes) -> None: ...
    def close(self, code: int, reason: str = "") -> None: ...
    def peer(self) -> Peer: ...
    def refuse(self, response: bytes) -> None: ...
    def fail(self, error: FrameError) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Session:
    """The state of one connection's handshake, and of an app that uses the standard receive and send."""

    __slots__ = (
        "_app_state",
        "_config",
        "_drained",
        "_error",
        "_messages",
        "_response",
        "_server_state",
        "_wanted",
        "_wire",
        "agreement",
        "early",
        "headers",
        "key",
        "offers",
        "subprotocol",
    )

    def __init__(self, wire: Wire, config: Config, server_state: ServerState, app_state: dict[str, Any]) -> None:
        self._wire = wire
        self._config = config
        self._server_state = server_state
        self._app_state = app_state
        # The answer to the handshake: to its key, with the subprotocol and headers that were chosen meanwhile.
        self.key = ""
        self.subprotocol: str | None = None
        self.headers: Headers = ()
        # The extensions that the client offers, and what of them was taken.
        self.offers = ""
        self.agreement: Agreement | None = None
        # The bytes that a client has sent before it.
        self.early = b""
        self._messages: deque[Message] = deque()
        # Awaited by a waiting `receive`, and by every waiting `send`.
        self._wanted: asyncio.Event | None = None
        self._drained: asyncio.Event | None = None
        self._response: Message | None = None
        self._error: FrameError | None = None

    # --- the handshake

    def begin(self, request: RequestParser, peer: Peer, handshake: Handshake) -> None:
        """Have the app answer a handshake with this head, already checked."""
        self.key, self.offers = handshake.key, handshake.extensions
        scope = request.scope("websocket", peer, self._config.root_path, self._app_state)
        scope["subprotocols"] = handshake.subprotocols
        scope["extensions"] = {"websocket.http.response": {}, WIRE_EXTENSION: self._wire}
        task = asyncio.get_running_loop().create_task(self._run(scope))
        self._server_state.tasks.add(task)
        task.add_done_callback(self._server_state.tasks.discard)

    def received_early(self, data: bytes) -> None:
        """Take the bytes before the answer: the request from a host's own HTTP class, or those of an eager client."""
        if self.key:
            # A client has to wait for the answer (RFC 6455, section 4.1). One that does not is read no further.
            self.early += data
            self._wire.pause_reading()
            return
        request = RequestParser()
        try:
            request.read(data, 0, len(data))
            self.begin(request, self._wire.peer(), check_handshake(request))
        except RequestError as error:
            self._wire.refuse(self._error_response(error.status, str(error), error.headers))

    # --- called by the app

    async def _run(self, scope: Scope) -> None:
        self._messages.append({"type": "websocket.connect"})
        wire, code = self._wire, NORMAL_CLOSURE
        try:
            await self._config.loaded_app(scope, self._receive, self._send)
        except Exception as error:
            if is_disconnect(error):
                logger.debug("A peer left while its app was sending")
            else:
                logger.exception("Unexpected error in the app of a WebSocket")
                code = INTERNAL_ERROR
        if wire.session is not self or wire.state > OPEN:
            # A receiver has taken over, or the connection has begun to end.
            return
        if wire.state is CONNECTING:
            logger.error("The app of a WebSocket ended without answering the handshake")
            wire.refuse(self._error_response(500, "Internal server error"))
        elif self._error is not None:
            wire.fail(self._error)
        else:
            wire.close(code)

    async def _receive(self) -> Message:
        while not self._messages:
            if self._error is not None:
                error, self._error = self._error, None
                self._wire.fail(error)
                continue
            if self._wanted is None:
                self._wanted = asyncio.Event()
            await self._wanted.wait()
        message = self._messages.popleft()
        if not self._messages:
            self._wire.resume_reading()
        return message

    async def _send(self, message: Message) -> None:
        wire, kind = self._wire, message["type"]
        while not wire.writable and wire.state is OPEN:
            if self._drained is None:
                self._drained = asyncio.Event()
            await self._drained.wait()
        if wire.state is CONNECTING:
            self._answer_handshake(kind, message)
        elif wire.state is not OPEN:
            raise ClientDisconnected
        elif kind == "websocket.send":
            text = message.get("text")
            wire.write(frame(message["bytes"], BINARY) if text is None else frame(text.encode()))
        elif kind == "websocket.close":
            code, reason = message.get("code", NORMAL_CLOSURE), message.get("reason") or ""
            wire.close(code, reason)
            self.disconnected(code, reason)
        else:
            raise RuntimeError(f"{kind} is out of place on an open connection")

    def _answer_handshake(self, kind: str, message: Message) -> None:
        """Answer the handshake: accept it, refuse it, or take a part of the response that refuses it."""
        if self._response is not None and kind == "websocket.http.response.body":
            self._response["body"] += message.get("body", b"")
            if not message.get("more_body", False):
                self._refuse(self._response["status"], self._response["body"], self._response.get("headers", ()))
        elif self._response is not None:
            raise RuntimeError(f"{kind} is out of place in an HTTP response")
        elif kind == "websocket.accept":
            self._wire.accept(None, subprotocol=message.get("subprotocol"), headers=message.get("headers", ()))
        elif kind == "websocket.close":
            self._refuse(403)
        elif kind == "websocket.http.response.start":
            self._response = {**message, "body": b""}
        else:
            raise RuntimeError(f"{kind} is out of place before the handshake is answered")

    def _refuse(self, status: int, body: bytes = b"", headers: Headers = ()) -> None:
        self._wire.refuse(http_response(status, body, [*headers, *self.headers], self._server_state.default_headers))
        self.disconnected(ABNORMAL_CLOSURE)

    def _error_response(self, status: int, message: str, headers: Headers = ()) -> bytes:
        return error_response(status, message, "connection", headers, self._server_state.default_headers)

    # --- called by the wire

    def is_waiting(self) -> bool:
        """Whether the app has taken all messages and waits for the next."""
        return self._wanted is not None and not self._messages

    def is_full(self) -> bool:
        """Whether so much waits for the app that nothing more is to be read."""
        return len(self._messages) >= MAX_QUEUED_MESSAGES

    def received(self, message: str | bytes) -> None:
        self._put({"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message})
        if self.is_full():
            self._wire.pause_reading()

    def broken(self, error: FrameError) -> None:
        """Hear that nothing more can be read; when the app wants more, the connection fails."""
        self._error = error

    def disconnected(self, code: int, reason: str = "") -> None:
        self._put({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.drained()

    def _put(self, message: Message) -> None:
        self._messages.append(message)
        if self._wanted is not None:
            self._wanted.set()
            self._wanted = None

    def drained(self) -> None:
        if self._drained is not None:
            self._drained.set()
            self._drained = None
