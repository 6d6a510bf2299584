"""The frame parser and the encoder: bytes as tables, and the `websockets` library as an independent oracle."""

from __future__ import annotations

import struct
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator

import pytest
from frame_oracle import (
    LIMIT,
    SMALL_LIMIT,
    Event,
    check_against_reference,
    masked,
    read,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from websockets.frames import Close, Opcode
from websockets.frames import Frame as TheirFrame
from websockets.protocol import Protocol, Side

from log import frame, payloads
from wire_frames import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, FrameError, FrameParser, close_frame, read_close


def byte_by_byte(stream: bytes) -> Iterator[bytes]:
    return (stream[index : index + 1] for index in range(len(stream)))


# Valid frames of a client, and their meaning.
VALID: dict[str, tuple[bytes, list[Event]]] = {
    "the masked Hello of section 5.7": (bytes.fromhex("818537fa213d7f9f4d5158"), [(TEXT, "Hello")]),
    "empty text": (masked(0x81, b""), [(TEXT, "")]),
    "empty bytes": (masked(0x82, b""), [(BINARY, b"")]),
    "all bytes": (masked(0x82, bytes(range(256))), [(BINARY, bytes(range(256)))]),
    "a mask of zeros": (masked(0x81, b"Hello", bytes(4)), [(TEXT, "Hello")]),
    "125 bytes, the last size in one byte": (masked(0x82, b"x" * 125), [(BINARY, b"x" * 125)]),
    "126 bytes, the first size in two": (masked(0x82, b"x" * 126), [(BINARY, b"x" * 126)]),
    "65,535 bytes, the last size in two": (masked(0x82, b"x" * 65_535), [(BINARY, b"x" * 65_535)]),
    "65,536 bytes, the first size in eight": (masked(0x82, b"x" * 65_536), [(BINARY, b"x" * 65_536)]),
    "exactly the limit": (masked(0x82, b"x" * LIMIT), [(BINARY, b"x" * LIMIT)]),
    "two messages": (masked(0x81, b"a") + masked(0x82, b"b"), [(TEXT, "a"), (BINARY, b"b")]),
    "a message in two fragments": (masked(0x01, b"Hel") + masked(0x80, b"lo"), [(TEXT, "Hello")]),
    "fragments with nothing in them": (
        masked(0x01, b"") + masked(0x00, b"") + masked(0x00, b"a") + masked(0x80, b""),
        [(TEXT, "a")],
    ),
    "fragments up to the limit": (
        masked(0x02, b"x" * 35_000) + masked(0x80, b"y" * 35_000),
        [(BINARY, b"x" * 35_000 + b"y" * 35_000)],
    ),
    "each fragment with its own mask": (
        masked(0x01, b"ab", b"\x01\x02\x03\x04") + masked(0x80, b"cd", b"\xff\xfe\xfd\xfc"),
        [(TEXT, "abcd")],
    ),
    "a character of four bytes in four fragments": (
        masked(0x01, b"\xf0") + masked(0x00, b"\x9f") + masked(0x00, b"\x98") + masked(0x80, b"\x80"),
        [(TEXT, "\N{GRINNING FACE}")],
    ),
    "a ping": (masked(0x89, b"Hello"), [(PING, b"Hello")]),
    "a ping with 125 bytes": (masked(0x89, b"x" * 125), [(PING, b"x" * 125)]),
    "a pong that nobody asked for": (masked(0x8A, b""), [(PONG, b"")]),
    "a ping between fragments": (
        masked(0x01, b"Hel") + masked(0x89, b"?") + masked(0x80, b"lo"),
        [(PING, b"?"), (TEXT, "Hello")],
    ),
    "bytes that are no text, as bytes": (masked(0x82, b"\xff\xfe"), [(BINARY, b"\xff\xfe")]),
    "the last code point": (masked(0x81, b"\xf4\x8f\xbf\xbf"), [(TEXT, "\U0010ffff")]),
    "a noncharacter": (masked(0x81, b"\xef\xbf\xbf"), [(TEXT, "\uffff")]),
}

# Invalid frames of a client: bytes, the close code, and the number of bytes after which the error is known.
INVALID: dict[str, tuple[bytes, int, int]] = {
    "a frame without a mask": (b"\x81\x05Hello", 1002, 2),
    "a reserved bit, RSV1": (masked(0xC1, b"x"), 1002, 2),
    "a reserved bit, RSV2": (masked(0xA1, b"x"), 1002, 2),
    "a reserved bit, RSV3": (masked(0x91, b"x"), 1002, 2),
    "a reserved bit on a control frame": (masked(0xC9, b""), 1002, 2),
    "a reserved opcode, 3": (masked(0x83, b""), 1002, 2),
    "a reserved opcode, 7": (masked(0x87, b""), 1002, 2),
    "a reserved control opcode, 11": (masked(0x8B, b""), 1002, 2),
    "a reserved control opcode, 15": (masked(0x8F, b""), 1002, 2),
    "a ping in fragments": (masked(0x09, b""), 1002, 2),
    "a close in fragments": (masked(0x08, b""), 1002, 2),
    "a ping with 126 bytes": (masked(0x89, b"x" * 126), 1002, 2),
    "a continuation of nothing": (masked(0x80, b"x"), 1002, 2),
    "a continuation of a message that is complete": (masked(0x81, b"a") + masked(0x80, b"x"), 1002, 9),
    "a new message inside another": (masked(0x01, b"a") + masked(0x81, b"b"), 1002, 9),
    # Section 5.2: "the minimal number of bytes MUST be used". Here we are stricter than many.
    "125 in two bytes": (masked(0x82, b"x" * 125, size=b"\x7e\x00\x7d"), 1002, 4),
    "65,535 in eight bytes": (masked(0x82, b"x" * 65_535, size=b"\x7f" + struct.pack("!Q", 65_535)), 1002, 10),
    "a size with the highest bit": (masked(0x82, b"", size=b"\x7f" + struct.pack("!Q", 1 << 63)), 1002, 10),
    "one byte more than the limit": (masked(0x82, b"x" * (LIMIT + 1)), 1009, 10),
    "a size that no memory holds": (masked(0x82, b"", size=b"\x7f" + struct.pack("!Q", (1 << 63) - 1)), 1009, 10),
    "fragments beyond the limit": (masked(0x02, b"x" * LIMIT) + masked(0x80, b"yy" * 63), 1009, 14 + LIMIT + 4),
    "text with a byte that never occurs": (masked(0x81, b"ab\xffcd"), 1007, 9),
    "an overlong slash": (masked(0x81, b"\xc0\xafabc"), 1007, 7),
    "a surrogate": (masked(0x81, b"\xed\xa0\x80"), 1007, 9),
    "a code point beyond the last": (masked(0x81, b"\xf4\x90\x80\x80"), 1007, 8),
    "text that ends inside a character": (masked(0x81, b"ab\xc3"), 1007, 9),
    "fragmented text that ends inside a character": (masked(0x01, b"ab") + masked(0x80, b"\xc3"), 1007, 15),
    "a bad byte in a fragment, long before the end": (masked(0x01, b"\xff") + masked(0x00, b"x" * 100), 1007, 7),
}

either = pytest.mark.parametrize("name", VALID)


# Frames in.


@either
def test_a_valid_stream_is_read_whole(name: str) -> None:
    """All in one piece."""
    stream, events = VALID[name]
    assert read(stream) == (events, None, "")


@either
def test_a_valid_stream_is_read_byte_by_byte(name: str) -> None:
    """A stream that is cut anywhere means the same."""
    stream, events = VALID[name]
    assert read(*byte_by_byte(stream)) == (events, None, "")


@either
def test_a_valid_stream_ends_where_it_ends(name: str) -> None:
    """Later bytes belong to another frame, even if only its first byte is there."""
    stream, events = VALID[name]
    follower = masked(0x89, b"next")
    assert read(stream + follower[:1], follower[1:]) == ([*events, (PING, b"next")], None, "")


@either
def test_nothing_is_told_before_it_is_complete(name: str) -> None:
    """Without its last byte, the last event is missing."""
    stream, events = VALID[name]
    assert read(stream[:-1]) == (events[:-1], None, "")


@pytest.mark.parametrize("name", INVALID)
@pytest.mark.parametrize("cut", [lambda stream: [stream], byte_by_byte], ids=["whole", "byte by byte"])
def test_an_invalid_stream_is_refused(name: str, cut: Callable[[bytes], Iterator[bytes]]) -> None:
    """An invalid stream is refused with the code of section 7.4.1 and a reason that fits into a close frame."""
    stream, code, _ = INVALID[name]
    _, refused, reason = read(*cut(stream))
    assert refused == code and 0 < len(reason) <= 123


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_stream_is_refused_as_early_as_it_can_be(name: str) -> None:
    """The first bytes that show it are enough; one less is not."""
    stream, code, enough = INVALID[name]
    chunks = list(byte_by_byte(stream))
    assert (read(*chunks[: enough - 1]).refused, read(*chunks[:enough]).refused) == (None, code)


@pytest.mark.parametrize("name", INVALID)
def test_frames_before_an_invalid_one_are_read(name: str) -> None:
    """Events before an invalid frame are read, in the same piece or not."""
    stream, code, _ = INVALID[name]
    events, refused, _ = read(masked(0x81, b"before") + stream)
    assert (events[0], refused) == ((TEXT, "before"), code)


def test_a_limit_is_for_one_message() -> None:
    """Many messages may together be larger."""
    assert len(read(masked(0x82, b"x" * 100) * 50, limit=100).events) == 50


def test_a_control_frame_does_not_count_for_the_limit() -> None:
    """A ping fits beside a message that fills the limit."""
    stream = masked(0x02, b"x" * 5) + masked(0x89, b"y" * 100) + masked(0x80, b"z" * 5)
    assert read(stream, limit=10) == ([(PING, b"y" * 100), (BINARY, b"xxxxxzzzzz")], None, "")


def test_an_empty_piece_changes_nothing() -> None:
    """Nothing in, nothing out."""
    stream = masked(0x81, b"Hello")
    assert read(b"", stream[:3], b"", b"", stream[3:], b"") == ([(TEXT, "Hello")], None, "")


# Closes.

CLOSES = {
    b"": (1005, ""),
    b"\x03\xe8": (1000, ""),
    b"\x03\xe9going": (1001, "going"),
    b"\x0b\xb8" + "grün".encode(): (3000, "grün"),
    b"\x13\x87" + b"x" * 123: (4999, "x" * 123),
}


@pytest.mark.parametrize("payload", CLOSES)
def test_a_close_frame_is_read_and_written(payload: bytes) -> None:
    """The same table in both directions."""
    code, reason = CLOSES[payload]
    assert read(masked(0x88, payload)) == ([(CLOSE, payload)], None, "")
    assert read_close(payload) == (code, reason)
    assert close_frame(code, reason) == bytes([0x88, len(payload)]) + payload


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, *range(1007, 1015), 3000, 3999, 4000, 4999])
def test_a_code_that_may_be_sent_is_read(code: int) -> None:
    """Section 7.4, and the codes that IANA has registered since."""
    assert read_close(struct.pack("!H", code)) == (code, "")


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535])
def test_a_code_that_may_not_be_sent_is_1002(code: int) -> None:
    """Reserved codes and those that nobody has defined."""
    with pytest.raises(FrameError) as refused:
        read_close(struct.pack("!H", code))
    assert refused.value.code == 1002


@pytest.mark.parametrize(("payload", "code"), [(b"\x03", 1002), (b"\x03\xe8\xff", 1007), (b"\x03\xe8ab\xc3", 1007)])
def test_an_invalid_close_is_refused(payload: bytes, code: int) -> None:
    """Half a code, and a reason that is no text."""
    with pytest.raises(FrameError) as refused:
        read_close(payload)
    assert refused.value.code == code


@pytest.mark.parametrize("reason", ["x" * 200, "\N{EURO SIGN}" * 100, "x" * 122 + "ü"])
def test_a_long_reason_is_cut_between_characters(reason: str) -> None:
    """A close frame holds 123 bytes of it."""
    [payload] = payloads(close_frame(1008, reason))
    assert len(payload) <= 125 and reason.startswith(payload[2:].decode()) and len(payload) > 120


# Frames out.


@pytest.mark.parametrize("opcode", [TEXT, BINARY, CLOSE, PING, PONG])
@pytest.mark.parametrize("size", [0, 1, 125])
def test_a_frame_equals_the_references(opcode: int, size: int) -> None:
    """Any kind of frame."""
    assert frame(b"x" * size, opcode) == TheirFrame(Opcode(opcode), b"x" * size).serialize(mask=False)


@pytest.mark.parametrize("size", [126, 127, 65_535, 65_536, 1_000_000])
def test_a_large_frame_equals_the_references(size: int) -> None:
    """Around each change of the size's form."""
    assert frame(b"x" * size) == TheirFrame(Opcode.TEXT, b"x" * size).serialize(mask=False)


@given(st.sampled_from([1000, 1001, 1008, 1011, 3000, 4999]), st.text(max_size=30))
def test_a_close_frame_equals_the_references(code: int, reason: str) -> None:
    """Any reason that fits."""
    theirs = TheirFrame(Opcode.CLOSE, Close(code, reason).serialize()).serialize(mask=False)
    assert close_frame(code, reason) == theirs


@given(st.lists(st.one_of(st.binary(max_size=130), st.integers(65_530, 65_540).map(bytes)), max_size=5))
def test_payloads_undoes_frame(given_payloads: list[bytes]) -> None:
    """One is the inverse of the other."""
    assert list(payloads(b"".join(map(frame, given_payloads)))) == given_payloads


# Memory.


def held_by(parser: FrameParser, *chunks: bytes) -> int:
    """Return how many bytes of memory more a parser holds after these."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for chunk in chunks:
            deque(parser.feed(chunk), maxlen=0)
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_between_frames_nothing_is_held() -> None:
    """Ten thousand idle clients shall not keep their last message."""
    parser = FrameParser(LIMIT)
    chunks = [masked(0x82, bytes([number]) * 60_000) for number in range(1, 5)]
    assert held_by(parser, *chunks, masked(0x01, b"x" * 20_000), masked(0x80, b"y" * 20_000)) < 500


@pytest.mark.parametrize(
    "fragment",
    [b"", b"\xc3\xa9", b"xyz", "\N{GRINNING FACE}".encode()],
    ids=["nothing", "two bytes", "three bytes", "four bytes"],
)
@pytest.mark.parametrize("first", [0x01, 0x02], ids=["text", "bytes"])
def test_a_message_in_small_fragments_takes_no_more_than_its_limit(first: int, fragment: bytes) -> None:
    """Neither its pieces nor pieces of nothing are kept one by one."""
    limit = 20_000
    parser = FrameParser(limit)
    count = limit // (len(fragment) or 1)
    more = masked(0x00, fragment)
    assert held_by(parser, masked(first, b""), *(more * 100 for _ in range(count // 100))) < 1.3 * limit


def test_a_size_alone_reserves_nothing() -> None:
    """A head that announces a gigabyte costs the head."""
    parser = FrameParser(2**31)
    assert held_by(parser, masked(0x82, b"", size=b"\x7f" + struct.pack("!Q", 2**30))) < 1000


# The oracle.


texts = st.one_of(st.text(max_size=40).map(str.encode), st.text("aé\N{GRINNING FACE}", max_size=5).map(str.encode))
blobs = st.one_of(texts, st.binary(max_size=40), st.integers(120, 130).map(bytes))
masks = st.one_of(st.just(bytes(4)), st.binary(min_size=4, max_size=4))
codes = st.one_of(st.sampled_from([1000, 1005, 1006, 1011, 1012, 3000]), st.integers(0, 0xFFFF))
closes = st.one_of(st.just(b""), st.builds(lambda code, text: struct.pack("!H", code) + text, codes, texts))
controls = st.one_of(
    st.builds(masked, st.sampled_from([0x89, 0x8A]), blobs.filter(lambda payload: len(payload) < 126), masks),
    st.builds(masked, st.just(0x88), closes.filter(lambda payload: len(payload) < 126), masks),
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """One valid message, in any fragments, with control frames between them."""
    opcode, payload = draw(st.one_of(st.tuples(st.just(TEXT), texts), st.tuples(st.just(BINARY), blobs)))
    cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=3)))
    stream, start = b"", 0
    for cut in cuts:
        stream += masked(opcode, payload[start:cut], draw(masks)) + draw(st.one_of(st.just(b""), controls))
        opcode, start = CONTINUATION, cut
    return stream + masked(0x80 | opcode, payload[start:], draw(masks))


wild = st.builds(masked, st.integers(0, 255), blobs, masks)
streams = st.lists(st.one_of(messages(), controls, messages(), wild), max_size=6).map(b"".join)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A stream with some of its bytes changed, lost or put in."""
    stream = bytearray(draw(streams))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(stream)))
        stream[start : start + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(stream)


@settings(max_examples=200, deadline=None)
@given(st.one_of(streams, mutated()))
@example(bytes.fromhex("8100"))
@example(masked(0x01, b"\xf4") + masked(0x00, b"\x90"))
@example(masked(0x01, b"a") + masked(0x88, b"") + masked(0x80, b"b"))
def test_ours_reads_the_same_as_the_reference(stream: bytes) -> None:
    """The same events, or both refuse with the same code; but we refuse sizes that are not minimal."""
    check_against_reference(stream)


@settings(max_examples=100, deadline=None)
@given(st.one_of(streams, mutated()), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_it_does_not_matter_how_a_stream_is_cut(stream: bytes, sizes: list[int]) -> None:
    """A stream in pieces of any sizes is read as in one."""
    pieces, position = [], 0
    while position < len(stream):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream[position : position + size])
        position += size
    assert read(*pieces, limit=SMALL_LIMIT) == read(stream, limit=SMALL_LIMIT)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([TEXT, BINARY]), texts), max_size=5))
def test_the_reference_reads_our_frames(sent: list[tuple[int, bytes]]) -> None:
    """A client of theirs gets each message as it was sent."""
    client = Protocol(Side.CLIENT, max_size=None)
    client.receive_data(b"".join(frame(payload, opcode) for opcode, payload in sent))
    received = client.events_received()
    assert [(int(got.opcode), bytes(got.data)) for got in received if isinstance(got, TheirFrame)] == sent
