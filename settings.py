"""Every setting, declared once.

`--help` (flags.py), the `NOTIFYD_*` variables, the checks, the README's table and `/status` all come from the one
Struct below. A flag goes before a variable, a variable before the default. A bad value raises SettingsError, whose
text is one line for the user and names the flag or variable as given.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta, Struct

VERSION = "0.1.0"
PREFIX = "NOTIFYD_"
# No settings of a server: the commands beside serving read them.
URL_VARIABLE, KEY_VARIABLE = f"{PREFIX}URL", f"{PREFIX}KEY"

# A shorter interval would keep the event loop busy with nothing else.
LEAST_SECONDS = 0.01
_LISTS = ("allow_origin", "api_key", "host", "internal_host", "jwt_algorithms", "trusted_proxies")
_SECRETS = ("api_key", "jwt_secret", "ssl_keyfile_password", "store")
Seconds = Annotated[float, Meta(ge=0, le=31_536_000)]
Positive = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Hosts = tuple[Annotated[str, Meta(min_length=1)], ...]

# Kubernetes injects NOTIFYD_PORT=tcp://10.0.0.1:8000 for a service called notifyd (and siblings of these forms), and
# NOTIFYD_INTERNAL_PORT for one called notifyd-internal.
_KUBERNETES = re.compile(rf"{PREFIX}(INTERNAL_)?(PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?|SERVICE_(HOST|PORT(_\w+)?))\Z")
_STORE = re.compile(r"(auto|memory|sqlite:.+|(rediss?(\+sentinel|\+cluster)?|unix)://.+)\Z", re.DOTALL)
_API_KEY = re.compile(r"[\w.@-]{1,64}:[!-~]+\Z", re.ASCII)
# Without a user and a password: the fetch of the keys would ignore them, and the log would show them.
_URL = re.compile(r"(https?://(?![^/?#]*@)[!-~]+)?\Z", re.IGNORECASE)
# RFC 7518, section 3.2: as long as the digest. A shorter secret can be guessed from any token.
LEAST_SECRET_BYTES = 32
ALGORITHMS = frozenset(f"{kind}{bits}" for kind in ("HS", "RS", "PS", "ES") for bits in (256, 384, 512)) | {
    "ES256K",
    "EdDSA",
}
# The first label of a host may be a *. The scheme of a packaged app may stand without a host. A page without an origin
# sends "null": a page in a sandbox, for example.
_HOST = r"(?:(?:\*\.)?[\w.~%-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?"
_ORIGIN = re.compile(
    rf"((?:https?://{_HOST}|(?!https?:)[a-z][a-z0-9+.-]*://(?:{_HOST})?)(?=/?\Z)|(?:null|\*)\Z)",
    re.IGNORECASE | re.ASCII,
)
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class SettingsError(Exception):
    """A setting that the server cannot start with; its text is one line for the user."""


@contextlib.contextmanager
def extra(name: str, source: str) -> Iterator[None]:
    """Import packages of an extra of the distribution. Raises SettingsError for a missing package, with the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SettingsError(f"{source}: needs {error.name}; pip install 'notifyd-server[{name}]'") from None


class Settings(Struct, frozen=True, kw_only=True):
    """The settings of one server. Durations are seconds, sizes are bytes. Raises SettingsError for a bad value."""

    host: Annotated[
        Hosts,
        Meta(
            min_length=1,
            description="address or name to listen on; `::` takes IPv4 too, unless an IPv4 address is named beside it; "
            "may be repeated",
        ),
    ] = ("127.0.0.1",)
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    workers: Annotated[int, Meta(ge=1, le=256, description="processes that serve")] = 1
    store: Annotated[
        str,
        Meta(
            description="log and registry that processes share: memory (one process), sqlite:PATH (one machine), "
            "redis://HOST:PORT (many; also redis+sentinel and redis+cluster); auto: memory, or with several workers "
            "sqlite in a temporary file"
        ),
    ] = "auto"
    store_prefix: Annotated[str, Meta(min_length=1, max_length=64, description="prefix of every key in Redis")] = (
        "{notifyd}:"
    )
    store_replicas: Annotated[
        int,
        Meta(ge=0, le=100, description="replicas of Redis that must have a notification before it is delivered"),
    ] = 0
    store_timeout: Annotated[float, Meta(ge=0.1, le=60, description="seconds within which the store must answer")] = 2
    console: Annotated[
        bool, Meta(description="show browsers a page at /; it is public, and asks for a key where one is needed")
    ] = True
    debug: Annotated[
        bool, Meta(description="log at level DEBUG, overriding log_level; shown in /metrics and /status")
    ] = False
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        Meta(description="lowest level that is logged"),
    ] = "INFO"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="form of the log: lines for people, or an object on each line")
    ] = "text"
    access_log: Annotated[
        bool, Meta(description="log a line for each request and handshake, at level INFO, without its query")
    ] = False
    notification_interval: Annotated[
        Seconds, Meta(description="seconds between test notifications, at least 0.01; 0: off")
    ] = 10
    max_connections: Annotated[Positive, Meta(description="clients connected at once, at most")] = 1000
    on_duplicate: Annotated[
        Literal["refuse", "replace"],
        Meta(description="when a connected client_id connects again: refuse the new client, or replace the old"),
    ] = "refuse"
    compression: Annotated[
        Literal["off", "auto"],
        Meta(
            description="compress notifications of 200 bytes and more for clients that offer to take it (auto), or not"
        ),
    ] = "off"
    ping_interval: Annotated[Seconds, Meta(description="seconds between pings to a client, at least 0.01; 0: off")] = 30
    ping_timeout: Annotated[
        float, Meta(ge=1, le=31_536_000, description="seconds of silence after which a client is closed")
    ] = 60
    keep_alive_timeout: Annotated[
        float,
        Meta(
            ge=1,
            le=31_536_000,
            description="seconds for which an idle HTTP connection is kept; above the 60 of most load balancers",
        ),
    ] = 75
    shutdown_timeout: Annotated[
        Seconds, Meta(description="seconds for clients to leave during a drain; 0: close them at once")
    ] = 1800
    drain_rate: Annotated[
        Positive, Meta(description="clients told, and clients closed, per second during a drain, at most")
    ] = 1000
    history_size: Annotated[
        Positive, Meta(description="notifications kept for resume and for clients with a backlog")
    ] = 1000
    history_ttl: Annotated[
        float,
        Meta(ge=LEAST_SECONDS, le=31_536_000, description="seconds for which a notification is kept, at most"),
    ] = 300
    history_bytes: Annotated[Positive, Meta(description="bytes of notifications kept, at most")] = 67_108_864
    cache_bytes: Annotated[
        Positive,
        Meta(
            description="memory for the newest of them in each process on a shared store, in bytes; the store has the "
            "rest"
        ),
    ] = 67_108_864
    max_message_size: Annotated[
        Positive, Meta(description="bytes of a request body or a message, at most, in both directions")
    ] = 65_536
    publish_over_websocket: Annotated[
        bool,
        Meta(
            description="let every client publish, at any rate, on a server without authentication; with keys and "
            "tokens their rights count"
        ),
    ] = False
    api_key: Annotated[
        tuple[str, ...], Meta(description="NAME:SECRET with every right; may be repeated; see api_key_file")
    ] = ()
    api_key_file: Annotated[str, Meta(description="file with one NAME:SECRET per line, and # comments")] = ""
    jwt_secret: Annotated[str, Meta(description="HMAC secret of tokens, at least 32 bytes; best in the variable")] = ""
    jwt_public_key: Annotated[str, Meta(description="PEM file with the public key of tokens")] = ""
    jwks_url: Annotated[str, Meta(description="URL of the public keys of tokens (a JSON Web Key Set)")] = ""
    jwt_audience: Annotated[str, Meta(description="`aud` that tokens must have; none: tokens must have none")] = ""
    jwt_issuer: Annotated[str, Meta(description="`iss` that tokens must have; none: any")] = ""
    jwt_user_claim: Annotated[str, Meta(min_length=1, description="claim of tokens that holds the user")] = "sub"
    revocation_ttl: Annotated[
        float,
        Meta(
            ge=1,
            le=31_536_000,
            description="seconds for which a revocation of tokens is kept; no less than tokens are valid for",
        ),
    ] = 86_400
    jwt_algorithms: Annotated[
        tuple[str, ...],
        Meta(description="algorithms allowed for tokens, such as RS256,ES256; none: those of the key"),
    ] = ()
    internal_port: Annotated[
        int,
        Meta(
            ge=0,
            le=65535,
            description="separate port for /metrics, /metrics/prometheus, /status, /clients, /users and /topics; they "
            "are then 404 on the main port; 0: off",
        ),
    ] = 0
    internal_host: Annotated[Hosts, Meta(min_length=1, description="address of internal_port; may be repeated")] = (
        "127.0.0.1",
    )
    ssl_certfile: Annotated[
        str, Meta(description="PEM file of the certificate and its chain: serve TLS; SIGHUP reads it again")
    ] = ""
    ssl_keyfile: Annotated[str, Meta(description="PEM file of the key, if not in ssl_certfile")] = ""
    ssl_keyfile_password: Annotated[str, Meta(max_length=1024, description="password of the key, if it has one")] = ""
    rate_limit: Annotated[
        bool, Meta(description="limit each address to 5 handshakes (10 at once) and 10 requests (20 at once) a second")
    ] = False
    trusted_proxies: Annotated[
        tuple[str, ...],
        Meta(
            description="address or network of a proxy to believe X-Forwarded-For from; unix: any peer on a Unix "
            "socket; may be repeated"
        ),
    ] = ()
    max_connections_per_ip: Annotated[
        int,
        Meta(ge=0, le=1_000_000_000, description="clients of one address connected at once, at most; 0: no limit"),
    ] = 0
    max_connections_per_user: Annotated[
        int,
        Meta(ge=0, le=1_000_000_000, description="clients of one user connected at once, at most; 0: no limit"),
    ] = 0
    ipv6_prefix: Annotated[
        int,
        Meta(ge=1, le=128, description="bits of an IPv6 address that name a subscriber, for all limits of an address"),
    ] = 64
    loop: Annotated[
        Literal["auto", "uvloop", "asyncio"], Meta(description="event loop; auto: uvloop where it is installed")
    ] = "auto"
    allow_origin: Annotated[
        tuple[str, ...],
        Meta(
            description="origin of pages that may connect, such as https://example.com, https://*.example.com or "
            "capacitor://localhost; null: pages without one; *: any; may be repeated"
        ),
    ] = ()

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            given = value if isinstance(value, _Given) else _Given(name, value, strict=True)
            msgspec.structs.force_setattr(self, name, _checked(name, given))
            if name == "store_replicas" and self.store_replicas and "://" not in self.store:
                raise SettingsError(f"{given.source}: only a store in Redis has replicas")
        if self.debug:
            # /status shows log_level: keep it true.
            msgspec.structs.force_setattr(self, "log_level", "DEBUG")

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__ if name not in _SECRETS)
        return f"Settings({', '.join(shown)})"


_TYPES = {field.name: field.type for field in msgspec.structs.fields(Settings)}


class _Given(NamedTuple):
    """A value with the flag, variable or field that gave it. The text of a flag or variable is not `strict`."""

    source: str
    value: Any
    strict: bool = False


def _is_proxy(text: str) -> bool:
    try:
        return text == "unix" or bool(ipaddress.ip_network(text))
    except ValueError:
        return False


def is_secret(name: str, value: Any) -> bool:
    """Whether the value of a setting is a secret, or holds one."""
    return name in _SECRETS and (name != "store" or "@" in value or "password" in value)


def is_origin(text: str) -> bool:
    """Whether --allow-origin takes a text."""
    return _ORIGIN.match(text) is not None


def is_api_key(text: str) -> bool:
    """Whether a text is NAME:SECRET."""
    return _API_KEY.match(text) is not None


_INTERVAL = (lambda seconds: not 0 < seconds < LEAST_SECONDS, f"0 or a number >= {LEAST_SECONDS}")
_HOSTS = (lambda hosts: not any("," in host for host in hosts), "addresses or names")
# The checks that no type expresses, each with the words of its error.
_CHECKS: dict[str, tuple[Callable[[Any], object], str]] = {
    "host": _HOSTS,
    "internal_host": _HOSTS,
    "notification_interval": _INTERVAL,
    "ping_interval": _INTERVAL,
    "store": (
        _STORE.match,
        "auto, memory, sqlite:PATH, redis://HOST:PORT, redis+sentinel://... or redis+cluster://...",
    ),
    "api_key": (
        lambda keys: all(map(is_api_key, keys)),
        "NAME:SECRET, a secret without spaces (best in --api-key-file)",
    ),
    "jwt_secret": (
        lambda secret: not 0 < len(secret.encode()) < LEAST_SECRET_BYTES,
        f"{LEAST_SECRET_BYTES} bytes or more",
    ),
    "jwks_url": (_URL.match, "a URL without a user and a password, such as https://login.example.com/jwks.json"),
    "jwt_algorithms": (ALGORITHMS.issuperset, f"some of {', '.join(sorted(ALGORITHMS))}"),
    "trusted_proxies": (lambda texts: all(map(_is_proxy, texts)), "addresses, networks such as 10.0.0.0/8, or unix"),
    "allow_origin": (
        lambda texts: all(map(is_origin, texts)),
        "origins such as https://example.com or https://*.example.com, null, or *",
    ),
}


def _checked(name: str, given: _Given) -> Any:
    """Return the value of a setting in its type. The error shows no secret."""
    source, value, strict = given
    fits, expected = _CHECKS.get(name, (lambda _: True, ""))
    try:
        text = value.upper() if name == "log_level" and isinstance(value, str) else value
        checked = msgspec.convert(text, _TYPES[name], strict=strict)
        if fits(checked):
            return tuple(map(named_origin, checked)) if name == "allow_origin" else checked
    except msgspec.ValidationError as error:
        expected = _expected(name, error)
    got = "" if name in (*_SECRETS, "jwks_url") else f", got {value!r:.100}"
    is_comma_list = name in _LISTS and source.startswith("--") and any("," in text for text in value)
    raise SettingsError(f"{source}: expected {expected}{got}{'; repeat the flag for each' * is_comma_list}")


def named_origin(text: str) -> str:
    """Return the origin in a text that is_origin(), without a slash at the end."""
    found = _ORIGIN.match(text)
    assert found
    return normal_origin(found[1])


def normal_origin(origin: str) -> str:
    """Return an origin as browsers write it: in lower case, without the default port of its scheme."""
    scheme, separator, host = origin.lower().partition("://")
    return scheme + separator + host.removesuffix(_DEFAULT_PORTS.get(scheme, ""))


def number(seconds: float) -> int | float:
    """Return the seconds as they are shown: a whole number as an integer."""
    return int(seconds) if float(seconds).is_integer() else seconds


def dashed(name: str) -> str:
    """Return the name of a setting as its flag has it."""
    return name.replace("_", "-")


def given(flags: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that flags, as they are parsed, and variables give to settings, with warnings for the log.

    Nothing is checked before a value is a setting.
    """
    found, warnings = _variables(environ)
    for name in Settings.__struct_fields__:
        if (value := flags.get(name)) is not None:
            value = _split(",".join(value)) if name == "jwt_algorithms" else value
            found[name] = _Given(f"--{dashed(name)}", value)
    return found, warnings


def from_environ(environ: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """Read the settings from the variables alone, for an app that another server runs."""
    variables, warnings = _variables(environ)
    return Settings(**variables), warnings


def _variables(environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    known = {PREFIX + name.upper(): name for name in Settings.__struct_fields__}
    found: dict[str, Any] = {}
    warnings = []
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable in (URL_VARIABLE, KEY_VARIABLE):
            continue
        if _KUBERNETES.match(variable) and (variable not in known or value.startswith("tcp://")):
            if variable in known:
                warnings.append(f"{variable}={value} is ignored: it looks injected by Kubernetes; use the flag")
        elif variable not in known:
            warnings.append(f"{variable} is unknown and ignored")
        else:
            name = known[variable]
            found[name] = _Given(variable, _split(value) if name in _LISTS else value)
    return found, warnings


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(",") if part.strip()]


_PLAIN = {
    "`str` of length >= 1": "a text that is not empty",
    "`array` of length >= 1": "a list that is not empty",
    "`int`": "an integer",
    "`float`": "a number",
    "`bool`": "true or false",
    "`str`": "a text",
    "`array`": "a list",
}


def _expected(name: str, error: msgspec.ValidationError) -> str:
    """Turn msgspec's "Expected `int` <= 65535, got `str`" into "an integer <= 65535"."""
    text = str(error).split(" - at ")[0].split(", got")[0].removeprefix("Expected ")
    if text.startswith("Invalid enum value"):
        choices, *_ = get_args(_TYPES[name])
        text = f"one of {', '.join(get_args(choices))}"
    for spelled, plain in _PLAIN.items():
        text = text.replace(spelled, plain)
    return text
