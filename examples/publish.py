"""Publish a notification, or read a server's health and figures.

    pip install './clients/python[httpx]'
    python examples/publish.py notify "disk full" --type alert --data '{"priority": "high"}'
    python examples/publish.py health

The variable TOKEN has the token or key, where the server wants one.
"""

import argparse
import json
import os

import httpx
from notifyd_client import Notifyd, NotifydError


def main() -> None:
    parser = argparse.ArgumentParser(description="Publish a notification, or read a server's health and figures.")
    parser.add_argument("--url", default="http://localhost:8000")
    commands = parser.add_subparsers(dest="command", required=True)
    notify = commands.add_parser("notify", help="publish a notification")
    notify.add_argument("message")
    notify.add_argument("--type", default="custom")
    notify.add_argument("--data", type=json.loads, default={}, help="a JSON object")
    for name in ("health", "metrics", "status"):
        commands.add_parser(name, help=f"print the server's {name}")
    arguments = vars(parser.parse_args())
    url, command = arguments.pop("url"), arguments.pop("command")
    with Notifyd(url, token=os.environ.get("TOKEN")) as notifyd:
        try:
            answer = getattr(notifyd, command)(**arguments)
        except (NotifydError, httpx.TransportError) as error:
            raise SystemExit(f"failed: {error}") from None
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
