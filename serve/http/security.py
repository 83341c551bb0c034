"""Who may ask: API keys, compared in constant time. Only digests of keys are held."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from serve.http.errors import Unauthorized


class KeyRing:
    """The keys of an endpoint; without any, everybody may ask everything."""

    def __init__(self, digests: frozenset[bytes] = frozenset()) -> None:
        self._digests = sorted(digests)

    @property
    def wanted(self) -> bool:
        """Whether a key is needed."""
        return bool(self._digests)

    def check(self, headers: Mapping[str, str]) -> None:
        """Let a request pass that brings a key, as `Authorization: Bearer KEY`.

        Raises:
            Unauthorized: it brings none, or one that is not known.
        """
        if not self._digests:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("this endpoint wants an API key: send it as 'Authorization: Bearer KEY'")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All of them are compared, so that the time says nothing of which one was close.
        if not sum(hmac.compare_digest(digest, own) for own in self._digests):
            raise Unauthorized("this API key is not known here")
