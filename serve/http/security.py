"""API keys, compared in constant time. Only their SHA-256 digests are kept in memory."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from serve.http.errors import Unauthorized


class ApiKeys:
    """The API keys of an endpoint; without keys, all requests are allowed."""

    def __init__(self, digests: frozenset[bytes] = frozenset()) -> None:
        self._digests = sorted(digests)

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return bool(self._digests)

    def check(self, headers: Mapping[str, str]) -> None:
        """Check that a request has a valid key in its header `Authorization: Bearer KEY`.

        Raises:
            Unauthorized: the key is missing or unknown.
        """
        if not self._digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("this endpoint requires an API key: send it as 'Authorization: Bearer KEY'")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Compare with every key, so that timing reveals nothing about them.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise Unauthorized("unknown API key")
