"""The servers that are measured side by side: how each is started, and how a missing one is noticed.

All take the same load: WebSocket clients on `ws_path`, and `POST publish_path` to send one notification to all of
them. Each is set up as its documentation says, in one process, without compression and pings.
"""

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = HERE.parent / ".cache"
NPM_SECONDS = 30.0


@dataclass(frozen=True)
class Peer:
    """One server. `command` gets the port and an empty folder; `prepare` builds its binaries, and returns
    the reason if the server cannot run here."""

    name: str
    command: Callable[[int, Path], list[str]]
    prepare: Callable[[], str | None]
    version: Callable[[], str]
    ws_path: str = "/ws"
    publish_path: str = "/notify"
    publish_port_offset: int = 0
    # Frames that the server sends by itself to each client that connects.
    greetings: int = 0
    # Whether its publishes per second are a figure of the server.
    has_http: bool = True
    # The text it prints when all of it serves, where an open port is not enough.
    ready: str = ""


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def compile_c(source: Path) -> str | None:
    """Compile sources newer than their binaries into the cache; return the reason if that fails, else None."""
    binary = CACHE / source.stem
    compiler = _compiler()
    if compiler is None:
        return "there is no C compiler"
    if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
        return None
    with _cache_folder() as folder:
        command = [compiler, "-O2", "-o", str(folder / source.stem), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{source.name} does not compile: {done.stderr.strip()}"
        (folder / source.stem).replace(binary)
    return None


@contextlib.contextmanager
def _cache_folder() -> Iterator[Path]:
    """A temporary folder, to be moved into the cache in one step: another run may build the same."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as folder:
        yield Path(folder)


def _output(*command: str, timeout: float | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    return (done.stdout + done.stderr).strip()


def _without_package(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"the Python package {name} is not installed"


def _nothing_missing() -> str | None:
    return None


def _notifyd_command(port: int, _: Path) -> list[str]:
    settings = "--max-connections 20000 --notification-interval 0 --ping-interval 0"
    return [sys.executable, str(ROOT / "notifyd.py"), "--port", str(port), *settings.split()]


def _notifyd_version() -> str:
    return _output(sys.executable, str(ROOT / "notifyd.py"), "--version").removeprefix("notifyd ")


def _redis_command(port: int, folder: Path) -> list[str]:
    settings = f"--port {port} --bind 127.0.0.1 --dir {folder} --appendonly yes --appendfsync everysec"
    return ["redis-server", *settings.split(), "--save", ""]


def _redis_version() -> str:
    found = re.search(r"v=(\S+)", _output("redis-server", "--version"))
    return found[1] if found else "unknown"


def _prepare_floor() -> str | None:
    return compile_c(HERE / "floor.c")


def _install_ws() -> str | None:
    """`ws` is taken from npm once, into the cache."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "node or npm is not installed"
    installed = CACHE / "node_modules"
    if installed.exists():
        return None
    with _cache_folder() as folder:
        command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--prefix", str(folder), "ws@8"]
        try:
            said = _output(*command, timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired:
            return f"npm could not install ws in {NPM_SECONDS:.0f} s"
        if not (folder / "node_modules/ws/package.json").exists():
            code = re.search(r"code (\w+)", said)
            return f"npm could not install ws: {code[1] if code else 'it does not say why'}"
        with contextlib.suppress(OSError):  # another run was faster
            (folder / "node_modules").rename(installed)
    return None


def _ws_version() -> str:
    package = (CACHE / "node_modules/ws/package.json").read_text()
    [number] = re.findall(r'"version": "(.*?)"', package)
    return f"{number} on node {_output('node', '--version')}"


def _nchan_module() -> Path | None:
    """nginx says where it keeps its modules."""
    if shutil.which("nginx") is None:
        return None
    folder = re.search(r"--modules-path=(\S+)", _output("nginx", "-V"))
    module = Path(folder[1] if folder else "/") / "ngx_nchan_module.so"
    return module if module.exists() else None


def _without_nchan() -> str | None:
    return None if _nchan_module() else "nginx or its module nchan is not installed"


def _nchan_command(port: int, scratch: Path) -> list[str]:
    conf = (HERE / "nchan.conf").read_text()
    for mark, value in {"@PORT@": port, "@SCRATCH@": scratch, "@MODULE@": _nchan_module()}.items():
        conf = conf.replace(mark, str(value))
    (scratch / "nchan.conf").write_text(conf)
    return ["nginx", "-p", str(scratch), "-c", str(scratch / "nchan.conf"), "-e", "stderr"]


def _nchan_version() -> str:
    """nchan does not tell its version before it runs; Debian's packages do."""
    nginx = _output("nginx", "-v").rpartition("/")[2]
    package = shutil.which("dpkg-query") and _output("dpkg-query", "-Wf${Version}", "libnginx-mod-nchan")
    return f"{re.sub(r'^[0-9]+:|[+-].*', '', package or 'unknown')} on nginx {nginx}"


FLOOR = Peer(
    "C send() loop",
    command=lambda port, _: [str(CACHE / "floor"), str(port)],
    prepare=_prepare_floor,
    version=lambda: _output(_compiler() or "cc", "--version").splitlines()[0],
)
NOTIFYD = Peer("notifyd", command=_notifyd_command, prepare=_nothing_missing, version=_notifyd_version, greetings=1)


def notifyd_on(store: str, workers: int, *flags: str) -> Peer:
    """So many workers with that store in common; {folder} in it is a folder of their own."""

    def command(port: int, folder: Path) -> list[str]:
        shared = ["--workers", str(workers), "--store", store.format(folder=folder)]
        return [*_notifyd_command(port, folder), *shared, *flags]

    return replace(NOTIFYD, command=command, ready="listens on")


# Serves notifyd, and no clients of its own.
REDIS = Peer(
    "redis",
    command=_redis_command,
    prepare=lambda: None if shutil.which("redis-server") else "redis-server is not installed",
    version=_redis_version,
)
NCHAN = Peer("nchan", command=_nchan_command, prepare=_without_nchan, version=_nchan_version)
WS = Peer(
    "ws",
    command=lambda port, _: ["node", str(HERE / "ws_loop.cjs"), str(port), str(CACHE / "node_modules/ws")],
    prepare=_install_ws,
    version=_ws_version,
)
WEBSOCKETS = Peer(
    "websockets",
    command=lambda port, _: [sys.executable, str(HERE / "websockets_broadcast.py"), str(port)],
    prepare=lambda: _without_package("websockets") or _without_package("uvloop"),
    version=lambda: version("websockets"),
    publish_port_offset=1,
    has_http=False,
)
FASTAPI = Peer(
    "FastAPI",
    command=lambda port, _: [sys.executable, str(HERE / "fastapi_loop.py"), str(port)],
    prepare=lambda: _without_package("fastapi") or _without_package("uvloop"),
    version=lambda: f"{version('fastapi')} on uvicorn {version('uvicorn')}",
)
PEERS = {
    "notifyd": NOTIFYD,
    "floor": FLOOR,
    "nchan": NCHAN,
    "ws": WS,
    "websockets": WEBSOCKETS,
    "fastapi": FASTAPI,
}
