"""Feed the targets of targets.py with made-up input until the time is over, and say how many inputs that were.

    python tests/fuzz/run.py [--seconds 300] [--target http] [--input FILE]

Each target has a process of its own and its share of the seconds. atheris, guided by coverage, makes the inputs and
keeps its corpus in .cache/fuzz for the next run; where it is not installed, Hypothesis makes them from the seeds. A
failure is printed with its input, and --input tries that again. A target fails too when its latest inputs, repeated,
take more memory each time. Exit status: 0 if none has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "fuzz"
OURS = [path.stem for path in ROOT.glob("*.py")]
MAX_INPUT_BYTES = 4096
# A leak shows as one block for each of 500 inputs; caches take fewer.
MAX_GROWTH_BLOCKS = 300

try:
    import atheris
except ImportError:
    atheris = None

if atheris is None or "--target" not in sys.argv:
    from targets import DEADLINE_SECONDS, TARGETS
else:
    # It names each module on stderr.
    with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(OURS):
        from targets import DEADLINE_SECONDS, TARGETS


class Run:
    """A target with a clock: counts its inputs, and ends the process when the time is over."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        self.run = TARGETS[name].make()
        self.inputs = 0
        self.recent: deque[bytes] = deque(maxlen=500)
        self.ends_at = time.monotonic() + seconds

    def __call__(self, data: bytes) -> None:
        self.run(data)
        self.inputs += 1
        self.recent.append(data)
        if time.monotonic() > self.ends_at:
            growth, engine = self.growth(), "Hypothesis" if atheris is None else "atheris"
            print(f"{self.name}: {self.inputs:,} inputs by {engine}, memory {growth:+,} blocks", flush=True)
            # Neither engine can be told to stop.
            os._exit(growth > MAX_GROWTH_BLOCKS)

    def growth(self) -> int:
        """Return how many blocks of memory more are held when the latest inputs have been tried once more.

        Two rounds before that fill the caches.
        """
        held = []
        for _ in range(3):
            for data in self.recent:
                self.run(data)
            # The next input after a deadline frees what waited for it.
            time.sleep(2 * DEADLINE_SECONDS)
            self.run(self.recent[0])
            gc.collect()
            held.append(sys.getallocatedblocks())
        return held[2] - held[1]


def by_atheris(run: Callable[[bytes], None], name: str, seeds: list[bytes]) -> None:
    corpus = CACHE / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    options = [f"-max_len={MAX_INPUT_BYTES}", f"-artifact_prefix={CACHE}/{name}-", "-verbosity=0", "-rss_limit_mb=1024"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], run)
    atheris.Fuzz()


def by_hypothesis(run: Callable[[bytes], None], seeds: list[bytes]) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @st.composite
    def inputs(draw: st.DrawFn) -> bytes:
        """Seeds one after the other, with some of their bytes changed, lost or put in."""
        data = bytearray(b"".join(draw(st.lists(st.sampled_from(seeds), max_size=3))))
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(data)))
            data[start : start + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
        return bytes(data)

    def test(data: bytes) -> None:
        run(data)

    endless = settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(inputs())(test)
    )
    while True:
        endless()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--input", type=Path)
    arguments = parser.parse_args()
    if arguments.target is None:
        share = str(arguments.seconds / len(TARGETS))
        commands = [[sys.executable, __file__, "--seconds", share, "--target", name] for name in TARGETS]
        return max([subprocess.run(command, check=False).returncode != 0 for command in commands])
    if arguments.input is not None:
        TARGETS[arguments.target].make()(arguments.input.read_bytes())
        return 0
    run, seeds = Run(arguments.target, arguments.seconds), TARGETS[arguments.target].seeds
    for seed in seeds:
        run(seed)
    if atheris is None:
        by_hypothesis(run, seeds)
    else:
        by_atheris(run, arguments.target, seeds)
    return 1


if __name__ == "__main__":
    sys.exit(main())
