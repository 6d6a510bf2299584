"""The commands that talk to a server: publish and listen, over HTTP/1.1 with the standard library alone.

Owns one kept connection, its retries and its deadlines, and the words for a refusal. Knows no flags.

1. No error and no line on stderr has a part of the key. A text of the server is shown without control characters.
2. Each publish carries an Idempotency-Key, and is retried with the same one: nothing is published twice.
3. Listening is a stream of Server-Sent Events: it needs no package, and each event has the position to resume from.
"""

from __future__ import annotations

import math
import os
import random
import re
import select
import socket
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, RemoteDisconnected
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlencode, urlsplit

import orjson

from settings import VERSION

# How long a connection and an answer may take.
ANSWER_SECONDS = 10.0
# How long a server that is away or too busy is tried again.
RETRY_SECONDS = 10.0
# The first pause between two tries is up to this long, and each failure doubles it.
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 10.0
BUSY = (408, 425, 429, 500, 502, 503, 504)
# A peer without a sign of life is given up after about a minute: the server may send nothing for as long as it likes.
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
# The limits of a batch are the server's; its bytes with some room for the brackets.
BATCH_LINES, BATCH_BYTES = 1000, 1_000_000
READ_BYTES = 65_536
LONGEST_ANSWER = 1_048_576

_URL = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(?::\d{1,5})?(?:/[!-~]*)?\Z", re.IGNORECASE)
# An error of a batch that is about one of its messages.
_PLACE = re.compile(r"\[(\d+)\]\.((?:message|data): .*)\Z", re.DOTALL)
_LOST = (OSError, HTTPException)
# The end of a position that no log has given: it has the time alone.
_MADE_UP = "-7000-8000-000000000000"


class Refused(Exception):
    """The server refuses, or cannot be reached. The text is one line for the user; `status` is HTTP's, 0 for none."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


def is_url(text: str) -> bool:
    """Whether a text is the URL of a server: without a user, which might be a secret, and without a query."""
    if _URL.match(text) is None or set("?#") & set(text):
        return False
    try:
        parts = urlsplit(text)
        return bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:
        return False  # a port, an address or a name that there cannot be


class ReaderGone(Exception):
    """Nobody reads standard output any more."""


def write(text: str) -> None:
    """Write a line on standard output. Raises ReaderGone, and Refused where it cannot be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        # What is left in the buffer would fail again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise ReaderGone from None
        raise Refused(f"standard output: {error.strerror}") from None


def complain(text: str) -> None:
    print(f"notifyd: {text}", file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """Return a text from elsewhere without characters that a terminal would act on."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class Api:
    """One server, over one connection that is opened when it is needed."""

    def __init__(self, url: str, key: str = "") -> None:
        parts = urlsplit(url.rstrip("/"))
        self.url = url.rstrip("/")
        self._prefix = parts.path
        self._headers = {"User-Agent": f"notifyd/{VERSION}"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._connection: HTTPConnection
        host = parts.hostname or ""
        if parts.scheme == "https":
            self._connection = HTTPSConnection(host, parts.port, timeout=ANSWER_SECONDS)
        else:
            self._connection = HTTPConnection(host, parts.port, timeout=ANSWER_SECONDS)
        # Before that the URL is likely to be wrong.
        self._has_connected = False

    def _connect(self) -> None:
        self._connection.connect()
        self._has_connected = True

    def ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> HTTPResponse:
        """Return the head of the answer. Raises OSError or HTTPException."""
        connection = self._connection
        try:
            if connection.sock is None:
                self._connect()
            connection.request(method, self._prefix + path, body, {**self._headers, **headers})
            return connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def stream(self, path: str) -> HTTPResponse:
        """Return the head of an answer whose body comes as long as its peer is there. Raises OSError, HTTPException."""
        self._connect()
        # getresponse() lets go of the socket where the answer ends the connection.
        connected: socket.socket = self._connection.sock
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if hasattr(socket, name):
                connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        response = self.ask("GET", path, None, {})
        connected.settimeout(None)
        return response

    def close(self) -> None:
        self._connection.close()

    def post(self, path: str, body: bytes) -> tuple[HTTPResponse, dict[str, Any]]:
        """Publish a body; return the answer with its JSON. Raises Refused.

        Tries again for RETRY_SECONDS after the first failure, unless no connection has been made yet.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
        failures, give_up_at = 0, math.inf
        while True:
            try:
                response = self.ask("POST", path, body, headers)
                answer = body_of(response)
                if response.status == 200:
                    return response, answer
                error, after = refusal_of(response, answer), retry_after(response)
                may_pass = response.status in BUSY
            except _LOST as lost:
                self.close()
                error, after, may_pass = self.unreachable(lost), 0.0, self._has_connected
            pause = after or pause_after(failures)
            give_up_at = min(give_up_at, time.monotonic() + RETRY_SECONDS)
            if not may_pass or time.monotonic() + pause > give_up_at:
                raise error
            failures += 1
            time.sleep(pause)

    def is_another(self) -> Refused:
        return Refused(f"no notifyd answers at {self.url}")

    def unreachable(self, error: Exception) -> Refused:
        return Refused(f"cannot reach {self.url}: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """Return the reason of a lost or refused connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_SECONDS:.0f} s"
    if isinstance(error, RemoteDisconnected):
        return "it closed the connection without an answer"
    if isinstance(error, OSError):
        return shown(error.strerror or str(error))
    return "no answer in HTTP"


def body_of(response: HTTPResponse) -> dict[str, Any]:
    """Return the answer's JSON object, empty for another body. Raises OSError or HTTPException."""
    try:
        body = orjson.loads(response.read(LONGEST_ANSWER))
    except orjson.JSONDecodeError:
        return {}
    return body if isinstance(body, dict) else {}


def refusal_of(response: HTTPResponse, body: Mapping[str, Any]) -> Refused:
    """Return the refusal with the server's own words, or those of HTTP where something else has answered."""
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    if message is None:
        to = response.getheader("Location")
        message = response.reason + (f", to {to}" if to else "")
    return Refused(f"{shown(str(message))} ({response.status})", response.status)


def retry_after(response: HTTPResponse) -> float:
    given = response.getheader("Retry-After", "")
    return float(given) if given.isdecimal() else 0.0


def pause_after(failures: int) -> float:
    """Return the seconds to wait: anything up to a limit that doubles with each failure."""
    return random.uniform(0, min(PAUSE_SECONDS * 2**failures, LONGEST_PAUSE_SECONDS))  # noqa: S311 - no secret


# --- publish


def publish(api: Api, request: Mapping[str, Any]) -> None:
    """Publish a notification, and print its receipt. Raises Refused."""
    response, answer = api.post("/notify", orjson.dumps(request))
    _print_receipt(api, {"id": response.getheader("Notification-Id"), "recipients": answer.get("recipients")})


def _print_receipt(api: Api, receipt: Any) -> None:
    if not isinstance(receipt, dict) or receipt.get("id") is None:
        raise api.is_another()
    write(orjson.dumps(receipt).decode())


class Lines:
    """Publishes lines of a file as they come. A refused line is named, and the others are published."""

    def __init__(self, api: Api, fields: Mapping[str, Any]) -> None:
        self._api = api
        self._fields = fields
        self._status = 0
        # The lines that are read and not published yet: the number and the request of each, and the bytes of all.
        self._batch: list[tuple[int, bytes]] = []
        self._size = 0

    def publish(self, descriptor: int) -> int:
        """Publish each line that is not blank, print its receipt, and return the exit status. Raises Refused.

        Lines that are there at one time are one batch.
        """
        number, rest = 1, b""
        while data := os.read(descriptor, READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for number, line in enumerate(lines, number):  # noqa: B020 - the count goes on
                self._add(number, line)
            number += bool(lines)
            self._flush()
            if len(rest) > READ_BYTES:
                raise Refused(f"line {number}: longer than {READ_BYTES} bytes; it and those after it are not published")
        self._add(number, rest)
        self._flush()
        return self._status

    def _add(self, number: int, line: bytes) -> None:
        try:
            message = line.decode().removesuffix("\r")
        except UnicodeDecodeError:
            self._refuse(number, "expected UTF-8")
            return
        if message.strip():
            request = orjson.dumps({"message": message, **self._fields})
            if len(self._batch) == BATCH_LINES or self._size + len(request) > BATCH_BYTES:
                self._flush()
            self._batch.append((number, request))
            self._size += len(request) + 1

    def _refuse(self, number: int, reason: str) -> None:
        complain(f"line {number}: {reason}")
        self._status = 1

    def _flush(self) -> None:
        """Publish the batch. The server refuses it as a whole, and names one line: then it is sent without this."""
        while self._batch:
            body = b"[" + b",".join(request for _, request in self._batch) + b"]"
            try:
                _, answer = self._api.post("/notify/batch", body)
            except Refused as refusal:
                if (found := _PLACE.match(str(refusal))) is None:
                    start = f"line {self._batch[0][0]} and those after it are not published"
                    raise Refused(f"{refusal}; {start}", refusal.status) from None
                self._refuse(self._batch.pop(int(found[1]))[0], found[2])
            else:
                for receipt in answer.get("notifications") or (None,):
                    _print_receipt(self._api, receipt)
                self._batch.clear()
        self._size = 0


# --- listen


class _Event(NamedTuple):
    """A Server-Sent Event; `retry` is in seconds."""

    type: str
    data: str
    id: str
    retry: float


def at_time(seconds: float) -> str:
    """Return a position before all notifications of a moment, in seconds since the epoch, and after all earlier."""
    milliseconds = int(max(seconds, 0) * 1000)
    return f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}{_MADE_UP}"


def follow(api: Api, parameters: Mapping[str, str], since: str) -> int:
    """Print notifications, as they come or since a position, until Ctrl+C; then return 0.

    Goes on where it stopped after a lost connection. Raises Refused for a final refusal, and for any before the first
    notification can come.
    """
    threading.Thread(target=_end_with_reader, daemon=True).start()
    try:
        _Following(api, parameters, since).run()
    except KeyboardInterrupt:
        return 0
    finally:
        api.close()


class _Following:
    """A stream that is opened again and again, each time from the last position."""

    def __init__(self, api: Api, parameters: Mapping[str, str], since: str) -> None:
        self._api = api
        self._parameters = parameters
        self._position = since
        # The log replays all of its notifications since a position that it never gave.
        self._begins = since if since.endswith(_MADE_UP) else ""
        self._welcomed = False
        self._failures = 0
        # The reason of the last event of a stream, and the seconds after which the server asks to come back.
        self._closed, self._retry = "", 0.0
        self._is_terminal = sys.stdout.isatty()

    def run(self) -> NoReturn:
        while True:
            try:
                why = self._once()
            except _LOST as error:
                why = self._api.unreachable(error)
            self._api.close()
            if not self._welcomed:
                raise why
            if not self._failures:
                complain(f"{why}; connects again")
            time.sleep(self._retry if self._closed else pause_after(self._failures))
            self._failures += 1

    def _once(self) -> Refused:
        """Print the events of one stream, and return why it has ended. Raises Refused, OSError or HTTPException."""
        self._closed = ""
        response = self._api.stream("/events?" + urlencode({**self._parameters, "since": self._position}))
        if response.status != 200:
            refusal = refusal_of(response, body_of(response))
            # The connection before may count for a moment longer.
            if response.status in (*BUSY, 409):
                return refusal
            raise refusal
        if not response.getheader("Content-Type", "").startswith("text/event-stream"):
            raise self._api.is_another()
        for event in _events(response):
            self._take(event)
        return Refused(self._closed or f"{self._api.url} has ended the connection")

    def _take(self, event: _Event) -> None:
        self._position = event.id or self._position
        self._retry = event.retry or self._retry
        match event.type:
            case "message":
                if event.id >= self._begins:
                    write(_short(event.data) if self._is_terminal else event.data)
            case "welcome":
                if not self._welcomed or self._failures:
                    name = orjson.loads(event.data)["client_id"]
                    complain(f"connected to {self._api.url} as {shown(name)} (Ctrl+C ends it)")
                self._welcomed, self._failures = True, 0
            case "resume":
                if not orjson.loads(event.data)["data"]["complete"] and not self._position.endswith(_MADE_UP):
                    complain("notifications may be missing: the log does not reach back to where this begins")
            case "closed":
                close = orjson.loads(event.data)
                self._closed = f"{shown(close['reason'])} ({close['code']})"
                # An id here tells a browser to stay away.
                if event.id:
                    raise Refused(self._closed)


def _events(response: HTTPResponse) -> Iterator[_Event]:
    """Yield the events of a stream that have data; a comment is a field without a name."""
    fields: dict[str, str] = {}
    for raw in response:
        line = raw.decode(errors="replace").rstrip("\r\n")
        name, _, value = line.partition(":")
        if line:
            fields[name] = value.removeprefix(" ")
            continue
        if "data" in fields:
            retry = fields.get("retry", "")
            seconds = int(retry) / 1000 if retry.isdecimal() else 0.0
            yield _Event(fields.get("event", "message"), fields["data"], fields.get("id", ""), seconds)
        fields = {}


def _end_with_reader() -> None:
    """End the process when nobody reads standard output any more, which otherwise only the next write would tell."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    poll.poll()
    os._exit(0)


def _short(data: str) -> str:
    """Return a notification as a line for people."""
    notification = orjson.loads(data)
    at = datetime.fromisoformat(notification["timestamp"]).astimezone()
    rest = dict(notification["data"])
    topics = f" [{', '.join(notification['topics'])}]" if "topics" in notification else ""
    words = f"{at:%H:%M:%S} {notification['type']}{topics} {rest.pop('message', '')}"
    return shown(f"{words} {orjson.dumps(rest).decode()}" if rest else words)
