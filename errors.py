"""What can go wrong, as one small tree.

Each class knows how it is told: the HTTP status and category of the documented error body, and the close code
of a WebSocket. Errors are raised where they are known and mapped once, in routes.py. The message is for the
other side: it names the field and the limit, and never holds a secret or a traceback.
"""

from __future__ import annotations

from typing import ClassVar


class NotifydError(Exception):
    """The root: an unexpected failure of ours."""

    status: ClassVar[int] = 500
    category: ClassVar[str] = "system"
    close_code: ClassVar[int] = 1011

    def __init__(self, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.headers = headers or {}


class InvalidRequest(NotifydError):
    """The request or parameter is not what the reference allows."""

    status = 400
    category = "validation"
    close_code = 1008


class MethodNotAllowed(InvalidRequest):
    status = 405


class TooLarge(InvalidRequest):
    status = 413
    close_code = 1009


class UnsupportedMediaType(InvalidRequest):
    status = 415


class NotFound(NotifydError):
    status = 404
    category = "application"
    close_code = 1008


class Forbidden(NotifydError):
    status = 403
    category = "application"
    close_code = 1008


class Unauthorized(NotifydError):
    """Nobody knows who this is (RFC 6750, section 3)."""

    status = 401
    category = "application"
    close_code = 1008

    def __init__(self, message: str) -> None:
        error = (
            "" if message == "Authentication required" else f', error="invalid_token", error_description="{message}"'
        )
        super().__init__(message, {"WWW-Authenticate": f'Bearer realm="notifyd"{error}'})


class KeysUnavailable(NotifydError):
    """The keys with which tokens are checked cannot be fetched."""

    status = 503
    close_code = 1013


class KeyReused(InvalidRequest):
    """An Idempotency-Key that was used for another request."""

    status = 422


class DuplicateClient(NotifydError):
    """The client_id is taken by a client that is alive."""

    status = 409
    category = "application"
    close_code = 1008


class UpgradeRequired(NotifydError):
    status = 426
    category = "connection"


class ConnectionRefused(NotifydError):
    """A client is not admitted."""

    status = 503
    close_code = 1008


class TooManyConnections(ConnectionRefused):
    """An address has as many clients as one may have."""

    status = 429
    category = "application"


class RateExceeded(NotifydError):
    """An address sends requests faster than its bucket is refilled."""

    status = 429
    category = "application"
    close_code = 1008


class ShuttingDown(NotifydError):
    status = 503
    close_code = 1001

    def __init__(self) -> None:
        super().__init__("Server shutting down")


class StoreUnavailable(NotifydError):
    """The store is away; what was asked of it may still happen."""

    status = 503
    close_code = 1013
