"""The drain: on the first signal every client is told, the process waits for those that stay, and exits with 0."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from signal import SIGINT, SIGTERM

import httpx
import pytest
from bytes import read_until, rest
from conftest import StartServer
from expected import COUNT, PONG, SHUTDOWN, SYSTEM, TIME, answered, http_error, naming
from processes import Server, eventually, free_port, is_free, worker_count
from websockets.exceptions import InvalidStatus
from ws_clients import PATIENCE, Client

from connection import CLOSE_DEADLINE_SECONDS

GONE = (1001, "Server shutting down")
# Seconds that are fewer than those for which a close is waited for that is not answered.
AT_ONCE = CLOSE_DEADLINE_SECONDS - 0.5


@pytest.fixture
def draining(start_server: StartServer) -> tuple[Server, Client]:
    """A server that drains, and the client that it waits for and that has been told."""
    server = start_server()
    client = server.join("bob")
    server.drain()
    assert client.receive_many(2) == [SYSTEM, SHUTDOWN]
    return server, client


# For clients.


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_clients_get_the_system_notification_and_then_the_shutdown(
    start_server: StartServer, number: signal.Signals
) -> None:
    """Both signals begin the drain with the two documented messages, in this order."""
    server = start_server()
    client = server.join()
    server.signal(number)
    assert client.receive_many(2) == [SYSTEM, SHUTDOWN]


def test_everyone_is_told(start_server: StartServer) -> None:
    """Each of ten clients gets both messages."""
    server = start_server()
    clients = [server.join() for _ in range(10)]
    server.signal()
    assert [client.receive_many(2) for client in clients] == [[SYSTEM, SHUTDOWN]] * 10


def test_a_draining_server_goes_on_answering(draining: tuple[Server, Client]) -> None:
    """Pings and status requests are still answered."""
    _, client = draining
    assert client.ask({"type": "ping"}) == PONG
    assert client.ask({"type": "status_request"})["type"] == "status_response"


def test_newcomers_are_sent_away(draining: tuple[Server, Client]) -> None:
    """A newcomer during the drain is closed with 1001 and the documented reason."""
    server, _ = draining
    assert server.connect().closed() == GONE


@pytest.mark.parametrize("client_id", ["not an id", "bob"])
def test_the_drain_is_checked_before_the_id(draining: tuple[Server, Client], client_id: str) -> None:
    """Neither a bad id nor one that is taken hides that the server is going."""
    server, _ = draining
    assert server.connect(client_id).closed() == GONE


def test_the_origin_is_checked_before_the_drain(draining: tuple[Server, Client]) -> None:
    """A foreign page gets its 403, as ever."""
    with pytest.raises(InvalidStatus) as refused:
        draining[0].connect(additional_headers={"Origin": "https://evil.example"})
    assert refused.value.response.status_code == 403


def test_test_notifications_stop(start_server: StartServer) -> None:
    """After the shutdown message nothing more is published."""
    server = start_server("--notification-interval", "0.1", "--shutdown-timeout", "0.5")
    client = server.join()
    client.receive()
    server.signal()
    types = [message["type"] for message in client.rest()]
    assert types[types.index("system") :] == ["system", "shutdown"]


# Over HTTP.


def test_health_answers_503_with_the_documented_body(draining: tuple[Server, Client]) -> None:
    """A load balancer sends nobody here any more."""
    response = draining[0].get("/health")
    assert answered(response) == (
        503,
        {
            "status": "shutting_down",
            "message": "WebSocket Notification Server is shutting down",
            "timestamp": TIME,
            "connections": {"active": 1, "total": COUNT, "max_allowed": 1000},
            "server_info": {"version": "0.1.0", "workers": worker_count(), "notification_interval": 0},
        },
    )


def test_notify_answers_503(draining: tuple[Server, Client]) -> None:
    """Nothing is accepted any more, and the error says why."""
    response = draining[0].post({"message": "too late"})
    assert answered(response) == (
        503,
        http_error("system", naming("shutting down")),
    )


@pytest.mark.parametrize("path", ["/notify", "/notify/batch"])
def test_every_request_even_an_invalid_one_is_503(draining: tuple[Server, Client], path: str) -> None:
    """A bad request is not looked at; only its size comes before the drain."""
    server, _ = draining
    bad = [server.request("POST", path, content=b"{", headers={"Content-Type": kind}) for kind in ("", "image/png")]
    assert [response.status_code for response in bad] == [503, 503]
    assert server.request("POST", path, content=b"x" * 2_000_000).status_code == 413


def test_a_refused_notification_is_not_delivered(draining: tuple[Server, Client]) -> None:
    """After a 503 the next thing that a client gets is its pong."""
    server, client = draining
    server.post({"message": "too late"})
    assert client.ask({"type": "ping"}) == PONG


def test_status_says_that_it_is_shutting_down(draining: tuple[Server, Client]) -> None:
    """/status answers throughout, and shows the request to shut down."""
    status = draining[0].read("/status")
    assert status["server"]["status"] == "shutting_down"
    assert status["shutdown"] == {"shutdown_requested": True, "shutdown_timeout": 1800}


@pytest.mark.parametrize("path", ["/metrics", "/status"])
def test_the_notification_service_is_not_running(draining: tuple[Server, Client], path: str) -> None:
    """is_running is false from the signal on."""
    assert draining[0].read(path)["notification_service"]["is_running"] is False


# How it ends.


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_without_clients_the_process_ends_at_once(start_server: StartServer, number: signal.Signals) -> None:
    """Ctrl+C with nobody connected just quits, with status 0."""
    server = start_server()
    server.signal(number)
    assert server.exit_status() == 0


def test_an_open_http_connection_does_not_delay_the_end(start_server: StartServer) -> None:
    """Neither an idle keep-alive connection nor one that never asked is a client."""
    server = start_server()
    server.get("/health")
    server.raw(b"")
    server.raw(b"GET /health HT")
    server.signal()
    assert server.exit_status() == 0


def test_the_process_waits_for_its_clients(draining: tuple[Server, Client]) -> None:
    """The server stays as long as one of its clients does."""
    server, client = draining
    for _ in range(20):
        assert client.ask({"type": "ping"}) == PONG
    assert server.process.poll() is None


def test_the_process_ends_when_the_last_client_leaves(draining: tuple[Server, Client]) -> None:
    """The process has no reason to stay."""
    server, client = draining
    client.leave()
    assert server.exit_status() == 0


def test_the_process_ends_when_the_last_client_breaks_off(start_server: StartServer) -> None:
    """A reset connection has left as well."""
    server = start_server()
    client = server.join_bare()
    server.drain()
    client.reset()
    assert server.exit_status() == 0


def test_clients_that_stay_are_closed_after_the_timeout(start_server: StartServer) -> None:
    """When --shutdown-timeout is over, and not before, the rest is closed with 1001, and the status is 0."""
    server = start_server("--shutdown-timeout", "0.5")
    client, began = server.join(), time.monotonic()
    server.signal()
    assert client.closed() == GONE
    assert 0.4 < time.monotonic() - began < 4
    assert server.exit_status(AT_ONCE) == 0


def test_a_timeout_of_0_closes_at_once_but_tells_first(start_server: StartServer) -> None:
    """Every client gets the two messages before the close."""
    server = start_server("--shutdown-timeout", "0")
    client = server.join()
    server.signal()
    assert client.rest() == [SYSTEM, SHUTDOWN]
    assert (client.closed(), server.exit_status(AT_ONCE)) == (GONE, 0)


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_a_second_signal_closes_everyone_now(draining: tuple[Server, Client], number: signal.Signals) -> None:
    """A second signal ends the wait; the exit status is still 0."""
    server, client = draining
    server.signal(number)
    assert client.closed() == GONE
    assert server.exit_status(AT_ONCE) == 0


def test_two_signals_at_once_end_the_process(start_server: StartServer) -> None:
    """Signals that come together are a first and a second one, with clients or without, and end in status 0."""
    server = start_server()
    client = server.join()
    server.signal(SIGTERM)
    server.signal(SIGINT)
    assert client.closed() == GONE
    assert server.exit_status(AT_ONCE) == 0


def test_impatience_does_no_harm(start_server: StartServer) -> None:
    """Many signals while the process is ending anyway don't change its status."""
    server = start_server()
    with suppress(ProcessLookupError):
        while server.process.poll() is None:
            server.signal(SIGINT)
            time.sleep(0.002)
    assert server.exit_status(AT_ONCE) == 0


def test_clients_that_do_not_read_do_not_delay_the_end(start_server: StartServer) -> None:
    """A client with a full buffer cannot take its close frame, and is aborted after a deadline."""
    hurried = {"connection.CLOSE_DEADLINE_SECONDS": 1}
    server = start_server("--shutdown-timeout", "0", "--history-size", "10000", constants=hurried)
    server.join_bare(receive_buffer=4096)
    for _ in range(150):
        server.notify("large", data={"pad": "x" * 60_000})
    server.signal()
    assert server.exit_status() == 0


POST = b'POST /notify HTTP/1.1\r\nHost: x\r\nContent-Length: 16\r\n\r\n{"message":"hi"}'


@pytest.mark.parametrize("before", [0, 2], ids=["first", "repeated"])
@pytest.mark.parametrize("cut", [1, 16, 30])
def test_half_a_request_does_not_hold_up_the_end(start_server: StartServer, before: int, cut: int) -> None:
    """A publisher that stopped in the middle is told, and not waited for."""
    server = start_server()
    connection = server.raw(b"")
    for _ in range(before):
        connection.sendall(POST)
        read_until(connection, b"}\n")
    connection.sendall(POST[:-cut])
    server.get("/health")
    server.signal()
    assert rest(connection).startswith(b"HTTP/1.1 503 ")
    assert server.exit_status() == 0


# Notifications accepted before.


def test_notifications_accepted_before_the_signal_are_delivered_first(start_server: StartServer) -> None:
    """A client that reads only after the signal gets every notification and then the two messages."""
    server = start_server()
    client = server.join_bare(receive_buffer=65_536)
    for number in range(100):
        server.notify(str(number), data={"pad": "x" * 30_000})
    server.signal()
    received = [client.receive() for _ in range(102)]
    assert [each["data"]["message"] for each in received[:100]] == [str(number) for number in range(100)]
    assert received[100:] == [SYSTEM, SHUTDOWN]


def test_a_publisher_that_races_the_signal_loses_nothing(start_server: StartServer) -> None:
    """Everything that was answered with 200 arrives before the system notification, and nothing else does."""
    server = start_server()
    accepted: list[str] = []
    client = server.join()
    stop = threading.Event()

    def publish() -> None:
        with (
            httpx.Client(base_url=server.url, trust_env=False, timeout=PATIENCE) as http,
            suppress(httpx.TransportError),
        ):
            while not stop.is_set():
                message = str(len(accepted))
                if http.post("/notify", json={"message": message}).status_code != 200:
                    break
                accepted.append(message)

    publisher = threading.Thread(target=publish)
    publisher.start()
    received = client.receive_many(20)
    server.signal()
    while received[-1]["type"] != "shutdown":
        received.append(client.receive())
    stop.set()
    publisher.join()
    assert [each["data"]["message"] for each in received[:-2]] == accepted
    assert received[-2:] == [SYSTEM, SHUTDOWN]


# The pace.


def seconds_between(clients: list[Client], event: Callable[[Client], object]) -> float:
    """Wait for an event at each of the clients, and return the time from the first of them to the last."""

    def moment(client: Client) -> float:
        event(client)
        return time.monotonic()

    with ThreadPoolExecutor(len(clients)) as watchers:
        moments = list(watchers.map(moment, clients))
    return max(moments) - min(moments)


def test_notices_are_paced(start_server: StartServer) -> None:
    """With --drain-rate 10, twenty clients are told within about two seconds, not at once."""
    server = start_server("--drain-rate", "10")
    clients = [server.join() for _ in range(20)]
    server.signal()
    assert 1 < seconds_between(clients, lambda client: client.receive_many(2)) < 6


def test_closes_are_paced(start_server: StartServer) -> None:
    """When the timeout is over, twenty clients are closed within about two seconds, not at once."""
    server = start_server("--drain-rate", "10", "--shutdown-timeout", "0")
    clients = [server.join() for _ in range(20)]
    server.signal()
    assert 1 < seconds_between(clients, lambda client: client.closed()) < 8


def test_a_second_signal_is_not_paced(start_server: StartServer) -> None:
    """The closes of a second signal ignore --drain-rate."""
    server = start_server("--drain-rate", "1")
    clients = [server.join() for _ in range(20)]
    server.drain()
    server.signal(SIGINT)
    began = time.monotonic()
    assert [client.closed() for client in clients] == [GONE] * 20
    assert server.exit_status(AT_ONCE) == 0 and time.monotonic() - began < 10


# In the log.


@pytest.mark.parametrize("clients", [1, 3])
def test_the_log_says_how_many_remain(start_server: StartServer, clients: int) -> None:
    """An operator sees how many clients are waited for, and for how long at most."""
    server = start_server("--shutdown-timeout", "77")
    for _ in range(clients):
        server.join()
    server.signal()
    line = r"Draining: (?:(1) client remains; it is|([2-9]) clients remain; they are) closed in 7[0-7] s"
    # Each process tells of its own.
    eventually(lambda: sum(int(one or more) for one, more in re.findall(line, "\n".join(server.stderr))) == clients)


def test_a_killed_server_leaves_nothing_that_stops_the_next(start_server: StartServer) -> None:
    """After SIGKILL, with a client connected, the same port serves again at once."""
    port = str(free_port())
    first = start_server("--port", port)
    first.join()
    first.process.kill()
    eventually(lambda: is_free(first.port))
    assert start_server("--port", port).read("/health")["status"] == "healthy"
