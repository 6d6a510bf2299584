"""The heartbeat: pings, the positions of clients that receive nothing, and the end of silent clients.

Anything heard from a client proves it alive, also a protocol pong or a transport that has drained.

1. One sweep serves all clients, spread over the interval; no client has a timer of its own.
2. A client is closed for its silence only if it could have been heard. Time in which this process did not run does not
   count as silence.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING

from clients import HEARTBEAT_PHASES, Client
from errors import DuplicateClient
from log import frame
from schemas import INTERNAL_ERROR, Ping, Position, encode, timestamp

if TYPE_CHECKING:
    from hub import Hub

logger = logging.getLogger("notifyd")

# A client has this long to prove itself alive after a newcomer has asked for its client_id.
PROBE_SECONDS = 2.0
PROBE_STEP_SECONDS = 0.02
# At most this many newcomers wait for the result of a probe.
MAX_WAITING = 1000
# Clients are pinged in portions of this size; other tasks run in between.
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
        """Ping every client once an interval, at its phase, so that a newcomer waits at most an interval too.

        A late phase follows at once: pauses of this process must not add up to a longer interval.
        """
        step = self._interval / HEARTBEAT_PHASES
        due = self._clock()
        for phase in itertools.cycle(range(HEARTBEAT_PHASES)):
            due += step
            wakes_at = max(due, self._clock())
            await asyncio.sleep(wakes_at - self._clock())
            self._notice_pause(self._clock() - wakes_at)
            # After a pause of several intervals, ping each client once and not several times.
            due = max(due, self._clock() - self._interval)
            self._close_all_silent()
            ping = _ping_message()
            for count, client in enumerate([client for client in self._clients if client.phase == phase], 1):
                self._beat(client, ping)
                if not count % SLICE_CLIENTS:
                    await asyncio.sleep(0)

    def _beat(self, client: Client, ping: bytes) -> None:
        """Ping a client, and tell it its position: one that it does not know would leave the history some day."""
        # Without await: the position that is told is the one up to which the client has been handed everything.
        tells = client.takes_positions and client.connection.writable
        if tells and (position := self._hub.fanout.untold(client)) is not None:
            told = frame(encode(Position(position=position, timestamp=timestamp())))
            ping = told if client.connection.is_stream else ping + told
        _ping(client, ping)

    def _notice_pause(self, overslept: float) -> None:
        """After a pause of this process give all clients the full timeout again: none could be heard meanwhile.

        A live client is heard at least every half of the timeout, so a pause of less than a quarter is harmless.
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
        """Return whether a client answers a probe now; concurrent callers share the probe.

        Raises DuplicateClient if too many callers are waiting.
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
        """Ping the client and wait for any sign of life. A client that could not be heard counts as alive."""
        asked_at = self._clock()
        # Steps and not the clock: while this process does not run, no client can be heard.
        for step in range(int(PROBE_SECONDS / PROBE_STEP_SECONDS)):
            if client not in self._clients:
                return False
            if client.heard_at > asked_at or not client.can_prove_life():
                return True
            if client.connection.hears_pongs and step % 25 == 0:
                # More than once: a ping is lost while the client's handshake has not been written yet.
                client.connection.ping()
            elif step == 0:
                _ping(client, _ping_message())
            await asyncio.sleep(PROBE_STEP_SECONDS)
        return client in self._clients and client.heard_at > asked_at


def _ping_message() -> bytes:
    return frame(encode(Ping(timestamp=timestamp())))


def _ping(client: Client, ping: bytes) -> None:
    # A client that is not writable has unread data; it would see the ping only after that.
    if client.connection.writable:
        client.connection.write(ping)
        client.connection.ping()
