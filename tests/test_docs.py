"""README and docs/ are true: names, defaults and codes are the code's, examples decode, commands are run as written."""

from __future__ import annotations

import argparse
import ast
import asyncio
import functools
import re
import shlex
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, get_args

import httpx
import msgspec
import orjson
import pytest
from expected import Record, parse
from notifyd_client import receiving
from openapi_spec_validator import validate
from processes import QUIET, ROOT, Server, environment
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Close
from ws_clients import PATIENCE

import answers
import bodies
import bookmarks
import clients
import command
import connection
import contract_closes
import conversation
import counts
import errors
import guard_auth
import guard_tokens
import heartbeat
import publishers
import query
import routes
import schemas
import settings
import store
import streams
import wire_http
import wire_message
from notifyd import create_app

FILES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
README, PROTOCOL, DESIGN = PAGES["README.md"], PAGES["docs/protocol.md"], PAGES["docs/design.md"]
REASONED = (
    "hub.py",
    "admission.py",
    "heartbeat.py",
    "guard_identity.py",
    "guard_auth.py",
    "guard_tokens.py",
    "revocations.py",
    "query.py",
    "schemas.py",
    "store.py",
)
MODULES = {path.name: path.read_text() for path in ROOT.glob("*.py")}

# Flags of other programs that the pages name.
FOREIGN_FLAGS = {"experimental-websocket", "factory", "appendonly", "save", "build", "deploy-hook", "stop-timeout"}
FOREIGN_FLAGS |= {"shell", "profile", "forwarded-allow-ips", "graceful-timeout", "measure"}
# Raised in the Hub's part of the code, and never the reason of a close: one is for nobody, two are told otherwise.
NO_REASONS = {
    *map(
        re.escape,
        (
            "The newcomer has left",
            "The store is away: its log cannot be read",
            "Idempotency-Key: already used for another request",
        ),
    ),
    re.escape("Invalid JSON: ") + ".+",
}
NO_REASONS |= {re.escape("Not allowed: to publish ") + end for end in ("other\\ than\\ by\\ topic", "to\\ topic\\ .+")}
# Names in code style that are other programs' or other standards'.
FOREIGN_NAMES = {"PYTHONPATH", "EventSource", "TestClient", "websocket_connect", "ws_per_message_deflate"}
FOREIGN_NAMES |= {"webhook_configs", "credentials_file"}


# Reading pages.


def all_found(pattern: str) -> list[Any]:
    """Return the matches in all pages, as parameters of a test."""
    return [
        pytest.param(found, id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, found in enumerate(re.findall(pattern, text, re.MULTILINE | re.DOTALL))
    ]


def rows(page: str, *header: str) -> list[list[str]]:
    """Return the cells of the table with these headings."""
    found = re.search(rf"^\| {re.escape(' | '.join(header))} .*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert found, f"no table {header}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()]


def spans(text: str) -> list[str]:
    """Return the texts in code style."""
    return re.findall(r"`([^`\n]+)`", text)


def first_span(cell: str) -> str:
    return spans(cell)[0]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)


# Settings.


def settings_table() -> str:
    """Return the table that the README must have."""
    hints = typing.get_type_hints(settings.Settings, include_extras=True)
    lines = ["| Name | Default | Meaning |", "|---|---|---|"]
    for field in msgspec.structs.fields(settings.Settings):
        kind, meta = hints[field.name].__origin__, hints[field.name].__metadata__[-1]
        meaning = meta.description
        if typing.get_origin(kind) is typing.Literal:
            meaning += f" ({', '.join(f'`{choice}`' for choice in typing.get_args(kind))})"
        default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = "none" if default == "" else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        lines.append(f"| `{field.name}` | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"


def test_the_readme_has_every_setting_with_its_default() -> None:
    """The table is the one that the settings themselves give."""
    expected = settings_table()
    assert f"\n{expected}\n" in README, f"the README's table of settings should be:\n\n{expected}"


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the flags of a parser and of its commands."""
    actions = parser._actions
    inner = [each for action in actions if isinstance(action.choices, dict) for each in action.choices.values()]
    return {flag[2:] for action in actions for flag in action.option_strings}.union(*map(flags_of, inner))


@pytest.mark.parametrize("page", PAGES)
def test_no_page_names_a_setting_that_does_not_exist(page: str) -> None:
    """Every flag and every variable in the text is one of the settings'."""
    known = flags_of(command.parser())
    named = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", PAGES[page])) - FOREIGN_FLAGS
    named |= {name.lower().replace("_", "-") for name in re.findall(r"NOTIFYD_([A-Z]\w*)", PAGES[page])}
    assert named <= known


# Routes, metrics and limits.


def test_every_route_is_documented_and_no_other(server: Server) -> None:
    """The table of routes is the route table, with the methods that OPTIONS tells."""
    there = set()
    for path in {route.path for route in create_app().routes}:  # type: ignore[attr-defined]
        allowed = server.request("OPTIONS", path).headers["allow"].split(", ")
        there |= {f"{method} {path}" for method in set(allowed) - {"HEAD", "OPTIONS"}}
    assert {first_span(row[0]) for row in rows(PROTOCOL, "Route", "Answer")} == there
    paths = create_app().openapi()["paths"]
    assert there == {f"{verb.upper()} {path}" for path in paths for verb in paths[path] if verb != "parameters"}


def test_every_route_of_http_has_a_section(server: Server) -> None:
    """A heading for each, and the WebSocket's is its own chapter."""
    documented = {first_span(row[0]) for row in rows(PROTOCOL, "Route", "Answer")}
    assert set(re.findall(r"^### ((?:GET|POST|DELETE) .+)$", PROTOCOL, re.MULTILINE)) == documented - {"GET /ws"}


def test_every_parameter_of_a_url_is_documented_and_no_other() -> None:
    """The table has the parameters that the code checks for, each with the routes that know it."""
    there = {(name, path) for path, names in query.PARAMETERS.items() for name in names}
    table = rows(PROTOCOL, "Parameter", "Routes")
    assert {(first_span(name), path) for name, paths, _ in table for path in spans(paths)} == there


def test_every_metric_is_documented_with_its_type(server: Server) -> None:
    """The table has the metrics that Prometheus gets, in the same order."""
    there = re.findall(r"^# TYPE (\S+) (\S+)$", server.get("/metrics/prometheus").text, re.MULTILINE)
    assert [(first_span(row[0]), row[1]) for row in rows(PROTOCOL, "Metric", "Type")] == there


def longest(struct: Any, name: str) -> int:
    """Return how many characters a Struct allows its field, or each item of it."""
    kind: Any
    [kind] = [field.type for field in msgspec.inspect.type_info(struct).fields if field.name == name]
    kind = getattr(kind, "type", kind)
    item = getattr(kind, "item_type", kind)
    return int(getattr(item, "type", item).max_length)


def test_limits_are_the_codes_own() -> None:
    """Limits that are not settings have the values of the code."""
    assert [int(row[1]) for row in rows(PROTOCOL, "What", "Value")] == [
        longest(schemas.NotifyRequest, "message"),
        longest(schemas.NotifyRequest, "type"),
        longest(schemas.NotifyRequest, "topics"),
        schemas.MAX_TOPICS,
        schemas.MAX_TARGET_CLIENTS,
        schemas.MAX_TARGET_TOPICS,
        schemas.MAX_TARGET_USERS,
        schemas.MAX_USER,
        connection.MAX_REASON_BYTES,
        schemas.MAX_KEY_LENGTH,
        schemas.MAX_REF_LENGTH,
        routes.MAX_USER_AGENT,
        schemas.MAX_BATCH,
        bodies.MAX_BATCH_BYTES,
        query.HISTORY_LIMIT.most,
        query.HISTORY_LIMIT.default,
        schemas.MAX_TARGET_USERS,
        query.PAGE_LIMIT.most,
        query.PAGE_LIMIT.default,
        streams.RETRY_MILLISECONDS,
        answers.RETRY_AFTER_SECONDS,
        clients.MESSAGE_BURST,
        clients.MESSAGES_PER_SECOND,
        conversation.UNREAD_BYTES,
        publishers.WINDOW_REQUESTS,
        publishers.WINDOW_BYTES,
        heartbeat.PROBE_SECONDS,
        connection.CLOSE_DEADLINE_SECONDS,
        wire_http.REQUEST_SECONDS,
        wire_http.STALLED_SECONDS,
        wire_message.MAX_HEAD_BYTES,
        wire_message.MAX_HEAD_LINES,
        query.MAX_PARAMETERS,
        query.STATUS_LIMIT.default,
    ]


@pytest.mark.parametrize(
    "phrase",
    [
        f"text of 1 to {longest(schemas.NotifyRequest, 'message')} characters",
        f"{bookmarks.KEPT_FOR_EACH_CONNECTION} positions are kept, and {bookmarks.LEAST_KEPT} at least",
        f"text of 1 to {longest(schemas.NotifyRequest, 'type')} characters",
        f"1 to {schemas.MAX_TARGET_CLIENTS} client_ids",
        f"1 to {schemas.MAX_TARGET_TOPICS} names of 1 to {longest(schemas.NotifyRequest, 'topics')} characters",
        f"1 to {schemas.MAX_TARGET_USERS} names of 1 to {schemas.MAX_USER} characters",
        f"separated by commas, {schemas.MAX_TOPICS} at most",
        f"cut to {routes.MAX_USER_AGENT} characters",
        f"the same key (1 to {schemas.MAX_KEY_LENGTH} characters)",
        f"An array of 1 to {schemas.MAX_BATCH} requests as for `/notify`, of {bodies.MAX_BATCH_BYTES} bytes at most",
        f"1 to {query.HISTORY_LIMIT.most} notifications at most, {query.HISTORY_LIMIT.default} unless told",
        f"1 to {query.PAGE_LIMIT.most} clients at most, {query.PAGE_LIMIT.default} unless told",
        f"cut to the {connection.MAX_REASON_BYTES} bytes of a close frame",
        f"`users` has 1 to {schemas.MAX_TARGET_USERS} users",
        f"{publishers.WINDOW_REQUESTS} requests, or {publishers.WINDOW_BYTES} bytes of them",
        f"of 1 to {schemas.MAX_KEY_LENGTH} characters, in one namespace",
        f"a text of up to {schemas.MAX_REF_LENGTH} characters, comes back",
        f"it is dead after {store.LEASE_SECONDS:.0f} seconds",
        f"lists N clients at most, {query.STATUS_LIMIT.default} unless told",
        f"more than {clients.MESSAGES_PER_SECOND:.0f} messages a second over "
        f"{clients.MESSAGE_BURST / clients.MESSAGES_PER_SECOND:.0f} seconds",
        f"heard from within {heartbeat.PROBE_SECONDS:.0f} seconds",
        f"cut off after {connection.CLOSE_DEADLINE_SECONDS:.0f} seconds",
        f"did not arrive within {wire_http.REQUEST_SECONDS:.0f} seconds",
        f"headers together are over {wire_message.MAX_HEAD_BYTES} bytes or {wire_message.MAX_HEAD_LINES} lines",
        f"may be {guard_tokens.CLOCK_SKEW_SECONDS} seconds ahead",
        f"more than {guard_tokens.MAX_TOKEN_BYTES} characters make",
        f"every {guard_tokens.FRESH_SECONDS / 60:.0f} minutes, and at once",
        f"could have signed it, {guard_tokens.MAX_TRIED} at most",
        f"beyond {guard_tokens.MAX_WAITING} that wait",
        f"for {guard_auth.MAX_WARNED} addresses a minute at most",
        f"not more often than every {guard_tokens.PAUSE_SECONDS:.0f} seconds",
        f"\nretry: {streams.RETRY_MILLISECONDS}\n",
    ],
)
def test_limits_in_the_text_are_the_codes_own_too(phrase: str) -> None:
    """Where a sentence names a limit, it is the same number."""
    assert phrase in PROTOCOL or phrase in " ".join(PROTOCOL.split())


def test_the_reserved_types_are_listed() -> None:
    """The types that nobody may publish are those that the text names."""
    sentence = re.search(r"own types are refused, because clients act on them: (.*?)\.", PROTOCOL, re.DOTALL)
    assert sentence
    assert set(spans(sentence[1])) == schemas.RESERVED_TYPES


# Messages.

STRUCTS = [
    each
    for each in vars(schemas).values()
    if isinstance(each, type) and issubclass(each, msgspec.Struct) and each.__module__ == "schemas"
]


def is_example_of(value: Record, struct: Any) -> bool:
    """Whether an object has the fields of a Struct, all of them, in their order and of their types."""
    try:
        decoded = msgspec.convert(value, struct, dec_hook=lambda _, inner: orjson.Fragment(orjson.dumps(inner)))
    except msgspec.ValidationError:
        return False
    fixed = {field.default for field in msgspec.structs.fields(struct) if field.name == "type"} & schemas.RESERVED_TYPES
    if fixed and value.get("type") not in fixed:
        return False
    written = parse(msgspec.json.encode(decoded) if struct is schemas.Publish else schemas.encode(decoded))
    if struct is schemas.NotifyRequest:
        written = Record((name, one) for name, one in written.items() if name in value)
    return bool(value == written)


def objects_in(value: Any) -> Iterator[Record]:
    """Yield an object and all objects in it."""
    if isinstance(value, Record):
        yield value
    for inner in value.values() if isinstance(value, Record) else value if isinstance(value, list) else ():
        yield from objects_in(inner)


EXAMPLES = all_found(r"^```json\n(.*?)^```$") + all_found(r"^data: (.+?)$")


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_decodes(example: str) -> None:
    """It is one of the Structs, with all fields in their order."""
    value = parse(example)
    assert any(is_example_of(value, struct) for struct in STRUCTS), f"no Struct is like {example}"


def test_every_struct_has_an_example() -> None:
    """No message, request or answer is left out."""
    shown = [each for parameter in EXAMPLES for each in objects_in(parse(parameter.values[0]))]
    # Messages from clients are shown, and tried, in a table; tokens are tried in test_guard_auth.py.
    expected = set(STRUCTS) - set(get_args(schemas.ClientMessage))
    assert {struct for struct in expected if any(is_example_of(each, struct) for each in shown)} == expected


MISTAKES = [(first_span(sent), first_span(answer)) for sent, answer in rows(PROTOCOL, "Sent", "`message` of the error")]


@pytest.mark.parametrize(("sent", "answer"), MISTAKES)
def test_a_mistake_is_answered_as_documented(server: Server, sent: str, answer: str) -> None:
    """Each mistake in the table gets the documented error."""
    assert server.join().ask(sent)["message"] == answer


@pytest.fixture(scope="module")
def publishing() -> Iterator[Server]:
    server = Server.notifyd(*QUIET, "--publish-over-websocket")
    yield server
    server.stop()


@pytest.mark.parametrize(("sent", "answer"), rows(PROTOCOL, "Message", "Answer"))
def test_a_clients_message_is_answered_as_documented(publishing: Server, sent: str, answer: str) -> None:
    """Each message in the table is understood and gets the answer that the table names."""
    client = publishing.join()
    client.send(first_span(sent))
    if "none" in answer:
        client.send({"type": "status_request"})
        answer = "`status_response`"
    assert client.receive()["type"] == first_span(answer)


# Closes and errors.


def error_classes(root: type[errors.NotifydError] = errors.NotifydError) -> Iterator[type[errors.NotifydError]]:
    yield root
    for child in root.__subclasses__():
        yield from error_classes(child)


def form_of(text: ast.expr, names: dict[str, ast.expr]) -> str:
    """Return the pattern of all texts that an expression can be; empty where it is no text."""
    if isinstance(text, ast.Name):
        text = names.get(text.id, text)
    if isinstance(text, ast.Constant) and isinstance(text.value, str):
        return re.escape(text.value)
    if isinstance(text, ast.JoinedStr):
        return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in text.values)
    return ""


def reasons_in(module: str) -> Iterator[tuple[int, str]]:
    """Yield each close code with the form of its reason: a code's name with a text after it, or an error raised."""
    codes = {name: value for name, value in vars(schemas).items() if isinstance(value, int) and 1000 <= value < 1016}
    classes = {each.__name__: each for each in error_classes()}
    tree = ast.parse(MODULES[module])
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]:
        nodes = list(ast.walk(function))
        names = {ast.unparse(node.targets[0]): node.value for node in nodes if isinstance(node, ast.Assign)}
        for node in nodes:
            if isinstance(node, ast.Call):
                for code, text in pairwise(node.args):
                    if isinstance(code, ast.Name) and code.id in codes and (form := form_of(text, names)):
                        yield codes[code.id], form
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and module in REASONED:
                raised = classes.get(ast.unparse(node.exc.func))
                form = form_of(node.exc.args[0], names) if raised and node.exc.args else ""
                # Those that begin with a field's name are about a request.
                if raised and form[:1].isupper() and form not in NO_REASONS:
                    yield raised.close_code, form


def reasons() -> set[tuple[int, str]]:
    found = {reason for module in MODULES for reason in reasons_in(module)}
    found.add((schemas.POLICY_VIOLATION, schemas.DisconnectRequest().reason))
    return found | {(errors.ShuttingDown.close_code, errors.ShuttingDown().message)}


def test_the_closes_of_the_contract_are_the_documented_ones() -> None:
    """The table is the one that the contract of the messages has."""
    documented = [
        (int(code), tuple(spans(reasons)), re.sub(r"\[(.+?)\]\(.+?\)", r"\1", when), helps)
        for code, reasons, when, helps in rows(PROTOCOL, "Code", "Reason", "When")
    ]
    assert documented == [tuple(close) for close in contract_closes.CLOSES]


def closes() -> set[tuple[int, str]]:
    """Return the documented codes and reasons."""
    table = rows(PROTOCOL, "Code", "Reason", "When")
    return {(int(code), reason) for code, reasons, *_ in table for reason in spans(reasons)}


def test_every_close_and_error_message_is_documented() -> None:
    """Each code with each reason that the code can give has an example."""
    documented = closes() | {(schemas.POLICY_VIOLATION, answer) for _, answer in MISTAKES}
    assert not [
        reason
        for reason in reasons()
        if not any(code == reason[0] and re.fullmatch(reason[1], text) for code, text in documented)
    ]


def test_no_close_is_documented_that_does_not_exist() -> None:
    """Each code and reason in the table can be given."""
    known = reasons()
    assert not [
        (code, text)
        for code, text in closes()
        if not any(code == each and re.fullmatch(form, text) for each, form in known)
    ]


def test_the_clients_give_up_where_coming_back_does_not_help() -> None:
    """Both know the same codes and reasons as final, and none of the others."""
    script = (ROOT / "clients" / "js" / "client.js").read_text()
    [codes], [final] = re.findall(r"FINAL_CODES = (.+);", script), re.findall(r"FINAL = /(.+)/;", script)
    for close in contract_closes.CLOSES:
        for reason in close.reasons:
            in_script = close.code in parse(codes) or (close.code == 1008 and re.match(final, reason) is not None)
            received = ConnectionClosedError(Close(close.code, reason), None)
            assert (in_script, receiving.is_final(received)) == (close.is_final, close.is_final), reason


def test_every_http_error_is_documented_and_no_other() -> None:
    """Each status with its categories is that of an error class, or is answered before there is an app."""
    documented = {(int(row[0]), category) for row in rows(PROTOCOL, "Status", "Category") for category in spans(row[1])}
    there = {(each.status, each.category) for each in error_classes()}
    refused = re.findall(r"\brefuse\((4\d\d)", MODULES["wire_http.py"])
    refused += re.findall(r"RequestError\(.*, (\d{3})\)", MODULES["wire_message.py"])
    assert refused
    there |= {(int(status), "validation") for status in refused}
    # On a handshake: a breach of RFC 6455, a foreign origin, an unknown path, another version, too many, our failure.
    there |= {(status, "connection") for status in (400, 403, 404, 426, 429, 500)}
    assert documented == there


# Commands and snippets.

# A command of the package, as it is where the package is installed.
OURS = re.compile(r"(?<!\S)notifyd (?=[a-z])")


def run(command: str, server: Server) -> str:
    """Return the output of a shell command that ends by itself."""
    ended = subprocess.run(
        at(server, command),
        shell=True,
        cwd=ROOT,
        env=shell_environment(server),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def at(server: Server, command: str) -> str:
    """Return the command for the server of the test: only the port is another."""
    if OURS.search(command):
        return OURS.sub(f"{shlex.quote(sys.executable)} notifyd.py ", command)
    assert "localhost:8000" in command
    return command.replace("localhost:8000", f"localhost:{server.port}")


def shell_environment(server: Server) -> dict[str, str]:
    # A pipe is no terminal: without this Python would buffer its output.
    proxies = {"NO_PROXY": "localhost", "no_proxy": "localhost"}
    return environment({**proxies, "PYTHONUNBUFFERED": "1", "NOTIFYD_URL": server.url})


SHELL_BLOCKS = all_found(r"^```sh\n(.*?)^```$")
LINES = [line for block in SHELL_BLOCKS for line in block.values[0].splitlines()]
COMMANDS = [line for line in LINES if not line.startswith(("make ", "pip ", "shtab "))]
LISTENERS = ("curl -N ", ".venv/bin/python -m websockets ", "notifyd listen")
LISTENING = [command for command in COMMANDS if command.startswith(LISTENERS)]
ENDING = [command for command in COMMANDS if command not in LISTENING]


@pytest.mark.parametrize("block", SHELL_BLOCKS)
def test_a_block_can_be_pasted(block: str) -> None:
    """Nothing follows a command that does not end by itself."""
    assert not set(block.splitlines()[:-1]) & set(LISTENING)


@pytest.mark.parametrize("command", list(filter(OURS.search, ENDING)))
def test_a_line_with_a_command_of_ours_works_as_written(server: Server, command: str) -> None:
    """It ends with 0."""
    run(command, server)


@pytest.mark.parametrize("command", [command for command in ENDING if not OURS.search(command)])
def test_a_curl_line_works_as_written(server: Server, command: str) -> None:
    """Its answer is the documented one, and no error."""
    head, _, body = run(command, server).rpartition("\n\n")
    if "/metrics/prometheus" in command:
        assert "websocket_active_connections " in head
        return
    if "api.json" in command:
        assert {"openapi", "asyncapi"} & set(parse(body))
        return
    answers = {struct.__name__ for struct in STRUCTS if is_example_of(parse(body), struct)}
    known = {"Health", "NotifyResponse", "BatchResponse", "History", "Metrics", "Status", "ConnectedClients"}
    assert answers & (known | {"ConnectedUser", "FollowedTopics", "Disconnected", "BatchReceipt"})
    assert ("-i " in command) == ("notification-id: " in head)


@pytest.mark.parametrize("command", LISTENING)
def test_a_listening_line_works_as_written(server: Server, command: str) -> None:
    """It is welcomed, and prints a notification that is for everyone."""
    with listening(at(server, command), server) as printed:
        assert printed("welcome|connected (to .* )?as")
        server.notify("for everyone")
        assert printed("for everyone")


@contextmanager
def listening(command: str, server: Server) -> Iterator[Callable[[str], bool]]:
    """Run a command that does not end by itself; yields a function that waits until it has printed a pattern."""
    process = subprocess.Popen(
        f"exec {command}",
        shell=True,
        cwd=ROOT,
        env=shell_environment(server),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    try:
        yield lambda pattern: any(re.search(pattern, line) for line in process.stdout or ())
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def test_every_make_target_exists() -> None:
    """Every `make` target in the pages is in the Makefile."""
    named = {target for page in PAGES.values() for target in re.findall(r"(?:^|`)make ([a-z-]+)", page, re.MULTILINE)}
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= there


@pytest.mark.parametrize("snippet", all_found(r"^```python\n(.*?)^```$"))
def test_a_python_snippet_runs(snippet: str) -> None:
    """It runs; an app that it makes serves notifyd under /notifications, and its own route publishes."""
    names: dict[str, Any] = {}
    exec(compile(snippet, "snippet", "exec", dont_inherit=True), names)
    if "app" in names:
        asyncio.run(try_app(names["app"], snippet))


async def try_app(app: Any, snippet: str) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        assert (await client.get("/notifications/health")).json()["status"] == "healthy"
        if "openapi = " in snippet:
            validate((await client.get("/openapi.json")).json())
        if "/order" in snippet:
            assert (await client.post("/order")).status_code == 200
            [order] = (await client.get("/notifications/notifications")).json()["notifications"]
            assert order["type"] == "order"


# Names and links.


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    """Relative links are to files that exist, and to headings that are there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("page", PAGES)
def test_every_name_in_code_is_one_of_the_code(page: str) -> None:
    """Words such as `_join` or `HubState`, and `file.py`, exist in the code; a renamed one is noticed here."""
    labels = {counts.snake(each.__name__) for each in error_classes()} | set(map(counts.snake, counts.AUTH_REASONS))
    tests = re.findall(r"def (test_\w+)", "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py")))
    code = "\n".join([*MODULES.values(), (ROOT / "Makefile").read_text(), *tests]).lower()
    for span in spans(prose(page)):
        if re.fullmatch(r"[\w/]+\.py", span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"_\w+|[a-z]+_\w+|[A-Z][a-z]+[A-Z]\w+", span) and span not in FOREIGN_NAMES | labels:
            assert re.search(rf"\b{span.lower()}\b", code), span
        elif method := re.fullmatch(r"([A-Z]\w+)\.(\w+)", span):
            assert method[2] in members(method[1]), span


@functools.cache
def classes() -> list[ast.ClassDef]:
    nodes = (node for module in MODULES.values() for node in ast.walk(ast.parse(module)))
    return [node for node in nodes if isinstance(node, ast.ClassDef)]


def members(name: str) -> set[str]:
    """Return the names of the methods of a class of the code."""
    [found] = [node for node in classes() if node.name == name]
    return {node.name for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def section(page: str, heading: str) -> str:
    """Return the text under a heading, up to the next one of its rank."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading}"
    return found[1]


def test_the_drawing_of_the_house_has_every_file() -> None:
    """No file is missing in the drawing, so that it stays the whole house."""
    drawing = DESIGN.split("```text", 1)[1].split("```", 1)[0]
    assert {name.removesuffix(".py") for name in MODULES} - set(re.findall(r"\w+", drawing)) == set()


def test_the_order_of_reading_has_files_of_the_core_and_their_length() -> None:
    """Each file of the hour is there, has no prefix but store.py's, and all are about as long as the page says."""
    text = section(DESIGN, "The core in an hour")
    items = "".join(re.findall(r"^\d+\. .*\n", text, re.MULTILINE))
    order = re.findall(r"`(\w+\.py)`(?: up to `(\w+)`)?", items)
    assert {file for file, _ in order if re.match(r"contract|guard|store_|wire|server", file)} == set()
    lines = 0
    for file, end in order:
        read, found, _ = MODULES[file].partition(f"\nclass {end}" if end else "\0")
        assert bool(found) == bool(end), f"{file} has no class {end}"
        lines += read.count("\n")
    said = int(re.findall(r"about ([\d,]+) lines", text)[0].replace(",", ""))
    assert abs(lines - said) < 0.1 * lines, f"the page says {said} lines, there are {lines}"


def test_the_changelog_begins_with_this_version() -> None:
    """The newest entry but `Unreleased` has the version of the server."""
    newest, *_ = re.findall(r"^## (?!Unreleased)(\S+)", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert newest == settings.VERSION
