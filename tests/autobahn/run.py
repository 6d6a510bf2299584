"""Run the Autobahn TestSuite's cases on frames, closes and limits against an echo app on WireProtocol.

    python tests/autobahn/run.py [--loop uvloop] [--cases "6.*" "7.1.5"]

The suite's fuzzing client runs on Python 2.7 only: on the interpreter in AUTOBAHN_PYTHON, or a python2.7 in PATH or
pyenv. The first run sets up its virtualenv in .cache/. Cases 12 and 13 take about 45 minutes, the others three. Prints
the counts of each group and every case that is not OK; the full report is .cache/autobahn/report/index.html. Exit
status: 0 if each case is OK, or only informs, in behaviour and in close; 1 if not; 69 if there is no interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "autobahn"
# 8 is empty, and 9 measures speed.
CASES = ("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*", "12.*", "13.*")
PASSED = ("OK", "INFORMATIONAL")
VIRTUALENV = "virtualenv==20.15.1"  # The last that makes environments for 2.7.
# The cases of 12 and 13 send a thousand messages each, and the suite itself takes most of that time.
RUN_SECONDS = 3600


def interpreter() -> str | None:
    """Return a Python 2.7 that runs; None where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    named = os.environ.get("AUTOBAHN_PYTHON")
    found = [named] if named else [shutil.which("python2.7"), *map(str, pyenv.glob("versions/2.7*/bin/python"))]
    for candidate in filter(None, found):
        # pyenv's shim is in PATH whether its interpreter is chosen or not.
        shown = subprocess.run([candidate, "-V"], capture_output=True, text=True, check=False)
        if "Python 2.7" in shown.stdout + shown.stderr:
            return candidate
    return None


def set_up(python: str) -> Path:
    """Return the python of a virtualenv that has the suite, made from `python` unless it is there."""
    environment, wanted = CACHE / "venv", HERE / "requirements.txt"
    own, stamp = environment / "bin" / "python", environment / "requirements.txt"
    if stamp.exists() and stamp.read_text() == wanted.read_text():
        return own
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    bootstrap = CACHE / "bootstrap"
    shutil.rmtree(CACHE, ignore_errors=True)
    subprocess.run([python, *pip, "--target", bootstrap, VIRTUALENV], check=True)
    alone = {**os.environ, "PYTHONPATH": str(bootstrap)}
    subprocess.run([python, "-m", "virtualenv", "--quiet", environment], check=True, env=alone)
    subprocess.run([own, *pip, "--requirement", wanted], check=True)
    shutil.copy(wanted, stamp)
    return own


def run_cases(python: Path, url: str, cases: list[str], agent: str) -> dict[str, dict[str, str]]:
    """Run the cases, and return the suite's verdict for each."""
    report, spec = CACHE / "report", CACHE / "spec.json"
    servers = [{"url": url, "agent": agent}]
    spec.write_text(json.dumps({"outdir": str(report), "servers": servers, "cases": cases, "exclude-cases": []}))
    shutil.rmtree(report, ignore_errors=True)
    command = [python, "-W", "ignore", "-m", "autobahntestsuite.wstest", "-m", "fuzzingclient", "-s", spec]
    with (CACHE / "run.log").open("w") as log:
        try:
            subprocess.run(command, cwd=CACHE, stdout=log, stderr=log, check=True, timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            sys.exit(f"the cases took over {RUN_SECONDS} s: {CACHE / 'run.log'} has the last; --cases chooses some")
    found: dict[str, dict[str, str]] = json.loads((report / "index.json").read_text()).get(agent, {})
    return found


def judge(found: dict[str, dict[str, str]]) -> bool:
    """Print the counts of each group and every failure; return whether there is none."""
    groups: dict[int, Counter[str]] = {}
    failures = []
    for case, result in sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".")]):
        behaviour, close = result["behavior"], result["behaviorClose"]
        groups.setdefault(int(case.split(".")[0]), Counter())[behaviour] += 1
        if behaviour not in PASSED or close not in PASSED:
            failures.append(f"case {case}: {behaviour}, close {close} (code {result['remoteCloseCode']})")
    for group, counts in groups.items():
        print(f"{group:>2}: " + ", ".join(f"{count} {behaviour}" for behaviour, count in counts.items()))
    print(f"{len(found)} cases, {len(failures)} not OK")
    print("\n".join(failures), end="\n" if failures else "")
    return bool(found) and not failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--cases", nargs="+", default=CASES)
    options = parser.parse_args()
    python = interpreter()
    if python is None:
        print("skipped: no Python 2.7 in AUTOBAHN_PYTHON, PATH or pyenv")
        return os.EX_UNAVAILABLE
    suite = set_up(python)
    command = [sys.executable, str(HERE.parent / "asgi_apps.py"), "--loop", options.loop]
    log = (CACHE / "echo.log").open("w")
    echo = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert echo.stderr is not None
        served = re.search(r"serves http(://\S+)", echo.stderr.readline())
        assert served, "the echo app does not start"
        threading.Thread(target=shutil.copyfileobj, args=(echo.stderr, log), daemon=True).start()
        return not judge(run_cases(suite, f"ws{served[1]}/compressed", list(options.cases), options.loop))
    finally:
        echo.kill()
        echo.wait()


if __name__ == "__main__":
    sys.exit(main())
