"""Targets: a notification for some reaches those and nobody else, live and in a replay."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import pytest
from expected import TIME, UUID7, answered, invalid, naming, notification, ws_error
from processes import Server
from virtual import FakeConnection, VirtualLoop
from ws_clients import Client

from admission import Newcomer
from connection import ConnectionState
from hub import Hub
from settings import Settings

HUNDRED = [f"topic{number}" for number in range(100)]


class Names:
    """Equal to a list of these names in any order, each once."""

    def __init__(self, *names: str) -> None:
        self._names = sorted(names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and sorted(other) == self._names

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Names{tuple(self._names)}"


def subscribed(*topics: str) -> dict[str, Any]:
    """The answer to subscribe and unsubscribe."""
    return {"type": "subscribed", "topics": Names(*topics), "timestamp": TIME}


def listening(server: Server, client_id: str, topics: str = "", user: str = "") -> Client:
    """Join with topics and a user in the URL."""
    return server.join(query=f"client_id={client_id}&topics={topics}&user={quote(user)}")


def received(server: Server, *clients: Client) -> list[list[str]]:
    """Publish a marker for everyone, and return the notifications of each client before it."""
    server.notify("marker")
    seen = []
    for client in clients:
        messages: list[str] = []
        while (message := client.receive()["data"]["message"]) != "marker":
            messages.append(message)
        seen.append(messages)
    return seen


# Audiences.


def test_a_notification_for_clients_reaches_those_and_nobody_else(server: Server) -> None:
    """Two of three are named; the third sees nothing of it."""
    clients = [listening(server, name) for name in ("ann", "bob", "cat")]
    assert server.notify("private", clients=["ann", "cat"])["recipients"] == 2
    assert received(server, *clients) == [["private"], [], ["private"]]


def test_a_notification_for_topics_reaches_subscribers_of_each(server: Server) -> None:
    """Each topic is enough, and other topics are not."""
    clients = [
        listening(server, name, topics)
        for name, topics in [("ann", "red"), ("bob", "green,blue"), ("cat", "grey"), ("dan", "")]
    ]
    assert server.notify("colours", topics=["red", "blue"])["recipients"] == 2
    assert received(server, *clients) == [["colours"], ["colours"], [], []]


def test_a_notification_for_users_reaches_each_of_their_clients(server: Server) -> None:
    """Every device of a user gets it, on a WebSocket and on a stream, and nobody else."""
    users = {"tab": "auth0|ann", "phone": "auth0|ann", "bob": "José 李", "cat": "cat", "dan": ""}
    clients = [listening(server, name, user=user) for name, user in users.items()]
    with server.http.stream("GET", "/events", params={"user": "auth0|ann"}) as stream:
        lines = stream.iter_lines()
        assert any("welcome" in line for line in lines)
        assert server.notify("private", users=["auth0|ann", "José 李", "nobody"])["recipients"] == 4
        assert any('"message":"private"' in line for line in lines)
    assert received(server, *clients) == [["private"], ["private"], ["private"], [], []]


def test_clients_topics_and_users_are_a_union(server: Server) -> None:
    """A client addressed several times gets the notification once and counts once."""
    clients = [
        listening(server, "ann", "red", "eve"),
        listening(server, "bob"),
        listening(server, "cat", "red,blue"),
        listening(server, "dan", user="eve"),
    ]
    target = {"clients": ["ann", "bob"], "topics": ["red", "blue"], "users": ["eve", "nobody"]}
    assert server.notify("all", **target)["recipients"] == 4
    assert received(server, *clients) == [["all"]] * 4


def test_none_of_them_is_for_everyone(server: Server) -> None:
    """Without clients, topics and users a notification reaches all, whatever their topics and users."""
    clients = [listening(server, "ann", "red"), listening(server, "bob", user="bob")]
    assert server.notify("all")["recipients"] == 2
    assert received(server, *clients) == [["all"], ["all"]]


def test_the_same_name_means_three_different_things(server: Server) -> None:
    """A client, a topic and a user of one name have nothing to do with each other."""
    clients = [listening(server, "red"), listening(server, "ann", "red"), listening(server, "bob", user="red")]
    for kind in ("clients", "topics", "users"):
        assert server.notify(kind, **{kind: ["red"]})["recipients"] == 1
    assert received(server, *clients) == [["clients"], ["topics"], ["users"]]


def test_names_are_compared_to_the_letter(server: Server) -> None:
    """Neither case nor a space inside nor a common beginning makes one name another."""
    client = listening(server, "ann", "red", "eve")
    recipients = [
        server.notify("x", topics=[name])["recipients"] for name in ("Red", "re", "redd", "r ed", "red\u00a0")
    ]
    recipients += [server.notify("x", clients=[name])["recipients"] for name in ("Ann", "an", "anne")]
    recipients += [server.notify("x", users=[name])["recipients"] for name in ("Eve", " eve", "eve ", "ev")]
    assert (recipients, received(server, client)) == ([0] * 12, [[]])


def test_everything_arrives_in_the_order_of_publication(server: Server) -> None:
    """Targeted and other notifications keep their order."""
    client = listening(server, "ann", "red", "eve")
    reaching: list[dict[str, list[str]]] = [{}, {"topics": ["red"]}, {"clients": ["ann"]}, {"users": ["eve"]}]
    targets = [*reaching, {"topics": ["blue"]}, {"users": ["ann"]}]
    for number in range(120):
        server.notify(str(number), **targets[number % 6])
    assert received(server, client) == [[str(number) for number in range(120) if number % 6 < 4]]


def test_recipients_counts_the_addressed_clients_now(server: Server) -> None:
    """An absent client, topic or user counts for nothing, and is no error."""
    listening(server, "ann", "red")
    assert server.notify("x", clients=["ann", "nobody"], topics=["red", "nothing"], users=["ann"])["recipients"] == 1
    for kind in ("clients", "topics", "users"):
        assert server.notify("x", **{kind: ["nobody"]})["recipients"] == 0


@pytest.mark.parametrize("target", [{"clients": ["late"]}, {"topics": ["late"]}, {"users": ["late"]}])
def test_a_notification_for_an_absent_client_is_kept_for_resume(server: Server, target: dict[str, list[str]]) -> None:
    """A client that was away, or subscribes only when it comes back, is replayed the notifications it missed."""
    position = server.read("/notifications?since=")["position"]
    server.notify("kept", **target)
    client = server.join(query=f"client_id=late&topics=late&user=late&since={position}")
    assert client.receive()["data"]["replayed"] == 1
    assert client.receive()["data"]["message"] == "kept"


def test_a_private_notification_is_replayed_to_nobody_else(server: Server) -> None:
    """A private notification is replayed to no other client_id and no other user, nor to another kind of that name."""
    position = server.read("/notifications?since=")["position"]
    server.notify("private", clients=["ann"])
    server.notify("private", users=["eve"])
    for query in ("client_id=bob&topics=ann,eve&user=ann", "client_id=Ann&user=Eve", "client_id=eve", ""):
        assert server.join(query=f"{query}&since={position}").receive()["data"]["replayed"] == 0


# Form.


def test_a_notification_by_topic_carries_all_its_topics_beside_data(server: Server) -> None:
    """A notification carries its topics beside data, even those that the client does not follow."""
    client = listening(server, "ann", "red")
    server.notify("colours", type="alert", topics=["red", "blue", "red"])
    assert client.receive() == {
        "id": UUID7,
        "type": "alert",
        "timestamp": TIME,
        "data": {"message": "colours"},
        "topics": Names("red", "blue"),
        "sender": "notification_service",
    }


@pytest.mark.parametrize("kind", ["clients", "users"])
def test_a_private_notification_does_not_name_its_addressees(server: Server, kind: str) -> None:
    """It looks like any other, live and in the history, so that nobody learns the names of the others."""
    client = listening(server, "ann", user="ann")
    before = server.read("/notifications?since=")["position"]
    server.notify("private", **{kind: ["ann", "bob"]})
    assert client.receive() == notification({"message": "private"})
    kept = server.read(f"/notifications?client_id=ann&user=ann&since={before}")["notifications"]
    assert kept == [notification({"message": "private"})]


def test_the_answer_repeats_the_addressees(server: Server) -> None:
    """The request as it was understood."""
    target = {"clients": ["ann"], "topics": ["red"], "users": ["auth0|ann"]}
    request = {"message": "x", "type": "custom", "data": {}, **target}
    assert server.notify("x", **target)["notification"] == request


# Refused.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clients": []}, ["clients"]),
        ({"topics": []}, ["topics"]),
        ({"clients": [], "topics": ["red"]}, ["clients"]),
        ({"clients": "ann"}, ["clients", "array", "string"]),
        ({"users": []}, ["users"]),
        ({"users": "ann"}, ["users", "array", "string"]),
        ({"users": [""]}, ["users[0]", "1"]),
        ({"users": ["ann", "x" * 256]}, ["users[1]: expected 1 to 255 characters without control characters"]),
        ({"users": ["a\nb"]}, ["users[0]: expected 1 to 255 characters without control characters"]),
        ({"users": ["x"] * 1001}, ["users", "1000"]),
        ({"user": ["ann"]}, ["user", "unknown"]),
        ({"topics": "red"}, ["topics", "array", "string"]),
        ({"topics": None}, ["topics"]),
        ({"clients": ["ann", 1]}, ["clients", "1", "string"]),
        ({"clients": ["not an id"]}, ["clients[0]: expected 1 to 128 of letters, digits and ._:@|+/=~-"]),
        ({"clients": ["ann", "x" * 129]}, ["clients[1]: expected 1 to 128 of letters, digits and ._:@|+/=~-"]),
        ({"topics": ["a,b"]}, ["topics[0]: expected 1 to 128 characters without comma and control characters"]),
        ({"clients": [""]}, ["clients"]),
        ({"clients": ["x"] * 1001}, ["clients", "1000"]),
        ({"topics": ["x"] * 101}, ["topics", "100"]),
        ({"topics": [""]}, ["topics"]),
        ({"topics": ["red", " "]}, ["topics[1]", "not spaces alone"]),
        ({"topics": ["red", "x" * 129]}, ["topics", "1", "128"]),
        ({"topic": ["red"]}, ["topic", "unknown"]),
        ({"client": ["ann"]}, ["client", "unknown"]),
    ],
)
def test_bad_targets_are_refused_and_sent_to_nobody(server: Server, fields: dict[str, Any], words: list[str]) -> None:
    """The error names the field; above all, nothing goes to everyone by mistake."""
    client = listening(server, "ann", "red")
    response = server.post({"message": "oops"} | fields)
    assert answered(response) == invalid(*words)
    assert received(server, client) == [[]]


@pytest.mark.parametrize("topic", ["x", "x" * 128, "ünï", "a b", "a/b#c"])
def test_topics_have_1_to_128_characters_of_any_kind(server: Server, topic: str) -> None:
    """Characters, not bytes."""
    client = server.join("ann")
    assert client.ask({"type": "subscribe", "topics": [topic]}) == subscribed(topic)
    assert server.notify("x", topics=[topic])["recipients"] == 1


def test_spaces_around_a_topic_do_not_count(server: Server) -> None:
    """They are the same name in the body of a publish, in a batch, in messages and in URLs."""
    [before] = server.publish("before")
    client = listening(server, "ann", "%20red")
    assert client.ask({"type": "subscribe", "topics": ["a b ", "  blue", "green"]}) == subscribed(
        "a b", "blue", "green", "red"
    )
    assert client.ask({"type": "unsubscribe", "topics": [" green "]}) == subscribed("a b", "blue", "red")
    assert client.ask({"type": "subscribe", "topics": [" "]}) == ws_error(naming("topics[0]", "not spaces alone"))
    answer = server.notify("one", topics=["red ", " blue", "red"])
    assert (answer["recipients"], answer["notification"]["topics"]) == (1, ["red", "blue", "red"])
    server.request("POST", "/notify/batch", json=[{"message": "two", "topics": [" a b"]}])
    assert received(server, client) == [["one", "two"]]
    shown = server.read(f"/notifications?topics=blue,%20a%20b%20&since={before}")["notifications"]
    assert [one["topics"] for one in shown if "topics" in one] == [["blue", "red"], ["a b"]]


# Subscribing.


def test_topics_can_be_given_in_the_url(server: Server) -> None:
    """The welcome follows at once, and no `subscribed` with it."""
    client = listening(server, "ann", "red,blue")
    assert client.ask({"type": "ping"})["type"] == "pong"
    assert server.notify("x", topics=["blue"])["recipients"] == 1


def test_subscribe_is_answered_with_all_topics_now(server: Server) -> None:
    """Those that were there before, too, each once."""
    client = listening(server, "ann", "red")
    assert client.ask({"type": "subscribe", "topics": ["blue", "red"]}) == subscribed("blue", "red")
    assert server.notify("x", topics=["blue"])["recipients"] == 1


def test_unsubscribe_is_answered_with_the_topics_that_are_left(server: Server) -> None:
    """Unsubscribing from an unknown topic is no error."""
    client = listening(server, "ann", "red,blue")
    assert client.ask({"type": "unsubscribe", "topics": ["red", "grey"]}) == subscribed("blue")
    assert server.notify("x", topics=["red"])["recipients"] == 0


def test_the_last_topic_can_go(server: Server) -> None:
    """Without topics a client still gets notifications for everyone and for itself."""
    client = listening(server, "ann", "red")
    assert client.ask({"type": "unsubscribe", "topics": ["red"]}) == subscribed()
    server.notify("red", topics=["red"])
    server.notify("own", clients=["ann"])
    assert received(server, client) == [["own"]]


def test_a_subscription_holds_from_its_answer_on(server: Server) -> None:
    """Notifications published before it do not come, later ones do."""
    client = server.join("ann")
    server.notify("before", topics=["red"])
    # Of several processes, the one of the client may read that later than it was published.
    assert received(server, client) == [[]]
    client.ask({"type": "subscribe", "topics": ["red"]})
    server.notify("after", topics=["red"])
    assert received(server, client) == [["after"]]


def test_subscriptions_end_with_the_connection(server: Server) -> None:
    """A client that comes back must subscribe again."""
    listening(server, "ann", "red").leave()
    client = server.join("ann")
    assert server.notify("x", topics=["red"])["recipients"] == 0
    assert received(server, client) == [[]]


@pytest.mark.parametrize("kind", ["subscribe", "unsubscribe"])
@pytest.mark.parametrize(
    "topics",
    [None, [], "red", [""], ["green", ""], [1], ["x" * 129], ["green", "a,b"], {"red": 1}, ["a\nb"]],
)
def test_a_bad_request_is_answered_by_an_error_and_changes_nothing(server: Server, kind: str, topics: Any) -> None:
    """The valid names of a bad request do not count either."""
    client = listening(server, "ann", "red")
    assert client.ask({"type": kind, "topics": topics}) == ws_error(naming("topics"))
    assert client.ask({"type": "unsubscribe", "topics": ["no such topic"]}) == subscribed("red")


@pytest.mark.parametrize("kind", ["subscribe", "unsubscribe"])
def test_topics_are_required(server: Server, kind: str) -> None:
    """The error names the missing field."""
    assert server.join().ask({"type": kind}) == ws_error(naming("topics", "missing"))


@pytest.mark.parametrize("topics", ["a,,b", ",", "a,", "x" * 129, "red,a%0Ab"])
def test_bad_topics_in_the_url_are_refused(server: Server, topics: str) -> None:
    """The connection is closed, and the reason names the mistake."""
    code, reason = server.connect(query=f"topics={topics}").closed()
    assert code == 1008 and str(reason).startswith("Invalid topics: ")


# At most a hundred.


def test_a_client_may_have_a_hundred_topics(server: Server) -> None:
    """A client may have a hundred topics, in the URL or by message."""
    assert server.join().ask({"type": "subscribe", "topics": HUNDRED}) == subscribed(*HUNDRED)
    listening(server, "ann", ",".join(HUNDRED))
    assert server.notify("x", topics=["topic99"])["recipients"] == 2


def test_one_topic_more_is_refused_and_changes_nothing(server: Server) -> None:
    """The error names the limit, and the hundred stay."""
    client = listening(server, "ann", ",".join(HUNDRED))
    assert client.ask({"type": "subscribe", "topics": ["more"]}) == ws_error(naming("topics", "100"))
    assert client.ask({"type": "unsubscribe", "topics": ["none"]}) == subscribed(*HUNDRED)


def test_a_repeated_topic_counts_once(server: Server) -> None:
    """A client with a hundred topics may name one of them again."""
    client = listening(server, "ann", ",".join(HUNDRED))
    assert client.ask({"type": "subscribe", "topics": ["topic7"]}) == subscribed(*HUNDRED)


def test_a_hundred_and_one_in_the_url_are_refused(server: Server) -> None:
    """A hundred and one topics in the URL are refused with the limit in the reason."""
    code, reason = server.connect(query=f"topics={','.join([*HUNDRED, 'more'])}").closed()
    assert (code, reason) == (1008, naming("Invalid topics: ", "100"))


# Costs.


class Asked(FakeConnection):
    """A connection that counts how often it was asked whether it can be written to."""

    asked = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "writable":
            type(self).asked += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("target", [{"clients": ["client7"]}, {"topics": ["seven"]}, {"users": ["the 7th"]}])
def test_the_cost_is_that_of_the_audience(target: dict[str, list[str]]) -> None:
    """A notification for one of a thousand bothers nobody else."""
    loop = VirtualLoop()
    hub = Hub(Settings(notification_interval=0, ping_interval=0))

    async def publish_to_one_of_a_thousand() -> int:
        clients = [Asked() for _ in range(1000)]
        for number, client in enumerate(clients):
            topics = ["seven"] if number == 7 else []
            await hub.admit(client, Newcomer(f"client{number}", topics=topics, user=f"the {number}th"))
        await hub.notify("first, for all")
        await asyncio.sleep(1)
        before = Asked.asked
        assert (await hub.notify("for one", **target)).recipients == 1
        await asyncio.sleep(1)
        after = Asked.asked
        assert [len(client.messages) for client in clients[6:9]] == [2, 3, 2]
        assert all(client.state is ConnectionState.OPEN for client in clients)
        await hub.stop()
        return after - before

    try:
        assert loop.run_until_complete(publish_to_one_of_a_thousand()) < 10
    finally:
        loop.close()
