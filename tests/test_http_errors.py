"""HTTP besides the endpoints: HEAD, OPTIONS, and one form for every error."""

from __future__ import annotations

import re

import pytest
from bytes import handshake
from expected import answered, http_error, naming, parse
from processes import Server
from websockets.exceptions import InvalidStatus

READABLE = ["/health", "/metrics", "/metrics/prometheus", "/status"]
METHODS = {path: {"GET", "HEAD", "OPTIONS"} for path in READABLE} | {"/notify": {"POST", "OPTIONS"}}
VERBS = ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE")
MISSING = [(verb, path) for path, verbs in METHODS.items() for verb in VERBS if verb not in verbs]


def allowed(header: str) -> set[str]:
    return {method.strip() for method in header.split(",")}


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/Health",
        "/health/",
        "/notify/",
        "/metrics/",
        "/ws/",
        "//health",
        "/health/../health",
        "/health%2F",
        "/%00",
        "/%ff",
        "/metrics/prometheus/x",
        "/favicon.ico",
        "/docs",
        "/openapi.json/",
    ],
)
def test_an_unknown_path_is_404(server: Server, path: str) -> None:
    """Every other path is 404, with a trailing slash too, and there is no redirect."""
    status, _, body = server.response_to(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert (status, parse(body)) == (404, http_error("application", naming()))


@pytest.mark.parametrize(("method", "path"), MISSING)
def test_a_method_that_is_not_there_is_405_with_allow(server: Server, path: str, method: str) -> None:
    """The error names the methods of the path."""
    response = server.request(method, path)
    assert answered(response) == (405, http_error("validation", naming(method)))
    assert allowed(response.headers["allow"]) == METHODS[path]


@pytest.mark.parametrize("path", METHODS)
def test_options_answers_204_with_allow(server: Server, path: str) -> None:
    """OPTIONS names the methods of the path."""
    response = server.request("OPTIONS", path)
    assert (response.status_code, response.content) == (204, b"")
    assert allowed(response.headers["allow"]) == METHODS[path]


@pytest.mark.parametrize("path", READABLE)
def test_head_is_get_without_the_body(server: Server, path: str) -> None:
    """HEAD has the status and the headers of GET."""
    head, get = server.request("HEAD", path), server.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(head.headers["content-length"]) > 100


def test_a_connection_can_be_used_again_after_head(server: Server) -> None:
    """No body follows HEAD, so the next answer begins where it should."""
    request = b"%s /health HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
    answer = server.answer_to(request % (b"HEAD", b"") + request % (b"GET", b"Connection: close\r\n"))
    assert re.fullmatch(rb"HTTP/1.1 200.*?\r\n\r\nHTTP/1.1 200.*?\r\n\r\n\{.*\}\n", answer, re.DOTALL)


@pytest.mark.parametrize("path", ["/nothing", "/status?limit=x"])
def test_head_has_the_status_of_the_error(server: Server, path: str) -> None:
    """HEAD of an error is an error, without a body."""
    head = server.request("HEAD", path)
    assert (head.status_code, head.content) == (server.get(path).status_code, b"")


def test_a_plain_get_of_the_websocket_is_426(server: Server) -> None:
    """A plain GET of /ws is told to upgrade to a WebSocket."""
    response = server.get("/ws")
    assert answered(response) == (426, http_error("connection", naming()))
    assert response.headers["upgrade"].lower() == "websocket"


@pytest.mark.parametrize("path", ["", "/", "/nothing", "/ws/", "/health"])
def test_a_handshake_on_another_path_is_404(server: Server, path: str) -> None:
    """There is one WebSocket, and the error is of the category connection."""
    status, _, body = server.response_to(handshake(path or "/"))
    assert (status, parse(body)) == (404, http_error("connection", naming()))


def test_an_old_version_of_the_protocol_is_refused(server: Server) -> None:
    """A handshake of the drafts before RFC 6455 gets no upgrade."""
    assert server.response_to(handshake(Sec_WebSocket_Version="8"))[0] in (400, 426)


@pytest.mark.parametrize("key", [None, "short", ""])
def test_a_handshake_without_a_proper_key_is_400(server: Server, key: str | None) -> None:
    """RFC 6455, 4.2.2: a handshake that isn't one is a bad request."""
    assert server.response_to(handshake(Sec_WebSocket_Key=key))[0] == 400


def test_a_refused_handshake_is_told_to_the_client(server: Server) -> None:
    """A client library sees the status and the documented body."""
    with pytest.raises(InvalidStatus) as refused:
        server.connect(url=server.ws_url + "/elsewhere")
    response = refused.value.response
    assert (response.status_code, parse(response.body or b"")) == (404, http_error("connection", naming()))


@pytest.mark.parametrize("path", ["/nothing", "/notify", "/ws", "/status?limit=x"])
def test_errors_are_json(server: Server, path: str) -> None:
    """Every error has the content type of its body."""
    assert server.get(path).headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "request_line",
    [
        b"BREW /health HTTP/1.1",
        b"GET",
        b"",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health HTTP/9.9",
        b"GET /hea lth HTTP/1.1",
        b"GET /\xff\xfe HTTP/1.1",
        b"\x00" * 20,
        b"PRI * HTTP/2.0",
    ],
)
def test_bytes_that_are_not_http_get_a_400_or_nothing(server: Server, request_line: bytes) -> None:
    """Garbage is refused without a traceback."""
    connection = server.raw(request_line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = connection.recv(65_536)
    assert answer == b"" or answer.split()[1] in (b"400", b"404", b"505"), answer
    assert b"Traceback" not in answer


def test_http_1_0_is_served(server: Server) -> None:
    """Old probes don't even send a Host."""
    answer = server.answer_to(b"GET /health HTTP/1.0\r\n\r\n")
    assert b" 200 " in answer and b'"healthy"' in answer


@pytest.mark.parametrize("path", ["/health?" + "q" * 5000, "/" + "p" * 5000])
def test_a_long_path_is_an_answer_too(server: Server, path: str) -> None:
    """Five thousand characters are no reason to fail."""
    assert server.get(path).status_code in (200, 404, 414)


@pytest.mark.parametrize("header", ["Content-Length: -1", "Content-Length: x", "Transfer-Encoding: nonsense"])
def test_a_body_of_unknown_length_is_refused(server: Server, header: str) -> None:
    """Where a request ends must be clear."""
    assert 400 <= server.response_to(f"POST /notify HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())[0] < 500
