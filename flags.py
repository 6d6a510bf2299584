"""The flags: the command line that serves, made from the settings.

Owns the parser with its `--help`, and the words of its errors. A value stays as it was given, for settings.py to check.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from settings import PREFIX, VERSION, Settings, SettingsError, dashed, given


def load(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Settings, list[str], str]:
    """Read the settings from the command line and the variables.

    Returns them with warnings for the log, and the contract to print in the place of serving: openapi, asyncapi, or
    none. Raises SettingsError, or SystemExit after --help and --version.
    """
    flags = vars(parser().parse_args(list(argv)))
    values, warnings = given(flags, environ)
    return Settings(**values), warnings, flags["print_contract"]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise SettingsError: the user sees one line instead of a page of usage."""
        raise SettingsError(f"{message.removeprefix('argument ')} (--help shows every flag)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Name an unknown flag without its value: that may be a secret."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            self.error(f"unrecognized arguments: {name if name.startswith('--') or unknown[0] == args[0] else '...'}")
        return parsed


def parser() -> Parser:
    """Return the parser of the command line that serves."""
    parser = Parser(
        prog="notifyd",
        description="A WebSocket notification server: POST /notify, and every connected client knows at once. "
        "Commands: notifyd publish, listen, token and check; each has its own --help.",
        epilog=f"Each flag has a variable: --max-connections is {PREFIX}MAX_CONNECTIONS. A flag goes before it.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"notifyd {VERSION}")
    printing = parser.add_mutually_exclusive_group()
    for name, what in (("openapi", "routes, in OpenAPI 3.1"), ("asyncapi", "messages, in AsyncAPI 3.0")):
        text = f"print the contract of the {what}, with these settings, and end"
        printing.add_argument(
            f"--print-{name}", action="store_const", dest="print_contract", const=name, default="", help=text
        )
    add_flags(parser, Settings.__struct_fields__)
    return parser


def add_flags(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Add the flags of these settings."""
    for field in msgspec.inspect.type_info(Settings).fields:  # type: ignore[attr-defined]
        kind, description = field.type, ""
        while isinstance(kind, msgspec.inspect.Metadata):
            description = (kind.extra_json_schema or {}).get("description", description)
            kind = kind.type
        if field.name in names:
            _add_flag(parser, field.name, kind, description, field.default)


def _add_flag(
    parser: argparse.ArgumentParser, name: str, kind: msgspec.inspect.Type, description: str, default: Any
) -> None:
    """Add the flag of one setting; its value stays a string, for the Struct to check."""
    flag = f"--{dashed(name)}"
    shown = (", ".join(default) if isinstance(default, tuple) else str(default)) or "none"
    text = f"{description} (default: {shown})".replace("%", "%%")
    if isinstance(kind, msgspec.inspect.BoolType):
        parser.add_argument(flag, action=_OnceTrueOrFalse, default=None, help=text)
    elif isinstance(kind, msgspec.inspect.VarTupleType):
        parser.add_argument(flag, action="append", metavar=name.rpartition("_")[2].upper(), help=text)
    elif isinstance(kind, msgspec.inspect.LiteralType):
        parser.add_argument(flag, action=Once, metavar="|".join(map(str, kind.values)), help=text)
    else:
        metavar = "TEXT" if isinstance(kind, msgspec.inspect.StrType) else "N"
        parser.add_argument(flag, action=Once, metavar=metavar, help=text)


class Once(argparse.Action):
    """Take one value. A second one is refused: the first would be ignored in silence."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, _: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{self.option_strings[0]}: expected one value, got several")
        setattr(namespace, self.dest, values)


class _OnceTrueOrFalse(argparse.BooleanOptionalAction):
    """Take the flag or its opposite, once."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, given: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{self.option_strings[0]}: expected one value, got several")
        super().__call__(parser, namespace, values, given)
