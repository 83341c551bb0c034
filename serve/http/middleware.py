"""ASGI middleware around every request: its id and context, the limit on its body, and its entry in the request log.

The id is that of the header `x-request-id`, which Serve adds if the client sends none, and repeats in its response.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.http.errors import TooLarge
from serve.http.request_log import RequestContext, RequestMetrics, access

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ID = re.compile(rb"[A-Za-z0-9_-]{8,100}")
_MAX_EXCESS_FACTOR = 4
"""An oversized body is read and discarded up to this multiple of the limit before the connection is closed."""
UNLOGGED_PATHS = ("/healthz",)
"""Polled every few seconds: logged only when they fail."""


class RequestMiddleware:
    """Gives every request a context, and limits its body."""

    def __init__(self, app: App, max_body_bytes: int, metrics: RequestMetrics) -> None:
        self._app, self._max_body_bytes, self._metrics = app, max_body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(_request_id(scope), scope["method"], scope["path"][:200])
        scope.setdefault("state", {})["context"] = context
        try:
            await self._app(scope, self._limit_body(receive), _record_response(context, send))
        except asyncio.CancelledError:
            context.outcome = "gone"
            raise
        except BaseException as error:
            if context.outcome == "ok":
                context.outcome, context.error = "broken_off", type(error).__name__
            raise
        finally:
            self._metrics.record(context)
            if context.path not in UNLOGGED_PATHS or context.outcome != "ok":
                access.info(context.to_json())

    def _limit_body(self, receive: Receive) -> Receive:
        limit = self._max_body_bytes
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total <= limit:
                return message
            # Most clients read no response before they have sent everything.
            while message.get("more_body") and total <= _MAX_EXCESS_FACTOR * limit:
                message = await receive()
                total += len(message.get("body", b""))
            raise TooLarge(f"the request body exceeds {limit} bytes")

        return counted


def _record_response(context: RequestContext, send: Send) -> Send:
    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            context.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
        else:
            context.bytes_out += len(message.get("body", b""))
        await send(message)

    return recorded


def _request_id(scope: Scope) -> str:
    given: bytes = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
