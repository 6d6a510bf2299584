"""POST /notify: an accepted notification reaches every connected client; a refusal names the field."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import StartServer
from expected import TIME, answered, http_error, invalid, naming, notification, parse
from processes import Server, eventually

OWN_TYPES = ["welcome", "ping", "pong", "status_response", "error", "shutdown", "resume", "subscribed", "authenticated"]


def refusal(server: Server, body: object, **options: Any) -> tuple[int, Any]:
    """The status and parsed body of the answer to a bad request."""
    return answered(server.post(body, **options))


def body_of(size: int) -> bytes:
    """A valid request body of exactly this many bytes."""
    frame = json.dumps({"message": "hi", "data": {"pad": ""}})
    return frame.replace('"pad": ""', f'"pad": "{"x" * (size - len(frame))}"').encode()


# Accepted.


def test_the_answer_has_the_documented_fields_in_their_order(server: Server) -> None:
    """The answer says how many it went to, and repeats the notification as it was understood."""
    server.join()
    fields = {"type": "alert", "data": {"priority": "high", "category": "system"}}
    assert server.notify("Your notification message", **fields) == {
        "status": "success",
        "message": "Notification sent successfully",
        "recipients": 1,
        "notification": {
            "message": "Your notification message",
            "type": "alert",
            "data": {"priority": "high", "category": "system"},
        },
        "timestamp": TIME,
    }


def test_a_client_receives_the_documented_notification(server: Server) -> None:
    """The notification carries the message inside its data, before everything else there."""
    client = server.join()
    server.notify("System maintenance in 5 minutes", type="alert", data={"priority": "high", "category": "maintenance"})
    data = {"message": "System maintenance in 5 minutes", "priority": "high", "category": "maintenance"}
    assert client.receive() == notification(data, "alert")


def test_the_message_alone_is_enough(server: Server) -> None:
    """Type is custom and data empty unless they are given."""
    assert server.notify("hi")["notification"] == {"message": "hi", "type": "custom", "data": {}}


def test_the_message_alone_arrives_alone(server: Server) -> None:
    """Without data the notification's data has nothing but the message."""
    client = server.join()
    server.notify("hi")
    assert client.receive() == notification({"message": "hi"})


def test_everyone_receives_the_same(server: Server) -> None:
    """All clients get one notification with one id."""
    clients = [server.join() for _ in range(5)]
    server.notify("to all")
    assert len({json.dumps(client.receive()) for client in clients}) == 1


def test_recipients_is_the_number_of_clients(server: Server) -> None:
    """Three clients are three recipients."""
    for _ in range(3):
        server.join()
    assert server.notify("hi")["recipients"] == 3


def test_nobody_connected_is_no_error(server: Server) -> None:
    """Without clients the notification is sent to none."""
    assert server.notify("anyone?")["recipients"] == 0


def test_a_client_that_has_left_is_no_recipient(server: Server) -> None:
    """Recipients doesn't count a client that is gone."""
    server.join()
    server.join().leave()
    eventually(lambda: server.active() == 1)
    assert server.notify("hi")["recipients"] == 1


def test_a_newcomer_does_not_receive_the_past(server: Server) -> None:
    """A newcomer gets nothing that was published before it came."""
    server.notify("before")
    client = server.join()
    assert server.next_for(client) == "marker"


def test_notifications_arrive_in_the_order_of_their_publication(server: Server) -> None:
    """A client gets a hundred notifications in the order of their publication."""
    client = server.join()
    for number in range(100):
        server.notify(str(number))
    assert [received["data"]["message"] for received in client.receive_many(100)] == [str(n) for n in range(100)]


def test_ids_grow_strictly(server: Server) -> None:
    """An id is a UUIDv7 that is greater than all before it, however fast they are given."""
    client = server.join()
    for number in range(50):
        server.notify(str(number))
    ids = [received["id"] for received in client.receive_many(50)]
    assert ids == sorted(set(ids))


def test_publishers_at_the_same_time_share_one_order(server: Server) -> None:
    """When eight publish at once, two clients see all of it in the same order, by growing ids."""
    first, second = server.join(), server.join()
    with ThreadPoolExecutor(8) as publishers:
        list(publishers.map(server.notify, map(str, range(80))))
    seen = first.receive_many(80)
    assert sorted(seen, key=lambda each: str(each["id"])) == seen == second.receive_many(80)


def test_the_requests_message_wins_over_one_in_data(server: Server) -> None:
    """A message inside data does not replace the request's own, and takes no second place."""
    client = server.join()
    server.notify("outer", data={"priority": "low", "message": "inner"})
    assert client.receive() == notification({"message": "outer", "priority": "low"})


def test_the_answer_repeats_data_as_sent(server: Server) -> None:
    """The answer's notification has data untouched, a message in it included."""
    data = {"priority": "low", "message": "inner"}
    assert server.notify("outer", data=data)["notification"]["data"] == data


@pytest.mark.parametrize(
    "data",
    [
        {"b": 1, "a": {"d": [], "c": None}},
        {"": "", "null": None, "true": True, "list": [[], {}, [0]]},
        {"big": 2**64 - 1, "small": -(2**63), "real": 0.1, "tiny": 5e-324},
        {"text": 'quote " backslash \\ slash / newline \n nul \u0000 line \u2028 emoji 🦊 arabic مرحبا'},
    ],
    ids=["order", "empties", "numbers", "text"],
)
def test_data_arrives_as_it_was_sent(server: Server, data: dict[str, Any]) -> None:
    """Every JSON value gets through unchanged, in its order."""
    client = server.join()
    server.notify("hi", data=data)
    assert client.receive()["data"] == {"message": "hi"} | data


@pytest.mark.parametrize("number", ["18446744073709551616", "-9223372036854775809", "1" * 100])
@pytest.mark.parametrize("place", ['{"x": %s}', '{"x": [{"y":%s}]}', '{"1234567890123456789\\"": "\\"", "x": %s }'])
def test_an_integer_of_more_than_64_bits_is_refused(server: Server, place: str, number: str) -> None:
    """Read as a float it would arrive as another number; the error names it."""
    data = (place % number).encode()
    wanted = invalid("data: integer out of the 64-bit range", number[:64])
    assert refusal(server, b'{"message": "hi", "data": ' + data + b"}") == wanted
    batch = server.request("POST", "/notify/batch", content=b'[{"message": "hi", "data": ' + data + b"}]")
    assert answered(batch) == wanted


@pytest.mark.parametrize(
    "data",
    [
        {"text": "18446744073709551616", 'quote " 18446744073709551616': 'back\\slash\\" 18446744073709551616'},
        {"largest": 18446744073709551615, "least": -9223372036854775808},
        {"float": 1e300, "fraction": 0.12345678901234567, "exponent": 1.2345678901234567e30},
    ],
    ids=["text", "integers", "floats"],
)
def test_other_long_runs_of_digits_are_accepted(server: Server, data: dict[str, Any]) -> None:
    """Long runs of digits are accepted in texts and names, as large integers and as floats."""
    client = server.join()
    server.notify("12345678901234567890123", data=data)
    assert client.receive()["data"] == {"message": "12345678901234567890123"} | data


@pytest.mark.parametrize("message", ["x", " ", "m" * 8192, "é" * 8192, "🦊" * 8192], ids=lambda m: f"{m[0]}*{len(m)}")
def test_a_message_of_1_to_8192_characters_is_accepted(server: Server, message: str) -> None:
    """The limit counts characters, not bytes."""
    client = server.join()
    server.notify(message)
    assert client.receive()["data"]["message"] == message


@pytest.mark.parametrize("kind", ["t", "t" * 64, "system maintenance", "ü", "custom"])
def test_a_type_of_1_to_64_characters_is_accepted(server: Server, kind: str) -> None:
    """Any text that the protocol doesn't use itself is a type."""
    client = server.join()
    server.notify("hi", type=kind)
    assert client.receive()["type"] == kind


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/json; charset=utf-8",
        "APPLICATION/JSON",
        "text/json",
        "application/x-www-form-urlencoded",
        None,
    ],
)
def test_common_content_types_of_json_are_accepted(server: Server, content_type: str | None) -> None:
    """JSON, text, curl's form default and no content type at all are all read as JSON."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert server.post(b'{"message": "hi"}', headers=headers).status_code == 200


def test_a_body_of_exactly_the_limit_is_accepted(server: Server) -> None:
    """65,536 bytes are within the limit."""
    assert server.post(body_of(65_536)).status_code == 200


def test_a_body_in_chunks_is_accepted(server: Server) -> None:
    """A publisher needn't know the length beforehand."""
    chunks = (piece for piece in (b'{"mess', b'age": ', b'"hi"}'))
    assert server.http.post("/notify", content=chunks).status_code == 200


def test_250_levels_of_data_are_accepted(server: Server) -> None:
    """Data may be nested as deeply as orjson can write."""
    assert server.post(b'{"message": "hi", "data": ' + b'{"a":' * 250 + b"0" + b"}" * 251).status_code == 200


def test_the_documented_curl_line_works(server: Server) -> None:
    """The reference's example, run as it stands."""
    body = """{
    "message": "System maintenance in 5 minutes",
    "type": "maintenance",
    "data": {"priority": "high"}
  }"""
    command = [
        "curl",
        "-s",
        "-X",
        "POST",
        f"{server.url}/notify",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    answer = parse(subprocess.run(command, capture_output=True, check=True).stdout)
    assert answer["notification"]["type"] == "maintenance"


def test_curl_without_a_content_type_works(server: Server) -> None:
    """curl -d says x-www-form-urlencoded, and nobody thinks of it."""
    command = ["curl", "-s", f"{server.url}/notify", "-d", '{"message": "quick"}']
    assert parse(subprocess.run(command, capture_output=True, check=True).stdout)["status"] == "success"


# Refused.


def test_a_wrong_type_is_told_with_field_expectation_and_finding(server: Server) -> None:
    """The message names the field, the expected and the given type."""
    expected = http_error("validation", "data: expected object, got array")
    assert refusal(server, {"message": "hi", "data": [1]}) == (400, expected)


@pytest.mark.parametrize("field", ["message", "type", "data"])
@pytest.mark.parametrize("value", [None, 7, True, ["x"]])
def test_a_field_of_the_wrong_type_is_refused_by_name(server: Server, field: str, value: object) -> None:
    """null, numbers, booleans and arrays are no message, no type and no data."""
    assert refusal(server, {"message": "hi"} | {field: value}) == invalid(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("message", ""),
        ("message", "m" * 8193),
        ("message", {}),
        ("type", ""),
        ("type", "t" * 65),
        ("type", {}),
        ("data", "text"),
    ],
    ids=lambda v: str(v)[:9],
)
def test_a_value_out_of_bounds_is_refused_by_name(server: Server, field: str, value: object) -> None:
    """Too short, too long and of another kind are all told with the field's name."""
    assert refusal(server, {"message": "hi"} | {field: value}) == invalid(field)


def test_a_missing_message_is_refused_by_name(server: Server) -> None:
    """The message is required."""
    assert refusal(server, {"type": "alert"}) == invalid("message")


def test_an_unknown_field_is_refused_by_name(server: Server) -> None:
    """A misspelt field is not dropped silently."""
    assert refusal(server, {"message": "hi", "clints": ["bob"]}) == invalid("clints")


@pytest.mark.parametrize("kind", OWN_TYPES)
def test_the_protocols_own_types_are_refused(server: Server, kind: str) -> None:
    """Clients act on these types, so nobody may publish them."""
    assert refusal(server, {"message": "hi", "type": kind}) == invalid("type")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"{",
        b'{"message": "hi"} trailing',
        b"{'message': 'hi'}",
        b'{"message": "hi",}',
        b'{"message": "\xff\xfe"}',
        b'{"message": "hi", "data": {"x": NaN}}',
        b'{"message": "hi", "data": {"x": Infinity}}',
        b'{"message": "hi", "data": {"x": 1e400}}',
        b'{"message": "\\ud800"}',
        b'{"message": "hi", "data": {"\\udfff": 1}}',
        b"message=hi&type=alert",
        b'\xef\xbb\xbf{"message": "\xc3\x28"}',
    ],
)
def test_a_body_that_is_not_json_is_refused(server: Server, body: bytes) -> None:
    """Empty, cut off, single-quoted, not UTF-8, not a number: each is a validation error."""
    assert refusal(server, body) == invalid()


@pytest.mark.parametrize("body", [b"[]", b"null", b"42", b'"hi"', b"true"])
def test_json_that_is_no_object_is_refused(server: Server, body: bytes) -> None:
    """The body must be a JSON object."""
    assert refusal(server, body) == invalid("object")


@pytest.mark.parametrize("levels", [300, 1000, 5000])
def test_data_that_cannot_be_encoded_is_refused(server: Server, levels: int) -> None:
    """Data that is nested deeper than can be sent is a validation error."""
    assert refusal(server, b'{"message": "hi", "data": ' + b'{"a":' * levels + b"0" + b"}" * (levels + 1)) == invalid()


def test_a_body_over_the_limit_is_refused(server: Server) -> None:
    """One byte more than 65,536 is 413."""
    assert refusal(server, body_of(65_537)) == (413, http_error("validation", naming()))


def test_a_body_in_chunks_over_the_limit_is_refused(server: Server) -> None:
    """The limit holds to the byte for a body that doesn't tell its length."""
    body = body_of(65_537)
    response = server.http.post("/notify", content=(body[start : start + 1000] for start in range(0, 66_000, 1000)))
    assert answered(response) == (413, http_error("validation", naming()))


def test_the_size_comes_before_everything_else(server: Server) -> None:
    """A body that is too large, no JSON and of no accepted type is too large."""
    assert server.post(b"\xff" * 70_000, headers={"Content-Type": "image/png"}).status_code == 413


def test_the_limit_is_a_setting(start_server: StartServer) -> None:
    """With --max-message-size 100, 101 bytes are too many and 100 are not."""
    server = start_server("--max-message-size", "100")
    assert [server.post(body_of(size)).status_code for size in (100, 101)] == [200, 413]


@pytest.mark.parametrize("content_type", ["image/png", "multipart/form-data; boundary=x", "application/octet-stream"])
def test_another_content_type_is_refused(server: Server, content_type: str) -> None:
    """415 for a content type that is neither JSON, text, curl's form default, nor absent."""
    answer = refusal(server, b'{"message": "hi"}', headers={"Content-Type": content_type})
    assert answer == (415, http_error("validation", naming()))


@pytest.mark.parametrize(
    "body",
    [
        b'{"message": ""}',
        b'{"message": "x", "type": "ping"}',
        b'{"message": "x", "data": ' + b'{"a":' * 300 + b"0" + b"}" * 301,
        b"{" * 70_000,
    ],
    ids=["empty", "own type", "deep", "large"],
)
def test_a_refused_notification_reaches_no_client(server: Server, body: bytes) -> None:
    """After a refusal a client's next notification is the next one accepted."""
    client = server.join()
    server.post(body)
    assert server.next_for(client) == "marker"


def test_each_error_has_an_id_of_its_own(server: Server) -> None:
    """Two errors have two ids, to be found in the log."""
    ids = {parse(server.post(b"nonsense").content)["error"]["id"] for _ in range(2)}
    assert len(ids) == 2
