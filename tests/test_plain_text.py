"""Plain text: a shell script publishes a text without any quoting."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import httpx
import pytest
from expected import UUID7, answered, invalid, notification, parse
from processes import Server

FORM = "application/x-www-form-urlencoded"  # The default of `curl -d`.
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


def post(server: Server, body: str | bytes, content_type: str | None) -> httpx.Response:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return server.request("POST", "/notify", content=body, headers=headers)


def curl(server: Server, *arguments: str) -> Any:
    """Run `curl arguments URL/notify` and return the parsed answer."""
    command = ["curl", "--silent", "--show-error", "--max-time", "10", "--noproxy", "*", *arguments]
    done = subprocess.run([*command, f"{server.url}/notify"], capture_output=True, timeout=15, check=True)
    return parse(done.stdout)


# Text.


@needs_curl
def test_the_line_of_curl_works_as_written(server: Server) -> None:
    """The body is the message, and the answer says how it was understood."""
    client = server.join()
    answer = curl(server, "-d", "disk full", "-H", "Content-Type: text/plain")
    assert answer["notification"] == {"message": "disk full", "type": "custom", "data": {}}
    assert client.receive() == notification({"message": "disk full"})


@pytest.mark.parametrize("content_type", ["text/plain", "text/plain; charset=utf-8", "TEXT/PLAIN"])
@pytest.mark.parametrize(
    "text",
    ["disk full", "a", "größer 🙂", '{"user": "not read"}', '"', "null", " two\nlines\n", "a=b&c", "x" * 8192],
)
def test_a_plain_text_is_the_message_to_the_letter(server: Server, content_type: str, text: str) -> None:
    """A plain text is never parsed into fields, even if it looks like JSON."""
    client = server.join()
    assert post(server, text.encode(), content_type).status_code == 200
    assert client.receive() == notification({"message": text})


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"", ["message"]), (b"\xff\xfe", ["message", "UTF-8"]), (b"x" * 8193, ["message", "8192"])],
)
def test_a_text_that_is_no_message_is_refused(server: Server, body: bytes, words: list[str]) -> None:
    """A text is refused by the same limits as a message in JSON."""
    response = post(server, body, "text/plain")
    assert answered(response) == invalid(*words)


def test_the_size_limit_comes_first(server: Server) -> None:
    """The size limit comes first, as for JSON."""
    assert post(server, b"x" * 65_537, "text/plain").status_code == 413


# The default content type of curl.


@needs_curl
def test_json_that_curl_labels_as_a_form_is_read_as_json(server: Server) -> None:
    """The quick line without a header works."""
    client = server.join()
    curl(server, "-d", '{"message": "disk full", "type": "alert"}')
    assert client.receive() == notification({"message": "disk full"}, "alert")


@pytest.mark.parametrize("content_type", [FORM, f"{FORM}; charset=utf-8", "application/json", None])
def test_json_is_read_as_json(server: Server, content_type: str | None) -> None:
    """JSON is read as JSON with curl's label, with its own, and with none."""
    answer = parse(post(server, b'{"message": "hi"}', content_type).content)
    assert answer["notification"]["message"] == "hi"


@pytest.mark.parametrize("body", [b"disk full", b"message=disk+full"])
def test_a_form_that_is_no_json_is_refused(server: Server, body: bytes) -> None:
    """It is not guessed at: text wants its label."""
    response = post(server, body, FORM)
    assert answered(response) == invalid("JSON")


def test_a_batch_that_curl_labels_as_a_form_is_read_as_json(server: Server) -> None:
    """The label means as little there."""
    response = server.request("POST", "/notify/batch", content=b'[{"message": "hi"}]', headers={"Content-Type": FORM})
    assert response.status_code == 200


# The id.


@pytest.mark.parametrize(("body", "content_type"), [(b"hi", "text/plain"), (b'{"message": "hi"}', "application/json")])
def test_the_answer_has_the_id_in_a_header(server: Server, body: bytes, content_type: str) -> None:
    """Notification-Id is the id that clients receive; the documented body is unchanged."""
    client = server.join()
    response = post(server, body, content_type)
    assert response.headers["Notification-Id"] == UUID7
    assert response.headers["Notification-Id"] == client.receive()["id"]
    assert list(parse(response.content)) == ["status", "message", "recipients", "notification", "timestamp"]


def test_a_refusal_has_no_id(server: Server) -> None:
    """Nothing was published."""
    assert "Notification-Id" not in post(server, b"", "text/plain").headers
