"""The commands beside serving: publish, listen, token and check.

Owns their flags, the signing of a token, and the exit statuses: 0 for done, 1 for refused or unreachable, 2 for misuse.
An error is one line on stderr. notifyd.py imports this where the first word of the command line has no dash.

    notifyd publish "disk full" --type alert --topic builds
    notifyd listen --topics builds
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import orjson

import flags
from command_client import Api, Lines, ReaderGone, Refused, at_time, complain, follow, is_url, publish, write
from errors import InvalidRequest
from flags import Once, Parser
from schemas import USER, check, stripped
from settings import KEY_VARIABLE, URL_VARIABLE, Settings, SettingsError, extra, given

DEFAULT_URL = "http://localhost:8000"
# More is no message, however it is encoded: the server refuses messages of more than 8,192 characters.
MAX_INPUT_BYTES = 65_536
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(\d{1,6})([smhd])\Z", re.ASCII)
# Visible characters alone, as a header may have them.
_KEY = re.compile(r"[!-~]+\Z")
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z", re.IGNORECASE)
TOKEN_SETTINGS = ("jwt_secret", "jwt_algorithms", "jwt_audience", "jwt_issuer", "jwt_user_claim")

Arguments = argparse.Namespace


def run(argv: list[str], environ: Mapping[str, str]) -> int:
    """Run the command that the first word names, and return the exit status. Raises SettingsError for a misuse."""
    _prepare_streams()
    arguments = parser().parse_args(argv)
    arguments.environ = environ
    try:
        status: int = arguments.act(arguments)
        return status
    except Refused as refusal:
        complain(str(refusal))
        return 1
    except ReaderGone:
        return 0


def _prepare_streams() -> None:
    """Open the standard streams that a shell has closed, lest a socket takes their place, and write UTF-8."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, os.O_RDWR), mode))  # noqa: SIM115 - open until the end
    # As JSON is, whatever the locale.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def parser() -> Parser:
    """Return the parser of the whole command line, with the flags that serve."""
    whole = flags.parser()
    commands = whole.add_subparsers(title="commands", dest="command", metavar="publish|listen|token|check")
    _add_publish(_command(commands, "publish", _publish, "publish a notification, or one a line"))
    _add_listen(_command(commands, "listen", _listen, "print notifications as they come, and resume by itself"))
    _add_token(_command(commands, "token", _token, "sign a token with --jwt-secret, for development"))
    _add_check(_command(commands, "check", _check, "check the settings that serve, their files, the store, the port"))
    return whole


def _command(commands: Any, name: str, act: Any, description: str) -> Parser:
    command: Parser = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
    command.set_defaults(act=act)
    # The others take these too, so that a script may give them to each command, and have no use for them.
    asks = act in (_publish, _listen)
    text = f"a server, under its prefix if it has one (default: {URL_VARIABLE}, or {DEFAULT_URL})"
    command.add_argument("--url", action=Once, metavar="URL", help=text if asks else argparse.SUPPRESS)
    text = f"API key or token; best in {KEY_VARIABLE}, because lists of processes show flags"
    command.add_argument("--key", action=Once, metavar="TEXT", help=text if asks else argparse.SUPPRESS)
    return command


# --- what flags mean


def _api(arguments: Arguments) -> Api:
    """Return the server that a command is for. Raises SettingsError; its text has no part of a key."""
    named: list[tuple[str, str]] = []
    for flag, variable in (("url", URL_VARIABLE), ("key", KEY_VARIABLE)):
        value = getattr(arguments, flag)
        named.append((f"--{flag}", value) if value is not None else (variable, arguments.environ.get(variable, "")))
    (url_source, url), (key_source, key) = named
    url, key = url.strip() or DEFAULT_URL, key.strip()
    if not is_url(url):
        raise SettingsError(f"{url_source}: expected a URL such as {DEFAULT_URL}, without a user and a query")
    if key and not _KEY.match(key):
        raise SettingsError(f"{key_source}: expected a key or token without spaces")
    return Api(url, key)


def duration(text: str) -> int:
    """Return the seconds of a duration such as 90s, 10m, 1h or 7d."""
    if (found := _DURATION.match(text)) is None or not (seconds := int(found[1]) * _SECONDS[found[2]]):
        raise argparse.ArgumentTypeError("expected a duration such as 90s, 10m, 1h or 7d")
    return seconds


def _object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("expected a JSON object")
    return value


def _since(text: str) -> str:
    """Return the position of an id or of a time ago."""
    return text.lower() if _ID.match(text) else at_time(time.time() - duration(text))


def _names(lists: list[str] | None) -> list[str]:
    """Return the names of a flag that takes comma lists, and may be repeated."""
    return [name for name in stripped(",".join(lists or ()).split(",")) if name]


def _add_topics(command: Parser, names: tuple[str, ...], what: str) -> None:
    text = f"{what}, separated by commas; may be repeated"
    command.add_argument(*names, action="append", metavar="NAMES", help=text)


# --- publish


def _add_publish(command: Parser) -> None:
    command.add_argument("message", nargs="?", help="the message; - reads it from standard input")
    text = "publish each line of standard input that is not blank, as it comes"
    command.add_argument("--lines", action="store_true", help=text)
    command.add_argument("--type", action=Once, metavar="TEXT", help="the notification's type (default: custom)")
    command.add_argument("--data", action=Once, type=_object, metavar="JSON", help="the notification's data, an object")
    _add_topics(command, ("--topic", "--topics"), "for the subscribers of these topics")
    for flag, what in (("--user", "for every client of this user"), ("--client", "for the client with this id")):
        command.add_argument(flag, action="append", metavar="NAME", help=f"{what}; may be repeated")


def _publish(arguments: Arguments) -> int:
    fields = {
        "type": arguments.type,
        "data": arguments.data,
        "topics": _names(arguments.topic),
        "users": arguments.user,
        "clients": arguments.client,
    }
    # An empty topic must not make the notification one for everyone.
    wanted = {name: value for name, value in fields.items() if value is not None and (value or name != "topics")}
    if arguments.topic and not fields["topics"]:
        raise SettingsError("--topic: expected a name")
    if arguments.lines:
        if arguments.message not in (None, "-"):
            raise SettingsError("--lines: expected no message: the lines are read from standard input")
        return Lines(_api(arguments), wanted).publish(sys.stdin.fileno())
    if arguments.message is None:
        raise SettingsError("publish: expected a message, or - for standard input")
    message = _input() if arguments.message == "-" else arguments.message
    try:
        message.encode()
    except UnicodeEncodeError:
        raise SettingsError("publish: expected a message in UTF-8") from None
    publish(_api(arguments), {"message": message, **wanted})
    return 0


def _input() -> str:
    """Return standard input without the newline at its end."""
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise SettingsError(f"standard input: expected one message, got more than {MAX_INPUT_BYTES} bytes; see --lines")
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise SettingsError("standard input: expected UTF-8") from None


# --- listen


def _add_listen(command: Parser) -> None:
    _add_topics(command, ("--topics", "--topic"), "also notifications for these topics")
    for flag, what in (("--user", "also notifications for this user"), ("--client-id", "the name of this connection")):
        command.add_argument(flag, action=Once, metavar="NAME", help=what)
    text = "begin with the notifications after this id, or with those of the last 10m, 1h or 7d"
    command.add_argument("--since", action=Once, type=_since, metavar="ID|DURATION", help=text)


def _listen(arguments: Arguments) -> int:
    # Ctrl+C ends it; while the modules loaded, it ended the process at once.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    wanted = {"topics": ",".join(_names(arguments.topics)), "user": arguments.user, "client_id": arguments.client_id}
    return follow(_api(arguments), {name: value for name, value in wanted.items() if value}, arguments.since or "")


# --- token


def _add_token(command: Parser) -> None:
    command.add_argument("--sub", action=Once, metavar="USER", help="the user; without it the clients belong to nobody")
    _add_topics(command, ("--topics", "--topic"), "topics that the client may subscribe to, such as team.*")
    _add_topics(command, ("--subscribe",), "topics that the client is subscribed to at once")
    command.add_argument("--publish", action="store_true", help="may publish everything")
    _add_topics(command, ("--publish-topics",), "topics that it may publish to")
    command.add_argument(
        "--admin", action="store_true", help="may see the clients and the figures, and put clients out"
    )
    text = "the time for which it is valid, such as 90s, 10m, 1h or 7d (default: 1h)"
    command.add_argument("--expires", action=Once, type=duration, metavar="DURATION", help=text)
    flags.add_flags(command, TOKEN_SETTINGS)


def _token(arguments: Arguments) -> int:
    values, _ = given(vars(arguments), arguments.environ)
    of_tokens = Settings(**{name: value for name, value in values.items() if name in TOKEN_SETTINGS})
    if not of_tokens.jwt_secret:
        raise SettingsError("--jwt-secret: expected the secret of the server's tokens; best in NOTIFYD_JWT_SECRET")
    with extra("jwt", "token"):
        import jwt  # noqa: PLC0415 - the only command that needs it

        from guard_tokens import Claims, tokens_of  # noqa: PLC0415

    tokens_of(of_tokens)  # As the server does: the algorithms must fit.
    claims = _claims(arguments, of_tokens)
    if not USER.match(claims.get(of_tokens.jwt_user_claim, "")):
        raise SettingsError("--sub: expected 1 to 255 characters, none of them a control character")
    try:
        check(claims, Claims)
    except InvalidRequest as error:
        raise SettingsError(f"token: {error.message}") from None
    algorithm = next((name for name in of_tokens.jwt_algorithms if name.startswith("HS")), "HS256")
    write(jwt.encode(claims, of_tokens.jwt_secret, algorithm))
    return 0


def _claims(arguments: Arguments, of_tokens: Settings) -> dict[str, Any]:
    now = int(time.time())
    claims = {
        of_tokens.jwt_user_claim: arguments.sub,
        "topics": _names(arguments.topics),
        "subscribe": _names(arguments.subscribe),
        "publish": arguments.publish or _names(arguments.publish_topics),
        "admin": arguments.admin,
        "aud": of_tokens.jwt_audience,
        "iss": of_tokens.jwt_issuer,
        "iat": now,
        "exp": now + (arguments.expires or _SECONDS["h"]),
    }
    return {name: value for name, value in claims.items() if value}


# --- check


def _add_check(command: Parser) -> None:
    flags.add_flags(command, Settings.__struct_fields__)


def _check(arguments: Arguments) -> int:
    from command_check import findings  # noqa: PLC0415 - needs the packages that serve

    values, warnings = given(vars(arguments), arguments.environ)
    # A missing package is found by several checks.
    found = dict.fromkeys(findings(values, warnings))
    for finding in found:
        write(str(finding))
    if not found:
        complain("nothing is wrong or odd")
    return int(any(finding.is_wrong for finding in found))
