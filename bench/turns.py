"""Turns: two servers to compare work a little at a time, in the order ABBA.

So the machine's own changes (clock, neighbours, caches) affect both, and the median of the turns' ratios is steadier
than the ratio of two figures taken minutes apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from load import Load


@dataclass
class Side:
    """One that takes turns: `publish` sends `notifications` to the clients of `load`, and returns the seconds of each
    round."""

    load: Load
    publish: Callable[[], list[float]]
    notifications: int
    # CPU seconds for each notification, by turn.
    costs: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        server = self.load.server
        before = server.cpu_seconds()
        self.latencies += self.publish()
        self.costs.append((server.cpu_seconds() - before) / self.notifications)

    def cost(self) -> float:
        return median(self.costs)


def take_turns(pairs: int, *sides: Side) -> None:
    """Give each side a turn that does not count, and then so many that do."""
    for side in sides:
        side.publish()
    for pair in range(pairs):
        for side in sides if pair % 2 else reversed(sides):
            side.take_turn()


def ratio(one: Side, other: Side) -> float:
    """Return the ratio of the costs of a notification on both sides: the median of the turns."""
    return median(a / b for a, b in zip(one.costs, other.costs, strict=True))
