"""Many processes are one server: limits, counters and order hold over all of them, exactly and at once."""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.message import Message
from http.client import HTTPConnection
from itertools import count, permutations
from pathlib import Path
from signal import SIGTERM
from socket import socket
from typing import Any, NamedTuple

import pytest
from bytes import handshake, read_until
from expected import PONG, SHUTDOWN, SYSTEM, parse
from processes import Server, connected, eventually, free_port, needs_proc, serving
from redis_server import RedisServer
from ws_clients import PATIENCE, Client, claims

pytestmark = [pytest.mark.slow, needs_proc]

LIMIT, USER_LIMIT = 30, 5
KINDS = ["workers", "sqlite", "redis"]
# uvicorn closes an HTTP connection that was idle for 5 s.
IDLE_SECONDS = 2.0


class Response(NamedTuple):
    status: int
    headers: Message
    body: bytes


class Place:
    """One of the processes, spoken to over connections that this one has accepted."""

    def __init__(self, server: Server, pid: int) -> None:
        self.server = server
        self.pid = pid
        self._idle: list[tuple[HTTPConnection, float]] = []

    def forget_connections(self) -> None:
        self._idle.clear()

    def tcp(self) -> socket:
        """Open a TCP connection to this process; those that another one takes are closed again."""
        deadline = time.monotonic() + PATIENCE
        while True:
            connection, pid = connected(self.server)
            if pid == self.pid:
                return connection
            connection.close()
            assert time.monotonic() < deadline, f"process {self.pid} accepts nothing"

    def connect(self, client_id: str | None = None, *, query: str = "") -> Client:
        return self.server.connect(client_id, query=query, sock=self.tcp())

    def join(self, client_id: str | None = None, *, query: str = "") -> Client:
        return self.server.join(client_id, query=query, sock=self.tcp())

    def join_dead(self, client_id: str) -> None:
        """Join, and never read or answer anything again."""
        connection = self.tcp()
        connection.sendall(handshake(f"/ws?client_id={client_id}"))
        read_until(connection, b'"welcome"')

    def request(self, method: str, path: str, body: object = None, **headers: str) -> Response:
        connection = self._idle_connection() or self._new_connection()
        connection.request(method, path, body and json.dumps(body), headers)
        response = connection.getresponse()
        read = Response(response.status, response.headers, response.read())
        self._idle.append((connection, time.monotonic()))
        return read

    def _idle_connection(self) -> HTTPConnection | None:
        with suppress(IndexError):
            connection, since = self._idle.pop()
            if time.monotonic() - since < IDLE_SECONDS:
                return connection
        return None

    def _new_connection(self) -> HTTPConnection:
        connection = HTTPConnection(self.server.host, self.server.port)
        connection.sock, connection.auto_open = self.tcp(), 0
        return connection

    def read(self, path: str) -> Any:
        response = self.request("GET", path)
        assert response.status == 200, response
        return parse(response.body)

    def notify(self, message: str, **fields: Any) -> int:
        """Publish, and return the number of recipients."""
        response = self.request("POST", "/notify", {"message": message} | fields)
        assert response.status == 200, response
        return int(parse(response.body)["recipients"])


class Many:
    """A few processes on one store."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self.places = [Place(server, pid) for server in servers for pid in serving(server)]

    def one_by_one(self, number: int) -> list[Place]:
        """Return so many places, each in its turn."""
        return [self.places[n % len(self.places)] for n in range(number)]

    def addresses(self, number: int, query: str = "") -> list[str]:
        return [place.server.address(query=query) for place in self.one_by_one(number)]

    def read(self, path: str) -> Any:
        """Return the answer of all processes, which must agree but for clocks and each process's own settings."""
        answers = [place.read(path) for place in self.places]
        for answer in answers:
            for part in (answer, answer.get("server", {}), answer.get("connections", {})):
                for name in ("timestamp", "uptime_seconds", "current_time"):
                    part.pop(name, None)
            answer.get("configuration", {}).pop("port", None)
        for answer in answers:
            assert answer == answers[0]
        return answers[0]

    def counts(self) -> dict[str, int]:
        """Return every counter; all processes must state the same, in each of its places."""
        health, metrics, status = self.read("/health"), self.read("/metrics"), self.read("/status")
        samples = [place.request("GET", "/metrics/prometheus").body.decode().splitlines() for place in self.places]
        counted = {
            "active": {
                health["connections"]["active"],
                metrics["connections"]["active_connections"],
                status["connections"]["active"],
            },
            "total": {
                health["connections"]["total"],
                metrics["connections"]["total_connections"],
                status["connections"]["total"],
            },
            "messages_sent": {metrics["connections"]["messages_sent"]},
            "notifications_sent": {status["notification_service"]["notifications_sent"]},
        }
        for name, sample in {
            "active": "websocket_active_connections",
            "total": "websocket_total_connections",
            "messages_sent": "websocket_notifications_sent",
            "notifications_sent": "notifyd_notifications_published_total",
        }.items():
            counted[name] |= {
                int(line.split()[1]) for lines in samples for line in lines if line.startswith(sample + " ")
            }
        assert all(len(values) == 1 for values in counted.values()), counted
        return {name: values.pop() for name, values in counted.items()}

    def forget_clients(self) -> None:
        for place in self.places:
            place.forget_connections()
        for server in self.servers:
            server.forget_clients()
        for server in self.servers:
            eventually(lambda server=server: server.active() == 0)


StartMany = Callable[..., Many]


@pytest.fixture(scope="module", params=KINDS)
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartMany]:
    """Start processes that have one store, each time another."""
    redis = RedisServer() if request.param == "redis" else None

    def start(*flags: str) -> Many:
        flags = ("--ping-interval", "0", *flags)
        if request.param == "workers":
            return Many([Server.notifyd("--workers", "3", *flags)])
        if redis is not None:
            store = ("--store", redis.url, "--store-prefix", secrets.token_hex(4))
        else:
            store = ("--store", f"sqlite:{tmp_path_factory.mktemp('store') / 'log.db'}")
        return Many([Server.notifyd(*store, *flags) for _ in range(2)])

    yield start
    if redis is not None:
        redis.close()


@pytest.fixture(scope="module")
def _shared(start: StartMany) -> Iterator[Many]:
    limits = ("--max-connections", str(LIMIT), "--max-connections-per-user", str(USER_LIMIT))
    many = start("--notification-interval", "0", "--history-size", "100000", *limits)
    yield many
    for server in many.servers:
        server.stop()


@pytest.fixture
def many(_shared: Many) -> Iterator[Many]:
    """Processes that many tests share, with room for LIMIT clients."""
    yield _shared
    _shared.forget_clients()


@pytest.fixture
def start_many(start: StartMany) -> Iterator[StartMany]:
    """Start processes for one test."""
    started: list[Many] = []

    def start_one(*flags: str) -> Many:
        started.append(start(*flags))
        return started[-1]

    yield start_one
    for server in [server for many in started for server in many.servers]:
        server.ask_to_stop()


def ids(messages: list[Any]) -> list[str]:
    return [message["id"] for message in messages]


# Admission.


def test_the_limit_is_for_all_together(many: Many) -> None:
    """A newcomer above the limit is refused on any process, with the number of all clients."""
    clients = [place.join() for place in many.one_by_one(LIMIT)]
    refusal = (1008, f"Connection limit exceeded: {LIMIT}/{LIMIT}")
    assert [place.connect().closed() for place in many.places] == [refusal] * len(many.places)
    clients[0].leave()
    eventually(lambda: many.servers[0].active() == LIMIT - 1)
    many.places[-1].join()


def test_the_limit_is_kept_when_all_come_at_once(many: Many) -> None:
    """Exactly as many get in as there is room for."""
    met = claims(many.addresses(2 * LIMIT))
    assert sorted(met) == [f"Connection limit exceeded: {LIMIT}/{LIMIT}"] * LIMIT + ["welcome"] * LIMIT


def test_the_limit_of_a_user_is_for_all_together(many: Many) -> None:
    """Exactly as many clients of a user get in as there is room for, and the next when a client has left."""
    refusal = f"Connection limit exceeded for this user: {USER_LIMIT}/{USER_LIMIT}"
    met = claims(many.addresses(20, "user=ann"))
    assert sorted(met) == [refusal] * (20 - USER_LIMIT) + ["welcome"] * USER_LIMIT
    eventually(lambda: many.servers[0].active() == 0)
    clients = [place.join(query="user=ann") for place in many.one_by_one(USER_LIMIT)]
    assert [place.connect(query="user=ann").closed() for place in many.places] == [(1008, refusal)] * len(many.places)
    clients[0].leave()
    eventually(lambda: many.servers[0].active() == USER_LIMIT - 1)
    many.places[-1].join(query="user=ann")


def test_a_client_id_of_the_living_is_taken_everywhere(many: Many) -> None:
    """The newcomer to another process is refused, and the old connection stays."""
    for here, there in permutations(many.places, 2):
        name = f"{here.pid}-{there.pid}"
        client = here.join(name)
        assert there.connect(name).closed() == (1008, f"Client {name} is already connected")
        assert client.ask({"type": "ping"}) == PONG


def test_a_client_id_of_the_dead_is_free_on_another_process(many: Many) -> None:
    """A client that does not answer within 2 s is dropped, and its slot is free."""
    here, *_, there = many.places
    here.join_dead("a")
    began = time.monotonic()
    there.join("a")
    assert 1.9 < time.monotonic() - began < 6
    assert many.counts()["active"] == 1


def test_a_client_is_replaced_from_another_process(start_many: StartMany) -> None:
    """With --on-duplicate replace the newcomer stays, wherever it comes to."""
    many = start_many("--notification-interval", "0", "--on-duplicate", "replace")
    client = many.places[0].join("a")
    for place in many.places[1:]:
        newcomer = place.join("a")
        assert client.closed() == (1008, "Replaced by a new connection")
        client = newcomer
    assert client.ask({"type": "ping"}) == PONG
    assert many.counts()["active"] == 1


def test_one_of_many_simultaneous_claims_of_a_client_id_wins(many: Many) -> None:
    """Exactly one claim wins, however the claims are spread over the processes."""
    met = claims(many.addresses(100, "client_id=a"))
    assert sorted(met) == ["Client a is already connected"] * 99 + ["welcome"]


# Counters.


def test_connections_are_counted_at_once(many: Many) -> None:
    """Every process knows of a client that has just been welcomed by another."""
    before = many.counts()
    for number, place in enumerate(many.one_by_one(6), 1):
        client = place.join()
        assert [other.read("/health")["connections"]["active"] for other in many.places] == [number] * len(many.places)
    counts = many.counts()
    assert (counts["active"], counts["total"]) == (6, before["total"] + 6)
    client.send({"type": "status_request"})
    data = client.receive()["data"]
    assert (data["active_connections"], data["total_connections"]) == (6, counts["total"])


def test_deliveries_are_counted_when_they_are_read(many: Many) -> None:
    """Once all clients have all notifications, every process states the same, correct figures."""
    clients = [place.join(query="topics=news" if n % 3 else "") for n, place in enumerate(many.one_by_one(6))]
    before = many.counts()
    for place in many.places:
        assert [place.notify("to all"), place.notify("to some", topics=["news"])] == [6, 4]
    for n, client in enumerate(clients):
        client.receive_many(len(many.places) * (2 if n % 3 else 1))
    counts = many.counts()
    assert counts["messages_sent"] - before["messages_sent"] == 10 * len(many.places)
    assert counts["notifications_sent"] - before["notifications_sent"] == 2 * len(many.places)


def test_recipients_are_counted_over_all(many: Many) -> None:
    """Recipients are right at once after a welcome, a subscribe or an unsubscribe on any process."""
    for here, there in permutations(many.places, 2):
        here.join("a", query="client_id=a&topics=x&user=u")
        client = there.join("b", query="client_id=b&user=u")
        assert (here.notify("m"), there.notify("m")) == (2, 2)
        assert [here.notify("m", clients=["a", "b", "c"]), here.notify("m", topics=["x"], clients=["b"])] == [2, 2]
        assert [here.notify("m", users=["u"]), there.notify("m", users=["u", "v"], clients=["a"])] == [2, 2]
        client.receive_many(6)
        assert client.ask({"type": "subscribe", "topics": ["x"]})["type"] == "subscribed"
        assert [here.notify("m", topics=["x"]), there.notify("m", topics=["x"])] == [2, 2]
        client.receive_many(2)
        assert client.ask({"type": "unsubscribe", "topics": ["x"]})["type"] == "subscribed"
        assert [here.notify("m", topics=["x"]), there.notify("m", topics=["x"])] == [1, 1]
        assert client.ask({"type": "ping"}) == PONG
        many.forget_clients()


def samples(place: Place) -> dict[str, str]:
    """Return the figures for Prometheus that a process states for all, without clocks."""
    lines = place.request("GET", "/metrics/prometheus").body.decode().splitlines()
    stated = dict(line.split() for line in lines if line and not line.startswith("#"))
    return {name: value for name, value in stated.items() if "process" not in name and "uptime" not in name}


def test_every_process_states_the_figures_of_all(start_many: StartMany) -> None:
    """Whichever process a scraper reaches, it reads the same: among others the clients that read too slowly."""
    many = start_many("--notification-interval", "0")
    many.places[-1].join_dead("slow")
    for place in many.one_by_one(200):
        place.notify("much", data={"padding": "x" * 60_000})
    eventually(lambda: samples(many.places[0])["notifyd_clients_behind"] == "1")
    first, *others = map(samples, many.places)
    assert others == [first] * len(others)
    assert first["notifyd_log_notifications"] == "200"
    assert int(first["notifyd_log_bytes"]) > 200 * 60_000
    many.forget_clients()
    assert {samples(place)["notifyd_clients_behind"] for place in many.places} == {"0"}


def test_status_lists_the_clients_of_all(many: Many) -> None:
    """Every process lists the clients of all in the order of their admission, as many as are asked for."""
    names = [f"client-{n:02}" for n in range(LIMIT)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(Place.join, many.one_by_one(LIMIT), names))
    details = many.read("/status")["connections"]["details"]
    assert sorted(one["client_id"] for one in details) == names
    assert details == sorted(details, key=lambda one: one["connected_at"])
    limited = many.read("/status?limit=2")["connections"]
    assert (limited["details"], limited["active"]) == (details[:2], LIMIT)


# Delivery.


def test_all_clients_receive_one_order(many: Many) -> None:
    """The order is one for any number of publishers on all processes, and every process has the same history."""
    clients = [place.join() for place in many.one_by_one(6)]
    with ThreadPoolExecutor() as pool:
        recipients = list(pool.map(lambda place: place.notify("m"), many.one_by_one(60)))
    assert recipients == [6] * 60
    first, *others = [ids(client.receive_many(60)) for client in clients]
    assert first == sorted(set(first)) and others == [first] * 5
    assert ids(many.read("/notifications?order=desc&limit=60")["notifications"]) == first[::-1]


def test_history_is_the_same_everywhere_at_once(many: Many) -> None:
    """After a 200 from one process, every process has the notification in its history and knows its position."""
    for here, there in permutations(many.places, 2):
        for _ in range(20):
            published = here.request("POST", "/notify", {"message": "m"}).headers["Notification-Id"]
            since = there.read(f"/notifications?since={published}")
            assert (since["notifications"], since["complete"], since["position"]) == ([], True, published)


def test_resume_on_another_process(many: Many) -> None:
    """A client that goes from process to process while all publish misses nothing and gets nothing twice."""
    stop = threading.Event()

    def publish(place: Place) -> None:
        for number in count():
            if stop.is_set():
                return
            place.notify(str(number))

    witness = many.places[0].join()
    traveller = many.places[0].join("traveller")
    with ThreadPoolExecutor() as pool:
        publishers = [pool.submit(publish, place) for place in many.places]
        received = ids(traveller.receive_many(3))
        for place in many.one_by_one(12):
            traveller.leave()
            traveller = place.connect(query=f"client_id=traveller&since={received[-1]}")
            assert traveller.receive()["type"] == "welcome"
            assert traveller.receive()["data"]["complete"]
            received += ids(traveller.receive_many(5))
        stop.set()
        for publisher in publishers:
            publisher.result()
    assert received == ids(witness.receive_many(len(received)))


def test_targets_are_reached_everywhere(many: Many) -> None:
    """A client gets notifications for it, its user and its topics, and no others, from any process, also afterwards."""
    queries = ["client_id=a&user=u", "client_id=b&topics=x", "client_id=c&user=u"]
    clients = [place.join(query=query) for place, query in zip(many.one_by_one(3), queries, strict=True)]
    since = many.places[0].read("/notifications?since=")["position"]
    for place in many.places:
        place.notify("a", clients=["a"])
        place.notify("b", topics=["x"])
        place.notify("a and c", users=["u"])
        place.notify("all", clients=["a"], topics=["x"], users=["u"])
    theirs = [["a", "a and c", "all"], ["b", "all"], ["a and c", "all"]]
    for client, query, place, own in zip(clients, queries, many.places[::-1] * 3, theirs, strict=False):
        expected = own * len(many.places)
        assert [message["data"]["message"] for message in client.receive_many(len(expected))] == expected
        client.leave()
        again = place.connect(query=f"{query}&since={since}")
        assert [again.receive()["type"] for _ in range(2)] == ["welcome", "resume"]
        assert [message["data"]["message"] for message in again.receive_many(len(expected))] == expected


# Idempotency keys.


def test_a_key_counts_on_every_process(many: Many) -> None:
    """Many publish with one key at once, on all processes: one publishes and all get its answer."""
    client = many.places[0].join()
    key = secrets.token_hex(8)

    def publish(place: Place) -> Response:
        return place.request("POST", "/notify", {"message": "once"}, **{"Idempotency-Key": key})

    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(publish, many.one_by_one(20)))
    responses += [publish(place) for place in many.places]
    assert len({(response.status, response.body, response.headers["Notification-Id"]) for response in responses}) == 1
    assert sum("Idempotent-Replayed" not in response.headers for response in responses) == 1
    for place in many.places:
        other = place.request("POST", "/notify", {"message": "other"}, **{"Idempotency-Key": key})
        assert other.status == 422
    many.places[-1].notify("end")
    assert [message["data"]["message"] for message in client.receive_many(2)] == ["once", "end"]


# Test notifications, and the end of one.


def test_test_notifications_have_one_sender(start_many: StartMany) -> None:
    """All clients get the same ones, counted without a gap, at the pace of one sender."""
    many = start_many("--notification-interval", "0.25")
    clients = [place.join() for place in many.places]
    received = [client.receive_many(6) for client in clients]
    counters = [[message["data"]["counter"] for message in messages] for messages in received]
    assert all(numbers == list(range(numbers[0], numbers[0] + 6)) for numbers in counters), counters
    by_counter = {number: set() for numbers in counters for number in numbers}
    for message in (message for messages in received for message in messages):
        by_counter[message["data"]["counter"]].add(message["id"])
    assert all(len(same) == 1 for same in by_counter.values())


def test_one_process_drains_alone(start_many: StartMany) -> None:
    """Its clients are told and can resume on another, completely; the clients of the others notice nothing."""
    many = start_many("--notification-interval", "0")
    leaving, *_, staying = many.places
    told, untold = [leaving.join(f"told-{n}") for n in range(3)], staying.join()
    os.kill(leaving.pid, SIGTERM)
    farewells = [client.receive_many(2) for client in told]
    assert farewells == [[SYSTEM, SHUTDOWN]] * 3
    staying.notify("meanwhile")
    for n, (client, (system, _)) in enumerate(zip(told, farewells, strict=True)):
        client.leave()
        resumed = staying.connect(query=f"client_id=told-{n}&since={system['id']}")
        _, resume, missed = resumed.receive_many(3)
        assert (resume["data"]["complete"], missed["data"]["message"]) == (True, "meanwhile")
    assert untold.receive()["data"]["message"] == "meanwhile"
    assert untold.ask({"type": "ping"}) == PONG
    if leaving.pid == leaving.server.pid:
        assert leaving.server.exit_status() == 0


# Inside other servers.


@pytest.mark.parametrize("program", ["uvicorn", "gunicorn"])
def test_an_app_under_workers_of_another_server_is_one_server(program: str, tmp_path: Path) -> None:
    """NOTIFYD_STORE is all that it takes."""
    port = str(free_port())
    command = {
        "uvicorn": ["uvicorn", "hosts:alone", "--port", port],
        "gunicorn": ["gunicorn", "hosts:alone", "-b", f"127.0.0.1:{port}", "-k", "uvicorn_worker.UvicornWorker"],
    }[program]
    variables = {"NOTIFYD_STORE": f"sqlite:{tmp_path / 'log.db'}", "NOTIFYD_NOTIFICATION_INTERVAL": "0"}
    variables["NOTIFYD_PING_INTERVAL"] = "0"
    server = Server([sys.executable, "-m", *command, "--workers", "2"], variables, url=f"http://127.0.0.1:{port}")
    clients: list[Client] = []

    def each_has_one() -> bool:
        connection, pid = connected(server)
        clients.append(server.join(sock=connection))
        serving.add(pid)
        return len(serving) == 2

    serving: set[int] = set()
    eventually(each_has_one)
    published = [server.notify(str(n))["recipients"] for n in range(10)]
    assert published == [len(clients)] * 10
    messages = [[message["data"]["message"] for message in client.receive_many(10)] for client in clients]
    assert messages == [[str(n) for n in range(10)]] * len(clients)
    assert server.active() == len(clients)
    server.kill()
