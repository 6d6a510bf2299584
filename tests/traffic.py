"""Publishers and listeners that miss nothing, for the tests of faults of processes and stores.

Publishers repeat unanswered requests with the same Idempotency-Key, and listeners that lose their connection resume;
both go to the next server where one is gone. Traffic.is_whole() is the verdict.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack, suppress
from itertools import count, cycle
from typing import Any

import httpx
from expected import parse
from history import Delivery, Event, Joined, Publish, Told, faults
from processes import Server, eventually
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException
from ws_clients import PATIENCE

CLIENTS, PUBLISHERS = 6, 4
FREE_SECONDS = 10.0
# Until a request is answered, be it 503.
ANSWER_SECONDS = 5.0
# Longer than a fault and its end, to tell a stuck process from a slow one.
RECOVERY_SECONDS = 20.0
RETRY_SECONDS = 0.05


class Listener:
    """A client that reconnects from its last position, and records every notification."""

    def __init__(self, name: str, fail: Callable[[str], None], history: list[Event], *, may_miss: bool) -> None:
        self.name, self._may_miss = name, may_miss
        self._history = history
        self.start = self.position = ""
        self.received: dict[str, str] = {}
        self.test_counters: list[int] = []
        self.connections = 0
        self.longest_absence = 0.0
        self._fail = fail
        self._lost_at = time.monotonic()

    async def run(self, servers: Sequence[Server]) -> None:
        for server in cycle(servers):
            address = server.address(query=f"client_id={self.name}&since={self.position}")
            with suppress(OSError, WebSocketException):
                async with connect(
                    address, compression=None, proxy=None, max_queue=None, close_timeout=1
                ) as connection:
                    async for text in connection:
                        self._take(parse(text))
            if self.position and self._lost_at == 0:
                self._lost_at = time.monotonic()
            await asyncio.sleep(RETRY_SECONDS)

    def _take(self, message: Any) -> None:
        if message["type"] == "welcome":
            self.connections += 1
            self.longest_absence = max(self.longest_absence, time.monotonic() - self._lost_at)
            self._lost_at = 0.0
        elif message["type"] == "resume":
            if not self.start:
                self._history.append(Joined(self.name, time.monotonic()))
            self.start = self.start or message["data"]["position"]
            self.position = self.position or self.start
            if not message["data"]["complete"]:
                if not self._may_miss:
                    self._fail(f"{self.name} is told that something is missing after {self.position}")
                self._history.append(Told(self.name, time.monotonic()))
                # All that is kept comes again.
                self.position = self.start
        elif message["type"] == "test_notification":
            self.test_counters.append(message["data"]["counter"])
            self._follow(message["id"])
        elif "id" in message:
            self._follow(message["id"])
            self.received[message["id"]] = message["data"]["message"]
            self._history.append(Delivery(self.name, time.monotonic(), message["id"], message["data"]["message"]))

    def _follow(self, position: str) -> None:
        if position <= self.position:
            self._fail(f"{self.name} gets {position} again, or out of order, after {self.position}")
        self.position = position


class Traffic:
    """Publishers, listeners and a look at the counters, from the beginning of a test until its verdict."""

    def __init__(self, *servers: Server, clients: int = CLIENTS, pause: float = 0.01, may_miss: bool = False) -> None:
        self.servers = servers
        self.history: list[Event] = []
        self._pause = pause
        self.answered: dict[str, str] = {}
        self.answers = [0] * PUBLISHERS
        self.faults: list[str] = []
        # Those of the answers that were 503.
        self.reasons: set[str] = set()
        self.listeners = [
            Listener(f"listener{n}", self.faults.append, self.history, may_miss=may_miss) for n in range(clients)
        ]
        self.stays_up = True
        self._publishing = threading.Event()
        self._publishing.set()
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Traffic:
        self._thread.start()
        with ExitStack() as stack:
            # A thread that goes on would keep the whole process of the tests.
            stack.push(self.__exit__)
            self._await(lambda: all(listener.position for listener in self.listeners), "all are listening")
            self._publishers = [self._begin(self._publish(number)) for number in range(PUBLISHERS)]
            self._watchers = [self._begin(self._watch(server)) for server in self.servers]
            self.goes_on()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join()

    def _run(self) -> None:
        async def main() -> None:
            starts = [n % len(self.servers) for n in range(len(self.listeners))]
            places = [self.servers[start:] + self.servers[:start] for start in starts]
            async with asyncio.TaskGroup() as self._tasks:
                for listener, servers in zip(self.listeners, places, strict=True):
                    self._tasks.create_task(listener.run(servers))

        # Publishers that are left, where a test has failed, are cancelled, too.
        with suppress(asyncio.CancelledError), self._runner:
            self._main = self._loop.create_task(main())
            self._loop.run_until_complete(self._main)

    def _begin(self, work: Coroutine[Any, Any, None]) -> Any:
        async def begun() -> None:
            try:
                await work
            except Exception as error:
                self.faults.append(repr(error))
                raise

        return asyncio.run_coroutine_threadsafe(begun(), self._loop)

    def _await(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + RECOVERY_SECONDS
        while not condition():
            assert not self.faults, self.faults[:5]
            assert time.monotonic() < deadline, f"not within {RECOVERY_SECONDS} s: {what}"
            time.sleep(0.02)

    # Traffic.

    async def _publish(self, number: int) -> None:
        start = number % len(self.servers)
        servers = cycle(self.servers[start:] + self.servers[:start])
        # A connection of its own for each request: any of the workers may get it.
        async with httpx.AsyncClient(
            trust_env=False, timeout=ANSWER_SECONDS, limits=httpx.Limits(max_keepalive_connections=0)
        ) as http:
            server = next(servers)
            for n in count():
                message, key = f"{number}-{n}", {"Idempotency-Key": secrets.token_hex(8)}
                began, id = time.monotonic(), None
                while self._publishing.is_set():
                    try:
                        response = await http.post(f"{server.url}/notify", json={"message": message}, headers=key)
                    except httpx.ReadTimeout:
                        self.faults.append(f"/notify does not answer within {ANSWER_SECONDS} s")
                    except httpx.TransportError:
                        server = next(servers)
                    else:
                        if response.status_code == 200:
                            id = response.headers["Notification-Id"]
                            self.answered[id] = message
                            self.answers[number] += 1
                            break
                        if response.status_code != 503:
                            self.faults.append(f"/notify answers {response.text}")
                        self.reasons.add(response.json()["error"]["message"])
                    await asyncio.sleep(RETRY_SECONDS)
                self.history.append(Publish(message, began, time.monotonic(), id))
                if not self._publishing.is_set():
                    return
                await asyncio.sleep(self._pause)

    async def _watch(self, server: Server) -> None:
        """See that no counter goes back."""
        most = [0, 0, 0]
        async with httpx.AsyncClient(
            base_url=server.url, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)
        ) as http:
            while self._publishing.is_set():
                with suppress(httpx.TransportError):
                    metrics = (await http.get("/metrics")).json()["connections"]
                    service = (await http.get("/status")).json()["notification_service"]
                    counts = [metrics["total_connections"], metrics["messages_sent"], service["notifications_sent"]]
                    if self.stays_up and any(now < before for now, before in zip(counts, most, strict=True)):
                        self.faults.append(
                            f"total, messages_sent or notifications_sent go back from {most} to {counts}"
                        )
                    most = counts
                await asyncio.sleep(0.1)

    # The tests.

    def goes_on(self) -> None:
        """Every publisher is answered 200 again, and every listener hears of it."""
        before = list(self.answers)
        self._await(
            lambda: all(now > then + 3 for now, then in zip(self.answers, before, strict=True)), "all publish again"
        )
        newest = max(self.answered)
        self._await(lambda: all(one.position >= newest for one in self.listeners), "all receive again")

    def told(self) -> set[str]:
        """Return the listeners that were told that they missed something."""
        return {event.client for event in self.history if isinstance(event, Told)}

    def says_unhealthy(self) -> None:
        """All servers say on /health that the store is away; nobody loses a connection for that."""
        for server in self.servers:
            eventually(lambda server=server: health(server) == (503, "unhealthy"))

    def is_whole(self, connections: int | None = None) -> None:
        """Go on, end it, and check that everyone has received everything once and in order."""
        for server in self.running():
            eventually(lambda server=server: health(server) == (200, "healthy"), RECOVERY_SECONDS)
        self.goes_on()
        self._publishing.clear()
        for publisher in (*self._publishers, *self._watchers):
            publisher.result(PATIENCE)
        newest = max(self.answered)
        self._await(lambda: all(one.position >= newest for one in self.listeners), "all have received the last")
        assert not self.faults, self.faults[:5]
        assert not (wrong := faults(self.history)), wrong[:5]
        for listener in self.listeners:
            assert listener.longest_absence < FREE_SECONDS
            if connections is not None:
                assert listener.connections == connections
        for server in self.running():
            eventually(lambda server=server: server.active() == len(self.listeners))
            self._has_kept_everything(server)

    def _has_kept_everything(self, server: Server) -> None:
        """Resume from before the first, and receive everything that the listeners received."""
        first = self.listeners[0]
        client = server.join(query=f"since={first.start}")
        resume = client.receive()["data"]
        assert (resume["complete"], resume["replayed"]) == (True, len(first.received))
        assert [message["id"] for message in client.receive_many(resume["replayed"])] == list(first.received)
        client.leave()

    def running(self) -> list[Server]:
        return [server for server in self.servers if server.process.poll() is None]


def health(server: Server) -> tuple[int, str]:
    response = httpx.get(f"{server.url}/health", trust_env=False, timeout=PATIENCE)
    return response.status_code, response.json()["status"]
