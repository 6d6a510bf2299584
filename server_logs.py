"""The log of a server: lines for people, or with --log-format json an object on each line.

Owns the handler of the root logger, so that lines of uvicorn and other libraries have the same form. There is no access
log: at DEBUG the Hub tells publishes and connections by itself.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime

from answers import REQUEST_ID
from settings import Settings

# uvicorn logs a WebSocket's URL with its query at INFO, and the websockets library whole handshakes at DEBUG: both may
# hold secrets.
QUIET = ("uvicorn", "websockets", "asyncio")


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


def tell(text: str, level: int = logging.INFO, start: str = "") -> None:
    """Tell the operator a thing at every log level: as a plain line after `start`, or as an object of the log."""
    for handler in logging.root.handlers:
        if isinstance(handler.formatter, JsonFormat):
            handler.emit(logging.LogRecord("notifyd", level, "", 0, text, None, None))
            return
    print(start + text, file=sys.stderr, flush=True)
