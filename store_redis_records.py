"""The form of records and registrations in Redis: packed for the script, and read from its replies and the log.

store_redis.lua names the fields of an entry.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from errors import ConnectionRefused
from log import Audience
from store import Appended, ClientIdTaken, Counts, Draft, Limit, Receipt, Record, Registration
from store_redis_link import Argument

# A number with -0 behind it, and the names and values of the fields.
Entry = tuple[bytes, list[bytes]]
# Where an entry has its key and the answer.
KEY, ANSWER = 11, 15
# Bounds of one call that fills Redis again: parts of arguments, and their bytes unless one part has more.
CHUNK, CHUNK_BYTES = 500, 262_144
# Behind the first five fields.
RECIPIENTS = 7
# Records often have the same audience, and share it in memory.
_unpack_audience = lru_cache(maxsize=1000)(msgspec.msgpack.Decoder(Audience).decode)


def whole_batches(entries: list[Entry]) -> int:
    """Return the number of entries up to the end of the last whole batch."""
    return next((count for count in range(len(entries), 0, -1) if entries[count - 1][1][ANSWER] != b"+"), 0)


def number_of(entry: Entry) -> int:
    return int(entry[0].removesuffix(b"-0"))


def record_of(entry: Entry) -> Record:
    _, id, _, at, _, rest, _, packed, _, replayed, *more = entry[1]
    audience = _unpack_audience(packed) if packed else None
    # An entry of an earlier version has no number of recipients.
    addressed = int(more[RECIPIENTS]) if len(more) > RECIPIENTS and more[RECIPIENTS] else None
    return Record(id.decode(), rest, audience, replayed == b"1", int(at) / 1e6, addressed)


def draft(of: Draft | Record) -> tuple[Argument, ...]:
    audience = b"" if of.audience is None else msgspec.msgpack.encode(of.audience)
    # The names in the audience count for history_bytes.
    size = len(of.rest) + sum(len(name) for names in of.audience or () for name in names)
    return of.rest, size, audience, "1" if of.replayed else ""


def chunks(parts: Iterable[tuple[Argument, ...]]) -> Iterator[list[tuple[Argument, ...]]]:
    """Yield the parts in lists, each of the size of one call."""
    chunk, size = list[tuple[Argument, ...]](), 0
    for part in parts:
        more = sum(len(argument) for argument in part if not isinstance(argument, int))
        if chunk and (len(chunk) == CHUNK or size + more > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(part)
        size += more
    if chunk:
        yield chunk


def offer(record: Record, key: bytes, answer: bytes) -> tuple[Argument, ...]:
    # As an age, since records expire by Redis's clock.
    addressed = "" if record.addressed is None else record.addressed
    return record.id, round((time.time() - record.at) * 1e6), *draft(record), key, answer, addressed


def counts(of: Counts) -> tuple[Argument, ...]:
    steps = [part for step in of.steps.items() if step[1] for part in step]
    ids = of.written.keys() | of.addressed.keys()
    numbers = [part for id in ids for part in (id, of.written.get(id, 0), of.addressed.get(id, 0))]
    return len(steps) // 2, *steps, len(ids), *numbers


def appended(reply: list[Any]) -> Appended:
    receipts = [Receipt(reply[n].decode(), reply[n + 1]) for n in range(2, len(reply), 2)]
    return Appended(receipts, reply[0] / 1e6, bool(reply[1]))


def registration(client: Registration) -> tuple[Argument, ...]:
    groups = client.groups()
    return client.client_id, msgspec.msgpack.encode(groups) if groups else b""


def bounds(limits: Sequence[Limit]) -> tuple[Argument, ...]:
    return len(limits), *(part for limit in limits for part in limit)


def admitted(reply: Any, limits: Sequence[Limit], most: int) -> str:
    """Return the newest id at an admission, or raise its refusal."""
    if isinstance(reply, bytes):
        return reply.decode()
    if reply[0] == b"taken":
        raise ClientIdTaken(reply[1].decode())
    if reply[0] == b"limit":
        limits[reply[1] - 1].check(reply[2])
    raise ConnectionRefused(f"Connection limit exceeded: {reply[1]}/{most}")


def revoked(reply: list[Any], log: str) -> tuple[str, dict[str, int]]:
    """Return revocations with their place; if the epoch in `log` has ended meanwhile, no place of the next."""
    number, *found = reply
    return f"{log}{number}", {found[k].decode(): found[k + 1] for k in range(0, len(found), 2)}
