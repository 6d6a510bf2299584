"""The declared form of a body: JSON sent as text, charsets, byte order marks and content codings."""

from __future__ import annotations

import encodings
import gzip
import json
import subprocess
from contextlib import suppress
from typing import Any

import httpx
import pytest
from expected import answered, http_error, invalid, naming, notification, parse
from hypothesis import given
from hypothesis import strategies as st
from processes import Server, environment, program

from bodies import _CHARSETS, UTF_8, _charset_in, _in_utf_8
from errors import InvalidRequest, UnsupportedMediaType

PATHS = ["/notify", "/notify/batch"]
WRAP: dict[str, Any] = {"/notify": lambda request: request, "/notify/batch": lambda request: [request]}


def post(server: Server, body: bytes, content_type: str, path: str = "/notify", **headers: str) -> httpx.Response:
    return server.request("POST", path, content=body, headers={"Content-Type": content_type} | headers)


# JSON sent as text.


@pytest.mark.parametrize(
    "body",
    [
        '{"message": "for you", "clients": ["alice"]}',
        ' \n{"message": 1}',
        '{"message": "x", "data": {"value": NaN}}',
        '{"message": "x", "data": {"half": "\\ud800"}}',
        '{"message": "x", "data": {"large": ' + "9" * 5000 + "}}",
        '{"message": "x", "data": ' + "[" * 100_000,
        "\ufeff" + '{"message": "for you", "topics": ["builds"]}',
        '[{"message": "for you", "clients": ["alice"]}]',
        '{"text": "for you", "clients": ["alice"]}',
        '{"msg": "for you", "topics": "builds"}',
        '{"title": "for you", "users": ["alice"]}',
        '{"message": "for you", "clients": ["alice"],}',
        '{"message": "for you", "clients": ["alice"]',
        "{'message': 'for you', 'clients': ['alice']}",
        "{message: 'for you', clients: ['alice']}",
        '{\n  // to one\n  "message": "for you"\n}',
        '{"message": "for\nyou", "topics": ["builds"]}',
        "{“message”: “for you”}",
        '{"message": "for you"}\n{"message": "and you"}',
        "'{message: for you, clients: [alice]}'",
        json.dumps('{"message": "for you", "clients": ["alice"]}'),
    ],
    ids=[
        *("addressed", "spaces", "NaN", "surrogate", "large integer", "deep", "BOM", "batch", "text and clients"),
        *("msg and topics", "users", "comma", "cut", "Python", "JavaScript", "comment", "bare newline", "typographic"),
        *("lines", "Windows' shell", "a string"),
    ],
)
def test_json_as_text_is_refused(server: Server, body: str) -> None:
    """The answer names the content type to send, and nobody gets the source text."""
    client = server.join()
    answer = post(server, body.encode()[:65_536], "text/plain;charset=UTF-8")
    assert answered(answer) == invalid("content-type", "application/json")
    server.notify("next")
    assert client.receive() == notification({"message": "next"})


@pytest.mark.parametrize(
    "text",
    [
        *('{"user": "x"}', "[1]", '{"message": ', "{message}", '"message"', "[message]", '"{a}"', "{}", "[]"),
        *('{"clients": 12, "uptime": 5.5}', '{"event": {"message": "nested"}}', "{no message: yet}"),
        *('the body was {"message": "x", "clients": ["a"]}', '[info] "message": "x"', "{{ .message }}: [x]"),
        "{topics: none, message: none}",
    ],
)
def test_other_texts_stay_texts(server: Server, text: str) -> None:
    """A text is a notification only as a whole, and with a `message` or addressees."""
    client = server.join()
    assert post(server, text.encode(), "text/plain").status_code == 200
    assert client.receive() == notification({"message": text})


def test_a_string_of_fetch_is_refused(server: Server) -> None:
    """fetch() labels a string as text by itself."""
    script = f"""
        const body = JSON.stringify({{ message: "for you", clients: ["alice"] }});
        const answer = await fetch("{server.url}/notify", {{ method: "POST", body }});
        console.log(JSON.stringify([answer.status, await answer.json()]));
    """
    command = [program("node"), "--input-type=module", "-e", script]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == [400, http_error("validation", naming("application/json"))]


def test_a_batch_is_json_also_as_text(server: Server) -> None:
    """A batch has no other form, so a string of fetch() is understood, with its addresses."""
    client = server.join("alice")
    body = b'[{"message": "for you", "clients": ["alice"]}, {"message": "for bob", "clients": ["bob"]}]'
    answer = parse(post(server, body, "text/plain;charset=UTF-8", "/notify/batch").content)
    assert [receipt["recipients"] for receipt in answer["notifications"]] == [1, 0]
    assert client.receive() == notification({"message": "for you"})


# Charsets.


@pytest.mark.parametrize(
    ("content_type", "codec"),
    [
        ("text/plain; charset=iso-8859-1", "latin-1"),
        ('TEXT/plain;format=flowed;CHARSET="ISO-8859-15"', "iso-8859-15"),
        ("text/plain; charset = Windows-1252", "cp1252"),
        ("text/plain; charset=utf-16le", "utf-16-le"),
        ("text/plain; charset=UTF-16", "utf-16"),
        ("text/plain; charset=us-ascii", "ascii"),
        ("text/plain; charset=Shift_JIS", "shift_jis"),
        ("text/plain; charset='utf8'", "utf-8"),
        ("text/plain; charset=", "utf-8"),
    ],
)
def test_a_text_is_read_in_its_charset(server: Server, content_type: str, codec: str) -> None:
    """A charset is known by all of its names."""
    text = {"ascii": "groesser", "shift_jis": "大きい"}.get(codec, "größer")
    client = server.join()
    assert post(server, text.encode(codec), content_type).status_code == 200
    assert client.receive() == notification({"message": text})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("media_type", ["application/json", "application/x-www-form-urlencoded", "text/json"])
@pytest.mark.parametrize("charset", ["utf-16", "iso-8859-1", "utf-8"])
def test_json_is_read_in_its_charset(server: Server, path: str, media_type: str, charset: str) -> None:
    """JSON, too, also in a batch."""
    client = server.join()
    body = json.dumps(WRAP[path]({"message": "größer"}), ensure_ascii=False).encode(charset)
    assert post(server, body, f"{media_type}; charset={charset}", path).status_code == 200
    assert client.receive() == notification({"message": "größer"})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("charset", ["x-unknown", "hex", "rot13", "idna", "unicode_escape", "utf-8-x", "../os"])
def test_an_unknown_charset_is_named(server: Server, path: str, charset: str) -> None:
    """A charset that Python does not know is 415, and so is a codec of Python that is none."""
    body = json.dumps(WRAP[path]({"message": "hi"})).encode()
    for media_type in ("text/plain", "application/json"):
        answer = post(server, body, f"{media_type}; charset={charset}", path)
        assert answered(answer) == (415, http_error("validation", naming("charset", charset)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("types", "status", "word"),
    [
        (["text/plain", "application/json"], 400, "one header"),
        (["application/json", "text/plain"], 400, "one header"),
        (["text/plain, application/json"], 415, "text/plain, application/json"),
        (["text/plain; charset=utf-8; charset=iso-8859-1"], 400, "one charset"),
        (["application/json; charset=latin1;charset=utf-8"], 400, "one charset"),
        (["application/json", "application/json"], 200, ""),
        (["application/json; charset=utf-8; charset=UTF-8"], 200, ""),
    ],
)
def test_a_body_has_one_form(server: Server, path: str, types: list[str], status: int, word: str) -> None:
    """Where two are declared, another reader takes the other. The same twice is one."""
    headers = [("Content-Type", one) for one in types]
    answer = server.request("POST", path, content=json.dumps(WRAP[path]({"message": "hi"})), headers=headers)
    assert answer.status_code == status
    if status != 200:
        assert parse(answer.content) == http_error("validation", naming("content-type", word))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("charset", "body"),
    [("latin-1", b"\xef\xbb\xbf[]"), ("utf-16", b"odd"), ("us-ascii", "ö".encode()), ("utf-7", b"+2AA-")],
)
@pytest.mark.parametrize("media_type", ["text/plain", "application/json"])
def test_bytes_that_are_not_of_their_charset_are_refused(
    server: Server, path: str, charset: str, body: bytes, media_type: str
) -> None:
    """Garbage is not delivered with 200."""
    answer = post(server, body, f"{media_type}; charset={charset}", path)
    assert answered(answer) == invalid("request body: not ")


@given(st.sampled_from(sorted(_CHARSETS)), st.binary(max_size=40))
def test_every_charset_gives_utf_8_or_an_error(charset: str, body: bytes) -> None:
    """No codec of Python raises anything else, or gives half a surrogate pair."""
    with suppress(InvalidRequest):
        if (name := _charset_in(f" charset={charset}")) != UTF_8:
            _in_utf_8(body, name).decode()


def test_made_up_charsets_take_no_memory() -> None:
    """Python would remember each of them for ever."""
    known = len(encodings._cache)  # type: ignore[attr-defined]
    for number in range(100):
        with pytest.raises(UnsupportedMediaType):
            _charset_in(f" charset=x-{number}")
    assert len(encodings._cache) == known  # type: ignore[attr-defined]


# Byte order marks.


@pytest.mark.parametrize(("charset", "bom"), [("utf-8", b"\xef\xbb\xbf"), ("utf-16-be", b"\xfe\xff")])
@pytest.mark.parametrize("media_type", ["text/plain", "application/json"])
def test_a_byte_order_mark_is_dropped(server: Server, charset: str, bom: bytes, media_type: str) -> None:
    """Windows writes it before text and JSON."""
    client = server.join()
    text = "größer" if media_type == "text/plain" else '{"message": "größer"}'
    label = media_type if charset == "utf-8" else f"{media_type}; charset={charset}"
    assert post(server, bom + text.encode(charset), label).status_code == 200
    assert client.receive() == notification({"message": "größer"})


def test_a_byte_order_mark_before_a_batch_is_dropped(server: Server) -> None:
    assert post(server, b'\xef\xbb\xbf[{"message": "hi"}]', "application/json", "/notify/batch").status_code == 200


def test_a_byte_order_mark_alone_is_no_message(server: Server) -> None:
    answer = post(server, b"\xef\xbb\xbf", "text/plain")
    assert answered(answer) == invalid("message")


# Content codings.


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "GZIP", "identity, gzip", "x-unknown"])
@pytest.mark.parametrize("media_type", ["text/plain", "application/json"])
def test_a_content_coding_is_refused(server: Server, path: str, coding: str, media_type: str) -> None:
    """415 says which coding is read: RFC 9110, section 15.5.16."""
    body = gzip.compress(json.dumps(WRAP[path]({"message": "hi"})).encode())
    answer = post(server, body, media_type, path, **{"Content-Encoding": coding})
    named = coding.rpartition(", ")[2]
    assert answered(answer) == (415, http_error("validation", naming("content-encoding", named)))
    assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("coding", ["identity", "Identity", "", "identity, identity"])
def test_identity_is_no_coding(server: Server, coding: str) -> None:
    assert post(server, b'{"message": "hi"}', "application/json", **{"Content-Encoding": coding}).status_code == 200


# Idempotency-Keys.


def test_the_charset_counts_for_an_idempotency_key(server: Server) -> None:
    """The same bytes in another charset are another text; the same charset by another name is the same."""

    def send(content_type: str) -> tuple[int, bool]:
        answer = post(server, "größer".encode(), content_type, **{"Idempotency-Key": "charset"})
        return answer.status_code, "Idempotent-Replayed" in answer.headers

    assert send("text/plain; charset=iso-8859-1") == (200, False)
    assert send('text/plain;charset="LATIN1"') == (200, True)
    assert send("text/plain; charset=utf-8") == send("text/plain") == (422, False)


def test_utf_8_is_the_charset_of_a_body_without_any(server: Server) -> None:
    for content_type, replayed in (("text/plain", False), ("text/plain; charset=UTF-8", True)):
        answer = post(server, b"hi", content_type, **{"Idempotency-Key": "none"})
        assert (answer.status_code, "Idempotent-Replayed" in answer.headers) == (200, replayed)


# Forms.


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", [b"payload=%7B%22text%22%3A%22hi%22%7D", b"message=disk+full", b""])
def test_the_error_of_a_form_says_what_to_send(server: Server, path: str, body: bytes) -> None:
    """Webhooks that send forms are told both content types."""
    answer = post(server, body, "application/x-www-form-urlencoded", path)
    assert answered(answer) == invalid("JSON", "form", "application/json", "text/plain")


@pytest.mark.parametrize("content_type", ["", "text/markdown", "text/html; charset=utf-8"])
def test_the_error_of_a_text_of_another_type_says_what_to_send(server: Server, content_type: str) -> None:
    """Such a body is read as JSON, and with its own label JSON needs no advice."""
    answer = post(server, b"disk full", content_type)
    assert answered(answer) == invalid("JSON", "application/json", "text/plain")
    assert "text/plain" not in post(server, b"disk full", "application/json").text


def test_an_upload_form_is_told_the_content_types(server: Server) -> None:
    """`curl -F` sends one."""
    answer = post(server, b"--x--", "multipart/form-data; boundary=x")
    assert answered(answer) == (415, http_error("validation", naming("application/json", "text/plain")))
