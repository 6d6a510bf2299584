"""The `websockets` library as an oracle for the frame parser: the results of both, and whether they agree."""

from __future__ import annotations

import struct
from typing import NamedTuple

from websockets.frames import Frame as TheirFrame
from websockets.frames import Opcode
from websockets.protocol import Protocol, Side

from wire_frames import CLOSE, TEXT, FrameError, FrameParser, read_close

LIMIT = 70_000
# For inputs of Hypothesis: above their total size, because the reference counts control frames towards the limit too.
SMALL_LIMIT = 1000
MASK = bytes.fromhex("37fa213d")  # RFC 6455, section 5.7.
Event = tuple[int, str | bytes]


def masked(first: int, payload: bytes, mask: bytes = MASK, size: bytes | None = None) -> bytes:
    """A client's frame, by hand: its first byte, the size (in the shortest form unless given), mask and payload."""
    size = size or shortest(len(payload))
    hidden = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes([first, size[0] | 0x80]) + size[1:] + mask + hidden


def shortest(size: int) -> bytes:
    if size < 126:
        return bytes([size])
    return b"\x7e" + struct.pack("!H", size) if size < 65_536 else b"\x7f" + struct.pack("!Q", size)


class Reading(NamedTuple):
    """The result of a parser for a stream: events, and the close code for the rest."""

    events: list[Event]
    refused: int | None = None
    reason: str = ""


def read(*chunks: bytes, limit: int = LIMIT) -> Reading:
    """Feed our parser until a close frame or an error."""
    parser, events = FrameParser(limit), []
    try:
        for chunk in chunks:
            for event in parser.feed(chunk):
                events.append(event)
                if event[0] == CLOSE:
                    return Reading(events)
    except FrameError as error:
        return Reading(events, error.code, str(error))
    return Reading(events)


def reference(stream: bytes) -> Reading:
    """Read a stream with the parser of `websockets`, and join the fragments, which it leaves to its callers."""
    protocol, events = Protocol(Side.SERVER, max_size=SMALL_LIMIT), []
    protocol.receive_data(stream)
    opcode, pieces = 0, b""
    for got in protocol.events_received():
        assert isinstance(got, TheirFrame)
        if got.opcode in (Opcode.CLOSE, Opcode.PING, Opcode.PONG):
            events.append((int(got.opcode), bytes(got.data)))
            continue
        opcode, pieces = opcode or int(got.opcode), pieces + bytes(got.data)
        if opcode == TEXT and not begins_text(pieces, whole=got.fin):
            return Reading(events, 1007)
        if got.fin:
            events.append((opcode, pieces.decode() if opcode == TEXT else pieces))
            opcode, pieces = 0, b""
    if protocol.parser_exc is not None:
        assert protocol.close_sent is not None
        return Reading(events, int(protocol.close_sent.code), str(protocol.parser_exc))
    return Reading(events)


def begins_text(data: bytes, whole: bool) -> bool:
    """Whether bytes are UTF-8, or where the text is not whole, can become it."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return not whole and error.reason == "unexpected end of data"
    return True


def ours(stream: bytes) -> Reading:
    """Read a stream as a connection does, close frame included."""
    reading = read(stream, limit=SMALL_LIMIT)
    try:
        for opcode, payload in reading.events:
            if opcode == CLOSE:
                read_close(payload)  # type: ignore[arg-type]
    except FrameError as error:
        return Reading(reading.events[:-1], error.code)
    return reading


# A whole frame for each of these, from any byte of it on: a pong with ten bytes. So a frame that a stream leaves
# incomplete can be completed without knowing where it ends.
PADDING = b"\x8a" * (SMALL_LIMIT + 200)


def closes_inside_a_message(stream: bytes) -> bool:
    """Whether the reference refuses a close between fragments, as section 5.4 and Autobahn 7.1.5 do not."""
    return reference(stream).reason == "incomplete fragmented message"


def check_against_reference(stream: bytes) -> None:
    """Read the same events as the reference, or refuse with its code; but refuse sizes that are not minimal."""
    reading, theirs = ours(stream), reference(stream)
    stricter = reading.reason in ("Payload length is not minimal", "Control frame is fragmented or too long")
    if stricter or closes_inside_a_message(stream):
        assert reading.events[: len(theirs.events)] == theirs.events[: len(reading.events)]
        return
    if reading.refused and not theirs.refused:
        # Our parser knows from the first bytes; the reference, when the frame is complete.
        theirs = reference(stream + PADDING)
    if (reading.refused, theirs.refused) == (1002, 1009):
        # A frame with two faults: we look at its first two bytes first, the reference at its size.
        theirs = theirs._replace(refused=1002)
    assert (reading.events, reading.refused) == (theirs.events[: len(reading.events)], theirs.refused)
