"""ASGI middleware for every request: request id and context, body size limit, and request log.

The request id is the `x-request-id` header. Serve adds one if the client sends none, and echoes it in the response.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.http.errors import PayloadTooLarge
from serve.http.request_log import RequestContext, RequestMetrics, access_log

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{8,100}")
_MAX_EXCESS_FACTOR = 4
"""An oversized body is read and discarded up to this multiple of the limit before the connection is closed."""
UNLOGGED_PATHS = ("/healthz",)
"""Polled every few seconds, so logged only on failure."""


class RequestMiddleware:
    """Attaches a context to every request, limits its body, and logs it when it ends."""

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
                access_log.info(context.to_json())

    def _limit_body(self, receive: Receive) -> Receive:
        limit = self._max_body_bytes
        received_bytes = 0

        async def receive_limited() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes <= limit:
                return message
            # Most clients do not read the response until they have sent the full body.
            while message.get("more_body") and received_bytes <= _MAX_EXCESS_FACTOR * limit:
                message = await receive()
                received_bytes += len(message.get("body", b""))
            raise PayloadTooLarge(f"the request body exceeds {limit} bytes")

        return receive_limited


def _record_response(context: RequestContext, send: Send) -> Send:
    async def send_recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            context.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
        else:
            context.bytes_out += len(message.get("body", b""))
        await send(message)

    return send_recorded


def _request_id(scope: Scope) -> str:
    header: bytes = dict(scope["headers"]).get(b"x-request-id", b"")
    return header.decode() if _REQUEST_ID.fullmatch(header) else f"req_{uuid.uuid4().hex}"
