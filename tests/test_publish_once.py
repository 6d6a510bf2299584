"""Publish once: a publisher that got no answer repeats its request with the same key, and nothing is sent twice."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import StartServer
from expected import answered, http_error, invalid, naming
from processes import Server, eventually

ONE, OTHER = {"message": "order 18 has shipped"}, {"message": "order 19 has shipped"}
PATHS = {"/notify": ONE, "/notify/batch": [ONE, OTHER]}
MESSAGES = {"/notify": [ONE["message"]], "/notify/batch": [ONE["message"], OTHER["message"]]}


def send(server: Server, key: str, body: object = ONE, path: str = "/notify", **headers: str) -> httpx.Response:
    return server.request("POST", path, content=json.dumps(body), headers={"Idempotency-Key": key} | headers)


def sent(server: Server) -> int:
    """How many notifications were published."""
    return int(server.read("/status")["notification_service"]["notifications_sent"])


def is_replayed(response: httpx.Response) -> bool:
    assert response.status_code == 200, response.text
    assert response.headers.get("Idempotent-Replayed") in (None, "true")
    return "Idempotent-Replayed" in response.headers


@pytest.fixture
def fresh(start_server: StartServer) -> Server:
    """A server of the test's own, where no key was used."""
    return start_server()


# A repeat.


@pytest.mark.parametrize("path", PATHS)
def test_a_repeat_gets_the_first_answer_again(fresh: Server, path: str) -> None:
    """A repeat gets the first answer to the byte, with its timestamp and Notification-Id, marked as a repetition."""
    first = send(fresh, "key", PATHS[path], path)
    fresh.join()
    second = send(fresh, "key", PATHS[path], path)
    assert (is_replayed(first), is_replayed(second)) == (False, True)
    assert second.content == first.content
    assert second.headers["Notification-Id"] == first.headers["Notification-Id"]
    assert second.headers["Content-Type"] == first.headers["Content-Type"]


@pytest.mark.parametrize("path", PATHS)
def test_a_repeat_sends_nothing(fresh: Server, path: str) -> None:
    """Clients get each notification once, and it is counted once."""
    client = fresh.join()
    for _ in range(3):
        send(fresh, "key", PATHS[path], path)
    assert sent(fresh) == len(MESSAGES[path])
    fresh.notify("marker")
    received = client.receive_many(len(MESSAGES[path]) + 1)
    assert [message["data"]["message"] for message in received] == [*MESSAGES[path], "marker"]


@pytest.mark.parametrize("path", PATHS)
def test_a_repeat_gets_its_answer_during_the_drain(fresh: Server, path: str) -> None:
    """A publisher that lost the answer to the signal gets it; a new request and one without a key are refused."""
    client = fresh.join()
    first = send(fresh, "key", PATHS[path], path)
    fresh.drain()
    assert send(fresh, "key", PATHS[path], path).content == first.content
    refused = [send(fresh, "other", PATHS[path], path), fresh.request("POST", path, content=json.dumps(PATHS[path]))]
    assert [response.status_code for response in refused] == [503, 503]
    assert send(fresh, "key", "another body", path).status_code in (400, 422)
    client.leave()


def test_a_plain_text_is_sent_once_too(fresh: Server) -> None:
    """The key works with any kind of body."""
    options: dict[str, Any] = {
        "content": "disk full",
        "headers": {"Content-Type": "text/plain", "Idempotency-Key": "k"},
    }
    first, second = (fresh.request("POST", "/notify", **options) for _ in range(2))
    assert (is_replayed(first), is_replayed(second), second.content) == (False, True, first.content)


def test_other_keys_are_other_requests(fresh: Server) -> None:
    """The same body with another key, or with none, is sent."""
    assert [is_replayed(send(fresh, key)) for key in ("one", "two", "One")] == [False] * 3
    fresh.notify(ONE["message"])
    assert sent(fresh) == 4


def test_without_a_key_a_repeat_is_sent_again(fresh: Server) -> None:
    """A client that follows only the reference sees no difference."""
    assert [is_replayed(fresh.post(ONE)) for _ in range(2)] == [False, False]
    assert sent(fresh) == 2


def test_the_key_holds_for_every_publisher(fresh: Server) -> None:
    """A repeat comes over another connection, from a publisher that was restarted."""
    send(fresh, "key")
    with httpx.Client(base_url=fresh.url, trust_env=False) as other:
        repeat = other.post("/notify", content=json.dumps(ONE), headers={"Idempotency-Key": "key"})
    assert is_replayed(repeat)


# Another body.


@pytest.mark.parametrize("path", PATHS)
def test_another_body_with_the_key_is_refused(fresh: Server, path: str) -> None:
    """422, and nothing is sent; the first answer stays."""
    send(fresh, "key", PATHS[path], path)
    before = sent(fresh)
    response = send(fresh, "key", OTHER if path == "/notify" else [OTHER], path)
    assert answered(response) == (
        422,
        http_error("validation", naming("Idempotency-Key")),
    )
    assert sent(fresh) == before
    assert is_replayed(send(fresh, "key", PATHS[path], path))


def test_a_refused_request_leaves_its_key_free(fresh: Server) -> None:
    """A publisher corrects its request and sends it with the same key."""
    assert send(fresh, "key", {"mesage": "typo"}).status_code == 400
    assert not is_replayed(send(fresh, "key", {"message": "corrected"}))


# At the same time.


def test_of_many_at_once_one_is_sent(fresh: Server) -> None:
    """Twenty impatient publishers get the same answer, one of them the first time."""
    with ThreadPoolExecutor(20) as publishers:
        responses = list(publishers.map(lambda _: send(fresh, "key"), range(20)))
    assert sorted(map(is_replayed, responses)) == [False] + [True] * 19
    assert len({response.content for response in responses}) == 1
    assert sent(fresh) == 1


def test_a_repeat_while_the_first_is_under_way_gets_its_answer(fresh: Server) -> None:
    """The first hangs with half of its body sent; its repeat overtakes it, and then it is the repetition."""
    body = json.dumps(ONE).encode()
    head = f"POST /notify HTTP/1.1\r\nHost: {fresh.host}\r\nIdempotency-Key: key\r\nConnection: close\r\n"
    hanging = fresh.raw(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:10])
    answered = fresh.request("POST", "/notify", content=body, headers={"Idempotency-Key": "key"})
    hanging.sendall(body[10:])
    reply = b""
    while received := hanging.recv(65536):
        reply += received
    assert b"idempotent-replayed: true" in reply.lower()
    assert reply.endswith(answered.content)
    assert sent(fresh) == 1


# The key.


@pytest.mark.parametrize("key", ["k", "k" * 255, "a b", "!#$%&'*+-.^_`|~,;=\""])
def test_a_key_has_1_to_255_characters(fresh: Server, key: str) -> None:
    """A key has 1 to 255 characters of any kind that a header can have."""
    assert [is_replayed(send(fresh, key)) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["", "k" * 256])
def test_another_length_is_refused(server: Server, path: str, key: str) -> None:
    """The error names the header and the limit, and nothing is sent."""
    before = sent(server)
    response = send(server, key, PATHS[path], path)
    assert answered(response) == invalid("Idempotency-Key", "255")
    assert sent(server) == before


# As long as the history.


def test_an_answer_is_kept_as_long_as_its_notification(start_server: StartServer) -> None:
    """While the notification can be replayed, so can the answer; in the end both are gone."""
    server = start_server("--history-size", "5")
    send(server, "key")
    for number in range(4):
        send(server, str(number), {"message": str(number)})
    assert len(server.read("/notifications")["notifications"]) == 5
    assert is_replayed(send(server, "key"))
    for number in range(4, 10):
        send(server, str(number), {"message": str(number)})
    assert not is_replayed(send(server, "key"))


def test_an_answer_is_kept_when_only_others_are_published(start_server: StartServer) -> None:
    """Requests without a key push out no answer before its notification."""
    server = start_server("--history-size", "5")
    send(server, "key")
    for number in range(4):
        server.notify(str(number))
    assert is_replayed(send(server, "key"))


def test_an_answer_expires_with_the_history(start_server: StartServer) -> None:
    """After history_ttl the key is free."""
    server = start_server("--history-ttl", "0.3")
    send(server, "key")
    eventually(lambda: server.read("/notifications")["notifications"] == [])
    assert not is_replayed(send(server, "key", OTHER))


def test_large_answers_are_kept_as_long_as_small_notifications(start_server: StartServer) -> None:
    """An answer that repeats a long list of clients is no reason to forget it before its notification."""
    server = start_server("--history-bytes", "400000")
    clients = [f"client-{number:04}" for number in range(1000)]
    for name in ("one", "two", "three"):
        send(server, name, {"message": name, "clients": clients})
    assert len(server.read("/notifications?client_id=client-0007")["notifications"]) == 3
    assert is_replayed(send(server, "one", {"message": "one", "clients": clients}))
