"""The wheel: one package, installed beside hosts that have modules of their own with our names."""

from __future__ import annotations

import ast
import difflib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest
from conftest import Make
from expected import Record, notification
from processes import ROOT, Server, eventually, free_port, program
from wheels import build, command, install
from ws_clients import PATIENCE

from assets import FILES, PAGE
from settings import VERSION

pytestmark = pytest.mark.slow

MODULES = {path.stem for path in ROOT.glob("*.py")}
# Names of real hosts' modules: some were ours, and some are in other packages of the index.
NAMES = MODULES - {"notifyd"} | {"accounts", "auth", "client", "directory", "events", "keys", "peers", "throttle"}
SERVERS = ("hypercorn>=0.17", "granian>=2")


@pytest.fixture(scope="session")
def packages(once: Make) -> Path:
    """A directory with the sdist, and the wheel that was built from it."""
    return once("packages", lambda directory: build(ROOT, directory))


@pytest.fixture(scope="session")
def wheel(packages: Path) -> Path:
    [wheel] = packages.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def environments(once: Make, wheel: Path) -> Callable[..., Path]:
    """Return the directory of programs of an environment with these packages, and the wheel with these extras."""

    def make(name: str, extras: str, *others: str) -> Path:
        def fill(directory: Path) -> None:
            install(directory, f"notifyd-server{extras} @ file://{wheel}", *others)

        return once(name, fill) / "bin"

    return make


@pytest.fixture(scope="session")
def full(environments: Callable[..., Path]) -> Path:
    """An environment with all extras and a host's packages."""
    return environments("full", "[all]", "fastapi", "events")


@pytest.fixture(scope="session")
def bare(environments: Callable[..., Path]) -> Path:
    """An environment without extras, with the servers of others."""
    return environments("bare", "", "fastapi", *SERVERS)


@pytest.fixture(scope="session")
def oldest(environments: Callable[..., Path]) -> Path:
    """The environment of a host from the beginning of 2024."""
    versions = ("starlette==0.36.3", "fastapi==0.110.0", "uvicorn==0.27.0", "websockets==12.0")
    return environments("oldest", "", *versions, "orjson==3.9.0", "msgspec==0.19.0")


@pytest.fixture(scope="session")
def shop(once: Make) -> Path:
    """The hosts shop.py and shop_fastapi.py, and a module of theirs for each name."""

    def fill(directory: Path) -> None:
        for name in ("shop.py", "shop_fastapi.py"):
            shutil.copy(ROOT / "tests" / name, directory)
        for name in NAMES:
            (directory / f"{name}.py").write_text('OWNER = "shop"\n')

    return once("shop", fill)


# The contents of the wheel.


def contents(archive: Path) -> dict[str, str]:
    with ZipFile(archive) as wheel:
        return {name: wheel.read(name).decode() for name in wheel.namelist()}


def test_the_wheel_installs_one_package_and_nothing_beside_it(wheel: Path) -> None:
    """Every module, the Lua script, the static files and the mark for type checkers are in `notifyd`."""
    files = {name for name in contents(wheel) if ".dist-info/" not in name}
    modules = {f"notifyd/{name}.py" for name in MODULES - {"notifyd"}}
    others = {"__init__.py", "__main__.py", "py.typed", "store_redis.lua", *FILES.values(), PAGE}
    assert files == modules | {f"notifyd/{name}" for name in others}


def source_of(name: str) -> Path:
    return ROOT / ("notifyd.py" if name == "__init__.py" else name)


FLAT = re.compile(rf"^(\s*)(?:from ({'|'.join(MODULES)}) import (.*)|import ({'|'.join(MODULES)})\b(.*))$")


def in_package(line: str) -> str:
    """Return a line as the package has it."""
    if (found := FLAT.match(line)) is None or "notifyd" in found.group(2, 4):
        return line
    indent, origin, names, module, rest = found.groups()
    return f"{indent}from notifyd.{origin} import {names}" if origin else f"{indent}from notifyd import {module}{rest}"


def test_each_line_is_that_of_the_repository_but_for_imports(wheel: Path) -> None:
    """A traceback of the package shows the same lines and numbers as one of the checkout."""
    for path, text in contents(wheel).items():
        directory, _, name = path.partition("/")
        if directory == "notifyd" and name not in ("__main__.py", "py.typed"):
            expected = [in_package(line) for line in source_of(name).read_text().splitlines()]
            assert list(difflib.unified_diff(expected, text.splitlines(), lineterm="")) == []


def imported(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level
            yield node.module


def test_no_plain_import_of_a_module_of_ours_is_left(wheel: Path) -> None:
    """Otherwise a host's module of that name would be imported instead."""
    for path, text in contents(wheel).items():
        if path.endswith(".py"):
            assert not set(imported(text)) & (MODULES - {"notifyd"}), path


def test_no_name_of_notifyd_hides_a_module(full: Path) -> None:
    """`from notifyd import routes` gives the module."""
    program = (
        "import importlib, notifyd, sys\n"
        f"print([name for name in {sorted(MODULES - {'notifyd'})} if getattr(notifyd, name, None)"
        " not in (None, sys.modules.get(f'notifyd.{name}'))])"
    )
    assert command(full / "python", "-c", program) == "[]\n"


def test_the_sdist_builds_the_same_wheel_as_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The wheel of the fixture comes from the sdist; this builds another from the repository."""
    build(ROOT, tmp_path, "--wheel")
    [other] = tmp_path.iterdir()
    assert other.name == wheel.name == f"notifyd_server-{VERSION}-py3-none-any.whl"
    assert contents(other) == contents(wheel)


def test_the_sdist_holds_the_folders_that_its_pages_and_tests_need(packages: Path) -> None:
    """The pages link to results in bench/, and the tests run it; of the folders only that of the CI stays out."""
    [sdist] = packages.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {Path(name).parts[1] for name in archive.getnames()}
    tracked = {Path(name).parts[0] for name in command("git", "-C", ROOT, "ls-files").splitlines()}
    assert {name for name in tracked - held if not name.startswith(".")} == set()


def test_the_index_would_take_both(packages: Path) -> None:
    """twine reads the metadata and the README, check-wheel-contents the layout."""
    assert command(program("twine"), "check", "--strict", *packages.iterdir()).count("PASSED") == 2
    command(program("check-wheel-contents"), *packages.glob("*.whl"))


def test_an_editable_install_is_refused_with_a_reason(packages: Path) -> None:
    """Its modules would be flat, and shadow those of a host."""
    program = f"import os; os.chdir({str(ROOT)!r}); import hatchling.build as b; b.build_editable({str(packages)!r})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "notifyd has no editable install" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


# Beside a host.


def start(words: list[str | Path], cwd: Path, prefix: str = "", **variables: str) -> Server:
    """Start a server from the directory `cwd`, where nothing of the checkout is on the path."""
    port = free_port()
    given = [str(word).replace("PORT", str(port)) for word in words]
    return Server(given, {"PYTHONPATH": "", **variables}, url=f"http://127.0.0.1:{port}{prefix}", cwd=cwd)


SERVED_BY = {
    "uvicorn": ("full", "--port PORT"),
    "uvicorn-0.27": ("oldest", "--port PORT"),
    "hypercorn": ("bare", "--bind 127.0.0.1:PORT --graceful-timeout 1"),
    "granian": ("bare", "--interface asgi --port PORT"),
}


@pytest.fixture(params=["shop:app", "shop_fastapi:app"])
def hosted(request: pytest.FixtureRequest, shop: Path, served_by: str) -> Iterator[Server]:
    """The shop with notifyd mounted, under each server; "bare" has no uvicorn."""
    environment, flags = SERVED_BY[served_by]
    python = request.getfixturevalue(environment) / "python"
    words = [python, "-m", served_by.partition("-")[0], request.param, *flags.split()]
    server = start(words, shop, "/notifications")
    yield server
    server.kill()


@pytest.mark.parametrize("served_by", SERVED_BY)
def test_a_host_has_its_own_modules_and_its_clients_receive(hosted: Server) -> None:
    """A WebSocket and a stream get the host's notifications, and each module of the host is its own."""
    client = hosted.join()
    with httpx.stream("GET", f"{hosted.url}/events", trust_env=False, timeout=PATIENCE) as stream:
        lines = stream.iter_lines()
        assert any("welcome" in line for line in lines)
        answer = hosted.request("POST", hosted.url.replace("/notifications", "/order"))
        assert answer.json() == {"recipients": 2, "shops_own": True}
        assert client.receive() == notification({"message": "A new order", "number": 17}, "order")
        assert any('"number":17' in line for line in lines)


def test_a_hosts_code_type_checks(full: Path, shop: Path, tmp_path: Path) -> None:
    """`app.hub` and the receipt have types, and mypy --strict finds the host's modules."""
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(full / "python")]
    ended = subprocess.run(
        [*mypy, "--cache-dir", str(tmp_path), "shop.py"], cwd=shop, capture_output=True, text=True, check=False
    )
    assert "Success" in ended.stdout, ended.stdout + ended.stderr


def test_a_third_party_finds_its_own_module(full: Path) -> None:
    """opensearch-py, for example, imports the package `events` of the index."""
    program = "import notifyd, events; notifyd.create_app(); print(events.Events.__module__, notifyd.__file__)"
    owner, path = command(full / "python", "-c", program).split()
    assert owner.startswith("events") and Path(path).is_relative_to(full.parent)


def test_every_public_name_is_there(full: Path) -> None:
    """`from notifyd import *` gives all of __all__."""
    command(full / "python", "-c", "from notifyd import *; assert WireProtocol and create_app and Hub")


def test_the_app_needs_no_package_of_a_server(bare: Path) -> None:
    """Importing and making an app imports starlette, orjson and msgspec."""
    program = (
        "import sys, notifyd; notifyd.create_app(); "
        "print(sorted({'uvicorn', 'uvloop', 'httptools', 'websockets', 'redis', 'jwt', 'sqlite3'} & set(sys.modules)))"
    )
    assert command(bare / "python", "-c", program) == "[]\n"


# The command line.


COMMANDS = {
    "console script": ["notifyd"],
    "module": ["python", "-m", "notifyd"],
    "factory": ["uvicorn", "--factory", "notifyd:create_app"],
}


def children(server: Server) -> set[int]:
    return set(server.processes()) - {server.pid}


@pytest.mark.parametrize("way", ["console script", "module"])
def test_workers_start_as_their_parent_was_started(full: Path, shop: Path, way: str) -> None:
    """Under the console script and under python -m, from the directory of a host with modules of our names."""
    program, *words = COMMANDS[way]
    flags = ["--port", "PORT", "--workers", "2", "--notification-interval", "0"]
    server = start([full / program, *words, *flags], shop)
    server.wait_for_line("with 2 workers")
    assert len(children(server)) == 2
    clients = [server.join() for _ in range(4)]
    assert server.notify("hi")["recipients"] == 4
    assert [client.receive()["data"] for client in clients] == [{"message": "hi"}] * 4
    killed = min(children(server))
    os.kill(killed, 9)
    eventually(lambda: len(children(server) - {killed}) == 2)
    server.stop()
    assert server.process.returncode == 0


def test_an_app_is_made_by_uvicorns_factory(full: Path, shop: Path) -> None:
    """`uvicorn --factory notifyd:create_app` serves without a host."""
    server = start([full / "uvicorn", "--factory", "notifyd:create_app", "--port", "PORT"], shop)
    client = server.join("bob")
    server.notify("hi", clients=["bob"])
    assert Record(client.receive()) == notification({"message": "hi"})
    server.kill()


# A missing extra.


@pytest.mark.parametrize("words", [["notifyd"], ["python", "-m", "notifyd"]])
def test_a_missing_server_is_one_line_that_says_what_to_install(bare: Path, words: list[str]) -> None:
    """Without uvicorn there is no command line but --help."""
    ended = subprocess.run([bare / words[0], *words[1:]], cwd="/", capture_output=True, text=True, check=False)
    line = "notifyd: the command line: needs uvicorn; pip install 'notifyd-server[server]'\n"
    assert (ended.returncode, ended.stderr) == (2, line)
    assert "usage: notifyd" in command(bare / words[0], *words[1:], "--help")


def test_the_bare_package_publishes_and_listens(bare: Path, server: Server) -> None:
    """The commands for a server elsewhere need no extra; the others name theirs in one line."""
    command(bare / "notifyd", "publish", "hi", "--url", server.url)
    listening = f"'{bare / 'notifyd'}' listen --since 1h --url {server.url} | grep -m1 hi"
    assert command("sh", "-c", listening)
    for words, extra in (["token", "--jwt-secret", "s" * 32], "jwt"), (["check", "--port", "0"], "server"):
        ended = subprocess.run([bare / "notifyd", *words], cwd="/", capture_output=True, text=True, check=False)
        [line] = (ended.stdout + ended.stderr).splitlines()
        assert ended.returncode in (1, 2) and line.endswith(f"; pip install 'notifyd-server[{extra}]'")


MISSING = {
    "jwks_url='https://example.com'": "tokens: needs jwt; pip install 'notifyd-server[jwt]'",
    "store='redis://localhost'": "store: needs redis; pip install 'notifyd-server[redis]'",
    "jwt_secret='s' * 32": "tokens: needs jwt; pip install 'notifyd-server[jwt]'",
}


@pytest.mark.parametrize("setting", MISSING)
def test_a_missing_extra_is_an_error_of_the_settings_in_a_host(bare: Path, setting: str) -> None:
    """The error names the extra."""
    host = (
        "from notifyd import Settings, SettingsError, create_app\n"
        f"try: create_app(Settings({setting}))\n"
        "except SettingsError as error: print(error)"
    )
    assert command(bare / "python", "-c", host) == f"{MISSING[setting]}\n"


@pytest.mark.parametrize("use", ["notifyd.WireProtocol", "exec('from notifyd import *')"])
def test_the_fast_wire_without_a_server_is_such_an_error(bare: Path, use: str) -> None:
    """The other names need no extra."""
    host = f"import notifyd\ntry: {use}\nexcept notifyd.SettingsError as error: print(error)"
    line = "WireProtocol: needs uvicorn; pip install 'notifyd-server[server]'\n"
    assert command(bare / "python", "-c", host) == line


def test_a_missing_extra_is_one_line_on_the_command_line(environments: Callable[..., Path]) -> None:
    """The server ends with status 2, also with workers, which find it out themselves."""
    notifyd = environments("serving", "[server]") / "notifyd"
    for flags in (["--workers", "1"], ["--workers", "2"]):
        ended = subprocess.run(
            [notifyd, "--port", "0", "--store", "redis://localhost", *flags],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        line = "notifyd: store: needs redis; pip install 'notifyd-server[redis]'\n"
        assert (ended.returncode, ended.stderr) == (2, line)


INTERRUPTS_ITSELF = """
import signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "starlette":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("words", [["notifyd"], ["python", "-m", "notifyd"]])
def test_ctrl_c_while_the_modules_load_is_no_traceback(full: Path, tmp_path: Path, words: list[str]) -> None:
    """The status is 130, as of a shell's command."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS_ITSELF)
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    started = [full / words[0], *words[1:], "--port", "0"]
    ended = subprocess.run(started, cwd="/", env=variables, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "")
