"""Print notifications as lines of JSON until Ctrl+C.

    pip install './clients/python[websockets]'
    python examples/listen.py ws://localhost:8000/ws --client-id my_client_123 --topics builds,alerts

The variable TOKEN has the token or key, where the server wants one.
"""

import argparse
import asyncio
import json
import logging
import os
from contextlib import suppress

from notifyd_client import NotifydClient
from websockets.exceptions import WebSocketException


async def main() -> None:
    parser = argparse.ArgumentParser(description="Print notifications as they arrive.")
    parser.add_argument("url", nargs="?", default="ws://localhost:8000/ws")
    parser.add_argument("--client-id")
    parser.add_argument("--user", help="where no token names a user")
    parser.add_argument("--topics", default="", help="a comma list")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    topics = filter(None, args.topics.split(","))
    token = os.environ.get("TOKEN")
    client = NotifydClient(args.url, client_id=args.client_id, user=args.user, topics=topics, token=token)
    try:
        async for notification in client:
            print(json.dumps(notification), flush=True)
    except WebSocketException as error:
        raise SystemExit(f"refused: {error}") from None


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
