"""Pictures at addresses that the operator allows: one parser, one look-up, and only what was looked up is dialled.

    address --read_address--> scheme, host, port, target --look up--> addresses, all public --> dial the first

A name that is allowed may still resolve to this machine or its network, at once or at a second look-up. So the answer
of the look-up that is checked is the one that is dialled (`_Dialler`), for the name's own Host and certificate.
`httpcore` speaks HTTP: it follows no redirects, reads no proxies and passwords from the environment, and takes a
network backend, which is where a name becomes a connection.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpcore

from vl2_jax.errors import ImageError, RequestError, shown
from vl2_jax.processing.sources import format_of
from vl2_jax.serving.http.conversations import Sent
from vl2_jax.serving.http.problems import Problem

MOST_BYTES = 20 << 20
_CONNECT_SECONDS, _READ_SECONDS, _ALL_SECONDS = 3.0, 5.0, 10.0
_AT_ONCE = 16  # fetches of all requests
_PORTS = {"http": 80, "https": 443}
_ADDRESS = re.compile(r"(?i:https?)://[!-\[\]-~]+")  # visible ASCII without a backslash, which parsers read in two ways
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")
_TUNNELS = tuple(  # of IPv6, whose addresses hold one of IPv4: NAT64, 6to4, Teredo
    ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")
)

_FAILURES = (OSError, UnicodeError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException)

Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True)
class Address:
    """An address, taken apart once: what is checked is what is asked for."""

    scheme: str
    host: str
    port: int
    target: str


def read_address(text: str, allowed: Collection[str]) -> Address:
    """The parts of an address that may be fetched.

    Raises:
      Problem: status 400; it is none of http or https on its own port, has a user's name, or its host is not allowed.
    """
    if not allowed:
        raise _refused(
            f"{shown(text)} is not fetched by this server; send the picture itself: data:image/png;base64,..."
        )
    try:
        parts = urlsplit(text) if _ADDRESS.fullmatch(text) else None
        port = parts.port if parts else None
    except ValueError:  # a port that is no number, brackets that are not closed
        parts = None
    if parts is None or parts.hostname is None or "@" in parts.netloc or not _HOST.fullmatch(parts.hostname):
        raise _refused(
            f"{shown(text)} is no address of a picture; send https://HOST/PATH, or data:image/png;base64,..."
        )
    if port not in (None, _PORTS[parts.scheme]):
        raise _refused(f"{shown(text)} has the port {port}; pictures are fetched from ports 80 and 443 alone.")
    if parts.hostname not in allowed:
        raise _refused(f"pictures of {shown(parts.hostname)} are not fetched by this server; send the picture itself.")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.scheme, parts.hostname, _PORTS[parts.scheme], target)


def check_domain(name: str) -> None:
    """Raises RequestError for what is no name of a host."""
    if not _HOST.fullmatch(name):
        raise RequestError(
            f"--allowed-media-domains is {shown(name)}; expected the name of a host: images.example.org."
        )


def _refused(message: str) -> Problem:
    return Problem(400, message, param="messages", code="invalid_image_url")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not of this machine, its networks, or a tunnel to them."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # with a zone, which only local addresses have
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if any(found in network for network in _TUNNELS):
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


async def look_up(host: str, port: int) -> list[str]:
    """The IP addresses of a name, as this machine resolves it."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass
class Fetcher:
    """Fetches pictures of `allowed` hosts.

    Attributes:
      allowed: names of hosts, in small letters.
      resolve: name and port to IP addresses.
      network: what dials an IP address.
    """

    allowed: frozenset[str]
    resolve: Resolve = look_up
    network: httpcore.AsyncNetworkBackend = field(default_factory=httpcore.AnyIOBackend)

    def __post_init__(self) -> None:
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def files(self, pictures: Sequence[Sent]) -> list[bytes]:
        """The files of a conversation's pictures, those at addresses fetched at once; raises as `fetch`."""
        return await asyncio.gather(*map(self._file, pictures))

    async def _file(self, picture: Sent) -> bytes:
        return await self.fetch(picture.address) if picture.address else picture.data

    async def fetch(self, text: str) -> bytes:
        """The picture at an address.

        Raises:
          Problem: it may not be fetched, see `read_address`.
          ImageError: it cannot be had, is no picture, or is too large or too slow.
        """
        address = read_address(text, self.allowed)
        try:
            async with asyncio.timeout(_ALL_SECONDS), self._room:
                data = await self._get(address)
        except _FAILURES as error:
            raise _unfetched(text) from error
        if not format_of(data):
            raise ImageError(f"{shown(text)} holds no picture; send one in the request.")
        return data

    async def _get(self, address: Address) -> bytes:
        url = httpcore.URL(
            scheme=address.scheme.encode(), host=address.host.encode(), port=None, target=address.target.encode()
        )
        headers: dict[str | bytes, str | bytes] = {
            "Host": address.host,
            "User-Agent": "vl2-jax",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        }
        seconds = {"connect": _CONNECT_SECONDS, "read": _READ_SECONDS, "write": _READ_SECONDS, "pool": _READ_SECONDS}
        async with (
            httpcore.AsyncConnectionPool(network_backend=_Dialler(self.resolve, self.network)) as pool,
            pool.stream("GET", url, headers=headers, extensions={"timeout": seconds}) as answer,
        ):
            if answer.status != 200 or _header(answer, b"content-encoding") not in (b"", b"identity"):
                raise ConnectionError(f"status {answer.status}")
            kind = _header(answer, b"content-type").lower()
            if kind and not kind.startswith((b"image/", b"application/octet-stream", b"binary/octet-stream")):
                raise ConnectionError("no picture")
            data = bytearray()
            async for piece in answer.aiter_stream():
                data += piece
                if len(data) > MOST_BYTES:
                    raise ImageError(f"the picture holds more than {MOST_BYTES:,} bytes; send a smaller one.")
            return bytes(data)


def _unfetched(text: str) -> ImageError:
    """The same for all causes: what a network answers is not told to those who send addresses."""
    return ImageError(f"{shown(text)} cannot be fetched; send the picture itself: data:image/png;base64,...")


def _header(answer: httpcore.Response, name: bytes) -> bytes:
    return next((value for key, value in answer.headers if key.lower() == name), b"")


class _Dialler(httpcore.AsyncNetworkBackend):
    """Looks a name up once, and dials what it found if all of it is public."""

    def __init__(self, resolve: Resolve, network: httpcore.AsyncNetworkBackend):
        self._resolve, self._network = resolve, network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        found = await self._resolve(host, port)
        if not found or not all(is_public(address) for address in found):
            raise ConnectionError("the name leads into a network of its own")
        return await self._network.connect_tcp(found[0], port, timeout, local_address, socket_options)
