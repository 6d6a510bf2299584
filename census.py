"""What all processes have counted, and who is connected to them.

Owns the one set of figures that every answer is made from. Each process counts what it hands out; the store adds up
what they report, and knows the rest by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson

import schemas
from clients import Clients
from errors import StoreUnavailable
from schemas import ClientDetails, timestamp
from slices import in_slices
from store import Census, Report, Store

# How long another process gets to say what it has counted.
ANSWER_SECONDS = 1.0
# How often this process tells the store what it has counted, and asks whether it leads.
REPORT_SECONDS = 1.0


class Accounts:
    """The figures, as this process can tell them."""

    def __init__(
        self,
        clients: Clients,
        store: Store,
        peers: Peers,
        clock: Callable[[], float],
        counted: Callable[[], Report],
    ) -> None:
        """`counted` returns what this process has counted since it started."""
        self._clients = clients
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
            async for _, client in in_slices(list(itertools.islice(self._clients, limit)))
        ]

    def _wall_time(self, clock: float) -> float:
        """Return a moment of the clock in seconds since the epoch."""
        return self.started_at + clock - self._started_clock


logger = logging.getLogger("notifyd")

Answer = Callable[[dict[str, Any]], Awaitable[Any]]


class Peers:
    """The other nodes, as this one speaks with them."""

    def __init__(self, store: Store, answer: Answer) -> None:
        """`answer` returns the answer to another node's question, or raises StoreUnavailable."""
        self._store = store
        self._answer = answer
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()

    async def ask(self, node_id: str, question: dict[str, Any], seconds: float) -> Any:
        """Return the node's answer, or None where none comes within so many seconds. Raises StoreUnavailable."""
        number = next(self._numbers)
        answered = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            await self._store.post(node_id, orjson.dumps({"number": number, "question": question}))
            return await asyncio.wait_for(answered, seconds)
        except TimeoutError:
            return None
        finally:
            del self._asked[number]

    async def ask_all(self, node_ids: Iterable[str], question: dict[str, Any], seconds: float) -> list[Any]:
        """Return the answers of those who answer in time."""
        answers = await asyncio.gather(*(self.ask(node_id, question, seconds) for node_id in node_ids))
        return [answer for answer in answers if answer is not None]

    def told(self, sender: str, message: bytes) -> None:
        """Take what another node has posted: a question, or the answer to one of ours."""
        content = orjson.loads(message)
        if "question" in content:
            task = asyncio.ensure_future(self._reply(sender, content["number"], content["question"]))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        elif (answered := self._asked.get(content["number"])) is not None and not answered.done():
            answered.set_result(content["answer"])

    async def _reply(self, sender: str, number: int, question: dict[str, Any]) -> None:
        try:
            answer = await self._answer(question)
            await self._store.post(sender, orjson.dumps({"number": number, "answer": answer}))
        except StoreUnavailable:
            logger.debug("A question of another node stays without an answer: the store is away")
