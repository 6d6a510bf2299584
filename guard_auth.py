"""Authentication: from the credentials of a request or handshake to an Identity.

Owns the API keys, the places where credentials are looked for, and the adapter for the authentication backend of a
host. Tokens are read by guard_tokens.py, imported only when the settings ask for it. Authorisation is the Identity's.

1. Secrets are compared in constant time, and appear in no error and no log. A log has the name of a key.
2. Wrong credentials are refused, also on a path that needs none.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import stat
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from msgspec import structs
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, BaseUser
from starlette.requests import HTTPConnection
from starlette.types import Scope

from errors import Unauthorized
from guard_identity import ALL, Identity, Right, shown_address
from guard_peers import RefusalLog, subscriber
from revocations import Revocations
from schemas import SUBPROTOCOL, USER, stripped
from settings import Settings, SettingsError, extra, is_api_key

if TYPE_CHECKING:
    from guard_tokens import Tokens

KEY_HOLDER = Identity(user=None, topics=ALL, publishes=True, admin=True, is_lasting=True)
# More addresses than of anything that one peer can invent: each of these takes a connection.
MAX_WARNED = 1000
# With keys alone everybody may still listen.
LISTENER = Identity(known=False, user=None, topics=ALL)

# Returns None where there are no credentials. Raises Unauthorized for wrong ones, or KeysUnavailable.
Find = Callable[[HTTPConnection], Awaitable[Identity | None]]


class Authenticator:
    """Finds the Identity of a request, a handshake or a renewed token, and refuses the ones that have expired."""

    def __init__(
        self,
        find: Find,
        settings: Settings,
        parameters: Iterable[str] = (),
        revocations: Revocations | None = None,
        *,
        lets_strangers_listen: bool = False,
    ) -> None:
        """`parameters`: those that `find` reads from the query beside `token`; `revocations`: of its tokens."""
        self._find = find
        self.revocations = revocations
        self.parameters = frozenset(parameters)
        self.lets_strangers_listen = lets_strangers_listen
        self._ipv6_prefix = settings.ipv6_prefix
        # By reason, so that none hides another. deploy/fail2ban.conf reads this.
        self._logs = defaultdict[str, RefusalLog](lambda: RefusalLog("Credentials from %s are refused: %s", MAX_WARNED))

    async def identify(self, scope: Scope, right: Right | None = None) -> Identity:
        """Return the Identity, which has the right.

        Raises Unauthorized, Forbidden, KeysUnavailable, or any error of a host's backend.
        """
        try:
            identity = await self._find(HTTPConnection(scope))
            # To the second, even where the backend allows for clocks: a client must not be admitted and closed at once.
            if identity is not None and identity.expires_at is not None and identity.expires_at <= time.time():
                raise Unauthorized("Token expired")
            if identity is None:
                raise Unauthorized("Authentication required")
            if self.revocations is not None:
                await self.revocations.check_newest(identity)
            if right is not None:
                right(identity)
        except Unauthorized as refusal:
            self._warn(scope, refusal.message)
            raise
        return identity

    def _warn(self, scope: Scope, reason: str) -> None:
        if reason == "Authentication required":
            if not any(name == b"authorization" for name, _ in scope["headers"]):
                # A request without credentials is no attack.
                return
            reason = "Unknown name or scheme"
        address = shown_address((scope.get("client") or ("",))[0])
        self._logs[reason].warn(subscriber(address, self._ipv6_prefix), address, reason)

    async def renew(self, token: str, address: str) -> Identity:
        """Return the Identity of a token from a client's message, as if it had come in the header of a handshake."""
        headers = [(b"authorization", b"Bearer " + token.encode(errors="replace"))]
        scope = {"type": "websocket", "path": "/ws", "query_string": b"", "headers": headers, "client": (address, 0)}
        return await self.identify(scope)


class KeysAndTokens:
    """API keys, and tokens where the settings ask for them."""

    def __init__(self, keys: Iterable[tuple[str, str]], tokens: Tokens | None = None) -> None:
        """`keys`: name and secret."""
        self._keys = {name: (_digest(secret), _digest(f"{name}:{secret}")) for name, secret in keys}
        self._holders = {name: structs.replace(KEY_HOLDER, name=name) for name in self._keys}
        self._tokens = tokens
        self.reads_tokens = tokens is not None

    async def find(self, conn: HTTPConnection) -> Identity | None:
        if (token := _credentials(conn, self._keys)) is None:
            return None if self.reads_tokens else LISTENER
        if (name := self.holder(token)) is not None:
            return self._holders[name]
        if self._tokens is None:
            raise Unauthorized("Invalid token")
        return await self._tokens.identity(token)

    def holder(self, shown: str) -> str | None:
        """Return the name of the key with this SECRET or NAME:SECRET."""
        digest, holder = _digest(shown), None
        # Compare with all of them: the time until the answer reveals no match.
        for name, forms in self._keys.items():
            for form in forms:
                if hmac.compare_digest(form, digest):
                    holder = name
        return holder


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).digest()


def _credentials(conn: HTTPConnection, names: Container[str]) -> str | None:
    """Return the key or token of a request; of several the first in this order. `names`: those of the keys."""
    if (key := conn.headers.get("x-api-key")) is not None:
        return key
    scheme, _, token = conn.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    # A name that no key has is for a proxy in front, which has passwords of its own.
    if scheme.lower() == "basic" and (pair := _pair(token)).partition(":")[0] in names:
        return pair
    offered: list[str] = conn.scope.get("subprotocols") or []
    if SUBPROTOCOL in offered[:-1]:
        # A subprotocol has no slash, for example (RFC 9110, section 5.6.2), so a page encodes the characters of a key.
        return unquote(offered[offered.index(SUBPROTOCOL) + 1])
    return conn.query_params.get("token") or None


def _pair(text: str) -> str:
    """Return the NAME:SECRET of the scheme Basic (RFC 7617), empty for other texts."""
    try:
        return base64.b64decode(text.strip(), validate=True).decode()
    except ValueError:
        return ""


# --- a host's own backend


def adapted(backend: AuthenticationBackend) -> Find:
    """Return the `find` of a Starlette backend. docs/embedding.md explains the scopes."""

    async def find(conn: HTTPConnection) -> Identity | None:
        try:
            found = await backend.authenticate(conn)
        except AuthenticationError:
            raise Unauthorized("Invalid token") from None
        return None if found is None else _identity(*found)

    return find


def _identity(credentials: AuthCredentials, user: BaseUser) -> Identity | None:
    scopes = credentials.scopes
    if not user.is_authenticated and not scopes:
        return None

    def named(right: str) -> tuple[str, ...]:
        return tuple(stripped([scope[len(right) :] for scope in scopes if scope.startswith(right)]))

    # A stranger with rights belongs to no user, and so cannot name one.
    name = str(user.identity) if user.is_authenticated else ""
    if not USER.match(name):
        raise Unauthorized("Invalid token")
    return Identity(
        known=user.is_authenticated,
        name=name,
        user=name,
        topics=ALL if "subscribe" in scopes else named("subscribe:"),
        publishes="publish" in scopes,
        publish_topics=named("publish:"),
        admin="admin" in scopes,
        expires_at=getattr(credentials, "expires_at", None),
    )


# --- from the settings


def authenticator_of(settings: Settings, backend: AuthenticationBackend | None = None) -> Authenticator | None:
    """Return the authenticator for a host's backend, or else for the keys and tokens of the settings.

    None where neither is given: the server is open. Raises SettingsError.
    """
    if backend is not None:
        return Authenticator(adapted(backend), settings, getattr(backend, "query_parameters", ()))
    found = keys_and_tokens_of(settings)
    if found is None:
        return None
    revocations = Revocations(settings.revocation_ttl) if found.reads_tokens else None
    return Authenticator(found.find, settings, revocations=revocations, lets_strangers_listen=not found.reads_tokens)


def keys_and_tokens_of(settings: Settings) -> KeysAndTokens | None:
    """Return the keys and tokens that the settings name, None for neither. Raises SettingsError."""
    keys = dict[str, str]()
    for source, text in keys_of(settings):
        name, _, secret = text.partition(":")
        if name in keys:
            raise SettingsError(f"{source}: there are two keys called {name}")
        keys[name] = secret
    if any((settings.jwt_secret, settings.jwt_public_key, settings.jwks_url)):
        with extra("jwt", "tokens"):
            from guard_tokens import tokens_of  # noqa: PLC0415 - needs PyJWT and cryptography

        return KeysAndTokens(keys.items(), tokens_of(settings))
    if settings.jwt_audience or settings.jwt_issuer or settings.jwt_algorithms or settings.jwt_user_claim != "sub":
        raise SettingsError("expected one of --jwt-secret, --jwt-public-key and --jwks-url as well")
    return KeysAndTokens(keys.items()) if keys else None


def keys_of(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield each key with the flag, or the line of the file, that has it. Raises SettingsError."""
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
    """Yield warnings for the log; `is_open`: there is no authentication on these addresses."""
    if settings.api_key_file and stat.S_IMODE(Path(settings.api_key_file).stat().st_mode) & 0o077:
        yield f"{settings.api_key_file} can be read by other users; chmod 600 keeps the keys from them"
    reachable = [one for one in addresses if not ipaddress.ip_address(one.partition("%")[0]).is_loopback]
    if is_open and reachable:
        where = f"{reachable[0]} is not this machine alone"
        yield f"{where}, and there is no authentication: see --api-key-file and --jwks-url"
