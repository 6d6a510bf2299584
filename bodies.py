"""The bodies of requests: read whole up to a limit, decoded as they are declared, and made into values.

Owns media types, charsets, and the texts that are no message. Knows no route and no Hub.
"""

from __future__ import annotations

import codecs
import encodings.aliases
import json
import pkgutil
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request

import schemas
from answers import ReceiveError
from errors import InvalidRequest, TooLarge, UnsupportedMediaType
from schemas import MAX_SHOWN

JSON_TYPE, FORM_TYPE, TEXT_TYPE = "application/json", "application/x-www-form-urlencoded", "text/plain"
UTF_8 = "utf-8"
# Of a batch, and of every request of an admin.
MAX_BATCH_BYTES = 1_048_576


async def body_of(request: Request, limit: int) -> bytes:
    """Return the whole body of a request.

    Raises TooLarge as soon as that is known: by Content-Length before reading any of it.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    try:
        more = True
        while more:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            part, more = message.get("body", b""), message.get("more_body", False)
            parts.append(part)
            size += len(part)
            if size > limit:
                raise _too_large(limit)
    except (ClientDisconnect, TooLarge):
        raise
    except Exception as error:
        raise ReceiveError(error) from error
    return b"".join(parts)


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"request body: larger than the limit of {limit} bytes")


class Content(NamedTuple):
    """A body in UTF-8, and its declared form: the media type, empty where none is named, and Python's charset."""

    text: bytes
    media_type: str
    charset: str


def content_of(request: Request, body: bytes, others: Collection[str] = ()) -> Content:
    """Read a body as it is declared. Raises UnsupportedMediaType, or InvalidRequest for bytes of another charset."""
    for coding in ",".join(request.headers.getlist("content-encoding")).split(","):
        if coding.strip().lower() not in ("", "identity"):
            # RFC 9110, section 15.5.16.
            text = f"content-encoding: expected identity, got {coding.strip()[:MAX_SHOWN]!r}"
            raise UnsupportedMediaType(text, {"Accept-Encoding": "identity"})
    if len(types := set(request.headers.getlist("content-type"))) > 1:
        raise InvalidRequest("content-type: expected one header, got several")
    media_type, _, parameters = "".join(types).partition(";")
    media_type = media_type.strip().lower()
    known = (
        media_type in ("", JSON_TYPE, FORM_TYPE, *others)
        or media_type.startswith("text/")
        or media_type.endswith("+json")
    )
    if not known or "," in media_type:
        text = f"content-type: expected {JSON_TYPE} or {TEXT_TYPE}, got {media_type[:MAX_SHOWN]!r}"
        raise UnsupportedMediaType(text)
    charset = _charset_in(parameters) if parameters else UTF_8
    in_utf_8 = body if charset == UTF_8 else _in_utf_8(body, charset)
    return Content(in_utf_8.removeprefix(codecs.BOM_UTF8), media_type, charset)


_CHARSET = re.compile(r"(?:^|;)\s*charset\s*=\s*[\"']?([^\s\"';]+)", re.IGNORECASE)
# The codecs that are no charset: between bytes and bytes, or for Python's own use.
_NO_CHARSETS = {
    *("base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "rot_13", "uu_codec", "zlib_codec"),
    *("aliases", "charmap", "idna", "mbcs", "oem", "punycode", "raw_unicode_escape", "undefined", "unicode_escape"),
}
# Python remembers every unknown name that it is asked for, so it is asked for these alone.
_CHARSETS = {
    name
    for name in (*encodings.aliases.aliases, *(module.name for module in pkgutil.iter_modules(encodings.__path__)))
    if encodings.aliases.aliases.get(name, name) not in _NO_CHARSETS
}


def _charset_in(parameters: str) -> str:
    """Return Python's name of the charset in the parameters of a content type.

    Raises UnsupportedMediaType, or InvalidRequest for several.
    """
    if not (found := set(map(str.lower, _CHARSET.findall(parameters)))):
        return UTF_8
    if len(found) > 1:
        raise InvalidRequest("content-type: expected one charset, got several")
    [given] = found
    name = encodings.normalize_encoding(given)
    try:
        if name in _CHARSETS:
            return codecs.lookup(name).name
    except LookupError:
        # A charset of another platform.
        pass
    raise UnsupportedMediaType(f"content-type: unknown charset {given[:MAX_SHOWN]!r}")


def _in_utf_8(body: bytes, charset: str) -> bytes:
    if body.startswith(codecs.BOM_UTF8) and not charset.startswith(UTF_8):
        raise InvalidRequest(f"request body: not {charset}, but UTF-8 by its byte order mark")
    try:
        return body.decode(charset).encode()
    except UnicodeError:
        raise InvalidRequest(f"request body: not valid {charset}") from None


def text_in(content: Content) -> schemas.NotifyRequest:
    try:
        text = content.text.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("message: not valid UTF-8") from None
    if _is_json_of_requests(text):
        raise InvalidRequest(f"content-type: the text is a notification in JSON; send it as {JSON_TYPE}")
    plain: schemas.NotifyRequest = schemas.check({"message": text}, schemas.NotifyRequest)
    return plain


# A field with a value that can be text or a list, in JSON, in JSON within a string, and in the notations of programs.
# Without quotes a name stands right at the beginning of a field.
_NEARLY_JSON = re.compile(r"\s*[\"']?\s*(?:\[\s*)?\{")
_FIELD = re.compile(r"(?:[{,]\s*|[\"'“”])(?:message|clients|topics|users)\\?[\"'“”]?\s*:\s*\\?[\"'“”\[]")


def _is_json_of_requests(text: str) -> bool:
    """Whether a text is a notification in JSON, or several, maybe with a slip: as a message it would go to everyone.

    A browser's fetch() labels every string as text. Python's reader refuses less than orjson.
    """
    if not _NEARLY_JSON.match(text):
        return False
    try:
        value = json.loads(text, parse_int=float)
    except RecursionError:
        return True
    except ValueError:
        return _FIELD.search(text) is not None
    return any(map(_is_request, value if isinstance(value, list) else [value]))


def _is_request(value: Any) -> bool:
    """Whether plain values are meant for POST /notify: other JSON is a text like any, also with a number of clients."""
    if isinstance(value, str):
        return _is_json_of_requests(value)
    return isinstance(value, dict) and (
        "message" in value or any(isinstance(value.get(name), list | str) for name in ("clients", "topics", "users"))
    )


def json_in(content: Content, kind: Any) -> Any:
    try:
        return schemas.decode(content.text, kind)
    except InvalidRequest as error:
        is_json = content.media_type == JSON_TYPE or content.media_type.endswith("+json")
        if is_json or not error.message.startswith("Invalid JSON"):
            raise
        advice = f"send JSON as {JSON_TYPE}, or to /notify a message as {TEXT_TYPE}"
        if content.media_type == FORM_TYPE:
            advice = f"a form is not read; {advice}"
        raise InvalidRequest(f"{error.message} ({advice})") from None
