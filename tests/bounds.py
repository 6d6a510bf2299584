"""Run the servers of the tests with both ends of the ranges in pyproject.toml.

    python tests/bounds.py [pytest's arguments]

The lowest versions run with Python 3.11, the newest with the newest Python on this machine. pytest itself stays in its
own environment: only the servers that it starts are run with these. Where a Python is missing, its end is left out with
a reason; in CI that is a failure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
EXTRAS = ("server", "redis", "jwt")
LOWEST = (3, 11)
TESTS = (
    *("drain", "embedding", "events", "guard_auth", "health", "http_errors", "notify"),
    *("resume", "server", "tls", "wire_http", "wire_message"),
)
# A few of these start hosts; the environments lack their packages, but for uvicorn with WireProtocol.
SELECTED = "not host and not backend and (not embedding or fast)"
# The store that redis-py reaches, by itself and by a sentinel.
WITH_REDIS = ("health", "publish_once", "resume")


def pythons() -> dict[tuple[int, int], str]:
    """Return the interpreters on the path and in pyenv by their version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, *(shutil.which(f"python3.{minor}") or "" for minor in range(11, 30))]
    candidates += map(str, pyenv.glob("3.*/bin/python"))
    found: dict[tuple[int, int], str] = {}
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
        # A shim of pyenv may be there without a Python behind it. A preview is none that anybody must support.
        if done.returncode == 0 and (version := re.fullmatch(r"Python (\d+)\.(\d+)\.\d+\s*", done.stdout)):
            found.setdefault((int(version[1]), int(version[2])), candidate)
    return found


def make(name: str, python: str, *flags: str) -> Path:
    """Return the interpreter of an environment with the packages of all extras, made anew."""
    uv = [sys.executable, "-m", "uv", "--quiet"]
    interpreter = CACHE / name / "bin" / "python"
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    subprocess.run([*uv, "venv", "--clear", "--python", python, CACHE / name], check=True)
    install = [*uv, "pip", "install", "--python", interpreter, *flags, "-r", ROOT / "pyproject.toml", *extras]
    subprocess.run(install, check=True)
    subprocess.run([*uv, "pip", "list", "--python", interpreter], check=True)
    return interpreter


def run(interpreter: Path, arguments: list[str]) -> int:
    status = 0
    for names, flags in ((TESTS, ()), (WITH_REDIS, ("--store", "redis")), (WITH_REDIS, ("--store", "sentinel"))):
        tests = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
        command = [sys.executable, "-m", "pytest", "-k", SELECTED, f"--server-python={interpreter}"]
        ended = subprocess.run([*command, *flags, *tests, *arguments], cwd=ROOT, check=False)
        status = status or ended.returncode
    return status


def main(arguments: list[str]) -> int:
    found = pythons()
    status = 0
    if LOWEST in found:
        print("The lowest versions, with Python 3.11:", flush=True)
        status = run(make("lowest", found[LOWEST], "--resolution", "lowest-direct"), arguments)
    else:
        print("The lowest versions are left out: there is no Python 3.11 here")
        status = int(os.environ.get("CI") == "true")
    newest = max(found)
    print(f"The newest versions, with Python {newest[0]}.{newest[1]}:", flush=True)
    return run(make("newest", found[newest]), arguments) or status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
