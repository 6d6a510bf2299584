"""Resume: a client that comes back with the id of the last notification it received has missed nothing."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from typing import Any

import pytest
from conftest import StartServer
from expected import TIME, UUID7, welcome
from processes import Server, eventually
from websockets.asyncio.client import connect
from ws_clients import Client, parse_message

NEVER_GIVEN = "550e8400-e29b-41d4-a716-446655440000"
SLOW = re.compile(r"Slow consumer: (\d+) notifications behind; resume with since=(\S+)")


def resume(position: object, replayed: int, complete: bool) -> dict[str, Any]:
    """The message that follows the welcome of a client with `since`."""
    data = {"position": position, "replayed": replayed, "complete": complete}
    return {"type": "resume", "timestamp": TIME, "data": data}


def resumed(server: Server, since: str, query: str = "") -> tuple[dict[str, Any], list[str], Client]:
    """Resume; return the data of the `resume`, the replayed messages, and the client."""
    client = server.join(query=f"since={since}{query}")
    data = client.receive()["data"]
    return data, texts(client.receive_many(data["replayed"])), client


def texts(notifications: list[Any]) -> list[str]:
    return [notification["data"]["message"] for notification in notifications]


def log_size(server: Server) -> int:
    """The number of notifications in the server's log."""
    found = re.search(r"^notifyd_log_notifications (\d+)$", server.get("/metrics/prometheus").text, re.MULTILINE)
    assert found
    return int(found[1])


# The `resume`, and the notifications after it.


def test_after_the_welcome_comes_the_resume(server: Server) -> None:
    """Both come first, in this order, with the documented fields in theirs."""
    first, _, last = server.publish("one", "two", "three")
    client = server.connect(query=f"client_id=ann&since={first}")
    assert client.receive_many(2) == [welcome("ann"), resume(last, 2, True)]


def test_missed_notifications_are_replayed_in_order(server: Server) -> None:
    """Everything after the id comes, as it would have come live, and the id itself doesn't."""
    witness = server.join()
    first, *_ = server.publish("one", "two", "three", "four")
    client = server.join(query=f"since={first}")
    assert client.receive_many(4)[1:] == witness.receive_many(4)[1:]


def test_live_notifications_follow_the_replay(server: Server) -> None:
    """Notifications published after the resume follow the replay."""
    first, _ = server.publish("one", "two")
    _, replayed, client = resumed(server, first)
    server.publish("three")
    assert [*replayed, client.receive()["data"]["message"]] == ["two", "three"]


def test_a_client_that_missed_nothing_is_told_so(server: Server) -> None:
    """After the newest id there is nothing to replay, and that is complete."""
    [last] = server.publish("one")
    data, _, client = resumed(server, last)
    assert data == {"position": last, "replayed": 0, "complete": True}
    server.publish("two")
    assert client.receive()["data"]["message"] == "two"


def test_an_empty_since_starts_now_and_tells_the_position(server: Server) -> None:
    """Nothing of the past comes, but the client knows where it stands."""
    [last] = server.publish("one")
    assert server.join(query="since=").receive() == resume(last, 0, True)


def test_without_since_there_is_no_resume(server: Server) -> None:
    """A client that follows only the reference sees no difference."""
    server.publish("before")
    client = server.join()
    server.publish("after")
    assert client.receive()["data"]["message"] == "after"


def test_the_position_of_an_empty_log_is_an_id_to_resume_from(start_server: StartServer) -> None:
    """A client that has never seen a notification misses none either."""
    server = start_server()
    data, _, client = resumed(server, "")
    client.leave()
    server.publish("one", "two")
    assert data["position"] == UUID7
    assert resumed(server, data["position"])[:2] == (
        {"position": UUID7, "replayed": 2, "complete": True},
        ["one", "two"],
    )


def test_the_position_of_a_resume_is_an_id_to_resume_from(server: Server) -> None:
    """A client that was told a position and then lost its connection goes on there."""
    data, _, client = resumed(server, "")
    client.leave()
    server.publish("while away")
    assert resumed(server, data["position"])[1] == ["while away"]


def test_the_last_id_may_be_of_a_notification_for_another_client(server: Server) -> None:
    """An id of any kind will do: positions are one order for all."""
    server.publish("one")
    [private] = server.publish("private", clients=["somebody"])
    server.publish("two")
    data, replayed, _ = resumed(server, private)
    assert (data["complete"], replayed) == (True, ["two"])


def test_only_notifications_for_the_client_are_replayed(server: Server) -> None:
    """The replay has notifications for the client_id, its user, its topics and everyone."""
    [start] = server.publish("start")
    server.publish("for ann", clients=["ann"])
    server.publish("for bob", clients=["bob"])
    server.publish("for eve", users=["eve"])
    server.publish("for fay", users=["fay", "ann", "red"])
    server.publish("red", topics=["red"])
    server.publish("blue", topics=["blue"])
    server.publish("for all")
    data, replayed, _ = resumed(server, start, "&client_id=ann&topics=red&user=eve")
    assert (data["replayed"], replayed) == (4, ["for ann", "for eve", "red", "for all"])


def test_a_resume_can_be_repeated(server: Server) -> None:
    """A connection that is lost during the replay costs nothing: the same id gives the same again."""
    first, *_ = server.publish("one", "two", "three")
    assert resumed(server, first)[1] == resumed(server, first)[1] == ["two", "three"]


def test_an_id_in_upper_case_is_the_same_id(server: Server) -> None:
    """RFC 9562: a UUID is read case-insensitively."""
    first, _ = server.publish("one", "two")
    data, replayed, _ = resumed(server, first.upper())
    assert (data["complete"], replayed) == (True, ["two"])


@pytest.mark.parametrize("since", ["x", "0", "now", "%20", NEVER_GIVEN + "0", NEVER_GIVEN[:-1], "z" + NEVER_GIVEN[1:]])
def test_since_other_than_an_id_is_refused(server: Server, since: str) -> None:
    """The connection is closed with the reason, without a welcome."""
    client = server.connect(query=f"since={since}")
    assert (client.rest(), client.closed()) == ([], (1008, "Invalid since"))


# Test notifications.


def test_test_notifications_are_not_replayed_but_can_be_resumed_from(start_server: StartServer) -> None:
    """Their ids have a place in the order: later notifications are replayed, test notifications never."""
    server = start_server("--notification-interval", "0.1")
    client = server.join()
    server.publish("before")
    tests = [message for message in client.receive_many(4) if message["type"] == "test_notification"]
    client.leave()
    server.publish("after")
    data, replayed, _ = resumed(server, tests[-1]["id"])
    assert (data["complete"], data["replayed"], replayed) == (True, 1, ["after"])


def test_all_ids_are_in_one_order(start_server: StartServer) -> None:
    """Test notifications and others arrive by growing ids."""
    server = start_server("--notification-interval", "0.05")
    client = server.join()
    for number in range(20):
        server.publish(str(number))
    ids = [message["id"] for message in client.receive_many(20)]
    assert ids == sorted(set(ids))


# Complete.


@pytest.mark.parametrize("since", [NEVER_GIVEN, "00000000-0000-0000-0000-000000000000"])
def test_an_id_that_was_never_given_proves_nothing(start_server: StartServer, since: str) -> None:
    """Everything that is kept is replayed, and the client is told that this may not be all."""
    server = start_server()
    server.publish("one", "two")
    data, replayed, _ = resumed(server, since)
    assert (data["complete"], data["replayed"], replayed) == (False, 2, ["one", "two"])


def test_an_id_ahead_of_the_log_proves_nothing(start_server: StartServer) -> None:
    """A server that was restarted with its clock set back does not call that complete."""
    server = start_server()
    server.publish("one", "two")
    data, replayed, _ = resumed(server, "ffffffff-ffff-7fff-bfff-ffffffffffff")
    assert (data["complete"], replayed) == (False, ["one", "two"])


def test_an_id_between_two_that_were_given_proves_nothing(start_server: StartServer) -> None:
    """Only an id that the log gave is a place in it."""
    server = start_server()
    [first, _] = server.publish("one", "two")
    between = first[:-1] + ("0" if first[-1] != "0" else "1")
    data, replayed, _ = resumed(server, between)
    assert (data["complete"], replayed) == (False, ["one", "two"])


def test_an_id_from_before_a_restart_proves_nothing(server: Server, start_server: StartServer) -> None:
    """The log in memory began anew, and replays all that it has."""
    [before] = server.publish("in another log")
    restarted = start_server()
    restarted.publish("one")
    data, replayed, _ = resumed(restarted, before)
    assert (data["complete"], replayed) == (False, ["one"])


def test_complete_reaches_as_far_back_as_the_history(start_server: StartServer) -> None:
    """With three kept, the third last id and the one before it are complete, and no older one is."""
    server = start_server("--history-size", "3")
    ids = server.publish(*map(str, range(6)))
    told = [resumed(server, id)[0] for id in ids]
    assert [(data["complete"], data["replayed"]) for data in told] == [
        (False, 3),
        (False, 3),
        (True, 3),
        (True, 2),
        (True, 1),
        (True, 0),
    ]


def test_the_history_is_bounded_in_bytes(start_server: StartServer) -> None:
    """A notification that the bytes have pushed out is not replayed, and that is not complete."""
    server = start_server("--history-bytes", "50000")
    ids = server.publish(*map(str, range(10)), data={"pad": "x" * 10_000})
    data, replayed, _ = resumed(server, ids[0])
    assert (data["complete"], replayed) == (False, ["6", "7", "8", "9"])
    assert resumed(server, ids[5])[0]["complete"] is True


def test_the_history_is_bounded_in_time(start_server: StartServer) -> None:
    """Expired notifications are not replayed; only a client that had received all of them is complete."""
    server = start_server("--history-ttl", "0.2")
    first, last = server.publish("one", "two")
    eventually(lambda: log_size(server) == 0)
    assert resumed(server, first)[0] == {"position": last, "replayed": 0, "complete": False}
    assert resumed(server, last)[0] == {"position": last, "replayed": 0, "complete": True}


def test_test_notifications_push_nothing_out_of_the_history(start_server: StartServer) -> None:
    """history_size counts only notifications that can be replayed."""
    server = start_server("--notification-interval", "0.02", "--history-size", "2")
    first, *_ = server.publish("one", "two", "three")
    server.join().receive_many(10)
    data, replayed, _ = resumed(server, first)
    assert (data["complete"], replayed) == (True, ["two", "three"])


# The slow consumer.


def test_the_close_of_a_slow_consumer_names_the_id_to_resume_from(start_server: StartServer) -> None:
    """From that id the history is replayed without duplicates, and `complete` is false if some is lost."""
    server = start_server("--history-size", "20")
    slow = server.join_bare(receive_buffer=4096)
    count = 0
    while server.active():
        server.publish(str(count), data={"pad": "x" * 60_000})
        count += 1
        assert count < 2000, "the client is not closed"
    received = texts(slow.rest())
    code, reason = slow.closed()
    named = SLOW.fullmatch(str(reason))
    assert code == 1008 and named and received == [str(number) for number in range(len(received))]
    # Of several processes another one publishes on until it knows.
    assert count - 20 < len(received) + int(named[1]) <= count
    data, replayed, _ = resumed(server, named[2])
    assert (data["complete"], replayed) == (False, [str(number) for number in range(count - 20, count)])


def test_a_client_that_was_just_promised_a_replay_is_no_slow_consumer(start_server: StartServer) -> None:
    """However fast the history moves on, a client that reads gets all that its resume has promised."""
    server = start_server("--history-size", "5")
    ids = server.publish(*map(str, range(5)))
    done = threading.Event()

    def keep_publishing() -> None:
        while not done.is_set():
            body = [{"message": "more"}] * 2
            ids.extend(one["id"] for one in server.http.post("/notify/batch", json=body).json()["notifications"])

    publisher = threading.Thread(target=keep_publishing)
    publisher.start()
    try:
        for _ in range(60):
            client = server.join(query=f"since={ids[-5]}")
            promised = client.receive()["data"]["replayed"]
            assert len(client.receive_many(promised)) == promised
            client.leave()
    finally:
        done.set()
        publisher.join()


# The seam.


class Returning:
    """A client that loses its connection again and again, and resumes."""

    def __init__(self, url: str, position: str, chance: random.Random) -> None:
        self.url = url
        self.position = position
        self.chance = chance
        self.received: list[str] = []
        self.connections = 0

    async def receive_until(self, last: str) -> None:
        while last not in self.received[-1:]:
            await self.receive_some(self.chance.randint(1, 60), last)

    async def receive_some(self, count: int, last: str) -> None:
        """Resume, receive so many messages, or less where the last is among them, and break off."""
        options = {"compression": None, "ping_interval": None, "proxy": None, "open_timeout": 20}
        async with connect(f"{self.url}?since={self.position}", **options) as connection:
            self.connections += 1
            assert parse_message(await connection.recv())["type"] == "welcome"
            assert parse_message(await connection.recv())["data"]["complete"] is True
            for _ in range(count):
                notification = parse_message(await connection.recv())
                self.position = notification["id"]
                self.received.append(notification["data"]["message"])
                if self.received[-1] == last:
                    break
            connection.transport.abort()


def test_nothing_is_lost_or_repeated_at_the_seam(start_server: StartServer) -> None:
    """While one publishes as fast as it can, fifty break off and resume; each ends with exactly 0 to N in order."""
    server = start_server("--history-size", "5000")
    position = server.read("/notifications?since=")["position"]
    messages = [str(number) for number in range(500)]
    clients = [Returning(server.ws_url, position, random.Random(number)) for number in range(50)]

    async def everyone() -> None:
        await asyncio.gather(*(client.receive_until(messages[-1]) for client in clients))

    publisher = threading.Thread(target=server.publish, args=messages)
    publisher.start()
    asyncio.run(asyncio.wait_for(everyone(), 180))
    publisher.join()
    assert [client.received for client in clients] == [messages] * 50
    assert sum(client.connections for client in clients) > 250
