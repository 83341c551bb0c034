"""Downloads reference recordings from allowed URLs only (protection against server-side request forgery).

A URL is downloaded if it has an allowed prefix (same scheme, host and port, and a path below the prefix's path) and all
addresses of its host are public. The connection is made to the checked address, so DNS rebinding has no effect.
Redirects are not followed, no proxy is used, and size and time are bounded. Blocking; run it in a thread.
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

from serve.http.errors import BadRequest, PayloadTooLarge

logger = logging.getLogger(__name__)

_TIMEOUT_S = 20.0
_BLOCK_BYTES = 1 << 16
Resolve = Callable[[str, int], Sequence[str]]
Connect = Callable[[str, int, float], socket.socket]


def resolve(host: str, port: int) -> list[str]:
    """Return all IP addresses of a host."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def connect(address: str, port: int, timeout_s: float) -> socket.socket:
    """Open a TCP connection to an IP address, without another DNS lookup."""
    return socket.create_connection((address, port), timeout_s)


def is_public(address: str) -> bool:
    """Return whether an IP address is public; for IPv4-mapped and 6to4 addresses, whether the embedded one is."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    embedded = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    if embedded is not None:
        parsed = embedded
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


class ReferenceDownloader:
    """Downloads recordings from allowed URL prefixes.

    Args:
        prefixes: such as `https://voices.example.org/public/`.
        max_bytes: maximum size of a recording.
        resolve: returns the IP addresses of a host and port.
        connect: opens a TCP connection to an IP address and port within a timeout in seconds.
    """

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

    def download(self, url: str) -> bytes:
        """Return the content of a URL.

        Raises:
            BadRequest: the URL is not allowed, or cannot be downloaded.
            PayloadTooLarge: the response is larger than `max_bytes`.
        """
        parts = self._check_allowed(url)
        host, port = parts.hostname or "", parts.port or 443
        try:
            addresses = self._resolve(host, port)
            if not addresses or not all(is_public(address) for address in addresses):
                raise BadRequest("ref_audio: this URL does not resolve to a public address", param="ref_audio")
            return self._get(parts, host, port, addresses[0])
        except (OSError, http.client.HTTPException, ValueError) as error:
            logger.warning("failed to download a reference recording from %s: %s", host, error)
            raise BadRequest("ref_audio: the URL cannot be downloaded", param="ref_audio") from None

    def _check_allowed(self, url: str) -> SplitResult:
        not_allowed = BadRequest(
            "ref_audio: this URL is not allowed; send the recording itself, as base64 or a multipart file",
            param="ref_audio",
        )
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise not_allowed from None
        if any(not 32 < ord(character) < 127 for character in url) or "@" in parts.netloc or "\\" in url:
            raise not_allowed
        if ".." in unquote(unquote(parts.path)) or "//" in parts.path:
            raise not_allowed
        origin = (parts.scheme, parts.hostname, port or 443)
        for prefix in self._prefixes:
            is_same_origin = origin == (prefix.scheme, prefix.hostname, prefix.port or 443)
            if is_same_origin and parts.path.startswith(prefix.path.rstrip("/") + "/"):
                return parts
        raise not_allowed

    def _get(self, parts: SplitResult, host: str, port: int, address: str) -> bytes:
        deadline_s = time.monotonic() + _TIMEOUT_S
        tls = self._tls or ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=tls)
        with contextlib.closing(connection):
            # Connect to the checked address, and verify the certificate against the host name.
            connection.sock = tls.wrap_socket(self._connect(address, port, _TIMEOUT_S), server_hostname=host)
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept-Encoding": "identity"})
            response = connection.getresponse()
            if response.status != 200:
                raise BadRequest(
                    f"ref_audio: the URL responded with status {response.status}; redirects are not followed",
                    param="ref_audio",
                )
            blocks, received_bytes = [], 0
            while block := response.read1(_BLOCK_BYTES):
                received_bytes += len(block)
                if received_bytes > self._max_bytes:
                    raise PayloadTooLarge(
                        f"ref_audio: a recording may have at most {self._max_bytes} bytes", param="ref_audio"
                    )
                if time.monotonic() > deadline_s:
                    raise TimeoutError("timed out")
                blocks.append(block)
        return b"".join(blocks)
