"""The deployment that answers HTTP: it checks, encodes and sends.

It holds no model, so that it answers while one loads.
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
from serve.deployments.config import EndpointConfig
from serve.http.errors import NotReady
from serve.http.middleware import App
from serve.http.request_log import log_to_stderr
from serve.http.routes import create_app
from serve.http.security import KeyRing
from serve.speech.endpoint import Endpoint
from serve.speech.events import Condition, Event, SpeakJob
from serve.voices.voice_library import VoiceLibrary
from serve.voices.voice_store import open_store

logger = logging.getLogger(__name__)

_CONDITION_FRESH_S, _SLOTS_FRESH_S = 1.0, 5.0
"""To ask the controller costs more than to pass a stream on."""
_RETRY_LOST_S = 5
_DRAIN_S = 10


@serve.ingress()
class Ingress:
    """An HTTP worker."""

    def __init__(self, config: EndpointConfig, digests: frozenset[bytes], replicas: DeploymentHandle) -> None:
        log_to_stderr()
        library = None if config.voices is None else VoiceLibrary(open_store(config.voices))
        self._endpoint = Endpoint(config, HandleBackend(replicas, config.max_batch), library)
        self._keys = KeyRing(digests)

    def __serve_build_asgi_app__(self) -> App:
        return create_app(self._endpoint, self._keys)


class HandleBackend:
    """The replicas, through Serve's handle."""

    def __init__(self, replicas: DeploymentHandle, slots_a_replica: int) -> None:
        # By value: events then come over gRPC, not each as an object of Ray's store, which takes twice as long.
        self._speak = replicas.options(stream=True, _by_reference=False).speak
        self._app = serve.get_replica_context().app_name
        self._slots_a_replica, self._running = slots_a_replica, 1
        self._condition: Condition = "loading"
        self._asked_s = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def speak(self, job: SpeakJob) -> AsyncGenerator[Event]:
        """See `Backend.speak`."""
        events = self._speak.remote(job)
        try:
            async for event in events:
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            events.cancel()
            raise
        except (RayError, RayServeException, AioRpcError) as error:
            logger.error("request %s lost its synthesizer", job.request_id, exc_info=error)
            raise NotReady("the synthesizer was lost; ask again", retry_after_s=_RETRY_LOST_S) from error

    def slots(self) -> int:
        """Of the replicas that ran a moment ago."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(_SLOTS_FRESH_S))
        return self._slots_a_replica * max(self._running, 1)

    async def condition(self) -> Condition:
        """What Serve's controller says of the replicas, not older than a second."""
        await self._ask(_CONDITION_FRESH_S)
        return self._condition

    async def _ask(self, fresh_s: float) -> None:
        if time.monotonic() - self._asked_s > fresh_s:
            self._condition, self._running = await asyncio.to_thread(self._asked)
            self._asked_s = time.monotonic()

    def _asked(self) -> tuple[Condition, int]:
        application = serve.status().applications.get(self._app)
        deployment = application.deployments.get(replica.NAME) if application is not None else None
        if deployment is None:
            return "loading", 0
        states: dict[str, int] = {str(state): count for state, count in deployment.replica_states.items()}
        if running := states.get("RUNNING", 0):
            return "ready", running
        return ("broken" if deployment.status in ("UNHEALTHY", "DEPLOY_FAILED") else "loading"), 0


def options(config: EndpointConfig) -> dict[str, Any]:
    """What Serve is told of the HTTP workers. Requests are turned away by them, not before them."""
    return {
        "name": "Ingress",
        "num_replicas": config.ingress_replicas,
        "max_ongoing_requests": 10_000,
        "max_queued_requests": -1,
        "graceful_shutdown_timeout_s": config.request_timeout_s + _DRAIN_S,
        # Its line a request would only say less than ours.
        "logging_config": {"enable_access_log": False},
        "ray_actor_options": {"num_cpus": 0, "runtime_env": replica.TRANSPORT},
    }
