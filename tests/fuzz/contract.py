"""Feed the routes made-up requests of schemathesis, allowed ones and others, until the time is over.

    python tests/fuzz/contract.py [--seconds 60]

A server of its own is started for them, with an API key. Exit status: 0 if no answer is against the contract.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from contract_oracle import schemathesis
from processes import QUIET, Server


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=60)
    seconds = parser.parse_args().seconds
    server = Server.notifyd(*QUIET, "--api-key", "ci:a-long-random-secret")
    server.connect(query="client_id=carol&user=carol&topics=builds")
    flags = ["--header", "X-API-Key: ci:a-long-random-secret", "--max-examples", "1000", "--max-time", str(seconds)]
    try:
        with tempfile.TemporaryDirectory() as directory:
            ended = schemathesis(server.http.get("/openapi.json").json(), server.url, Path(directory), *flags)
        print(ended.stdout + ended.stderr)
        return ended.returncode or len(list(server.complaints()))
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
