"""The index of the server and its contracts: true, in the form that tools read, and open to everybody."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import jsonschema_rs
import pytest
from conftest import StartServer
from contract_oracle import check_message, schemathesis
from expected import parse
from openapi_spec_validator import validate
from processes import ROOT, Server, call, environment, node_with, notifyd_command, program
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.routing import Mount

import guard
import schemas
from answers import preferred
from contract import NOTES
from contract_messages import REPLIES
from notifyd import create_app
from settings import Settings

KEY = "ci:a-long-random-secret"
SECRET = "a secret of 32 characters or more"
PUBLIC = ["/", "/openapi.json", "/asyncapi.json", "/client.js"]
DESCRIBED = [
    Settings(),
    Settings(api_key=(KEY,), rate_limit=True, internal_port=9000),
    Settings(jwt_secret=SECRET),
]


def read(app: Any, path: str) -> Any:
    """Return the parsed body of an app's answer, without any server."""

    async def ask() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return parse((await client.get(path)).raise_for_status().content)

    return asyncio.run(ask())


def operations(contract: Any) -> dict[str, Any]:
    """Return the operations of OpenAPI by method and path."""
    return {
        f"{method.upper()} {path}": operation
        for path, item in contract["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }


def found(value: Any, *names: str) -> Iterator[Any]:
    """Yield the values of these names, at any depth."""
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if name in names:
            yield inner
        if isinstance(inner, dict | list):
            yield from found(inner, *names)


# The index.


def test_the_index_links_every_route(server: Server) -> None:
    """A program finds each path by a name; a cache keeps the answer for each Accept."""
    response = server.get("/")
    index = parse(response.content)
    assert (index["name"], index["version"], response.headers["vary"]) == ("notifyd", "0.1.0", "Accept")
    assert set(index["links"].values()) == {route.path for route in create_app().routes}  # type: ignore[attr-defined]
    assert index["links"]["users_user_topics"] == "/users/{user}/topics"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("text/html", "text/html"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html"),
        ("TEXT/HTML;Q=0.5, application/json;q=0.4", "text/html"),
        ("text/html, application/json", "application/json"),
        ("text/*, application/json;q=0.9", "text/html"),
        ("application/json;q=0, */*", "text/html"),
        ("text/html;q=0, */*;q=0.1", "application/json"),
        ("text/html; charset=utf-8; q=1.0, application/json; q=0.999", "text/html"),
        ("image/png, , ;q=1, text/html;q=nonsense", "text/html"),
        ("image/png", "application/json"),
    ],
)
def test_the_form_is_the_one_with_the_most_weight(accept: str, kind: str) -> None:
    """The most specific range counts for a type, and the first type of equal ones."""
    assert preferred(Headers({"Accept": accept}), ("application/json", "text/html")) == kind


def test_a_mount_is_named(server: Server) -> None:
    """Links, OpenAPI's servers and AsyncAPI's pathname have it in front."""
    app = Starlette(routes=[Mount("/notifications", app=create_app())])
    assert read(app, "/notifications/")["links"]["notify_batch"] == "/notifications/notify/batch"
    assert read(app, "/notifications/openapi.json")["servers"] == [{"url": "/notifications"}]
    address = {"host": "localhost", "protocol": "ws", "pathname": "/notifications"}
    assert read(app, "/notifications/asyncapi.json")["servers"] == {"notifyd": address}
    assert server.read("/openapi.json")["servers"] == [{"url": "/"}]
    assert server.read("/asyncapi.json")["servers"]["notifyd"]["host"] == f"{server.host}:{server.port}"


# The field's tools.


@pytest.mark.parametrize("settings", DESCRIBED, ids=["open", "keys", "tokens"])
def test_openapi_is_valid(settings: Settings) -> None:
    """openapi-spec-validator finds nothing, and every example has its schema."""
    contract = read(create_app(settings), "/openapi.json")
    validate(contract)
    media = [each for content in found(contract, "content") for each in content.values() if "example" in each]
    assert len(media) > 20
    for each in media:
        jsonschema_rs.validate(each["schema"] | {"components": contract["components"]}, each["example"])


def test_the_examples_of_messages_have_their_schema() -> None:
    """Also those of messages from clients."""
    components = create_app().asyncapi()["components"]
    for message in components["messages"].values():
        for example in message["examples"]:
            jsonschema_rs.validate(message["payload"] | {"components": components}, example["payload"])


PARSE = """
const { Parser } = require("@asyncapi/parser");
new Parser().parse(require("fs").readFileSync(0, "utf8")).then(({ document, diagnostics }) => {
  const faults = diagnostics.filter(({ code }) => code !== "asyncapi-latest-version");
  console.log(JSON.stringify([faults, document.operations().all().map((each) => each.id())]));
});
"""


@pytest.mark.slow
def test_asyncapi_is_valid() -> None:
    """The parser of AsyncAPI's makers finds nothing, and knows every operation."""
    contract = create_app(Settings(jwt_secret=SECRET)).asyncapi()
    command = [node_with("@asyncapi/parser"), "-e", PARSE]
    parsed = subprocess.run(
        command, cwd=ROOT / "tests", input=json.dumps(contract), capture_output=True, text=True, check=True
    )
    faults, known = json.loads(parsed.stdout)
    assert (faults, set(known)) == ([], {"send", "stream"} | schemas.CLIENT_TYPES)


def test_patterns_are_those_of_ecma(server: Server) -> None:
    """JavaScript reads all of them, with its flag u as well."""
    patterns = {*found(server.read("/openapi.json"), "pattern"), *found(server.read("/asyncapi.json"), "pattern")}
    assert len(patterns) > 5
    assert not [pattern for pattern in patterns if r"\Z" in pattern or r"\ud" in pattern]
    script = "for (const each of JSON.parse(process.argv[1])) { new RegExp(each); new RegExp(each, 'u'); }"
    subprocess.run([program("node"), "-e", script, json.dumps([*patterns])], check=True)


@pytest.mark.slow
def test_the_routes_keep_their_contract(start_server: StartServer, tmp_path: Path) -> None:
    """Every check of schemathesis, with requests that are allowed and others, alone and by links."""
    server = start_server("--api-key", KEY, "--jwt-secret", SECRET)
    server.connect(query=f"client_id=carol&user=carol&topics=builds&token={KEY}")
    contract = server.http.get("/openapi.json").json()
    flags = ["--header", f"X-API-Key: {KEY}", "--max-examples", "8", "--generation-deterministic"]
    ended = schemathesis(contract, server.url, tmp_path, *flags)
    assert ended.returncode == 0, ended.stdout[-20_000:] + ended.stderr


# Against the code.


def test_every_message_of_a_client_has_its_answers() -> None:
    assert set(REPLIES) == set(get_args(schemas.ClientMessage))


def test_every_note_is_of_an_operation() -> None:
    """A handler that is renamed takes its note along."""
    there = {operation["operationId"] for operation in operations(create_app().openapi()).values()}
    assert set(NOTES) <= there


def test_the_limit_of_a_body_is_the_one_that_counts() -> None:
    """That of a batch is in force for its JSON alone; lines have one each."""
    described = operations(create_app(Settings(max_message_size=5000)).openapi())
    assert described["POST /notify"]["requestBody"]["description"] == "5000 bytes at most"
    batch = described["POST /notify/batch"]["requestBody"]["description"]
    assert "1048576 bytes" in batch and "application/x-ndjson any number of lines, each of 5000 bytes" in batch


def test_a_page_may_read_every_header_of_the_contract() -> None:
    """CORS exposes them."""
    named = set(create_app(Settings(rate_limit=True, api_key=(KEY,))).openapi()["components"]["headers"])
    assert named <= set(guard.EXPOSED.decode().split(", "))


@pytest.mark.parametrize(
    "message",
    [
        {"type": "welcome"},
        {"type": "ping", "timestamp": "2026-01-31T12:00:00.000Z", "other": 1},
        {"type": "ping", "timestamp": "2026-01-31T12:00:00Z"},
        {"type": "resume", "timestamp": "2026-01-31T12:00:00.000Z", "data": {"position": "18"}},
    ],
)
def test_the_oracle_of_messages_notices(message: Any) -> None:
    """A field that is missing, a field too many, and another form."""
    with pytest.raises(AssertionError, match="has no such message"):
        check_message(message)


def test_a_server_that_nobody_asks_has_no_contract() -> None:
    """What makes them is not even imported."""
    code = "import sys, notifyd; notifyd.create_app(); sys.exit('contract' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False).returncode == 0


# Authentication.


@pytest.mark.parametrize("path", [*PUBLIC, "/console/app.js"])
def test_everybody_may_read_the_contracts(start_server: StartServer, path: str) -> None:
    """Without a key, on both ports."""
    server = start_server("--api-key", KEY)
    assert server.get(path).status_code == 200
    assert server.get(path, headers={"X-API-Key": "another"}).status_code == 200


def test_security_is_there_where_it_is_needed() -> None:
    """With keys alone everybody may listen; probes and contracts are always open."""

    def secured(settings: Settings) -> set[str]:
        return {name for name, each in operations(create_app(settings).openapi()).items() if "security" in each}

    everything = set(operations(create_app().openapi()))
    is_open = {f"GET {path}" for path in ("/health", "/health/live", "/ws", "/console/{file}", *PUBLIC)}
    assert secured(Settings()) == set()
    assert secured(Settings(api_key=(KEY,))) == everything - is_open - {"GET /events"}
    assert secured(Settings(jwt_secret=SECRET)) == everything - is_open
    of_messages = create_app(Settings(jwt_secret=SECRET)).asyncapi()["operations"]
    assert all("security" in operation for operation in of_messages.values())
    assert not [*found(create_app(Settings(api_key=(KEY,))).asyncapi()["operations"], "security")]


def test_each_way_to_show_a_key_opens_a_route(start_server: StartServer) -> None:
    """As the contract's scheme has it."""
    server = start_server("--api-key", KEY)
    for scheme in server.read("/openapi.json")["components"]["securitySchemes"].values():
        options: dict[str, Any] = {}
        if scheme["type"] == "apiKey":
            options = {{"header": "headers", "query": "params"}[scheme["in"]]: {scheme["name"]: KEY}}
        elif scheme["scheme"] == "bearer":
            options = {"headers": {"Authorization": f"Bearer {KEY}"}}
        else:
            options = {"auth": tuple(KEY.split(":"))}
        assert server.get("/status", **options).status_code == 200, scheme


def test_each_port_describes_its_own_routes() -> None:
    """With an internal port the figures are only in its contract."""
    app = create_app(Settings(internal_port=9000))
    assert "/status" not in app.openapi()["paths"]
    assert {"/status", "/health", "/openapi.json"} <= set(read(app.internal(), "/openapi.json")["paths"])
    assert "/notify" not in read(app.internal(), "/")["links"].values()


# The command line.


@pytest.mark.parametrize("name", ["openapi", "asyncapi"])
def test_a_contract_can_be_printed(name: str, tmp_path: Path) -> None:
    """It is that of the server with the same settings, and no store is opened."""
    store = tmp_path / "log.db"
    printed = call(f"--print-{name}", "--store", f"sqlite:{store}", "--api-key", KEY)
    assert (printed.status, printed.stderr, store.exists()) == (0, "", False)
    served = read(create_app(Settings(api_key=(KEY,))), f"/{name}.json")
    assert json.loads(printed.stdout) | {"servers": {}} == served | {"servers": {}}


def test_a_reader_of_a_contract_may_leave() -> None:
    """As `head` does."""
    command = [*notifyd_command("--print-openapi"), "|", "head", "-c", "1"]
    ended = subprocess.run(
        ["sh", "-c", " ".join(command)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert (ended.stdout, ended.stderr) == ("{", "")
