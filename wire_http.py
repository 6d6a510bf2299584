"""HTTP/1.1 for uvicorn's public `http=` setting: one connection, from its first byte to its last.

Owns the transport, the order of requests, how long each may take to arrive, and how a connection ends. The form of a
request is wire_message.py's, the response wire_exchange.py's, and the contents of a body bodies.py's.

1. One request is read at a time: the parser gets no byte of the next before the last is answered.
2. A request is answered once, by the app or here; a connection on which no byte came is closed without an answer.
3. In one iteration of the event loop a connection reads TURN_BYTES at most, but for bodies of known length, which cost
   next to nothing: in heads and chunks each line has its price.
4. No answer is lost: where the peer may still be sending, its data is read for a while after the last of ours. Closing
   with unread data would reset the connection, and destroy the answer on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fcntl
import sys
import termios
from functools import partial
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from connection import REPEAT_EXTENSION, STREAM_EXTENSION, TIME_EXTENSION, TURN_BYTES
from errors import Category
from schemas import GOING_AWAY
from wire import WireProtocol
from wire_exchange import COMPLETE, AnswerAtOnce, Exchange, Repeat, error_response
from wire_handshake import check_handshake
from wire_message import BLANK_LINE, MAX_HEAD_BYTES, Headers, Peer, RequestError, RequestParser, peer_of

# From the first byte of a request to its last.
REQUEST_SECONDS = 10.0
# A response is given up on when its peer has taken nothing for so long.
STALLED_SECONDS = 30.0
# Bytes behind the last answer are read for so long, and up to this size.
LINGER_SECONDS = 1.0
LINGER_BYTES = 1_048_576
# Behind a request that is under way, or of its body, so much waits here; the rest in the kernel, and with the peer.
MAX_WAITING_BYTES = 65_536


class Phase(enum.IntEnum):
    """The part of a request that has arrived."""

    IDLE = 0
    HEAD = 1
    BODY = 2
    WHOLE = 3
    # The response is a stream and has taken the connection over.
    STREAM = 4
    # The last answer has been written.
    ENDED = 5
    # The connection is the WebSocket's.
    UPGRADED = 6


IDLE, HEAD, BODY, WHOLE, STREAM, ENDED, UPGRADED = Phase


class HttpProtocol(asyncio.Protocol):
    """One HTTP connection; a handshake makes it a WebSocket. It writes no access log."""

    __slots__ = (
        "_app_state",
        "_config",
        "_deadline",
        "_dropped",
        "_exchange",
        "_goes_on",
        "_idle_since",
        "_idle_timer",
        "_loop",
        "_peer",
        "_phase",
        "_repeat",
        "_repeats",
        "_searched",
        "_stalled",
        "_unread",
        "is_full",
        "is_paused",
        "parser",
        "peer_has_ended",
        "server_state",
        "transport",
    )

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        repeats: bool = False,
    ) -> None:
        """With `repeats` the app is known to have no other app before it, and is offered to answer repeats at once."""
        if not config.loaded:
            config.load()
        self._config = config
        self.server_state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self._peer: Peer = None  # type: ignore[assignment]
        self.parser: RequestParser = None  # type: ignore[assignment]
        self._phase = IDLE
        # The last request with its response; it may be over.
        self._exchange: Exchange | None = None
        self._repeats = repeats and config.limit_concurrency is None
        self._repeat: Repeat | None = None
        # Bytes that have arrived and are not parsed yet, and the length of their beginning without a blank line.
        self._unread = b""
        self._searched = 0
        # Whether the parser is given more in the next iteration of the event loop.
        self._goes_on = False
        self.is_paused = False
        # Whether the transport holds bytes that the kernel has not taken.
        self.is_full = False
        self.peer_has_ended = False
        self._idle_since = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._dropped = 0

    # --- called by the transport and uvicorn

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._peer = peer_of(transport)
        self.parser = RequestParser()
        # Empty or not: so it is known when the peer has been sent everything. A TLS transport would take an empty
        # buffer for a full one at 0.
        self.transport.set_write_buffer_limits(high=1 if self._peer.is_secure else 0)
        self.server_state.connections.add(self)  # type: ignore[arg-type]
        self._be_idle()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.server_state.connections.discard(self)
        self._let_go()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.lose()

    def _let_go(self) -> None:
        for timer in (self._idle_timer, self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()
        self._idle_timer = self._deadline = self._stalled = None

    def data_received(self, data: bytes) -> None:
        if self._phase > WHOLE:
            self._drop(data)
            return
        self._unread = self._unread + data if self._unread else data
        if not self._goes_on:
            self._read_on()

    def eof_received(self) -> bool:
        self.peer_has_ended = True
        if self._phase is not WHOLE or self._peer.is_secure:
            # The transport closes when all is written.
            return False
        # The peer has asked, and may read on. To an app that waits for its end, this is the end.
        assert self._exchange is not None
        self._exchange.change()
        return True

    def pause_writing(self) -> None:
        self.is_full = True
        exchange = self._exchange
        # The peer of a stream may take its time: the Hub has its rule for that.
        if exchange is None or exchange.stream is None:
            self._watch()

    def resume_writing(self) -> None:
        self.is_full = False
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        if self._exchange is not None:
            self._exchange.change()
        if self._phase is ENDED:
            self._linger()

    def shutdown(self) -> None:
        """Hear from uvicorn that the server ends."""
        exchange = self._exchange
        if self._phase in (HEAD, BODY):
            # The rest may never come, and a handler that waits for it would hold up the end.
            self.refuse(503, "Server shutting down", "system")
        elif self._phase is WHOLE and exchange is not None:
            exchange.keeps_alive = False
        elif self._phase is STREAM and exchange is not None and exchange.stream is not None:
            exchange.stream.close(GOING_AWAY, "Server shutting down")
        elif self._phase is IDLE:
            self._close()

    # --- reading

    def _read_on(self) -> None:
        """Parse the bytes that have arrived, as far as this iteration allows."""
        allowed, start = TURN_BYTES, 0
        # Taken, so that nothing is parsed twice where an app runs at once (asyncio.eager_task_factory).
        data, self._unread = self._unread, b""
        if self._repeat is not None and self._phase <= HEAD and not self.is_full:
            start = self._answer_repeats(self._repeat, data)
            if start == len(data) and not (self.peer_has_ended or self.is_paused):
                return
            allowed -= start
        try:
            while start < len(data) and allowed > 0 and self._phase < WHOLE:
                is_sized = self._phase is BODY and self.parser.body_left > 0
                end = self._read_body(data, start) if self._phase is BODY else self._read_head(data, start)
                if end == start:
                    break
                allowed -= 0 if is_sized else end - start
                start = end
        except RequestError as error:
            self._unread = data[start:]
            category: Category = (
                "connection" if self.parser.is_upgrade else "system" if error.status == 503 else "validation"
            )
            self.refuse(error.status, str(error), category, error.headers)
        if self._phase > WHOLE:
            return
        self._unread = data[start:]
        if self._phase is not WHOLE or self._deadline is not None:
            self.time_request()
        if allowed <= 0 and self._unread and self._phase < WHOLE:
            self._goes_on = True
            self._loop.call_soon(self._go_on)
        elif self.peer_has_ended and self._phase < WHOLE:
            if self._exchange is not None:
                # Half a request is not answered.
                self._exchange.lose()
            self._end_our_side()
        if self._unread or self.is_paused or len(self.parser.body) > MAX_WAITING_BYTES:
            self.pace()

    def _answer_repeats(self, repeat: Repeat, data: bytes) -> int:
        """Answer the requests that repeat at the beginning, as far as this iteration allows; return where they end."""
        end, responses = repeat.answers(data, TURN_BYTES, self.server_state.default_headers)
        if responses:
            self.server_state.total_requests += len(responses)
            self.transport.write(b"".join(responses))
            self._searched = 0
            self._be_idle()
        return end

    def _go_on(self) -> None:
        self._goes_on = False
        if self._phase < WHOLE and not self.transport.is_closing():
            self._read_on()

    def _read_head(self, data: bytes, start: int) -> int:
        """Begin the next request if its head is there, and return where it ends."""
        if data.startswith(b"\r\n", start):
            # An empty line between requests (RFC 9112, section 2.2).
            self._phase = IDLE
            if self._idle_timer is None:
                # It fired between CR and LF.
                self._be_idle()
            return start + 2
        self._phase = HEAD
        if self._repeat is not None and self._repeat.awaits_body(data, start):
            return start
        end = data.find(BLANK_LINE, start + self._searched) + len(BLANK_LINE)
        is_whole = end >= len(BLANK_LINE)
        if (end if is_whole else len(data)) - start > MAX_HEAD_BYTES:
            raise RequestError(f"request head: larger than the limit of {MAX_HEAD_BYTES} bytes", 431)
        if not is_whole:
            check_beginning(data, start)
            self._searched = max(0, len(data) - start - len(BLANK_LINE) + 1)
            return start
        self._searched = 0
        return self._begin(data, start, end)

    def _begin(self, data: bytes, start: int, end: int) -> int:
        """Read a head, and have the app answer its request; return how far it was read."""
        config, tasks, parser = self._config, self.server_state.tasks, self.parser
        read = parser.read(data, start, end)
        if parser.is_upgrade and config.ws_protocol_class is not None:
            self._upgrade(data[start:end], data[read:])
            return read
        limit = config.limit_concurrency
        if limit is not None and max(len(tasks), len(self.server_state.connections)) >= limit:
            raise RequestError("Exceeded concurrency limit", 503)
        self._phase = WHOLE if parser.is_complete else BODY
        scope = parser.scope("http", self._peer, config.root_path, self._app_state)
        scope["method"] = parser.method.decode("ascii")
        has_answered = self._exchange is not None and parser.keeps_alive and end - start <= TURN_BYTES
        exchange = self._exchange = Exchange(self)
        scope["extensions"] = {STREAM_EXTENSION: exchange.be_taken_by, TIME_EXTENSION: exchange.keep_time}
        # From the second request on: a connection for a single request remembers no head.
        if has_answered and self._repeats and parser.body and parser.is_complete and not parser.expects_continue:
            scope["extensions"][REPEAT_EXTENSION] = partial(self._remember, data[start:end])
        task = self._loop.create_task(exchange.run(config.loaded_app, scope))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return read

    def _remember(self, head: bytes, answer: AnswerAtOnce) -> None:
        self._repeat = Repeat(head, answer)

    def _read_body(self, data: bytes, start: int) -> int:
        exchange, parser = self._exchange, self.parser
        assert exchange is not None
        end = parser.read_body(data, start, TURN_BYTES)
        is_over = exchange.state >= COMPLETE
        if is_over:
            parser.body = b""
        if parser.is_complete:
            self._phase = WHOLE
            if is_over and exchange.keeps_alive:
                self._be_idle()
            elif is_over:
                self._end_our_side()
        exchange.change()
        return end

    def pace(self) -> None:
        """Pause or resume reading: the bytes that wait here must not grow without bounds."""
        waits = max(len(self._unread), len(self.parser.body)) > MAX_WAITING_BYTES
        is_paused = (self._goes_on or waits) and self._phase <= WHOLE
        if is_paused != self.is_paused and not self.transport.is_closing():
            self.is_paused = is_paused
            if is_paused:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def _upgrade(self, head: bytes, early: bytes) -> None:
        """Hand the connection over to the WebSocket protocol, with the bytes of an eager client."""
        parser, transport, config = self.parser, self.transport, self._config
        handshake = check_handshake(parser)
        self._phase = UPGRADED
        self._goes_on = False
        if self.is_paused:
            self.pace()
        self.server_state.connections.discard(self)
        protocol = config.ws_protocol_class(  # type: ignore[call-arg, misc]
            config=config, server_state=self.server_state, app_state=self._app_state
        )
        transport.set_protocol(protocol)
        if isinstance(protocol, WireProtocol):
            protocol.take_over(transport, parser, self._peer, handshake)
        else:
            protocol.connection_made(transport)
            protocol.data_received(head)
        self._exchange = None
        self._let_go()
        if early:
            protocol.data_received(early)
        if self.peer_has_ended:
            # The transport says so once only.
            protocol.eof_received()
            transport.close()

    # --- called by an exchange

    def answered(self) -> None:
        """Hear that the response is complete."""
        exchange = self._exchange
        assert exchange is not None
        self.server_state.total_requests += 1
        self.parser.body = b""
        if self._phase is WHOLE and exchange.keeps_alive:
            self._be_idle()
        # A peer that sends the rest of its body before it reads, as most do, may do so until the deadline.
        elif self._phase is not BODY or exchange.expects_continue:
            self._end_our_side()
        else:
            self.time_request()
        if self._phase is IDLE and (self._unread or self.peer_has_ended):
            self._read_on()
        elif self.is_paused:
            self.pace()

    def read_no_more(self) -> None:
        """Read no more requests: a stream has taken over, and the end of the peer must be seen behind any bytes."""
        self._phase = STREAM
        self._unread = b""
        self.time_request()
        self.pace()

    # --- time

    def _be_idle(self) -> None:
        self._phase = IDLE
        self._idle_since = self._loop.time()
        if self._deadline is not None:
            # Each request has its own, also where half of the next has come already.
            self.time_request()
        if self._idle_timer is None:
            self._idle_timer = self._loop.call_later(self._config.timeout_keep_alive, self._check_idle)

    def _check_idle(self) -> None:
        """Close if it has been idle for long enough. Moving the timer for each request would cost more."""
        self._idle_timer = None
        rest = self._idle_since + self._config.timeout_keep_alive - self._loop.time()
        if self._phase is IDLE and rest > 0:
            self._idle_timer = self._loop.call_later(rest, self._check_idle)
        elif self._phase is IDLE:
            self._close()

    def time_request(self) -> None:
        """See to it that a request has a deadline as long as it is incomplete; one that comes whole costs no timer."""
        exchange = self._exchange
        is_incomplete = self._phase is HEAD or (self._phase is BODY and not (exchange and exchange.keeps_time))
        if is_incomplete and self._deadline is None:
            self._deadline = self._loop.call_later(REQUEST_SECONDS, self._expire)
        elif not is_incomplete and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self.refuse(408, f"request: not complete within {REQUEST_SECONDS:.0f} seconds")

    def _watch(self) -> None:
        self._stalled = self._loop.call_later(STALLED_SECONDS, self._check_progress, self._untaken())

    def _check_progress(self, before: int) -> None:
        if self._untaken() < before:
            self._watch()
        else:
            self.transport.abort()

    def _untaken(self) -> int:
        size = self.transport.get_write_buffer_size()
        # The kernel holds megabytes, too, and asks for more only when a good part of them has gone.
        with contextlib.suppress(OSError):
            held = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
            size += int.from_bytes(held, sys.byteorder)
        return size

    # --- the end

    def refuse(self, status: int, message: str, category: Category = "validation", headers: Headers = ()) -> None:
        """Answer in the place of the app, unless it has begun to, and end the connection."""
        exchange = self._exchange
        if exchange is None or self._phase not in (BODY, WHOLE) or not exchange.has_begun:
            response = error_response(status, message, category, headers, self.server_state.default_headers)
            # A head that is refused may not have come to the parser.
            is_head = self._unread.startswith(b"HEAD ") if self._phase is HEAD else self.parser.method == b"HEAD"
            if is_head:
                response = response[: response.index(BLANK_LINE) + len(BLANK_LINE)]
            self.transport.write(response)
        if exchange is not None:
            exchange.lose()
        self._end_our_side()

    def _end_our_side(self) -> None:
        """End our side behind the bytes written so far, and read on for a while."""
        is_sending = self._phase is not WHOLE or bool(self._unread)
        self._phase = ENDED
        self._unread = b""
        self.time_request()
        self.pace()
        if self.transport.can_write_eof():
            # Where the peer has just reset the connection, asyncio lets the system's error through.
            with contextlib.suppress(OSError):
                self.transport.write_eof()
        elif not is_sending:
            # TLS has no half-close. A peer that has said everything sees the end at once.
            self._close()
            return
        if not self.is_full:
            self._linger()

    def _linger(self) -> None:
        if self.peer_has_ended:
            self._close()
        else:
            self._deadline = self._loop.call_later(LINGER_SECONDS, self._close)

    def _drop(self, data: bytes) -> None:
        self._dropped += len(data)
        if self._phase is ENDED and self._dropped > LINGER_BYTES:
            self.transport.abort()

    def _close(self) -> None:
        self.transport.close()
        if not self.is_full:
            # A TLS transport waits for the peer's close, and an idle client does not send it.
            self._deadline = self._loop.call_later(LINGER_SECONDS, self.transport.abort)


def check_beginning(data: bytes, start: int) -> None:
    """Refuse at once the beginning of a head that cannot become one. Raises RequestError."""
    if not data[start : start + 1].isalpha() and data[start:] != b"\r":
        raise RequestError("request line: expected a method")
    if data.count(b"\n", start) != data.count(b"\r\n", start):
        raise RequestError("request head: expected CRLF at the end of each line")
