"""The server's certificate: read at the start, and again on SIGHUP while connections go on.

Owns the TLS context. Knows neither sockets nor the Hub.

1. A pair of certificate and key is read whole before it is used: of a bad one nothing is, and the last stays.
2. Connections keep what they began with; each new handshake is given the newest.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from settings import Settings, SettingsError

logger = logging.getLogger("notifyd")


class Certificate:
    """The pair that the settings name. `context` is the listeners', for as long as they listen."""

    def __init__(self, settings: Settings) -> None:
        """Read it. Raises SettingsError, which names the flag."""
        self._settings = settings
        self._newest = self.context = _read(settings)
        self.context.sni_callback = self._present

    def _present(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        # OpenSSL asks in every handshake, also where the client names no host.
        connection.context = self._newest

    def reload(self) -> None:
        """Read it again; a bad one is logged, and changes nothing."""
        try:
            self._newest = _read(self._settings)
        except SettingsError as error:
            logger.error("The certificate stays as it is: %s", error)
        else:
            logger.info("The certificate has been read again")


def _read(settings: Settings) -> ssl.SSLContext:
    """Return a context with the pair. Raises SettingsError."""
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile or settings.ssl_certfile
    for flag, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise SettingsError(f"{flag}: cannot read {path}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # What Python and OpenSSL 3 do by themselves, unless the machine's configuration says otherwise; OpenSSL 1.1.1 would
    # let a client have as many handshakes on one connection as it likes, each of which costs the server more than it.
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        # An empty password is given too: without one OpenSSL would ask at the terminal.
        context.load_cert_chain(certificate, key, settings.ssl_keyfile_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise SettingsError(f"--ssl-keyfile: the key in {key} is not that of {certificate}") from None
        if not _has_certificate(certificate):
            raise SettingsError(f"--ssl-certfile: no PEM certificate in {certificate}") from None
        raise SettingsError(f"--ssl-keyfile: no PEM key in {key} that --ssl-keyfile-password opens") from None
    return context


def _has_certificate(path: str) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        return False
    return True
