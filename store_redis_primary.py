"""The primary of a Redis that fails over, as its sentinels or the nodes of its cluster name it.

Imported only for a URL of Sentinel or Cluster. Knows no key but for its slot, and no operation.

1. All witnesses are asked at once. The primary named with the highest configuration epoch counts, so a witness that is
   behind, silent, dead or ignorant misleads nobody while another answers.
2. A primary is left once the witnesses name another with a higher epoch, even if it still answers: noticed within a
   second, WATCH_SECONDS after the end of one question and ANSWER_SECONDS for the next.
3. Without any answer the primary that was named last stays. So the loss of all witnesses harms no healthy primary. In
   a cluster the nodes of the URL are asked again where no other node that is known answers.
4. A slot that moves is no primary to use: the script names a key that is never there, so Redis refuses every call of it
   until all keys are on one side.

redis-py makes the connections. Its own discovery asks one sentinel after the other and believes the first, and its
cluster client repeats commands by itself; an append must not be repeated without its key.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, NamedTuple, NoReturn
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis import exceptions
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, parse_url
from redis.crc import key_slot

from settings import SettingsError

WATCH_SECONDS = 0.35
# How long the other witnesses may take longer than the first.
ANSWER_SECONDS = 0.3
# The nodes of a cluster that are asked: the primary, its replicas, and some others.
MOST_NODES = 6

Address = tuple[str, int]

_URL = re.compile(r"(?P<scheme>rediss?)\+\w+://(?P<place>[^/?#\s]*)(?P<path>[^?#\s]*)(\?(?P<query>\S*))?")
_SENTINEL = "redis+sentinel://HOST:PORT,HOST:PORT/SERVICE, with /DATABASE after it where it is not 0"
_CLUSTER = "redis+cluster://HOST:PORT,HOST:PORT, without a database"


class PrimaryMoved(exceptions.RedisError):
    """The witnesses name another primary."""


class Named(NamedTuple):
    """A primary, and the epoch of the configuration that made it."""

    epoch: int
    address: Address


# The answer of a witness: None from an ignorant one, an exception for one that is away or refuses to say.
Answer = Named | Exception | None


class Primary:
    """The way to the primary for one URL."""

    def __init__(self, url: str, prefix: str, timeout: float) -> None:
        """Read the URL. Raises SettingsError for a wrong one, or a prefix without the hash tag of a cluster."""
        self._is_cluster = "+cluster:" in url.partition("//")[0]
        try:
            options = self._read(url)
            self._kind: type[Connection] = options.get("connection_class", Connection)
        except ValueError:
            raise SettingsError(f"--store: expected {_CLUSTER if self._is_cluster else _SENTINEL}") from None
        for name in ("host", "port"):
            options.pop(name, None)
        # The options of connections to the primary.
        self.options = options
        self._slot = key_slot(prefix.encode())
        tag, closed, _ = prefix.partition("{")[2].partition("}")
        if self._is_cluster and not (tag and closed):
            raise SettingsError("--store-prefix: a cluster needs a hash tag in it, such as {notifyd}:")
        self._timeout = timeout
        self._connections: dict[Address, AbstractConnection] = {}
        # The questions without an answer so far. A slow witness is heard with a later round.
        self._asked: dict[Address, asyncio.Task[Answer]] = {}
        self._last: Named | None = None

    def _read(self, url: str) -> dict[str, Any]:
        """Take the witnesses out of the URL, and return the other options. Raises ValueError for a wrong URL."""
        if (found := _URL.fullmatch(url)) is None:
            raise ValueError
        user, at, hosts = found["place"].rpartition("@")
        self._seeds = [_address(host, 6379 if self._is_cluster else 26379) for host in hosts.split(",")]
        self._witnesses = self._seeds
        # A plus is one, as in the part before the hosts.
        query = dict(parse_qsl((found["query"] or "").replace("+", "%2B"), keep_blank_values=True))
        service, _, database = found["path"].removeprefix("/").partition("/")
        own = {name: query.pop(f"sentinel_{name}", None) for name in ("username", "password")}
        given = service or database or "db" in query or any(value is not None for value in own.values())
        if not re.fullmatch(r"\d*", database) or (given if self._is_cluster else not service):
            raise ValueError
        if database and "db" in query:
            raise ValueError
        self._service = unquote(service)
        host = hosts.partition(",")[0]
        options = dict(parse_url(f"{found['scheme']}://{user}{at}{host}/{database}?{urlencode(query)}"))
        # Options of the connections to the witnesses.
        secure = {name: value for name, value in options.items() if name.startswith("ssl")}
        user_and_password = {name: value for name, value in options.items() if name in own}
        self._own: dict[str, Any] = secure | (user_and_password if self._is_cluster else own) | {"protocol": 2}
        return options

    async def find(self) -> Address:
        """Return the address of the primary. Raises an exception of redis-py, OSError or TimeoutError."""
        answers = await self._ask_all(self._timeout)
        if self._witnesses is not self._seeds and not _named(answers):
            # All nodes may have other addresses by now.
            self._witnesses = self._seeds
            answers = await self._ask_all(self._timeout)
        named = _named(answers)
        if self._last is not None and len(named) < len(answers):
            # The witnesses with the newest word may be those that are away. Only all of them together take it back, as
            # after a reset.
            named.append(self._last)
        if named:
            self._last = max(named, key=_epoch)
        else:
            kind = "node of a cluster" if self._is_cluster else "sentinel"
            troubles = [answer for answer in answers if isinstance(answer, Exception)]
            # A right that is missing helps most: the answer names it.
            troubles.sort(key=lambda trouble: not isinstance(trouble, exceptions.NoPermissionError))
            raise troubles[0] if troubles else exceptions.ConnectionError(f"no {kind} names a primary")
        return self._last.address

    async def watch(self) -> NoReturn:
        """Raise PrimaryMoved once the witnesses name another primary than find() did."""
        assert self._last
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            newest = max(_named(await self._ask_all(0)), key=_epoch, default=self._last)
            if newest.epoch > self._last.epoch and newest.address != self._last.address:
                # The witness that has said so may be slow to repeat it.
                self._last = newest
                raise PrimaryMoved("another primary has been named")

    async def release(self) -> None:
        """Close the connections to the witnesses."""
        asked, self._asked = self._asked, {}
        for question in asked.values():
            question.cancel()
        await asyncio.gather(*asked.values(), return_exceptions=True)
        for connection in self._connections.values():
            await connection.disconnect(nowait=True)
        self._connections.clear()

    async def _ask_all(self, patience: float) -> list[Answer]:
        """Return the answers of the witnesses so far.

        Where none answers within ANSWER_SECONDS, wait for the first for so many seconds more.
        """
        witnesses = list(dict.fromkeys(self._witnesses))
        for address in witnesses:
            if address not in self._asked:
                self._asked[address] = asyncio.create_task(self._ask(address))
        asked = [self._asked[address] for address in witnesses]
        _, missing = await asyncio.wait(asked, timeout=ANSWER_SECONDS)
        if len(missing) == len(asked):
            await asyncio.wait(asked, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        for address in witnesses:
            if self._asked[address].done():
                del self._asked[address]
        return [question.result() if question.done() else TimeoutError() for question in asked]

    async def _ask(self, address: Address) -> Answer:
        connection = self._connections.pop(address, None)
        try:
            async with asyncio.timeout(self._timeout):
                if connection is None:
                    host, port = address
                    connection = self._kind(host=host, port=port, **self._own)
                    await connection.connect()  # type: ignore[no-untyped-call]
                ask = self._ask_node if self._is_cluster else self._ask_sentinel
                named = await ask(connection, address)
        except BaseException as error:
            if connection is not None:
                await connection.disconnect(nowait=True)
            if isinstance(error, exceptions.ResponseError) and not isinstance(error, exceptions.NoPermissionError):
                # It does not know the service, or is no node of a cluster.
                return None
            if isinstance(error, Exception):
                return error
            raise
        self._connections[address] = connection
        return named

    async def _ask_sentinel(self, connection: AbstractConnection, _: Address) -> Named | None:
        # The epoch first: should the primary change in between, the address is newer than the epoch, and not older.
        # During a failover the address is that of the new primary as soon as it is one; the rest of the state follows
        # when the replicas do.
        await connection.send_command("SENTINEL", "MASTER", self._service)
        await connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        state, address = [await connection.read_response() for _ in range(2)]
        epoch = dict(zip(state[::2], state[1::2], strict=True))[b"config-epoch"]
        return Named(int(epoch), (address[0].decode(), int(address[1])))

    async def _ask_node(self, connection: AbstractConnection, asked: Address) -> Named | None:
        await connection.send_command("CLUSTER", "NODES")
        lines = (await connection.read_response()).decode().splitlines()
        nodes = [_read_node(line, asked[0], named=self._kind is SSLConnection) for line in lines]
        owner = next((node for node in nodes if any(self._slot in slots for slots in node.slots)), None)
        if owner is None:
            return None
        if self._last is None or owner.epoch >= self._last.epoch:
            # The nodes that the URL names may be gone one day.
            nodes.sort(key=lambda node: (node is not owner, node.primary != owner.id))
            self._witnesses = [node.address for node in nodes if node.is_there][:MOST_NODES]
        return Named(owner.epoch, owner.address)


class _Node(NamedTuple):
    """A node of a cluster as another knows it."""

    id: str
    address: Address
    is_there: bool
    primary: str
    epoch: int
    slots: list[range]


def _read_node(line: str, asked: str, *, named: bool) -> _Node:
    """Read a line of CLUSTER NODES from the host `asked`; `named`: certificates have the names of hosts."""
    id, place, flags, primary, _, _, epoch, _, *slots = line.split()
    # ip:port@cport,hostname,... A node that has not met another yet does not know its own address.
    endpoint, *names = place.split(",")
    ip, _, port = endpoint.partition("@")[0].rpartition(":")
    host = names[0] if named and names and names[0] else ip or asked
    is_there = not {"fail", "noaddr", "handshake"} & set(flags.split(","))
    # Slots in brackets are on their way.
    bounds = [slot.split("-") for slot in slots if slot[0] != "["]
    return _Node(
        *(id, (host, int(port)), is_there, primary, int(epoch)),
        [range(int(bound[0]), int(bound[-1]) + 1) for bound in bounds],
    )


def _named(answers: list[Answer]) -> list[Named]:
    return [answer for answer in answers if isinstance(answer, Named)]


def _epoch(named: Named) -> int:
    return named.epoch


def _address(text: str, port: int) -> Address:
    """Return host and port of a text such as redis-1:26379 or [::1]."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.username is not None or parts.port == 0:
        raise ValueError
    return parts.hostname, parts.port or port
