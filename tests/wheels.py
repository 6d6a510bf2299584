"""Packages built from a tree of sources, and environments to install them in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from processes import environment, program


def command(*words: str | Path, **variables: str) -> str:
    """Run a command outside the checkout and return its output; it must succeed."""
    ended = subprocess.run(
        words, cwd="/", env=environment({"PYTHONPATH": "", **variables}), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def build(source: Path, directory: Path, *flags: str) -> None:
    """Build the sdist and from it the wheel; with --wheel the wheel from the tree itself."""
    program("hatchling")
    command(program("pyproject-build"), "--no-isolation", "--outdir", directory, *flags, source)


def install(directory: Path, *wanted: str | Path) -> None:
    """Make an environment with the packages that pip installs for these words."""
    uv = program("uv")
    command(uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, directory)
    command(uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", directory / "bin" / "python", *wanted)
