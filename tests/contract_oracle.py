"""The contracts as oracles: every message to a client against AsyncAPI, and every route against OpenAPI."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs

from contract_messages import NOTIFICATIONS
from notifyd import create_app
from settings import Settings

STREAMS = {"/events": "a stream does not end", "/ws": "a request without a handshake is always 426"}


def closed(contract: dict[str, Any]) -> dict[str, Any]:
    """Return a contract in which no object has other fields than it names: a client would ignore those."""
    for schema in contract["components"]["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return contract


@functools.cache
def _validators() -> dict[str, Any]:
    contract = closed(create_app(Settings()).asyncapi())
    components = {"components": contract["components"]}
    payloads = {name: message["payload"] for name, message in contract["components"]["messages"].items()}
    for name in NOTIFICATIONS:
        # A publisher may use these types, too.
        payloads[name] = {"anyOf": [payloads[name], payloads["notification"]]}
    return {name: jsonschema_rs.validator_for(payload | components) for name, payload in payloads.items()}


def check_message(message: dict[str, Any], name: str = "") -> None:
    """Fail unless AsyncAPI has such a message to clients; a message is known by its type if not by a name."""
    validators = _validators()
    validator = validators.get(name or message["type"], validators["notification"])
    if not validator.is_valid(message):
        raise AssertionError(f"the contract has no such message: {message}\n{next(validator.iter_errors(message))}")


def schemathesis(contract: dict[str, Any], url: str, directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Try all routes that answer at once with requests that the contract allows, and with others."""
    for item in closed(contract)["paths"].values():
        for operation in item.values():
            # Nothing but the statuses that it names.
            operation["responses"].pop("default") if "responses" in operation else None
            # schemathesis cannot write lines.
            body = operation.get("requestBody", {}) if isinstance(operation, dict) else {}
            body.get("content", {}).pop("application/x-ndjson", None)
    (directory / "openapi.json").write_text(json.dumps(contract))
    (directory / "schemathesis.toml").write_text(CONFIGURATION)
    program = Path(sys.executable).parent / "schemathesis"
    command = [program, "--config-file", "schemathesis.toml", "run", "openapi.json", "--url", url, "--no-color"]
    excluded = [word for path in STREAMS for word in ("--exclude-path", path)]
    return subprocess.run(
        [*command, *excluded, *flags], cwd=directory, capture_output=True, text=True, check=False, timeout=3600
    )


# The checks of schemathesis as it has them, but for the contradictions to the contract.
CONFIGURATION = """
[checks]
# A body over its limit is 413, before any other check.
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 406, 413, 415, 422]

# Of an answer of one kind alone a link is made, not of any value whose name is like that of a parameter.
[phases.stateful.inference]
algorithms = []

# An Idempotency-Key that came with another request is 422.
[[operations]]
include-path = ["/notify", "/notify/batch"]
checks.positive_data_acceptance.expected-statuses = ["2xx", 422]

# `after` is the `next` of an earlier answer; every other text of its form is 400.
[[operations]]
include-path = ["/clients", "/topics"]
checks.positive_data_acceptance.expected-statuses = ["2xx", 400]

# And an id of the right form need not be in the log.
[[operations]]
include-path = "/notifications/{id}/clients"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 404]
"""
