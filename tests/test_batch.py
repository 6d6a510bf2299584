"""POST /notify/batch: many notifications with one request, all of them or none."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from conftest import StartServer
from expected import TIME, UUID7, Record, answered, http_error, invalid, naming, parse
from processes import Server

MEBIBYTE = 1_048_576
TOO_DEEP: Any = {}
for _ in range(300):
    TOO_DEEP = {"deeper": TOO_DEEP}


def batch(server: Server, body: object) -> httpx.Response:
    """POST bytes as they are, anything else as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.request("POST", "/notify/batch", content=content, headers={"Content-Type": "application/json"})


def accepted(server: Server, *messages: str) -> Any:
    response = batch(server, [{"message": message} for message in messages])
    assert response.status_code == 200, response.text
    return parse(response.content)


def refusal(server: Server, body: object) -> tuple[int, Any]:
    return answered(batch(server, body))


def array_of(size: int) -> bytes:
    """A valid array of exactly this many bytes, with no notification that is too large by itself."""
    requests = [{"message": "hi", "data": {"pad": "x" * 10_000}} for _ in range(size // 10_100)]
    body = json.dumps([*requests, {"message": "hi", "data": {"pad": ""}}])
    return body.replace('"pad": ""', f'"pad": "{"x" * (size - len(body))}"').encode()


# Accepted.


def test_the_answer_has_the_documented_fields_in_their_order(server: Server) -> None:
    """One id and the number of recipients for each, in the order of the request."""
    server.join("ann")
    server.join("bob")
    body = [{"message": "all"}, {"message": "one", "clients": ["ann"]}, {"message": "nobody", "topics": ["none"]}]
    answer = parse(batch(server, body).content)
    assert isinstance(answer["message"], str)
    assert answer == Record(
        status="success",
        message=answer["message"],
        count=3,
        notifications=[{"id": UUID7, "recipients": recipients} for recipients in (2, 1, 0)],
        timestamp=TIME,
    )


def test_clients_receive_them_in_order(server: Server) -> None:
    """A client gets the notifications in the order of the batch, with the ids of the answer."""
    client = server.join()
    answer = accepted(server, "one", "two", "three")
    received = client.receive_many(3)
    assert [message["data"]["message"] for message in received] == ["one", "two", "three"]
    assert [message["id"] for message in received] == [one["id"] for one in answer["notifications"]]


def test_each_request_is_as_on_notify(server: Server) -> None:
    """Each request of a batch has a type, data and targets of its own."""
    client = server.join(query="client_id=ann&topics=red&user=eve")
    batch(
        server,
        [
            {"message": "one", "type": "alert", "data": {"priority": "high"}},
            {"message": "for bob", "clients": ["bob"]},
            {"message": "red", "topics": ["red"]},
            {"message": "eve", "users": ["eve"]},
        ],
    )
    first, second, third = client.receive_many(3)
    assert (first["type"], first["data"]) == ("alert", {"message": "one", "priority": "high"})
    assert (second["data"], second["topics"]) == ({"message": "red"}, ["red"])
    assert third["data"] == {"message": "eve"}


def test_one_is_enough(server: Server) -> None:
    """An array of one is a batch."""
    assert accepted(server, "alone")["count"] == 1


def test_a_thousand_are_accepted(server: Server) -> None:
    """A batch of a thousand is accepted, and all of them arrive in order."""
    client = server.join()
    messages = [str(number) for number in range(1000)]
    assert accepted(server, *messages)["count"] == 1000
    assert [message["data"]["message"] for message in client.receive_many(1000)] == messages


def test_a_batch_is_not_mixed_with_others(server: Server) -> None:
    """Eight batches that are sent at the same time each arrive in one piece."""
    client = server.join()
    with ThreadPoolExecutor(8) as publishers:
        list(publishers.map(lambda name: accepted(server, *[name] * 50), "abcdefgh"))
    received = "".join(message["data"]["message"] for message in client.receive_many(400))
    assert sorted(received[start : start + 50] for start in range(0, 400, 50)) == [name * 50 for name in "abcdefgh"]


def test_a_mebibyte_is_accepted(server: Server) -> None:
    """The limit is of the whole body, and not the one of a single notification."""
    assert batch(server, array_of(MEBIBYTE)).status_code == 200


# Refused.


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], ["1"]),
        ([{"message": "x"}] * 1001, ["1000"]),
        ({"message": "x"}, ["array", "object"]),
        ("text", ["array", "string"]),
        (None, ["array", "null"]),
        (b"", ["JSON"]),
        (b'[{"message": "x"}', ["JSON"]),
        (b'[{"message": "\xff"}]', ["JSON"]),
        (b"[" * 100_000, ["JSON"]),
    ],
)
def test_a_body_other_than_an_array_of_1_to_1000_is_refused(server: Server, body: object, words: list[str]) -> None:
    """The refusal has the documented body, and nothing is sent."""
    client = server.join()
    assert refusal(server, body) == invalid(*words)
    assert server.next_for(client) == "marker"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"message": ""}, ["[3].message: "]),
        ({"message": 1}, ["[3].message: ", "string"]),
        ({}, ["[3].message: "]),
        ({"message": "x" * 8193}, ["[3].message: ", "8192"]),
        ({"message": "x", "type": "welcome"}, ["[3].type: "]),
        ({"message": "x", "data": []}, ["[3].data: ", "object", "array"]),
        ({"message": "x", "cleints": ["ann"]}, ["[3].cleints: "]),
        ({"message": "x", "clients": []}, ["[3].clients: "]),
        ({"message": "x", "topics": ["a", ""]}, ["[3].topics[1]: "]),
        ("text", ["[3]: ", "object"]),
        (None, ["[3]: ", "object"]),
        ({"message": "x", "data": TOO_DEEP}, ["[3].data: "]),
    ],
)
def test_a_bad_notification_is_named_by_its_place_and_none_is_sent(
    server: Server, bad: object, words: list[str]
) -> None:
    """Counted from 0; those before it were good, and are not sent either."""
    client = server.join()
    status, body = refusal(server, [{"message": "good"}] * 3 + [bad] + [{"message": "good"}])
    assert (status, body) == invalid(*words)
    assert body["error"]["message"].startswith(words[0])
    assert server.next_for(client) == "marker"


def test_a_notification_that_is_too_large_is_named_by_its_place_and_none_is_sent(server: Server) -> None:
    """A notification too large for /notify is too large in a batch."""
    client = server.join()
    status, body = refusal(server, [{"message": "good"}, {"message": "big", "data": {"pad": "x" * 200_000}}])
    assert (status, body) == (413, http_error("validation", naming("[1]")))
    assert server.next_for(client) == "marker"


def test_more_than_a_mebibyte_is_refused(server: Server) -> None:
    """413, and nothing is sent."""
    client = server.join()
    assert refusal(server, array_of(MEBIBYTE + 1)) == (413, http_error("validation", naming(str(MEBIBYTE))))
    assert server.next_for(client) == "marker"


def test_another_content_type_is_refused(server: Server) -> None:
    """The batch refuses the content types that /notify refuses."""
    response = server.request("POST", "/notify/batch", content=b"[]", headers={"Content-Type": "image/png"})
    assert answered(response) == (415, http_error("validation", naming("image/png")))


def test_other_methods_are_not_allowed(server: Server) -> None:
    """The answer is the documented body and names the methods that are allowed."""
    response = server.get("/notify/batch")
    assert (response.status_code, response.headers["Allow"]) == (405, "POST, OPTIONS")


def test_a_draining_server_refuses(start_server: StartServer) -> None:
    """503, as /notify."""
    server = start_server()
    server.join()
    server.drain()
    assert refusal(server, [{"message": "late"}]) == (503, http_error("system", naming("shutting down")))


# Counters.


def test_each_is_counted(start_server: StartServer) -> None:
    """Three notifications to two clients are three published and six sent."""
    server = start_server()
    clients = [server.join(), server.join()]
    accepted(server, "one", "two", "three")
    for client in clients:
        client.receive_many(3)
    assert server.read("/status")["notification_service"]["notifications_sent"] == 3
    assert server.read("/metrics")["connections"]["messages_sent"] == 6


def test_a_batch_to_overlapping_topics_reaches_each_follower_once_and_in_order(server: Server) -> None:
    """Whatever topics clients share, and also where the topics have more followers together than there are clients."""
    topics = [f"t{number}" for number in range(6)]
    followed = [topics[:6], topics[:6], topics[1:3], topics[5:], []]
    clients = [server.join(query=f"topics={','.join(each)}") for each in followed]
    batch = [{"message": str(number), "topics": [topics[number % 6], topics[number % 3]]} for number in range(30)]
    server.request("POST", "/notify/batch", json=batch)
    server.publish("last")
    for client, mine in zip(clients, followed, strict=True):
        expected = [each["message"] for each in batch if not set(mine).isdisjoint(each["topics"])]
        received = [message["data"]["message"] for message in client.receive_many(len(expected) + 1)]
        assert received == [*expected, "last"]
