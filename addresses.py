"""Whose request it is: the address of the peer, or the one that trusted proxies name (X-Forwarded-For).

Each proxy appends the address that it was reached from, so the list is read from the right, and no further than past
trusted hops: what stands left of the first address that is nobody's proxy may be anybody's invention.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Collection, Iterable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

UNIX = "unix"
# No address with its port is longer; so what is remembered of made-up ones is little.
MAX_LENGTH = 64


class Proxies:
    """The trusted ones: addresses, networks, and UNIX for whoever comes through a Unix socket."""

    def __init__(self, trusted: Collection[str]) -> None:
        self._networks = [ipaddress.ip_network(text) for text in trusted if text != UNIX]
        self._trusts_unix = UNIX in trusted

    def address_of(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Return whom a request is from; `peer` is the other end of the connection, UNIX for one without address."""
        address = _read(peer)
        if not (self._trusts(address) if address else peer == UNIX and self._trusts_unix):
            return str(address or peer)
        hops = b",".join(value for name, value in headers if name == b"x-forwarded-for").decode("latin-1").split(",")
        # A proxy that names no address (RFC 7239 calls it obfuscated) is itself as far as anybody knows.
        while hops and (hop := _read(hops.pop().strip()[:MAX_LENGTH])) is not None:
            address = hop
            if not self._trusts(hop):
                break
        return str(address or peer)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


# Asked for each request: to read an address takes some 10 us, to find it again less than one.
@functools.lru_cache(4096)
def _read(text: str) -> Address | None:
    """Return the address in a text, which may have a port; None where there is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        # The zone says which of this host's interfaces it is on, and is no part of the address elsewhere.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # What a socket for both families calls an IPv4 address.
    return getattr(address, "ipv4_mapped", None) or address
