"""A client of Server-Sent Events on a bare socket."""

from __future__ import annotations

from http.client import HTTPResponse
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from contract_oracle import check_message
from expected import parse
from processes import Server
from ws_clients import PATIENCE


class Event(NamedTuple):
    """One event as a browser dispatches it."""

    name: str
    data: Any
    id: str | None


class Stream:
    """A reader of one stream, by the rules of https://html.spec.whatwg.org/multipage/server-sent-events.html."""

    def __init__(self, server: Server, query: str = "", headers: dict[str, str] | None = None) -> None:
        target = f"{urlsplit(server.url).path}/events?{query}"
        lines = [f"GET {target} HTTP/1.1", f"Host: {server.host}:{server.port}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.socket = server.raw("\r\n".join([*lines, "", ""]).encode())
        self.socket.settimeout(PATIENCE)
        self.response = HTTPResponse(self.socket)
        self.response.begin()
        self.comments: list[str] = []
        self.retry: int | None = None
        self.last_id = ""  # with which a browser would come back

    def next(self) -> Event | None:
        """Return the next event, or None at the end of the stream."""
        name, id, data = "message", None, []
        while line := self.response.readline():
            field, _, value = line.decode().removesuffix("\n").partition(":")
            value = value.removeprefix(" ")
            if line == b"\n":
                self.last_id = id or self.last_id
            if line == b"\n" and data:
                message = parse("\n".join(data))
                check_message(message, "closed" if name == "closed" else "")
                return Event(name, message, id)
            if line == b"\n":
                name, id = "message", None
            elif not field:
                self.comments.append(value)
            elif field == "event":
                name = value
            elif field == "id":
                id = value
            elif field == "data":
                data.append(value)
            elif field == "retry":
                self.retry = int(value)
        return None

    def event(self) -> Event:
        event = self.next()
        assert event is not None, f"the stream has ended: {self.comments}"
        return event

    def events(self, count: int) -> list[Event]:
        return [self.event() for _ in range(count)]

    def rest(self) -> list[Event]:
        """Read to the end."""
        return list(iter(self.next, None))

    def leave(self) -> None:
        self.response.close()
        self.socket.close()


def closed(code: int, reason: object, id: str | None = None) -> Event:
    """Return the last event of a stream."""
    return Event("closed", {"code": code, "reason": reason}, id)


REPLACED = closed(1008, "Replaced by a new connection", "replaced")


def join(server: Server, query: str = "", headers: dict[str, str] | None = None) -> Stream:
    """Open a stream and be welcomed."""
    stream = Stream(server, query, headers)
    assert stream.event().name == "welcome"
    return stream
