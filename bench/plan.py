"""The plan of a run: the rows of the table, and the three sizes."""

from dataclasses import dataclass, replace

# Descriptors that are no clients: libraries, listeners, publishing connections.
SPARE_FILES = 200
# The store to compare the others with.
MEMORY = "memory"
# In place of a peer's name: whichever of them is best in that row.
BEST = "the best peer"


@dataclass(frozen=True)
class Level:
    """The level for notifyd: `limit`, or with the name of a peer or store, or BEST, `limit` times its figure or more
    than it."""

    limit: float
    times: str | None = None
    more_than: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    title: str
    unit: str
    decimals: int = 1
    more_is_better: bool = False
    # The server to compare with, where that is meaningful: the floor keeps nothing for an idle connection.
    base: str | None = "floor"
    levels: tuple[Level, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One cell: a figure and, where both took turns, its ratio to the base, which is steadier than a division."""

    row: Row
    value: float
    ratio: float | None = None
    # The text beside it in the table.
    remark: str = ""
    # Its owner, if not the peer: a store.
    column: str = ""


@dataclass(frozen=True)
class Scale:
    """The scale of a run. `many` is the number of clients for measures that must not depend on it."""

    clients: int
    few_clients: int
    pairs: int
    sleeping_pairs: int
    notifications_a_turn: int
    many_clients: int
    many_pairs: int
    many_notifications_a_turn: int
    burst: int
    burst_runs: int
    handshakes: int
    handshake_runs: int
    # Without seconds wrk is not used: its shortest run is a second.
    publish_seconds: int
    publishes: int
    hold_clients: int
    hold_rounds: int
    ageing_notifications: int
    target_pairs: int
    targets_a_turn: int
    batch_pairs: int
    singles_a_turn: int
    batched_a_turn: int
    acknowledged: int
    log_notifications: int
    log_readers: int
    log_seconds: float

    def within(self, files: int) -> "Scale":
        """The same with no more clients than a process may have open files."""
        room = files - SPARE_FILES
        return replace(
            self,
            many_clients=min(self.many_clients, room),
            handshakes=min(self.handshakes, room),
            hold_clients=min(self.hold_clients, room),
        )


FULL = Scale(
    clients=1000,
    few_clients=100,
    pairs=60,
    sleeping_pairs=20,
    notifications_a_turn=5,
    many_clients=10_000,
    many_pairs=30,
    many_notifications_a_turn=1,
    burst=1000,
    burst_runs=5,
    handshakes=3000,
    handshake_runs=3,
    publish_seconds=4,
    publishes=20_000,
    hold_clients=15_000,
    hold_rounds=5,
    ageing_notifications=5000,
    target_pairs=30,
    targets_a_turn=200,
    batch_pairs=8,
    singles_a_turn=300,
    batched_a_turn=4000,
    acknowledged=200,
    log_notifications=1_000_000,
    log_readers=1000,
    log_seconds=6,
)
QUICK = Scale(
    clients=1000,
    few_clients=100,
    pairs=6,
    sleeping_pairs=3,
    notifications_a_turn=4,
    many_clients=2000,
    many_pairs=4,
    many_notifications_a_turn=1,
    burst=100,
    burst_runs=1,
    handshakes=1000,
    handshake_runs=1,
    publish_seconds=1,
    publishes=5000,
    hold_clients=3000,
    hold_rounds=1,
    ageing_notifications=500,
    target_pairs=4,
    targets_a_turn=50,
    batch_pairs=2,
    singles_a_turn=100,
    batched_a_turn=2000,
    acknowledged=50,
    log_notifications=50_000,
    log_readers=100,
    log_seconds=2,
)
TINY = Scale(
    clients=10,
    few_clients=5,
    pairs=1,
    sleeping_pairs=1,
    notifications_a_turn=3,
    many_clients=20,
    many_pairs=1,
    many_notifications_a_turn=2,
    burst=100,
    burst_runs=1,
    handshakes=20,
    handshake_runs=1,
    publish_seconds=0,
    publishes=100,
    hold_clients=20,
    hold_rounds=1,
    ageing_notifications=100,
    target_pairs=1,
    targets_a_turn=25,
    batch_pairs=1,
    singles_a_turn=3,
    batched_a_turn=1000,
    acknowledged=5,
    log_notifications=10_000,
    log_readers=3,
    log_seconds=0.5,
)
