"""A store without a Hub: members, each a store with a Node that records everything it is told.

Also run as a program: a member in a process of its own, which runs the expressions on its standard input.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from signal import SIGCONT, SIGSTOP
from typing import Any

from ws_clients import PATIENCE

import store
from log import Audience
from settings import Settings
from store import Draft, MemoryStore, Opening, Record, Registration, Store

# Seconds: how soon a test has a node taken for dead.
SHORT_LEASE = 1.0
SOMETHING = Draft(b',"type":"custom"}')


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(test(*arguments, **fixtures))

    return run


def make(url: str, settings: Settings) -> Store:
    """Return a store by its address, as a server would make it."""
    kind, _, place = url.partition(":")
    if kind == "sqlite":
        return importlib.import_module("store_sqlite").SqliteStore(settings, place)  # type: ignore[no-any-return]
    if kind.startswith("redis") or kind == "unix":
        return importlib.import_module("store_redis").RedisStore(settings, url)  # type: ignore[no-any-return]
    assert kind == "memory"
    return MemoryStore(settings)


def shorten_leases(seconds: float) -> None:
    """Have nodes taken for dead sooner than a server would wait."""
    for name in ("store", "store_sqlite", "store_sqlite_transaction", "store_redis"):
        module = importlib.import_module(name)
        module.LEASE_SECONDS, module.RENEW_SECONDS, module.TRIM_SECONDS = seconds, seconds / 5, seconds / 5


def threads_left() -> list[threading.Thread]:
    """Return the stores' threads, when those that are about to end have ended."""
    threads = [thread for thread in threading.enumerate() if thread.name == "notifyd-store"]
    for thread in threads:
        thread.join(1)
    return [thread for thread in threads if thread.is_alive()]


def audience(clients: Iterable[str] = (), topics: Iterable[str] = (), users: Iterable[str] = ()) -> Audience:
    return Audience(frozenset(clients), frozenset(topics), frozenset(users))


def registration(client_id: str, *topics: str, user: str = "", address: str = "") -> Registration:
    return Registration(client_id, user, frozenset(topics), address)


class Member:
    """A process that uses the store, as far as the store sees it."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.store = make(url, Settings(store=url, **settings))
        self.openings: list[Opening] = []
        self.records: list[Record] = []
        self.mail: list[tuple[str, bytes]] = []
        self.clients: dict[str, Registration] = {}
        self.lost_clients: list[str] = []
        self.times_missed = 0
        # Delivered before the log was another.
        self.forgotten: list[Record] = []
        self._changed = asyncio.Event()

    # Called by the store.

    def opened(self, opening: Opening) -> None:
        assert not self.records
        self.openings.append(opening)
        self._changed.set()

    def deliver(self, records: Sequence[Record]) -> None:
        assert self.openings and records
        self.records += records
        self._changed.set()

    def missed(self, before: str) -> None:
        self.times_missed += 1
        self.forgotten, self.records, self.before = self.forgotten + self.records, [], before
        self._changed.set()

    def receive_mail(self, sender: str, message: bytes) -> None:
        self.mail.append((sender, message))
        self._changed.set()

    def kept(self, since: str) -> tuple[str, bool, Iterator[Record]]:
        front = self.before if self.times_missed else self.opening.before
        records = self.records if self.times_missed else self.opening.records + self.records
        known = since == front or since in {record.id for record in records}
        return front, known, (record for record in reversed(records) if record.id > since)

    def registrations(self) -> Iterable[Registration]:
        return list(self.clients.values())

    def evicted(self, client_ids: Sequence[str]) -> None:
        self.lost_clients += client_ids
        self._changed.set()

    def recipients(self, audience: Audience | None) -> int:
        return sum(audience is None or audience.includes(*client[:3]) for client in self.clients.values())

    # Called by the tests.

    @property
    def opening(self) -> Opening:
        (opening,) = self.openings
        return opening

    @property
    def ids(self) -> list[str]:
        """Return the ids of all records, in their order of arrival."""
        return [record.id for record in self.records]

    async def open(self) -> Member:
        await self.store.open(self)
        return self

    async def publish(self, *drafts: Draft) -> str:
        """Append, and return the id of the last."""
        appended = await self.store.append(drafts or [SOMETHING])
        return appended.receipts[-1].id

    async def publish_for_ever(self) -> None:
        """Print each id as soon as it is known."""
        while True:
            print(await self.publish(), flush=True)

    async def admit(self, client_id: str, *topics: str, **groups: str) -> str:
        client = registration(client_id, *topics, **groups)
        newest = await self.store.admit(client)
        self.clients[client_id] = client
        return newest

    def leave(self, client_id: str) -> None:
        del self.clients[client_id]
        self.store.leave(client_id)

    async def active(self) -> int:
        return (await self.store.census()).active

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition holds; each call of the store checks it at once."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._changed.clear()
                try:
                    await asyncio.wait_for(self._changed.wait(), 0.02)
                except TimeoutError:
                    continue

    async def eventually(self, question: Callable[[], Any]) -> None:
        """Wait until the coroutine that the question makes returns something true."""
        async with asyncio.timeout(PATIENCE):
            while not await question():
                await asyncio.sleep(0.02)


@asynccontextmanager
async def members(url: str, count: int = 1, **settings: Any) -> AsyncIterator[list[Member]]:
    """Open so many members in this process; close them at the end."""
    opened = [await Member(url, **settings).open() for _ in range(count)]
    try:
        yield opened
    finally:
        for member in opened:
            await member.store.close()


class Process:
    """A member in a process of its own."""

    def __init__(self, url: str, lease: float = store.LEASE_SECONDS, **settings: int) -> None:
        # Not in the child, which would take twice as long to start.
        from processes import ROOT, environment

        self._process = subprocess.Popen(
            [sys.executable, __file__, url, str(lease), json.dumps(settings)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.ask("True")

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, expression: str) -> None:
        """Have an expression evaluated over there, about `member` and the names of this module, without waiting."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{expression}\n".encode())
        self._process.stdin.flush()

    def result(self) -> Any:
        """Return the value of the oldest expression, or raise its exception."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process has ended"
        result = pickle.loads(bytes.fromhex(line.decode()))
        if isinstance(result, Exception):
            raise result
        return result

    def ask(self, expression: str) -> Any:
        self.begin(expression)
        return self.result()

    def answered(self, count: int) -> list[str]:
        """Return the first lines that publish_for_ever() prints."""
        assert self._process.stdout is not None
        return [self._process.stdout.readline().decode().strip() for _ in range(count)]

    def stop(self) -> None:
        """Have the process do nothing, until it is told to go on."""
        self._process.send_signal(SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(SIGCONT)

    def kill(self) -> None:
        """End the process at once, as a power switch does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


async def _serve(url: str, settings: dict[str, int]) -> None:
    member = await Member(url, store_timeout=10, max_connections=10_000, **settings).open()
    loop = asyncio.get_running_loop()
    while expression := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            result = eval(expression, {**vars(store), **globals(), "member": member})
            if inspect.isawaitable(result):
                result = await result
        except Exception as error:
            result = error
        print(pickle.dumps(result).hex(), flush=True)


if __name__ == "__main__":
    shorten_leases(float(sys.argv[2]))
    asyncio.run(_serve(sys.argv[1], json.loads(sys.argv[3])))
