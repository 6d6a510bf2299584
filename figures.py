"""What the server says about itself: the bodies of /health, /metrics, /status and /metrics/prometheus.

Reads the Hub's figures and changes nothing. Each answer is made without an await, so its figures fit together.
"""

from __future__ import annotations

from itertools import islice

from hub import Client, Hub
from schemas import (
    ClientDetails,
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


def health(hub: Hub) -> Health:
    ready = hub.is_ready()
    return Health(
        status="healthy" if ready else "shutting_down",
        message=f"WebSocket Notification Server is {'running' if ready else 'shutting down'}",
        timestamp=timestamp(),
        connections=HealthConnections(
            active=hub.active_connections(),
            total=hub.total_connections,
            max_allowed=hub.settings.max_connections,
        ),
        server_info=ServerInfo(
            workers=hub.settings.workers, notification_interval=number(hub.settings.notification_interval)
        ),
    )


def metrics(hub: Hub) -> Metrics:
    return Metrics(
        connections=MetricsConnections(
            active_connections=hub.active_connections(),
            total_connections=hub.total_connections,
            messages_sent=hub.messages_sent,
            uptime_seconds=hub.uptime(),
        ),
        notification_service=MetricsService(
            is_running=hub.is_ready(),
            notification_interval=number(hub.settings.notification_interval),
            start_time=timestamp(hub.started_at),
        ),
        server=MetricsServer(
            workers=hub.settings.workers,
            max_connections=hub.settings.max_connections,
            debug_mode=hub.settings.debug,
        ),
        timestamp=timestamp(),
    )


def status(hub: Hub, limit: int) -> Status:
    """Return everything, with the details of the first `limit` clients."""
    settings = hub.settings
    return Status(
        server=StatusServer(
            status="running" if hub.is_ready() else "shutting_down",
            uptime_seconds=hub.uptime(),
            start_time=timestamp(hub.started_at),
            current_time=timestamp(),
        ),
        connections=StatusConnections(
            active=hub.active_connections(),
            total=hub.total_connections,
            max_allowed=settings.max_connections,
            details=[_details(hub, client) for client in islice(hub.clients(), limit)],
        ),
        notification_service=StatusService(
            is_running=hub.is_ready(),
            notifications_sent=hub.notifications_sent,
            notification_interval=number(settings.notification_interval),
        ),
        shutdown=StatusShutdown(
            shutdown_requested=not hub.is_ready(), shutdown_timeout=number(settings.shutdown_timeout)
        ),
        configuration=StatusConfiguration(
            host=settings.host,
            port=settings.port,
            workers=settings.workers,
            debug=settings.debug,
            log_level=settings.log_level,
        ),
    )


def _details(hub: Hub, client: Client) -> ClientDetails:
    return ClientDetails(
        client_id=client.client_id,
        connected_at=timestamp(hub.wall_time(client.connected_at)),
        last_ping=timestamp(hub.wall_time(client.heard_at)),
        user_agent=client.user_agent,
    )


def prometheus(hub: Hub) -> str:
    """Return the figures in Prometheus' text format: the documented four first, to the letter."""
    notifications, size = hub.log_size()
    figures: list[tuple[str, str, str, float]] = [
        (
            "websocket_active_connections",
            "gauge",
            "Number of active WebSocket connections",
            hub.active_connections(),
        ),
        (
            "websocket_total_connections",
            "counter",
            "Total number of connections since server start",
            hub.total_connections,
        ),
        ("websocket_notifications_sent", "counter", "Total number of notifications sent", hub.messages_sent),
        ("websocket_server_uptime_seconds", "gauge", "Server uptime in seconds", hub.uptime()),
        (
            "notifyd_notifications_published_total",
            "counter",
            "Notifications published, whoever receives them",
            hub.notifications_sent,
        ),
        ("notifyd_slow_consumers_total", "counter", "Clients closed for being too far behind", hub.slow_consumers),
        ("notifyd_clients_behind", "gauge", "Clients that have a backlog", hub.clients_behind()),
        ("notifyd_log_notifications", "gauge", "Notifications in the log", notifications),
        ("notifyd_log_bytes", "gauge", "Bytes of notifications in the log", size),
    ]
    return "\n".join(
        f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, text, value in figures
    )
