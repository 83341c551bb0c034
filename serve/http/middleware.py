"""Around every request, before any framework sees it: its id, its facts, the bound on its body, and its end in the log.

The id is that of the header `x-request-id`, which Serve adds where a client sends none, and repeats in its answer.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.http.errors import TooLarge
from serve.http.request_log import RequestFacts, RequestMetrics, access

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ID = re.compile(rb"[A-Za-z0-9_-]{8,100}")
_PATIENCE = 4
"""Times the bound of a body that are read, and forgotten, before a client is cut off."""
QUIET = ("/healthz",)
"""Asked for every few seconds: told to the log only when something is wrong."""


class Outer:
    """ASGI middleware."""

    def __init__(self, app: App, max_body_bytes: int, metrics: RequestMetrics) -> None:
        self._app, self._max_body_bytes, self._metrics = app, max_body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts = RequestFacts(_request_id(scope), scope["method"], scope["path"][:200])
        scope.setdefault("state", {})["facts"] = facts
        try:
            await self._app(scope, self._bounded(receive), _told(facts, send))
        except asyncio.CancelledError:
            facts.outcome = "gone"
            raise
        except BaseException as error:
            if facts.outcome == "ok":
                facts.outcome, facts.error = "broken_off", type(error).__name__
            raise
        finally:
            self._metrics.ended(facts)
            if facts.path not in QUIET or facts.outcome != "ok":
                access.info(facts.line())

    def _bounded(self, receive: Receive) -> Receive:
        most = self._max_body_bytes
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total <= most:
                return message
            # Most clients read no answer before they have sent everything.
            while message.get("more_body") and total <= _PATIENCE * most:
                message = await receive()
                total += len(message.get("body", b""))
            raise TooLarge(f"the request has more than the {most} bytes that are taken")

        return counted


def _told(facts: RequestFacts, send: Send) -> Send:
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            facts.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
        else:
            facts.bytes_out += len(message.get("body", b""))
        await send(message)

    return told


def _request_id(scope: Scope) -> str:
    given: bytes = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
