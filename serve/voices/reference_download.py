"""Recordings from the network, from allowed places only.

A URL is fetched if it begins with an allowed prefix (same scheme, host, port, and path below the prefix's), and if all
addresses of its host are public. The connection goes to an address that was checked, so that a name which changes its
address between the look and the call reaches nothing else. No redirect is followed, no proxy is used, and bytes and
time are bounded. Blocks; meant for a thread.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, unquote, urlsplit

from serve.http.errors import BadRequest, TooLarge

logger = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_BLOCK_BYTES = 1 << 16
Resolve = Callable[[str, int], Sequence[str]]
Connect = Callable[[str, int, float], socket.socket]


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to an address, which is not looked up again."""
    return socket.create_connection((address, port), timeout_s)


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    if inner is not None:
        found = inner
    return found.is_global and not found.is_multicast and not found.is_reserved


class Fetcher:
    """Fetches recordings from places under prefixes such as `https://voices.example.org/public/`."""

    def __init__(
        self,
        prefixes: Sequence[str],
        max_bytes: int,
        *,
        resolve: Resolve = resolve,
        connect: Connect = connect,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._prefixes, self._max_bytes = [urlsplit(prefix) for prefix in prefixes], max_bytes
        self._resolve, self._connect, self._tls = resolve, connect, tls

    def fetch(self, url: str) -> bytes:
        """The bytes under a URL.

        Raises:
            BadRequest: it is not allowed, or does not answer with a recording. TooLarge: it answers with too much.
        """
        place = self._allowed(url)
        host, port = place.hostname or "", place.port or 443
        try:
            addresses = self._resolve(host, port)
            if not addresses or not all(is_public(address) for address in addresses):
                raise BadRequest("ref_audio: this URL leads to no public address", param="ref_audio")
            return self._get(place, host, port, addresses[0])
        except (OSError, http.client.HTTPException, ValueError) as error:
            logger.warning("a reference could not be fetched from %s: %s", host, error)
            raise BadRequest("ref_audio: the URL does not answer", param="ref_audio") from None

    def _allowed(self, url: str) -> SplitResult:
        refused = BadRequest(
            "ref_audio: this endpoint fetches no such URL; send the recording itself, as base64 or a multipart file",
            param="ref_audio",
        )
        try:
            place = urlsplit(url)
            port = place.port
        except ValueError:
            raise refused from None
        if any(ord(letter) <= 32 or ord(letter) >= 127 for letter in url) or "@" in place.netloc or "\\" in url:
            raise refused
        if ".." in unquote(unquote(place.path)) or "//" in place.path:
            raise refused
        for prefix in self._prefixes:
            same = (place.scheme, place.hostname, port or 443) == (prefix.scheme, prefix.hostname, prefix.port or 443)
            if same and place.path.startswith(prefix.path.rstrip("/") + "/"):
                return place
        raise refused

    def _get(self, place: SplitResult, host: str, port: int, address: str) -> bytes:
        until = time.monotonic() + _TIMEOUT_S
        tls = self._tls or ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=tls)
        with contextlib.closing(connection):
            # The certificate must be the name's, the address is the one that was checked.
            connection.sock = tls.wrap_socket(self._connect(address, port, _TIMEOUT_S), server_hostname=host)
            path = place.path + (f"?{place.query}" if place.query else "")
            connection.request("GET", path, headers={"Accept-Encoding": "identity"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise BadRequest(
                    f"ref_audio: the URL answers with status {answer.status}; redirects are not followed",
                    param="ref_audio",
                )
            parts, total = [], 0
            while part := answer.read1(_BLOCK_BYTES):
                total += len(part)
                if total > self._max_bytes:
                    raise TooLarge(f"ref_audio: a recording may have {self._max_bytes} bytes", param="ref_audio")
                if time.monotonic() > until:
                    raise TimeoutError("it takes too long")
                parts.append(part)
        return b"".join(parts)
