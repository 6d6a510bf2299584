"""Ask for known vulnerabilities of the packages of requirements.txt, in the versions installed here.

    python tests/audit.py

Exit status: 1 if there are any; 0 if not, or, with one line, if the service does not answer within ANSWER_SECONDS.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ANSWER_SECONDS = 60
REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"


def needed(lines: list[str], found: dict[str, str]) -> dict[str, str]:
    """Return name and version of these requirements and all that they need, as far as installed."""
    for requirement in map(Requirement, lines):
        extras = ["", *requirement.extras]
        if requirement.name.replace("_", "-") in found or not (
            requirement.marker is None or requirement.marker.evaluate()
        ):
            continue
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        found[requirement.name.replace("_", "-")] = package.version
        theirs = [each for each in package.requires or () if _applies(each, extras)]
        needed([each.partition(";")[0] for each in theirs], found)
    return found


def _applies(requirement: str, extras: list[str]) -> bool:
    marker = Requirement(requirement).marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def main() -> int:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pinned:
        pinned.writelines(f"{name}=={version}\n" for name, version in needed(lines, {}).items())
        pinned.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", pinned.name, "--no-deps", "--disable-pip"]
        try:
            done = subprocess.run(
                [*command, "--progress-spinner", "off", "--timeout", "5"],
                capture_output=True,
                text=True,
                check=False,
                timeout=ANSWER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            done = None
    if done is not None and done.returncode != 0 and "known vulnerabilit" in done.stderr:
        print(done.stderr + done.stdout)
        return 1
    # A mirror of the registry that has no list of them answers as if it did not know the package.
    asked = done is not None and done.returncode == 0 and "could not be audited" not in done.stdout
    print("audit: nothing known" if asked else "audit: skipped, as the list of vulnerabilities cannot be reached")
    return 0


if __name__ == "__main__":
    sys.exit(main())
