"""How one process reaches Redis: the URL, the connections, the script, and the reason when that fails.

Supported are redis://, rediss:// (TLS) and unix://, with user, password and database in the URL; Redis 6.2 or later,
and Valkey. store_redis_primary.py adds Sentinel and Cluster. Knows no operation and no key; store_redis.py does.

1. No text for people holds a part of the URL: redis-py may repeat the password.
2. Every wait has a deadline. An exception of redis-py, OSError or TimeoutError ends the use of both connections.
3. Names are resolved for each pair of connections, and both must reach the same Redis, a primary.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import hiredis
from redis import exceptions
from redis.asyncio.connection import AbstractConnection, Connection, parse_url

from settings import Settings, SettingsError

if TYPE_CHECKING:
    from store_redis_primary import Primary

logger = logging.getLogger("notifyd")

OLDEST_REDIS = (6, 2)

_SCRIPT = Path(__file__).with_name("store_redis.lua").read_text()
_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

Argument = bytes | str | int
Pair = tuple[AbstractConnection, AbstractConnection]


class RedisLink:
    """The way to one Redis."""

    def __init__(self, settings: Settings, url: str) -> None:
        """Read the URL. Raises SettingsError if it is none."""
        timeout = settings.store_timeout
        # Where the primary may change, it is asked for.
        self._primary: Primary | None = None
        try:
            if "+" in url.partition("://")[0]:
                from store_redis_primary import Primary  # noqa: PLC0415 - only Sentinel and Cluster need it

                self._primary = Primary(url, settings.store_prefix, timeout)
                options = self._primary.options
            else:
                # parse_url takes an address without slashes for the default, localhost, and port 0 for none.
                options = dict(parse_url(url if "://" in url and urlsplit(url).port != 0 else ""))
            self._kind: type[AbstractConnection] = options.pop("connection_class", Connection)
            # Deadlines are set here for whole calls. Redis 6 and Valkey answer alike in protocol 2.
            deadlines = {"socket_timeout": None, "socket_connect_timeout": timeout}
            self._options: dict[str, Any] = options | deadlines | {"protocol": 2}
            # Only the constructor notices unknown options.
            known = self._kind(**self._options)
            # Newer versions of redis-py look up which they are for each connection: that holds the loop for 10 ms.
            self._options |= {"driver_info": known.driver_info} if hasattr(known, "driver_info") else {}
        except (ValueError, TypeError, exceptions.RedisError):
            raise SettingsError("--store: expected a URL such as redis://localhost:6379/0") from None
        # Those of the pair that is in use.
        self._present = self._options
        self._timeout, self._replicas = timeout, settings.store_replicas
        # The rule by which Redis evicts keys, as last warned of.
        self._policy = "noeviction"

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Pair]:
        """Give two connections to a primary that is recent enough, for the time of the context.

        The context ends with PrimaryMoved when another primary is named.
        """
        if (primary := self._primary) is None:
            async with self._pair(self._options) as pair:
                yield pair
            return
        try:
            host, port = await primary.find()
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(primary.watch())
                async with self._pair(self._options | {"host": host, "port": port}) as pair:
                    yield pair
                watch.cancel()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            await primary.release()

    @contextlib.asynccontextmanager
    async def _pair(self, options: dict[str, Any]) -> AsyncIterator[Pair]:
        self._present = options
        first, second = self._kind(**options), self._kind(**options)
        try:
            async with asyncio.timeout(self._timeout):
                await first.connect()  # type: ignore[no-untyped-call]
                await second.connect()  # type: ignore[no-untyped-call]
                if await self._check_server(first) != await self._check_server(second):
                    raise exceptions.RedisError("the address leads to two servers")
            yield first, second
        finally:
            for connection in (first, second):
                await connection.disconnect(nowait=True)

    async def connect(self) -> AbstractConnection:
        """Return one more connection to where the pair leads. Raises TimeoutError, OSError or RedisError."""
        connection = self._kind(**self._present)
        async with asyncio.timeout(self._timeout):
            await connection.connect()  # type: ignore[no-untyped-call]
        return connection

    async def _check_server(self, connection: AbstractConnection) -> str:
        """Return the run id. Raise RedisError if Redis is too old, or a replica, and warn if it evicts keys.

        This is also a small command before the large ones: without the password, Redis only reports of those that
        they are too large.
        """
        await connection.send_command("INFO")
        try:
            text = (await connection.read_response()).decode()
        except exceptions.NoPermissionError:
            return ""
        info: dict[str, str] = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        version = info.get("redis_version", "6.2")
        if [int(part) for part in re.findall(r"\d+", version)] < list(OLDEST_REDIS):
            raise exceptions.RedisError(f"Redis 6.2 or later is needed, this is {version}")
        if info.get("role") == "slave":
            raise exceptions.ReadOnlyError("this Redis is a replica")
        policy = info.get("maxmemory_policy", "noeviction") if info.get("maxmemory") != "0" else "noeviction"
        if policy not in ("noeviction", self._policy):
            logger.warning("The store may forget what it has acknowledged: its maxmemory-policy is %s", policy)
        self._policy = policy
        return info.get("run_id", "")

    async def run_script(self, connection: AbstractConnection, *arguments: Argument) -> Any:
        """Run the script once. Raises TimeoutError, or an exception of redis-py."""
        async with asyncio.timeout(self._timeout):
            await send(connection, "EVALSHA", _SHA, *arguments)
            try:
                return await connection.read_response()
            except exceptions.NoScriptError:
                await connection.send_command("EVAL", _SCRIPT, *arguments)
                return await connection.read_response()

    async def await_replicas(self, connection: AbstractConnection) -> None:
        """Return when store_replicas replicas have all that this connection has written. Raises RedisError if they lag.

        The answer takes a quarter of the deadline: a primary that is silent itself has another reason.
        """
        if self._replicas:
            async with asyncio.timeout(self._timeout):
                await send(connection, "WAIT", self._replicas, round(250 * self._timeout))
                there = await connection.read_response()
            if there < self._replicas:
                raise exceptions.RedisError(f"replicas: {self._replicas} needed, {there} answered")

    def reason(self, error: BaseException) -> str:
        """Return a short text for people."""
        if isinstance(error, TimeoutError | exceptions.TimeoutError):
            return f"no answer within {self._timeout:g} s"
        moves = isinstance(error, exceptions.AskError | exceptions.TryAgainError)
        if moves or str(error).startswith(("MOVED ", "ASK ", "TRYAGAIN ")):
            # redis-py 5 has these classes for its cluster client alone.
            return "the slot of its keys is moving"
        cause = error.__context__
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {cause.reason}"
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        # The place in the script follows the reason, or precedes it with a code in Redis before 7.
        text = re.sub(r"Error running script .*: -[A-Z]+ ", "", str(error))
        return text.partition(" script: ")[0].partition("\n")[0][:120]


async def send(connection: AbstractConnection, *command: Argument) -> None:
    """Send a command as hiredis packs it: in 2 us for an append, against 16 us in redis-py."""
    # hiredis's stub declares a tuple of one element.
    await connection.send_packed_command([hiredis.pack_command(command)])  # type: ignore[arg-type]


async def failure_to_reach(settings: Settings) -> str | None:
    """Return the reason why Redis, or so many replicas, cannot be reached; None if they can. Raises SettingsError.

    Nothing is written.
    """
    link = RedisLink(settings, settings.store)
    try:
        async with link.connected() as (connection, _):
            await link.await_replicas(connection)
    except (exceptions.RedisError, OSError, TimeoutError) as error:
        return link.reason(error)
    return None
