"""An HTTP client of notifyd: publish notifications, and ask for health, metrics and status.

    pip install httpx
    python examples/publish.py notify "disk full" --type alert --data '{"priority": "high"}'
    python examples/publish.py health

The variable TOKEN has the API key or token, if the server asks for one. In a program:

    with Notifyd("http://localhost:8000") as notifyd:
        notifyd.notify("disk full", "alert", {"priority": "high"})

It retries for about half a minute while the server or a proxy is restarting, away or too busy, and longer where the
answer says so (`Retry-After`). Each publish carries a key of its own (`Idempotency-Key`), so that a retry after a lost
answer does not publish twice.
"""

import argparse
import json
import os
import random
import time
import uuid
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx

BASE_SECONDS = 0.5  # the first delay is at most this; each failure doubles it
CAP_SECONDS = 10.0
LONGEST_RETRY_AFTER = 120.0
TIMEOUT = httpx.Timeout(5.0)
ATTEMPTS = 8
BUSY = (408, 429, 502, 503, 504)
LOST = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ProxyError)


class NotifydError(Exception):
    """An error answer of the server."""

    def __init__(self, response: httpx.Response) -> None:
        error = body_of(response).get("error")
        error = error if isinstance(error, dict) else {}  # a proxy's error page has none
        self.status = response.status_code
        self.id: str | None = error.get("id")
        self.category: str | None = error.get("category")
        self.message: str = error.get("message") or response.reason_phrase
        super().__init__(f"{self.status} {self.message}" + (f" ({self.id})" if self.id else ""))


def body_of(response: httpx.Response) -> dict[str, Any]:
    """Return the body's JSON object, empty if it is something else."""
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def retry_after(response: httpx.Response) -> float:
    """Return the seconds that the answer asks to wait (RFC 9110, section 10.2.3: a number or a date), within reason."""
    given = response.headers.get("Retry-After", "")
    try:
        seconds = int(given) if given.isdecimal() else parsedate_to_datetime(given).timestamp() - time.time()
    except ValueError:
        return 0.0
    return float(min(max(seconds, 0), LONGEST_RETRY_AFTER))


def backoff(failures: int, base: float = BASE_SECONDS, cap: float = CAP_SECONDS) -> float:
    """Return the seconds to wait: anything up to a limit that doubles with each failure ("full jitter")."""
    return random.uniform(0, min(cap, base * 2.0 ** min(failures, 64)))


class Notifyd:
    """The HTTP API of one server. Raises NotifydError, or httpx.TransportError when no answer came at all."""

    def __init__(
        self, url: str = "http://localhost:8000", *, attempts: int = ATTEMPTS, token: str | None = None
    ) -> None:
        """`token`: an API key, or a JSON Web Token."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, headers=headers)
        self._attempts = attempts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def notify(
        self,
        message: str,
        type: str = "custom",
        data: dict[str, Any] | None = None,
        *,
        clients: Sequence[str] | None = None,
        topics: Sequence[str] | None = None,
        users: Sequence[str] | None = None,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Publish to everyone, or to clients, topics and users. With a `key` of your own a later run may repeat it."""
        body = {"message": message, "type": type, "data": data, "clients": clients, "topics": topics, "users": users}
        body = {name: value for name, value in body.items() if value is not None}
        return self._ask("POST", "/notify", json=body, headers={"Idempotency-Key": key or uuid.uuid4().hex})

    def health(self) -> dict[str, Any]:
        """Return the health, also that of a server that is shutting down or unhealthy."""
        response = self._http.get("/health")
        if "status" in (body := body_of(response)):
            return body
        raise NotifydError(response)

    def metrics(self) -> dict[str, Any]:
        return self._ask("GET", "/metrics")

    def status(self) -> dict[str, Any]:
        return self._ask("GET", "/status")

    def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        failures = 0
        while True:
            error: Exception
            delay = backoff(failures)
            try:
                response = self._http.request(method, path, **request)
                if response.is_success:
                    return body_of(response)
                error, again = NotifydError(response), response.status_code in BUSY
                delay += retry_after(response)
            except LOST as lost:
                error, again = lost, True
            failures += 1
            if failures == self._attempts or not again:
                raise error
            time.sleep(delay)


def main() -> None:
    parser = argparse.ArgumentParser(description="Publish a notification, or read a server's health and figures.")
    parser.add_argument("--url", default="http://localhost:8000")
    commands = parser.add_subparsers(dest="command", required=True)
    notify = commands.add_parser("notify", help="publish a notification")
    notify.add_argument("message")
    notify.add_argument("--type", default="custom")
    notify.add_argument("--data", type=json.loads, default={}, help="a JSON object")
    for name in ("health", "metrics", "status"):
        commands.add_parser(name, help=f"print the server's {name}")
    arguments = vars(parser.parse_args())
    url, command = arguments.pop("url"), arguments.pop("command")
    with Notifyd(url, token=os.environ.get("TOKEN")) as notifyd:
        try:
            answer = getattr(notifyd, command)(**arguments)
        except (NotifydError, httpx.TransportError) as error:
            raise SystemExit(f"failed: {error}") from None
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
