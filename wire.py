"""The fast path: a WebSocket protocol class that uvicorn takes through its public `ws=` setting.

Owns the transport of one connection, from its handshake to its end. Knows frames and nothing of the Hub.

An app that finds "notifyd.wire" in `scope["extensions"]` has the `Connection` of connection.py: it calls accept()
or close() on it and returns, and the connection lives on without any task, queue or timer of its own. Any other
app is served with the standard `receive` and `send`, by wire_session.py.

1. The state goes forward only. Only `_become` changes it, and `writable` is true only while it is OPEN.
2. State for the handshake or an ASGI app alone is in the `Session`, which is dropped when the app takes over.
3. A close always sends a close frame and waits for the peer's: the transport goes on reading until the peer has ended
   its side or a deadline has passed, even if an app has left messages unread. Closing with unread data would reset
   the connection, and destroy the close frame on its way.
4. When nothing more can be read, `_parser` is None and later bytes are dropped.
5. Every ping gets its pong: if the transport is full, the pong follows when it has drained.
6. Per iteration of the event loop, read at most TURN_BYTES plus the rest of the current payload, and inflate at most
   TURN_BYTES plus one message, so that a flooding peer cannot starve the others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from connection import CLOSE_DEADLINE_SECONDS, OTHER_FORM, TURN_BYTES, ConnectionState, Receiver
from log import frame
from schemas import GOING_AWAY
from wire_deflate import InflatingParser, agree, deflated
from wire_frames import CLOSE, PING, PONG, FrameError, FrameParser, close_frame, read_close
from wire_handshake import Handshake, acceptance
from wire_message import Headers, Peer, RequestParser, peer_of
from wire_session import ABNORMAL_CLOSURE, Session

# Once both have said goodbye, or no goodbye can be understood, the peer gets this long to end its side.
LINGER_SECONDS = 1.0
_PING_FRAME = frame(b"", PING)

CONNECTING, OPEN, CLOSING, CLOSED = ConnectionState


class WireProtocol(asyncio.Protocol):
    """One connection, from its handshake to its end. It is a `Connection` for the Hub."""

    __slots__ = (
        "_app_state",
        "_config",
        "_deadline",
        "_descriptor",
        "_is_held",
        "_parser",
        "_receiver",
        "_server_state",
        "_transport",
        "_unanswered",
        "_unread",
        "session",
        "state",
        "writable",
        "write",
    )

    hears_pongs = True
    is_stream = False

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: object = None
    ) -> None:
        self._config = config
        self._server_state = server_state
        self._app_state = app_state
        # Until an app has taken over, or the connection has ended.
        self.session: Session | None = None
        self._parser: FrameParser | None = None
        self._receiver: Receiver | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        # The last ping that came while nothing could be written. It answers for those before it (section 5.5.3).
        self._unanswered: bytes | None = None
        # Bytes that have arrived, to be read in a later iteration of the event loop.
        self._unread = b""
        self._is_held = False
        self._descriptor = -1
        self.state = CONNECTING
        self.writable = False
        # The transport's own method: a call less for each delivery. The Hub writes only while `writable` is true.
        self.write: Callable[[bytes], None]

    def _become(self, state: ConnectionState) -> None:
        assert state > self.state, f"{self.state!r} to {state!r}"
        self.state = state
        self._set_writable(state is OPEN)

    def _set_writable(self, writable: bool) -> None:
        # The transport closes its descriptor only after connection_lost(), so the receiver can never hold one that
        # is somebody else's by now.
        self.writable = writable
        if self._receiver is not None:
            self._receiver.descriptor = self._descriptor if writable else -1

    # --- called by uvicorn and the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.write = self._transport.write
        # The kernel's buffer is the backlog that a client may have: the transport says that it is full as soon as
        # the kernel takes no more. Only so may the Hub write past it: while it is writable, it holds nothing.
        plain = self._transport.get_extra_info("sslcontext") is None
        # The handshake's answer must not overtake the rest of an HTTP response before it.
        past = plain and not self._transport.get_write_buffer_size()
        self._descriptor = self._transport.get_extra_info("socket").fileno() if past else -1
        # A TLS transport would take an empty buffer for a full one at 0.
        self._transport.set_write_buffer_limits(high=0 if plain else 1)
        self._server_state.connections.add(self)  # type: ignore[arg-type]
        self.session = Session(self, self._config, self._server_state, self._app_state)

    def take_over(self, transport: asyncio.Transport, request: RequestParser, peer: Peer, handshake: Handshake) -> None:
        """Serve a connection after wire_http.py has read and checked its handshake."""
        self.connection_made(transport)
        assert self.session is not None
        self.session.begin(request, peer, handshake)

    def data_received(self, data: bytes) -> None:
        if self._parser is not None:
            # Payload costs next to nothing, heads do: of a large message nothing is put off but its first bytes.
            allowed = TURN_BYTES + self._parser.payload_to_come()
            if len(data) > allowed:
                self._put_off(data[allowed:])
                data = data[:allowed]
            if self._receiver is not None:
                self._receiver.heard()
            self._read(self._parser, data)
        elif self.state is CONNECTING and self.session is not None:
            self.session.received_early(data)

    def eof_received(self) -> None:
        # Returning None closes the transport, but not before everything is written: a peer that half-closes and
        # reads nothing must not keep it.
        if self.state < CLOSING:
            self._become(CLOSING)
        self._end_by(CLOSE_DEADLINE_SECONDS)
        self._told_end(ABNORMAL_CLOSURE)

    def pause_writing(self) -> None:
        self._set_writable(False)

    def resume_writing(self) -> None:
        self._set_writable(self.state is OPEN)
        if self.writable and self._unanswered is not None:
            self._transport.write(frame(self._unanswered, PONG))
            self._unanswered = None
        if self.session is not None:
            self.session.drained()
        elif self.writable and self._receiver is not None:
            # A peer that takes its data is alive.
            self._receiver.heard()
            self._receiver.drained()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._server_state.connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self.state is not CLOSED:
            self._become(CLOSED)
        self._told_end(ABNORMAL_CLOSURE)

    def shutdown(self) -> None:
        """Hear from uvicorn that the server ends."""
        if self.state < CLOSING:
            session = self.session
            self.close(GOING_AWAY, "Server shutting down")
            if session is not None:
                session.disconnected(GOING_AWAY, "Server shutting down")
        self._end_by(LINGER_SECONDS)

    # --- the Connection that the Hub has

    def choose(self, subprotocol: str) -> None:
        if self.session is not None:
            self.session.subprotocol = subprotocol

    def compress(self) -> None:
        if self.session is not None and self.session.offers:
            self.session.agreement = agree(self.session.offers)

    def accept(
        self,
        receiver: Receiver | None,
        greeting: bytes = b"",
        position: str = "",  # noqa: ARG002
        subprotocol: str | None = None,
        headers: Headers = (),
    ) -> None:
        session = self.session
        assert session is not None and self.state is CONNECTING
        own_headers = self._agree(session, receiver)
        answer = acceptance(session.key, subprotocol or session.subprotocol, [*headers, *session.headers, *own_headers])
        if receiver is not None:
            self._receiver = receiver
            self.session = None
        self._become(OPEN)
        # Handshake and greeting in one write: that saves a system call for every newcomer.
        self._transport.write(answer + greeting)
        if session.early:
            # It must not be told before this has returned.
            self._put_off(session.early)

    def _agree(self, session: Session, receiver: Receiver | None) -> Headers:
        """Read as agreed from now on, and write to a receiver so; return the header that says it."""
        if session.agreement is None:
            self._parser = FrameParser(self._config.ws_max_size)
            return ()
        self._parser = InflatingParser(self._config.ws_max_size)
        # An app with the standard `send` has frames of its own kinds.
        if receiver is not None and session.agreement.takes_shared:
            self.write = self._write_deflated
            if self._descriptor >= 0:
                self._descriptor = OTHER_FORM - self._descriptor
        return ((b"sec-websocket-extensions", session.agreement.header.encode("latin-1")),)

    def _write_deflated(self, frames: bytes) -> None:
        self._transport.write(deflated(frames))

    def form(self, frames: bytes) -> bytes:
        return deflated(frames) if self._descriptor <= OTHER_FORM else frames

    def write_formed(self, data: bytes) -> None:
        self._transport.write(data)

    def buffered(self) -> int:
        return self._transport.get_write_buffer_size()

    def hold(self, *, held: bool) -> None:
        was_held, self._is_held = self._is_held, held
        if held:
            self.pause_reading()
        elif was_held and self._unread:
            asyncio.get_running_loop().call_soon(self._read_on)
        else:
            self.resume_reading()

    def is_mute(self) -> bool:
        return self._is_held

    def ping(self) -> None:
        if self.state is OPEN:
            self._transport.write(_PING_FRAME)

    def close(self, code: int, reason: str = "") -> None:
        if self.state is CONNECTING:
            self.accept(_NOBODY)
        if self.state is OPEN:
            self._say_goodbye(code, reason)
            if self._parser is None:
                self._linger()
            else:
                self.hold(held=False)
                self._end_by(CLOSE_DEADLINE_SECONDS)

    def tell(self, headers: Headers) -> None:
        """Have these headers in the answer to the handshake."""
        if self.session is not None:
            self.session.headers = headers

    # --- called by its session

    def peer(self) -> Peer:
        return peer_of(self._transport)

    def refuse(self, response: bytes) -> None:
        """Answer the handshake over HTTP."""
        self._become(CLOSING)
        self._transport.write(response)
        self._linger()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        # Bytes that have arrived already come first; then this is called again.
        if not self._unread and not self._is_held and not self._transport.is_closing():
            self._transport.resume_reading()

    # --- reading

    def _put_off(self, data: bytes) -> None:
        """Read this in the next iteration of the event loop, and nothing before it."""
        self._unread = data
        self.pause_reading()
        asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._is_held or not self._unread:
            return
        data, self._unread = self._unread, b""
        # After its close frame it reads on until the peer's, even if an app has left messages unread.
        if self.session is None or self.state is not OPEN or not self.session.is_full():
            self.resume_reading()
        self.data_received(data)

    def _read(self, parser: FrameParser, data: bytes) -> None:
        pings: list[bytes] = []
        try:
            for opcode, payload in parser.feed(data):
                if opcode == PING:
                    pings.append(payload)  # type: ignore[arg-type]
                elif opcode == CLOSE:
                    self._send_pongs(pings)
                    self._closed_by_peer(payload)  # type: ignore[arg-type]
                    return
                elif opcode != PONG and self.state is OPEN:
                    self._send_pongs(pings)
                    self._deliver(payload)
        except FrameError as error:
            self._send_pongs(pings)
            self._broken(error)
        else:
            self._send_pongs(pings)
            if (rest := parser.put_off()) and self._parser is not None:
                if self._unread:
                    # Read on in the next iteration already.
                    self._unread = rest + self._unread
                else:
                    self._put_off(rest)

    def _send_pongs(self, pings: list[bytes]) -> None:
        """Answer the pings so far in one write; while nothing can be written, only the last is kept."""
        if pings and self.writable:
            self._transport.write(b"".join([frame(ping, PONG) for ping in pings]))
        elif pings and self.state is OPEN:
            self._unanswered = pings[-1]
        pings.clear()

    def _deliver(self, message: str | bytes) -> None:
        if self._receiver is not None:
            self._receiver.received(message)
        elif self.session is not None:
            self.session.received(message)

    # --- the end

    def _closed_by_peer(self, payload: bytes) -> None:
        code, reason = read_close(payload)
        self._parser = None
        if self.state is OPEN:
            self._say_goodbye(code)
        self._linger()
        self._told_end(code, reason)

    def _broken(self, error: FrameError) -> None:
        """Read no more; fail at once, unless an app is still busy with earlier messages."""
        self._parser = None
        if self.state is OPEN and self.session is not None and not self.session.is_waiting():
            self.session.broken(error)
            self.resume_reading()
            self._set_deadline(LINGER_SECONDS, self.fail, error)
        else:
            self.fail(error)

    def fail(self, error: FrameError) -> None:
        """Fail the connection (RFC 6455, section 7.1.7): say why, and end."""
        if self.state is OPEN:
            self._say_goodbye(error.code, str(error))
        self._linger()
        self._told_end(error.code, str(error))

    def _say_goodbye(self, code: int, reason: str = "") -> None:
        goodbye = close_frame(code, reason)
        self._become(CLOSING)
        self._transport.write(goodbye)

    def _told_end(self, code: int, reason: str = "") -> None:
        """Tell the receiver or the session once that the connection is over."""
        self._parser = None
        session, self.session = self.session, None
        receiver, self._receiver = self._receiver, None
        if session is not None:
            session.disconnected(code, reason)
        if receiver is not None:
            receiver.left()

    def _linger(self) -> None:
        """End our side, and wait for the peer to end its own."""
        self.hold(held=False)
        if self._transport.can_write_eof():
            # Where the peer has just reset the connection, asyncio lets the system's error through.
            with contextlib.suppress(OSError):
                self._transport.write_eof()
        else:
            # TLS has no half-close; its transport goes on reading by itself until both have ended.
            self._transport.close()
        self._end_by(LINGER_SECONDS)

    def _end_by(self, seconds: float) -> None:
        """Abort after this long, unless the connection has ended by then."""
        self._set_deadline(seconds, self._transport.abort)

    def _set_deadline(self, seconds: float, action: Callable[..., None], *args: object) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self.state is not CLOSED:
            self._deadline = asyncio.get_running_loop().call_later(seconds, action, *args)


class _Nobody:
    """The receiver of a connection that was accepted only to be told why it is refused."""

    descriptor = -1

    def heard(self) -> None: ...
    def received(self, message: str | bytes) -> None: ...
    def drained(self) -> None: ...
    def left(self) -> None: ...


_NOBODY = _Nobody()
