"""The heartbeat: who is alive, and who has been silent for too long.

Owns pings, and what silence means. Anything heard from a client proves it alive, a protocol pong too; so does a
transport that has drained.

1. One sweep for all clients, spread over the interval; no timer of a client's own.
2. Only a client that could have been heard is closed for its silence, and only time in which this process ran counts.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING

from clients import HEARTBEAT_PHASES, Client
from errors import DuplicateClient
from log import frame
from schemas import INTERNAL_ERROR, Ping, encode, timestamp

if TYPE_CHECKING:
    from hub import Hub

logger = logging.getLogger("notifyd")

# How long a client whose client_id is claimed by a newcomer has to prove that it is alive.
PROBE_SECONDS = 2.0
PROBE_TURN_SECONDS = 0.02
# Newcomers that wait for the result of a probe, at most.
MAX_WAITING = 1000
# A large crowd is pinged in portions of this many.
SLICE_CLIENTS = 250


class Heartbeat:
    """Pings a Hub's clients, and closes the silent."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._clients = hub.clients
        self._clock = hub.clock
        self._timeout = hub.settings.ping_timeout
        # A live client must get the chance to prove itself before its time is over.
        self._interval = min(hub.settings.ping_interval, self._timeout / 2)
        self._awake_since = hub.clock()
        self._probes: dict[Client, asyncio.Task[bool]] = {}
        self._waiting = 0

    async def run(self) -> None:
        """Ping every client once an interval. Each has a phase, so that a newcomer waits no longer for its first.

        What is late is made up for at once: pauses of this process must not add up to a longer interval.
        """
        step = self._interval / HEARTBEAT_PHASES
        due = self._clock()
        for phase in itertools.cycle(range(HEARTBEAT_PHASES)):
            due += step
            wakes_at = max(due, self._clock())
            await asyncio.sleep(wakes_at - self._clock())
            self._notice_pause(self._clock() - wakes_at)
            # Everyone is pinged once, not once for each interval that nothing ran.
            due = max(due, self._clock() - self._interval)
            self._close_all_silent()
            ping = _ping_message()
            for count, client in enumerate([client for client in self._clients if client.phase == phase], 1):
                _ping(client, ping)
                if not count % SLICE_CLIENTS:
                    await asyncio.sleep(0)

    def _notice_pause(self, overslept: float) -> None:
        """Give everyone the whole time again after this process has not run for a while: nobody could be heard.

        A live client is heard at least every half of the timeout, so a pause of less than a quarter harms nobody.
        """
        if overslept > self._timeout / 4:
            logger.warning("The process has not run for %.1f s", overslept)
            self._awake_since = self._clock()

    def _close_all_silent(self) -> None:
        limit = self._clock() - self._timeout
        if self._awake_since > limit:
            return
        for client in [client for client in self._clients if client.heard_at < limit]:
            if client.can_prove_life():
                logger.info("Client %s has been silent for too long and is closed", client.client_id)
                self._hub.admission.dismiss(client, INTERNAL_ERROR, "Ping timeout")

    async def is_alive(self, client: Client) -> bool:
        """Ask the client now whether it is alive; all who want to know about one client at a time ask once.

        Raises DuplicateClient where too many are waiting to know.
        """
        if self._waiting >= MAX_WAITING:
            raise DuplicateClient(f"Client {client.client_id} is already connected")
        if (probe := self._probes.get(client)) is None:
            probe = self._probes[client] = asyncio.ensure_future(self._probe(client))
            probe.add_done_callback(lambda _: self._probes.pop(client, None))
        self._waiting += 1
        try:
            return await asyncio.shield(probe)
        finally:
            self._waiting -= 1

    async def _probe(self, client: Client) -> bool:
        """Ping the client and wait for anything from it; where it could not be heard, take it for alive."""
        asked_at = self._clock()
        # Turns and not the clock: while this process does not run, nobody can be heard.
        for turn in range(int(PROBE_SECONDS / PROBE_TURN_SECONDS)):
            if client not in self._clients:
                return False
            if client.heard_at > asked_at or not client.can_prove_life():
                return True
            if client.connection.hears_pongs and turn % 25 == 0:
                # More than once: where the handshake of a client has not been written yet, a ping is lost.
                client.connection.ping()
            elif turn == 0:
                _ping(client, _ping_message())
            await asyncio.sleep(PROBE_TURN_SECONDS)
        return client in self._clients and client.heard_at > asked_at


def _ping_message() -> bytes:
    return frame(encode(Ping(timestamp=timestamp())))


def _ping(client: Client, ping: bytes) -> None:
    # One that cannot be written to has enough to read, and would see no ping before that.
    if client.connection.writable:
        client.connection.write(ping)
        client.connection.ping()
