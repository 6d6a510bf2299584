"""Compression for the price of one: what goes to many is deflated once, and nothing is kept for a connection.

Every block stands for itself: it refers to nothing before it (Z_FULL_FLUSH), so all connections are sent the same ones,
in any order. Owns the decision what is compressed. wire_deflate.py makes WebSocket messages of the blocks, and
`GzipCarrier` a stream.

1. Only notifications are compressed: what the server tells one client may hold what that client chose beside what it
   must not learn, and the length of a compressed text tells how much of it is repeated (CRIME, BREACH). Two
   notifications are never compressed together.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

from log import payloads
from streams import STREAM_HEADERS, StreamCarrier, closed, event, first_lines

# A shorter text is not worth it: the head of a block alone takes a dozen bytes.
LEAST_BYTES = 200
# The end of every block: an empty one, which fills the last byte.
BLOCK_END = b"\x00\x00\xff\xff"
# RFC 1952, section 2.3: no name, no time, an unknown system.
_GZIP_HEAD = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
_NOTIFICATION_START = b'{"id":"'

# They are never used across an await, and keep nothing from one block to the next.
_deflating = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
_storing = zlib.compressobj(0, zlib.DEFLATED, -zlib.MAX_WBITS)


def block(data: bytes) -> bytes:
    """Return data as a deflate block of its own (RFC 1951), and its end."""
    return _deflating.compress(data) + _deflating.flush(zlib.Z_FULL_FLUSH)


def stored(data: bytes) -> bytes:
    """Return data as a block that is not compressed, and its end."""
    return _storing.compress(data) + _storing.flush(zlib.Z_FULL_FLUSH)


def is_worth_it(payload: bytes) -> bool:
    """Whether a message is a notification, and long enough."""
    return len(payload) >= LEAST_BYTES and payload.startswith(_NOTIFICATION_START)


# All streams that stand at one place are handed the same frames.
@lru_cache(maxsize=4)
def _events(frames: bytes) -> bytes:
    return b"".join((block if is_worth_it(payload) else stored)(event(payload)) for payload in payloads(frames))


def takes_gzip(accept_encoding: str) -> bool:
    """Whether a request takes a response in gzip (RFC 9110, section 12.5.3)."""
    for part in accept_encoding.lower().split(","):
        coding, _, weight = part.replace(" ", "").partition(";q=")
        if coding in ("gzip", "x-gzip"):
            return weight.strip("0.") != "" or not weight
    return False


class GzipCarrier(StreamCarrier):
    """A stream in gzip: one head, then blocks that all streams share.

    Not gzip members: browsers, httpx and curl stop after the first. The end has no checksum, which would be of all that
    this one stream was sent.
    """

    headers = (*STREAM_HEADERS, (b"content-encoding", b"gzip"), (b"vary", b"accept-encoding"))

    def lines(self, position: str) -> bytes:
        return _GZIP_HEAD + stored(first_lines(position))

    def text(self, frames: bytes) -> bytes:
        return _events(frames)

    def farewell(self, code: int, reason: str) -> bytes:
        return stored(closed(code, reason))
