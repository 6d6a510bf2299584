"""Publishing by lines: POST /notify/batch with NDJSON, read, published and answered as it arrives.

Owns the lines of a request between its bytes and their answers. The groups in which they are published, and the order
of the answers, are those of publishers.py. Knows no server: it is an ASGI response.

1. A bad line is answered as such, and the next is read. Blank lines are skipped.
2. No more than the window waits for answers, or for a peer that does not read them: the rest is not read.
3. A line has LINE_SECONDS from its first byte to its end. Between two lines a publisher may be silent for as long as a
   kept connection.
4. Each line that is in the window is answered. The drain reads no further, and ends the response behind that: a line
   without an answer has not been published.
"""

from __future__ import annotations

import asyncio
import contextlib
from codecs import BOM_UTF8
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

import schemas
from connection import TIME_EXTENSION
from errors import InvalidRequest, NotifydError, TooLarge
from guard_identity import Identity
from publishers import WINDOW_BYTES, WINDOW_REQUESTS, Expected, Outcome
from schemas import encode, error_body

if TYPE_CHECKING:
    from hub import Hub

MEDIA_TYPE = "application/x-ndjson"
# From the first byte of a line to its end.
LINE_SECONDS = 10.0
# The lines that are read before other tasks have a turn.
LINES_AT_ONCE = 100


class _Silent(InvalidRequest):
    """A line, or the next line, did not come in time."""

    status = 408


class Lines:
    """A request whose lines are notifications, and the response that answers them."""

    def __init__(self, hub: Hub, sender: Identity | None, address: str) -> None:
        self._hub = hub
        self.sender = sender
        self.address = address
        self.in_flight = 0
        # The window: lines without a written answer, and the bytes of those in flight.
        self._unanswered = self._size = 0
        self._answers: list[bytes] = []
        # Set when there are answers to write, when some have been written, and when all has been read.
        self._answered, self._written = asyncio.Event(), asyncio.Event()
        self._has_read = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (keep_time := (scope.get("extensions") or {}).get(TIME_EXTENSION)) is not None:
            keep_time()
        reader = asyncio.ensure_future(self._read(receive))
        ending = asyncio.ensure_future(self._hub.ending.wait())
        ending.add_done_callback(lambda _: reader.cancel())
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"x-accel-buffering", b"no")]
        try:
            # A client may wait for 100 Continue, which comes with the first look at the body and before the head.
            await asyncio.sleep(0)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            # At once, for a publisher that waits for the head before it sends.
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            await self._write(send)
        finally:
            # Ends the reader, too.
            ending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    # --- the lines

    async def _read(self, receive: Receive) -> None:
        settings = self._hub.settings
        try:
            async for line in _lines(receive, settings.max_message_size, settings.keep_alive_timeout):
                await self._publish(line)
        except NotifydError as error:
            await self._publish(error)
        finally:
            self._has_read = True
            self._answered.set()

    async def _publish(self, line: bytes | NotifydError) -> None:
        while self._unanswered >= WINDOW_REQUESTS or self._size >= WINDOW_BYTES:
            self._written.clear()
            await self._written.wait()
        size = 0
        request: schemas.NotifyRequest | NotifydError
        try:
            if isinstance(line, NotifydError):
                raise line
            size = len(line)
            request = schemas.decode(line, schemas.NotifyRequest)
        except NotifydError as error:
            request = error
        self._unanswered += 1
        self._size += size
        self._hub.publishers.publish(Expected(self, request, size))

    # --- the Publisher

    def answer(self, expected: Expected, outcome: Outcome | NotifydError) -> None:
        self.in_flight -= 1
        self._size -= expected.size
        if isinstance(outcome, NotifydError):
            self._answers.append(encode(error_body(outcome.message, outcome.category)))
        else:
            (id, recipients), _ = outcome
            self._answers.append(encode(schemas.BatchReceipt(id=id, recipients=recipients)))

    def hand_over(self) -> None:
        self._answered.set()

    async def _write(self, send: Send) -> None:
        while not (self._has_read and not self.in_flight and not self._answers):
            await self._answered.wait()
            self._answered.clear()
            if answers := self._answers:
                self._answers = []
                await send({"type": "http.response.body", "body": b"\n".join([*answers, b""]), "more_body": True})
                self._unanswered -= len(answers)
                self._written.set()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _lines(receive: Receive, most: int, idle_seconds: float) -> AsyncIterator[bytes | NotifydError]:
    """Yield the lines of a body that are not blank, of `most` bytes each; for a longer one its fault.

    Raises _Silent. The beginning of a line behind which the peer has left is no line.
    """
    clock = asyncio.get_running_loop().time
    pending, is_cut, left, more = bytearray(), False, LINE_SECONDS, True
    while more:
        is_begun, began = bool(pending) or is_cut, clock()
        try:
            async with asyncio.timeout(left if is_begun else idle_seconds):
                message = await receive()
        except TimeoutError:
            what = "line: not complete" if is_begun else "request body: no line"
            raise _Silent(f"{what} within {LINE_SECONDS if is_begun else idle_seconds:.0f} seconds") from None
        if message["type"] == "http.disconnect":
            return
        # The time in which this process does not read is its own.
        left -= clock() - began if is_begun else 0
        body, more = message.get("body", b""), message.get("more_body", False)
        pending += body
        if b"\n" in body or not more:
            *whole, last = (bytes(pending) if more else bytes(pending) + b"\n").split(b"\n")
            pending, left = bytearray(last), LINE_SECONDS
            for number, line in enumerate(whole, 1):
                if is_cut:
                    # The rest of a line that has been refused.
                    is_cut = False
                elif len(line) > most:
                    yield _too_large(most)
                elif stripped := line.removeprefix(BOM_UTF8).strip():
                    yield stripped
                if not number % LINES_AT_ONCE:
                    await asyncio.sleep(0)
        if len(pending) > most:
            if not is_cut:
                yield _too_large(most)
            pending, is_cut = bytearray(), True


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"line: larger than the limit of {most} bytes")
