"""The fast path: a WebSocket protocol class that uvicorn takes through its public `ws=` setting.

Owns the handshake and the transport of one connection. Knows frames, ASGI and nothing of the Hub.

An app that finds "notifyd.wire" in `scope["extensions"]` has the `Connection` of connection.py: it calls accept()
or close() on it and returns, and the connection lives on without any task, queue or timer of its own. Any other
app is served with the standard `receive` and `send`.

1. The state goes forward only. Only `_become` changes it, and `writable` is true only while it is OPEN.
2. What only the handshake or an ASGI app needs is in `_Session`, and is let go as soon as the app has taken over.
3. A close always says goodbye: the close frame is written, then the peer's is waited for. Until that or the
   deadline the transport goes on reading, because closing with unread data would reset the connection and
   destroy the goodbye on its way.
4. Reading goes on while an app is slow, up to MAX_QUEUED_MESSAGES.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import logging
from collections import deque
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote

from starlette.types import Message, Scope
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from connection import CLOSE_DEADLINE_SECONDS, PROBE_EXTENSION, WIRE_EXTENSION, ConnectionState, Receiver
from frames import BINARY, CLOSE, PING, PONG, FrameError, FrameParser, close_code, close_frame, frame
from schemas import GOING_AWAY, INTERNAL_ERROR, INVALID_DATA, NORMAL_CLOSURE, encode, error_body

logger = logging.getLogger("notifyd.wire")

MAX_QUEUED_MESSAGES = 32
MAX_EARLY_BYTES = 65_536
# After a broken protocol no goodbye can be understood: the peer gets this long to read ours.
LINGER_SECONDS = 1.0
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3
_PING_FRAME = frame(b"", PING)

CONNECTING, OPEN, CLOSING, CLOSED = ConnectionState


class HandshakeError(Exception):
    """The opening handshake is not what RFC 6455 section 4.2.1 asks for."""

    def __init__(self, message: str, status: int = 400, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class WireProtocol(asyncio.Protocol):
    """One connection, from its handshake to its end. It is a `Connection` for the Hub."""

    __slots__ = (
        "_config",
        "_deadline",
        "_parser",
        "_receiver",
        "_server_state",
        "_session",
        "_transport",
        "state",
        "writable",
    )

    hears_pongs = True
    is_stream = False

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        self._config = config
        self._server_state = server_state
        self._session: _Session | None = _Session(self, app_state)
        self._parser: FrameParser | None = None
        self._receiver: Receiver | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self.state = CONNECTING
        self.writable = False

    def _become(self, state: ConnectionState) -> None:
        assert state > self.state, f"{self.state!r} to {state!r}"
        self.state = state
        self.writable = state is OPEN

    # --- what uvicorn and the transport tell us

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        # The kernel's buffer is the backlog that a client may have: with a high-water mark of 0 the transport
        # says that it is full as soon as the kernel takes no more.
        self._transport.set_write_buffer_limits(high=0)
        self._server_state.connections.add(self)
        if self._session is not None:
            self._session.take_over_from(self._transport.get_protocol())

    def data_received(self, data: bytes) -> None:
        if self._parser is not None:
            if self._receiver is not None:
                self._receiver.heard()
            self._read(self._parser, data)
        elif self._session is not None:
            self._session.handshake_data(data)

    def eof_received(self) -> None:
        # Returning None closes the transport, but not before everything is written: a peer that half-closes and
        # reads nothing must not keep it.
        self._end_by(CLOSE_DEADLINE_SECONDS)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = self.state is OPEN
        if self._session is not None:
            self._session.drained()
        elif self.writable and self._receiver is not None:
            self._receiver.drained()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._server_state.connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self.state is not CLOSED:
            self._become(CLOSED)
        if self._session is not None:
            self._session.disconnected(1006)
        receiver, self._receiver, self._parser = self._receiver, None, None
        if receiver is not None:
            receiver.left()

    def shutdown(self) -> None:
        """Hear from uvicorn that the server ends."""
        if self.state < CLOSING:
            self.close(GOING_AWAY, "Server shutting down")
        self._transport.close()
        self._end_by(LINGER_SECONDS)

    # --- the Connection that the Hub has

    def accept(
        self,
        receiver: Receiver | None,
        greeting: bytes = b"",
        subprotocol: str | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        session = self._session
        assert session is not None and self.state is CONNECTING
        # Handshake and greeting in one write: that saves a system call for every newcomer.
        self._transport.write(session.acceptance(subprotocol, headers) + greeting)
        self._parser = FrameParser(self._config.ws_max_size)
        self._become(OPEN)
        if receiver is not None:
            self._receiver = receiver
            self._session = None
        if early := session.early_data():
            asyncio.get_running_loop().call_soon(self.data_received, early)
            self.resume_reading()

    def write(self, frames: bytes) -> None:
        if self.state is OPEN:
            self._transport.write(frames)

    def buffered(self) -> int:
        return self._transport.get_write_buffer_size()

    def ping(self) -> None:
        self.write(_PING_FRAME)

    def close(self, code: int, reason: str = "") -> None:
        if self.state is CONNECTING:
            self.accept(_NOBODY)
        if self.state is OPEN:
            self._become(CLOSING)
            self._transport.write(close_frame(code, reason))
            self._end_by(CLOSE_DEADLINE_SECONDS)

    # --- what its session asks for

    def is_served_by(self, session: _Session) -> bool:
        """Whether no receiver has taken over, and the connection has not begun to end."""
        return self._session is session and self.state in (CONNECTING, OPEN)

    def refuse(self, response: bytes) -> None:
        """Answer the handshake over HTTP."""
        self._become(CLOSING)
        self._transport.write(response)
        self._linger()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # --- reading

    def _read(self, parser: FrameParser, data: bytes) -> None:
        pongs: list[bytes] = []
        try:
            for opcode, payload in parser.feed(data):
                if opcode == PING:
                    pongs.append(frame(payload, PONG))  # type: ignore[arg-type]
                elif opcode == CLOSE:
                    self._closed_by_peer(payload, pongs)  # type: ignore[arg-type]
                    return
                elif opcode != PONG and self.state is OPEN:
                    self._write_pongs(pongs)
                    self._deliver(payload)
        except FrameError as error:
            self._fail(error)
        else:
            self._write_pongs(pongs)

    def _write_pongs(self, pongs: list[bytes]) -> None:
        """Answer the pings so far in one write; one that reads nothing gets no more of them."""
        if pongs and self.writable:
            self._transport.write(b"".join(pongs))
        pongs.clear()

    def _deliver(self, message: str | bytes) -> None:
        if self._receiver is not None:
            self._receiver.received(message)
        elif self._session is not None:
            self._session.received(message)

    def _closed_by_peer(self, payload: bytes, pongs: list[bytes]) -> None:
        code = close_code(payload)
        self._write_pongs(pongs)
        self._parser = None
        if self._session is not None:
            self._session.disconnected(code)
        if self.state is OPEN:
            self._become(CLOSING)
            self._transport.write(close_frame(code))
        self._transport.close()
        self._end_by(CLOSE_DEADLINE_SECONDS)

    def _fail(self, error: FrameError) -> None:
        """Fail the connection (RFC 6455, section 7.1.7): say why, and read on until the peer has ended its side."""
        self._parser = None
        if self._session is not None:
            self._session.disconnected(error.code)
        if self.state is OPEN:
            self._become(CLOSING)
            self._transport.write(close_frame(error.code, str(error)))
        self._linger()

    def _linger(self) -> None:
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()
        self._end_by(LINGER_SECONDS)

    def _end_by(self, seconds: float) -> None:
        """Abort after this long, unless the connection has ended by then."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self.state is not CLOSED:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self._transport.abort)


class _Nobody:
    """The receiver of a connection that was accepted only to be told why it is refused."""

    def heard(self) -> None: ...
    def received(self, message: str | bytes) -> None: ...
    def drained(self) -> None: ...
    def left(self) -> None: ...


_NOBODY = _Nobody()


def accept_key(key: bytes) -> bytes:
    """Return Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455, section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())


def check_handshake(method: str, headers: dict[bytes, bytes]) -> bytes:
    """Return the key of an opening handshake. Raises HandshakeError for what RFC 6455, section 4.2.1 forbids."""
    if method != "GET":
        raise HandshakeError("A WebSocket handshake is a GET request")
    if headers.get(b"sec-websocket-version") != b"13":
        raise HandshakeError("Sec-WebSocket-Version must be 13", 426, ((b"sec-websocket-version", b"13"),))
    key = headers.get(b"sec-websocket-key", b"")
    try:
        valid = len(base64.b64decode(key, validate=True)) == 16
    except binascii.Error:
        valid = False
    if not valid:
        raise HandshakeError("Sec-WebSocket-Key must be 16 bytes in base64")
    return key


def http_response(status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a whole HTTP/1.1 response after which the connection is closed."""
    phrase = HTTPStatus(status).phrase.encode() if status in HTTPStatus._value2member_map_ else b""
    lines = [b"HTTP/1.1 %d %s" % (status, phrase), *(b"%s: %s" % header for header in headers)]
    names = {name.lower() for name, _ in headers}
    if b"content-length" not in names:
        lines.append(b"content-length: %d" % len(body))
    return b"\r\n".join([*lines, b"connection: close", b"", body])


def refused_response(error: HandshakeError) -> bytes:
    body = encode(error_body(str(error), "connection"))
    return http_response(error.status, body, ((b"content-type", b"application/json"), *error.headers))


class _Session:
    """What one connection needs for its handshake, and to serve an app that uses the standard receive and send."""

    __slots__ = (
        "_app_state",
        "_drained",
        "_early",
        "_key",
        "_messages",
        "_peer",
        "_protocol",
        "_response",
        "_wanted",
    )

    def __init__(self, protocol: WireProtocol, app_state: dict[str, Any]) -> None:
        self._protocol = protocol
        self._app_state = app_state
        self._peer: tuple[Any, Any, str] = (None, None, "ws")
        self._key = b""
        self._early = bytearray()
        self._messages: deque[Message] = deque()
        self._wanted: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._response: Message | None = None

    # --- the handshake

    def take_over_from(self, http: Any) -> None:
        """Take what uvicorn's HTTP protocol knows of the peer."""
        scheme = "wss" if getattr(http, "scheme", "") == "https" else "ws"
        self._peer = (getattr(http, "server", None), getattr(http, "client", None), scheme)
        if getattr(http, "parser", None) is not None:
            # The parser and its protocol refer to each other. Cut, they go now and need no collector.
            http.parser = None

    def handshake_data(self, data: bytes) -> None:
        """Take the request, which uvicorn hands over whole, and then whatever an eager client sends after it."""
        if self._key:
            self._early += data
            if len(self._early) > MAX_EARLY_BYTES:
                self._protocol.pause_reading()
            return
        try:
            scope = self._read_request(data)
        except HandshakeError as error:
            self._protocol.refuse(refused_response(error))
            return
        protocol = self._protocol
        task = asyncio.get_running_loop().create_task(self._run(scope))
        protocol._server_state.tasks.add(task)
        task.add_done_callback(protocol._server_state.tasks.discard)

    def early_data(self) -> bytes:
        return bytes(self._early)

    def _read_request(self, data: bytes) -> Scope:
        request, *lines = data.partition(b"\r\n\r\n")[0].split(b"\r\n")
        method, target, _ = request.decode("latin-1").split(" ", 2)
        headers = []
        for line in lines:
            name, _, value = line.partition(b":")
            headers.append((name.lower(), value.strip()))
        self._key = check_handshake(method, dict(headers))
        path, _, query = target.partition("?")
        config = self._protocol._config
        server, client, scheme = self._peer
        offered = b",".join(value for name, value in headers if name == b"sec-websocket-protocol").decode("latin-1")
        return {
            "type": "websocket",
            "asgi": {"version": config.asgi_version, "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": scheme,
            "server": server,
            "client": client,
            "root_path": config.root_path,
            "path": config.root_path + (unquote(path) if "%" in path else path),
            "raw_path": (config.root_path + path).encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "headers": headers,
            "subprotocols": [name.strip() for name in offered.split(",") if name.strip()],
            "state": self._app_state.copy(),
            "extensions": {"websocket.http.response": {}, WIRE_EXTENSION: self._protocol},
        }

    def acceptance(self, subprotocol: str | None, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Return the response that completes the handshake (RFC 6455, section 4.2.2)."""
        lines = [
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade",
            b"Sec-WebSocket-Accept: " + accept_key(self._key),
        ]
        if subprotocol is not None:
            lines.append(b"Sec-WebSocket-Protocol: " + subprotocol.encode("latin-1"))
        lines.extend(b"%s: %s" % header for header in headers)
        return b"\r\n".join([*lines, b"", b""])

    # --- an app that uses receive and send

    async def _run(self, scope: Scope) -> None:
        self._messages.append({"type": "websocket.connect"})
        protocol = self._protocol
        code = NORMAL_CLOSURE
        try:
            await protocol._config.loaded_app(scope, self._receive, self._send)
        except OSError:
            logger.debug("A peer left while its app was sending")
        except Exception:
            logger.exception("Unexpected error in the app of a WebSocket")
            code = INTERNAL_ERROR
        if protocol.is_served_by(self):
            if protocol.state is CONNECTING:
                body = encode(error_body("Internal server error", "connection"))
                protocol.refuse(http_response(500, body, ((b"content-type", b"application/json"),)))
            else:
                protocol.close(code)

    async def _receive(self) -> Message:
        while not self._messages:
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted
        message = self._messages.popleft()
        if not self._messages:
            self._protocol.resume_reading()
        return message

    async def _send(self, message: Message) -> None:
        kind, protocol = message["type"], self._protocol
        while not protocol.writable and protocol.state is OPEN:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
        if kind == "websocket.accept" and protocol.state is CONNECTING:
            protocol.accept(None, subprotocol=message.get("subprotocol"), headers=message.get("headers", ()))
        elif kind == "websocket.send" and protocol.state is OPEN:
            text = message.get("text")
            protocol.write(frame(message["bytes"], BINARY) if text is None else frame(text.encode()))
        elif kind == "websocket.close" and protocol.state is CONNECTING:
            protocol.refuse(http_response(403, b"", ()))
        elif kind == "websocket.close" and protocol.state is OPEN:
            protocol.close(message.get("code", NORMAL_CLOSURE), message.get("reason") or "")
            self.disconnected(message.get("code", NORMAL_CLOSURE))
        elif kind == "websocket.http.response.start" and protocol.state is CONNECTING:
            self._response = {**message, "body": b""}
        elif kind == "websocket.http.response.body" and self._response is not None:
            self._response["body"] += message.get("body", b"")
            if not message.get("more_body", False):
                response, self._response = self._response, None
                protocol.refuse(http_response(response["status"], response["body"], response.get("headers", ())))
        elif protocol.state >= CLOSING:
            raise OSError("The WebSocket is closed")
        else:
            raise RuntimeError(f"{kind} is out of place while the connection is {protocol.state.name.lower()}")

    def received(self, message: str | bytes) -> None:
        self._put({"type": "websocket.receive", "text" if isinstance(message, str) else "bytes": message})
        if len(self._messages) >= MAX_QUEUED_MESSAGES:
            self._protocol.pause_reading()

    def disconnected(self, code: int) -> None:
        self._put({"type": "websocket.disconnect", "code": code})
        self.drained()

    def _put(self, message: Message) -> None:
        self._messages.append(message)
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def drained(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)


class StandardProtocol(WebSocketsSansIOProtocol):
    """uvicorn's own class (`--wire standard`), with what ASGI leaves out: protocol pings, and pongs that count."""

    receiver: Receiver | None = None

    def handle_connect(self, event: Request) -> None:
        headers = {name.lower().encode("latin-1"): value.encode("latin-1") for name, value in event.headers.raw_items()}
        try:
            check_handshake("GET", headers)
        except HandshakeError as error:
            self.transport.write(refused_response(error))
            self.transport.close()
            return
        super().handle_connect(event)
        if self.response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            extensions = cast("dict[str, Any]", self.scope["extensions"])
            extensions[PROBE_EXTENSION] = self

    def data_received(self, data: bytes) -> None:
        if self.receiver is not None:
            self.receiver.heard()
        super().data_received(data)

    def send_receive_event_to_app(self) -> None:
        """Refuse bad UTF-8 as the base class does, but without its traceback in the log."""
        try:
            if self.curr_msg_data_type == "text":
                b"".join(self.frames).decode()
        except UnicodeDecodeError:
            self.frames = []
            self.conn.fail(INVALID_DATA, "Text is not valid UTF-8")
            self.handle_parser_exception()
            return
        super().send_receive_event_to_app()

    def ping(self) -> None:
        if not self.close_sent and not self.disconnected:
            self.conn.send_ping(b"")
            self.transport.write(b"".join(self.conn.data_to_send()))

    def abort(self) -> None:
        self.transport.abort()
