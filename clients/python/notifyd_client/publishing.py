"""The HTTP API of notifyd, sync and async: publish notifications, and ask for health, metrics and status.

It retries for about half a minute while the server or a proxy is restarting, away or too busy, and longer where the
answer says so (`Retry-After`). Each publish carries a key of its own (`Idempotency-Key`), so that a retry after a lost
answer does not publish twice.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Self

import httpx

from notifyd_client.waiting import backoff

CAP_SECONDS = 10.0
LONGEST_RETRY_AFTER = 120.0
TIMEOUT = httpx.Timeout(10.0)
ATTEMPTS = 8
BUSY = (408, 429, 502, 503, 504)
LOST = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ProxyError)

Body = dict[str, Any]


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


def body_of(response: httpx.Response) -> Body:
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


def _headers(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _notification(message: str, type: str, data: Body | None, key: str | None, **addressed: Any) -> Body:
    """Return the arguments of the request that publishes."""
    body = {"message": message, "type": type, "data": data, **addressed}
    body = {name: value for name, value in body.items() if value is not None}
    return {"json": body, "headers": {"Idempotency-Key": key or uuid.uuid4().hex}}


def _health_of(response: httpx.Response) -> Body:
    if "status" in (body := body_of(response)):
        return body
    raise NotifydError(response)


class _Attempts:
    """The attempts of one request: whether there is another one, and the wait before it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._failures = 0

    def wait_after(self, outcome: httpx.Response | httpx.TransportError) -> float:
        """Return the seconds to wait after a failure; raises it where no other attempt is worth it."""
        error: Exception
        delay = backoff(self._failures, cap=CAP_SECONDS)
        if isinstance(outcome, httpx.Response):
            error, again = NotifydError(outcome), outcome.status_code in BUSY
            delay += retry_after(outcome)
        else:
            error, again = outcome, True
        self._failures += 1
        if self._failures >= self._most or not again:
            raise error
        return delay


class Notifyd:
    """The HTTP API of one server. Raises NotifydError, or httpx.TransportError when no answer came at all."""

    def __init__(
        self, url: str = "http://localhost:8000", *, attempts: int = ATTEMPTS, token: str | None = None
    ) -> None:
        """`token`: an API key, or a JSON Web Token."""
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, headers=_headers(token))
        self._attempts = attempts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
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
        wanted = _notification(message, type, data, key, clients=clients, topics=topics, users=users)
        return self._ask("POST", "/notify", **wanted)

    def health(self) -> dict[str, Any]:
        """Return the health, also that of a server that is shutting down or unhealthy."""
        return _health_of(self._http.get("/health"))

    def metrics(self) -> dict[str, Any]:
        return self._ask("GET", "/metrics")

    def status(self) -> dict[str, Any]:
        return self._ask("GET", "/status")

    def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        attempts = _Attempts(self._attempts)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = self._http.request(method, path, **request)
                if outcome.is_success:
                    return body_of(outcome)
            except LOST as lost:
                outcome = lost
            time.sleep(attempts.wait_after(outcome))


class AsyncNotifyd:
    """Notifyd for a program with an event loop."""

    def __init__(
        self, url: str = "http://localhost:8000", *, attempts: int = ATTEMPTS, token: str | None = None
    ) -> None:
        """`token`: an API key, or a JSON Web Token."""
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT, headers=_headers(token))
        self._attempts = attempts

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def notify(
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
        wanted = _notification(message, type, data, key, clients=clients, topics=topics, users=users)
        return await self._ask("POST", "/notify", **wanted)

    async def health(self) -> dict[str, Any]:
        """Return the health, also that of a server that is shutting down or unhealthy."""
        return _health_of(await self._http.get("/health"))

    async def metrics(self) -> dict[str, Any]:
        return await self._ask("GET", "/metrics")

    async def status(self) -> dict[str, Any]:
        return await self._ask("GET", "/status")

    async def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        attempts = _Attempts(self._attempts)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = await self._http.request(method, path, **request)
                if outcome.is_success:
                    return body_of(outcome)
            except LOST as lost:
                outcome = lost
            await asyncio.sleep(attempts.wait_after(outcome))
