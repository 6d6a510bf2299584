"""How one process reaches Redis: the URL, the connections, the script, and the reason when that fails.

Supported are redis://, rediss:// (TLS) and unix://, with user, password and database in the URL; Redis 6.2 or later,
and Valkey. Sentinel and Cluster are not supported. Knows no operation and no key; store_redis.py does.

1. No text for people holds a part of the URL: redis-py may repeat the password.
2. Every wait has a deadline. An exception of redis-py, OSError or TimeoutError ends the use of both connections.
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
from typing import Any

import hiredis
from redis import exceptions
from redis.asyncio.connection import AbstractConnection, Connection, parse_url

from settings import SettingsError

logger = logging.getLogger("notifyd")

OLDEST_REDIS = (6, 2)

_SCRIPT = Path(__file__).with_name("store_redis.lua").read_text()
_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

Argument = bytes | str | int


class RedisLink:
    """The way to one Redis."""

    def __init__(self, url: str, timeout: float) -> None:
        """Read the URL. Raises SettingsError if it is none."""
        try:
            # parse_url takes an address without slashes for the default, localhost.
            options: dict[str, Any] = dict(parse_url(url if "://" in url else ""))
            self._kind: type[AbstractConnection] = options.pop("connection_class", Connection)
            # Deadlines are set here for whole calls. Redis 6 and Valkey answer alike in protocol 2.
            deadlines = {"socket_timeout": None, "socket_connect_timeout": timeout}
            self._options = options | deadlines | {"protocol": 2}
            # Only the constructor notices unknown options.
            self._kind(**self._options)
        except (ValueError, TypeError, exceptions.RedisError):
            raise SettingsError("--store: expected a URL such as redis://localhost:6379/0") from None
        self._timeout = timeout
        # The rule by which Redis evicts keys, as last warned of.
        self._policy = "noeviction"

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[AbstractConnection, AbstractConnection]]:
        """Give two connections to a Redis that is recent enough, for the time of the context."""
        first, second = self._kind(**self._options), self._kind(**self._options)
        try:
            async with asyncio.timeout(self._timeout):
                await first.connect()  # type: ignore[no-untyped-call]
                await second.connect()  # type: ignore[no-untyped-call]
                await self._check_server(first)
            yield first, second
        finally:
            for connection in (first, second):
                await connection.disconnect(nowait=True)

    async def _check_server(self, connection: AbstractConnection) -> None:
        """Raise RedisError if Redis is too old, and warn if it evicts keys.

        This is also a small command before the large ones: without the password, Redis only reports of those that
        they are too large.
        """
        await connection.send_command("INFO")
        try:
            text = (await connection.read_response()).decode()
        except exceptions.NoPermissionError:
            return
        info = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        version = info.get("redis_version", "6.2")
        if [int(part) for part in re.findall(r"\d+", version)] < list(OLDEST_REDIS):
            raise exceptions.RedisError(f"Redis 6.2 or later is needed, this is {version}")
        policy = info.get("maxmemory_policy", "noeviction") if info.get("maxmemory") != "0" else "noeviction"
        if policy not in ("noeviction", self._policy):
            logger.warning("The store may forget what it has acknowledged: its maxmemory-policy is %s", policy)
        self._policy = policy

    async def run_script(self, connection: AbstractConnection, *arguments: Argument) -> Any:
        """Run the script once. Raises TimeoutError, or an exception of redis-py."""
        async with asyncio.timeout(self._timeout):
            await send(connection, "EVALSHA", _SHA, *arguments)
            try:
                return await connection.read_response()
            except exceptions.NoScriptError:
                await connection.send_command("EVAL", _SCRIPT, *arguments)
                return await connection.read_response()

    def reason(self, error: BaseException) -> str:
        """Return a short text for people."""
        if isinstance(error, TimeoutError | exceptions.TimeoutError):
            return f"no answer within {self._timeout:g} s"
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
