"""Tokens for the tests: good ones, and those that only look like tokens."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import jwt

SECRET = "the secret of the tokens of these tests"
# Longer than a run of the whole suite: some tokens are made when their module is imported.
GOOD_SECONDS = 24 * 3600


def token(secret: Any = SECRET, algorithm: str = "HS256", headers: Any = None, **claims: Any) -> str:
    """Return a token that is good for a day unless its claims say something else."""
    given = {"exp": int(time.time()) + GOOD_SECONDS, **claims}
    return jwt.encode({name: one for name, one in given.items() if one is not None}, secret, algorithm, headers)


def unsigned(header: object, claims: object | None = None, signature: bytes = b"") -> str:
    """Return three parts in the form of a token, of any content."""
    return ".".join((part(header), part({"admin": True} if claims is None else claims), part(signature)))


def part(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def bearer(shown: str) -> dict[str, str]:
    """Return the header that shows a token or a key."""
    return {"Authorization": f"Bearer {shown}"}
