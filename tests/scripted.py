"""HTTP servers of the tests: a folder, and a script of replies."""

from __future__ import annotations

import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Site(SimpleHTTPRequestHandler):
    """The checkout over HTTP, without a log."""

    def log_message(self, *_: object) -> None:
        pass


class Reply(NamedTuple):
    status: int
    body: Any
    headers: tuple[tuple[str, str], ...] = ()


HANG_UP = Reply(0, None)
SENT = Reply(200, {"status": "success", "recipients": 3})
BUSY = Reply(503, {"error": {"id": "error_1", "message": "Server is shutting down", "category": "system"}})
REFUSED = Reply(400, {"error": {"id": "error_2", "message": "message: required", "category": "validation"}})


class ScriptedHttp:
    """Gives one reply to each request, in turn."""

    def __init__(self, *replies: Reply) -> None:
        script = iter(replies)
        keys: list[str | None] = []

        class Handler(Site):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def do_GET(self) -> None:
                keys.append(self.headers["Idempotency-Key"])
                if (reply := next(script)) is HANG_UP:
                    return
                self.send_response(reply.status)
                for name, value in reply.headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode())

        self.keys = keys
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
