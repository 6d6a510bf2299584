"""The command check: what is wrong or odd with a server, before it serves.

Owns the order of the checks and the words of a finding. A check is the server's own where it has one. Nothing is
changed: the store is only read, and the port is bound for a moment, but nothing listens there.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import ssl
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec import structs

from guard_auth import keys_and_tokens_of, keys_of, warnings_of
from server_workers import check_store
from settings import Settings, SettingsError, extra, is_secret, number

# A certificate that ends within this time is odd: renewals come earlier.
LAST_DAYS = 14
# Random ones hold 128 bits in base64, which nobody guesses.
LEAST_KEY_CHARACTERS = 22


class Finding(NamedTuple):
    """Something wrong, with which the server does not serve, or odd."""

    is_wrong: bool
    text: str

    def __str__(self) -> str:
        return f"{'wrong' if self.is_wrong else 'odd'}: {self.text}"


Findings = Iterator[Finding]


def wrong(text: str) -> Finding:
    return Finding(True, text)


def odd(text: str) -> Finding:
    return Finding(False, text)


def findings(values: Mapping[str, Any], warnings: Sequence[str]) -> Findings:
    """Yield the findings of settings as flags and variables give them, with the warnings of their reading."""
    yield from map(odd, warnings)
    for name, given in values.items():
        if given.source.startswith("--") and is_secret(name, given.value):
            variable = f"NOTIFYD_{name.upper()}"
            yield odd(f"{given.source}: lists of processes show the secret in a flag; best in {variable}")
    try:
        settings = Settings(**values)
    except SettingsError as error:
        yield from _each_setting(values) or [wrong(str(error))]
        return
    for check in (_tuning, _files, _sockets, _store):
        logged = _Logged()
        try:
            with extra("server", "the command line"), logged:
                yield from check(settings)
        except SettingsError as error:
            yield wrong(str(error))
        yield from map(odd, logged.warnings)


class _Logged(logging.Handler):
    """The warnings that the server's own parts log meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())

    def __enter__(self) -> None:
        logging.getLogger("notifyd").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("notifyd").removeHandler(self)


def _each_setting(values: Mapping[str, Any]) -> list[Finding]:
    """Return what is wrong with each setting by itself: one error must not hide another."""
    found = []
    for name, given in values.items():
        # The number of replicas is judged by the store.
        beside = {"store": values["store"]} if name == "store_replicas" and "store" in values else {}
        try:
            Settings(**{**beside, name: given})
        except SettingsError as error:
            found.append(wrong(str(error)))
    return list(dict.fromkeys(found))


def _tuning(settings: Settings) -> Findings:
    """Yield settings that are right alone and odd together."""
    cpus, interval = os.cpu_count() or 1, settings.ping_interval
    if interval >= settings.ping_timeout:
        yield odd(f"--ping-timeout: {number(settings.ping_timeout)} s end before a ping, every {number(interval)} s")
    if interval and settings.history_ttl <= interval:
        yield odd("--history-ttl: shorter than --ping-interval, so silent clients cannot resume completely")
    if settings.workers > cpus:
        yield odd(f"--workers: {settings.workers} processes on {cpus} CPUs")
    if "*" in settings.allow_origin and keys_and_tokens_of(settings) is None:
        yield odd("--allow-origin: with * and without keys or tokens every web page reads and publishes")


# --- files


def _files(settings: Settings) -> Findings:
    """Yield what is wrong with the certificate, the keys and the means to check tokens. Raises SettingsError."""
    from server import certificate_of  # noqa: PLC0415 - needs uvicorn

    keys_and_tokens_of(settings)
    for source, key in keys_of(settings):
        name, _, secret = key.partition(":")
        if len(secret) < LEAST_KEY_CHARACTERS:
            yield odd(f"{source}: the secret of {name} is short: {LEAST_KEY_CHARACTERS} random characters or more")
    if (certificate := certificate_of(settings)) is not None:
        yield from _certificate(certificate.context, settings.ssl_certfile)
    if settings.jwks_url:
        from guard_tokens import check_fetch  # noqa: PLC0415 - needs PyJWT

        check_fetch(settings)


def _certificate(context: ssl.SSLContext, path: str) -> Findings:
    """Yield what a client that trusts the file would find in a handshake."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(path)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near, far = client.wrap_bio(down, up), context.wrap_bio(up, down, server_side=True)
    try:
        for _ in range(4):
            for side in (near, far):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        yield wrong(f"--ssl-certfile: clients refuse {path}: {error.verify_message}")
        return
    days = (ssl.cert_time_to_seconds((near.getpeercert() or {})["notAfter"]) - time.time()) / 86_400  # type: ignore[arg-type]
    if days < LAST_DAYS:
        left = "1 day" if days < 1.5 else f"{days:.0f} days"
        yield odd(f"--ssl-certfile: the certificate in {path} ends in {left}{' or less' if days < 1 else ''}")


# --- sockets


def _sockets(settings: Settings) -> Findings:
    """Yield what is wrong with the ports, their reach, and the limit of open files. Raises SettingsError."""
    from server import ListenError, bind_all, raise_file_limit  # noqa: PLC0415 - needs uvicorn

    if settings.loop == "uvloop":
        with extra("server", "--loop"):
            importlib.import_module("uvloop")
    raise_file_limit(settings.max_connections)
    try:
        # As for several workers: bound, and not listening.
        listeners = bind_all(structs.replace(settings, workers=2))
    except ListenError as error:
        yield wrong(str(error))
        return
    addresses = [listener.getsockname()[0] for listener in listeners]
    for listener in listeners:
        listener.close()
    yield from map(odd, warnings_of(settings, addresses, is_open=keys_and_tokens_of(settings) is None))


# --- the store


def _store(settings: Settings) -> Findings:
    """Yield what is wrong with the store. Raises SettingsError."""
    check_store(settings)
    kind, _, path = settings.store.partition(":")
    if kind == "sqlite":
        from store_sqlite_file import inspect  # noqa: PLC0415 - for this kind of store

        yield from map(odd, inspect(path, settings.store_timeout))
    elif kind not in ("auto", "memory"):
        with extra("redis", "store"):
            from store_redis_link import failure_to_reach  # noqa: PLC0415 - needs redis and hiredis

        if (reason := asyncio.run(failure_to_reach(settings))) is not None:
            yield wrong(f"--store: {reason}")
    elif settings.workers > 1:
        try:
            tempfile.TemporaryDirectory().cleanup()
        except OSError as error:
            yield wrong(f"--workers: no directory for a temporary log: {error.strerror}; name a --store")
