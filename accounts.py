"""What all processes have counted, and who is connected to them.

Owns the one set of figures that every answer is made from. Each process counts what it hands out; the store adds up
what they report, and knows the rest by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable

import schemas
from directory import Directory
from errors import StoreUnavailable
from peers import Peers
from schemas import ClientDetails, timestamp
from store import Census, Report, Store
from turns import in_slices

# How long another process gets to say what it has counted.
ANSWER_SECONDS = 1.0
# How often this process tells the store what it has counted, and asks whether it leads.
REPORT_SECONDS = 1.0


class Accounts:
    """The figures, as this process can tell them."""

    def __init__(
        self,
        directory: Directory,
        store: Store,
        peers: Peers,
        clock: Callable[[], float],
        counted: Callable[[], Report],
    ) -> None:
        """`counted` returns what this process has counted since it started."""
        self._directory = directory
        self._store = store
        self._peers = peers
        self._clock = clock
        self._counted = counted
        self._census = Census(0, 0, 0, 0, 0, [])
        self.started(time.time(), 0.0)

    def started(self, at: float, age: float) -> None:
        """Say when the first of the running processes started: seconds since the epoch, and ago."""
        self.started_at = at
        self._started_clock = self._clock() - age

    def uptime(self) -> float:
        """Return the seconds since the first of the running processes started, to the millisecond."""
        return round(self._clock() - self._started_clock, 3)

    async def report(self) -> None:
        """Put down what this process has counted. Raises StoreUnavailable."""
        await self._store.report(self._counted())

    async def report_regularly(self) -> None:
        """Report for ever, so that little is lost with this process, and stay the leader where it is one.

        What all have counted is asked for as well: it is what this process states while the store is away.
        """
        while True:
            await self.census()
            with contextlib.suppress(StoreUnavailable):
                await self._store.lead()
            await asyncio.sleep(REPORT_SECONDS)

    async def census(self) -> Census:
        """Return the figures of all processes; of before, while the store is away."""
        with contextlib.suppress(StoreUnavailable):
            await self.report()
            self._census = await self._store.census()
        return self._census

    async def exact_census(self, limit: int = 0) -> tuple[Census, list[ClientDetails]]:
        """Return the figures of all processes as of now, and the details of the first `limit` clients.

        Every process is asked what it has counted; one that does not answer stands with its last report.
        """
        census, details = await self.census(), await self.details(limit)
        if census.others:
            with contextlib.suppress(StoreUnavailable):
                asked = {"ask": "report", "limit": limit}
                for answer in await self._peers.ask_all(census.others, asked, ANSWER_SECONDS):
                    details += schemas.check(answer, list[ClientDetails])
            census = await self.census()
            details = sorted(details, key=lambda one: (one.connected_at, one.client_id))[:limit]
        return census, details

    async def details(self, limit: int) -> list[ClientDetails]:
        """Return this process's first clients, in the order of their admission."""
        return [
            ClientDetails(
                client_id=client.client_id,
                connected_at=timestamp(self._wall_time(client.connected_at)),
                last_ping=timestamp(self._wall_time(client.heard_at)),
                user_agent=client.user_agent,
            )
            async for _, client in in_slices(list(itertools.islice(self._directory, limit)))
        ]

    def _wall_time(self, clock: float) -> float:
        """Return a moment of the clock in seconds since the epoch."""
        return self.started_at + clock - self._started_clock
