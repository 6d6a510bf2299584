"""The keys of tokens: their kinds and sources, their change, and the failure to fetch them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from bytes import handshake
from conftest import StartServer
from credentials import SECRET, bearer, token, unsigned
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from expected import http_error, parse
from processes import Server, eventually
from ws_clients import PATIENCE

import guard_tokens as tokens
from errors import KeysUnavailable, Unauthorized
from guard_identity import Identity
from guard_tokens import FRESH_SECONDS, KEPT_SECONDS, MAX_TRIED, PAUSE_SECONDS, KeySet, Tokens
from settings import VERSION

RSA, OTHER_RSA = (rsa.generate_private_key(65537, 2048) for _ in range(2))
KINDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "RSA": (RSA, ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")),
    "P-256": (ec.generate_private_key(ec.SECP256R1()), ("ES256",)),
    "P-384": (ec.generate_private_key(ec.SECP384R1()), ("ES384",)),
    "Ed25519": (ed25519.Ed25519PrivateKey.generate(), ("EdDSA",)),
}


def pem(key: Any) -> str:
    return str(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def hmac_with(secret: str, **claims: Any) -> str:
    """A token signed with any text as the secret: PyJWT itself refuses a public key here."""
    import hashlib
    import hmac

    start = unsigned({"alg": "HS256"}, claims).rpartition(".")[0]
    signature = hmac.digest(secret.encode(), start.encode(), hashlib.sha256)
    return f"{start}.{jwt.utils.base64url_encode(signature).decode()}"


def status(server: Server, shown: str) -> int:
    """The status of the answer to an admin with this token."""
    return server.get("/status", headers=bearer(shown)).status_code


# A public key in a file.


@pytest.mark.parametrize("kind", KINDS)
def test_a_public_key_proves_tokens_of_its_kind(start_server: StartServer, tmp_path: Path, kind: str) -> None:
    """A public key proves tokens in every algorithm of its kind and in no other; as an HMAC secret it proves none."""
    key, algorithms = KINDS[kind]
    path = tmp_path / "public.pem"
    path.write_text(pem(key))
    server = start_server("--jwt-public-key", str(path))
    assert {status(server, token(key, algorithm, admin=True)) for algorithm in algorithms} == {200}
    others = [token(other, names[0], admin=True) for name, (other, names) in KINDS.items() if name != kind]
    confused = [hmac_with(pem(key), admin=True), hmac_with(pem(key).strip(), admin=True), unsigned({"alg": "none"})]
    assert {status(server, one) for one in [*others, *confused, token(admin=True)]} == {401}


def test_algorithms_can_be_pinned(start_server: StartServer, tmp_path: Path) -> None:
    """Fewer than the kind of key allows; never one of another kind."""
    path = tmp_path / "public.pem"
    path.write_text(pem(RSA))
    server = start_server(
        "--jwt-public-key", str(path), "--jwt-algorithms", "PS256, RS512", "--jwt-algorithms", "HS256"
    )
    assert [status(server, token(RSA, name, admin=True)) for name in ("PS256", "RS512", "RS256")] == [200, 200, 401]
    assert status(server, hmac_with(pem(RSA), admin=True)) == 401


def test_a_secret_proves_no_public_key(start_server: StartServer) -> None:
    """With a secret only HMAC counts, each as far as the secret is long enough for it (RFC 7518, section 3.2)."""
    secret = SECRET + "!" * (48 - len(SECRET))
    server = start_server("--jwt-secret", secret)
    assert [status(server, token(secret, name, admin=True)) for name in ("HS256", "HS384")] == [200, 200]
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        assert status(server, token(secret, "HS512", admin=True)) == 401
    assert status(server, token(RSA, "RS256", admin=True)) == 401


def test_audience_and_issuer_must_be_ours(start_server: StartServer) -> None:
    """Each of them, where they are set; the audience may be one of several."""
    server = start_server("--jwt-secret", SECRET, "--jwt-audience", "notifyd", "--jwt-issuer", "https://login.example")
    good = {"aud": "notifyd", "iss": "https://login.example", "admin": True}
    assert status(server, token(**good)) == 200
    assert status(server, token(**good | {"aud": ["other", "notifyd"]})) == 200
    for wrong in ({"aud": None}, {"iss": None}, {"aud": "other"}, {"iss": "https://evil.example"}, {"aud": []}):
        assert status(server, token(**good | wrong)) == 401


# Keys from a URL.


class Issuer:
    """An identity provider that publishes its keys, unless it is away."""

    def __init__(self) -> None:
        self.document: Any = {"keys": []}
        # The answer in place of keys.
        self.parts: Iterable[bytes] = ()
        # Where else the keys are.
        self.location = ""
        self.away = False
        self.asked = 0
        # The headers of the last request.
        self.headers: dict[str, str] = {}
        self.answers = threading.Event()
        self.answers.set()
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                issuer.headers = dict(self.headers)
                issuer.answers.wait(10)
                self.send_response(500 if issuer.away else 302 if issuer.location else 200)
                if issuer.location:
                    self.send_header("Location", issuer.location)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for part in issuer.parts or (json.dumps(issuer.document).encode(),):
                        self.wfile.write(part)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks"

    def publish(self, *keys: dict[str, Any]) -> None:
        self.document = {"keys": list(keys)}


@contextlib.contextmanager
def issuer_of_keys() -> Iterator[Issuer]:
    one = Issuer()
    yield one
    one.answers.set()
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuer_of_keys() as one:
        yield one


def jwk(kid: str | None, kind: str = "RSA", **fields: Any) -> dict[str, Any]:
    key = KINDS[kind][0].public_key()
    [algorithm, *_] = KINDS[kind][1]
    named = {} if kid is None else {"kid": kid}
    return jwt.get_algorithm_by_name(algorithm).to_jwk(key, as_dict=True) | named | fields


def from_issuer(kid: str | None, kind: str = "RSA", algorithm: str = "", **claims: Any) -> str:
    """A token that names its key."""
    key, algorithms = KINDS[kind]
    headers = None if kid is None else {"kid": kid}
    return token(key, algorithm or algorithms[0], headers, **{"admin": True} | claims)


def test_keys_come_from_a_url(start_server: StartServer, issuer: Issuer) -> None:
    """Keys of several kinds at once; each proves only tokens of its kind and purpose."""
    secret = {"kty": "oct", "kid": "oct", "k": jwt.utils.base64url_encode(SECRET.encode()).decode(), "alg": "HS256"}
    encrypting, pinned = jwk("enc", use="enc"), jwk("pinned", alg="RS512")
    unreadable = [
        {"kty": "?"},
        {"kty": "oct"},
        jwk("none", alg="none"),
        jwk("list", alg=[1]),
        {"kty": "RSA"},
        "key",
        None,
    ]
    issuer.publish(jwk("r1"), jwk("e1", "P-256"), encrypting, pinned, secret, *unreadable, jwk("odd", "Ed25519"))
    server = start_server("--jwks-url", issuer.url, constants={"guard_tokens.PAUSE_SECONDS": 0.05})
    good = [from_issuer("r1"), from_issuer("e1", "P-256"), from_issuer("pinned", algorithm="RS512"), from_issuer(None)]
    assert {status(server, one) for one in [*good, from_issuer("odd", "Ed25519")]} == {200}
    assert issuer.asked == 1
    bad = [from_issuer("e1"), from_issuer("enc"), from_issuer("pinned")]
    assert {status(server, one) for one in [*bad, token(headers={"kid": "oct"}, admin=True)]} == {401}
    assert server.connect(query=f"token={from_issuer('r1', sub='alice')}").receive()["user"] == "alice"


def test_algorithms_of_fetched_keys_can_be_pinned(start_server: StartServer, issuer: Issuer) -> None:
    """Algorithms of fetched keys are pinned as those of a file; a key without an algorithm left proves nothing."""
    issuer.publish(jwk("r1"), jwk("e1", "P-256"))
    server = start_server("--jwks-url", issuer.url, "--jwt-algorithms", "RS512")
    assert status(server, from_issuer("r1", algorithm="RS512")) == 200
    assert {status(server, from_issuer("r1")), status(server, from_issuer("e1", "P-256"))} == {401}


def test_keys_that_cannot_be_fetched_are_503(start_server: StartServer, issuer: Issuer) -> None:
    """Nobody can be told from anybody then; it is worth trying again, over HTTP and on a WebSocket."""
    issuer.away = True
    server = start_server("--jwks-url", issuer.url, "--api-key", "ci:secret")
    refused = server.get("/status", headers=bearer(from_issuer("r1")))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert parse(refused.content) == http_error("system", "The keys for tokens cannot be fetched")
    closed = server.connect(query=f"token={from_issuer('r1')}").closed()
    assert closed == (1013, "The keys for tokens cannot be fetched")
    assert issuer.asked == 1, "nobody waits for the end of the pause after a failure"
    assert server.get("/status", headers={"X-API-Key": "secret"}).status_code == 200


def test_a_slow_issuer_does_not_delay_other_requests(start_server: StartServer, issuer: Issuer) -> None:
    """The event loop goes on while a thread waits for the keys; all requests that wait share one fetch."""
    issuer.publish(jwk("r1"))
    issuer.answers.clear()
    server = start_server("--jwks-url", issuer.url)
    waiting = [server.raw(handshake(f"/ws?token={from_issuer('r1')}")) for _ in range(5)]
    eventually(lambda: issuer.asked == 1)
    began = time.monotonic()
    assert server.get("/health").status_code == 200
    assert time.monotonic() - began < tokens.FETCH_SECONDS - 1
    issuer.answers.set()
    assert all(one.recv(12) == b"HTTP/1.1 101" for one in waiting)
    assert issuer.asked == 1


class Source:
    """A key set on a clock of its own, with fetches that are counted and may fail."""

    def __init__(self, *kids: str | None) -> None:
        self.now, self.fetches, self.away = 0.0, 0, False
        self.document = [jwk(kid) for kid in kids]
        self.keys = KeySet(self.fetch, clock=lambda: self.now)
        self.tokens = Tokens(self.keys.find)

    def fetch(self) -> bytes:
        self.fetches += 1
        if self.away:
            raise OSError("away")
        return json.dumps({"keys": self.document}).encode()

    def proves(self, shown: str) -> bool | type[Exception]:
        """Return whether the keys prove the token, or the exception raised instead."""

        async def prove() -> bool:
            identity = await self.tokens.identity(shown)
            if self.keys._asking is not None:
                await self.keys._asking
            return identity.admin

        try:
            return asyncio.run(prove())
        except (KeysUnavailable, Unauthorized) as error:
            return type(error)

    def finds(self, kid: str | None) -> bool | type[Exception]:
        """Return whether a token with this key id is proven, or the exception raised instead."""
        return self.proves(from_issuer(kid))


def test_keys_are_kept_for_minutes() -> None:
    """A token with a known key causes no fetch."""
    source = Source("one")
    for source.now in (0, 1, FRESH_SECONDS - 1):
        assert source.finds("one") is True
    assert source.fetches == 1


def test_a_new_key_is_fetched_when_it_is_used() -> None:
    """An unknown key sets off a fetch at once where the last is long ago."""
    source = Source("old")
    assert source.finds("old") is True
    source.document, source.now = [jwk("old"), jwk("new")], PAUSE_SECONDS
    assert source.finds("new") is True
    assert source.finds("made up") is Unauthorized
    assert source.fetches == 2


def test_keys_that_are_gone_prove_nothing_any_more() -> None:
    """A key that the issuer has withdrawn is fetched away within minutes, without anybody waiting."""
    source = Source("old")
    assert source.finds("old") is True
    source.document, source.now = [jwk("new")], FRESH_SECONDS + 1
    assert source.finds("old") is True  # This one still; it has set off the fetch.
    assert source.finds("old") is Unauthorized


def test_old_keys_serve_on_while_the_issuer_is_away() -> None:
    """For an hour; then nobody knows whether they still hold. An unknown one may be good."""
    source = Source("old")
    assert source.finds("old") is True
    source.away, source.now = True, KEPT_SECONDS - 1
    assert source.finds("old") is True
    assert source.finds("new") is KeysUnavailable
    source.now = KEPT_SECONDS + PAUSE_SECONDS + 1
    assert source.finds("old") is KeysUnavailable
    source.away = False
    source.now += PAUSE_SECONDS
    assert source.finds("old") is True


# A set is a list.


def other_jwk(kid: str | None, **fields: Any) -> dict[str, Any]:
    """The public half of a key that signs no token here."""
    named = {} if kid is None else {"kid": kid}
    return jwt.get_algorithm_by_name("RS256").to_jwk(OTHER_RSA.public_key(), as_dict=True) | named | fields


@pytest.mark.parametrize(
    "document",
    [
        [jwk("a", "P-256"), jwk("a", "Ed25519"), jwk("a")],
        [jwk("a"), jwk("a", "P-256")],
        [jwk("a", alg="RS512"), jwk("a", alg="RS256"), jwk("a", alg="PS256")],
        [other_jwk("a"), jwk("a"), other_jwk("a")],
        [jwk(None)],
        [jwk("")],
        [other_jwk(None), jwk(None), jwk(None, "P-256")],
        [other_jwk("b"), jwk(None)],
        [other_jwk("a"), jwk(None)],
        [jwk("a", alg=None)],
        [jwk("a", key_ops=["verify"])],
        [*[jwk("a", "P-256")] * MAX_TRIED, jwk("a")],
    ],
)
def test_each_key_that_could_have_signed_is_tried(document: list[dict[str, Any]]) -> None:
    """Keys may share an id, for several kinds and algorithms, or have none, while the token names an id."""
    source = Source()
    source.document = document
    assert source.finds("a") is True
    assert source.fetches == 1


@pytest.mark.parametrize("document", [[other_jwk("a"), jwk("b"), jwk("c", "P-256")], [other_jwk(None), jwk(None)]])
def test_a_token_without_a_key_id_may_be_signed_by_any_key(document: list[dict[str, Any]]) -> None:
    """The algorithm alone limits the keys then."""
    source = Source()
    source.document = document
    assert source.finds(None) is source.finds("") is True
    assert source.proves(from_issuer(None, "Ed25519")) is Unauthorized


@pytest.mark.parametrize(
    "document",
    [
        [jwk("a", alg="RS512"), jwk("a", "P-256")],
        [other_jwk("a"), jwk("b")],
        [jwk("a", use="enc"), jwk("b")],
        [jwk("a", key_ops=["encrypt"]), jwk("b")],
        [jwk(None, alg="PS256"), jwk("a", "P-256")],
    ],
)
def test_a_key_for_another_id_algorithm_or_use_proves_nothing(document: list[dict[str, Any]]) -> None:
    """The algorithms stay pinned by key, however many keys share an id."""
    source = Source()
    source.document = document
    assert source.finds("a") is Unauthorized
    assert source.fetches == 1


def test_few_keys_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of thousands must not cost thousands of checks for each bad token."""
    tried = []
    decode = jwt.PyJWT.decode
    monkeypatch.setattr(jwt.PyJWT, "decode", lambda *one, **named: tried.append(one) or decode(*one, **named))
    source = Source()
    source.document = [other_jwk(None)] * 1000 + [jwk("a")]
    assert source.finds("a") is True
    assert len(tried) == 1, "the key with the id comes first"
    assert source.finds("b") is Unauthorized
    assert len(tried) == 1 + MAX_TRIED


# A key that is newer than the last fetch.


def rotated(server: Server, issuer: Issuer) -> str:
    """A token of a key that comes into use right after a fetch."""
    assert status(server, from_issuer("r1")) == 200
    issuer.publish(jwk("r1"), jwk("e1", "P-256"))
    return from_issuer("e1", "P-256", sub="alice")


def test_a_token_of_a_new_key_waits_for_the_next_fetch(start_server: StartServer, issuer: Issuer) -> None:
    """On every way in, within the pause between two fetches, and among them a renewal on a WebSocket."""
    issuer.publish(jwk("r1"))
    began = time.monotonic()
    server = start_server("--jwks-url", issuer.url, constants={"guard_tokens.PAUSE_SECONDS": 1.5})
    held = from_issuer("r1", sub="alice")
    client = server.connect(additional_headers=bearer(held))
    assert client.receive()["type"] == "welcome"
    new = rotated(server, issuer)
    client.send({"type": "auth", "token": new})
    with ThreadPoolExecutor() as pool:
        ways = [
            pool.submit(server.get, "/status", headers=bearer(new)),
            pool.submit(server.post, {"message": "hi"}, headers=bearer(from_issuer("e1", "P-256", publish=True))),
            pool.submit(server.get, f"/events?token={from_issuer('nobody')}"),
            pool.submit(lambda: server.connect(query=f"token={from_issuer('e1', 'P-256', sub='bob')}").receive()),
        ]
        assert [way.result().status_code for way in ways[:3]] == [200, 200, 401]
        assert ways[3].result()["user"] == "bob"
    assert {client.receive()["type"], client.receive()["type"]} == {"authenticated", "custom"}
    assert server.connect(query=f"token={from_issuer('nobody')}").closed() == (1008, "Invalid token")
    assert issuer.asked <= 1 + (time.monotonic() - began) / 1.5, "no more often than the pause allows"


def test_a_token_of_a_new_key_is_not_refused_while_the_issuer_is_away(
    start_server: StartServer, issuer: Issuer
) -> None:
    """The fetch that it waits for fails: nobody knows its key, and coming back helps."""
    issuer.publish(jwk("r1"))
    server = start_server("--jwks-url", issuer.url, constants={"guard_tokens.PAUSE_SECONDS": 0.5})
    new = rotated(server, issuer)
    issuer.away = True
    assert server.get("/status", headers=bearer(new)).status_code == 503
    assert server.get("/events", headers=bearer(new)).status_code == 503
    assert server.connect(query=f"token={new}").closed() == (1013, "The keys for tokens cannot be fetched")
    issuer.away = False
    eventually(lambda: status(server, new) == 200)


@pytest.mark.parametrize("kid", [None, "a"])
def test_a_new_key_may_have_no_id(kid: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the keys at hand do not prove the token, and the next ones do."""
    monkeypatch.setattr(tokens, "PAUSE_SECONDS", 0.01)
    source = Source()
    source.document = [other_jwk(None)]
    assert source.proves(token(OTHER_RSA, "RS256", admin=True)) is True
    source.document = [jwk(None)]
    source.now += 0.001
    assert source.finds(kid) is True
    source.now += 0.001
    assert source.proves(token(OTHER_RSA, "RS256", {"kid": kid} if kid else None, admin=True)) is Unauthorized
    assert source.fetches == 3


def test_a_key_may_be_replaced_under_its_id(start_server: StartServer, issuer: Issuer) -> None:
    """A key id proves nothing about the age of its key, so such a token waits for the next fetch as well."""
    issuer.publish(other_jwk("a"))
    server = start_server("--jwks-url", issuer.url, constants={"guard_tokens.PAUSE_SECONDS": 1})
    assert status(server, token(OTHER_RSA, "RS256", {"kid": "a"}, admin=True)) == 200
    issuer.publish(jwk("a"))
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(status, server, from_issuer("a"))
        client = server.connect(query=f"token={from_issuer('a', sub='alice')}")
        assert (client.receive()["user"], stream.result()) == ("alice", 200)
    assert status(server, token(OTHER_RSA, "RS256", {"kid": "a"}, admin=True)) == 401
    issuer.away = True
    assert server.connect(query=f"token={from_issuer('b')}").closed()[0] == 1013


def test_tokens_that_wait_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fetch only new keys are tried, and so many tokens wait for it at most; the others may come again."""
    monkeypatch.setattr(tokens, "PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(tokens, "MAX_WAITING", 3)
    tried = []
    decode = jwt.PyJWT.decode
    monkeypatch.setattr(jwt.PyJWT, "decode", lambda *one, **named: tried.append(one) or decode(*one, **named))
    source = Source()
    source.document = [other_jwk("a"), other_jwk(None)]

    async def show_five() -> list[type[object]]:
        await source.tokens.identity(token(OTHER_RSA, "RS256", {"kid": "a"}))
        source.now += 0.001
        shown = [source.tokens.identity(from_issuer("a")) for _ in range(5)]
        return [type(found) for found in await asyncio.gather(*shown, return_exceptions=True)]

    for _ in range(2):
        assert sorted(map(str, asyncio.run(show_five()))) == [str(KeysUnavailable)] * 2 + [str(Unauthorized)] * 3
    assert (source.fetches, len(tried)) == (3, 2 * (1 + 5 * 2))


def test_two_fetches_are_a_pause_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many made-up tokens come."""
    monkeypatch.setattr(tokens, "PAUSE_SECONDS", 0.2)
    source, times = Source("a"), list[float]()
    keys = KeySet(lambda: times.append(time.monotonic()) or source.fetch())

    async def show_made_up_tokens() -> None:
        for _ in range(3):
            with pytest.raises(Unauthorized):
                await Tokens(keys.find).identity(from_issuer("made up"))

    asyncio.run(show_made_up_tokens())
    assert len(times) == 3
    assert all(later - earlier >= 0.2 for earlier, later in itertools.pairwise(times))


def test_an_algorithm_that_no_key_can_have_waits_for_no_fetch() -> None:
    """A secret, and no signature at all."""
    source = Source("a")
    assert source.finds("a") is True
    source.now += 1
    for hopeless in (token(headers={"kid": "b"}), unsigned({"alg": "none", "kid": "b"}), unsigned({"kid": "b"})):
        assert source.proves(hopeless) is Unauthorized
    assert source.fetches == 1


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"x", b'{"keys": []}', b'{"keys": 5}', b'{"keys": [5, null, {}, {"kty": "RSA"}]}', b"[" * 100_000],
)
def test_a_document_without_keys_changes_nothing(document: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It counts as a failure: the keys of before serve on, and the log says it."""
    source = Source("old")
    assert source.finds("old") is True
    source.keys._fetch = lambda: document
    source.now = FRESH_SECONDS + 1
    with caplog.at_level(logging.WARNING):
        assert source.finds("old") is True
        assert source.finds("old") is True
    assert caplog.messages[0].startswith("The keys for tokens cannot be fetched")


def test_keys_are_read_by_the_thread_that_fetched_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read thousands of them takes a second, and the event loop has other things to do."""
    readers = []
    monkeypatch.setattr(
        jwt, "PyJWK", lambda key, read=jwt.PyJWK: readers.append(threading.current_thread()) or read(key)
    )
    assert Source("one", "two").finds("one") is True
    assert len(readers) == 2 and threading.current_thread() not in readers


def test_keys_without_end_are_not_read_to_the_end(issuer: Issuer) -> None:
    """The size of the keys is limited, even if the issuer sends without end."""
    issuer.parts = itertools.repeat(b"[" * 65_536)
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        tokens._fetch(issuer.url)


def test_keys_that_trickle_in_keep_no_thread(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An issuer that sends a byte now and then is given up on, by the thread as well as by the requests."""
    monkeypatch.setattr(tokens, "FETCH_SECONDS", 0.3)
    issuer.parts = (time.sleep(0.05) or b" " for _ in range(200))
    with pytest.raises(TimeoutError, match="not complete"):
        tokens._fetch(issuer.url)


@pytest.fixture
def private_ca(issuer: Issuer, tmp_path: Path) -> Path:
    """The certificate of a private CA, whose servers the issuer is now one of."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    ca, certificate = tmp_path / "ca.pem", tmp_path / "certificate.pem"
    new = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {0}.key -out {0} -subj /CN={0.stem}"
    leaf = f"{new} -CA {ca} -CAkey {ca}.key -addext basicConstraints=CA:FALSE -addext subjectAltName=IP:127.0.0.1"
    for command in (new.format(ca), leaf.format(certificate)):
        subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, f"{certificate}.key")
    issuer.server.socket = context.wrap_socket(issuer.server.socket, server_side=True)
    issuer.url = issuer.url.replace("http:", "https:")
    return ca


def test_https_is_redirected_to_nothing_else(issuer: Issuer, private_ca: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an attacker on the network path could send keys of his own."""
    monkeypatch.setenv("SSL_CERT_FILE", str(private_ca))
    with issuer_of_keys() as elsewhere:
        assert json.loads(tokens._fetch(issuer.url)) == {"keys": []}
        issuer.location = elsewhere.url
        with pytest.raises(ValueError, match="redirected"):
            tokens._fetch(issuer.url)
        assert elsewhere.asked == 0


def test_keys_come_from_a_server_of_a_private_ca(start_server: StartServer, issuer: Issuer, private_ca: Path) -> None:
    """SSL_CERT_FILE names its certificate; without that the log names the reason."""
    issuer.publish(jwk("r1"))
    server = start_server("--jwks-url", issuer.url, variables={"SSL_CERT_FILE": str(private_ca)})
    assert status(server, from_issuer("r1")) == 200
    stranger = start_server("--jwks-url", issuer.url)
    assert status(stranger, from_issuer("r1")) == 503
    assert "CERTIFICATE_VERIFY_FAILED" in stranger.wait_for_line("keys for tokens cannot be fetched")


def test_the_fetch_names_itself(issuer: Issuer) -> None:
    """Firewalls refuse the name of a mere library; a redirect keeps the name."""
    with issuer_of_keys() as elsewhere:
        issuer.location = elsewhere.url
        tokens._fetch(issuer.url)
        for asked in (issuer, elsewhere):
            assert (asked.headers["User-Agent"], asked.headers["Accept"]) == (f"notifyd/{VERSION}", "application/json")


def held_up(source: Source) -> threading.Event:
    """Let the source's fetches wait for an event, and return it."""
    released, fetch = threading.Event(), source.fetch

    def wait() -> bytes:
        released.wait(PATIENCE)
        return fetch()

    source.keys._fetch = wait
    return released


def test_a_fetch_takes_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """An issuer that does not answer is given up on."""
    monkeypatch.setattr(tokens, "FETCH_SECONDS", 0.05)
    source = Source("one")
    released = held_up(source)

    async def give_up() -> None:
        try:
            with pytest.raises(KeysUnavailable):
                await asyncio.wait_for(source.tokens.identity(from_issuer("one")), PATIENCE / 2)
        finally:
            released.set()

    asyncio.run(give_up())


def test_a_request_that_stops_waiting_does_not_cancel_the_fetch() -> None:
    """The fetch is for all requests that wait, even when the first one has gone."""
    source = Source("one")
    released = held_up(source)

    async def wait() -> Identity:
        first, second = (asyncio.ensure_future(source.tokens.identity(from_issuer("one"))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        released.set()
        return await second

    assert asyncio.run(wait()).admin
    assert source.fetches == 1
