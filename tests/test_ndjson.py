"""POST /notify/batch with NDJSON: lines are published as they arrive, and answered line for line."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from bytes import read_until
from carriers import CARRIERS, first_quick, host
from conftest import StartServer
from credentials import SECRET, bearer, token
from expected import COUNT, UUID7, Like, answered, http_error, naming, parse
from processes import Server, eventually, program

NDJSON = {"Content-Type": "application/x-ndjson"}
PUBLISHED = {"id": UUID7, "recipients": COUNT}


def lines(count: int, **fields: Any) -> bytes:
    return b"".join(json.dumps({"message": str(number), **fields}).encode() + b"\n" for number in range(count))


def post(server: Server, body: bytes, **headers: str) -> list[Any]:
    response = server.request("POST", "/notify/batch", content=body, headers=NDJSON | headers)
    assert (response.status_code, response.headers["content-type"]) == (200, NDJSON["Content-Type"])
    return [parse(line) for line in response.content.splitlines()]


def refused(message: object, category: str = "validation") -> dict[str, Any]:
    return http_error(category, message)


class Sending:
    """A request in chunks on a socket, and the lines of its answer."""

    def __init__(self, server: Server, path: str = "/notify/batch") -> None:
        self.socket = server.raw(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        self._rest = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        self.socket.sendall(b"0\r\n\r\n")

    def answers(self) -> Iterator[Any]:
        """Yield the answers up to the end of the response or of the connection."""
        end = b""
        while not end.endswith(b"\r\n0\r\n\r\n") and (data := self.socket.recv(1 << 16)):
            end = (end + data)[-7:]
            *whole, self._rest = (self._rest + data).split(b"\n")
            yield from (parse(line) for line in whole if line.startswith(b"{"))


def test_each_line_has_its_answer(server: Server) -> None:
    """In order; a bad line is answered and does not end the stream, and blank ones are skipped."""
    client = server.join(query="topics=lines")
    body = b'\xef\xbb\xbf{"message":"one","topics":["lines"]}\r\n\n  \n[]\n{"message":1}\n{"message":"x","x":1}\n'
    body += b'{"message":"big","data":{"x":"%b"}}\n{"message":"last","topics":["lines"]}' % (b"x" * 70_000)
    found = post(server, body)
    assert found[:1] + found[-1:] == [PUBLISHED | {"recipients": 1}] * 2
    words = [("request", "object"), ("message", "integer"), ("x", "unknown field"), ("line", "65536")]
    assert found[1:-1] == [refused(naming(*each)) for each in words]
    assert [each["data"]["message"] for each in client.receive_many(2)] == ["one", "last"]


def test_there_is_no_limit_on_the_number_of_lines(start_server: StartServer) -> None:
    """More than a batch, more than a window, and more bytes than a body may have."""
    server = start_server("--history-size", "30000")
    found = post(server, lines(20_000, data={"pad": "x" * 60}))
    assert found == [PUBLISHED] * 20_000
    ids = [each["id"] for each in found]
    assert ids == sorted(set(ids))


def test_lines_are_answered_as_they_arrive(server: Server) -> None:
    """Before the request has ended, and in pieces of any size."""
    sending = Sending(server)
    answers = sending.answers()
    for _ in range(3):
        for piece in (b'{"mess', b'age":"x"}', b"\n"):
            sending.send(piece)
        assert next(answers) == PUBLISHED
    sending.send(b'{"message":"without an end"}')
    sending.end()
    assert list(answers) == [PUBLISHED]


def test_curl_publishes_what_a_program_writes(server: Server) -> None:
    """With `-T -`, as documented."""
    command = [program("curl"), "-sN", "-X", "POST", "-T", "-", "-H", f"Content-Type: {NDJSON['Content-Type']}"]
    ended = subprocess.run(
        [*command, f"{server.url}/notify/batch"], input=lines(3), capture_output=True, check=True, timeout=60
    )
    assert [parse(line) for line in ended.stdout.splitlines()] == [PUBLISHED] * 3


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ({"Idempotency-Key": "k"}, 400, ["Idempotency-Key", "lines"]),
        ({"Content-Type": "application/x-ndjson; charset=latin-1"}, 415, ["UTF-8"]),
        ({"Content-Encoding": "gzip"}, 415, ["content-encoding"]),
    ],
    ids=["key", "charset", "encoding"],
)
def test_a_request_may_be_refused_whole(server: Server, headers: dict[str, str], status: int, words: list[str]) -> None:
    response = server.request("POST", "/notify/batch", content=lines(1), headers=NDJSON | headers)
    assert answered(response) == (status, refused(naming(*words)))


def test_single_notifications_are_no_lines(server: Server) -> None:
    assert server.request("POST", "/notify", content=lines(1), headers=NDJSON).status_code == 415


def test_rights_count_for_each_line(start_server: StartServer) -> None:
    """A request without the right to publish anything is refused whole."""
    server = start_server(variables={"NOTIFYD_JWT_SECRET": SECRET})
    body = lines(1, topics=["a.b"]) + lines(1, topics=["b"])
    found = post(server, body, **bearer(token(publish=["a.*"])))
    assert found == [PUBLISHED, refused("Not allowed: to publish to topic b", "application")]
    for headers, status in ((bearer(token()), 403), ({}, 401)):
        assert server.request("POST", "/notify/batch", content=body, headers=NDJSON | headers).status_code == status


def check_that_an_unread_publisher_waits(server: Server, path: str = "/notify/batch") -> None:
    """A publisher that does not read its answers is read no further, and gets all of them when it does."""
    # More answers than the kernel holds for both.
    sending, count = Sending(server, path), 240_000
    sender = threading.Thread(target=lambda: (sending.send(lines(count, topics=["x"])), sending.end()))
    sender.start()

    def sent() -> int:
        return int(server.read("/status")["notification_service"]["notifications_sent"])

    before = -1
    while before < (before := sent()):
        threading.Event().wait(0.3)
    assert before < count
    assert sum(each == PUBLISHED for each in sending.answers()) == count
    sender.join()


def test_a_publisher_that_does_not_read_is_not_read(start_server: StartServer) -> None:
    check_that_an_unread_publisher_waits(start_server("--history-size", "100"))


@pytest.mark.parametrize("name", first_quick(CARRIERS))
def test_on_every_server(name: str) -> None:
    command, app, flags, prefix = CARRIERS[name]
    server = host(command, app, *flags, prefix=prefix)
    try:
        assert post(server, lines(3000) + b"{}\n") == [PUBLISHED] * 3000 + [refused(naming("message"))]
    finally:
        server.kill()


def test_a_line_has_a_deadline(start_server: StartServer) -> None:
    """From its first byte; the time between lines is that of an idle connection."""
    late = start_server(constants={"ndjson.LINE_SECONDS": 0.5, "wire_http.REQUEST_SECONDS": 0.5})
    sending = Sending(late)
    answers = sending.answers()
    for _ in range(3):
        sending.send(lines(1))
        assert next(answers) == PUBLISHED
        threading.Event().wait(0.4)
    sending.send(b'{"message"')
    assert list(answers) == [refused(naming("line", "not complete"))]
    silent = Sending(start_server("--keep-alive-timeout", "1"))
    assert list(silent.answers()) == [refused(naming("no line"))]


def test_the_drain_ends_the_answer(start_server: StartServer) -> None:
    """Those before it are published, and the answer ends as it should, though nothing comes any more."""
    server = start_server()
    listener, sending, silent = server.join(), Sending(server), Sending(server)
    answers = sending.answers()
    sending.send(lines(2) + b'{"message"')
    assert [next(answers) for _ in range(2)] == [PUBLISHED] * 2
    server.drain()
    for each in (sending, silent):
        assert read_until(each.socket, b"0\r\n\r\n").endswith(b"0\r\n\r\n")
    assert server.request("POST", "/notify/batch", content=lines(1), headers=NDJSON).status_code == 503
    listener.leave()
    assert server.exit_status() == 0


def test_while_the_store_is_away_lines_are_refused(start_server: StartServer, redis: Any) -> None:
    server = start_server("--store", redis.url, "--store-prefix", "lines:", "--store-timeout", "1")
    sending = Sending(server)
    answers = sending.answers()
    sending.send(lines(1))
    assert next(answers) == PUBLISHED
    redis.stop()
    try:
        sending.send(lines(1))
        assert next(answers) == refused(Like("The store is away: .*"), "system")
    finally:
        redis.resume()

    def is_published() -> bool:
        sending.send(lines(1))
        return bool(next(answers) == PUBLISHED)

    eventually(is_published)


def test_lines_of_a_publisher_that_leaves_are_published(server: Server) -> None:
    """But for the last, which is not whole."""
    client = server.join(query="topics=left")
    sending = Sending(server)
    sending.send(lines(50, topics=["left"]) + b'{"message":"half"')
    with closing(sending.socket):
        assert next(sending.answers()) == PUBLISHED
    assert [each["data"]["message"] for each in client.receive_many(50)] == [str(number) for number in range(50)]
    assert server.next_for(client) == "marker"
