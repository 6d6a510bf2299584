"""The store in a SQLite file alone: its files, and the accidents of files."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from statistics import median

import pytest
from conftest import StartServer
from expected import PONG
from members import SHORT_LEASE, Member, Process, audience, members, on_loop, registration, threads_left
from processes import eventually
from ws_clients import PATIENCE

import store_sqlite_file
import store_sqlite_transaction
from errors import StoreUnavailable
from settings import Settings, SettingsError
from store import ClientIdTaken, Draft, Report
from store_sqlite import Database
from store_sqlite_transaction import Operation, Transaction


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@contextmanager
def lock_held(path: Path) -> Iterator[None]:
    """Hold the locks of a transaction, like a process that was stopped in the middle of one."""
    with open(f"{path}-lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def database_locked(path: Path) -> Iterator[None]:
    """Hold SQLite's own lock, like a person with the file open in a shell."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def disk_full_for(process: Process) -> Iterator[None]:
    """Let the process write into no file."""
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
    yield
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))


def files(path: Path) -> list[str]:
    """Return the names of the files beside the store's file, from its own name on."""
    return sorted(name.removeprefix(path.name) for name in os.listdir(path.parent))


# The path.


def spoil_with_a_directory(path: Path) -> None:
    path.mkdir()


def spoil_with_text(path: Path) -> None:
    path.write_text("This is no database. " * 100)


def spoil_with_another_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE songs (name)")


def spoil_with_the_future(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {store_sqlite_file.SCHEMA_VERSION + 1}")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_with_a_directory, "Is a directory"),
        (spoil_with_text, "file is not a database"),
        (spoil_with_another_program, "belongs to another program"),
        (spoil_with_the_future, "newer version"),
    ],
)
@on_loop
async def test_a_file_that_is_no_store_is_a_wrong_setting(
    path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    """The error is one clear line, and the file stays as it was."""
    spoil(path)
    before = path.is_dir() or path.read_bytes()
    with pytest.raises(SettingsError, match=reason) as error:
        await Member(f"sqlite:{path}").open()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert before == (path.is_dir() or path.read_bytes())


@on_loop
async def test_a_path_that_cannot_be_opened_is_a_wrong_setting(path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file or directory"):
        await Member(f"sqlite:{path}/missing/log.db").open()


@on_loop
async def test_the_files_are_for_their_owner_only(path: Path) -> None:
    """Those that SQLite and the nodes put beside it, too; at the end all but the log and its lock are gone."""
    async with members(f"sqlite:{path}", 2) as [one, other]:
        await one.publish()
        names = files(path)
        assert names == sorted(["", "-lock", "-shm", "-wal", f"-{one.store.node_id}", f"-{other.store.node_id}"])
        for name in names:
            assert stat.S_IMODE(os.stat(f"{path}{name}").st_mode) & 0o077 == 0, name
    assert files(path) == ["", "-lock"]


@on_loop
async def test_a_path_may_be_longer_than_a_sockets(tmp_path: Path) -> None:
    """The path may lead over a symbolic link, and names the same store."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    (tmp_path / "link").symlink_to(deep)
    async with (
        members(f"sqlite:{deep / 'log.db'}") as [one],
        members(f"sqlite:{tmp_path}/link/log.db") as [two],
    ):
        took = []
        for _ in range(10):
            began = time.monotonic()
            await one.publish()
            await two.until(lambda: two.records == one.records)
            took.append(time.monotonic() - began)
        assert median(took) < 0.3, "no wake-up: only the look that comes once a second"


@on_loop
async def test_a_name_may_be_longer_than_a_sockets(tmp_path: Path) -> None:
    """A path may be long, in any script."""
    async with members(f"sqlite:{tmp_path / ('通知' * 20)}", 2) as [one, other]:
        await one.publish()
        await other.until(lambda: other.records)


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_killed_process_leaves_no_socket(path: Path, start_process: Callable[..., Process]) -> None:
    process = start_process(f"sqlite:{path}", SHORT_LEASE)
    async with members(f"sqlite:{path}") as [one]:
        process.kill()
        await one.until(lambda: len(files(path)) == 5)


@on_loop
async def test_the_write_ahead_log_begins_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that never comes to rest begins anew at the second bound."""
    monkeypatch.setattr(store_sqlite_transaction, "CHECKPOINT_PAGES", 50)
    monkeypatch.setattr(store_sqlite_file, "MAX_WAL_PAGES", 200)
    async with members(f"sqlite:{path}", 2) as both:

        async def publish_until_it_has_begun_anew(member: Member) -> None:
            # Its header counts how often (sqlite.org/fileformat2.html, "WAL File Format").
            while int.from_bytes(Path(f"{path}-wal").read_bytes()[12:16]) < 2:
                await member.publish()

        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(publish_until_it_has_begun_anew(member) for member in both))


# The event loop.


@on_loop
async def test_an_opening_that_was_given_up_leaves_nothing(path: Path) -> None:
    """The next request opens the store."""
    member = Member(f"sqlite:{path}")
    with lock_held(path), pytest.raises(TimeoutError):
        await asyncio.wait_for(member.open(), 0.1)
    await member.open()
    await member.publish()
    await member.store.close()
    assert (len(member.openings), threads_left()) == (1, [])


# Away, and back.


@pytest.mark.parametrize(
    ("trouble", "reason"), [(lock_held, "no answer within 0.2 s"), (database_locked, "database is locked|no answer")]
)
@on_loop
async def test_a_locked_store_is_away_until_it_is_free(
    path: Path, trouble: Callable[[Path], Iterator[None]], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests meanwhile are refused; departures meanwhile count. The log has one line at each end."""
    caplog.set_level("INFO", "notifyd")
    async with members(f"sqlite:{path}", store_timeout=0.2) as [one]:
        await one.admit("a")
        await one.admit("b")
        with trouble(path):  # type: ignore[attr-defined]
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match=f"The store is away: ({reason})"):
                await one.publish()
            assert time.monotonic() - began < 4
            assert one.store.failure is not None
            took = []
            for _ in range(3):
                began = time.monotonic()
                with pytest.raises(StoreUnavailable):
                    await one.admit("b")
                took.append(time.monotonic() - began)
            assert min(took) < 0.1, "it is known to be away"
            one.leave("a")
            await one.until(lambda: "back" not in caplog.text)
        await one.until(lambda: one.store.failure is None)
        assert await one.active() == 1
        await one.publish()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@on_loop
async def test_a_lease_that_cannot_be_renewed_is_a_failure(path: Path) -> None:
    """Nobody has to ask for anything."""
    async with members(f"sqlite:{path}", store_timeout=0.2) as [one]:
        with lock_held(path):
            await one.until(lambda: one.store.failure)
        await one.until(lambda: one.store.failure is None)


@on_loop
async def test_an_admission_that_was_given_up_takes_no_slot(path: Path) -> None:
    """Whether or not it was done, once the store is back."""
    async with members(f"sqlite:{path}", store_timeout=0.2) as [one]:
        with lock_held(path), pytest.raises(StoreUnavailable):
            await one.admit("a")
        await one.until(lambda: one.store.failure is None)
        admission = asyncio.create_task(one.admit("b"))
        await asyncio.sleep(0)
        with closing(sqlite3.connect(path)) as connection:
            # The loop stands still, so that it is done, and yet given up.
            while not connection.execute("SELECT 1 FROM client WHERE id = 'b'").fetchone():
                pass
        admission.cancel()
        with pytest.raises(asyncio.CancelledError):
            await admission
        assert await one.active() == 0


@on_loop
async def test_a_process_may_start_while_the_store_is_away(path: Path) -> None:
    """It is told the log when the store is back."""
    async with members(f"sqlite:{path}") as [one]:
        await one.publish()
        late = Member(f"sqlite:{path}", store_timeout=0.2)
        with lock_held(path):
            await late.open()
            assert late.store.failure is not None
            assert late.openings == []
        await late.until(lambda: late.openings)
        await late.until(lambda: late.store.failure is None)
        assert late.opening.records == one.records
        await late.store.close()


@on_loop
async def test_a_process_may_end_while_the_store_is_away(path: Path) -> None:
    """Within the time that it gives the store; it has left when the store is back."""
    async with members(f"sqlite:{path}") as [one]:
        going = await Member(f"sqlite:{path}", store_timeout=0.2).open()
        await going.admit("a")
        with lock_held(path):
            await asyncio.wait_for(going.store.close(), 5)

        async def is_free() -> bool:
            with suppress(ClientIdTaken):
                await one.admit("a")
                return True
            return False

        # Either may take the lock next.
        await one.eventually(is_free)


@on_loop
async def test_a_full_disk(path: Path, start_process: Callable[..., Process]) -> None:
    """A process that cannot write is away. It reads on, and is back by itself; nothing is lost, and nothing twice."""
    process = start_process(f"sqlite:{path}")
    async with members(f"sqlite:{path}") as [one]:
        ids = [process.ask("member.publish()")]
        process.ask("member.admit('a')")
        with disk_full_for(process):
            with pytest.raises(StoreUnavailable, match=r"away: (database or disk is full|disk I/O error)"):
                process.ask("member.publish()")
            process.ask("member.leave('a')")
            ids += [await one.publish() for _ in range(3)]
            process.ask("member.until(lambda: len(member.records) == 4)")
            assert process.ask("member.store.failure").startswith("The store is away: ")
        process.ask("member.until(lambda: member.store.failure is None)")
        ids += [process.ask("member.publish()")]
        await one.until(lambda: len(one.records) == 5)
        assert process.ask("member.ids") == one.ids == ids
        assert await one.active() == 0


@pytest.mark.usefixtures("_short_leases")
@on_loop
async def test_a_change_of_topics_while_the_lease_ends(path: Path) -> None:
    """It is done, whichever of the two takes the other for dead, and before its clients are entered again."""
    async with members(f"sqlite:{path}", 2, store_timeout=10) as both:
        for member in both:
            await member.admit(member.store.node_id, "t")
        with lock_held(path):
            stores = [member.store for member in both]
            changes = [asyncio.create_task(store.subscribe(registration(store.node_id))) for store in stores]
            await asyncio.sleep(1.5 * SHORT_LEASE)
        await asyncio.gather(*changes)
        await both[0].store.census()
        await both[1].store.census()
        draft = Draft(b"{}", audience([], ["t"]))
        assert (await both[0].store.append([draft])).receipts[0].recipients == 0
        assert await both[0].active() == 2


def delete(path: Path) -> None:
    for name in ("", "-wal", "-shm", "-lock"):
        os.unlink(f"{path}{name}")


def replace_by_a_copy(path: Path) -> None:
    """Put a backup back, as an operator might while processes run."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM INTO ?", (f"{path}-copy",))
    os.rename(f"{path}-copy", path)


@pytest.mark.parametrize("swap", [delete, replace_by_a_copy])
@on_loop
async def test_a_file_that_was_replaced_makes_the_store_away(path: Path, swap: Callable[[Path], None]) -> None:
    """Every process notices by itself, refuses with a reason that names the remedy, and writes nothing."""
    async with members(f"sqlite:{path}", 2) as [one, other]:
        await one.publish()
        await other.until(lambda: other.records)
        swap(path)
        with pytest.raises(StoreUnavailable, match="away: the file was replaced; restart"):
            await one.publish()
        await other.until(lambda: other.store.failure)
        with pytest.raises(StoreUnavailable, match="restart"):
            await other.admit("a")
        assert one.store.failure == other.store.failure == "The store is away: the file was replaced; restart"
        assert path.exists() == (swap is not delete)
    if path.exists():
        async with members(f"sqlite:{path}") as [late]:
            assert late.opening.records == one.records


def test_a_server_states_that_its_file_was_replaced(path: Path, start_server: StartServer) -> None:
    """The operator reads it in /health; /notify refuses, and the connected client stays."""
    server = start_server("--store", f"sqlite:{path}")
    client = server.join()
    replace_by_a_copy(path)
    eventually(lambda: server.get("/health").status_code == 503)
    assert server.get("/health").json()["message"] == "The store is away: the file was replaced; restart"
    refusal = server.request("POST", "/notify", json={"message": "hello"})
    assert (refusal.status_code, refusal.json()["error"]["message"]) == (
        503,
        "The store is away: the file was replaced; restart",
    )
    assert client.ask({"type": "ping"}) == PONG


@on_loop
async def test_a_file_that_is_put_back_is_used_again(path: Path) -> None:
    """It is the same file: nothing is missed, and nothing is delivered twice."""
    async with members(f"sqlite:{path}", 2) as [one, other]:
        await one.admit("a")
        await one.publish()
        path.rename(f"{path}-elsewhere")
        await one.until(lambda: one.store.failure)
        os.rename(f"{path}-elsewhere", path)
        await one.until(lambda: one.store.failure is None)
        await other.until(lambda: other.store.failure is None)
        await other.publish()
        await one.until(lambda: len(one.records) == 2)
        assert (one.ids, one.times_missed, await other.active()) == (other.ids, 0, 1)


@on_loop
async def test_an_unexpected_error_is_a_failure_that_passes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread goes on."""
    async with members(f"sqlite:{path}") as [one]:
        with monkeypatch.context() as patch:
            patch.setattr(store_sqlite_transaction, "msgspec", None)
            with pytest.raises(StoreUnavailable, match="internal error"):
                await one.publish()
        await one.until(lambda: one.store.failure is None)
        await one.publish()


def test_no_figure_is_negative_after_another_server_took_the_file_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped is removed, and the sums begin again without it. It may read that before it writes."""
    databases = Database(Settings(), str(path)), Database(Settings(), str(path))
    with databases[0].used_by("old", "") as old, databases[1].used_by("new", "") as new:
        old.transact([Operation(Transaction.report, (Report(7, 2),))])
        with monkeypatch.context() as patch:
            patch.setattr(store_sqlite_transaction, "LEASE_SECONDS", 0.0)
            new.transact([Operation(Transaction.renew)])
        old.look()
        [(_, census)] = old.transact([Operation(Transaction.census)]).answers
        assert census == (0, 0, 0, 0, 0, ["new"])
        old.transact([Operation(Transaction.report, (Report(8, 2),))])
        [(_, census)] = new.transact([Operation(Transaction.census)]).answers
        assert census == (0, 0, 0, 8, 2, ["old"])
