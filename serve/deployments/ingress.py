"""The HTTP deployment: validates requests, encodes audio, and sends responses.

It holds no model, so it can respond while replicas load theirs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from grpc.aio import AioRpcError
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.deployments import replica
from serve.deployments.settings import EndpointSettings
from serve.http.errors import ServiceUnavailable
from serve.http.middleware import App
from serve.http.request_log import log_to_stderr
from serve.http.routes import create_app
from serve.http.security import ApiKeys
from serve.speech.events import Event, HealthStatus, SynthesisRequest
from serve.speech.service import SpeechService
from serve.voices.voice_library import VoiceLibrary
from serve.voices.voice_store import open_voice_store

logger = logging.getLogger(__name__)

_HEALTH_MAX_AGE_S, _SLOTS_MAX_AGE_S = 1.0, 5.0
"""Cached, because a query to Serve's controller costs more than forwarding a stream."""
_RETRY_AFTER_LOSS_S = 5
_DRAIN_S = 10


@serve.ingress()
class Ingress:
    """An ingress replica."""

    def __init__(self, config: EndpointSettings, digests: frozenset[bytes], replicas: DeploymentHandle) -> None:
        log_to_stderr()
        library = None if config.voices is None else VoiceLibrary(open_voice_store(config.voices))
        self._endpoint = SpeechService(config, ServeBackend(replicas, config.max_batch), library)
        self._keys = ApiKeys(digests)

    def __serve_build_asgi_app__(self) -> App:
        return create_app(self._endpoint, self._keys)


class ServeBackend:
    """The replicas behind a Serve deployment handle."""

    def __init__(self, replicas: DeploymentHandle, slots_per_replica: int) -> None:
        # By value: events are sent over gRPC, which takes half as long as Ray's object store.
        self._synthesize = replicas.options(stream=True, _by_reference=False).synthesize
        self._app = serve.get_replica_context().app_name
        self._slots_per_replica, self._running = slots_per_replica, 1
        self._health: HealthStatus = "loading"
        self._updated_s = float("-inf")
        self._updating: asyncio.Task[None] | None = None

    async def synthesize(self, request: SynthesisRequest) -> AsyncGenerator[Event]:
        """See `SynthesizerBackend.synthesize`."""
        events = self._synthesize.remote(request)
        try:
            async for event in events:
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            events.cancel()
            raise
        except (RayError, RayServeException, AioRpcError) as error:
            logger.error("request %s: the synthesizer replica was lost", request.request_id, exc_info=error)
            raise ServiceUnavailable(
                "the synthesizer was lost; try again", retry_after_s=_RETRY_AFTER_LOSS_S
            ) from error

    def slots(self) -> int:
        """Return the total slots of running replicas, at most a few seconds old."""
        if self._updating is None or self._updating.done():
            self._updating = asyncio.create_task(self._update(_SLOTS_MAX_AGE_S))
        return self._slots_per_replica * max(self._running, 1)

    async def health(self) -> HealthStatus:
        """Return the status of the replicas according to Serve's controller, at most one second old."""
        await self._update(_HEALTH_MAX_AGE_S)
        return self._health

    async def _update(self, max_age_s: float) -> None:
        if time.monotonic() - self._updated_s > max_age_s:
            self._health, self._running = await asyncio.to_thread(self._query_serve)
            self._updated_s = time.monotonic()

    def _query_serve(self) -> tuple[HealthStatus, int]:
        application = serve.status().applications.get(self._app)
        deployment = application.deployments.get(replica.DEPLOYMENT_NAME) if application is not None else None
        if deployment is None:
            return "loading", 0
        states: dict[str, int] = {str(state): count for state, count in deployment.replica_states.items()}
        if running := states.get("RUNNING", 0):
            return "ready", running
        return ("broken" if deployment.status in ("UNHEALTHY", "DEPLOY_FAILED") else "loading"), 0


def deployment_options(config: EndpointSettings) -> dict[str, Any]:
    """Return the deployment's Serve options; the endpoint rejects excess requests itself, so Serve must not."""
    return {
        "name": "Ingress",
        "num_replicas": config.ingress_replicas,
        "max_ongoing_requests": 10_000,
        "max_queued_requests": -1,
        "graceful_shutdown_timeout_s": config.request_timeout_s + _DRAIN_S,
        # The endpoint's own request log is more detailed.
        "logging_config": {"enable_access_log": False},
        "ray_actor_options": {"num_cpus": 0, "runtime_env": replica.RUNTIME_ENV},
    }
