"""The benchmark still runs: a tiny run of every measure for each peer, judged by its checks and never by time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench" / "run.py"

pytestmark = pytest.mark.slow


PEERS = "notifyd floor uws bun nats nchan centrifugo ws picows websockets socketio fastapi"


@pytest.mark.parametrize("peer", PEERS.split())
def test_every_measure_of_a_peer_passes_its_checks(peer: str) -> None:
    command = [sys.executable, str(BENCH), "--tiny", "--only", peer]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode == os.EX_UNAVAILABLE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
