"""Servers forked from a warm process: each starts without the import of its modules, which takes most of a start.

The warm process, this file as a program, has imported all that a server imports. For each order it forks a child, which
goes on as a new interpreter with that command line would: notifyd.py is its main module. A child that has ended stays
until its parent is told to ask for its status, so that its process id is nobody else's.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 1 << 18


class WarmProcess:
    """The parent of the servers of one interpreter."""

    all: ClassVar[dict[str, WarmProcess]] = {}

    def __init__(self, python: str) -> None:
        self._one_at_a_time = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [python, __file__, str(theirs.fileno())]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
            )

    def ask(self, order: object, *files: int) -> Any:
        with self._one_at_a_time:
            socket.send_fds(self._socket, [json.dumps(order).encode()], files)
            return json.loads(self._socket.recv(MOST_BYTES))

    @classmethod
    def of(cls, python: str) -> WarmProcess:
        """Return that of this interpreter, which is started for the first server."""
        return cls.all.get(python) or cls.all.setdefault(python, cls(python))

    @classmethod
    def end(cls) -> None:
        while cls.all:
            _, warm = cls.all.popitem()
            warm._socket.close()
            warm._process.wait()


class Forked:
    """A process that was forked, with the part of subprocess.Popen that servers need."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.args = command
        self.returncode: int | None = None
        self._warm = WarmProcess.of(command[0])
        self._one_at_a_time = threading.Lock()
        reader, writer = os.pipe()
        self.pid: int = self._warm.ask([command, environment], writer)
        self._end = os.pidfd_open(self.pid)
        os.close(writer)
        self.stderr = os.fdopen(reader, encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """Return the status as subprocess does, once there is one."""
        return self._status(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _status(self, timeout: float | None) -> int | None:
        with self._one_at_a_time:
            if self.returncode is None and select.select([self._end], [], [], timeout)[0]:
                self.returncode = os.waitstatus_to_exitcode(self._warm.ask(self.pid))
                os.close(self._end)
            return self.returncode


# The program.


def serve_orders(orders: socket.socket) -> None:
    """Fork a child for each command line, and answer its process id; for a process id answer the status of its end."""
    while True:
        order, files, *_ = socket.recv_fds(orders, MOST_BYTES, 1)
        if not order:
            return
        if isinstance(asked := json.loads(order), int):
            answer = os.waitpid(asked, 0)[1]
        elif (answer := os.fork()) == 0:
            orders.detach()
            become(*asked, *files)
            return
        else:
            os.close(*files)
        orders.send(json.dumps(answer).encode())


def become(command: list[str], environment: dict[str, str], stderr: int) -> None:
    """Go on as a new process with this command line."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for target, source in enumerate((nothing, nothing, stderr)):
        os.dup2(source, target)
    os.closerange(3, 32)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    sys.orig_argv[:] = command
    if command[1] == "-c":
        # The text changes modules before others import them.
        for path in ROOT.glob("*.py"):
            sys.modules.pop(path.stem, None)
        sys.argv[:] = ["-c", *command[3:]]
        exec(command[2], {"__name__": "__main__"})
    else:
        sys.argv[:] = command[1:]
        runpy.run_path(command[1], run_name="__main__")


if __name__ == "__main__":
    for module in ("notifyd", "server", "wire_http"):
        __import__(module)
    # The main module of a server, which is no other's.
    del sys.modules["notifyd"]
    gc.freeze()
    serve_orders(socket.socket(fileno=int(sys.argv[1])))
