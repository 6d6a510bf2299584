"""The log of an operator: refused credentials, publishes, connections, and the times of its lines."""

from __future__ import annotations

import re
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest
from conftest import StartServer
from credentials import SECRET, bearer, token
from expected import ws_error
from processes import ROOT, Server, eventually, program, worker_count
from ws_clients import PATIENCE

KEY = "key-of-ci-4711"
INVALID, EXPIRED = "Invalid token", "Token expired"


def behind_proxy(server: Server, address: str, shown: str, path: str = "/status") -> int:
    """The status of the answer to a request that a proxy passes on."""
    return server.get(path, headers=bearer(shown) | {"X-Forwarded-For": address}).status_code


def warnings(server: Server) -> list[str]:
    """The warnings of a server, without time and process, after its end."""
    server.stop()
    return [line.partition(" WARNING ")[2] for line in server.stderr if " WARNING " in line]


def test_refused_credentials_are_logged_by_address(start_server: StartServer) -> None:
    """Once a minute for each address and reason, in every place for credentials; requests without any are no attack."""
    server = start_server("--jwt-secret", SECRET, "--api-key", f"ci:{KEY}", "--trusted-proxies", "127.0.0.1")
    for _ in range(5):
        assert behind_proxy(server, "203.0.113.1", "wrong") == 401
    assert behind_proxy(server, "203.0.113.2", token(exp=1)) == 401
    assert behind_proxy(server, "203.0.113.2", "wrong") == 401, "the other reason hides nothing"
    # Of one IPv6 network only the first.
    assert behind_proxy(server, "2001:db8::3", "wrong") == behind_proxy(server, "2001:db8::4", "wrong") == 401
    assert server.get("/events?token=wrong", headers={"X-Forwarded-For": "2001:db8::3"}).status_code == 401
    for number, way in enumerate(({"subprotocols": ["bearer", "wrong"]}, {"query": "token=wrong"}), 4):
        headers = {"X-Forwarded-For": f"::ffff:203.0.113.{number}"}
        assert server.connect(**way, additional_headers=headers).closed() == (1008, INVALID)
    client = server.connect(additional_headers=bearer(KEY) | {"X-Forwarded-For": "203.0.113.9"})
    assert client.receive()["type"] == "welcome"
    assert client.ask({"type": "auth", "token": "wrong"}) == ws_error(INVALID)
    assert server.get("/status").status_code == 401
    addresses = ["203.0.113.1", "2001:db8::3", "203.0.113.4", "203.0.113.5", "203.0.113.9"]
    refused = [(address, INVALID) for address in addresses] + [("203.0.113.2", EXPIRED), ("203.0.113.2", INVALID)]
    lines = warnings(server)
    assert set(lines) == {f"Credentials from {address} are refused: {reason}" for address, reason in refused}
    assert len(lines) == len(refused) or worker_count() > 1


def test_many_addresses_are_logged_and_each_again_after_a_while(start_server: StartServer) -> None:
    """So many guess at once, from a botnet for example; fail2ban counts the lines of several minutes."""
    constants = {"guard_peers.WARN_SECONDS": 3.0}
    server = start_server("--api-key", f"ci:{KEY}", "--trusted-proxies", "127.0.0.1", constants=constants)
    for number in range(150):
        behind_proxy(server, f"203.0.113.{number}", "wrong")
    server.wait_for_line(r"203\.0\.113\.149")

    def lines_of_first() -> int:
        behind_proxy(server, "203.0.113.0", "wrong")
        return sum("203.0.113.0 are" in line for line in server.stderr)

    eventually(lambda: lines_of_first() > worker_count())


@pytest.mark.parametrize(
    "shown",
    ["Basic YWRtaW46YWRtaW4=", "Basic ???", "Basic /zo=", f"Token {KEY}"],
)
def test_an_authorization_that_counts_as_none_is_logged_where_one_is_needed(
    start_server: StartServer, shown: str
) -> None:
    """A guess with a made-up name is a guess. Where everybody may listen, it is for a proxy in front."""
    server = start_server("--api-key", f"ci:{KEY}")
    assert server.connect(additional_headers={"Authorization": shown}).receive()["type"] == "welcome"
    assert server.get("/status").status_code == 401
    for _ in range(2):
        assert server.get("/status", headers={"Authorization": shown}).status_code == 401
    lines = warnings(server)
    assert set(lines) == {"Credentials from 127.0.0.1 are refused: Unknown name or scheme"}
    assert len(lines) == 1 or worker_count() > 1


@pytest.mark.parametrize("prefix", ["", "Nov 26 04:34:11 host python[77]: "])
def test_fail2ban_finds_the_addresses(start_server: StartServer, tmp_path: Path, prefix: str) -> None:
    """In a file and in the journal; an expired token and a line that an attacker made up ban nobody."""
    server = start_server(
        *("--jwt-secret", SECRET, "--rate-limit", "--trusted-proxies", "127.0.0.1", "--log-level", "DEBUG")
    )
    behind_proxy(server, "203.0.113.1", "wrong")
    behind_proxy(server, "2001:db8::2", "wrong")
    behind_proxy(server, "203.0.113.3", token(exp=1))
    server.get("/status", headers={"Authorization": "Basic eDp5", "X-Forwarded-For": "203.0.113.5"})
    while behind_proxy(server, "203.0.113.4", token(admin=True)) != 429:
        pass
    made_up = "x WARNING Credentials from 192.0.2.1 are refused: Invalid token"
    server.get("/status", headers={"Origin": f"http://{made_up}"})
    server.post({"message": "hi"}, headers=bearer(token(sub=made_up, publish=True)))
    server.stop()
    log = tmp_path / "notifyd.log"
    log.write_text("".join(f"{prefix}{line}\n" for line in server.stderr))
    command = [program("fail2ban-regex"), "-o", "ip", str(log), str(ROOT / "deploy" / "fail2ban.conf")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert set(found.stdout.split()) == {"203.0.113.1", "2001:db8::2", "203.0.113.4", "203.0.113.5"}, (
        found.stdout + found.stderr
    )


def test_at_debug_each_publish_and_connection_is_a_line(start_server: StartServer) -> None:
    """With address, client, and the key's name or the token's subject: quoted, because a subject is any text.

    A refused newcomer has a line, too.
    """
    server = start_server("--jwt-secret", SECRET, "--api-key", f"ci:{KEY}", "--log-level", "DEBUG")
    server.connect(query="client_id=bob", additional_headers=bearer(KEY)).receive()
    server.connect(query="client_id=bob", additional_headers=bearer(KEY)).closed()
    assert server.get("/events?topics=ops", headers=bearer(token(sub="carol"))).status_code == 403
    with server.http.stream("GET", "/events", headers=bearer(token(sub="carol"))):
        server.wait_for_line(r"Client client_\w+ has connected from 127.0.0.1 as 'carol'$")
    sent = server.post({"message": "secret words"}, headers={"X-API-Key": KEY} | {"Idempotency-Key": "once"})
    server.post({"message": "secret words"}, headers={"X-API-Key": KEY} | {"Idempotency-Key": "once"})
    batch = server.request(
        "POST",
        "/notify/batch",
        json=[{"message": "a"}, {"message": "b"}],
        headers=bearer(token(sub="a\u2028b", publish=True)),
    )
    id, last = sent.headers["Notification-Id"], batch.headers["Notification-Id"]
    server.stop()
    for line in (
        "Client bob has connected from 127.0.0.1 as 'ci'",
        "A newcomer from 127.0.0.1 as 'ci' is refused: Client bob is already connected",
        "A newcomer from 127.0.0.1 as 'carol' is refused: Not allowed: topic ops",
        f"Published {id} (1) from 127.0.0.1 as 'ci'",
        f"Repeated {id} (1) from 127.0.0.1 as 'ci'",
        f"Published {last} (2) from 127.0.0.1 as 'a\\u2028b'",
    ):
        assert [logged.partition(" DEBUG ")[2] for logged in server.stderr].count(line) == 1, line
    assert "secret words" not in "".join(server.stderr)


def test_at_debug_each_act_of_an_admin_is_a_line(start_server: StartServer) -> None:
    """With the client or user, the number of clients, and the admin."""
    server = start_server("--jwt-secret", SECRET, "--api-key", f"ci:{KEY}", "--log-level", "DEBUG")
    server.join("bob", additional_headers=bearer(KEY))
    server.join(additional_headers=bearer(token(sub="carol")))
    for method, path, body in (
        ("DELETE", "/clients/bob", {}),
        ("POST", "/users/carol/topics", {"subscribe": ["ops"], "unsubscribe": []}),
        ("DELETE", "/users/carol", {}),
        ("DELETE", "/users/carol", {"revoke": True}),
    ):
        assert server.request(method, path, json=body, headers=bearer(KEY)).status_code == 200
    server.stop()
    assert [act for line in server.stderr if " from 127.0.0.1 as 'ci'" in (act := line.partition(" DEBUG ")[2])] == [
        "Client bob has connected from 127.0.0.1 as 'ci'",
        "Put out client 'bob' (1) from 127.0.0.1 as 'ci'",
        "Changed the topics of user 'carol' (1) from 127.0.0.1 as 'ci'",
        "Put out user 'carol' (1) from 127.0.0.1 as 'ci'",
        "Revoked the tokens of, and put out, user 'carol' (0) from 127.0.0.1 as 'ci'",
    ]


def test_without_authentication_a_line_has_the_address_alone(start_server: StartServer) -> None:
    """The line has no name, and at INFO there is no such line."""
    server, quiet = start_server("--log-level", "DEBUG"), start_server()
    for one in (server, quiet):
        one.join("alice")
        one.notify("hi")
    assert server.wait_for_line("Client alice").endswith(" DEBUG Client alice has connected from 127.0.0.1")
    assert re.search(r" DEBUG Published \S+ \(1\) from 127\.0\.0\.1$", server.wait_for_line("Published"))
    quiet.stop()
    assert not [line for line in quiet.stderr if "alice" in line or "Published" in line]


@pytest.mark.parametrize(
    ("zone", "offset"), [("UTC", "+00:00"), ("Asia/Kolkata", "+05:30"), ("America/Caracas", "-04:00")]
)
def test_times_in_the_log_carry_their_offset(start_server: StartServer, zone: str, offset: str) -> None:
    """A reader in another zone knows the moment (RFC 3339)."""
    server = start_server("--host", "0.0.0.0", variables={"TZ": zone})
    [stamp, *_] = server.wait_for_line("WARNING").split()
    assert stamp.endswith(offset)
    assert abs(datetime.fromisoformat(stamp).timestamp() - time.time()) < PATIENCE
