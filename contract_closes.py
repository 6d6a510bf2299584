"""The closes of connections by the server: codes, reasons, and whether coming back helps.

Owns the table of docs/protocol.md, section "Closes", for the contract of the messages. The tests compare both with the
code.
"""

from __future__ import annotations

from typing import NamedTuple


class Close(NamedTuple):
    """Closes of one kind, with reasons such as these."""

    code: int
    reasons: tuple[str, ...]
    when: str
    coming_back_helps: str

    @property
    def is_final(self) -> bool:
        """Whether the same client with the same request will never succeed."""
        return self.coming_back_helps.startswith(("no", "with another", "it would replace"))


CLOSES = (
    Close(
        1001,
        ("Server shutting down",),
        "the server is draining and admits nobody, or shutdown_timeout is over",
        "once it is up again",
    ),
    Close(
        1002,
        (
            "Frame is not masked",
            "Reserved bits are set",
            "Compressed data is broken",
            "Unknown opcode",
            "Payload length is not minimal",
            "Control frame is fragmented or too long",
            "There is no message to continue",
            "The message before is not complete",
            "Invalid close code",
        ),
        "the frames break RFC 6455",
        "no",
    ),
    Close(1007, ("Text is not valid UTF-8",), "a text frame or a close reason is not UTF-8", "no"),
    Close(1008, ("Connection limit exceeded: 1000/1000",), "`max_connections` clients are connected", "later"),
    Close(
        1008,
        ("Connection limit exceeded for this address: 10/10",),
        (
            "the address has `max_connections_per_ip` clients: for streams, and under a server that "
            "cannot answer a handshake with 429"
        ),
        "later",
    ),
    Close(
        1008,
        ("Connection limit exceeded for this user: 5/5",),
        "the user has `max_connections_per_user` clients",
        "later",
    ),
    Close(
        1008, ("Client my_client_123 is already connected",), "another client has the client_id, and is alive", "later"
    ),
    Close(1008, ("Invalid client_id",), "the client_id is malformed", "no"),
    Close(1008, ("Invalid user",), "the user is malformed", "no"),
    Close(1008, ("Invalid since",), "`since` is neither a UUID nor `acked`", "no"),
    Close(
        1008,
        ("Invalid topics: topics[0]: expected string of length >= 1",),
        "a topic is malformed, or there are too many",
        "no",
    ),
    Close(1008, ("Query: more than 100 parameters",), "the URL has more", "no"),
    Close(1008, ("Query: not valid UTF-8",), "percent-encoded bytes of a name or value in the URL are not UTF-8", "no"),
    Close(
        1008,
        ("Query: a % without two hex digits; %25 is a percent sign",),
        "a percent sign in the URL encodes nothing",
        "no",
    ),
    Close(1008, ("Unknown parameter: topic",), "the URL has a parameter that the route does not know", "no"),
    Close(1008, ("Authentication required",), "the server asks for tokens, and the client has none", "no"),
    Close(
        1008,
        ("Invalid token",),
        "the token or key is unknown, also to the newest keys of `--jwks-url`, or not valid yet",
        "with another",
    ),
    Close(1008, ("Token expired",), "its `exp` has passed, now or before", "with another"),
    Close(
        1008,
        ("Not allowed: user", "Not allowed: client_id must be alice or begin with alice:", "Not allowed: topic builds"),
        "the token does not allow the user, the client_id or a topic of the URL",
        "with another",
    ),
    Close(
        1008,
        ("Replaced by a new connection",),
        ("a newcomer has the client_id now: with `--on-duplicate replace`, or because this was a stream"),
        "it would replace the newcomer; a browser's stream stays away",
    ),
    Close(
        1008,
        ("Token revoked",),
        "an admin has revoked the user's tokens, now or before",
        "with another, issued since",
    ),
    Close(
        1008,
        ("Disconnected",),
        "an admin has put the client out, maybe with another reason",
        "no; a browser's stream stays away by itself",
    ),
    Close(
        1008,
        ("Message rate exceeded",),
        "the client sent more than 50 messages a second over 2 seconds, apart from publishes and new acknowledgements",
        "yes, slower",
    ),
    Close(
        1008,
        ("Slow consumer: 1000 notifications behind; resume with since=019c13b5-7a00-7c3e-9d27-6f4b1e0a8c52",),
        "the log has let go of part of the client's backlog",
        "yes, with that `since`",
    ),
    Close(1008, ("Slow consumer: answers are not read",), "the client asks but does not read the answers", "yes"),
    Close(1009, ("Message is larger than 65536 bytes",), "a message is over `max_message_size`", "no"),
    Close(
        1011,
        ("Ping timeout",),
        "the client was silent for `ping_timeout` seconds, or when a newcomer claimed its client_id",
        "yes",
    ),
    Close(1013, ("Try again later",), "the store is away: for newcomers", "yes, later"),
    Close(
        1013,
        ("The keys for tokens cannot be fetched", "Too many tokens wait for new keys"),
        "the token cannot be checked now",
        "yes, later",
    ),
    Close(
        1013,
        ("Notifications are missing; connect again and resume",),
        (
            "the store no longer has everything that the process missed, as it stood still for too "
            "long, or continues another history after a failover"
        ),
        "yes, with `since`",
    ),
)
