"""A Hub without a network: a loop with a time that moves only when everything waits, and a fake connection."""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from expected import parse

from connection import ConnectionState, Receiver
from log import payloads

Result = TypeVar("Result")


# An iteration of the loop takes this long, so that a wait for a rounding error's worth of time ends too.
TURN_SECONDS = 1e-6


class _Instant(selectors.SelectSelector):
    """Waits for nothing: where a loop would sleep, its time moves on instead."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits, and nothing will ever happen"
        self.now += max(TURN_SECONDS, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop without I/O: its course depends on nothing but the tasks it runs."""

    def __init__(self) -> None:
        self._instant = _Instant()
        super().__init__(self._instant)

    def time(self) -> float:
        return self._instant.now

    def pause(self, seconds: float) -> None:
        """Let time pass while nothing runs, as for a stopped process."""
        self._instant.now += seconds

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function inside the loop."""

        async def run() -> Result:
            return function(*arguments)

        return self.run_until_complete(run())

    def turn(self, times: int) -> None:
        """Let every task that is ready go on, so many times; next to no time passes."""

        async def run() -> None:
            for _ in range(times):
                await asyncio.sleep(0)

        self.run_until_complete(run())

    def close(self) -> None:
        for task in asyncio.all_tasks(self):
            task.cancel()
        self.turn(3)
        super().close()


def virtually(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on the virtual loop that it has as `loop`."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        fixtures["loop"].run_until_complete(test(**fixtures))

    return run


class FakeConnection:
    """A connection that records all bytes handed to it. Its peer reads until it is stalled, and answers pings."""

    def __init__(self, *, is_stream: bool = False, one_at_a_time: bool = False, room: float = float("inf")) -> None:
        self.state = ConnectionState.CONNECTING
        self.writable = False
        self.is_stream = is_stream
        self.hears_pongs = not is_stream
        self.one_at_a_time = one_at_a_time
        self.room = room  # the writes that the peer still takes: at 0 it has stalled
        self.is_alive = True
        self.is_held = False
        self.receiver: Receiver | None = None
        self.messages: list[Any] = []
        self.position = ""  # from which its client would resume
        self.goodbye: tuple[int, str] | None = None

    def accept(self, receiver: Receiver, greeting: bytes, position: str) -> None:
        self.position = position
        self.receiver = receiver
        self.state, self.writable = ConnectionState.OPEN, True
        self.write(greeting)

    def write(self, frames: bytes) -> None:
        assert frames, "an empty write moves nobody on"
        if self.state is ConnectionState.OPEN:
            self.messages += [parse(payload) for payload in payloads(frames)]
            self.room -= 1
            if self.one_at_a_time or self.room < 1:
                self.writable = False
                asyncio.get_running_loop().call_soon(self.flush)

    def buffered(self) -> int:
        return 0

    def hold(self, *, held: bool) -> None:
        self.is_held = held

    def is_mute(self) -> bool:
        return self.is_held

    def ping(self) -> None:
        if self.hears_pongs:
            asyncio.get_running_loop().call_later(0.01, self.pong)

    def close(self, code: int, reason: str) -> None:
        if self.state < ConnectionState.CLOSING:
            self.goodbye = code, reason
            self.state, self.writable = ConnectionState.CLOSING, False
            asyncio.get_running_loop().call_later(1, self.end)

    # The peer and the network.

    def say(self, message: str | None = None) -> None:
        """Send a message, or a pong."""
        if self.state is ConnectionState.OPEN:
            assert self.receiver is not None
            self.receiver.heard()
            if message is not None:
                self.receiver.received(message)

    def pong(self) -> None:
        """Answer a ping, unless the network has gone meanwhile: it takes an answer in flight with it."""
        if self.is_alive:
            self.say()

    def stall(self) -> None:
        self.room, self.writable = 0, False

    def read_on(self) -> None:
        self.room = float("inf")
        self.flush()

    def flush(self) -> None:
        """Be writable again, unless the peer has stalled."""
        if self.state is ConnectionState.OPEN and self.room >= 1 and not self.writable:
            self.writable = True
            assert self.receiver is not None
            self.receiver.drained()

    def end(self) -> None:
        if ConnectionState.CONNECTING < self.state < ConnectionState.CLOSED:
            self.state, self.writable = ConnectionState.CLOSED, False
            assert self.receiver is not None
            self.receiver.left()


async def with_turns(work: Awaitable[Result]) -> tuple[Result, int]:
    """Return the result of some work, and how many turns another task had meanwhile."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    try:
        return await work, turns
    finally:
        task.cancel()
