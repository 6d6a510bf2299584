"""Questions that one process asks another through the store: whether a client is alive, and what was counted.

Owns the form of questions and answers. A node that is gone answers nothing; the asker waits for a bounded time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson

from errors import StoreUnavailable
from store import Store

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
