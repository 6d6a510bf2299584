"""The errors, as one small tree.

Each class knows the HTTP status and category of the documented error body, and the close code of a WebSocket. An error
is raised where it is found, and mapped to an answer once, in answers.py. The message is for the other side: it names
the field and the limit, and never holds a secret or a traceback.
"""

from __future__ import annotations

from typing import ClassVar, Literal

# In the documented body of an HTTP error.
Category = Literal["validation", "application", "system", "connection"]


class NotifydError(Exception):
    """The root of the tree; raised as itself, an unexpected failure of the server."""

    status: ClassVar[int] = 500
    category: ClassVar[Category] = "system"
    close_code: ClassVar[int] = 1011

    def __init__(self, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.headers = headers or {}


class InvalidRequest(NotifydError):
    """A request, message or parameter does not have the documented form."""

    status = 400
    category = "validation"
    close_code = 1008


class InvalidPublish(InvalidRequest):
    """A `publish` on a WebSocket does not have the documented form; its answer has the `ref`."""

    def __init__(self, message: str, ref: str | None) -> None:
        super().__init__(message)
        self.ref = ref


class MethodNotAllowed(InvalidRequest):
    """The path has no such method."""

    status = 405


class TooLarge(InvalidRequest):
    """A body, message or notification is over its size limit."""

    status = 413
    close_code = 1009


class UnsupportedMediaType(InvalidRequest):
    """The body has a content type that is not read."""

    status = 415


class NotFound(NotifydError):
    """The path has no route."""

    status = 404
    category = "application"
    close_code = 1008


class Forbidden(NotifydError):
    """The key or token does not have the right."""

    status = 403
    category = "application"
    close_code = 1008


class Unauthorized(NotifydError):
    """No credentials, or invalid ones (RFC 6750, section 3)."""

    status = 401
    category = "application"
    close_code = 1008

    def __init__(self, message: str) -> None:
        error = (
            "" if message == "Authentication required" else f', error="invalid_token", error_description="{message}"'
        )
        super().__init__(message, {"WWW-Authenticate": f'Bearer realm="notifyd"{error}'})


class KeysUnavailable(NotifydError):
    """The keys that verify tokens cannot be fetched."""

    status = 503
    close_code = 1013


class KeyReused(InvalidRequest):
    """The Idempotency-Key came with another request before."""

    status = 422


class DuplicateClient(NotifydError):
    """A live client has the client_id."""

    status = 409
    category = "application"
    close_code = 1008


class UpgradeRequired(NotifydError):
    """A plain request for a path that only takes WebSockets."""

    status = 426
    category = "connection"


class ConnectionRefused(NotifydError):
    """A newcomer is not admitted."""

    status = 503
    close_code = 1008


class TooManyConnections(ConnectionRefused):
    """The address has max_connections_per_ip clients."""

    status = 429
    category = "application"


class TooManyClients(ConnectionRefused):
    """The user has max_connections_per_user clients."""

    status = 429
    category = "application"


class RateExceeded(NotifydError):
    """The address sends requests faster than its bucket is refilled."""

    status = 429
    category = "application"
    close_code = 1008


class ShuttingDown(NotifydError):
    """The Hub drains or has stopped: it takes no clients and no notifications."""

    status = 503
    close_code = 1001

    def __init__(self) -> None:
        super().__init__("Server shutting down")


class StoreUnavailable(NotifydError):
    """The store is away; the operation may still take effect."""

    status = 503
    close_code = 1013
