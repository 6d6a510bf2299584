"""Authentication: the rights of keys and tokens, their end, and secrets that stay secret."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jwt
import pytest
from carriers import client_of, first_quick, granian, host, hypercorn, uvicorn
from conftest import StartServer
from credentials import SECRET, bearer, part, token, unsigned
from expected import CLIENT_ID, TIME, Like, Record, answered, http_error, notification, welcome, ws_error
from processes import QUIET, ROOT, Server, call, environment, eventually, free_port, node_with, program
from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser, SimpleUser, UnauthenticatedUser
from starlette.requests import HTTPConnection
from starlette.routing import Route
from ws_clients import PATIENCE, Client

import schemas
from guard_auth import KeysAndTokens, keys_and_tokens_of
from guard_tokens import MAX_TOKEN_BYTES
from notifyd import create_app
from settings import Settings, SettingsError

KEY, OTHER_KEY = "key-of-ci-4711", "key-of-ops-0815"
NEEDED, INVALID, EXPIRED = "Authentication required", "Invalid token", "Token expired"
HEALTH_PATHS = ["/health", "/health/live"]
ADMIN_PATHS = ["/status", "/metrics", "/metrics/prometheus", "/notifications"]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys alone: one on the command line, one in a file."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# for people\n\nops:{OTHER_KEY}\n")
    file.chmod(0o600)
    server = Server.notifyd("--api-key", f"ci:{KEY}", "--api-key-file", str(file), *QUIET)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def signed() -> Iterator[Server]:
    """A server with tokens and a key, logging at DEBUG."""
    server = Server.notifyd(
        *("--api-key", f"ci:{KEY}", "--debug", *QUIET),
        variables={"NOTIFYD_JWT_SECRET": SECRET},
    )
    yield server
    server.stop()


def listener(server: Server, **claims: Any) -> Client:
    """A client with such a token."""
    client = server.connect(additional_headers=bearer(token(**claims)))
    assert client.receive()["type"] == "welcome"
    return client


def refusal(server: Server, shown: str, **query: str) -> Any:
    """The reason with which a client with this token is closed."""
    parameters = "&".join(f"{name}={value}" for name, value in query.items())
    code, reason = server.connect(query=parameters, additional_headers=bearer(shown)).closed()
    assert code == 1008
    return reason


# Keys.


@pytest.mark.parametrize("path", ADMIN_PATHS)
def test_a_key_is_needed_for_history_and_figures(keyed: Server, path: str) -> None:
    """Without a key the answer is 401 and names the scheme to use."""
    refused = keyed.get(path)
    assert answered(refused) == (401, http_error("application", NEEDED))
    assert refused.headers["www-authenticate"] == 'Bearer realm="notifyd"'
    assert keyed.get(path, headers={"X-API-Key": KEY}).status_code == 200


@pytest.mark.parametrize(("path", "body"), [("/notify", {"message": "hi"}), ("/notify/batch", [{"message": "hi"}])])
@pytest.mark.parametrize("headers", [{"X-API-Key": KEY}, bearer(KEY), {"authorization": f"bearer  {OTHER_KEY}"}])
def test_a_key_is_needed_to_publish(keyed: Server, path: str, body: object, headers: dict[str, str]) -> None:
    """A key from the command line or from the file publishes, in either header."""
    client = keyed.join()
    assert keyed.request("POST", path, json=body).status_code == 401
    assert keyed.request("POST", path, json=body, headers=headers).status_code == 200
    assert client.receive() == notification({"message": "hi"})
    client.send({"type": "ping"})
    assert client.receive()["type"] == "pong"


@pytest.mark.parametrize(
    "shown",
    [KEY[:-1], KEY + "x", KEY.upper(), "", "ci", "é", f"ops:{KEY}", f":{KEY}", f"CI:{KEY}", f"ci:{KEY}x", f"ci: {KEY}"],
)
@pytest.mark.parametrize("path", ["/status", "/events"])
def test_a_wrong_key_is_refused(keyed: Server, shown: str, path: str) -> None:
    """A wrong key is refused on open routes too: its owner should notice."""
    refused = keyed.get(path, headers={"X-API-Key": shown.encode()})
    assert answered(refused) == (401, http_error("application", INVALID))
    assert 'error="invalid_token"' in refused.headers["www-authenticate"]


def test_with_keys_alone_everybody_may_listen(keyed: Server) -> None:
    """Without tokens a client may listen with any client_id and any topic, and send any message but a wrong key."""
    assert keyed.join("alice", query="client_id=alice&topics=builds").ask({"type": "ping"})["type"] == "pong"
    with keyed.http.stream("GET", "/events?topics=builds") as stream:
        assert stream.status_code == 200


@pytest.mark.parametrize("server_name", ["keyed", "signed"])
def test_health_is_always_open(request: pytest.FixtureRequest, server_name: str) -> None:
    """/health answers with any credentials; so do OPTIONS and unknown paths."""
    server: Server = request.getfixturevalue(server_name)
    for path in HEALTH_PATHS:
        assert server.get(path).status_code == server.get(path, headers=bearer("wrong")).status_code == 200
    assert server.request("OPTIONS", "/notify").status_code == 204
    assert server.get("/nowhere").status_code == 404


def basic(pair: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


@pytest.mark.parametrize("server_name", ["keyed", "signed"])
@pytest.mark.parametrize("path", ADMIN_PATHS)
@pytest.mark.parametrize("headers", [{"X-API-Key": f"ci:{KEY}"}, basic(f"ci:{KEY}"), bearer(f"ci:{KEY}")])
def test_a_key_may_come_with_its_name(
    request: pytest.FixtureRequest, server_name: str, path: str, headers: dict[str, str]
) -> None:
    """A key is copied from the file as it stands there, or given to a tool that knows nothing but Basic."""
    server: Server = request.getfixturevalue(server_name)
    assert server.get(path, headers=headers).status_code == 200
    assert server.request("POST", "/notify", json={"message": "hi"}, headers=headers).status_code == 200
    assert server.connect(additional_headers=headers).receive()["type"] == "welcome"


@pytest.mark.parametrize("pair", ["ci:wrong", f"ci:{OTHER_KEY}", "ci:", "ci", f"ci:{KEY} "])
@pytest.mark.parametrize("path", ["/status", "/events"])
def test_a_wrong_secret_in_basic_is_refused(keyed: Server, pair: str, path: str) -> None:
    """The name is that of a key, so the secret is meant for this server."""
    refused = keyed.get(path, headers=basic(pair))
    assert answered(refused) == (401, http_error("application", INVALID))


def test_the_name_must_match(keyed: Server) -> None:
    """A secret with another key's name is wrong, with the name of no key it is nothing."""
    for name, reason in (("ops", INVALID), ("other", NEEDED), ("", NEEDED)):
        refused = keyed.request("POST", "/notify", json={"message": "hi"}, headers=basic(f"{name}:{KEY}"))
        assert answered(refused) == (401, http_error("application", reason))


def test_curl_and_urllib_know_basic(keyed: Server) -> None:
    """curl -u and a URL with the key are both understood."""
    target = f"{keyed.url}/notify"
    for arguments in (["-u", f"ci:{KEY}", target], [target.replace("//", f"//ci:{KEY}@")]):
        command = [program("curl"), "-sS", "--noproxy", "*", "-d", '{"message": "hi"}', *arguments]
        assert b'"success"' in subprocess.run(command, capture_output=True, check=True).stdout
    asked = urllib.request.Request(f"{keyed.url}/status", headers=basic(f"ops:{OTHER_KEY}"))
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    "shown", ["Basic cHJveHk6eA==", "Basic ???", "Basic", "Basic Y2k", 'Digest username="ci"', "x"]
)
def test_the_password_of_a_proxy_is_not_ours(keyed: Server, signed: Server, shown: str) -> None:
    """It counts as none: everybody may still listen, and a token in the URL still counts."""
    header = {"Authorization": shown}
    assert keyed.get("/status", headers=header).status_code == 401
    assert keyed.connect(additional_headers=header).receive()["type"] == "welcome"
    client = signed.connect(query=f"token={token(sub='alice')}", additional_headers=header)
    assert client.receive() == welcome(CLIENT_ID, user="alice")


def test_an_unknown_sender_is_refused_before_its_body(keyed: Server) -> None:
    """The 401 comes before any of the body has been sent."""
    head = b"POST /notify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    assert keyed.response_to(head)[0] == 401


def test_without_authentication_nothing_has_changed(server: Server) -> None:
    """Without authentication, credentials in a request are ignored as before."""
    assert server.get("/status", headers=bearer("wrong")).status_code == 200
    client = server.connect(query="token=wrong", subprotocols=["bearer", "wrong"])
    assert client.connection.subprotocol == "bearer"
    assert client.receive()["type"] == "welcome"
    assert client.ask({"type": "auth", "token": "x"}) == ws_error("Unknown message type: auth")


@pytest.mark.parametrize("offered", [["bearer"], ["chat", "bearer", "x"], ["x", "bearer"]])
def test_the_subprotocol_is_answered_wherever_it_is_offered(server: Server, offered: list[str]) -> None:
    """Without authentication and for a refusal too; a subprotocol of others is never answered."""
    assert server.join(subprotocols=offered).connection.subprotocol == "bearer"
    refused = server.connect(query="topic=a", subprotocols=offered)
    assert (refused.connection.subprotocol, refused.closed()[0]) == ("bearer", 1008)
    assert server.join(subprotocols=["chat", "Bearer"]).connection.subprotocol is None


NODE_WS = """
const WebSocket = require("ws");
const [url, ...offered] = process.argv.slice(1);
const socket = new WebSocket(url, offered);
socket.on("message", (text) => { console.log(socket.protocol, JSON.parse(text).type); socket.close(); });
socket.on("error", (error) => console.log(error.message));
"""


@pytest.mark.parametrize(
    ("offered", "printed"),
    [(["bearer", "a-token"], "bearer welcome"), (["json"], "Server sent no subprotocol"), ([], " welcome")],
    ids=["bearer", "another", "none"],
)
def test_node_ws_connects_to_a_server_without_authentication(server: Server, offered: list[str], printed: str) -> None:
    """It fails by itself where no subprotocol of its offer is answered."""
    command = [node_with("ws"), "-e", NODE_WS, server.ws_url, *offered]
    ended = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert ended.stdout.removesuffix("\n") == printed


def test_all_workers_know_the_keys(start_server: StartServer) -> None:
    """Whichever of them is asked."""
    server = start_server("--workers", "2", "--api-key", f"ci:{KEY}")
    for _ in range(6):
        assert server.get("/metrics", headers={"X-API-Key": KEY, "Connection": "close"}).status_code == 200
        assert server.get("/metrics", headers={"Connection": "close"}).status_code == 401


# Tokens: where they are.

WAYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "header": lambda shown: {"additional_headers": bearer(shown)},
    "subprotocol": lambda shown: {"subprotocols": ["bearer", shown]},
    "subprotocol-encoded": lambda shown: {"subprotocols": ["bearer", "".join(f"%{ord(each):02X}" for each in shown)]},
    "subprotocol-among-others": lambda shown: {"subprotocols": ["chat", "bearer", shown]},
    "query": lambda shown: {"query": f"token={shown}"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shown", ["token", "key"])
def test_a_client_shows_a_token_or_a_key(signed: Server, way: str, shown: str) -> None:
    """Credentials may be in any of the three places; the answer to the subprotocols is bearer."""
    client = signed.connect(**WAYS[way](token(sub="alice") if shown == "token" else KEY))
    assert client.receive()["type"] == "welcome"
    assert client.connection.subprotocol == ("bearer" if way.startswith("subprotocol") else None)


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_client_is_accepted_and_closed(signed: Server, way: str) -> None:
    """The answer has the subprotocol; without it a browser would hide the reason."""
    client = signed.connect(**WAYS[way]("wrong"))
    assert client.connection.subprotocol == ("bearer" if way.startswith("subprotocol") else None)
    assert client.closed() == (1008, INVALID)


@pytest.mark.parametrize("path", ["/status", "/events"])
def test_the_first_place_counts(signed: Server, path: str) -> None:
    """The credentials in the first of the documented places count, even if others are good."""
    key, header, query = {"X-API-Key": "wrong"}, bearer("wrong"), {"token": KEY}
    assert signed.get(path, headers=key | bearer(KEY), params=query).status_code == 401
    assert signed.get(path, headers=header, params=query).status_code == 401
    with signed.http.stream("GET", path, headers={"X-API-Key": KEY} | header, params={"token": "wrong"}) as answer:
        assert answer.status_code == 200


def test_a_header_counts_before_a_subprotocol_and_that_before_the_query(signed: Server) -> None:
    """A WebSocket's credentials count in the order header, subprotocol, query."""
    alice, bob, carol = (token(sub=name) for name in ("alice", "bob", "carol"))
    shown = {"subprotocols": ["bearer", bob], "query": f"token={carol}"}
    assert signed.connect(**shown, additional_headers=bearer(alice)).receive() == welcome(CLIENT_ID, user="alice")
    assert signed.connect(**shown).receive() == welcome(CLIENT_ID, user="bob")


def test_a_client_without_credentials_may_not_listen(signed: Server) -> None:
    """With tokens in the settings, a WebSocket and a stream without credentials are refused."""
    assert signed.connect().closed() == (1008, NEEDED)
    assert signed.connect(query="token=").closed() == (1008, NEEDED)
    assert signed.connect(subprotocols=["bearer"]).closed() == (1008, NEEDED)
    assert signed.get("/events").status_code == 401


def test_a_stream_takes_a_token_from_its_query(signed: Server) -> None:
    """A browser's EventSource can set no header."""
    with signed.http.stream("GET", f"/events?token={token(sub='alice')}") as stream:
        assert '"user":"alice"' in next(line for line in stream.iter_lines() if "welcome" in line and "data" in line)


# Tokens: their rights.


@pytest.mark.parametrize("user", ["alice", "auth0|5f7c", "a+b@example.com", "José Łuk 李", ".", "x" * 255])
def test_the_subject_is_the_user(signed: Server, user: str) -> None:
    """Any number of clients of a user are connected at once, each with an id from the server, or one of the user's."""
    shown = bearer(token(sub=user))
    for _ in range(3):
        assert signed.connect(query=f"user={quote(user)}", additional_headers=shown).receive() == welcome(
            CLIENT_ID, user=user
        )
    for client_id in {user, f"{user}:phone"} if schemas.CLIENT_ID.match(user) and len(user) < 99 else ():
        client = signed.connect(query=f"client_id={quote(client_id)}", additional_headers=shown)
        assert client.receive() == welcome(client_id, user=user)


@pytest.mark.parametrize("client_id", ["bob", "alic", "alicex", "Alice", "alice.phone", ":alice", "bob:alice:"])
def test_a_client_id_is_one_of_the_users(signed: Server, client_id: str) -> None:
    """A client_id is the name of the user, or begins with that name and a colon."""
    words = "Not allowed: client_id must be alice or begin with alice:"
    assert refusal(signed, token(sub="alice"), client_id=client_id) == words


@pytest.mark.parametrize("shown", [token(sub="alice"), token(), token(sub="")], ids=["alice", "none", "empty"])
@pytest.mark.parametrize("path", ["ws", "events"])
def test_nobody_names_another_user(signed: Server, shown: str, path: str) -> None:
    """`user` in the URL is that of the token; a token without a user is for none. A stream is refused with 403."""
    words = "Not allowed: user"
    if path == "ws":
        assert refusal(signed, shown, user="bob") == words
        return
    refused = signed.get("/events?user=bob", headers=bearer(shown))
    assert answered(refused) == (403, http_error("application", words))


def test_without_a_user_a_client_takes_any_id(signed: Server) -> None:
    """A token without a user allows any client_id; a key allows any user as well."""
    for shown in (token(), token(sub="")):
        client = signed.connect("somebody", additional_headers=bearer(shown))
        assert client.receive() == welcome("somebody")
        client.leave()
    with_key = signed.connect(query="client_id=carol&user=dan", additional_headers=bearer(KEY))
    assert with_key.receive() == welcome("carol", user="dan")


@pytest.mark.parametrize("user", ["x" * 256, "a\nb", "a\x00", "\x7f", "\x85", "\ud800"], ids=ascii)
def test_a_token_whose_user_cannot_be_one_is_invalid(signed: Server, user: str) -> None:
    """Too long, with a control character, or half a surrogate pair."""
    assert refusal(signed, token(sub=user)) == INVALID


@pytest.mark.parametrize(
    ("claims", "user"),
    [({"sub": "alice", "email": "a@b.example"}, "a@b.example"), ({"sub": "alice"}, ""), ({"email": 5}, None)],
    ids=["named", "absent", "no text"],
)
def test_another_claim_may_name_the_user(start_server: StartServer, claims: dict[str, Any], user: str | None) -> None:
    """With --jwt-user-claim, `sub` counts for nothing."""
    server = start_server("--jwt-secret", SECRET, "--jwt-user-claim", "email")
    client = server.connect(additional_headers=bearer(token(**claims)))
    if user is None:
        assert client.closed() == (1008, INVALID)
    else:
        assert client.receive() == welcome(CLIENT_ID, user=user)


def test_topics_are_those_of_the_token(signed: Server) -> None:
    """Topics are allowed by name or by prefix; a refused one changes nothing."""
    client = listener(signed, sub="alice", topics=["builds", "team.*"])
    assert client.ask({"type": "subscribe", "topics": ["team.a", "builds"]})["topics"] == ["builds", "team.a"]
    for topic in ("builds2", "build", "team", "*"):
        assert client.ask({"type": "subscribe", "topics": ["builds", topic]}) == ws_error(f"Not allowed: topic {topic}")
    assert client.ask({"type": "unsubscribe", "topics": ["builds"]})["topics"] == ["team.a"]


def test_spaces_around_the_topics_of_a_token_do_not_count(signed: Server) -> None:
    """As everywhere; a right that matches nothing would look like one."""
    client = listener(signed, sub="alice", topics=["builds ", " team.*"])
    assert client.ask({"type": "subscribe", "topics": ["team.a", "builds"]})["topics"] == ["builds", "team.a"]
    assert publish(signed, {"message": "hi", "topics": ["builds"]}, publish=[" builds"]) == 200


def test_topics_of_the_address_are_checked_too(signed: Server) -> None:
    """A topic in the URL needs a right, on a WebSocket and on a stream."""
    shown = token(sub="alice", topics=["builds"])
    assert signed.connect(query="topics=builds", additional_headers=bearer(shown)).receive()["type"] == "welcome"
    assert refusal(signed, token(topics=["builds"]), topics="builds,ops") == "Not allowed: topic ops"
    refused = signed.get("/events?topics=ops", headers=bearer(shown))
    assert answered(refused) == (403, http_error("application", "Not allowed: topic ops"))


def test_a_token_subscribes_by_itself(signed: Server) -> None:
    """The claim `subscribe` needs no URL and no right; the client may leave such a topic and come back to it."""
    shown = bearer(token(sub="alice", topics=["builds"], subscribe=["news", " alerts ", "a*"]))
    position = signed.get("/notifications?since=", headers=bearer(KEY)).json()["position"]
    signed.post({"message": "before", "topics": ["alerts"]}, headers=bearer(KEY))
    client = signed.connect(query=f"topics=builds&since={position}", additional_headers=shown)
    assert [client.receive()["type"] for _ in range(2)] == ["welcome", "resume"]
    assert client.receive()["data"]["message"] == "before"
    assert client.ask({"type": "unsubscribe", "topics": ["news"]})["topics"] == ["a*", "alerts", "builds"]
    assert client.ask({"type": "subscribe", "topics": ["news"]})["topics"] == ["a*", "alerts", "builds", "news"]
    assert client.ask({"type": "subscribe", "topics": ["abc"]}) == ws_error("Not allowed: topic abc")
    with signed.http.stream("GET", "/events", headers=shown) as stream:
        lines = stream.iter_lines()
        assert any("welcome" in line for line in lines)
        assert signed.post({"message": "x", "topics": ["news"]}, headers=bearer(KEY)).json()["recipients"] == 2
        assert any('"message":"x"' in line for line in lines)


@pytest.mark.parametrize(
    "claim",
    ["news", ["a,b"], [""], [5], ["x" * 129], ["\ud800"], [f"t{number}" for number in range(101)]],
    ids=["text", "comma", "empty", "number", "too long", "surrogate", "too many"],
)
def test_a_claim_that_names_no_topics_makes_a_token_invalid(signed: Server, claim: Any) -> None:
    """The names are those of topics, a hundred at most, and with those of the URL as many."""
    assert refusal(signed, token(subscribe=claim)) == INVALID
    hundred = token(topics=["more"], subscribe=[f"t{number}" for number in range(100)])
    words = "Invalid topics: topics: at most 100 a client, and this would make 101"
    assert refusal(signed, hundred, topics="more") == words


def test_a_star_is_every_topic(signed: Server) -> None:
    """A lone star allows every topic, and a topic named * is a topic."""
    assert listener(signed, topics=["*"]).ask({"type": "subscribe", "topics": ["any", "*"]})["topics"] == ["*", "any"]


def test_without_topics_broadcasts_still_come(signed: Server) -> None:
    """A token without topics receives broadcasts and nothing else."""
    client = listener(signed, sub="alice")
    assert client.ask({"type": "subscribe", "topics": ["builds"]}) == ws_error("Not allowed: topic builds")
    signed.post({"message": "by topic", "topics": ["builds"]}, headers=bearer(KEY))
    signed.post({"message": "for all"}, headers=bearer(KEY))
    assert client.receive() == notification({"message": "for all"})


def publish(server: Server, body: object, **claims: Any) -> Any:
    """The status of the answer, with its message where it is refused."""
    path = "/notify/batch" if isinstance(body, list) else "/notify"
    response = server.request("POST", path, json=body, headers=bearer(token(**claims)))
    return (
        response.status_code
        if response.status_code == 200
        else (response.status_code, response.json()["error"]["message"])
    )


@pytest.mark.parametrize(
    "body", [{"message": "hi"}, {"message": "hi", "users": ["alice"]}, [{"message": "hi", "clients": ["alice"]}]]
)
def test_the_right_to_publish_is_for_everything(signed: Server, body: object) -> None:
    """A token publishes to anyone with `publish` true, and nothing without."""
    assert publish(signed, body, publish=True) == 200
    for claims in ({}, {"publish": False}, {"publish": []}, {"admin": True}):
        assert publish(signed, body, **claims) == (403, "Not allowed: to publish")


def test_a_right_to_publish_by_topic_reaches_only_its_subscribers(signed: Server) -> None:
    """A publisher by topic reaches neither clients nor everyone, nor another topic, also not in a batch."""
    allowed = {"message": "hi", "topics": ["builds", "team.a"]}
    assert publish(signed, allowed, publish=["builds", "team.*"]) == 200
    targets: list[dict[str, Any]] = [{}, {"clients": ["alice"]}, {"users": ["alice"]}]
    for fields in (*targets, *({**target, "topics": ["builds"]} for target in targets[1:])):
        refused = {"message": "hi", **fields}
        assert publish(signed, refused, publish=["*"]) == (403, "Not allowed: to publish other than by topic")
        assert publish(signed, [allowed, refused], publish=["*"])[0] == 403
    other = {"message": "hi", "topics": ["builds", "ops"]}
    assert publish(signed, [allowed, other], publish=["builds", "team.*"]) == (
        403,
        "Not allowed: to publish to topic ops",
    )


@pytest.mark.parametrize("path", ADMIN_PATHS)
def test_only_an_admin_may_read_history_and_figures(signed: Server, path: str) -> None:
    """Notifications for others, and figures, need the right `admin`."""
    assert signed.get(path, headers=bearer(token(sub="alice", topics=["*"], publish=True))).status_code == 403
    assert signed.get(path, headers=bearer(token(admin=True))).status_code == 200
    assert signed.get(path, headers=bearer(KEY)).status_code == 200


# Tokens: how long.


def test_the_end_of_a_token_is_the_end_of_the_client(signed: Server) -> None:
    """No sooner than it says, and not long after; the id is free again."""
    ends = int(time.time()) + 4
    client = listener(signed, sub="alice", exp=ends)
    assert client.closed() == (1008, EXPIRED)
    assert 0 <= time.time() - ends < 5
    assert listener(signed, sub="alice")
    assert refusal(signed, token(exp=ends)) == EXPIRED
    assert signed.get("/status", headers=bearer(token(admin=True, exp=ends))).json()["error"]["message"] == EXPIRED


def test_a_stream_ends_with_its_token(signed: Server) -> None:
    """It is told why, in an event."""
    with signed.http.stream("GET", "/events", headers=bearer(token(exp=time.time() + 4))) as stream:
        *_, name, data, _ = stream.iter_lines()
    assert (name, data) == ("event: closed", 'data: {"code":1008,"reason":"Token expired"}')


def test_a_new_token_goes_on_where_the_last_one_ended(signed: Server) -> None:
    """A renewed client has the rights of the new token, and ends with it."""
    first, last = time.time() + 4, int(time.time()) + 7
    client = listener(signed, sub="alice", exp=first)
    until = Like(time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(last)))
    renewed = client.ask({"type": "auth", "token": token(sub="alice", topics=["builds"], exp=last)})
    assert renewed == {"type": "authenticated", "expires_at": until, "timestamp": TIME}
    assert client.ask({"type": "subscribe", "topics": ["builds"]})["type"] == "subscribed"
    assert client.closed() == (1008, EXPIRED)
    assert time.time() >= last


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ({"token": "wrong"}, INVALID),
        ({"token": token(sub="alice", exp=1)}, EXPIRED),
        ({"token": token(sub="bob", topics=["*"])}, "Not allowed: user"),
        ({"token": token(topics=["*"])}, "Not allowed: user"),
        ({"token": ""}, INVALID),
        ({"token": "\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace")}, INVALID),
        ({}, "token: required, but missing"),
        ({"token": 5}, "token: expected string, got integer"),
    ],
)
def test_a_bad_renewal_changes_nothing(signed: Server, message: Record, answer: str) -> None:
    """It is an error message; the client ends when its first token does."""
    client = listener(signed, sub="alice", topics=["builds"], exp=int(time.time()) + 5)
    assert client.ask({"type": "subscribe", "topics": ["builds"]})["type"] == "subscribed"
    assert client.ask({"type": "auth", **message}) == ws_error(answer)
    assert client.ask({"type": "subscribe", "topics": ["ops"]}) == ws_error("Not allowed: topic ops")
    if "required" in answer:  # One of them waits for it: that takes time.
        assert client.closed() == (1008, EXPIRED)


@pytest.mark.parametrize(
    ("claims", "topics", "may"),
    [
        ({"topics": ["builds", "ops"]}, None, ["ops"]),
        ({"topics": ["ops"]}, ["news", "set"], ["ops", "set"]),
        ({}, ["news", "set"], ["set"]),
        ({"subscribe": ["builds"]}, None, ["builds"]),
        ({"subscribe": ["more"]}, ["more", "news", "set"], ["more"]),
    ],
)
def test_a_renewal_drops_topics_that_are_not_allowed_any_more(
    signed: Server, claims: dict[str, Any], topics: list[str] | None, may: list[str]
) -> None:
    """The client hears so, but keeps the topics of the first token's claim `subscribe`, and is given the new ones'."""
    first = token(sub="alice", topics=["builds"], subscribe=["news", "set"])
    client = signed.connect(query="topics=builds", additional_headers=bearer(first))
    assert client.receive() == welcome(CLIENT_ID, user="alice")
    assert client.ask({"type": "auth", "token": token(sub="alice", **claims)})["type"] == "authenticated"
    if topics is not None:
        assert client.receive() == {"type": "subscribed", "topics": topics, "timestamp": TIME}
    for topic in topics or ["builds", "news", "set"]:
        signed.post({"message": topic, "topics": [topic]}, headers=bearer(KEY))
        assert client.receive()["data"]["message"] == topic
    for topic in {"builds", "ops", "set", "more"} - set(topics or ["builds", "news", "set"]):
        answer = client.ask({"type": "subscribe", "topics": [topic]})
        assert answer["type"] == "subscribed" if topic in may else answer == ws_error(f"Not allowed: topic {topic}")


def test_a_topic_that_the_client_has_left_is_no_longer_set(signed: Server) -> None:
    """Where it comes back to the topic by itself, the next token has to allow the topic."""
    client = listener(signed, sub="alice", subscribe=["news"])
    assert client.ask({"type": "unsubscribe", "topics": ["news"]})["topics"] == []
    assert client.ask({"type": "auth", "token": token(sub="alice", topics=["news"])})["type"] == "authenticated"
    assert client.ask({"type": "subscribe", "topics": ["news"]})["topics"] == ["news"]
    assert client.ask({"type": "auth", "token": token(sub="alice")})["type"] == "authenticated"
    assert client.receive()["topics"] == []


def test_a_renewal_with_too_many_topics_changes_nothing(signed: Server) -> None:
    """A client has a hundred topics at most, wherever they come from."""
    client = listener(signed, sub="alice", topics=["builds"], subscribe=[f"a{number}" for number in range(60)])
    more = token(sub="alice", topics=["ops"], subscribe=[f"b{number}" for number in range(60)])
    words = "topics: at most 100 a client, and this would make 120"
    assert client.ask({"type": "auth", "token": more}) == ws_error(words)
    assert client.ask({"type": "subscribe", "topics": ["ops"]}) == ws_error("Not allowed: topic ops")


@pytest.mark.parametrize("claims", [{}, {"topics": ["*"], "exp": None}])
def test_a_client_without_a_subject_renews_without_one(signed: Server, claims: dict[str, Any]) -> None:
    """A client of no user stays one, also where the first token limits nothing else."""
    client = listener(signed, **claims)
    assert client.ask({"type": "auth", "token": token()})["type"] == "authenticated"
    assert client.ask({"type": "auth", "token": token(sub="alice")})["type"] == "error"


def test_a_key_renews_for_ever(signed: Server) -> None:
    """It has no end, and no limits."""
    client = listener(signed, sub="alice", exp=time.time() + 4)
    assert client.ask({"type": "auth", "token": KEY}) == {
        "type": "authenticated",
        "expires_at": None,
        "timestamp": TIME,
    }
    assert client.ask({"type": "subscribe", "topics": ["ops"]})["type"] == "subscribed"
    time.sleep(5.2)  # Nothing must happen, and so nothing can be waited for.
    assert client.ask({"type": "ping"})["type"] == "pong"


def test_a_token_may_have_no_end(signed: Server) -> None:
    """That is its issuer's to decide (RFC 7519, section 4.1.4)."""
    client = listener(signed, exp=None)
    assert client.ask({"type": "auth", "token": token(exp=None)})["expires_at"] is None


def test_an_issuers_clock_may_be_a_little_ahead(signed: Server) -> None:
    """A token whose nbf or iat is 5 seconds ahead is good, and a minute ahead is bad."""
    soon, later = int(time.time()) + 5, int(time.time()) + 60
    assert listener(signed, nbf=soon, iat=soon)
    assert refusal(signed, token(nbf=later)) == INVALID
    assert refusal(signed, token(iat=later)) == INVALID


# Tokens: invalid ones.


BAD = {
    "none": unsigned({"alg": "none"}),
    "None": unsigned({"alg": "None", "typ": "JWT"}),
    "empty alg": unsigned({"alg": ""}),
    "null alg": unsigned({"alg": None}),
    "no alg": unsigned({"typ": "JWT"}),
    "list of alg": unsigned({"alg": ["HS256"]}),
    "no signature": token().rpartition(".")[0] + ".",
    "other secret": token(SECRET + "!"),
    "cut": token()[:-2],
    "claims changed": ".".join([token().split(".")[0], part({"admin": True}), token().split(".")[2]]),
    "not JSON": unsigned(b"x"),
    "a list": unsigned([1]),
    "claims are a list": jwt.api_jws.encode(b"[1]", SECRET),
    "claims are no JSON": jwt.api_jws.encode(b"x", SECRET),
    "nested header": unsigned(b"[" * 2000),
    "nested claims": jwt.api_jws.encode(b"[" * 2000, SECRET),
    "kid is a list": unsigned({"alg": "HS256", "kid": []}),
    "kid is a path": unsigned({"alg": "HS256", "kid": "../../../../dev/null"}),
    "crit": token(headers={"crit": ["exp"], "exp": 1}),
    "audience": token(aud="another service"),
    "sub is a number": jwt.api_jws.encode(b'{"sub":5}', SECRET),
    "sub is null": jwt.api_jws.encode(b'{"sub":null}', SECRET),
    "topics are text": token(topics="*"),
    "topics are numbers": token(topics=[1]),
    "publish is text": token(publish="*"),
    "admin is text": token(admin="true"),
    "admin is a number": token(admin=1),
    "exp is text": token(exp="soon"),
    "exp is a number in a text": token(exp="99999999999"),
    "exp is vast": jwt.api_jws.encode(b'{"exp":1e400}', SECRET),
    "exp is after all years": token(exp=10**18),
    "exp is NaN": jwt.api_jws.encode(b'{"exp":NaN}', SECRET),
    "dots": "." * 100,
    "spaces": "a b",
    "percent": "%00",
}


@pytest.mark.parametrize("bad", BAD)
def test_an_invalid_token_is_refused(signed: Server, bad: str) -> None:
    """Every invalid token gets the same words, over HTTP and on a WebSocket."""
    refused = signed.get("/status", headers=bearer(BAD[bad]))
    assert answered(refused) == (401, http_error("application", INVALID))
    assert refusal(signed, BAD[bad]) == INVALID


def test_a_huge_token_is_not_even_read(signed: Server) -> None:
    """Though its signature is good."""
    huge = token(sub="a" * MAX_TOKEN_BYTES)
    assert signed.get("/events", headers=bearer(huge)).status_code == 401
    assert listener(signed, sub="alice").ask({"type": "auth", "token": huge}) == ws_error(INVALID)


# Secrets.


def test_no_log_shows_a_token(signed: Server) -> None:
    """The log shows no token at level DEBUG, whichever way it came, good or bad."""
    shown = [token(sub="alice", admin=True), "wrong-but-a-secret", KEY]
    for one in shown:
        for way in WAYS.values():
            signed.connect(**way(one)).leave()
        signed.get(f"/status?token={one}")
        signed.get(f"/nowhere?token={one}")
        signed.request("PUT", f"/notify?token={one}")
        client = signed.join(additional_headers=bearer(KEY))
        client.ask({"type": "auth", "token": one})
        client.ask(f'{{"type": "auth", "token": "{one}"')
    signed.forget_clients()
    eventually(lambda: signed.active() == 0)
    log = "\n".join(signed.stderr)
    assert not [one for one in [*shown, SECRET] if one in log]


@pytest.mark.parametrize("bad", ["wrong-but-a-secret", unsigned({"alg": "none"}, {"sub": "wrong-but-a-secret"})])
def test_no_answer_shows_a_token(signed: Server, bad: str) -> None:
    """No body and no header of an answer shows a token."""
    refused = signed.get(f"/status?token={bad}", headers=bearer(bad))
    assert bad not in refused.text + str(refused.headers)


# In another app, under other servers.

HOSTS = {
    "uvicorn": (uvicorn, ("--ws", "websockets", "--no-access-log")),
    "uvicorn-wsproto": (uvicorn, ("--ws", "wsproto", "--no-access-log")),
    "hypercorn": (hypercorn, ()),
    "granian": (granian, ()),
}


@pytest.fixture(scope="module", params=first_quick(HOSTS))
def guarded(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A host with an authentication backend of its own."""
    command, flags = HOSTS[request.param]
    server = host(command, "guarded", *flags, prefix="/notifications")
    yield server
    server.kill()


def test_a_hosts_backend_identifies_the_clients(guarded: Server) -> None:
    """The identity of the backend's user is the user, its scopes are the rights."""
    client = guarded.connect(additional_headers=bearer("alice"), query="topics=builds")
    assert client.receive() == welcome(CLIENT_ID, user="alice")
    assert client.ask({"type": "subscribe", "topics": ["ops"]}) == ws_error("Not allowed: topic ops")
    assert guarded.post({"message": "hi"}, headers=bearer("alice")).status_code == 403
    assert guarded.post({"message": "hi", "topics": ["builds"]}, headers=bearer("alice")).status_code == 200
    assert client.receive()["data"] == {"message": "hi"}
    assert guarded.get("/status", headers=bearer("alice")).status_code == 403
    assert guarded.get("/status", headers=bearer("root")).status_code == 200


def test_a_host_refuses_in_the_documented_way(guarded: Server) -> None:
    """A host's refusals have the documented form, with and without a token."""
    assert guarded.connect().closed() == (1008, NEEDED)
    assert guarded.connect(additional_headers=bearer("mallory")).closed() == (1008, INVALID)
    refused = guarded.get("/status", headers=bearer("mallory"))
    assert answered(refused) == (401, http_error("application", INVALID))


def test_a_hosts_subprotocol_is_answered(guarded: Server) -> None:
    """Every server answers the subprotocol, for a refusal too."""
    for shown, closes in (("alice", False), ("mallory", True)):
        client = guarded.connect(subprotocols=["bearer", shown])
        assert client.connection.subprotocol == "bearer"
        assert client.closed() == (1008, INVALID) if closes else client.receive() == welcome(CLIENT_ID, user="alice")


def test_a_backend_may_fail(guarded: Server) -> None:
    """Over HTTP and on a connection that is open; the log says why, and the client goes on."""
    assert guarded.get("/status", headers=bearer("nobody knows")).status_code == 500
    client = guarded.join(additional_headers=bearer("alice"))
    assert client.ask({"type": "auth", "token": "nobody knows"}) == ws_error("Internal server error")
    assert client.ask({"type": "ping"})["type"] == "pong"
    eventually(lambda: [line[-10:] for line in guarded.stderr].count("on purpose") == 2)
    assert "Unexpected error" in guarded.new_log()


def test_a_hosts_credentials_end_and_are_renewed(guarded: Server) -> None:
    """Where they have `expires_at`."""
    client = guarded.connect(additional_headers=bearer("brief"))
    assert client.receive() == welcome(CLIENT_ID, user="brief")
    assert client.ask({"type": "auth", "token": "mallory"}) == ws_error(INVALID)
    assert client.ask({"type": "auth", "token": "brief"})["type"] == "authenticated"
    assert client.closed() == (1008, EXPIRED)


# Settings.


MISTAKES = [
    (["--api-key", "hush"], "--api-key: expected NAME:SECRET"),
    (["--api-key", "ci:"], "--api-key: expected NAME:SECRET"),
    (["--api-key", ":hush"], "--api-key: expected NAME:SECRET"),
    (["--api-key", "ci:hu sh"], "--api-key: expected NAME:SECRET"),
    (["--api-key", "ci:hush", "--api-key", "ci:hush2"], "--api-key: there are two keys called ci"),
    (["--api-key", "ci:a", "ops:hush"], "unrecognized arguments: ..."),
    (["--api-keys", "ci:hush"], "unrecognized arguments: --api-keys"),
    (["--jwt-secrets=hush"], "unrecognized arguments: --jwt-secrets"),
    (["--jwt-secret", "hush"], "--jwt-secret: expected 32 bytes or more"),
    (["--jwt-secret", "-----BEGIN PUBLIC KEY-----\nhush\n-----END PUBLIC KEY-----"], "--jwt-secret: expected a secret"),
    (["--jwt-public-key", "/nowhere"], "--jwt-public-key: cannot read /nowhere: No such file or directory"),
    (["--jwt-public-key", "README.md"], "--jwt-public-key: there is no public key in PEM in README.md"),
    (["--jwks-url", "login.example"], "--jwks-url: expected a URL"),
    (["--jwks-url", "file:///etc/passwd"], "--jwks-url: expected a URL"),
    (["--jwks-url", "https://me:hush@login.example/keys"], "--jwks-url: expected a URL without a user and a password"),
    (["--jwks-url", "http://x/", "--jwt-secret", "hush" * 8], "expected one of --jwt-secret, --jwt-public-key and"),
    (["--jwt-secret", "hush" * 8, "--jwt-algorithms", "RS256"], "--jwt-algorithms: RS256 is not for this kind of key"),
    (["--jwt-secret", "hush" * 8, "--jwt-algorithms", "none"], "--jwt-algorithms: expected some of ES256"),
    (["--jwt-audience", "me"], "expected one of --jwt-secret, --jwt-public-key and --jwks-url as well"),
    (["--api-key-file", "/nowhere"], "--api-key-file: cannot read /nowhere: No such file or directory"),
    (["--api-key-file", "/dev/null"], "--api-key-file: there is no key in /dev/null"),
]


@pytest.mark.parametrize(("flags", "line"), MISTAKES)
def test_a_mistake_is_one_line_without_the_secret(flags: list[str], line: str) -> None:
    """It names the setting, and exits with 2."""
    ended = call("--port", "0", *flags)
    assert ended.in_one_line == (2, 1)
    assert line in ended.stderr
    assert "hush" not in str(ended)


@pytest.mark.parametrize("variable", ["NOTIFYD_API_KEY", "NOTIFYD_JWT_SECRET"])
def test_a_mistake_in_a_variable_is_not_shown_either(variable: str) -> None:
    """Only its name is."""
    ended = call(variables={variable: "hush"})
    assert ended.in_one_line == (2, 1)
    assert variable in ended.stderr
    assert "hush" not in str(ended)


def test_help_shows_no_secret() -> None:
    """Neither --help nor the repr of Settings shows a secret."""
    variables = {"NOTIFYD_API_KEY": "ci:hush", "NOTIFYD_JWT_SECRET": "hush" * 8}
    ended = call("--help", variables=variables)
    assert (ended.status, "--api-key" in ended.stdout, "hush" in str(ended)) == (0, True, False)
    with pytest.raises(SettingsError, match=r"^api_key: expected a list$"):
        Settings(api_key="ci:hush")  # type: ignore[arg-type]
    assert "hush" not in repr(Settings(api_key=("ci:hush",), jwt_secret="hush" * 8))


@pytest.mark.parametrize(("content", "complaint"), [("ci\n", "line 1"), ("# x\n\nci:a b\n", "line 3")])
def test_a_bad_line_in_the_file_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    """The line names the file and the number of the bad line, and does not show its content."""
    path = tmp_path / "keys"
    path.write_text(content)
    said = f"notifyd: --api-key-file: {path}, {complaint}: expected NAME:SECRET\n"
    assert call("--api-key-file", str(path)) == (2, "", said)


def holders(settings: Settings, *secrets: str) -> list[str | None]:
    """The names of the keys with these secrets."""
    keys = keys_and_tokens_of(settings)
    assert keys is not None
    return [keys.holder(secret) for secret in secrets]


@pytest.mark.parametrize("text", ["#\r\n\r\nci:one\r\n", "\ufeffci:one\n", "\ufeff# é\nci:one", "\tci:one \n\f\n"])
def test_a_file_may_come_from_any_editor(tmp_path: Path, text: str) -> None:
    """A key file may have Windows line ends, a byte order mark, or no end of the last line."""
    path = tmp_path / "keys"
    path.write_bytes(text.encode())
    assert holders(Settings(api_key_file=str(path)), "one") == ["ci"]


def test_each_key_of_both_places_is_one(tmp_path: Path) -> None:
    """Several flags, and several lines of the file."""
    path = tmp_path / "keys"
    path.write_text("c:three\nd:four\n")
    settings = Settings(api_key=("a:one", "b:two"), api_key_file=str(path))
    assert holders(settings, "one", "two", "three", "four") == ["a", "b", "c", "d"]


def test_a_secret_may_have_a_colon() -> None:
    """The first one ends the name."""
    assert holders(Settings(api_key=("ci:one:two",)), "one:two", "one", "two", "") == ["ci", None, None, None]


def test_two_keys_of_one_name_are_a_mistake(tmp_path: Path) -> None:
    """Two keys with one name are a mistake, even if one is in the file."""
    path = tmp_path / "keys"
    path.write_text("ci:one\n")
    said = f"notifyd: --api-key-file: {path}, line 1: there are two keys called ci\n"
    assert call("--api-key", "ci:two", "--api-key-file", str(path)) == (2, "", said)


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o640, 1), (0o604, 1)])
def test_a_file_that_others_can_read_is_warned_about(
    start_server: StartServer, tmp_path: Path, mode: int, warnings: int
) -> None:
    """A file that others can read is warned about once, and used."""
    path = tmp_path / "keys"
    path.write_text("  ci:secret  \n#ops:other\n")
    path.chmod(mode)
    server = start_server("--api-key-file", str(path))
    assert [len(re.findall(str(path), line)) for line in server.stderr if "WARNING" in line] == [1] * warnings
    assert server.get("/status", headers={"X-API-Key": "secret"}).status_code == 200
    assert server.get("/status", headers={"X-API-Key": "other"}).status_code == 401


@pytest.mark.parametrize(
    ("flags", "warnings"),
    [
        (("--host", "127.0.0.1"), 0),
        (("--host", "0.0.0.0"), 1),
        (("--host", "0.0.0.0", "--workers", "2"), 1),
        (("--host", "0.0.0.0", "--api-key", "ci:secret"), 0),
    ],
)
def test_a_server_that_is_open_to_all_says_so(start_server: StartServer, flags: tuple[str, ...], warnings: int) -> None:
    """A server that other machines reach without authentication logs one warning."""
    server = start_server(*flags)
    assert ["no authentication" in line for line in server.stderr if "WARNING" in line] == [True] * warnings


def test_an_internal_port_that_is_open_to_all_says_so(start_server: StartServer) -> None:
    """Though the public one is not."""
    server = start_server("--internal-port", str(free_port()), "--internal-host", "0.0.0.0")
    assert ["no authentication" in line for line in server.stderr if "WARNING" in line] == [True]


def test_the_internal_port_asks_for_credentials_too(start_server: StartServer) -> None:
    """The internal port asks for credentials as the public one does, except on the probes."""
    port = free_port()
    server = start_server("--internal-port", str(port), "--api-key", f"ci:{KEY}")
    for path in ADMIN_PATHS[:3]:
        url = f"http://127.0.0.1:{port}{path}"
        assert server.get(url).status_code == 401
        assert server.get(url, headers={"X-API-Key": KEY}).status_code == 200
    assert {server.get(f"http://127.0.0.1:{port}{path}").status_code for path in HEALTH_PATHS} == {200}


# Without a server.


class Stranger(AuthenticationBackend):
    """A host's backend that knows everybody, and gives nobody a right."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser]:
        return AuthCredentials(), SimpleUser("alice")


def test_every_route_needs_a_right_or_is_open_on_purpose() -> None:
    """A user without rights gets 403 everywhere else; a route that is new in the table must be named here."""
    app = create_app(Settings(), Stranger())

    async def answers() -> dict[str, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            paths = {route.path for route in app.routes if isinstance(route, Route)}
            head = {path: (await client.head(path)).status_code for path in paths}
            return {path: (await client.post(path)).status_code if head[path] == 405 else head[path] for path in paths}

    public = ["/", "/openapi.json", "/asyncapi.json", "/client.js", "/health", "/health/live", "/events"]
    opened = dict.fromkeys(public, 200)
    # A name of no file.
    opened |= {"/ws": 426, "/console/{file}": 404}
    people = ["/clients", "/clients/{client_id}", "/users/online", "/users/{user}", "/users/{user}/topics", "/topics"]
    people += ["/notifications/{id}", "/notifications/{id}/clients"]
    assert asyncio.run(answers()) == dict.fromkeys([*ADMIN_PATHS, *people, "/notify", "/notify/batch"], 403) | opened


class Host(AuthenticationBackend):
    """A host's backend to which everybody is this user."""

    def __init__(self, user: BaseUser) -> None:
        self.user = user

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser]:
        return AuthCredentials(["subscribe"]), self.user


@pytest.mark.parametrize(
    ("user", "query", "outcome"),
    [
        (SimpleUser("auth0|5f7c"), "", welcome(CLIENT_ID, 10, "auth0|5f7c")),
        (SimpleUser("x" * 256), "", INVALID),
        (SimpleUser("a\nb"), "", INVALID),
        (SimpleUser("alice"), "user=bob", "Not allowed: user"),
        (UnauthenticatedUser(), "client_id=alice", welcome("alice", 10)),
        (UnauthenticatedUser(), "user=alice", "Not allowed: user"),
    ],
    ids=["any text", "too long", "control character", "another", "stranger", "stranger with a name"],
)
def test_a_hosts_user_has_the_form_of_a_user(user: BaseUser, query: str, outcome: Any) -> None:
    """A stranger with a right belongs to no user, and may not name one."""
    with client_of(create_app(Settings(), Host(user))).websocket_connect(f"/ws?{query}") as websocket:
        first = websocket.receive()
    assert (first["reason"] if "reason" in first else json.loads(first["text"])) == outcome


def test_every_key_is_compared_even_after_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys are compared in constant time, so that the time of an answer tells nothing about any of them."""
    compared = []
    original = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: compared.append(pair) or original(*pair))
    keys = KeysAndTokens([("a", "one"), ("b", "two"), ("c", "three")])
    assert [keys.holder(shown) for shown in ("one", "c:three", "four")] == ["a", "c", None]
    assert [len(one) for pair in compared for one in pair] == [32] * 36


def test_authentication_is_imported_only_where_it_is_used() -> None:
    """PyJWT and cryptography cost a server without tokens nothing."""
    code = "import sys, notifyd; notifyd.create_app(); sys.exit(any(n in sys.modules for n in ('jwt', 'cryptography')))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, check=False).returncode == 0
