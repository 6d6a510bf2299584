"""HTTP/1.1 as a server must read and write it (RFC 9112, RFC 9110), alone and behind nginx as the second reader."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bytes import read_until, rest
from expected import http_error, naming, parse
from processes import QUIET, Server, eventually, free_port
from ws_clients import PATIENCE

from wire_message import BLANK_LINE, MAX_HEAD_LINES, RequestError, RequestParser

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LAST = GET + b"Connection: close\r\n\r\n"

# Requests that two readers could take differently, with the status that each gets.
REFUSED = {
    "length and coding": (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "coding and length": (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400),
    "one length twice": (POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
    "a list of lengths": (POST + b"Content-Length: 1, 1\r\n\r\nx", 400),
    "a signed length": (POST + b"Content-Length: +1\r\n\r\nx", 400),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\nx", 400),
    "a hexadecimal length": (POST + b"Content-Length: 0x1\r\n\r\nx", 400),
    "an empty length": (POST + b"Content-Length: \r\n\r\n", 400),
    "a huge length": (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
    "gzip, chunked": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "chunked, gzip": (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
    "chunked twice": (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "two codings": (POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "identity": (POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n", 400),
    "xchunked": (POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    "a coding in 1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n", 400),
    "bare LF": (GET.replace(b"\r\n", b"\n") + b"\n", 400),
    "one bare LF": (GET + b"A: b\nC: d\r\n\r\n", 400),
    "a bare LF at the end": (GET + b"A: b\r\n\n", 400),
    "a bare LF before": (b"\n" + GET + b"\r\n", 400),
    "a bare CR": (GET + b"A: b\rC: d\r\n\r\n", 400),
    "a bare CR before": (b"\r" + GET + b"\r\n", 400),
    "a folded header": (GET + b"A: b\r\n c\r\n\r\n", 400),
    "a header folded with a tab": (GET + b"A:\r\n\tc\r\n\r\n", 400),
    "a space before the first header": (GET.replace(b"Host", b" Host") + b"\r\n", 400),
    "a space before the colon": (GET.replace(b"Host:", b"Host :") + b"\r\n", 400),
    "no name": (GET + b": b\r\n\r\n", 400),
    "no colon": (GET + b"A\r\n\r\n", 400),
    "NUL": (GET + b"A: \0\r\n\r\n", 400),
    "a control character": (GET + b"A: \x0b\r\n\r\n", 400),
    "DEL": (GET + b"A: \x7f\r\n\r\n", 400),
    "a delimiter in a name": (GET + b"A(: b\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + b"Host: x\r\n\r\n", 400),
    "a host with a path": (GET.replace(b": x", b": x/y") + b"\r\n", 400),
    "a host with a user": (GET.replace(b": x", b": a@x") + b"\r\n", 400),
    "two spaces": (GET.replace(b"GET ", b"GET  ") + b"\r\n", 400),
    "two spaces before the version": (GET.replace(b" HTTP", b"  HTTP") + b"\r\n", 400),
    "a tab": (GET.replace(b"GET ", b"GET\t") + b"\r\n", 400),
    "a space behind the version": (GET.replace(b"1.1", b"1.1 ", 1) + b"\r\n", 400),
    "a fragment": (GET.replace(b"/health", b"/health#x") + b"\r\n", 400),
    "a relative target": (GET.replace(b"/health", b"health") + b"\r\n", 400),
    "a user in an absolute target": (GET.replace(b"/health", b"http://a@x/health") + b"\r\n", 400),
    "an absolute target and a host with a path": (
        GET.replace(b"/health", b"http://x/health").replace(b": x", b": x/y") + b"\r\n",
        400,
    ),
    "another scheme": (GET.replace(b"/health", b"ftp://x/health") + b"\r\n", 400),
    "a method in lower case": (GET.replace(b"GET", b"get") + b"\r\n", 400),
    "another protocol": (GET.replace(b"HTTP/1.1", b"RTSP/1.0") + b"\r\n", 505),
    "HTTP/2.0": (GET.replace(b"1.1", b"2.0") + b"\r\n", 505),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "CONNECT": (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "a signed chunk": (CHUNKED + b"+1\r\nx\r\n0\r\n\r\n", 400),
    "a negative chunk": (CHUNKED + b"-1\r\nx\r\n0\r\n\r\n", 400),
    "a space before a chunk size": (CHUNKED + b" 1\r\nx\r\n0\r\n\r\n", 400),
    "a space behind a chunk size": (CHUNKED + b"1 \r\nx\r\n0\r\n\r\n", 400),
    "a prefix of a chunk size": (CHUNKED + b"0x1\r\nx\r\n0\r\n\r\n", 400),
    "an underscore in a chunk size": (CHUNKED + b"1_0\r\nx\r\n0\r\n\r\n", 400),
    "no chunk size": (CHUNKED + b"\r\nx\r\n0\r\n\r\n", 400),
    "a huge chunk": (CHUNKED + b"fffffffffffffffff\r\nx\r\n0\r\n\r\n", 400),
    "a chunk size with bare LF": (CHUNKED + b"1\nx\r\n0\r\n\r\n", 400),
    "a chunk with bare LF": (CHUNKED + b"1\r\nx\n0\r\n\r\n", 400),
    "a chunk that is longer": (CHUNKED + b"1\r\nxy\r\n0\r\n\r\n", 400),
    "bare LF in an extension": (CHUNKED + b"1;a\nx\r\n0\r\n\r\n", 400),
    "bare CR in an extension": (CHUNKED + b"1;a\rb\r\nx\r\n0\r\n\r\n", 400),
    "a folded trailer": (CHUNKED + b"0\r\nA: b\r\n c\r\n\r\n", 400),
    "a length in a trailer": (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", 400),
    "a coding in a trailer": (CHUNKED + b"0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    "many headers": (GET + b"A: b\r\n" * MAX_HEAD_LINES + b"\r\n", 431),
    "long extensions": (CHUNKED + (b"1;" + b"x" * 4000 + b"\r\nx\r\n") * 20, 431),
}
# Requests that are unusual, and clear.
TAKEN = {
    "an empty line before": b"\r\n" + GET + b"\r\n",
    "spaces before a length": POST + b"Content-Length: \t 1\r\n\r\nx",
    "a length in capitals": POST + b"CONTENT-LENGTH: 1\r\n\r\nx",
    "a coding in capitals": POST + b"Transfer-Encoding: Chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    "chunks with extensions": CHUNKED + b'1;a=b;c="d;e"\r\nx\r\n0;f\r\n\r\n',
    "zeros before a chunk size": CHUNKED + b"0001\r\nx\r\n000\r\n\r\n",
    "a blank line in a chunk": CHUNKED + b"5\r\n\r\n\r\nx\r\n0\r\n\r\n",
    "trailers": CHUNKED + b"1\r\nx\r\n0\r\nHost: y\r\nIdempotency-Key: k\r\n\r\n",
    "a body with GET": GET + b"Content-Length: 1\r\n\r\nx",
    "obs-text": GET + b"A: \xff\r\n\r\n",
    "an empty host": GET.replace(b": x", b":") + b"\r\n",
    "a proxy's option": GET + b"Proxy-Connection: keep-alive\r\n\r\n",
    "an empty header": GET + b"A:\r\n\r\n",
}
refused = pytest.mark.parametrize(("request_", "status"), REFUSED.values(), ids=REFUSED)
taken = pytest.mark.parametrize("request_", TAKEN.values(), ids=TAKEN)


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@refused
def test_an_ambiguous_request_is_refused_and_ends_its_connection(server: Server, request_: bytes, status: int) -> None:
    """It gets one answer with the documented body and the date; nothing behind it is read as a request."""
    answer = server.answer_to(request_ + SMUGGLED)
    assert statuses(answer) == [status]
    head, _, body = answer.partition(BLANK_LINE)
    assert b"\r\nconnection: close" in head and b"\r\ndate: " in head
    assert parse(body) == http_error("validation", naming())


def test_an_empty_coding_is_refused(server: Server) -> None:
    """httptools before 0.9 leaves that to us."""
    answer = server.answer_to(POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n" + SMUGGLED)
    assert statuses(answer) in ([400], [501])


@refused
def test_an_ambiguous_request_is_refused_in_any_pieces(request_: bytes, status: int) -> None:
    """The parser refuses it as well when the head comes whole and the body byte by byte."""
    end = request_.find(BLANK_LINE) + len(BLANK_LINE)
    if end < len(BLANK_LINE) or request_.startswith((b"\r", b"\n")):
        pytest.skip("the connection refuses its beginning")
    with pytest.raises(RequestError) as error:
        read_in_pieces(request_, end)
    assert error.value.status == status


def read_in_pieces(request: bytes, end: int) -> None:
    parser = RequestParser()
    start = parser.read(request, 0, end)
    for stop in range(start + 1, len(request) + 1):
        start = parser.read_body(request[:stop], start, len(request))


@taken
def test_an_unusual_request_is_answered_and_the_next_as_well(server: Server, request_: bytes) -> None:
    assert statuses(server.answer_to(request_ + LAST)) == [200, 200]


def test_a_trailer_is_no_header(server: Server) -> None:
    """A key in the trailers of two requests does not make one of them."""
    answers = server.answer_to(TAKEN["trailers"] * 2 + LAST)
    assert statuses(answers) == [200, 200, 200] and b"idempotent-replayed" not in answers.lower()


# Behind nginx.


class Proxy:
    """An nginx that hands requests on over kept connections, as they come."""

    def __init__(self, directory: Path, upstream: int) -> None:
        nginx = shutil.which("nginx")
        if nginx is None:
            reason = "nginx is not installed"
            pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
        self.port, self._log = free_port(), directory / "access.log"
        (directory / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; pid {directory}/pid; error_log {directory}/error.log;"
            f"events {{}} http {{ log_format uri $request_uri; access_log {self._log} uri;"
            f"upstream app {{ server 127.0.0.1:{upstream}; keepalive 1; }}"
            f"server {{ listen 127.0.0.1:{self.port}; location / {{ proxy_pass http://app; proxy_http_version 1.1;"
            'proxy_set_header Connection ""; proxy_set_header Host $http_host; proxy_request_buffering off; } } }'
        )
        self._process = subprocess.Popen([nginx, "-p", str(directory), "-c", str(directory / "nginx.conf")])
        self._marks = itertools.count()
        eventually(self._serves)

    def _serves(self) -> bool:
        try:
            return statuses(self.answer_to(LAST)) == [200]
        except OSError:
            return False

    def answer_to(self, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE) as connection:
            if data != LAST:
                connection.settimeout(1)
            received = b""
            try:
                connection.sendall(data)
                while more := connection.recv(65_536):
                    received += more
            except (TimeoutError, ConnectionError):
                pass  # It waits for more, or has had enough.
            return received

    def handed_on(self, path: str) -> int:
        """Return how many requests for the path nginx has seen as such."""
        return self._log.read_text().split().count(path)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    server = Server.notifyd(*QUIET)
    proxy = Proxy(tmp_path_factory.mktemp("proxy"), server.port)
    yield proxy
    proxy.close()
    server.stop()


@pytest.mark.parametrize("name", [*REFUSED, *TAKEN])
def test_nginx_and_the_server_see_the_same_requests(proxy: Proxy, name: str) -> None:
    """The server answers no request that nginx has not seen, and the next request gets its own answer."""
    request = REFUSED[name][0] if name in REFUSED else TAKEN[name]
    before = proxy.handed_on("/smuggled")
    answer = proxy.answer_to(request + SMUGGLED)
    assert answer.count(b"/smuggled") <= proxy.handed_on("/smuggled") - before
    for _ in range(2):
        after = proxy.answer_to(LAST)
        assert statuses(after) == [200] and b'"healthy"' in after


# What a server does.


def test_a_request_in_1_0_gets_no_chunks_and_the_end_of_the_connection(server: Server) -> None:
    """Also a stream: its body ends with the connection (RFC 9112, section 6.3)."""
    connection = server.raw(b"GET /events HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    head, _, body = read_until(connection, b"event: welcome").partition(BLANK_LINE)
    assert b"transfer-encoding" not in head and b"connection: close" in head
    assert body.startswith(b"retry: ")
    answer = server.answer_to(b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert b"connection: close" in answer and b"transfer-encoding" not in answer


def test_a_stream_in_1_1_is_chunked(server: Server) -> None:
    """Each write is one chunk."""
    connection = server.raw(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, body = read_until(connection, b"event: welcome").partition(BLANK_LINE)
    assert b"transfer-encoding: chunked" in head and re.match(rb"[0-9a-f]+\r\nretry: ", body)


@pytest.mark.parametrize("path", [b"/health", b"/nothing"])
def test_each_answer_has_a_date(server: Server, path: bytes) -> None:
    """RFC 9110, section 6.6.1."""
    assert b"\r\ndate: " in server.answer_to(LAST.replace(b"/health", path)).lower()


def test_204_and_head_have_no_body(server: Server) -> None:
    """RFC 9112, section 6.3: the next answer begins where the head ends."""
    options = LAST.replace(b"GET", b"OPTIONS").replace(b"Connection: close\r\n", b"")
    head = options.replace(b"OPTIONS", b"HEAD")
    parts = server.answer_to(options + head + LAST).split(BLANK_LINE)
    assert [statuses(part) for part in parts] == [[204], [200], [200], []]
    assert b"content-length" not in parts[0] and b"content-length: " in parts[1]


@pytest.mark.parametrize(
    "option", [b"close", b"Keep-Alive, CLOSE", b"a\r\nConnection: close", b"a\r\nProxy-Connection: close"]
)
def test_connection_close_is_heard_and_answered(server: Server, option: bytes) -> None:
    """RFC 9112, section 9.6; nothing behind it is answered."""
    answer = server.answer_to(GET + b"Connection: " + option + BLANK_LINE + SMUGGLED)
    assert statuses(answer) == [200] and b"connection: close" in answer


def test_100_continue_comes_when_the_body_is_wanted(server: Server) -> None:
    """RFC 9110, section 10.1.1."""
    connection = server.raw(POST + b"Content-Length: 2\r\nExpect: 100-Continue\r\n\r\n")
    assert read_until(connection, BLANK_LINE) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(b"hi" + LAST)
    assert statuses(rest(connection)) == [200, 200]


def test_an_answer_instead_of_100_continue_ends_the_connection(server: Server) -> None:
    """The client may send the body or leave it out: the next request could be either."""
    answer = server.answer_to(POST + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n" + SMUGGLED)
    assert statuses(answer) == [413] and b"connection: close" in answer


def test_a_client_in_1_0_is_told_nothing_of_continue(server: Server) -> None:
    """RFC 9110, section 10.1.1."""
    request = POST.replace(b"1.1", b"1.0") + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\nhi"
    assert statuses(server.answer_to(request)) == [200]


def test_a_client_that_ends_its_side_is_answered(server: Server) -> None:
    """RFC 9112, section 9.6 lets it: all of its requests are answered, and half a request is not."""
    connection = server.raw(POST + b"Content-Length: 2\r\n\r\nhi" + GET + b"\r\n" + GET)
    connection.shutdown(socket.SHUT_WR)
    assert statuses(rest(connection)) == [200, 200]


def test_a_client_that_ends_its_side_is_answered_whatever_its_last_request_costs(server: Server) -> None:
    """Chunks are read 4 KB at a time: the end of the client must not overtake them."""
    chunks = b"1\r\nx\r\n" * 800 + b"0\r\n\r\n"
    connection = server.raw((GET + b"\r\n") * 9 + CHUNKED + chunks + GET + b"\r\n")
    connection.shutdown(socket.SHUT_WR)
    assert statuses(rest(connection)) == [200] * 11


def test_the_host_of_an_absolute_target_counts(server: Server) -> None:
    """RFC 9112, section 3.2.2: a page of that host is no foreign one, whatever the Host header says."""
    request = LAST.replace(b"/health", b"http://a.example/health") + b""
    origin = b"Origin: http://%s\r\n\r\n"
    assert statuses(server.answer_to(request.replace(BLANK_LINE, b"\r\n" + origin % b"a.example"))) == [200]
    assert statuses(server.answer_to(request.replace(BLANK_LINE, b"\r\n" + origin % b"x"))) == [403]
