"""The soak still runs: some seconds with few clients; they get everything and leave nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent / "soak" / "run.py"

pytestmark = pytest.mark.slow


def test_a_short_soak_loses_and_leaves_nothing() -> None:
    command = [sys.executable, str(SOAK), "--seconds", "2", "--clients", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
