"""WebSocket frames without I/O (RFC 6455, section 5): bytes in, events out; payloads in, frames out.

Owns the wire format of frames. Knows no socket, no handshake and no client.

1. A server's frames are never masked and never fragmented; a client's must be masked (section 5.1).
2. A breach of the protocol raises FrameError with the close code for the peer. After that, and after a close frame,
   the parser is not fed again.
3. Text is checked as it arrives, so that a bad byte is refused before its message is whole (section 8.1).
4. Between frames the parser holds no bytes, and memory never exceeds the limit of one message.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Iterator

from websockets.frames import apply_mask  # type: ignore[attr-defined]

from log import frame
from schemas import INVALID_DATA, MESSAGE_TOO_BIG, NO_STATUS_RECEIVED, PROTOCOL_ERROR

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
MAX_CONTROL_BYTES = 125  # section 5.5
# The codes allowed in a peer's close frame: section 7.4.2, and 1012 to 1014 of the IANA registry.
_CLOSE_CODES = frozenset((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014))


def close_frame(code: int, reason: str = "") -> bytes:
    """Return a close frame, empty for 1005; the reason is cut to 123 bytes of whole characters."""
    if code == NO_STATUS_RECEIVED:
        return frame(b"", CLOSE)
    text = reason.encode()[: MAX_CONTROL_BYTES - 2].decode(errors="ignore").encode()
    return frame(struct.pack("!H", code) + text, CLOSE)


class FrameError(Exception):
    """The peer broke the protocol; `code` and the text belong in the close frame."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def read_close(payload: bytes) -> tuple[int, str]:
    """Return the code and the reason of a peer's close frame, 1005 where it has none. Raises FrameError."""
    if not payload:
        return NO_STATUS_RECEIVED, ""
    code, reason = int.from_bytes(payload[:2], "big"), text_of(payload[2:])
    if not (code in _CLOSE_CODES or 3000 <= code < 5000):
        raise FrameError(PROTOCOL_ERROR, "Invalid close code")
    return code, reason


def text_of(data: bytes) -> str:
    """Return text of a message. Raises FrameError."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise FrameError(INVALID_DATA, "Text is not valid UTF-8") from None


class FrameParser:
    """Reads a client's frames, in pieces of any size.

    feed() yields (TEXT, str) and (BINARY, bytes) for each whole message, and (CLOSE | PING | PONG, bytes) for each
    control frame. A message of more than `max_size` bytes raises FrameError 1009 before it is buffered.
    """

    __slots__ = ("_decoder", "_final", "_left", "_mask", "_max_size", "_opcode", "_pieces", "_rest", "_size")

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._rest = b""  # the beginning of a frame, up to a whole head or control payload
        # The data frame under way: its mask, turned to fit the next byte (empty: none), and the bytes to come.
        self._mask = b""
        self._left = 0
        # The message under way: its opcode (0: none), whether this is its last frame, the size of its frames so
        # far, and where it comes in pieces, these. A bytearray, because a list of a thousand small ones is large.
        self._opcode = 0
        self._final = False
        self._size = 0
        self._pieces: bytearray | None = None
        self._decoder: codecs.IncrementalDecoder | None = None

    def payload_to_come(self) -> int:
        """Return how many bytes of the data frame under way are still to come."""
        return self._left

    def put_off(self) -> bytes:
        """Take back, and return, what feed() was given and is to be given in another turn."""
        return b""

    def feed(self, data: bytes) -> Iterator[tuple[int, str | bytes]]:
        """Yield the events that are complete with these bytes. Raises FrameError."""
        position = 0
        if self._rest:
            data, self._rest = self._rest + data, b""
        while True:
            if not self._mask:
                text, end = self._read_whole(data, position)
                if end:
                    position = end
                    yield TEXT, text
                    continue
                opcode, size, start = self._read_head(data, position)
                end = start + size
                if not start or (opcode & 0x08 and end > len(data)):
                    self._rest = data[position:]
                    return
                mask, position = data[start - 4 : start], start
                if opcode & 0x08:
                    position = end
                    yield opcode, apply_mask(data[start:end], mask) if size else b""
                    continue
                self._mask, self._left = mask, size
            chunk = data[position : position + self._left]
            position += len(chunk)
            self._left -= len(chunk)
            message = self._take(apply_mask(chunk, self._mask) if chunk else b"")
            if self._left:
                used = len(chunk) % 4
                self._mask = self._mask[used:] + self._mask[:used]
                return
            self._mask = b""
            if message is not None:
                yield message

    def _read_whole(self, data: bytes, position: int) -> tuple[str, int]:
        """Return a message of text that is one frame and all here, and its end; 0 for any other frame.

        That is the usual message of a client, and this way costs it a third (bench/run.py --measure publishing).
        """
        available = len(data) - position
        if self._opcode or available < 8 or data[position] != 0x80 | TEXT:
            return "", 0
        second = data[position + 1]
        if second < 0xFE:
            size, start = second - 0x80, position + 6
        else:
            size, start = int.from_bytes(data[position + 2 : position + 4], "big"), position + 8
            if size < 126 or second == 0xFF:
                return "", 0
        end = start + size
        if size < 0 or end > len(data) or size > self._max_size:
            return "", 0
        return text_of(apply_mask(data[start:end], data[start - 4 : start])), end

    def _read_head(self, data: bytes, position: int) -> tuple[int, int, int]:
        """Read the head of a frame: its opcode, its size and where its payload starts (0: the head is not whole)."""
        available = len(data) - position
        if available < 2:
            return 0, 0, 0
        first, second = data[position], data[position + 1]
        opcode, size = first & 0x0F, second & 0x7F
        self._check_head(first, second)
        length = 2 if size < 126 else 4 if size == 126 else 10
        if available < length:
            return 0, 0, 0
        if length > 2:
            size = int.from_bytes(data[position + 2 : position + length], "big")
            if size < 126 or (length == 10 and size < 65536) or size >> 63:
                raise FrameError(PROTOCOL_ERROR, "Payload length is not minimal")
        if not opcode & 0x08 and self._size + size > self._max_size:
            raise FrameError(MESSAGE_TOO_BIG, f"Message is larger than {self._max_size} bytes")
        if available < length + 4:
            return 0, 0, 0
        if not opcode & 0x08:
            self._opcode = opcode or self._opcode
            self._final = bool(first & 0x80)
            self._size += size
        return opcode, size, position + length + 4

    def _check_head(self, first: int, second: int) -> None:
        """Check the first two bytes (section 5.2), so that nonsense is refused as early as possible."""
        opcode = first & 0x0F
        if first & 0x70:
            raise FrameError(PROTOCOL_ERROR, "Reserved bits are set")
        if not second & 0x80:
            raise FrameError(PROTOCOL_ERROR, "Frame is not masked")
        if opcode in (CLOSE, PING, PONG):
            if second & 0x7F > MAX_CONTROL_BYTES or not first & 0x80:
                raise FrameError(PROTOCOL_ERROR, "Control frame is fragmented or too long")
        elif opcode == CONTINUATION:
            if not self._opcode:
                raise FrameError(PROTOCOL_ERROR, "There is no message to continue")
        elif opcode not in (TEXT, BINARY):
            raise FrameError(PROTOCOL_ERROR, "Unknown opcode")
        elif self._opcode:
            raise FrameError(PROTOCOL_ERROR, "The message before is not complete")

    def _take(self, plain: bytes) -> tuple[int, str | bytes] | None:
        """Add a piece to the message under way, and return the message if that makes it whole."""
        opcode, whole, pieces = self._opcode, self._final and not self._left, self._pieces
        if pieces is None and not whole:
            pieces = self._pieces = bytearray()
            self._decoder = _utf8_decoder() if opcode == TEXT else None
        if pieces is not None:
            self._check(plain, whole)
            pieces += plain
            if not whole:
                return None
            plain = bytes(pieces)
        self._opcode = self._size = 0
        self._pieces = self._decoder = None
        return opcode, text_of(plain) if opcode == TEXT else plain

    def _check(self, plain: bytes, whole: bool) -> None:
        """Check a piece of text; the decoder remembers a character that is cut in two."""
        try:
            if self._decoder is not None:
                self._decoder.decode(plain, whole)
        except UnicodeDecodeError:
            raise FrameError(INVALID_DATA, "Text is not valid UTF-8") from None


_utf8_decoder = codecs.getincrementaldecoder("utf-8")
