"""A headless Chromium, for pages that tests look into."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from processes import eventually
from websockets.sync.client import connect
from ws_clients import PATIENCE


class Browser:
    """A headless Chromium, driven through its DevTools protocol."""

    def __init__(self, command: str, profile: Path) -> None:
        flags = "--headless --no-sandbox --no-proxy-server --no-first-run --remote-debugging-port=0 --disable-gpu"
        flags += " --disable-quic --disable-sync --disable-background-networking --disable-component-update"
        self.process = subprocess.Popen(
            [command, *flags.split(), f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        port = profile / "DevToolsActivePort"
        eventually(lambda: port.exists() and port.read_text().count("\n"), 4 * PATIENCE)
        self.devtools = f"http://127.0.0.1:{port.read_text().split()[0]}"

    def open(self, url: str) -> Tab:
        target = httpx.put(f"{self.devtools}/json/new?{quote(url, safe='')}", trust_env=False, timeout=PATIENCE).json()
        return Tab(target["webSocketDebuggerUrl"])

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Tab:
    """A page in a tab, and the lines that its console has."""

    def __init__(self, devtools: str) -> None:
        self._session = ExitStack()
        self._devtools = self._session.enter_context(connect(devtools, compression=None, proxy=None, max_size=None))
        self._calls = count(1)
        self.console: list[str] = []

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""
        call = next(self._calls)
        self._devtools.send(json.dumps({"id": call, "method": method, "params": params}))
        while (answer := json.loads(self._devtools.recv(PATIENCE))).get("id") != call:
            if answer.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(answer["params"]))
        return answer

    def listen(self) -> None:
        """Take the lines of the console from now on."""
        self.call("Runtime.enable")
        self.call("Log.enable")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page, None if it throws; a promise is waited for."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self.call("Runtime.evaluate", **asked).get("result", {}).get("result", {}).get("value")

    def crash(self) -> None:
        """End the page without its knowledge."""
        self._devtools.send(json.dumps({"id": next(self._calls), "method": "Page.crash"}))
        self._session.close()

    def stop(self) -> None:
        self.call("Page.close")
        self._session.close()
