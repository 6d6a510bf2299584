"""Who is there: from the credentials of a request or handshake to an Identity.

Owns the API keys, and where credentials are looked for. The backend is Starlette's interface, so that an app which
has notifyd inside can hand in its own; `Door` is what the routes ask, whichever it is. Tokens are tokens.py's, which
is imported where they are used.

1. A secret is compared in constant time, and shown by no error and no log.
2. Whoever shows credentials that are wrong is refused, also where none are needed.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    AuthenticationError,
    BaseUser,
    SimpleUser,
    UnauthenticatedUser,
)
from starlette.requests import HTTPConnection
from starlette.types import Scope

from errors import Unauthorized
from guard_identity import ALL, Identity
from settings import Settings, SettingsError, is_api_key

if TYPE_CHECKING:
    from guard_tokens import Tokens

# The subprotocol before the token, for browsers, which can set no header on a WebSocket.
SUBPROTOCOL = "bearer"
KEY_HOLDER = Identity(client_id=None, topics=ALL, publishes=True, admin=True)
# With keys alone everybody may still listen.
LISTENER = Identity(known=False, client_id=None, topics=ALL)


class Credentials(AuthCredentials):
    """The credentials that our own backend finds."""

    def __init__(self, identity: Identity) -> None:
        super().__init__()
        self.identity = identity


class KeysAndTokens(AuthenticationBackend):
    """API keys, and tokens where there is something that reads them."""

    def __init__(self, keys: Iterable[tuple[str, str]], tokens: Tokens | None = None) -> None:
        """`keys`: name and secret."""
        self._keys = [(name, _digest(secret)) for name, secret in keys]
        self._tokens = tokens

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        """Raises Unauthorized or KeysUnavailable."""
        if (token := _shown(conn)) is None:
            return None if self._tokens else (Credentials(LISTENER), UnauthenticatedUser())
        if (name := self._holder(token)) is not None:
            return Credentials(KEY_HOLDER), SimpleUser(name)
        if self._tokens is None:
            raise Unauthorized("Invalid token")
        identity = await self._tokens.identity(token)
        return Credentials(identity), SimpleUser(identity.client_id or "")

    def _holder(self, token: str) -> str | None:
        shown, holder = _digest(token), None
        # All of them, whichever it is: how long it takes tells nothing.
        for name, digest in self._keys:
            if hmac.compare_digest(digest, shown):
                holder = name
        return holder


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()


def _shown(conn: HTTPConnection) -> str | None:
    """Return the key or token that is shown, of several the first in this order."""
    if (key := conn.headers.get("x-api-key")) is not None:
        return key
    scheme, _, token = conn.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    offered: list[str] = conn.scope.get("subprotocols") or []
    if SUBPROTOCOL in offered[:-1]:
        return offered[offered.index(SUBPROTOCOL) + 1]
    return conn.query_params.get("token") or None


class Door:
    """A backend, as the routes ask it."""

    def __init__(self, backend: AuthenticationBackend, now: Callable[[], float] = time.time) -> None:
        self._backend = backend
        self._now = now

    async def identify(self, scope: Scope) -> Identity:
        """Return who it is. Raises Unauthorized, or what the backend raises where it cannot tell now."""
        try:
            found = await self._backend.authenticate(HTTPConnection(scope))
        except AuthenticationError:
            raise Unauthorized("Invalid token") from None
        identity = None if found is None else _identity(*found)
        if identity is None:
            raise Unauthorized("Authentication required")
        # To the second, whatever the backend thinks of clocks: whoever is let in must not be closed at once.
        if identity.expires_at is not None and identity.expires_at <= self._now():
            raise Unauthorized("Token expired")
        return identity

    async def renew(self, token: str) -> Identity:
        """Return whom a token stands for that came in a message: to a backend as in a handshake's header."""
        headers = [(b"authorization", b"Bearer " + token.encode(errors="replace"))]
        return await self.identify({"type": "websocket", "path": "/ws", "query_string": b"", "headers": headers})


def _identity(credentials: AuthCredentials, user: BaseUser) -> Identity | None:
    """Return what any backend has found as an Identity: the scopes are explained in docs/embedding.md."""
    if isinstance(credentials, Credentials):
        return credentials.identity
    scopes = credentials.scopes
    if not user.is_authenticated and not scopes:
        return None

    def named(right: str) -> tuple[str, ...]:
        return tuple(scope[len(right) :] for scope in scopes if scope.startswith(right))

    subscribes = "subscribe" in scopes
    anybody = None if subscribes else ""
    return Identity(
        known=user.is_authenticated,
        client_id=str(user.identity) if user.is_authenticated else anybody,
        topics=ALL if subscribes else named("subscribe:"),
        publishes="publish" in scopes,
        publish_topics=named("publish:"),
        admin="admin" in scopes,
        expires_at=getattr(credentials, "expires_at", None),
    )


# --- from the settings


def backend_of(settings: Settings) -> AuthenticationBackend | None:
    """Return the backend that the settings ask for, None for none. Raises SettingsError."""
    keys = dict[str, str]()
    for source, text in _keys_of(settings):
        name, _, secret = text.partition(":")
        if name in keys:
            raise SettingsError(f"{source}: there are two keys called {name}")
        keys[name] = secret
    if any((settings.jwt_secret, settings.jwt_public_key, settings.jwks_url)):
        from guard_tokens import tokens_of  # noqa: PLC0415 - needs PyJWT and cryptography

        return KeysAndTokens(keys.items(), tokens_of(settings))
    if settings.jwt_audience or settings.jwt_issuer or settings.jwt_algorithms:
        raise SettingsError("expected one of --jwt-secret, --jwt-public-key and --jwks-url as well")
    return KeysAndTokens(keys.items()) if keys else None


def _keys_of(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield each key with where it stands."""
    for key in settings.api_key:
        yield "--api-key", key
    path = settings.api_key_file
    if not path:
        return
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"--api-key-file: cannot read {path}: {reason}") from None
    keys = {number: text for number, line in enumerate(lines, 1) if (text := line.strip()) and text[0] != "#"}
    if not keys:
        raise SettingsError(f"--api-key-file: there is no key in {path}")
    for number, text in keys.items():
        source = f"--api-key-file: {path}, line {number}"
        if not is_api_key(text):
            raise SettingsError(f"{source}: expected NAME:SECRET")
        yield source, text


def warnings_of(settings: Settings, addresses: Iterable[str], *, is_open: bool) -> Iterator[str]:
    """Yield what an operator should know who lets the server listen on these addresses; `is_open`: to everybody."""
    if settings.api_key_file and stat.S_IMODE(Path(settings.api_key_file).stat().st_mode) & 0o077:
        yield f"{settings.api_key_file} can be read by other users; chmod 600 keeps the keys from them"
    reachable = [one for one in addresses if not ipaddress.ip_address(one.partition("%")[0]).is_loopback]
    if is_open and reachable:
        where = f"{reachable[0]} is not this machine alone"
        yield f"{where}, and there is no authentication: see --api-key-file and --jwks-url"
