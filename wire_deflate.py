"""permessage-deflate without I/O (RFC 7692): its agreement, frames for all who agreed, and a parser of theirs.

Both sides give up what a message could refer to in those before it (no context takeover), so nothing is kept for a
connection, and one compressed frame is for everyone.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

from websockets.exceptions import InvalidHeader, NegotiationError
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.headers import build_extension, parse_extension

from connection import TURN_BYTES
from deflate import BLOCK_END, block, is_worth_it
from log import frame, payloads
from schemas import MESSAGE_TOO_BIG, PROTOCOL_ERROR
from wire_frames import BINARY, TEXT, FrameError, FrameParser, text_of

_FACTORY = ServerPerMessageDeflateFactory(server_no_context_takeover=True, client_no_context_takeover=True)
_NAME = "permessage-deflate"
# RSV1, in the first byte of a compressed message's first frame (section 6).
_COMPRESSED = 0x40
# Behind the data of a message: the end of a block that the sender has cut off, and a last block, which is only read as
# such where the data ends with a block. After a last block of the sender's own nothing is read.
_END = BLOCK_END + b"\x01\x00\x00\xff\xff"


class Agreement(NamedTuple):
    """What a handshake agrees on: the header of its answer, and whether the client takes what all are sent.

    A client with a smaller window is sent uncompressed messages, as section 6 allows.
    """

    header: str
    takes_shared: bool


def agree(offers: str) -> Agreement | None:
    """Take the first of a client's offers that is valid (section 5), or none."""
    try:
        extensions = parse_extension(offers)
    except InvalidHeader:
        return None
    for name, offered in extensions:
        if name == _NAME:
            try:
                taken, _ = _FACTORY.process_request_params(offered, [])
            except NegotiationError:
                continue
            window = dict(taken).get("server_max_window_bits")
            return Agreement(build_extension([(name, taken)]), window in (None, str(zlib.MAX_WBITS)))
    return None


# All clients that stand at one place are handed the same frames.
@lru_cache(maxsize=8)
def deflated(frames: bytes) -> bytes:
    """Return ready frames with the notifications among them compressed, as far as that makes them smaller."""
    return b"".join(map(_deflated, payloads(frames)))


def _deflated(payload: bytes) -> bytes:
    if is_worth_it(payload) and len(small := block(payload).removesuffix(BLOCK_END)) < len(payload):
        return frame(small, TEXT | _COMPRESSED)
    return frame(payload)


class InflatingParser(FrameParser):
    """A parser for a client that may compress. The limit holds for a message as it comes, and inflated.

    Once feed() has inflated TURN_BYTES, it keeps the rest: 4 KiB can hold megabytes. put_off() returns that.
    """

    __slots__ = ("_compressed", "_inflated")

    def __init__(self, max_size: int) -> None:
        super().__init__(max_size)
        # While a compressed message is under way: its bytes so far.
        self._compressed: bytearray | None = None
        # Since feed() was called.
        self._inflated = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, str | bytes]]:
        self._inflated = 0
        return super().feed(data)

    def put_off(self) -> bytes:
        if self._inflated < TURN_BYTES:
            return b""
        rest, self._rest = self._rest, b""
        return rest

    def _read_head(self, data: bytes, position: int) -> tuple[int, int, int]:
        return super()._read_head(data, position) if self._inflated < TURN_BYTES else (0, 0, 0)

    def _check_head(self, first: int, second: int) -> None:
        begins_message = first & 0x0F in (TEXT, BINARY)
        super()._check_head(first & ~_COMPRESSED if begins_message else first, second)
        if begins_message:
            self._compressed = bytearray() if first & _COMPRESSED else None

    def _take(self, plain: bytes) -> tuple[int, str | bytes] | None:
        if self._compressed is None:
            return super()._take(plain)
        self._compressed += plain
        if self._left or not self._final:
            return None
        opcode, message = self._opcode, _inflated(bytes(self._compressed), self._max_size)
        self._opcode = self._size = 0
        self._compressed = None
        self._inflated += len(message)
        return opcode, text_of(message) if opcode == TEXT else message


def _inflated(data: bytes, limit: int) -> bytes:
    """Return a message of at most `limit` bytes (section 7.2.2). Raises FrameError."""
    inflating, message = zlib.decompressobj(-zlib.MAX_WBITS), b""
    with suppress(zlib.error):
        message = inflating.decompress(data + _END, limit + 1)
    if len(message) > limit:
        raise FrameError(MESSAGE_TOO_BIG, f"Message is larger than {limit} bytes")
    if not inflating.eof or 0 < len(inflating.unused_data) < len(_END):
        raise FrameError(PROTOCOL_ERROR, "Compressed data is broken")
    return message
