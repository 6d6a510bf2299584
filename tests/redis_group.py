"""Real groups of Redis servers: a primary with replicas and sentinels, and a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

import redis
from certificates import Pair
from processes import free_port, program
from redis.crc import key_slot
from redis_server import RedisServer

SERVICE = "main"
# Of the default prefix.
SLOT = key_slot(b"{notifyd}")
# How long a server may be silent before the others take it for dead, in milliseconds.
SILENCE = 1000
READY_SECONDS = 40.0
# By default a primary waits for five seconds, in case more replicas come.
AT_ONCE = ("--repl-diskless-sync-delay", "0")


def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds; a server that does not answer yet is none that fulfils it."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with contextlib.suppress(redis.RedisError):
            if condition():
                return
        assert time.monotonic() < deadline, "the group of Redis servers is not ready"
        time.sleep(0.02)


# The user of the processes that a partition leaves alone with the old primary.
MINORITY = ("ACL", "SETUSER", "minority", "on", "nopass", "~*", "&*", "+@all")


def shut_out(primary: RedisServer) -> None:
    """Let nobody but the minority reach a server, nor its replicas."""
    primary.command("ACL", "SETUSER", "default", "off")
    primary.command("CLIENT", "KILL", "USER", "default", user="minority")


def replica_of(primary: RedisServer, *flags: str) -> RedisServer:
    return RedisServer(flags=("--replicaof", f"127.0.0.1 {primary.port}", *AT_ONCE, *flags))


def tls_lines(pair: Pair) -> list[str]:
    """Return the lines of a configuration with TLS, also between servers, by a certificate that is its own root."""
    files = {"tls-cert-file": pair.certificate, "tls-key-file": pair.key, "tls-ca-cert-file": pair.certificate}
    return [*(f"{name} {value}" for name, value in files.items()), "tls-auth-clients no", "tls-replication yes"]


class Sentinel:
    """A redis-server that watches others; it knows the port of the primary of one service at first."""

    def __init__(self, primary: int, *lines: str, service: str = SERVICE, quorum: int = 2) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="notifyd-sentinel-")
        self.port = free_port()
        config = Path(self._directory.name) / "sentinel.conf"
        own = (
            f"sentinel monitor {service} 127.0.0.1 {primary} {quorum}",
            f"sentinel down-after-milliseconds {service} {SILENCE}",
            f"sentinel failover-timeout {service} 3000",
        )
        first = (f"port {self.port}", "bind 127.0.0.1", f"dir {self._directory.name}", "logfile sentinel.log")
        config.write_text("\n".join((*first, *own, *lines)))
        self._command = (program("redis-server"), str(config), "--sentinel")
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        until(lambda: self.command("PING"))

    def command(self, *words: str | int, **options: Any) -> Any:
        with redis.Redis(port=self.port, decode_responses=True, retry=None, **options) as client:
            return client.execute_command(*words)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self._directory.cleanup()


class Group:
    """A primary, replicas and sentinels."""

    def __init__(self, replicas: int = 2, sentinels: int = 3, flags: tuple[str, ...] = ()) -> None:
        first = RedisServer(flags=(*AT_ONCE, *flags))
        self.servers, self.sentinels = [first], list[Sentinel]()
        try:
            self.servers += [replica_of(first, *flags) for _ in range(replicas)]
            until(lambda: len(first.command("ROLE")[2]) == replicas)
            until(lambda: all(server.command("ROLE")[3] == "connected" for server in self.servers[1:]))
            self.sentinels += [Sentinel(first.port) for _ in range(sentinels)]
            until(lambda: all(self._knows_all(sentinel) for sentinel in self.sentinels))
        except BaseException:
            self.close()
            raise

    def _knows_all(self, sentinel: Sentinel) -> bool:
        state = sentinel.command("SENTINEL", "MASTER", SERVICE)
        wanted = (len(self.servers) - 1, len(self.sentinels) - 1)
        return (int(state["num-slaves"]), int(state["num-other-sentinels"])) == wanted

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{one.port}' for one in self.sentinels)}/{SERVICE}"

    @property
    def primary(self) -> RedisServer:
        """Return the primary by the word of the sentinels."""
        for sentinel in self.sentinels:
            with contextlib.suppress(redis.RedisError):
                _, port = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
                return next(server for server in self.servers if server.port == int(port))
        raise AssertionError("no sentinel answers")

    def promoted(self, old: RedisServer) -> RedisServer:
        """Wait until another server than the old one is the primary, and return it."""
        until(lambda: any(self._is_primary(one) for one in self.servers if one is not old))
        return next(one for one in self.servers if one is not old and self._is_primary(one))

    def _is_primary(self, server: RedisServer) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(server.command("ROLE")[0] == "master")
        return False

    def url_behind_a_partition(self) -> str:
        """Return a URL for processes that stay with the primary when cut_off() leaves it alone."""
        for server in self.servers:
            server.command(*MINORITY)
        return f"redis+sentinel://minority:any@127.0.0.1:{self.sentinels[0].port}/{SERVICE}"

    def cut_off(self, primary: RedisServer) -> None:
        """Let nobody but the user of url_behind_a_partition() reach the primary; that user reaches no sentinel."""
        self.sentinels[0].process.send_signal(SIGSTOP)
        shut_out(primary)

    def heal(self, primary: RedisServer) -> None:
        primary.command("ACL", "SETUSER", "default", "on", user="minority")
        self.sentinels[0].process.send_signal(SIGCONT)

    def close(self) -> None:
        for one in (*self.sentinels, *self.servers):
            one.close()


class Doors:
    """The ways to the buses of a cluster, in a thread of their own; each server comes from an address of its own."""

    def __init__(self) -> None:
        self._cut_off = ""
        # Open connections, with the addresses of both servers.
        self._open: list[tuple[set[str], asyncio.StreamWriter]] = []
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def open(self, port: int, address: str) -> int:
        """Return the port that leads to the bus of the server with this address."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(port, address, reader, writer)

        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), self._loop)
        self._servers.append(server := starting.result())
        return int(server.sockets[0].getsockname()[1])

    async def _serve(self, port: int, to: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        addresses = {to, writer.get_extra_info("peername")[0]}
        if self._cut_off not in addresses:
            with contextlib.suppress(OSError):
                other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)
                self._open += (addresses, writer), (addresses, other_writer)
                await asyncio.gather(carry(reader, other_writer), carry(other_reader, writer))
                await other_writer.wait_closed()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def cut_off(self, address: str) -> None:
        """Close all ways from and to this server, or with an empty address none."""
        self._loop.call_soon_threadsafe(self._cut, address)

    def _cut(self, address: str) -> None:
        self._cut_off = address
        for addresses, writer in self._open:
            if address in addresses:
                writer.close()

    def close(self) -> None:
        """Wait until all connections have ended, as those of servers that were killed do."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        # A connection that has just come begins a task of its own meanwhile.
        while left := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.gather(*left)


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes, until one end closes."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
    writer.close()


class Cluster:
    """Three primaries, each with one replica, and all slots; with a certificate, with TLS, and `tls_ports` too."""

    def __init__(self, pair: Pair | None = None) -> None:
        self._doors, self._pair, self.tls_ports = Doors(), pair, list[int]()
        self.servers = [self._start(f"127.0.0.{10 + number}") for number in range(6)]
        places = [f"127.0.0.1:{server.port}" for server in self.servers]
        create = (program("redis-cli"), "--cluster", "create", *places, "--cluster-replicas", "1", "--cluster-yes")
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL)
        until(lambda: all("cluster_state:ok" in str(server.command("CLUSTER", "INFO")) for server in self.servers))
        until(lambda: len(self.replicas(self.primary)) == 1)

    def _start(self, address: str) -> RedisServer:
        # By default 10,000 above the other port, which may be no port.
        bus = free_port()
        words = f"--cluster-enabled yes --cluster-node-timeout {SILENCE} --cluster-port {bus}"
        own = f"--bind-source-addr {address} --cluster-announce-ip 127.0.0.1 --protected-mode no"
        door = f"--cluster-announce-bus-port {self._doors.open(bus, address)}"
        return RedisServer(flags=(*f"{words} {own} {door}".split(), *AT_ONCE, *self._tls()))

    def _tls(self) -> list[str]:
        if self._pair is None:
            return []
        self.tls_ports.append(free_port())
        return f"--tls-port {self.tls_ports[-1]} --tls-cluster yes --{' --'.join(tls_lines(self._pair))}".split()

    @property
    def primary(self) -> RedisServer:
        """Return the server with the slot, by the newest word of all."""
        return self._named_by(self.servers)

    def _named_by(self, servers: Sequence[RedisServer]) -> RedisServer:
        owners = {(epoch, port) for server in servers for epoch, port in self._owners(server)}
        _, port = max(owners)
        return next(server for server in self.servers if server.port == port)

    def _owners(self, server: RedisServer) -> Iterator[tuple[int, int]]:
        with contextlib.suppress(redis.RedisError):
            for line in server.command("CLUSTER", "NODES").splitlines():
                _, place, _, _, _, _, epoch, _, *slots = line.split()
                bounds = [slot.split("-") for slot in slots if slot[0] != "["]
                if any(int(bound[0]) <= SLOT <= int(bound[-1]) for bound in bounds):
                    yield int(epoch), int(place.partition("@")[0].rpartition(":")[2])

    def promoted(self, old: RedisServer) -> RedisServer:
        """Wait until another server than the old one has the slot, and return it."""
        # A stopped server would answer late.
        others = [server for server in self.servers if server is not old]
        until(lambda: self._named_by(others) is not old)
        return self._named_by(others)

    def replicas(self, primary: RedisServer) -> list[RedisServer]:
        roles = {server: server.command("ROLE") for server in self.servers}
        place = self.servers.index(primary)
        ports = {primary.port, *self.tls_ports[place : place + 1]}
        return [server for server, role in roles.items() if role[0] == "slave" and role[2] in ports]

    def move(self) -> tuple[RedisServer, RedisServer]:
        """Move the slot to another primary, a key at a time, while it is used; return both."""
        old = self.primary
        new = next(one for one in self.servers if one is not old and one.command("ROLE")[0] == "master")
        new.command("CLUSTER", "SETSLOT", SLOT, "IMPORTING", old.command("CLUSTER", "MYID"))
        old.command("CLUSTER", "SETSLOT", SLOT, "MIGRATING", new.command("CLUSTER", "MYID"))
        while keys := old.command("CLUSTER", "GETKEYSINSLOT", SLOT, 1):
            old.command("MIGRATE", "127.0.0.1", new.port, *keys, 0, 5000)
            time.sleep(0.02)
        for server in (new, old):
            server.command("CLUSTER", "SETSLOT", SLOT, "NODE", new.command("CLUSTER", "MYID"))
        return old, new

    @property
    def url(self) -> str:
        scheme, ports = "rediss" if self._pair else "redis", self.tls_ports or [server.port for server in self.servers]
        return f"{scheme}+cluster://{','.join(f'127.0.0.1:{port}' for port in ports[:2])}"

    def url_behind_a_partition(self) -> str:
        """Return a URL for processes that stay with the primary when cut_off() leaves it alone."""
        for server in self.servers:
            server.command(*MINORITY)
        return f"redis+cluster://minority:any@127.0.0.1:{self.primary.port}"

    def cut_off(self, primary: RedisServer) -> None:
        """Let nobody but the user of url_behind_a_partition() reach the primary; that user reaches no other."""
        self._doors.cut_off(f"127.0.0.{10 + self.servers.index(primary)}")
        shut_out(primary)
        for server in self.servers:
            if server is not primary:
                server.command("ACL", "DELUSER", "minority")

    def heal(self, primary: RedisServer) -> None:
        self._doors.cut_off("")
        primary.command("ACL", "SETUSER", "default", "on", user="minority")
        for server in self.servers:
            server.command(*MINORITY)

    def close(self) -> None:
        for server in self.servers:
            server.close()
        self._doors.close()
