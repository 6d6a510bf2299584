"""deploy/: linted, and run as far as that goes without Docker and systemd."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from processes import ROOT, Server, call, free_port, program
from redis import Redis
from redis_group import until
from redis_server import RedisServer
from wheels import build, install

from settings import Settings, from_environ
from store_redis import RedisStore

pytestmark = pytest.mark.slow

DEPLOY = ROOT / "deploy"
DOCKERFILE, UNIT = (DEPLOY / "Dockerfile").read_text(), (DEPLOY / "notifyd.service").read_text()
COMPOSE, HA = (yaml.safe_load((DEPLOY / name).read_text()) for name in ("compose.yaml", "compose.ha.yaml"))
NODES = ("node-1", "node-2")
# Beside shutdown_timeout: the last closes, and the requests under way.
SPARE_SECONDS = 20


def lint(*command: str | Path) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


# Settings.


# A build leaves compiled modules there.
WRITTEN = sorted(path for path in DEPLOY.rglob("*.*") if path.is_file() and path.suffix != ".pyc")


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_every_variable_is_a_settings_own(path: Path) -> None:
    """Variables in comments count too: people uncomment them."""
    known = {f"NOTIFYD_{name.upper()}" for name in Settings.__struct_fields__}
    assert set(re.findall(r"NOTIFYD_[A-Z_]*[A-Z]", path.read_text())) <= known


def image_variables() -> dict[str, str]:
    """Return the variables that the image sets."""
    [block] = re.findall(r"^ENV ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    return dict(word.split("=", 1) for word in shlex.split(block.replace("\\\n", " ")))


def node_variables(compose: Any = COMPOSE) -> dict[str, str]:
    """Return the variables of a node in a compose file."""
    variables = [compose["services"][node]["environment"] for node in NODES]
    assert variables[0] == variables[1]
    return image_variables() | variables[0]


def unit_variables() -> dict[str, str]:
    return dict(line.split("=", 1) for line in re.findall(r"^#?Environment=(.*)$", UNIT, re.MULTILINE))


@pytest.mark.parametrize("variables", [image_variables(), node_variables(), node_variables(HA), unit_variables()])
def test_every_value_is_valid_for_its_setting(variables: dict[str, str]) -> None:
    """The server would start with it, and warns of nothing."""
    _, warnings = from_environ(variables)
    assert not warnings


def test_systemd_and_docker_wait_longer_than_the_drain() -> None:
    """Otherwise clients that leave in their own time are cut off."""
    [unit_patience] = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)
    assert float(unit_patience) >= from_environ(unit_variables())[0].shutdown_timeout + SPARE_SECONDS
    for compose in (COMPOSE, HA):
        for node in NODES:
            patience = seconds(compose["services"][node]["stop_grace_period"])
            assert patience >= from_environ(node_variables(compose))[0].shutdown_timeout + SPARE_SECONDS


# The image.


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    lint(program("hadolint"), DEPLOY / "Dockerfile")


def test_the_image_does_not_run_as_root() -> None:
    """A number, so that Kubernetes' runAsNonRoot can tell."""
    [user] = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def context(directory: Path) -> Path:
    """Copy what Docker sees of the repository, and return the directory."""
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert rules[0] == "*"
    for rule in rules[1:]:
        assert rule.startswith("!")
        for path in ROOT.glob(rule.removeprefix("!")):
            target = directory / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return directory


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with what the image installs: the wheel, and the versions of requirements.txt."""
    assert "pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /source" in DOCKERFILE
    assert "install --no-cache-dir --requirement /source/requirements.txt /wheel/*.whl" in DOCKERFILE
    source, directory = context(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("image")
    build(source, source / "wheel", "--wheel")
    install(directory, "--requirement", source / "requirements.txt", *(source / "wheel").glob("*.whl"))
    return directory


class Container:
    """The server as its container has it: files, variables and command of the image, on free ports of this machine."""

    def __init__(self, image: Path, variables: dict[str, str]) -> None:
        [entry] = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
        [program] = orjson.loads(entry)
        assert program.startswith("/notifyd/")
        self.internal_port = free_port()
        own = {"NOTIFYD_PORT": "0", "NOTIFYD_INTERNAL_PORT": str(self.internal_port), "NOTIFYD_HOST": "127.0.0.1"}
        # Nothing is imported from the checkout.
        own |= {"NOTIFYD_NOTIFICATION_INTERVAL": "0", "PYTHONPATH": ""}
        inherited = {name: value for name, value in variables.items() if name.startswith("NOTIFYD_")}
        self.server = Server([str(image / program.removeprefix("/notifyd/"))], inherited | own, cwd=image)

    def check(self) -> int:
        """Run the HEALTHCHECK and return its status."""
        [command] = re.findall(r"^HEALTHCHECK (?:.*\\\n)+\s+CMD (.*)$", DOCKERFILE, re.MULTILINE)
        words = [word.replace("9000", str(self.internal_port)) for word in orjson.loads(command)]
        return subprocess.run([sys.executable, *words[1:]], capture_output=True, check=False).returncode


@pytest.fixture
def container(image: Path) -> Iterator[Container]:
    one = Container(image, image_variables())
    yield one
    one.server.stop()


def test_the_image_has_all_that_the_server_needs(container: Container) -> None:
    """It starts from the image's files alone, with figures on the port that is not published."""
    container.server.join()
    assert container.server.get("/metrics").status_code == 404


def test_the_healthcheck_tells_whether_the_process_lives(container: Container) -> None:
    """A drain is no reason to be killed; the end is one."""
    client = container.server.join()
    assert container.check() == 0
    container.server.drain(stop_signal())
    assert container.check() == 0
    client.leave()
    assert container.server.exit_status() == 0
    assert container.check() != 0


def stop_signal() -> signal.Signals:
    [name] = re.findall(r"^STOPSIGNAL (.*)$", DOCKERFILE, re.MULTILINE)
    return signal.Signals[name]


# The nodes.


def test_two_nodes_on_the_redis_of_the_compose_file_are_one_server(image: Path) -> None:
    """A notification published on one node reaches clients of the other; Redis is told to keep its data."""
    service = COMPOSE["services"]["redis"]
    store = RedisServer(flags=tuple(service["command"][1:]))
    nodes = []
    try:
        for option, value in (("appendonly", "yes"), ("maxmemory-policy", "noeviction")):
            assert store.command("CONFIG", "GET", option) == {option: value}
        variables = node_variables()
        variables["NOTIFYD_STORE"] = variables["NOTIFYD_STORE"].replace("redis:6379", f"127.0.0.1:{store.port}")
        nodes = [Container(image, variables).server for _ in NODES]
        client = nodes[0].join()
        nodes[1].notify("from the other")
        assert client.receive()["data"]["message"] == "from the other"
    finally:
        for node in nodes:
            node.stop()
        store.close()


def test_the_compose_file_names_existing_files() -> None:
    """Services, volumes, ports and the Dockerfile."""
    services: dict[str, Any] = COMPOSE["services"]
    assert set(services) == {"redis", *NODES, "prometheus", "grafana"}
    volumes = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())}
    assert {volume for volume in volumes if volume[0] != "."} == set(COMPOSE["volumes"])
    assert all((DEPLOY / volume).is_file() for volume in volumes if volume[0] == ".")
    for node in NODES:
        build = services[node]["build"]
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).exists()
        assert services[node]["depends_on"] == {"redis": {"condition": "service_healthy"}}
        [(address, _, inside)] = [port.split(":") for port in services[node]["ports"]]
        assert (address, inside) == ("127.0.0.1", "8000")


# Monitoring.

PROMETHEUS = DEPLOY / "prometheus"
BOARD = orjson.loads((DEPLOY / "grafana" / "notifyd.json").read_bytes())


def test_promtool_takes_the_alerts_and_the_configuration() -> None:
    """The rules too, and the configuration finds them."""
    for check, name in (("rules", "alerts.yaml"), ("config", "prometheus.yaml")):
        command = [program("promtool"), "check", check, str(PROMETHEUS / name)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0 and "FAILED" not in ended.stdout, ended.stdout + ended.stderr


def expressions() -> dict[str, list[str]]:
    """Return the expressions of the alerts and of the board's panels."""
    rules = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"][0]["rules"]
    shown = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    return {"alerts": [rule["expr"] for rule in rules], "board": shown}


def test_alerts_and_board_name_metrics_that_are_there(tmp_path: Path) -> None:
    """With their labels, on a server whose store has operations; and each expression is one of Prometheus' language."""
    server = Server.notifyd("--port", "0", "--store", f"sqlite:{tmp_path / 'log'}", "--api-key", "ci:secret")
    try:
        server.http.headers["X-API-Key"] = "secret"
        server.notify("hi")
        server.join("bob").leave()
        server.get("/status", headers={"X-API-Key": "wrong"})
        until(lambda: "closes_total{" in server.get("/metrics/prometheus").text)
        text = server.get("/metrics/prometheus").text
    finally:
        server.stop()
    there = set(re.findall(r"^(\w+)", text, re.MULTILINE))
    labels = set(re.findall(r"[{,](\w+)=", text)) | {"instance"}
    for source, found in expressions().items():
        names = set(re.findall(r"(?:notifyd|websocket)_\w+", " ".join(found)))
        assert names and names <= there, source
        grouped = ",".join(re.findall(r"(?:by|without) \((.*?)\)", " ".join(found)))
        assert {name.strip() for name in grouped.split(",")} <= labels
    rules = [
        {"record": f"panel_{place}", "expr": expr.replace("$__rate_interval", "5m")}
        for place, expr in enumerate(expressions()["board"])
    ]
    (tmp_path / "board.yaml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    command = [program("promtool"), "check", "rules", str(tmp_path / "board.yaml")]
    subprocess.run(command, check=True, capture_output=True)


def cells_of(x: int, y: int, w: int, h: int) -> Iterator[tuple[int, int]]:
    return itertools.product(range(x, x + w), range(y, y + h))


def test_the_board_imports() -> None:
    """It has its own id, a variable for the source, and panels with different ids beside each other."""
    assert BOARD["uid"] == "notifyd" and BOARD["templating"]["list"][0]["type"] == "datasource"
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = list(itertools.chain(*(cells_of(**panel["gridPos"]) for panel in panels)))
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
    assert {target["datasource"]["uid"] for panel in panels for target in panel["targets"]} == {"${datasource}"}


@pytest.mark.parametrize("name", ["users", "topics"])
def test_the_board_shows_how_many_there_are_at_least_and_at_most(tmp_path: Path, name: str) -> None:
    """Of two processes, about which each of two nodes tells: one may have what the other has."""
    [panel] = [panel for panel in BOARD["panels"] if panel["title"] == name.capitalize()]
    given = [
        {"series": f'notifyd_process_{name}{{process="{process}",instance="{node}"}}', "values": f"{count}x5"}
        for process, count in (("a", 3), ("b", 2))
        for node in NODES
    ]
    expected = [
        {"expr": target["expr"], "eval_time": "1m", "exp_samples": [{"labels": "{}", "value": value}]}
        for target, value in zip(panel["targets"], (3, 5), strict=True)
    ]
    assert [target["legendFormat"] for target in panel["targets"]] == ["at least", "at most"]
    test = {"tests": [{"interval": "1m", "input_series": given, "promql_expr_test": expected}]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    command = [program("promtool"), "test", "rules", str(tmp_path / "test.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


LATE = 'notifyd_process_loop_delay_seconds_bucket{process="a",instance="x",le="%s"}'
# Series of one of two nodes that tell the same, and when the alert of that name fires.
FIRES = {
    "NotifydStoreAway": ({'notifyd_process_store_up{process="a",instance="x"}': "1 0x20"}, "2m"),
    "NotifydBacklog": ({'notifyd_largest_backlog_notifications{instance="x"}': "600x20"}, "3m"),
    "NotifydRefusals": (
        {'notifyd_process_refusals_total{process="a",kind="rate_exceeded",instance="x"}': "0+600x60"},
        "12m",
    ),
    "NotifydLoopHeld": ({LATE % "+Inf": "0+60x60", LATE % "1.0": "0+60x60", LATE % "0.1": "0x60"}, "25m"),
}


@pytest.mark.parametrize("alert", FIRES)
def test_an_alert_fires(tmp_path: Path, alert: str) -> None:
    """Of two nodes that tell the same, each alert is one."""
    series, at = FIRES[alert]
    given = [
        {"series": name.replace('instance="x"', f'instance="{node}"'), "values": values}
        for name, values in series.items()
        for node in NODES
    ]
    expected = [{"eval_time": at, "alertname": alert, "exp_alerts": []}]
    test = {
        "rule_files": [str(PROMETHEUS / "alerts.yaml")],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": given, "alert_rule_test": expected}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    command = [program("promtool"), "test", "rules", str(tmp_path / "test.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and (ended.stdout + ended.stderr).count("severity") == 1, ended.stdout + ended.stderr


# A failover.


def test_the_compose_file_of_a_failover_names_what_is_there() -> None:
    """Services, volumes, and an address for each sentinel."""
    services: dict[str, Any] = HA["services"]
    volumes = {volume.split(":")[0] for service in services.values() for volume in service.get("volumes", ())}
    assert volumes == set(HA["volumes"])
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
    store = RedisStore(Settings(), node_variables(HA)["NOTIFYD_STORE"])
    assert store.failure is None
    sentinels = {name for name in services if name.startswith("sentinel-")}
    assert set(re.findall(r"sentinel-\d", node_variables(HA)["NOTIFYD_STORE"])) == sentinels and len(sentinels) == 3


def test_the_sentinels_of_the_compose_file_find_the_primary(redis: RedisServer, tmp_path: Path) -> None:
    """Their command makes a configuration that redis-server takes."""
    port = free_port()
    shell, flag, script = HA["services"]["sentinel-1"]["command"]
    for name, here in (("$$", "$"), ("/data", str(tmp_path)), ("redis-1 6379", f"localhost {redis.port}")):
        script = script.replace(name, here)
    script = script.replace("--sentinel", f"--sentinel --port {port}").replace("redis-server", program("redis-server"))
    process = subprocess.Popen([shell, flag, script], stdout=subprocess.DEVNULL)
    try:
        with Redis(port=port, decode_responses=True) as client:
            until(lambda: client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", "notifyd"))
            address = client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", "notifyd")
        assert tuple(map(str, address)) == ("localhost", str(redis.port))
    finally:
        process.kill()
        process.wait()


def test_a_server_of_the_compose_file_stays_the_primary_after_a_restart(redis: RedisServer, tmp_path: Path) -> None:
    """The configuration that a failover writes counts, and not the one of the first start."""
    port = free_port()
    shell, flag, script = HA["services"]["redis-2"]["command"]
    for name, here in (("$$", "$"), ("/data", str(tmp_path)), ("redis-1 6379", f"127.0.0.1 {redis.port}")):
        script = script.replace(name, here)
    script = script.replace("--bind '*'", f"--bind 127.0.0.1 --port {port}")
    script = script.replace("redis-server", program("redis-server"))
    for role in ("slave", "master"):
        process = subprocess.Popen([shell, flag, script], stdout=subprocess.DEVNULL)
        try:
            with Redis(port=port, decode_responses=True) as client:
                until(lambda: client.execute_command("ROLE")[0] == role)  # noqa: B023
                client.execute_command("REPLICAOF NO ONE")
                client.config_rewrite()
        finally:
            process.kill()
            process.wait()


def test_nginx_takes_the_configuration_of_the_compose_file(tmp_path: Path) -> None:
    content = HA["configs"]["nginx"]["content"].replace("$$", "$")
    for node in NODES:
        content = content.replace(node, "127.0.0.1")
    path = tmp_path / "nginx.conf"
    own = f"pid {tmp_path}/pid; error_log stderr emerg; events {{}}\n"
    path.write_text(f"{own}http {{ access_log off; {content} }}")
    ended = subprocess.run([program("nginx"), "-t", "-q", "-c", path], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("name", ["compose.yaml", "compose.ha.yaml"])
def test_compose_takes_the_file(name: str) -> None:
    """Its own check, where it is installed."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("needs docker compose")
    lint(docker, "compose", "-f", DEPLOY / name, "config", "--quiet")


# The unit.


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with this machine's command; it must be one that is there."""
    [command] = re.findall(r"^ExecStart=(.*)$", UNIT, re.MULTILINE)
    python, script = command.split()
    assert (Path(python).name, Path(script).name) == ("python", "notifyd.py")
    path = tmp_path / "notifyd.service"
    path.write_text(UNIT.replace(command, f"{sys.executable} {ROOT / 'notifyd.py'}"))
    return path


def test_systemd_understands_the_unit(unit: Path) -> None:
    """No unknown key, no bad value."""
    lint(program("systemd-analyze"), "verify", "--man=no", unit)


def test_systemd_finds_the_unit_hardened(unit: Path) -> None:
    """Exposure is 0 to 10; a unit without any of it has 9.6."""
    command = [program("systemd-analyze"), "security", "--offline=true", "--threshold=20", "--no-pager", str(unit)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-200:]


@pytest.mark.parametrize(
    "line",
    [
        *("DynamicUser=yes", "NoNewPrivileges=yes", "ProtectSystem=strict", "KillMode=mixed", "StateDirectory=notifyd"),
        *("Restart=on-failure", "RestartPreventExitStatus=2", "StartLimitIntervalSec=0"),
    ],
)
def test_the_unit_keeps(line: str) -> None:
    """The unit keeps the lines that the drain, the machine's users and a restart after any failure rely on."""
    assert line in UNIT.splitlines()


def test_a_failing_start_is_not_repeated_at_once() -> None:
    """By default systemd tries five times within a second, and then never again."""
    [pause] = re.findall(r"^RestartSec=(\d+)$", UNIT, re.MULTILINE)
    assert 1 <= int(pause) <= 10


def test_a_bad_setting_ends_with_the_status_that_is_not_restarted() -> None:
    """A port in use is: its owner may go."""
    [status] = re.findall(r"^RestartPreventExitStatus=(\d+)$", UNIT, re.MULTILINE)
    assert call("--port", "nonsense").status == int(status)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert call("--port", str(taken.getsockname()[1])).status not in (0, int(status))


def test_the_log_is_in_the_state_directory() -> None:
    """Elsewhere the service could not write."""
    assert unit_variables()["NOTIFYD_STORE"].startswith("sqlite:/var/lib/notifyd/")
