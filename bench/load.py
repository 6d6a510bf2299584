"""The load: load.c in a process on its own core, and the checks of the bytes that its clients received.

load.c checks that all addressed clients received the same bytes, and the others none. This module reads those bytes,
after the clock has stopped: whole frames, valid JSON, each published number exactly once, and the notifications of
one connection in its order. Nothing else counts as delivered; `CheckFailed` names the fault.

Its clients sleep while there is nothing to read, as a client program does, unless they are told to poll. That matters
to the server: in the kernel the sender wakes a receiver, and pays for it.
"""

import http.client
import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from peers import CACHE, HERE, compile_c
from running import LOAD_CORE, Server, on_cores, process_seconds
from websockets.sync.client import connect

SOURCE = HERE.parent / "load.c"
PAYLOAD_BYTES = 200
# A payload of 126 to 65,535 bytes has a head of 4 (RFC 6455, section 5.2).
FRAME_HEAD_BYTES = 4
# NATS: a line before the payload, and the end of a line behind it.
MSG = re.compile(rb"MSG bench 1 \d+\r\n(.*)\r\n")
MSG_BYTES = 19
EVENT = re.compile(rb"^data: (.*)$", re.M)
TIMEOUT_SECONDS = 20.0
FIRST_NUMBER = 1_000_000
NUMBER = "%04d"
BODY = '{"message":"bench","data":{"number":%d,"by":"%03d","pad":"%s"}%s}'


class CheckFailed(Exception):
    """The clients received something else than was published."""


@dataclass(frozen=True)
class Audience:
    """The audience of notifications: clients are divided into groups, addressed in turn.

    `query` ends the URL with which a client of a group connects, and `field` the body that addresses this group; NUMBER
    in them stands for the group's.
    """

    group_size: int
    query: str
    field: str = ""


EVERYONE = Audience(2**16, "")


def prepare() -> str | None:
    """Build the load generator, or say why that cannot be done."""
    return compile_c(SOURCE)


def payloads(stream: bytes) -> Iterator[bytes]:
    """Yield the payloads of unmasked, unfragmented text frames of 126 to 65,535 bytes."""
    while stream:
        if stream[:2] != b"\x81\x7e":
            raise CheckFailed(f"no such frame was expected: {stream[:100]!r}")
        end = FRAME_HEAD_BYTES + int.from_bytes(stream[2:4])
        if len(stream) < end:
            raise CheckFailed(f"the last frame is cut: {stream!r}")
        yield stream[FRAME_HEAD_BYTES:end]
        stream = stream[end:]


def natural_bytes(server: Server, audience: Audience) -> int:
    """How long a delivered payload is before padding, by an independent client: servers wrap bodies differently."""
    peer = server.peer
    if peer.protocol == "nats":
        return len(BODY % (FIRST_NUMBER, 0, "", peer.field))
    query, field = (text.replace(NUMBER, NUMBER % 0) for text in (audience.query, audience.field + peer.field))
    url = f"ws://127.0.0.1:{server.port}{peer.ws_path}{query}"
    # The floor answers no close frame.
    with connect(url, compression=None, proxy=None, close_timeout=0.05) as client:
        if peer.hello:
            client.send(peer.hello)
        for _ in range(peer.greetings):
            client.recv(TIMEOUT_SECONDS)
        publishing = http.client.HTTPConnection("127.0.0.1", server.publish_port, timeout=TIMEOUT_SECONDS)
        body = BODY % (FIRST_NUMBER, 0, "", field)
        publishing.request("POST", peer.publish_path, body, {"Content-Type": "application/json"})
        answer = publishing.getresponse()
        if answer.status not in range(200, 300):
            raise CheckFailed(f"a publish was answered by {answer.status}: {answer.read()[:300]!r}")
        publishing.close()
        return len(client.recv(TIMEOUT_SECONDS, decode=False))


class Load:
    """WebSocket clients of `server`, and publishing to them. `with` connects and disconnects them."""

    def __init__(
        self,
        server: Server,
        clients: int = 0,
        audience: Audience = EVERYONE,
        *,
        offer: str = "",
        streams: bool = False,
        settles: bool = False,
        form: str = "",
    ) -> None:
        """The clients offer these extensions in their handshake, or are streams of Server-Sent Events.

        Where it `settles`, a round ends when nothing more comes, and its time counts for nothing; with streams it has
        to. `form` is the form of publishing (load.c), if not the peer's usual one.
        """
        self.server = server
        self._header = f"Sec-WebSocket-Extensions: {offer}\r\n" if offer else ""
        self._streams = streams
        self._settles = settles
        self._form = form
        self.audience = audience
        self.clients = 0
        self._to_connect = clients
        self._next_number = FIRST_NUMBER

    def __enter__(self) -> Self:
        peer = self.server.peer
        natural = natural_bytes(self.server, self.audience)
        payload = max(PAYLOAD_BYTES, natural)
        protocol, path = ("stream", peer.events_path) if self._streams else (peer.protocol, peer.ws_path)
        arguments = [protocol, self.server.port, path, peer.hello, peer.greetings]
        arguments += [self.server.publish_port, peer.publish_path, self._header]
        with on_cores({LOAD_CORE}):
            self.process = subprocess.Popen(
                [CACHE / SOURCE.stem, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        try:
            audience = self.audience
            of_body = audience.field + peer.field
            head = MSG_BYTES if protocol == "nats" else FRAME_HEAD_BYTES
            sizes = (0 if self._settles else payload + head, payload - natural, audience.group_size)
            self._command("format", *sizes, f"={of_body}", f"={audience.query}")
            if self._form:
                self._command("form", self._form)
            self.connect(self._to_connect)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.disconnect()
        finally:
            self._end()

    def _end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _command(self, *words: object) -> tuple[list[float], bytes]:
        """Have one command obeyed; return the figures and the stream that it is answered with."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        figures, failed, reason = line.partition(b"failed ")
        if failed or not line:
            raise CheckFailed(reason.decode(errors="replace").strip() or "the load generator has died")
        *seconds, size = figures.split()
        return [float(each) for each in seconds], self.process.stdout.read(int(size))

    def connect(self, clients: int, at_once: int = 500) -> None:
        """Open more clients, never more than `at_once` of them between SYN and greeting."""
        # NATS greets a client for two seconds.
        self._command("connect", clients, clients if self.server.peer.protocol == "nats" else at_once)
        self.clients += clients

    def drain(self) -> bytes:
        """Return the bytes that every client has received since the last command: somebody else has published."""
        return self._command("drain")[1]

    def disconnect(self) -> None:
        """Drop all clients; nothing may be left for them to read."""
        self._command("disconnect")
        self.clients = 0

    def address(self, groups: int) -> None:
        """From now on so many groups have their turn, spread over all; at first it is one."""
        self._command("address", groups)

    def sleeps(self) -> int:
        """How often the clients have gone to sleep, each time to be woken by a send."""
        switches = re.search(
            r"^voluntary_ctxt_switches:\s*(\d+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.M
        )
        assert switches
        return int(switches[1])

    def cpu_seconds(self) -> float:
        return process_seconds(self.process.pid)

    def poll(self) -> None:
        """From now on the clients never sleep, and ask again and again whether there is something to read."""
        self._command("sleep", 0)

    def one_at_a_time(self, notifications: int) -> list[float]:
        """Publish each when the last one has arrived everywhere; return the seconds from publish to last client."""
        return self._publish(notifications, 1, 1, 1)

    def batches(self, requests: int, size: int) -> list[float]:
        """Publish so many batches of that size, as one_at_a_time()."""
        return self._publish(requests, 1, 1, 1, size)

    def burst(self, notifications: int, connections: int, depth: int) -> float:
        """Publish with `depth` requests in flight on each connection. Return the seconds from the first request to
        the last client's last byte, or, without clients, to the last answer."""
        [seconds] = self._publish(1, notifications, connections, depth)
        return seconds

    def _publish(self, rounds: int, requests: int, connections: int, depth: int, batch: int = 0) -> list[float]:
        seconds, stream = self._command("publish", rounds, requests, connections, depth, batch)
        notifications = rounds * requests * (batch or 1)
        expected = range(self._next_number, self._next_number + notifications)
        self._next_number += notifications
        if self.clients:
            check(self._received(stream), expected, self.server.peer.notification)
        return seconds

    def _received(self, stream: bytes) -> Iterable[bytes]:
        """Return the notifications as a client has received them."""
        if self._streams:
            return EVENT.findall(stream)
        return MSG.findall(stream) if self.server.peer.protocol == "nats" else payloads(stream)


def check(received: Iterable[bytes], expected: range, notification: Callable[[bytes], Any] = json.loads) -> None:
    """Raise CheckFailed unless each number has been received once, and those of one publisher in their order."""
    try:
        seen = [notification(payload)["data"] for payload in received]
    except (ValueError, LookupError, TypeError) as error:
        raise CheckFailed(f"not as it was published: {error!r}") from None
    if sorted(data["number"] for data in seen) != list(expected):
        raise CheckFailed(f"{len(expected)} notifications were published, {len(seen)} others received")
    in_order = sorted(seen, key=lambda data: str(data["by"]))  # stable: keeps each publisher's order
    for one, other in pairwise(in_order):
        if one["by"] == other["by"] and one["number"] > other["number"]:
            raise CheckFailed(f"{other['number']} came after {one['number']} of the same publisher")
