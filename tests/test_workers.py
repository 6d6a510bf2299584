"""Several workers under one parent: they start, die, drain and end as one server."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM

import pytest
from conftest import StartServer
from expected import PONG, SHUTDOWN, SYSTEM
from processes import (
    QUIET,
    ROOT,
    Server,
    environment,
    eventually,
    free_port,
    is_free,
    listens,
    needs_proc,
    notifyd_command,
    run,
    runs,
    sockets,
    workers,
)
from websockets.exceptions import ConnectionClosed
from ws_clients import PATIENCE, Client

from server_workers import VARIABLE

pytestmark = [pytest.mark.slow, needs_proc]

GONE = (1001, "Server shutting down")


def join_each_worker(server: Server) -> list[Client]:
    """Join until every worker has a client."""
    before = {pid: len(sockets(pid)) for pid in workers(server)}
    clients: list[Client] = []

    def each_has_one() -> bool:
        clients.append(server.join())
        return all(len(sockets(pid)) > count for pid, count in before.items())

    eventually(each_has_one)
    return clients


@pytest.fixture(scope="module")
def healthy() -> Iterator[Server]:
    """A server with two workers, left alone."""
    server = Server.notifyd("--workers", "2", *QUIET)
    yield server
    server.stop()


@pytest.fixture
def server(start_server: StartServer) -> Server:
    """A server with two workers."""
    return start_server("--workers", "2")


# The start.


def test_start_and_end_of_three_workers(start_server: StartServer) -> None:
    """One line for all of them, with their number, when all serve; and one signal ends them."""
    server = start_server("--workers", "3")
    assert [line.split(" (")[0] for line in server.stderr] == [f"notifyd 0.1.0 listens on {server.url} with 3 workers"]
    assert len(workers(server)) == 3
    server.signal()
    assert server.exit_status() == 0


def test_status_shows_the_workers_and_the_port(healthy: Server) -> None:
    """The number is the host's own, and port 0 has become the parent's."""
    configuration = healthy.read("/status")["configuration"]
    assert (configuration["workers"], configuration["port"]) == (2, healthy.port)


def test_every_worker_accepts(healthy: Server) -> None:
    """Newcomers are dealt out among them, even when they come at once, and all are welcomed."""
    before = {pid: len(sockets(pid)) for pid in workers(healthy)}
    with ThreadPoolExecutor(10) as newcomers:
        list(newcomers.map(lambda _: healthy.join(), range(40)))
    assert all(len(sockets(pid)) - count >= 5 for pid, count in before.items())


def test_the_limit_of_open_files_is_raised_in_each_and_warned_about_once() -> None:
    """A worker can have as many clients as one process could."""
    command = notifyd_command("--port", "0", "--workers", "2", "--notification-interval", "0")
    server = Server(["sh", "-c", 'ulimit -S -n 64; ulimit -H -n 200; exec "$@"', "sh", *command])
    assert {resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in workers(server)} == {(200, 200)}
    assert sum("open files" in line for line in server.stderr) == 1
    server.stop()


def test_a_port_in_use_stops_the_start_with_one_line(healthy: Server) -> None:
    """The parent finds it out before there is any worker."""
    ended = run("--workers", "2", "--port", str(healthy.port))
    assert ended.in_one_line == (1, 1)
    assert str(healthy.port) in ended.stderr


def test_a_store_for_one_process_is_refused() -> None:
    """Workers with a memory each would be islands: one line names the setting, and the status is 2."""
    ended = run("--port", "0", "--workers", "2", "--store", "memory")
    assert ended.in_one_line == (2, 1)
    assert "--store" in ended.stderr


def test_no_place_for_a_temporary_log_is_one_line() -> None:
    """A start on a full disk, where nothing can be written, ends with one line."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        ended = run("--port", "0", "--workers", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ended.in_one_line == (2, 1)
    assert "--store" in ended.stderr


@pytest.mark.parametrize("good", [0, 1])
def test_a_worker_that_fails_at_the_start_stops_the_start(tmp_path: Path, good: int) -> None:
    """The parent ends with the status and the one line of the first worker that cannot start, be it not the first."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if {VARIABLE!r} in os.environ:\n"
        f"    with open({str(tmp_path / 'count')!r}, 'a+') as count:\n"
        "        count.write('x'); count.flush()\n"
        f"        if count.tell() > {good}:\n"
        "            print('notifyd: on purpose', file=sys.stderr, flush=True); os._exit(3)\n"
    )
    ended = run("--port", "0", "--workers", "2", variables={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert ended.status == 3
    assert [line for line in ended.stderr.splitlines() if "INFO" not in line] == ["notifyd: on purpose"]


def test_a_worker_that_is_killed_at_the_start_stops_the_start(tmp_path: Path) -> None:
    """It cannot say so itself: the parent does, in one line."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif {VARIABLE!r} in os.environ:\n    os.kill(os.getpid(), 9)\n"
    )
    ended = run("--port", "0", "--workers", "2", variables={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert ended.in_one_line == (128 + SIGKILL, 1)
    assert "A worker ended with status 137" in ended.stderr


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_a_signal_during_the_start_ends_it(number: int) -> None:
    """Ctrl+C before the workers serve quits without a word about exceptions, and no worker stays."""
    with subprocess.Popen(
        notifyd_command("--port", "0", "--workers", "2"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        eventually(children.read_text)
        os.killpg(process.pid, number)
        # stderr ends when all processes that hold it have ended.
        _, text = process.communicate(timeout=PATIENCE)
    assert b"Traceback" not in text and process.returncode == 0


# Workers die.


def test_a_killed_worker_is_replaced_and_the_others_go_on(server: Server) -> None:
    """Only its own clients lose their connection, and the new one serves."""
    clients = join_each_worker(server)
    killed, other = workers(server)
    os.kill(killed, SIGKILL)
    alive = 0
    for client in clients:
        with suppress(ConnectionClosed):
            alive += client.ask({"type": "ping"}) == PONG
    assert 0 < alive < len(clients)
    eventually(lambda: any(listens(pid, server.port) for pid in workers(server) - {killed, other}))
    join_each_worker(server)


def test_a_worker_that_keeps_dying_is_replaced_ever_later(start_server: StartServer) -> None:
    """A fault that kills every worker at its start must not keep the machine busy."""
    server = start_server("--workers", "2", constants={"server_workers.STABLE_SECONDS": 60.0})
    others = {min(workers(server))}
    for pause in ("0.25", "0.50"):
        eventually(lambda: workers(server) - others)
        [dying] = workers(server) - others
        os.kill(dying, SIGKILL)
        server.wait_for_line(rf"status 137 and is replaced in {pause} s")
        others.add(dying)


def test_a_worker_that_is_asked_to_leave_drains_alone(server: Server) -> None:
    """SIGTERM to one worker: its clients are told, newcomers go to the other, and when it has ended it is replaced."""
    clients = join_each_worker(server)
    leaving, other = workers(server)
    os.kill(leaving, SIGTERM)
    eventually(lambda: not listens(leaving, server.port))
    told = [client for client in clients if client.ask({"type": "ping"}) == SYSTEM]
    assert 0 < len(told) < len(clients)
    for _ in range(5):
        server.join()
    for client in told:
        client.leave()
    eventually(lambda: len(workers(server) - {leaving, other}) == 1)
    assert other in workers(server)


# The parent dies.


def test_a_killed_parent_leaves_nothing_that_stops_the_next(start_server: StartServer, tmp_path: Path) -> None:
    """Its workers close their clients and end, the same port serves again, and the log of the dead is removed."""
    lasting = {"connection.CLOSE_DEADLINE_SECONDS": 60.0}
    flags, variables = ("--workers", "2", "--port", str(free_port())), {"TMPDIR": str(tmp_path)}
    first = start_server(*flags, variables=variables, constants=lasting)
    clients, orphans = join_each_worker(first), workers(first)
    first.join_bare()  # It never answers a close, and is not waited for.
    [leftover] = tmp_path.iterdir()
    first.process.kill()
    assert [client.closed() for client in clients] == [GONE] * len(clients)
    eventually(lambda: not any(runs(pid) for pid in orphans))
    second = start_server(*flags, variables=variables)
    assert second.join().ask({"type": "ping"}) == PONG
    assert len(list(tmp_path.iterdir())) == 1 and not leftover.exists()


def test_the_port_is_free_at_once_after_a_killed_parent(start_server: StartServer) -> None:
    """A new start need not wait."""
    flags = ("--workers", "2", "--port", str(free_port()))
    first = start_server(*flags)
    first.process.kill()
    # Its workers notice it first of all, as soon as they run.
    eventually(lambda: is_free(first.port))
    assert start_server(*flags).read("/health")["status"] == "healthy"


# The temporary log.


def test_the_log_is_private_and_goes_with_the_server(start_server: StartServer, tmp_path: Path) -> None:
    """Nobody else can enter its directory, another start leaves it alone, and the end removes it."""
    first = start_server("--workers", "2", variables={"TMPDIR": str(tmp_path)})
    [directory] = tmp_path.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    second = start_server("--workers", "2", variables={"TMPDIR": str(tmp_path)})
    assert directory.exists() and len(list(tmp_path.iterdir())) == 2
    for server in (first, second):
        server.signal()
        assert server.exit_status() == 0
    assert list(tmp_path.iterdir()) == []


def test_the_log_may_have_been_removed(start_server: StartServer, tmp_path: Path) -> None:
    """The temporary log may be removed by a cleaner: the server still ends without an error."""
    server = start_server("--workers", "2", variables={"TMPDIR": str(tmp_path)})
    [directory] = tmp_path.iterdir()
    shutil.rmtree(directory)
    server.signal()
    assert server.exit_status() == 0


# The end.


def test_a_signal_drains_all_workers(server: Server) -> None:
    """The clients of each are told, and when the last has left, the status is 0."""
    clients = join_each_worker(server)
    server.signal()
    assert [client.receive_many(2) for client in clients] == [[SYSTEM, SHUTDOWN]] * len(clients)
    assert clients[-1].ask({"type": "ping"}) == PONG
    server.forget_clients()
    assert server.exit_status() == 0


def test_a_drained_worker_refuses_newcomers_until_all_have_drained(server: Server) -> None:
    """The kernel goes on dealing them out to all workers: none of them is lost when one has no clients left."""
    client = server.join()
    server.drain()
    for _ in range(50):
        assert server.connect().closed() == GONE
    assert len(workers(server)) > 1
    client.leave()
    assert server.exit_status() == 0


def test_a_second_signal_closes_everyone_now(server: Server) -> None:
    """A second signal closes the clients of every worker, and the status is still 0."""
    clients = join_each_worker(server)
    server.signal()
    assert [client.receive_many(2) for client in clients] == [[SYSTEM, SHUTDOWN]] * len(clients)
    server.signal(SIGINT)
    assert [client.closed() for client in clients] == [GONE] * len(clients)
    assert server.exit_status() == 0


@pytest.mark.parametrize("number", [SIGINT, SIGTERM])
def test_a_signal_to_the_whole_group_counts_once(server: Server, number: int) -> None:
    """Ctrl+C, and systemd's signals, go to parent and workers alike: that is one signal, and two are two."""
    clients = join_each_worker(server)
    os.killpg(server.pid, number)
    assert [client.receive_many(2) for client in clients] == [[SYSTEM, SHUTDOWN]] * len(clients)
    assert server.connect().closed() == GONE
    assert [client.ask({"type": "ping"}) for client in clients] == [PONG] * len(clients)
    os.killpg(server.pid, number)
    assert [client.closed() for client in clients] == [GONE] * len(clients)
    assert server.exit_status() == 0


def test_a_worker_that_hangs_is_replaced(start_server: StartServer, tmp_path: Path) -> None:
    """Newcomers that the kernel deals out to it would wait for ever."""
    server = start_server("--workers", "2", constants={"server_workers.SILENCE_SECONDS": 1.5})
    hanging = min(workers(server))
    os.kill(hanging, SIGSTOP)
    server.wait_for_line(f"Worker {hanging} hangs and is killed")
    eventually(lambda: len(workers(server) - {hanging}) == 2)
    assert len(join_each_worker(server)) >= 2


def test_a_pause_of_all_is_no_reason_to_replace_anybody(start_server: StartServer, tmp_path: Path) -> None:
    """No worker is replaced after a pause of all, as when a container is frozen for a while."""
    server = start_server("--workers", "2", constants={"server_workers.SILENCE_SECONDS": 1.5})
    before = workers(server)
    os.killpg(server.pid, SIGSTOP)
    time.sleep(4)
    os.killpg(server.pid, SIGCONT)
    time.sleep(4)
    assert workers(server) == before


def test_a_worker_that_hangs_is_killed_in_the_end(start_server: StartServer, tmp_path: Path) -> None:
    """After a second signal nothing keeps the server from ending; the status says that something was wrong."""
    server = start_server("--workers", "2", constants={"server_workers.KILL_SECONDS": 0.5})
    hanging = min(workers(server))
    os.kill(hanging, SIGSTOP)
    server.signal()
    server.wait_for_line("Shutting down")
    server.signal()
    server.wait_for_line(f"Worker {hanging} does not end and is killed")
    assert server.exit_status() == 128 + SIGKILL


def test_a_drain_ends_also_where_a_worker_hangs(start_server: StartServer, tmp_path: Path) -> None:
    """When the drain should long be over, nobody has to signal again."""
    flags = ("--workers", "2", "--shutdown-timeout", "0.5", "--max-connections", "10")
    server = start_server(*flags, constants={"server_workers.KILL_SECONDS": 0.5})
    hanging = min(workers(server))
    os.kill(hanging, SIGSTOP)
    server.signal()
    server.wait_for_line(f"Worker {hanging} does not end and is killed")
    assert server.exit_status() == 128 + SIGKILL


def test_a_worker_that_waits_for_the_store_is_not_killed(start_server: StartServer, tmp_path: Path) -> None:
    """It gives the store its time, at the beginning of the drain and at the end."""
    flags = ("--workers", "2", "--shutdown-timeout", "0", "--store-timeout", "2.5", "--store", f"sqlite:{tmp_path}/log")
    server = start_server(*flags, constants={"server_workers.KILL_SECONDS": 3})
    with (tmp_path / "log-lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server.signal()
        assert server.exit_status() == 0


def test_the_workers_share_the_pace(start_server: StartServer) -> None:
    """--drain-rate is the host's: at 20 a second, two workers need about a second to tell twenty clients."""
    server = start_server("--workers", "2", "--drain-rate", "20")
    clients = [server.join() for _ in range(20)]
    began = time.monotonic()
    server.signal()
    for client in clients:
        client.receive_many(2)
    assert time.monotonic() - began > 0.8
