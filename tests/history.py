"""The history of a run, and its faults: every publish with its answer, every delivery with its client and time.

    python tests/history.py FILE      a history as write() leaves it, one event a line; prints its faults

Every message is published under a text of its own. A publish that is repeated with its key is one event, from the first
request to the last answer. Times are of one clock.

A client that is told begins anew: what it got before is a part by itself. An id that is in such parts alone is of a
history that was given up, as that of a minority: its message may be lost, or come once more under another id.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path

import msgspec

# Enough to understand a fault.
MOST_SHOWN = 5


class Publish(msgspec.Struct, frozen=True, tag=True):
    """A message, when it was first sent and last answered, and its id if that answer was 200."""

    message: str
    began: float
    ended: float
    id: str | None = None


class Joined(msgspec.Struct, frozen=True, tag=True):
    """A client listens: everything that is published from now on is for it."""

    client: str
    at: float


class Delivery(msgspec.Struct, frozen=True, tag=True):
    client: str
    at: float
    id: str
    message: str


class Told(msgspec.Struct, frozen=True, tag=True):
    """A client is told that something before this moment may be missing."""

    client: str
    at: float


Event = Publish | Joined | Delivery | Told


def write(path: Path, events: Iterable[Event]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))


def read(path: Path) -> list[Event]:
    decode = msgspec.json.Decoder(Event).decode  # type: ignore[var-annotated]
    return [decode(line) for line in path.read_bytes().splitlines()]


def faults(events: Sequence[Event]) -> list[str]:
    """Return a line for each fault, of events in any order."""
    publishes = dict[str, Publish]()
    joined = dict[str, float]()
    found = []
    for event in events:
        match event:
            case Publish(message=message):
                if message in publishes:
                    found.append(f"bad history: {message} is published twice")
                publishes[message] = event
            case Joined(client=client, at=at):
                joined[client] = min(at, joined.get(client, at))
    told, parts, gone = _told(events), _parts(events), given_up(events)
    answered = [one for one in publishes.values() if one.id is not None and one.id not in gone]
    found += _unordered(answered)
    ids = {one.message: (one.id or "", "the publisher's answer") for one in answered}
    for client in sorted(joined.keys() | parts.keys()):
        mine = parts.get(client, [])
        for part in mine:
            found += _wrong(client, part, publishes, ids, gone)
        since = max(joined.get(client, float("inf")), *told[client], 0)
        found += _lost(client, [*chain(*mine)], answered, since)
    return found


def given_up(events: Sequence[Event]) -> set[str]:
    """Return the ids that clients got before they were told, and that nobody has in the end."""
    parts = _parts(events).values()
    return {one.id for mine in parts for one in chain(*mine)} - {one.id for mine in parts for one in mine[-1]}


def _told(events: Sequence[Event]) -> defaultdict[str, list[float]]:
    """Return for each client the moments at which it was told, in order."""
    told = defaultdict[str, list[float]](list)
    for event in sorted((event for event in events if isinstance(event, Told)), key=lambda event: event.at):
        told[event.client].append(event.at)
    return told


def _parts(events: Sequence[Event]) -> dict[str, list[list[Delivery]]]:
    """Return the deliveries of each client in the order of their times, in parts that end when it was told."""
    told = _told(events)
    parts = dict[str, list[list[Delivery]]]()
    for one in sorted((event for event in events if isinstance(event, Delivery)), key=lambda event: event.at):
        mine = parts.setdefault(one.client, [[] for _ in range(len(told[one.client]) + 1)])
        mine[bisect_right(told[one.client], one.at)].append(one)
    return parts


def _unordered(answered: list[Publish]) -> Iterator[str]:
    """Yield each publish that began after the answer of another, and yet has the smaller id."""
    newest = ""
    moments = [(one.ended, False, one) for one in answered] + [(one.began, True, one) for one in answered]
    for _, begins, one in sorted(moments, key=lambda moment: moment[:2]):
        assert one.id is not None
        if begins and one.id <= newest:
            yield f"disorder: {one.message} got {one.id} after {newest} had been answered"
        if not begins:
            newest = max(newest, one.id)


def _wrong(
    client: str,
    mine: list[Delivery],
    publishes: dict[str, Publish],
    ids: dict[str, tuple[str, str]],
    given_up: set[str],
) -> Iterator[str]:
    seen = dict[str, str]()
    for one in mine:
        if one.message not in publishes:
            yield f"invented: {client} got {one.message}, which nobody published"
        if one.message in seen:
            yield f"double: {client} got {one.message} as {seen[one.message]} and as {one.id}"
        seen.setdefault(one.message, one.id)
        id, witness = ids.setdefault(one.message, (one.id, client)) if one.id not in given_up else (one.id, client)
        if id != one.id:
            yield f"divergent: {one.message} is {one.id} for {client}, and {id} for {witness}"
    for first, second in pairwise(mine):
        if second.id <= first.id:
            yield f"disorder: {client} got {second.message} ({second.id}) after {first.message} ({first.id})"


def _lost(client: str, mine: list[Delivery], answered: list[Publish], since: float) -> Iterator[str]:
    received = {one.message for one in mine}
    for one in answered:
        if one.began > since and one.message not in received:
            yield f"lost: {client} never got {one.message} ({one.id})"


if __name__ == "__main__":
    all_faults = faults(read(Path(sys.argv[1])))
    print("\n".join([*all_faults[:MOST_SHOWN], f"{len(all_faults)} faults"]))
    sys.exit(bool(all_faults))
