"""Certificates for the tests' servers, made with the openssl command."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

from processes import Server


class Pair:
    """A certificate and its key in two files, to be replaced by another pair."""

    def __init__(self, directory: Path, name: str) -> None:
        self.certificate, self.key = directory / f"{name}.crt", directory / f"{name}.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"]
        command += ["-keyout", str(self.key), "-out", str(self.certificate)]
        subprocess.run(command, check=True, capture_output=True)

    @property
    def flags(self) -> list[str]:
        return ["--ssl-certfile", str(self.certificate), "--ssl-keyfile", str(self.key)]

    def become(self, other: Pair) -> None:
        shutil.copy(other.certificate, self.certificate)
        shutil.copy(other.key, self.key)

    def is_shown_by(self, server: Server) -> bool:
        """Whether newcomers are shown this certificate; several, as each may meet another worker."""
        shown = {ssl.get_server_certificate((server.host, server.port)) for _ in range(8)}
        return shown == {self.certificate.read_text()}
