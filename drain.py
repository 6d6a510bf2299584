"""The drain: the orderly end of this host's clients.

Owns who is told and closed when, and what the log says meanwhile. A fleet that is told at once comes back as one
wave, so both go out at drain_rate a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from clients import Client, Clients

logger = logging.getLogger("notifyd")

REPORT_SECONDS = 15.0


class Drain:
    """Tells the clients of a directory, waits until they have left, and closes the rest."""

    def __init__(self, clients: Clients, clock: Callable[[], float], rate: float, timeout: float) -> None:
        """Clients told or closed a second at most, and seconds after which those who remain are closed."""
        self._clients = clients
        self._clock = clock
        self._rate = rate
        self._deadline = clock() + timeout

    async def tell(self, tell: Callable[[Client], object]) -> None:
        """Tell everyone, at the rate, until the deadline."""
        async for client in self._paced():
            if self._clock() >= self._deadline:
                return
            tell(client)

    async def wait_until_empty(self, empty: asyncio.Event) -> None:
        """Wait until everyone has left, until the deadline."""
        while self._clients and (left := self._deadline - self._clock()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(empty.wait(), left)

    async def close(self, close: Callable[[Client], object]) -> None:
        """Close everyone who is still there, at the rate."""
        async for client in self._paced():
            close(client)

    async def _paced(self) -> AsyncIterator[Client]:
        started_at = self._clock()
        for count, client in enumerate(list(self._clients)):
            ahead = started_at + count / self._rate - self._clock()
            if ahead > 0.01:
                await asyncio.sleep(ahead)
            if client in self._clients:
                yield client

    @contextlib.asynccontextmanager
    async def reported(self) -> AsyncIterator[None]:
        """Log a few times a minute who remains."""
        reporter = asyncio.ensure_future(self._report())
        try:
            yield
        finally:
            reporter.cancel()

    async def _report(self) -> None:
        while self._clients:
            left = max(0.0, self._deadline - self._clock())
            logger.info(
                "Draining: %d clients remain; they are closed in %.0f s at most (a second signal: now)",
                len(self._clients),
                left,
            )
            await asyncio.sleep(REPORT_SECONDS)
