"""Peers: their addresses, the subscribers whose they are, and warnings about those that are refused.

Owns the form of an address, and the number of warnings: a peer may send any number of bad requests, and invent any
number of names. Knows no request.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import time

logger = logging.getLogger("notifyd.guard")

# The address of a peer on a Unix socket; ASGI has no address for it.
UNIX = "unix"
# No address with its port is longer. So the cache of addresses keeps no invented text of any size.
MAX_ADDRESS_LENGTH = 64
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
WARN_SECONDS = 60.0
MAX_WARNED = 100

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@functools.lru_cache(4096)
def subscriber(address: str, ipv6_prefix: int) -> str:
    """Return the text that stands for the subscriber of an address: itself, or the network that IPv6 gives to each.

    On the link and on the host itself every address is a machine, and behind NAT64 (RFC 6052) an IPv4 subscriber.
    """
    found = parsed(address)
    if isinstance(found, ipaddress.IPv6Address) and found in _NAT64:
        return str(ipaddress.IPv4Address(int(found) & 0xFFFF_FFFF))
    if not isinstance(found, ipaddress.IPv6Address) or found.is_link_local or found.is_loopback:
        return str(found or address)
    return str(ipaddress.IPv6Network((found, ipv6_prefix), strict=False)).removesuffix("/128")


# Called for each request: parsing an address takes about 10 us, finding it here less than 1 us.
@functools.lru_cache(4096)
def parsed(text: str) -> Address | None:
    """Return the address in a text, without its port; None where there is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        # The zone names an interface of this host, and is no part of the address for anybody else.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # A socket for both families reports an IPv4 address in this form.
    return getattr(address, "ipv4_mapped", None) or address


class RefusalLog:
    """A warning for each refused name: once in WARN_SECONDS, and for `most` names in that time."""

    def __init__(self, text: str, most: int = MAX_WARNED) -> None:
        self._text = text
        self._most = most
        # When each name was logged, oldest first.
        self._logged: dict[str, float] = {}

    def warn(self, name: str, *arguments: str) -> None:
        """Log the text with these arguments, unless the name has been logged."""
        now = time.monotonic()
        while self._logged and now - next(iter(self._logged.values())) >= WARN_SECONDS:
            del self._logged[next(iter(self._logged))]
        if name not in self._logged and len(self._logged) < self._most:
            self._logged[name] = now
            logger.warning(self._text, *arguments)
