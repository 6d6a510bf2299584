"""The build hook of the wheel: the flat modules of the repository become the package `notifyd`.

Owns the contents of the package. Only import statements change, each on its own line, so a traceback shows the lines
of the repository. Nothing else is installed, because a module called `settings` or `hub` would shadow one of a host.
"""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "notifyd"
# Files beside the modules, at the same places in the package.
ASSETS = ("*.lua", "clients/js/client.js", "console/*")
MAIN = f"from {PACKAGE} import main\nraise SystemExit(main())\n"


class Wheel(BuildHookInterface[Any]):
    """Writes the package into a temporary directory, the source of the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            self.app.abort(
                "notifyd has no editable install: its modules are flat here and a package only in the wheel. "
                "Install it without -e, or put the checkout on PYTHONPATH."
            )
        # Kept until the wheel is packed.
        self._directory = tempfile.TemporaryDirectory()
        for name, text in package(Path(self.root)).items():
            path = Path(self._directory.name) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            build_data["force_include"][str(path)] = f"{PACKAGE}/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        self._directory.cleanup()


def package(root: Path) -> dict[str, str]:
    """Return the text of each file of the package by its name."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(root.glob("*.py"))}
    modules = {f"{name}.py": rewritten(text, sources) for name, text in sources.items()}
    found = sorted(path for pattern in ASSETS for path in root.glob(pattern))
    others = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in found}
    return {"__init__.py": modules.pop(f"{PACKAGE}.py"), **modules, **others, "__main__.py": MAIN, "py.typed": ""}


def rewritten(text: str, modules: Iterable[str]) -> str:
    """Return a module's text with imports of these flat modules as imports from the package, line for line."""
    lines = text.splitlines(keepends=True)
    flat = set(modules) - {PACKAGE}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module in flat and not node.level:
            old, new = f"from {node.module} import", f"from {PACKAGE}.{node.module} import"
        elif isinstance(node, ast.Import) and flat.intersection(alias.name for alias in node.names):
            if len(node.names) > 1:
                raise ValueError(f"line {node.lineno}: import one module a line")
            old, new = f"import {node.names[0].name}", f"from {PACKAGE} import {node.names[0].name}"
        else:
            continue
        line = lines[node.lineno - 1]
        before, found, after = line.partition(old)
        assert found, f"line {node.lineno}: {line}"
        lines[node.lineno - 1] = before + new + after
    return "".join(lines)
