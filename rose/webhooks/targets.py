"""Where deliveries may go: a public https address, unless the setting `webhook_private_targets` allows others.

A name is looked up when the endpoint is created, and again for each delivery, which then goes to an address that was
checked: a name that leads elsewhere a moment later (DNS rebinding) changes nothing.
"""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv6Network, ip_address

import anyio
import httpx2

from rose.errors import InvalidRequest

MAX_URL = 2048
LOOK_UP_SECONDS = 5.0

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?")
_UNICAST = IPv6Network("2000::/3")
"""All of IPv6 that is given out."""
_IPV4_INSIDE = tuple(map(IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))
"""Networks whose addresses are an IPv4 address in other words: IPv4-mapped, NAT64."""


class BadTarget(InvalidRequest):
    """A webhook cannot go there."""

    default_code = "invalid_webhook_url"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, param="url", hint=hint)


def parse(text: str, *, private: bool) -> httpx2.URL:
    """Return the address of an endpoint; `private`: also plain http is allowed.

    Raises: BadTarget when it is not one of https with a host, or has a user or a fragment.
    """
    if len(text) > MAX_URL:
        raise BadTarget(f"url has {len(text)} characters; at most {MAX_URL} are allowed.")
    try:
        url = httpx2.URL(text)
        host = url.raw_host.decode("ascii")
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise BadTarget(f"url is not a valid address: {error}.") from None
    schemes = ("https", "http") if private else ("https",)
    if url.scheme not in schemes:
        raise BadTarget(
            f"url begins with {url.scheme[:20]!r}; it must begin with {' or '.join(f'{one}://' for one in schemes)}."
        )
    if url.userinfo:
        raise BadTarget("url holds a user or a password; leave them out. The signature says who sends.")
    if url.fragment:
        raise BadTarget("url has a fragment (#…), which is never sent; leave it out.")
    if not (_NAME.fullmatch(host) or _literal(host)):
        raise BadTarget(f"url has no valid host: {host[:80]!r}." if host else "url has no host.")
    if url.port is not None and not 0 < url.port < 65536:
        raise BadTarget(f"url has the port {url.port}; it must be from 1 to 65535.")
    return url


async def addresses(url: httpx2.URL, *, private: bool) -> list[str]:
    """Return the addresses that the host of `url` has now, in the order in which to try them.

    Raises: BadTarget when there is none, or when one of them is not public and `private` is not set.
    """
    host = url.raw_host.decode("ascii")
    try:
        with anyio.fail_after(LOOK_UP_SECONDS):
            found = await anyio.getaddrinfo(host, url.port or 443, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise BadTarget(f"The host {host} could not be looked up within {LOOK_UP_SECONDS:g} s.") from None
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadTarget(f"The host {host} cannot be found: {reason}.") from None
    texts = list(dict.fromkeys(str(address[0]) for *_, address in found))
    for text in texts:
        if not private and not is_public(text):
            raise BadTarget(
                f"The host {host} is {text}, which is not a public address.",
                hint="Whoever runs this ROSE can allow it with the setting webhook_private_targets.",
            )
    return texts


def is_public(text: str) -> bool:
    """Tell whether an IP address is one of the public internet, and so is each IPv4 address that is packed into it."""
    address = ip_address(text)
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    if any(address in network for network in _IPV4_INSIDE):
        return is_public(str(IPv4Address(int(address) & 0xFFFFFFFF)))
    packed = (address.sixtofour, *(address.teredo or ()))
    return address in _UNICAST and address.is_global and all(is_public(str(one)) for one in packed if one is not None)


def _literal(host: str) -> bool:
    try:
        return "%" not in host and bool(ip_address(host))
    except ValueError:
        return False
