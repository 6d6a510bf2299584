"""The drain: the orderly end of this process's clients.

Owns the order of the end (announce, wait, close), its pace and its deadline. A fleet that is told or closed at once
comes back in one wave, so both are done at drain_rate clients a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import schemas
from clients import Client
from errors import StoreUnavailable
from fanout import NOBODY
from log import frame, payload
from positions import Positions
from schemas import GOING_AWAY, encode, timestamp
from store import Draft, Once

if TYPE_CHECKING:
    from hub import Hub

logger = logging.getLogger("notifyd")

REPORT_SECONDS = 15.0


class Drain:
    """One drain of a Hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._deadline = hub.clock() + hub.settings.shutdown_timeout

    async def run(self, host: str) -> None:
        """Announce the shutdown, wait until all clients have left or the deadline is over, and close the rest.

        Cancelled at any point, close the rest at once.
        """
        hub = self._hub
        try:
            async with self._reported():
                # The lock waits for the current pass, and keeps the next one from telling all clients at once.
                async with hub.fanout.passing:
                    await self._announce(host)
                    async for client in self._paced():
                        if self._left() <= 0:
                            break
                        hub.fanout.advance(client)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(hub.admission.empty.wait(), max(0.0, self._left()))
            await hub.publishers.settle()
            async for client in self._paced():
                self._close(client)
        finally:
            for client in list(hub.clients):
                self._close(client)

    async def _announce(self, host: str) -> None:
        """Put the system notification and the shutdown message at the end of the log.

        In the store's log the notification is addressed to no client: it only gives the position to resume from, the
        same one for all processes of the host.
        """
        log, now = self._hub.fanout.log, timestamp()
        rest = schemas.compose("system", schemas.SystemData(system_time=now), sender="system")
        once = Once(f"drain {host}", b"") if host else None
        try:
            appended = await self._hub.store.append([Draft(rest, NOBODY, replayed=False)], once)
            position = appended.receipts[0].id
        except StoreUnavailable:
            position = Positions(log.position).next()
        message = encode(schemas.ShutdownMessage(timestamp=now))
        log.append_farewell(frame(payload(position, rest)), frame(message), position)
        self._hub.fanout.tally.announce(len(self._hub.clients))

    def _close(self, client: Client) -> None:
        self._hub.fanout.advance(client)
        self._hub.admission.dismiss(client, GOING_AWAY, "Server shutting down")

    def _left(self) -> float:
        """Return the seconds until the deadline."""
        return self._deadline - self._hub.clock()

    async def _paced(self) -> AsyncIterator[Client]:
        """Yield the clients, at most drain_rate a second; those that leave meanwhile are skipped."""
        clock, rate = self._hub.clock, self._hub.settings.drain_rate
        started_at = clock()
        for count, client in enumerate(list(self._hub.clients)):
            ahead = started_at + count / rate - clock()
            if ahead > 0.01:
                await asyncio.sleep(ahead)
            if client in self._hub.clients:
                yield client

    @contextlib.asynccontextmanager
    async def _reported(self) -> AsyncIterator[None]:
        """Log a few times a minute how many clients remain."""
        reporter = asyncio.ensure_future(self._report())
        try:
            yield
        finally:
            reporter.cancel()

    async def _report(self) -> None:
        while left := len(self._hub.clients):
            logger.info(
                "Draining: %s closed in %.0f s at most (a second signal: now)",
                "1 client remains; it is" if left == 1 else f"{left} clients remain; they are",
                max(0.0, self._left()),
            )
            await asyncio.sleep(REPORT_SECONDS)
