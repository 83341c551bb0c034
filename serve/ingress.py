"""The deployment that answers HTTP: it checks, encodes and sends, and holds no model, so that it answers while one loads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve import replica
from serve.config import EndpointConfig
from serve.endpoint import Endpoint
from serve.errors import Busy, NotReady
from serve.events import Condition, Event, SpeakJob
from serve.facts import log_to_stderr
from serve.http import create_app
from serve.library import VoiceLibrary
from serve.outer import App
from serve.security import KeyRing
from serve.stores import open_store

logger = logging.getLogger(__name__)

_CONDITION_FRESH_S = 1.0
_RETRY_LOST_S = 5
_DRAIN_S = 10


@serve.ingress()
class Ingress:
    """An HTTP worker."""

    def __init__(self, config: EndpointConfig, digests: frozenset[bytes], replicas: DeploymentHandle) -> None:
        log_to_stderr()
        library = None if config.voices is None else VoiceLibrary(open_store(config.voices))
        self._endpoint = Endpoint(config, HandleBackend(replicas), library)
        self._keys = KeyRing(digests)

    def __serve_build_asgi_app__(self) -> App:
        return create_app(self._endpoint, self._keys)


class HandleBackend:
    """The replicas, through Serve's handle."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._speak = replicas.options(stream=True).speak
        self._app = serve.get_replica_context().app_name
        self._condition: Condition = "loading"
        self._asked_s = float("-inf")

    async def speak(self, job: SpeakJob) -> AsyncGenerator[Event]:
        """See `Backend.speak`."""
        events = self._speak.remote(job)
        ended = False
        try:
            async for event in events:
                yield event
            ended = True
        except BackPressureError as error:
            raise Busy("all slots speak and the queue is full") from error
        except (RayActorError, DeploymentUnavailableError) as error:
            logger.error("request %s lost its synthesizer: %s", job.request_id, error)
            raise NotReady("the synthesizer was lost; ask again", retry_after_s=_RETRY_LOST_S) from error
        except (RayTaskError, RayServeException) as error:
            logger.error("request %s", job.request_id, exc_info=error)
            raise NotReady("the synthesizer gave no answer; ask again", retry_after_s=_RETRY_LOST_S) from error
        finally:
            if not ended:
                events.cancel()

    async def condition(self) -> Condition:
        """What Serve's controller says of the replicas, not older than a second."""
        if time.monotonic() - self._asked_s > _CONDITION_FRESH_S:
            self._condition = await asyncio.to_thread(self._asked)
            self._asked_s = time.monotonic()
        return self._condition

    def _asked(self) -> Condition:
        application = serve.status().applications.get(self._app)
        deployment = application.deployments.get(replica.NAME) if application is not None else None
        if deployment is None:
            return "loading"
        states: dict[str, int] = {str(state): count for state, count in deployment.replica_states.items()}
        if states.get("RUNNING"):
            return "ready"
        return "broken" if deployment.status in ("UNHEALTHY", "DEPLOY_FAILED") else "loading"


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
        "ray_actor_options": {"num_cpus": 0},
    }
