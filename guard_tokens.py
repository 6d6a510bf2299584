"""JSON Web Tokens (RFC 7519): from a token to an Identity, and the keys that prove a token.

Owns the checks of a token, its claims, and the keys of --jwks-url. Knows no request and no client.

1. A token names its algorithm, but only the kind of key decides the algorithms that are allowed (RFC 8725, 3.1).
2. Every bad token is refused with the same words. Neither these nor a log show any part of the token.
3. The event loop never blocks on a fetch: one thread at a time fetches, for all that wait.
4. A key may be newer than the last fetch, also under a known id: a token that no key proves is refused only after a
   fetch that began after the token came. MAX_WAITING tokens wait for it, and only its new keys are tried then.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import time
import urllib.request
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from msgspec import Meta, Struct

from errors import KeysUnavailable, Unauthorized
from guard_identity import Identity
from schemas import MAX_TOPICS, USER, Topic, stripped
from settings import VERSION, Settings, SettingsError

logger = logging.getLogger("notifyd.auth")

MAX_TOKEN_BYTES = 16_384
# The issuer's clock may be ahead of ours by this much (`nbf`, `iat`). Where ours is ahead, tokens end a little early.
CLOCK_SKEW_SECONDS = 10
# Keys from --jwks-url are fetched again after FRESH_SECONDS, or at once for an unknown key, with a pause between two
# fetches. While no fetch succeeds, the last keys stay in use for KEPT_SECONDS.
FRESH_SECONDS, KEPT_SECONDS, PAUSE_SECONDS = 300.0, 3600.0, 5.0
FETCH_SECONDS = 5.0
MAX_KEYS_BYTES = 1_048_576
# So many keys are tried for a token at most: the largest sets have about ten, and each costs up to a millisecond.
MAX_TRIED = 16
# Each token that waits for a fetch holds a connection, and may be made up. A fleet that comes back after a rotation
# seldom has more in one pause; the rest is told to come again.
MAX_WAITING = 1000
# Firewalls of identity providers refuse a client without a name of its own.
FETCH_HEADERS = [("User-Agent", f"notifyd/{VERSION}"), ("Accept", "application/json")]
# Tokens that have been proven and are remembered: to prove one again costs 50 us or more. The end and the revocation
# of a token are checked each time.
MAX_SEEN = 1000
# The end of the year 9999: a later time has no timestamp.
_LAST_SECOND = 253_402_300_799
# PyJWT raises these for a bad token, msgspec for claims of a wrong type.
_BROKEN = (jwt.PyJWTError, msgspec.ValidationError, ValueError, TypeError, OverflowError, RecursionError)
# PyJWT and cryptography raise these for a key of an unknown kind, which must not spoil the other keys of its set.
_UNREADABLE = (
    *(jwt.PyJWTError, UnsupportedAlgorithm, NotImplementedError),
    *(ValueError, TypeError, AttributeError, LookupError),
)
# A fetch of keys, and the reading of what it brings, raises these.
_UNFETCHED = (OSError, HTTPException, ValueError, TimeoutError, RecursionError)
# PyJWT raises these where a token is not signed with the key at hand.
_UNPROVEN = (jwt.InvalidSignatureError, jwt.InvalidKeyError, jwt.InvalidAlgorithmError)
# The `key_ops` of a key for signatures (RFC 7517, section 4.3); some issuers name that of the private half.
_SIGNING = frozenset(("verify", "sign"))
_HMAC = ("HS256", "HS384", "HS512")
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512", "secp256k1": "ES256K"}


class Key(Struct, frozen=True):
    """A key with the algorithms allowed for its signatures, and its id where it has one."""

    key: Any
    algorithms: tuple[str, ...]
    kid: str | None = None


# From a token's key id and algorithm to the keys that may have signed it, likely ones first. Raises KeysUnavailable.
Find = Callable[[str | None, str], AsyncGenerator[Key]]


_User = Annotated[str, Meta(pattern=USER.pattern)]


class Claims(Struct):
    """The claims of a token that this server reads."""

    topics: list[Annotated[str, Meta(min_length=1)]] = []
    subscribe: Annotated[list[Topic], Meta(max_length=MAX_TOPICS)] = []
    publish: bool | list[Annotated[str, Meta(min_length=1)]] = False
    admin: bool = False
    exp: Annotated[float, Meta(ge=0, le=_LAST_SECOND)] | None = None
    iat: float | None = None


class Tokens:
    """Reads the tokens of one issuer."""

    def __init__(
        self, find: Find, audience: str = "", issuer: str = "", user_claim: str = "sub", *, remembers: bool = False
    ) -> None:
        """`find` yields keys until one proves the token; `user_claim` names the claim that holds the user.

        It `remembers` the tokens where the keys stay the same.
        """
        self._find = find
        self._user_claim = user_claim
        self._audience = audience or None
        self._issuer = issuer or None
        self._jwt = jwt.PyJWT({"enforce_minimum_key_length": True})
        # Tokens that have been proven, by their digests, the oldest first; None where their keys may go.
        self._seen: OrderedDict[bytes, Identity] | None = OrderedDict() if remembers else None

    async def identity(self, token: str) -> Identity:
        """Return the Identity of a token; it may have expired just now. Raises Unauthorized or KeysUnavailable."""
        if len(token) > MAX_TOKEN_BYTES:
            raise Unauthorized("Invalid token")
        if self._seen is None:
            return await self._read(token)
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        if (identity := self._seen.get(digest)) is None:
            identity = self._seen[digest] = await self._read(token)
            if len(self._seen) > MAX_SEEN:
                self._seen.popitem(last=False)
        return identity

    async def _read(self, token: str) -> Identity:
        try:
            user, claims = await self._proven(token)
        except jwt.ExpiredSignatureError:
            raise Unauthorized("Token expired") from None
        except _BROKEN as error:
            logger.debug("A token is refused: %s", type(error).__name__)
            raise Unauthorized("Invalid token") from None
        return Identity(
            name=user,
            user=user,
            topics=tuple(stripped(claims.topics)),
            subscribe=frozenset(stripped(claims.subscribe)),
            publishes=claims.publish is True,
            publish_topics=() if isinstance(claims.publish, bool) else tuple(stripped(claims.publish)),
            admin=claims.admin,
            expires_at=claims.exp,
            issued_at=claims.iat,
            is_lasting=True,
        )

    async def _proven(self, token: str) -> tuple[str, Claims]:
        header = jwt.get_unverified_header(token)
        async with aclosing(self._find(header.get("kid") or None, header.get("alg", ""))) as keys:
            async for key in keys:
                with suppress(*_UNPROVEN):
                    return self._claims(token, key)
        raise jwt.InvalidSignatureError

    def _claims(self, token: str, key: Key) -> tuple[str, Claims]:
        """Return the user of a token, empty for none, and its other claims."""
        payload = self._jwt.decode(
            token,
            key.key,
            algorithms=key.algorithms,
            audience=self._audience,
            issuer=self._issuer,
            leeway=CLOCK_SKEW_SECONDS,
        )
        return msgspec.convert(payload.get(self._user_claim, ""), _User), msgspec.convert(payload, Claims)


def tokens_of(settings: Settings) -> Tokens:
    """Return the reader of tokens for these settings. Raises SettingsError."""
    sources = [settings.jwt_secret, settings.jwt_public_key, settings.jwks_url]
    if sum(map(bool, sources)) != 1:
        raise SettingsError("expected one of --jwt-secret, --jwt-public-key and --jwks-url")
    wanted = settings.jwt_algorithms
    if settings.jwks_url:
        find: Find = KeySet(lambda: _fetch(settings.jwks_url), wanted).find
    else:
        key = _secret(settings, wanted) if settings.jwt_secret else _public_key(settings, wanted)
        if not key.algorithms:
            raise SettingsError(f"--jwt-algorithms: {', '.join(wanted)} is not for this kind of key")

        async def find(_kid: str | None, _algorithm: str) -> AsyncGenerator[Key]:
            yield key

    names = settings.jwt_audience, settings.jwt_issuer, settings.jwt_user_claim
    return Tokens(find, *names, remembers=not settings.jwks_url)


def check_fetch(settings: Settings) -> None:
    """Fetch the keys of --jwks-url once. Raises SettingsError with the reason where that fails."""
    try:
        KeySet(lambda: _fetch(settings.jwks_url), settings.jwt_algorithms).fetch()
    except _UNFETCHED as error:
        raise SettingsError(f"--jwks-url: the keys cannot be fetched: {error or type(error).__name__}") from None


def _secret(settings: Settings, wanted: Sequence[str]) -> Key:
    try:
        key = jwt.get_algorithm_by_name("HS256").prepare_key(settings.jwt_secret)
    except jwt.InvalidKeyError:
        raise SettingsError("--jwt-secret: expected a secret, not a public key or certificate") from None
    return Key(key, _both(_HMAC, wanted))


def _public_key(settings: Settings, wanted: Sequence[str]) -> Key:
    path = settings.jwt_public_key
    try:
        key = load_pem_public_key(Path(path).read_bytes())
    except OSError as error:
        raise SettingsError(f"--jwt-public-key: cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise SettingsError(f"--jwt-public-key: there is no public key in PEM in {path}") from None
    return Key(key, _both(_algorithms(key), wanted))


def _algorithms(key: object) -> tuple[str, ...]:
    """Return the algorithms of a public key of this kind; none for other keys."""
    if isinstance(key, RSAPublicKey):
        return _RSA
    if isinstance(key, EllipticCurvePublicKey):
        return tuple(filter(None, [_CURVES.get(key.curve.name)]))
    return ("EdDSA",) if isinstance(key, Ed25519PublicKey | Ed448PublicKey) else ()


def _both(possible: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in possible if not wanted or name in wanted)


class KeySet:
    """The keys of a JSON Web Key Set (RFC 7517), fetched again when they are old or a newer one may be missing.

    The set is a list: several keys may share an id, for several algorithms, and a key or a token may have none.
    """

    def __init__(
        self, fetch: Callable[[], bytes], algorithms: Sequence[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`fetch` blocks, in a thread, for about FETCH_SECONDS, and raises an OSError or a ValueError."""
        self._fetch = fetch
        self._wanted = algorithms
        self._clock = clock
        self._keys: list[Key] = []
        # When the fetch of these keys began, when the last fetch ended, and whether it failed.
        self._keys_at = self._asked_at = -math.inf
        self._failed = False
        self._asking: asyncio.Task[None] | None = None
        self._waiting = 0

    async def find(self, kid: str | None, algorithm: str) -> AsyncGenerator[Key]:
        """Yield the keys that may have signed a token; then, if its key may be newer, those of the next fetch."""
        if algorithm not in _both((*_RSA, *_CURVES.values(), "EdDSA"), self._wanted):
            return
        came_at = self._clock()
        await self._newer_than(came_at - KEPT_SECONDS)
        if self._keys_at < came_at - FRESH_SECONDS and not self._pause():
            self._ask()
        tried = self._candidates(kid, algorithm)
        for key in tried:
            yield key
        if self._keys_at >= came_at:
            return
        if self._waiting == MAX_WAITING:
            raise KeysUnavailable("Too many tokens wait for new keys")
        self._waiting += 1
        try:
            await self._newer_than(came_at)
        finally:
            self._waiting -= 1
        for key in self._candidates(kid, algorithm):
            if key not in tried:
                yield key

    def _candidates(self, kid: str | None, algorithm: str) -> list[Key]:
        """Return the keys for such a signature: of this id first, then those without one; for a token without, all."""
        fitting = [key for key in self._keys if algorithm in key.algorithms and (kid in (None, key.kid) or not key.kid)]
        return sorted(fitting, key=lambda key: key.kid != kid)[:MAX_TRIED]

    async def _newer_than(self, moment: float) -> None:
        """Return once the keys are of a fetch that began then or later. Raises KeysUnavailable where it fails."""
        while self._keys_at < moment:
            # Right after a failure it is too soon to wait for the next.
            if not (self._failed and self._pause()):
                await asyncio.shield(self._ask())
            if self._failed:
                raise KeysUnavailable("The keys for tokens cannot be fetched")

    def _pause(self) -> float:
        """Return the seconds until another fetch may begin."""
        return max(0.0, self._asked_at + PAUSE_SECONDS - self._clock())

    def _ask(self) -> asyncio.Task[None]:
        """Return the fetch in flight, or the next: it begins when the pause is over."""
        loop = asyncio.get_running_loop()
        if self._asking is None or self._asking.done() or self._asking.get_loop() is not loop:
            self._asking = loop.create_task(self._refresh())
        return self._asking

    async def _refresh(self) -> None:
        await asyncio.sleep(self._pause())
        began_at = self._clock()
        try:
            self._keys = await asyncio.wait_for(asyncio.to_thread(self.fetch), FETCH_SECONDS)
        except _UNFETCHED as error:
            logger.warning("The keys for tokens cannot be fetched: %s", error or type(error).__name__)
            self._failed = True
        else:
            self._failed, self._keys_at = False, began_at
        self._asked_at = self._clock()

    def fetch(self) -> list[Key]:
        """Return the keys as they are now. Raises one of _UNFETCHED."""
        # Both in the thread: parsing a document with thousands of keys takes a second or more.
        return self._keys_in(self._fetch())

    def _keys_in(self, document: bytes) -> list[Key]:
        """Return the keys that can prove a signature. A secret in a public document cannot."""
        given = json.loads(document)
        keys: list[Key] = []
        for jwk in given["keys"] if isinstance(given, dict) and isinstance(given.get("keys"), list) else ():
            with suppress(*_UNREADABLE):
                if jwk.get("use", "sig") != "sig" or not _SIGNING.intersection(jwk.get("key_ops", _SIGNING)):
                    continue
                key = jwt.PyJWK(jwk).key
                stated = [jwk["alg"]] if jwk.get("alg") else []
                if algorithms := _both(_both(_algorithms(key), stated), self._wanted):
                    keys.append(Key(key, algorithms, jwk.get("kid") or None))
        if not keys:
            raise ValueError("there is no key that fits")
        return keys


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, except from https to http: a third party on the way could insert its own keys."""

    def redirect_request(self, req: urllib.request.Request, *arguments: Any) -> urllib.request.Request | None:
        to = super().redirect_request(req, *arguments)
        if to is not None and req.type == "https" != to.type:
            raise ValueError("https is redirected to http")
        return to


def _fetch(url: str) -> bytes:
    # The timeout is for each read, so a body that trickles in would keep the thread for ever.
    give_up_at, document = time.monotonic() + FETCH_SECONDS, bytearray()
    opener = urllib.request.build_opener(_Redirects)
    opener.addheaders = FETCH_HEADERS
    with opener.open(url, timeout=FETCH_SECONDS) as response:
        while part := response.read1(MAX_KEYS_BYTES):
            document += part
            if len(document) > MAX_KEYS_BYTES:
                raise ValueError(f"they are more than {MAX_KEYS_BYTES} bytes")
            if time.monotonic() > give_up_at:
                raise TimeoutError(f"they are not complete after {FETCH_SECONDS:.0f} seconds")
    return bytes(document)
