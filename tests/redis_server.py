"""A real redis-server for one test or many: on a free port, with its files in a temporary directory."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import redis
from processes import free_port, program

READY_SECONDS = 30.0


class RedisServer:
    """A redis-server that can be killed, stopped, started again, emptied and made to refuse."""

    def __init__(self, *, append_only: bool = False, flags: tuple[str, ...] = ()) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="notifyd-redis-")
        self.port = free_port()
        self.socket = Path(self._directory.name) / "redis.sock"
        durable = ("--appendonly", "yes", "--appendfsync", "always") if append_only else ("--appendonly", "no")
        self._command = (
            *(program("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1"),
            *(
                "--unixsocket",
                str(self.socket),
                "--dir",
                self._directory.name,
                "--save",
                "",
                "--loglevel",
                "warning",
                *durable,
                *flags,
            ),
        )
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, with the files that it left, and wait until it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                if self.command("PING"):
                    return
            except redis.RedisError:
                pass
            assert self._process.poll() is None, "redis-server ended at the start"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)

    def command(self, *words: str | int, database: int = 0, user: str | None = None) -> Any:
        """Send one command on a connection of its own and return the answer. A user is one that needs no password."""
        password = None if user is None else "any"
        with redis.Redis(
            port=self.port, db=database, username=user, password=password, decode_responses=True, retry=None
        ) as client:
            return client.execute_command(*words)

    def keys(self, database: int) -> set[str]:
        return set(self.command("KEYS", "*", database=database))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Stop it as SIGSTOP does: it neither answers nor hangs up."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def forget(self) -> None:
        """Remove the files of a Redis that has ended."""
        for path in Path(self._directory.name).glob("*.rdb"):
            path.unlink()

    def empty(self) -> None:
        self.command("FLUSHALL")

    def refuse_writes(self, *, refuse: bool = True) -> None:
        """Answer every write with OOM, as a full Redis does that must not forget anything."""
        self.command("CONFIG", "SET", "maxmemory", 1 if refuse else 0)

    def follow_nobody(self, *, follow: bool = True) -> None:
        """Become the read-only replica of a server that is not there."""
        self.command("REPLICAOF", *(("127.0.0.1", "1") if follow else ("NO", "ONE")))

    def close(self) -> None:
        self.kill()
        self._directory.cleanup()
