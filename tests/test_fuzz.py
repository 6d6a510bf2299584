"""The fuzzer still runs: a second of it, shared by all its targets."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz" / "run.py"

pytestmark = pytest.mark.slow


def test_a_second_of_made_up_input_breaks_nothing() -> None:
    command = [sys.executable, str(FUZZ), "--seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = dict(re.findall(r"^(\w+): ([\d,]+) inputs", done.stdout, re.MULTILINE))
    assert set(tried) == {"frames", "decode", "handshake", "tokens", "http", "websocket"}
