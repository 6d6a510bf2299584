"""The client of notifyd: NotifydClient and SyncNotifydClient receive notifications, Notifyd and AsyncNotifyd publish.

Receiving needs websockets, and publishing needs httpx. Each is imported with the first name that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from notifyd_client.waiting import backoff

if TYPE_CHECKING:
    from notifyd_client.publishing import AsyncNotifyd, Notifyd, NotifydError
    from notifyd_client.receiving import NotifydClient, SyncNotifydClient

__all__ = ["AsyncNotifyd", "Notifyd", "NotifydClient", "NotifydError", "SyncNotifydClient", "backoff"]

_PLACES = {
    "NotifydClient": ("receiving", "websockets"),
    "SyncNotifydClient": ("receiving", "websockets"),
    "AsyncNotifyd": ("publishing", "httpx"),
    "Notifyd": ("publishing", "httpx"),
    "NotifydError": ("publishing", "httpx"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, package = _PLACES[name]
    try:
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        reason = f"{name} needs {package}: pip install 'notifyd-client[{package}]'"
        raise ModuleNotFoundError(reason, name=package) from None
