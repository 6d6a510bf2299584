"""The log of a server: lines for people, or with --log-format json an object on each line.

Owns the handler of the root logger, so that lines of uvicorn and other libraries have the same form, and the access
log, which only --access-log writes: at DEBUG the Hub tells publishes and connections by itself.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from answers import REQUEST_ID
from connection import REPEAT_EXTENSION
from guard_identity import shown_address
from settings import Settings

# uvicorn logs a WebSocket's URL with its query at INFO, and the websockets library whole handshakes at DEBUG: both may
# hold secrets.
QUIET = ("uvicorn", "websockets", "asyncio")
MAX_SHOWN = 256  # characters

logger = logging.getLogger("notifyd.access")


class TextFormat(logging.Formatter):
    """Times as in RFC 3339, with their offset: a reader in another zone knows the moment."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802, ARG002
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")


class JsonFormat(TextFormat):
    """The same events as objects, each on one line, whatever is in its text."""

    def __init__(self, *, names_process: bool) -> None:
        super().__init__()
        self._names_process = names_process

    def format(self, record: logging.LogRecord) -> str:
        event = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        if self._names_process:
            event["process"] = str(record.process)
        if request_id := REQUEST_ID.get():
            event["request_id"] = request_id
        event |= record.__dict__.get("access", {})
        if record.exc_info:
            event["error"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False).encode(errors="backslashreplace").decode()


def configure_logging(settings: Settings) -> None:
    """Log to stderr from now on."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormat(names_process=settings.workers > 1))
    else:
        process = " [%(process)d]" if settings.workers > 1 else ""
        handler.setFormatter(TextFormat(f"%(asctime)s{process} %(levelname)s %(message)s"))
    logging.basicConfig(level=settings.log_level, handlers=[handler])
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


class AccessLog:
    """An app with a line for each request and handshake, as its answer begins, without the query: a token may be there.

    A handshake that the fast path accepts has no `send`: its line comes when the app has returned.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status: int | None = None
        # A repeated request would be answered without the app.
        scope.get("extensions", {}).pop(REPEAT_EXTENSION, None)

        async def telling(message: Message) -> None:
            nonlocal status
            if status is None:
                status = message.get("status", 101)
                _tell_access(scope, status, time.perf_counter() - began)
            await send(message)

        await self._app(scope, receive, telling)
        if status is None:
            _tell_access(scope, 101 if scope["type"] == "websocket" else 499, time.perf_counter() - began)


def _tell_access(scope: Scope, status: int, seconds: float) -> None:
    """Log a request; 499, as in nginx: the client has left before its answer."""
    address = shown_address((scope.get("client") or ("",))[0])
    # Of a text with control characters the escaped form.
    method, path = (repr(scope.get(name, "GET")[:MAX_SHOWN])[1:-1] for name in ("method", "path"))
    fields = {"address": address, "method": method, "path": path, "status": status, "seconds": round(seconds, 6)}
    logger.info("%s %s %s %d %.1f ms", address, method, path, status, seconds * 1000, extra={"access": fields})


def tell(text: str, level: int = logging.INFO, start: str = "") -> None:
    """Tell the operator a thing at every log level: as a plain line after `start`, or as an object of the log."""
    for handler in logging.root.handlers:
        if isinstance(handler.formatter, JsonFormat):
            handler.emit(logging.LogRecord("notifyd", level, "", 0, text, None, None))
            return
    print(start + text, file=sys.stderr, flush=True)
