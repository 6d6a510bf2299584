"""The promises of the reference, as values to compare with: objects with an order of fields, and forms.

A parsed object is a Record: it equals a dict with equal fields in the same order. A Like equals every text of
its form, so that a whole message is compared at once, with the parts that differ from run to run left open.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any


class Record(dict[str, Any]):
    """A JSON object with an order of fields: the reference's order is part of the contract."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and list(self.items()) == list(other.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


def _record(pairs: list[tuple[str, Any]]) -> Record:
    fields = Record(pairs)
    assert len(fields) == len(pairs), f"a field is there twice: {pairs}"
    return fields


def _no_such_number(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def parse(text: str | bytes | bytearray) -> Any:
    """Parse strict JSON: no field twice, no NaN."""
    return json.loads(text, object_pairs_hook=_record, parse_constant=_no_such_number)


class Like:
    """Equal to every text of one form."""

    def __init__(self, form: str) -> None:
        self._form = re.compile(form, re.DOTALL)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self._form.fullmatch(other) is not None

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Like({self._form.pattern!r})"


class _Number:
    """Equal to every number from `least` on, but not to true and false."""

    def __init__(self, least: float, kinds: tuple[type, ...]) -> None:
        self._least, self._kinds = least, kinds

    def __eq__(self, other: object) -> bool:
        return type(other) in self._kinds and other >= self._least  # type: ignore[operator]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"a number >= {self._least}"


TIME = Like(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
UUID7 = Like(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
ERROR_ID = Like(r"error_[0-9a-f]{8,}")
CLIENT_ID = Like(r"client_[0-9a-f]{8,}")
SECONDS = _Number(0, (int, float))
COUNT = _Number(0, (int,))


def naming(*words: str) -> Like:
    """A text with all these words in it, in any order."""
    return Like("".join(f"(?=.*{re.escape(word)})" for word in words) + ".*")


def http_error(category: str, message: object) -> dict[str, Any]:
    """The documented body of every HTTP error."""
    return {"error": {"id": ERROR_ID, "message": message, "category": category, "timestamp": TIME}}


def answered(response: Any) -> tuple[int, Any]:
    """The status and the parsed body of a response of httpx."""
    return response.status_code, parse(response.content)


def invalid(*words: str) -> tuple[int, Any]:
    """What is answered to a request with a mistake: 400, and all these words."""
    return 400, http_error("validation", naming(*words))


def limits(headers: Any) -> tuple[int, int, int]:
    """Return limit, remaining and reset; each must be there once."""
    names = ("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
    for name in names:
        found = headers.get_all(name) if hasattr(headers, "get_all") else headers.get_list(name)
        assert len(found) == 1, name
    limit, remaining, reset = (int(headers[name]) for name in names)
    return limit, remaining, reset


def ws_error(message: object) -> dict[str, Any]:
    """The documented error message to a client."""
    return {"type": "error", "error_id": ERROR_ID, "message": message, "code": 1008, "timestamp": TIME}


def notification(data: dict[str, Any], kind: str = "custom", sender: str = "notification_service") -> dict[str, Any]:
    """A notification as clients receive it."""
    return {"id": UUID7, "type": kind, "timestamp": TIME, "data": data, "sender": sender}


def welcome(client_id: object, interval: float = 0, user: str = "") -> dict[str, Any]:
    """The first message to a client."""
    message = {
        "type": "welcome",
        "message": "Connected to WebSocket Notification Server",
        "client_id": client_id,
        "server_time": TIME,
        "notification_interval": interval,
    }
    return message | {"user": user} if user else message


SYSTEM = notification(
    {"message": "Server is shutting down. Please reconnect later.", "priority": "high", "system_time": TIME},
    kind="system",
    sender="system",
)
SHUTDOWN = {"type": "shutdown", "message": "Server is shutting down", "timestamp": TIME}
PONG = {"type": "pong", "timestamp": TIME}
PING = {"type": "ping", "timestamp": TIME}


def order_differs(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether two sequences of field names have the same names in another order."""
    return list(left) != list(right) and sorted(left) == sorted(right)
