"""What one process has counted and timed since its start, for Prometheus.

Owns the counters, the histograms, and the words of their labels: each is one of a few, and none is chosen by a
stranger. Knows nobody: the parts of the Hub count here, and census.py gathers the samples of all processes.

prometheus_client would take a lock and about a microsecond for each observation, and its registry for several
processes is files. Here an observation is an addition in a list.
"""

from __future__ import annotations

import asyncio
import re
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from errors import NotifydError, ShuttingDown, StoreUnavailable, Unauthorized

# The upper bounds of the buckets, in seconds. A publish on the fast path takes less than the first.
BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
QUICK_SECONDS = BOUNDS[0]

# The kinds of closes of clients, by the beginnings of their reasons; the first that fits.
_CLOSES = {
    "Server shutting down": "shutdown",
    "Slow consumer: answers": "unread_answers",
    "Slow consumer": "slow_consumer",
    "Message rate": "message_rate",
    "Ping timeout": "silence",
    "Replaced": "replaced",
    "Token expired": "token_expired",
    "Token revoked": "token_revoked",
    "Notifications are missing": "missed",
}
AUTH_REASONS = ("Authentication required", "Invalid token", "Token expired", "Token revoked")
# An admin has chosen another reason.
PUT_OUT = "put_out"
# The client's own close, the loss of its connection, or an end over a broken frame: no code of the Hub's.
LEFT = ("none", "left")


class Sample(NamedTuple):
    """Labels as Prometheus writes them, with a number, or with the numbers of a histogram: its buckets, and the sum."""

    family: str
    labels: str
    values: list[float]


class Histogram:
    """Durations, counted by BOUNDS and above."""

    __slots__ = ("buckets", "sum", "uncounted")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0
        # On the way of a publish a duration costs one append here. They are counted together, within a second.
        self.uncounted: list[float] = []

    def observe(self, seconds: float, times: int = 1) -> None:
        self.buckets[bisect_left(BOUNDS, seconds)] += times
        self.sum += seconds * times

    def count(self) -> int:
        """Count all durations, and return how many there are."""
        uncounted, self.uncounted = self.uncounted, []
        slow = [seconds for seconds in uncounted if seconds > QUICK_SECONDS]
        self.buckets[0] += len(uncounted) - len(slow)
        for seconds in slow:
            self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.sum += sum(uncounted)
        return sum(self.buckets)

    def sample(self, family: str, labels: str = "") -> Sample:
        self.count()
        return Sample(family, labels, [*self.buckets, self.sum])


class Durations(dict[str, Histogram]):
    """The operations of a store, by kind."""

    def __init__(self) -> None:
        super().__init__()
        # The number of those that are not answered yet.
        self.under_way = Counter[str]()

    def time(self, kind: str, answer: asyncio.Future[Any]) -> None:
        """Time an operation from now until it is answered or given up."""
        self.under_way[kind] += 1
        answer.add_done_callback(partial(self._answered, kind, time.monotonic()))

    def _answered(self, kind: str, began: float, _: object) -> None:
        self.under_way[kind] -= 1
        if kind not in self:
            self[kind] = Histogram()
        self[kind].observe(time.monotonic() - began)


class Counts:
    """The counters and histograms of one process."""

    def __init__(self) -> None:
        # From the call of the Hub until the log has the notification: of each request that is accepted.
        self.publish = Histogram()
        self.repeated = 0
        self.failed = Counter[str]()
        # From the oldest publish that a pass hands over to the end of the pass, and the pass alone.
        self.delivery = Histogram()
        self.passes = Histogram()
        # How late the event loop came back to a task that slept.
        self.delay = Histogram()
        self.bytes_sent = 0
        self.resumes = [0, 0]
        self._closes = Counter[tuple[str, str]]()
        self._refusals = Counter[str]()
        self._auth_failures = Counter[str]()

    def tick(self, late: float) -> None:
        """Count the durations of the last second, and how late this is."""
        self.delay.observe(max(0.0, late))
        for histogram in (self.publish, self.delivery, self.passes):
            histogram.count()

    def fail(self, error: NotifydError) -> None:
        """Count a publish that is not accepted."""
        is_away = isinstance(error, StoreUnavailable | ShuttingDown)
        self.failed["unavailable" if is_away else "refused"] += 1

    def refuse(self, error: NotifydError) -> None:
        """Count a request or newcomer that is refused."""
        self._refusals[snake(type(error).__name__)] += 1
        if isinstance(error, Unauthorized):
            reason = error.message if error.message in AUTH_REASONS else "other"
            self._auth_failures[snake(reason)] += 1

    def close(self, code: int, reason: str, *, is_put_out: bool) -> None:
        """Count the close of a client."""
        kind = next((kind for words, kind in _CLOSES.items() if reason.startswith(words)), "")
        self._closes[str(code), kind or (PUT_OUT if is_put_out else "other")] += 1

    def leave(self) -> None:
        """Count a client that is gone without a close of the Hub's."""
        self._closes[LEFT] += 1

    def samples(self, durations: Durations) -> Iterator[Sample]:
        """Yield what is counted here, and the operations of the store."""
        yield self.publish.sample("publish_duration_seconds")
        yield self.delivery.sample("delivery_duration_seconds")
        yield self.passes.sample("pass_duration_seconds")
        for kind, histogram in durations.items():
            yield histogram.sample("store_operation_duration_seconds", f'operation="{kind}"')
        yield self.delay.sample("loop_delay_seconds")
        accepted = self.publish.count() - self.repeated
        for result, number in {"accepted": accepted, "repeated": self.repeated, **self.failed}.items():
            yield Sample("publishes_total", f'result="{result}"', [number])
        for (code, kind), number in self._closes.items():
            yield Sample("closes_total", f'code="{code}",kind="{kind}"', [number])
        for kind, number in self._refusals.items():
            yield Sample("refusals_total", f'kind="{kind}"', [number])
        for reason, number in self._auth_failures.items():
            yield Sample("auth_failures_total", f'reason="{reason}"', [number])
        yield Sample("sent_bytes_total", "", [self.bytes_sent])
        for complete, number in zip(("false", "true"), self.resumes, strict=True):
            yield Sample("resumes_total", f'complete="{complete}"', [number])


def snake(words: str) -> str:
    """Return the name of a class, or a text, as the value of a label."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|\W+", "_", words).lower()
