"""GET /notifications: the notifications that a client with these parameters would be replayed."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import StartServer
from expected import UUID7, answered, invalid, parse
from processes import Server, eventually

NEVER_GIVEN = "550e8400-e29b-41d4-a716-446655440000"


def history(server: Server, **parameters: Any) -> Any:
    """Return the parsed answer to a good request."""
    response = server.get("/notifications", params=parameters)
    assert response.status_code == 200, response.text
    return parse(response.content)


def texts(answer: Any) -> list[str]:
    return [notification["data"]["message"] for notification in answer["notifications"]]


def now(server: Server) -> str:
    """Return the position of the log."""
    return str(history(server, since="")["position"])


# Answers.


def test_the_notifications_are_those_that_a_client_receives(server: Server) -> None:
    """History has the notifications to the letter, oldest first, with topics where they were sent by topic."""
    client = server.join(query="client_id=ann&topics=red")
    start = now(server)
    server.notify("one", type="alert", data={"priority": "high"})
    server.notify("two", topics=["red", "blue"])
    last = server.post({"message": "three", "clients": ["ann"]}).headers["Notification-Id"]
    assert history(server, since=start, client_id="ann", topics="red") == {
        "notifications": client.receive_many(3),
        "position": last,
        "complete": True,
    }


def test_it_begins_after_since(server: Server) -> None:
    """The notification with that id is not among them."""
    first, _, last = server.publish("one", "two", "three")
    answer = history(server, since=first)
    assert (texts(answer), answer["position"]) == (["two", "three"], last)


def test_an_empty_since_asks_where_the_log_stands(server: Server) -> None:
    """Nothing of the past, and the newest id."""
    [last] = server.publish("one")
    assert history(server, since="") == {"notifications": [], "position": last, "complete": True}


def test_without_since_it_is_the_whole_history(start_server: StartServer) -> None:
    """Without since the answer starts at the beginning of the log."""
    server = start_server()
    *_, last = server.publish("one", "two")
    answer = history(server)
    assert (texts(answer), answer["position"], answer["complete"]) == (["one", "two"], last, True)


def test_an_empty_log_has_a_position_too(start_server: StartServer) -> None:
    """A poller that starts with an empty log gets everything."""
    server = start_server()
    answer = history(server)
    assert answer == {"notifications": [], "position": UUID7, "complete": True}
    server.publish("one")
    assert texts(history(server, since=answer["position"])) == ["one"]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, ["all"]),
        ({"client_id": "ann"}, ["ann", "both", "all"]),
        ({"client_id": "bob"}, ["all"]),
        ({"topics": "red"}, ["red", "both", "all"]),
        ({"topics": "green,red"}, ["red", "both", "all"]),
        ({"client_id": "ann", "topics": "red"}, ["ann", "red", "both", "all"]),
        ({"user": "auth0|eve"}, ["eve", "both", "all"]),
        ({"user": "red", "client_id": "auth0|eve", "topics": "ann"}, ["all"]),
        ({"client_id": "", "topics": "", "user": ""}, ["all"]),
    ],
)
def test_it_holds_the_notifications_for_such_a_client(
    server: Server, parameters: dict[str, str], expected: list[str]
) -> None:
    """The filter keeps notifications for the client_id, the user, the topics and everyone, and nothing else."""
    start = now(server)
    server.publish("ann", clients=["ann"])
    server.publish("red", topics=["red"])
    server.publish("eve", users=["auth0|eve"])
    server.publish("both", clients=["ann"], topics=["red"], users=["auth0|eve"])
    server.publish("all")
    assert texts(history(server, since=start, **parameters)) == expected


def test_the_answer_and_a_resume_agree(server: Server) -> None:
    """The same parameters give the same notifications, position and completeness on a WebSocket."""
    [start] = server.publish("start")
    server.publish("one")
    server.publish("ann", clients=["ann"])
    server.publish("bob", clients=["bob"])
    server.publish("eve", users=["eve"])
    answer = history(server, since=start, client_id="ann", user="eve")
    client = server.join(query=f"since={start}&client_id=ann&user=eve")
    assert client.receive()["data"] == {"position": answer["position"], "replayed": 3, "complete": answer["complete"]}
    assert client.receive_many(3) == answer["notifications"]


def test_test_notifications_are_not_in_it(start_server: StartServer) -> None:
    """Test notifications are not in the history, but the position may be one of theirs."""
    server = start_server("--notification-interval", "0.05")
    client = server.join()
    server.publish("one")
    client.receive_many(4)
    answer = history(server)
    assert texts(answer) == ["one"]
    assert answer["position"] > answer["notifications"][0]["id"]


# Page by page.


def test_a_hundred_unless_told(server: Server) -> None:
    """The oldest hundred come first, and the position is where to go on."""
    start = now(server)
    ids = server.publish(*map(str, range(101)))
    answer = history(server, since=start)
    assert texts(answer) == [str(number) for number in range(100)]
    assert answer["position"] == ids[99]


def test_a_thousand_at_most(start_server: StartServer) -> None:
    """The answer has as many as are asked for, a thousand at most."""
    server = start_server("--history-size", "2000")
    server.request("POST", "/notify/batch", json=[{"message": str(number)} for number in range(1000)])
    server.publish("1000")
    assert texts(history(server, limit=1000)) == [str(number) for number in range(1000)]


def test_position_leads_from_page_to_page(server: Server) -> None:
    """Going on there gives everything once and in order, with those for others left out."""
    start = now(server)
    for number in range(25):
        server.publish(str(number))
        server.publish("for somebody else", clients=["somebody"])
    read, position = [], start
    while page := history(server, since=position, limit=7)["notifications"]:
        read += [notification["data"]["message"] for notification in page]
        position = history(server, since=position, limit=7)["position"]
    assert read == [str(number) for number in range(25)]
    assert position == now(server)


def test_a_page_that_holds_all_leads_to_the_end_of_the_log(server: Server) -> None:
    """The position skips notifications for others, so that the next request does not search them again."""
    [start] = server.publish("start")
    server.publish("one")
    [last] = server.publish("for somebody else", clients=["somebody"])
    answer = history(server, since=start, limit=1)
    assert (texts(answer), answer["position"]) == (["one"], last)


# Complete.


def test_complete_reaches_as_far_back_as_the_history(start_server: StartServer) -> None:
    """An older id, and all that is kept without since, is not everything."""
    server = start_server("--history-size", "3")
    ids = server.publish(*map(str, range(6)))
    answers = [history(server, since=id) for id in ids]
    assert [(answer["complete"], len(answer["notifications"])) for answer in answers] == [
        (False, 3),
        (False, 3),
        (True, 3),
        (True, 2),
        (True, 1),
        (True, 0),
    ]
    assert (texts(history(server)), history(server)["complete"]) == (["3", "4", "5"], False)


@pytest.mark.parametrize("since", [NEVER_GIVEN, "ffffffff-ffff-7fff-bfff-ffffffffffff"])
def test_an_id_that_was_never_given_proves_nothing(start_server: StartServer, since: str) -> None:
    """Everything that is kept is in the answer, and it may not be all."""
    server = start_server()
    server.publish("one")
    answer = history(server, since=since)
    assert (texts(answer), answer["complete"]) == (["one"], False)


def test_an_expired_notification_is_not_in_it(start_server: StartServer) -> None:
    """An expired notification is gone even if nothing has been published since."""
    server = start_server("--history-ttl", "0.2")
    [last] = server.publish("one")
    eventually(lambda: history(server)["notifications"] == [])
    assert history(server) == {"notifications": [], "position": last, "complete": False}


# Refused.


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "1e2", "1.5", "ten", "", "٣", "99999999999999999999"])
def test_a_bad_limit_is_refused(server: Server, limit: str) -> None:
    """The error names the parameter and its bounds."""
    response = server.get("/notifications", params={"limit": limit})
    assert answered(response) == invalid("limit", "1", "1000")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"since": "x"}, ["since"]),
        ({"topics": "a,,b"}, ["topics"]),
        ({"topics": "x" * 129}, ["topics", "128"]),
        ({"client_id": "not an id"}, ["client_id"]),
    ],
)
def test_a_bad_parameter_is_refused(server: Server, parameters: dict[str, str], words: list[str]) -> None:
    """The error names it."""
    response = server.get("/notifications", params=parameters)
    assert answered(response) == invalid(*words)


def test_head_answers_without_a_body(server: Server) -> None:
    """HEAD answers as GET does, without a body."""
    response = server.request("HEAD", "/notifications")
    assert (response.status_code, response.content) == (200, b"")


def test_other_methods_are_not_allowed(server: Server) -> None:
    """The answer is the documented body and names the methods that are allowed."""
    response = server.request("DELETE", "/notifications")
    assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
