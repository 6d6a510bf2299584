"""The census: the figures of all processes together, their test notifications, and the questions between processes.

Owns the one set of figures that every answer is made from. Each process counts the messages that it hands out; the
store adds up the reports of all, and counts connections and notifications by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from msgspec import Struct

import schemas
from counts import Sample
from errors import DuplicateClient, StoreUnavailable
from schemas import ClientDetails, timestamp
from slices import in_slices
from store import LEASE_SECONDS, Census, Draft, Record, Report

if TYPE_CHECKING:
    from hub import Hub

logger = logging.getLogger("notifyd")

# How long another process gets to answer with its figures.
ANSWER_SECONDS = 1.0
# How long all of them get where none may be left out: a process that stands still is dead by then.
EVERYONE_SECONDS = 2 * LEASE_SECONDS
# How often this process reports its figures to the store, and asks whether it leads.
REPORT_SECONDS = 1.0
# The name of the process where there is only one, with its store in memory.
ONLY_PROCESS = "only"
_TEST_START = b',"type":"test_notification"'


class Share(Struct):
    """The figures that the store does not keep, of one process or of several together.

    Each process has the log in memory: together they have as much as the process with the most.
    """

    clients_behind: int
    log_notifications: int
    log_bytes: int
    details: list[ClientDetails]
    largest_backlog: int = 0
    # What each process has counted for itself, by its name. A process of an earlier version tells none.
    counted: dict[str, list[Sample]] = {}


def _together(shares: Sequence[Share], limit: int) -> Share:
    details = [client for share in shares for client in share.details]
    return Share(
        sum(share.clients_behind for share in shares),
        max(share.log_notifications for share in shares),
        max(share.log_bytes for share in shares),
        sorted(details, key=lambda client: (client.connected_at, client.client_id))[:limit],
        max(share.largest_backlog for share in shares),
        {name: samples for share in shares for name, samples in share.counted.items()},
    )


class CensusTaker:
    """Takes the census, and reports this process's part of it."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._census = Census(0, 0, 0, 0, 0, [])
        self.started(time.time(), 0.0)

    def started(self, at: float, age: float) -> None:
        """Set when the first of the running processes started: seconds since the epoch, and ago."""
        self.started_at = at
        self._started_clock = self._hub.clock() - age

    def uptime(self) -> float:
        """Return the seconds since the first of the running processes started, to the millisecond."""
        return round(self._hub.clock() - self._started_clock, 3)

    async def report(self) -> None:
        """Report this process's counters to the store. Raises StoreUnavailable."""
        fanout = self._hub.fanout
        await self._hub.store.report(Report(fanout.messages_sent, fanout.slow_consumers))

    async def report_regularly(self) -> None:
        """Report for ever, so that little is lost with this process, and stay the leader where it leads.

        Also keep a census at hand for the time when the store is away.
        """
        while True:
            await self.take()
            with contextlib.suppress(StoreUnavailable):
                await self._hub.deliveries.hand_in()
                await self._hub.store.lead()
            due = self._hub.clock() + REPORT_SECONDS
            await asyncio.sleep(REPORT_SECONDS)
            self._hub.counts.tick(self._hub.clock() - due)

    async def take(self) -> Census:
        """Return the figures of all processes; while the store is away, the last ones."""
        with contextlib.suppress(StoreUnavailable):
            await self.report()
            self._census = await self._hub.store.census()
        return self._census

    async def take_exact(self, limit: int = 0) -> tuple[Census, Share]:
        """Return the figures of all processes as of now, with the details of the first `limit` clients.

        Every process is asked for its figures. If it does not answer, its last report stands, and its share is missing.
        """
        census, share = await self.take(), await self.share(limit)
        if census.others:
            with contextlib.suppress(StoreUnavailable):
                question = {"ask": "report", "limit": limit}
                answers = await self._hub.questions.ask_all(census.others, question, ANSWER_SECONDS)
                share = _together([share, *(schemas.check(answer, Share) for answer in answers)], limit)
            census = await self.take()
        return census, share

    async def share(self, limit: int) -> Share:
        """Return this process's share."""
        hub, details = self._hub, await self.details(limit)
        behind, largest = hub.fanout.backlogs()
        counted = {hub.store.node_id or ONLY_PROCESS: list(self._samples())}
        return Share(behind, len(hub.fanout.log), hub.fanout.log.size, details, largest, counted)

    def _samples(self) -> Iterator[Sample]:
        """Yield what this process has counted for itself, and its state."""
        hub = self._hub
        yield from hub.counts.samples(hub.store.durations)
        yield Sample("users", "", [len(hub.clients.by_user)])
        yield Sample("topics", "", [len(hub.clients.by_topic)])
        yield Sample("store_up", "", [int(hub.store.failure is None)])

    async def details(self, limit: int) -> list[ClientDetails]:
        """Return this process's first clients, in the order of their admission."""
        return [
            ClientDetails(
                client_id=client.client_id,
                connected_at=timestamp(self.wall_time(client.connected_at)),
                last_ping=timestamp(self.wall_time(client.heard_at)),
                user_agent=client.user_agent,
            )
            async for _, client in in_slices(list(itertools.islice(self._hub.clients, limit)))
        ]

    def wall_time(self, clock: float) -> float:
        """Return a moment of the Hub's clock in seconds since the epoch."""
        return self.started_at + clock - self._started_clock


class TestNotifications:
    """The test notifications: they show the census. Of all processes, the leader sends them."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        # When the last one began its interval.
        self._last_at = hub.clock()

    def notice(self, record: Record) -> None:
        """Note a test notification, of this process or another."""
        if record.rest.startswith(_TEST_START):
            self._last_at = self._hub.clock()

    async def run(self) -> None:
        """Send one an interval after the last, if this process leads, until the drain."""
        hub, interval = self._hub, self._hub.settings.notification_interval
        self._last_at = hub.clock()
        while hub.is_ready:
            due = self._last_at + interval
            if (early := due - hub.clock()) > 0:
                # Then look again: meanwhile another process may have sent one, or the drain may have begun.
                await asyncio.sleep(early)
                continue
            # The next interval begins when this one was due, not when it was sent, so that delays do not add up.
            # Intervals in which the process did not run are not made up for.
            begins = due if hub.clock() < due + interval else hub.clock()
            with contextlib.suppress(StoreUnavailable):
                await self._send()
            self._last_at = begins

    async def _send(self) -> None:
        hub = self._hub
        if (counter := await hub.store.lead()) is None:
            return
        data = schemas.TestData(
            message=f"Test notification #{counter + 1}",
            counter=counter + 1,
            uptime_seconds=hub.census.uptime(),
            active_connections=(await hub.census.take()).active,
            server_time=timestamp(),
        )
        draft = Draft(schemas.compose("test_notification", data), replayed=False)
        await hub.store.append([draft], counter=counter + 1)


class Questions:
    """Questions to other processes, and the answers to theirs. They travel as the store's mail."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()

    async def ask(self, node_id: str, question: dict[str, Any], seconds: float) -> Any:
        """Return the node's answer, or None if none comes within so many seconds. Raises StoreUnavailable."""
        number = next(self._numbers)
        answered = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            await self._hub.store.post(node_id, orjson.dumps({"number": number, "question": question}))
            return await asyncio.wait_for(answered, seconds)
        except TimeoutError:
            return None
        finally:
            del self._asked[number]

    async def ask_all(self, node_ids: Iterable[str], question: dict[str, Any], seconds: float) -> list[Any]:
        """Return the answers that come in time. Raises StoreUnavailable."""
        answers = await asyncio.gather(*(self.ask(node_id, question, seconds) for node_id in node_ids))
        return [answer for answer in answers if answer is not None]

    async def ask_everyone(self, question: dict[str, Any]) -> list[Any]:
        """Return the answers of all other nodes, without those that die meanwhile.

        Raises StoreUnavailable, also where a living node does not answer.
        """
        store = self._hub.store
        asked = {
            asyncio.ensure_future(self.ask(node_id, question, EVERYONE_SECONDS)): node_id
            for node_id in (await store.census()).others
        }
        answers, waiting = [], set(asked)
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=ANSWER_SECONDS)
                answers += [answered.result() for answered in done]
                if waiting:
                    living = (await store.census()).others
                    waiting = {each for each in waiting if asked[each] in living}
        finally:
            for each in asked:
                each.cancel()
        if None in answers:
            raise StoreUnavailable("A process of the server does not answer")
        return answers

    def receive(self, sender: str, message: bytes) -> None:
        """Take another node's mail: a question, or the answer to one of ours."""
        mail = orjson.loads(message)
        if "question" in mail:
            task = asyncio.ensure_future(self._reply(sender, mail["number"], mail["question"]))
            # The loop itself holds tasks only weakly.
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        elif (answered := self._asked.get(mail["number"])) is not None and not answered.done():
            answered.set_result(mail["answer"])

    async def _reply(self, sender: str, number: int, question: dict[str, Any]) -> None:
        try:
            answer = await self._answer_to(question)
            await self._hub.store.post(sender, orjson.dumps({"number": number, "answer": answer}))
        except StoreUnavailable:
            logger.debug("A question of another node stays without an answer: the store is away")

    async def _answer_to(self, question: dict[str, Any]) -> Any:
        """Return the answer to another node's question. Raises StoreUnavailable."""
        if question["ask"] == "contest":
            try:
                await self._hub.admission.contest(question["client_id"])
            except DuplicateClient:
                return {"stays": True}
            return {"stays": False}
        if question["ask"] == "report":
            await self._hub.census.report()
            return schemas.to_plain(await self._hub.census.share(question["limit"]))
        part = self._hub.deliveries if question["ask"] in ("delivery", "delivered") else self._hub.presence
        return schemas.to_plain(await part.answer(question))
