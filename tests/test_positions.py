"""Positions: a client that receives nothing for a long time still knows where to resume, and misses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from carriers import CARRIERS, first_quick, host
from conftest import StartServer
from event_stream import Event, Stream, join
from expected import PING, TIME, UUID7
from processes import Server, eventually
from ws_clients import Client

HISTORY_SECONDS = 2.0
SHORT_HISTORY = ("--history-ttl", str(HISTORY_SECONDS), "--ping-interval", "0.2")
OLD = "00000000-0000-0000-0000-000000000000"


@pytest.fixture(scope="module")
def forgetful() -> Iterator[Server]:
    """A server that pings often, and keeps notifications for a moment only."""
    server = Server.notifyd("--notification-interval", "0", *SHORT_HISTORY)
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["ours", *first_quick(CARRIERS)])
def anywhere(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The same, also on the servers of others."""
    if request.param == "ours":
        yield request.getfixturevalue("forgetful")
        return
    command, app, flags, prefix = CARRIERS[request.param]
    variables = {"NOTIFYD_HISTORY_TTL": str(HISTORY_SECONDS), "NOTIFYD_PING_INTERVAL": "0.2"}
    server = host(command, app, *flags, prefix=prefix, **variables)
    yield server
    server.kill()


def position(id: object = UUID7) -> dict[str, object]:
    return {"type": "position", "position": id, "timestamp": TIME}


def missed(server: Server, since: str, query: str = "") -> tuple[bool, list[str]]:
    """Come back as a browser does; return `complete` and the messages that are replayed."""
    stream = join(server, query, {"Last-Event-ID": since})
    resume = stream.event().data["data"]
    replayed = [event.data["data"]["message"] for event in stream.events(resume["replayed"])]
    stream.leave()
    return resume["complete"], replayed


# The position at which a stream begins.


@pytest.mark.parametrize("query", ["client_id=ann", "client_id=ann&since="])
def test_a_stream_that_has_received_nothing_misses_nothing(start_server: StartServer, query: str) -> None:
    """It comes back with the id of its welcome, and gets everything that was published meanwhile."""
    server = start_server()
    stream = join(server, query)
    stream.leave()
    eventually(lambda: server.active() == 0)
    server.publish("for all")
    server.publish("for ann", clients=["ann"])
    assert missed(server, stream.last_id, query) == (True, ["for all", "for ann"])


def test_a_stream_without_since_begins_at_the_newest_position(server: Server) -> None:
    """The welcome has the id of the newest notification."""
    [newest] = server.publish("one")
    assert join(server).last_id == newest


def test_a_stream_that_is_cut_before_its_replay_misses_nothing(server: Server) -> None:
    """The welcome has the id that precedes the replay."""
    first, *_ = server.publish("one", "two", "three")
    stream = join(server, f"since={first}")
    assert stream.last_id == first
    assert stream.event().id is None
    stream.leave()
    assert missed(server, stream.last_id) == (True, ["two", "three"])


def test_a_stream_that_is_cut_before_its_resume_is_told_again_of_what_is_missing(start_server: StartServer) -> None:
    """Only the resume says that notifications may be missing, so the id that is not proven is kept until then."""
    server = start_server("--history-size", "1")
    first, *_ = server.publish("one", "two", "three")
    stream = join(server, f"since={first}")
    assert missed(server, stream.last_id) == (False, ["three"])


def test_a_stream_that_was_told_of_what_is_missing_is_not_told_again(start_server: StartServer) -> None:
    """A resume without a replay takes the stream to the position that it names."""
    server = start_server("--history-ttl", "0.2")
    _, newest = server.publish("one", "two")
    eventually(lambda: missed(server, OLD) == (False, []))
    stream = join(server, f"since={OLD}")
    assert stream.event().id == newest
    assert missed(server, stream.last_id) == (True, [])


# The heartbeat.


def follow_others(server: Server, stream: Stream) -> None:
    """Publish for somebody else until the history has let go of everything that the stream knew at first."""
    first, until = stream.last_id, time.monotonic() + 2 * HISTORY_SECONDS
    while time.monotonic() < until:
        [newest] = server.publish("for bob", clients=["bob"])
        while stream.last_id != newest:
            assert stream.event() == Event("position", position(stream.last_id), stream.last_id)
        time.sleep(0.1)
    assert missed(server, first, "client_id=cid")[0] is False


def test_a_quiet_stream_misses_nothing(anywhere: Server) -> None:
    """While others receive, the heartbeat tells a stream the position, so that it never leaves the history."""
    stream = join(anywhere, "client_id=ann")
    follow_others(anywhere, stream)
    stream.leave()
    anywhere.publish("for ann", clients=["ann"])
    assert missed(anywhere, stream.last_id, "client_id=ann") == (True, ["for ann"])


def test_a_stream_is_told_no_position_that_it_knows(forgetful: Server) -> None:
    """Behind a notification of its own, or a position, comes the plain heartbeat."""
    stream = join(forgetful, "client_id=ann&topics=red")
    for fields in ({}, {"clients": ["ann"]}, {"topics": ["red"]}):
        forgetful.publish("mine", **fields)
        time.sleep(0.5)
    forgetful.publish("for bob", clients=["bob"])
    assert [event.name for event in stream.events(4)] == ["message", "message", "message", "position"]
    forgetful.publish("last")
    assert stream.event().name == "message"
    assert "ping" in stream.comments


def test_a_subscriber_is_told_the_position_behind_what_came_before(forgetful: Server) -> None:
    """A notification for a topic is no news of the position for a client that has subscribed to it since."""
    client = forgetful.join(query="since=")
    client.receive()
    assert next_but_pings(client, {"type": "status_request"})["type"] == "status_response"
    [newest] = forgetful.publish("red", topics=["red"])
    asked = next_but_pings(client, {"type": "subscribe", "topics": ["red"]})
    answers = [asked, next_but_pings(client)]
    assert {"type": "subscribed", "topics": ["red"], "timestamp": TIME} in answers
    assert position(newest) in answers


def next_but_pings(client: Client, question: object = None) -> object:
    if question is not None:
        client.send(question)
    while (message := client.receive()) == PING:
        pass
    return message


@pytest.mark.parametrize("since", [lambda _: "", lambda server: server.publish("one")[0]], ids=["empty", "an id"])
def test_a_websocket_that_resumes_is_told_its_position(anywhere: Server, since: Callable[[Server], str]) -> None:
    """Once for each position, beside the pings."""
    client = anywhere.join(query=f"since={since(anywhere)}")
    assert client.receive()["type"] == "resume"
    for _ in range(2):
        [newest] = anywhere.publish("for bob", clients=["bob"])
        assert next_but_pings(client) == position(newest)
        assert client.receive_many(3) == [PING] * 3
    client.leave()


def test_a_websocket_without_since_gets_the_pings_alone(forgetful: Server) -> None:
    """A client that follows only the reference sees no difference."""
    client = forgetful.join()
    forgetful.publish("for bob", clients=["bob"])
    assert client.receive_many(5) == [PING] * 5


def test_the_position_is_of_what_the_client_has_been_handed(start_server: StartServer) -> None:
    """With several processes, too: nothing that a client is yet to be sent comes before a position that it was told."""
    server = start_server("--workers", "2", "--ping-interval", "0.05")
    stream = join(server, "client_id=ann")
    for number in range(100):
        server.publish("for bob", clients=["bob"])
        server.publish(str(number), clients=["ann"])
    received: list[Event] = []
    while len([event for event in received if event.name == "message"]) < 100:
        received.append(stream.event())
    ids = [event.id for event in received]
    assert ids == sorted(set(map(str, ids)))


def test_nobody_may_publish_a_position(server: Server) -> None:
    """Clients act on it, so it is one of the protocol's own types."""
    response = server.post({"message": "x", "type": "position"})
    assert response.status_code == 400
