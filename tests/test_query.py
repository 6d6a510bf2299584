"""The parameters of a URL: unknown ones are refused by name, repeated ones have a meaning, and all are UTF-8."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from bytes import handshake
from carriers import host, uvicorn
from event_stream import join
from expected import http_error, parse
from processes import Server, program

FOLLOWING = ["/ws", "/events", "/notifications"]
READING = [*FOLLOWING, "/status"]


@pytest.fixture(scope="module")
def carried() -> Iterator[Server]:
    """A host with notifyd mounted, under a server that knows nothing of our wire."""
    server = host(uvicorn, "in_starlette", "--ws", "websockets", prefix="/notifications")
    yield server
    server.kill()


def refusal(server: Server, path: str, query: str) -> object:
    """Return why such a request is refused: the reason of the close, or the message of the error."""
    if path == "/ws":
        client = server.connect(query=query)
        assert (client.rest(), client.connection.close_code) == ([], 1008)
        return client.connection.close_reason
    method = "POST" if path.startswith("/notify") else "GET"
    response = server.request(method, f"{path}?{query}", json={"message": "x"} if method == "POST" else None)
    assert response.status_code == 400
    message = parse(response.content)["error"]["message"]
    assert parse(response.content) == http_error("validation", message)
    return message


def followed(server: Server, query: str) -> set[str]:
    """Return the topics that a WebSocket and a stream with this query follow; both must be the same."""
    client = server.join(query=query)
    answer = client.ask({"type": "unsubscribe", "topics": ["no such topic"]})
    stream = join(server, query)
    for topic in answer["topics"]:
        assert server.notify("to both", topics=[topic])["recipients"] == 2
        assert stream.event().data["topics"] == [topic]
    return set(answer["topics"])


# Unknown parameters.


@pytest.mark.parametrize("path", READING)
@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("topic=a", "topic"),
        ("topics[]=a&topics[]=b", "topics[]"),
        ("topics%5B%5D=a", "topics[]"),
        ("Topics=a", "Topics"),
        ("clientId=ann", "clientId"),
        ("last-event-id=x", "last-event-id"),
        ("token=&x", "x"),
        ("%20limit=1", " limit"),
        ("=a", "without a name"),
        ("token&%F0%9F%A6%8A=1", "🦊"),
    ],
)
def test_an_unknown_parameter_is_refused_by_name(server: Server, path: str, query: str, name: str) -> None:
    """A subscription that silently is none would lose everything."""
    assert refusal(server, path, query) == f"Unknown parameter: {name}"


@pytest.mark.parametrize("path", ["/ws", "/events"])
def test_the_limit_of_an_answer_is_none_of_a_subscription(server: Server, path: str) -> None:
    """A parameter of other routes is as unknown as any."""
    assert refusal(server, path, "limit=5") == "Unknown parameter: limit"


@pytest.mark.parametrize("path", ["/notify", "/notify/batch"])
@pytest.mark.parametrize("name", ["topics", "clients", "client_id", "limit"])
def test_addressees_in_the_url_of_a_publish_are_refused(server: Server, path: str, name: str) -> None:
    """They belong in the body: ignored, they would send a private notification to everyone."""
    client = server.join()
    assert refusal(server, path, f"{name}=a") == f"Unknown parameter: {name}"
    assert client.ask({"type": "ping"})["type"] == "pong"


@pytest.mark.parametrize("path", ["/health", "/health/live", "/metrics", "/metrics/prometheus"])
def test_probes_and_scrapers_may_add_parameters(server: Server, path: str) -> None:
    """A route without parameters has none to confuse them with."""
    for query in ("x=1&topics=a&name[]=up", "x=%zz&%ff", "&".join("abc" * 100)):
        assert server.get(f"{path}?{query}").status_code == 200


@pytest.mark.parametrize("path", READING)
def test_an_unknown_parameter_is_refused_under_other_servers(carried: Server, path: str) -> None:
    """The error names it in a mounted app as well."""
    assert refusal(carried, path, "topic=a") == "Unknown parameter: topic"


@pytest.mark.parametrize("name", ["🦊" * 500, "x" * 500], ids=["wide", "narrow"])
def test_a_long_name_is_cut_to_fit_into_a_close(server: Server, carried: Server, name: str) -> None:
    """A close frame has room for 123 bytes, and every server sends it."""
    for each in (server, carried):
        reason = refusal(each, "/ws", f"{quote(name)}=1")
        assert isinstance(reason, str) and 80 < len(reason.encode()) <= 123
        assert f"Unknown parameter: {name}".startswith(reason)


def test_a_head_request_is_refused_as_well(server: Server) -> None:
    """HEAD has the status of GET, though it admits nobody."""
    for query in ("topic=a", "since=x", "client_id=%20", "topics=,"):
        assert server.request("HEAD", f"/events?{query}").status_code == 400
    assert server.request("HEAD", "/events", headers={"Last-Event-ID": "x"}).status_code == 400


@pytest.mark.parametrize("path", READING)
def test_a_token_is_known_without_authentication(server: Server, path: str) -> None:
    """A client needs no other URL for a server without keys."""
    if path == "/ws":
        server.join(query="token=a-key")
    elif path == "/events":
        join(server, "token=a-key")
    else:
        assert server.get(f"{path}?token=a-key").status_code == 200


def test_a_hosts_backend_adds_its_parameters() -> None:
    """Those that it lists are known besides ours, to requests and to handshakes, and no others."""
    server = host(uvicorn, "guarded", prefix="/notifications")
    try:
        assert server.get("/status?name=root").status_code == 200
        assert server.connect(query="name=alice").receive()["user"] == "alice"
        assert refusal(server, "/status", "name=root&names=1") == "Unknown parameter: names"
        assert refusal(server, "/ws", "name=alice&topic=builds") == "Unknown parameter: topic"
        assert refusal(server, "/ws", "token=alice") == "Authentication required"
    finally:
        server.kill()


# Repeated parameters.


@pytest.mark.parametrize(
    ("query", "topics"),
    [
        ("topics=a&topics=b", {"a", "b"}),
        ("topics=a,b&topics=b,c", {"a", "b", "c"}),
        ("topics=a&topics=", {"a"}),
        ("topics=&topics=b", {"b"}),
        ("topics=", set()),
        ("topics", set()),
        ("topics=a,%20b", {"a", "b"}),
        ("topics=+a+,b+&topics=%20c%20", {"a", "b", "c"}),
        ("topics=a+b", {"a b"}),
        ("topics=a%2Bb", {"a+b"}),
        ("topics=a%2Cb", {"a", "b"}),
        ("topics=100%25", {"100%"}),
        ("topics=a;b", {"a;b"}),
        ("&&topics=a&&", {"a"}),
        ("topics=gr%C3%B6%C3%9Fe", {"größe"}),
    ],
)
def test_topics_are_the_union_of_all(server: Server, query: str, topics: set[str]) -> None:
    """Spaces around a name do not count, and neither does an empty parameter."""
    assert followed(server, query) == topics


def test_the_union_has_the_limit_of_a_client(server: Server) -> None:
    """Fifty and fifty-one are too many."""
    fifty = [",".join(f"{letter}{number}" for number in range(50)) for letter in "ab"]
    query = f"topics={fifty[0]}&topics={fifty[1]}"
    assert len(followed(server, query)) == 100
    assert refusal(server, "/ws", f"{query}&topics=c") == "Invalid topics: topics: expected array of length <= 100"


@pytest.mark.parametrize("topics", ["%20", "a,%20", "a,,b", ",", "a&topics=,", "%09a", "%C2%A0a%0A"])
def test_a_name_of_spaces_or_with_control_characters_is_none(server: Server, topics: str) -> None:
    """Only spaces around a name are left out, and they make no name alone."""
    for path in FOLLOWING:
        assert str(refusal(server, path, f"topics={topics}")).startswith("Invalid topics: topics[")


def test_of_other_parameters_the_last_counts(server: Server) -> None:
    """A client can add its own to a URL that has some."""
    first, second, _ = server.publish("one", "two", "three")
    client = server.connect(query=f"client_id=ann&since={first}&client_id=bob&since={second}")
    assert client.receive()["client_id"] == "bob"
    assert client.receive()["data"]["replayed"] == 1
    assert len(server.read(f"/notifications?limit=x&since={first}&limit=1")["notifications"]) == 1
    assert server.read("/status?limit=5&limit=0")["connections"]["details"] == []


def test_last_event_id_is_another_name_of_since(server: Server) -> None:
    """On a WebSocket and for the history it counts before `since`, as on a stream."""
    first, second, third = server.publish("one", "two", "three")
    query = f"since={first}&lastEventId={second}"
    assert server.join(query=query).receive()["data"]["replayed"] == 1
    [found] = server.read(f"/notifications?{query}")["notifications"]
    assert found["id"] == third
    assert server.join(query=f"lastEventId=&since={first}").receive()["data"]["replayed"] == 2
    assert refusal(server, "/ws", "lastEventId=x&since=") == "Invalid since"


# The encoding.


@pytest.mark.parametrize("path", [*READING, "/notify", "/notify/batch"])
@pytest.mark.parametrize(
    "query", ["topics=%FF", "topics=gr%F6n", "client_id=%ED%A0%80", "since=%C0%80", "%FF=1", "token=%E2%82"]
)
def test_broken_encoding_is_refused(server: Server, path: str, query: str) -> None:
    """With U+FFFD in the place of each bad byte, a topic would be one that nobody publishes to."""
    assert refusal(server, path, query) == "Query: not valid UTF-8"


@pytest.mark.parametrize("path", [*READING, "/notify", "/notify/batch"])
@pytest.mark.parametrize("query", ["topics=%zz", "topics=100%", "client_id=a%2", "%u0061=1", "token=%25%2g"])
def test_a_percent_sign_that_encodes_nothing_is_refused(server: Server, path: str, query: str) -> None:
    """Taken literally, it would be a topic that the page did not mean."""
    assert refusal(server, path, query) == "Query: a % without two hex digits; %25 is a percent sign"


@pytest.mark.parametrize("path", ["/ws", "/events"])
def test_bytes_beyond_ascii_are_no_url(server: Server, path: str) -> None:
    """The server refuses the request line, before any upgrade."""
    for raw in (b"\xff", "ö".encode()):
        with server.raw(handshake(f"{path}?topics=gr_n").replace(b"_", raw)) as connection:
            assert connection.recv(12) == b"HTTP/1.1 400"


def test_broken_encoding_is_refused_under_other_servers(carried: Server) -> None:
    """A mounted app reads the query as it came."""
    assert refusal(carried, "/ws", "topics=%FF") == refusal(carried, "/events", "topics=%FF")
    assert refusal(carried, "/ws", "topics=%FF") == "Query: not valid UTF-8"


def test_curl_encodes_a_name_where_it_is_told_to(server: Server) -> None:
    """With --data-urlencode it finds the topic; the bare letter is refused, and not taken for another topic."""
    server.notify("seen", topics=["grön"])
    curl = [program("curl"), "--silent", "--noproxy", "*"]
    url = f"{server.url}/notifications"
    encoded = subprocess.run([*curl, "--get", "--data-urlencode", "topics=grön", url], capture_output=True, check=True)
    assert parse(encoded.stdout)["notifications"][-1]["topics"] == ["grön"]
    bare = subprocess.run([*curl, f"{url}?topics=grön"], capture_output=True, check=True)
    assert parse(bare.stdout) == http_error("validation", "request: Invalid char in url query")
