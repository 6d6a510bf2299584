"""uvicorn with its own HTTP class and the fast path for WebSockets: `python -m fast_uvicorn PORT h11|httptools`."""

from __future__ import annotations

import sys

import uvicorn

from notifyd import WireProtocol


def main(port: str, http: str) -> None:
    uvicorn.run("notifyd:create_app", factory=True, port=int(port), http=http, ws=WireProtocol, ws_ping_interval=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
