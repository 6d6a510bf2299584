"""Pages with a client in them, in tabs of a browser."""

from __future__ import annotations

import json
from typing import Any

from browser import Browser
from processes import eventually
from ws_clients import PATIENCE


class Page:
    """A tab with a client of the JavaScript package."""

    def __init__(self, browser: Browser, address: str, url: str, options: str = "", module: str = "/client.js") -> None:
        """`address` is that of any page of the origin that has the module."""
        self.tab = browser.open(address)
        eventually(lambda: self.evaluate("location.href + document.readyState") == f"{address}complete")
        self.evaluate(f"""
            window.said = [], window.states = [], window.told = [], window.failed = [];
            window.onerror = (text) => void failed.push(text);
            window.onunhandledrejection = ({{ reason }}) => void failed.push(String(reason));
            import({json.dumps(module)}).then(({{ NotifydClient }}) => (
                window.client = new NotifydClient({json.dumps(url)}, {{
                    onNotification: ({{ data }}) => void said.push(data.message),
                    onMessage: ({{ type }}) => void told.push(type),
                    onState: (state, {{ reason }}) => void states.push(reason ? `${{state}}: ${{reason}}` : state),
                    {options}
                }})
            ));
            1
        """)

    def evaluate(self, expression: str) -> Any:
        return self.tab.evaluate(expression)

    def until(self, condition: str) -> None:
        eventually(lambda: self.evaluate(condition), 2 * PATIENCE)

    @property
    def said(self) -> list[str]:
        return list(self.evaluate("said"))

    @property
    def states(self) -> list[str]:
        return list(self.evaluate("states"))
