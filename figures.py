"""The bodies of /health, /metrics, /status and /metrics/prometheus.

Reads the figures of all processes and changes nothing, but for starting the Hub if nothing else has yet. Each body is
made from one census, so its figures fit together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from census import Share
from counts import BOUNDS
from hub import Hub
from schemas import (
    Health,
    HealthConnections,
    Metrics,
    MetricsConnections,
    MetricsServer,
    MetricsService,
    ServerInfo,
    Status,
    StatusConfiguration,
    StatusConnections,
    StatusServer,
    StatusService,
    StatusShutdown,
    timestamp,
)
from settings import number


async def health(hub: Hub) -> Health:
    await hub.start()
    census = await hub.census.take()
    health = Health(
        status="healthy",
        message="WebSocket Notification Server is running",
        timestamp=timestamp(),
        connections=HealthConnections(
            active=census.active,
            total=census.total,
            max_allowed=hub.settings.max_connections,
        ),
        server_info=ServerInfo(
            workers=hub.settings.workers, notification_interval=number(hub.settings.notification_interval)
        ),
    )
    if not hub.is_ready:
        health.status, health.message = "shutting_down", "WebSocket Notification Server is shutting down"
    elif hub.store.failure is not None:
        health.status, health.message = "unhealthy", hub.store.failure
    return health


async def metrics(hub: Hub) -> Metrics:
    await hub.start()
    census, _ = await hub.census.take_exact()
    return Metrics(
        connections=MetricsConnections(
            active_connections=census.active,
            total_connections=census.total,
            messages_sent=census.messages_sent,
            uptime_seconds=hub.census.uptime(),
        ),
        notification_service=MetricsService(
            is_running=hub.is_ready,
            notification_interval=number(hub.settings.notification_interval),
            start_time=timestamp(hub.census.started_at),
        ),
        server=MetricsServer(
            workers=hub.settings.workers,
            max_connections=hub.settings.max_connections,
            debug_mode=hub.settings.debug,
        ),
        timestamp=timestamp(),
    )


async def status(hub: Hub, limit: int) -> Status:
    """Return everything, with the details of the first `limit` clients."""
    await hub.start()
    census, share = await hub.census.take_exact(limit)
    settings = hub.settings
    return Status(
        server=StatusServer(
            status="running" if hub.is_ready else "shutting_down",
            uptime_seconds=hub.census.uptime(),
            start_time=timestamp(hub.census.started_at),
            current_time=timestamp(),
        ),
        connections=StatusConnections(
            active=census.active,
            total=census.total,
            max_allowed=settings.max_connections,
            details=share.details,
        ),
        notification_service=StatusService(
            is_running=hub.is_ready,
            notifications_sent=census.notifications_sent,
            notification_interval=number(settings.notification_interval),
        ),
        shutdown=StatusShutdown(
            shutdown_requested=not hub.is_ready, shutdown_timeout=number(settings.shutdown_timeout)
        ),
        configuration=StatusConfiguration(
            host=", ".join(settings.host),
            port=settings.port,
            workers=settings.workers,
            debug=settings.debug,
            log_level=settings.log_level,
        ),
    )


# The figures of each process, with `process` in their names: how much is counted there ends with it, so a sum over all
# processes would go back.
FAMILIES = {
    "notifyd_process_publish_duration_seconds": ("histogram", "Time from a publish to its place in the log"),
    "notifyd_process_delivery_duration_seconds": (
        "histogram",
        "Time from the oldest publish of a pass over the clients to its last write",
    ),
    "notifyd_process_pass_duration_seconds": ("histogram", "Time of a pass over the clients"),
    "notifyd_process_store_operation_duration_seconds": (
        "histogram",
        "Time until the store answers, by operation",
    ),
    "notifyd_process_loop_delay_seconds": ("histogram", "Time by which the event loop was late, once a second"),
    "notifyd_process_publishes_total": ("counter", "Publishes, by result"),
    "notifyd_process_closes_total": ("counter", "Connections of clients that ended, by close code and kind"),
    "notifyd_process_refusals_total": ("counter", "Requests and newcomers refused, by kind"),
    "notifyd_process_auth_failures_total": (
        "counter",
        "Refusals for a wrong or missing key or token, by reason",
    ),
    "notifyd_process_sent_bytes_total": ("counter", "Bytes of notifications handed to clients"),
    "notifyd_process_resumes_total": ("counter", "Resumes, by whether nothing is missing"),
    "notifyd_process_users": ("gauge", "Users with a client of the process"),
    "notifyd_process_topics": ("gauge", "Topics that a client of the process follows"),
    "notifyd_process_store_up": ("gauge", "Whether the process reaches the store"),
}


async def prometheus(hub: Hub) -> str:
    """Return the figures in Prometheus' text format: the documented four first, to the letter."""
    await hub.start()
    census, share = await hub.census.take_exact()
    figures: list[tuple[str, str, str, float]] = [
        ("websocket_active_connections", "gauge", "Number of active WebSocket connections", census.active),
        ("websocket_total_connections", "counter", "Total number of connections since server start", census.total),
        ("websocket_notifications_sent", "counter", "Total number of notifications sent", census.messages_sent),
        ("websocket_server_uptime_seconds", "gauge", "Server uptime in seconds", hub.census.uptime()),
        (
            "notifyd_notifications_published_total",
            "counter",
            "Notifications published, whoever receives them",
            census.notifications_sent,
        ),
        ("notifyd_slow_consumers_total", "counter", "Clients closed for being too far behind", census.slow_consumers),
        ("notifyd_clients_behind", "gauge", "Clients that have a backlog", share.clients_behind),
        ("notifyd_largest_backlog_notifications", "gauge", "Largest backlog of a client", share.largest_backlog),
        ("notifyd_log_notifications", "gauge", "Notifications in memory, also of tests", share.log_notifications),
        ("notifyd_log_bytes", "gauge", "Bytes of notifications in memory", share.log_bytes),
        ("notifyd_workers_alive", "gauge", "Processes that serve, on all machines", 1 + len(census.others)),
    ]
    totals = [f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, text, value in figures]
    return "\n".join([*totals, *_of_processes(share)])


def _of_processes(share: Share) -> Iterator[str]:
    """Yield the text of each family with the samples of all processes."""
    for name, (kind, text) in FAMILIES.items():
        family = name.removeprefix("notifyd_process_")
        lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for process, samples in sorted(share.counted.items()):
            for _, labels, values in (each for each in samples if each.family == family):
                labelled = f'process="{process}"' + (f",{labels}" if labels else "")
                if kind == "histogram":
                    lines += _histogram(name, labelled, values)
                else:
                    lines.append(f"{name}{{{labelled}}} {int(values[0])}")
        yield "\n".join(lines) + "\n"


def _histogram(name: str, labels: str, values: Sequence[float]) -> Iterator[str]:
    *buckets, total = values
    counts = list(accumulate(map(int, buckets)))
    for bound, count in zip((*BOUNDS, "+Inf"), counts, strict=True):
        yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
    yield f"{name}_sum{{{labels}}} {total:.9g}"
    yield f"{name}_count{{{labels}}} {counts[-1]}"
