"""The deployment that speaks: one synthesizer, in whose engine the requests of all HTTP workers meet.

Nothing heavy is imported before a replica is built, so that only its process loads the network.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from serve.deployments.config import EndpointConfig
from serve.http.request_log import EngineMetrics
from serve.speech.events import Event, SpeakJob
from serve.voices.voice_library import VoiceLibrary
from serve.voices.voice_store import open_store

if TYPE_CHECKING:
    from serve.speech.synthesis import Speaks

NAME = "Synthesizer"
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 5, 30
_DRAIN_S = 5

TRANSPORT = {
    "env_vars": {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    }
}
"""Our coroutines do not block, so they may share Serve's event loop: a portion of sound then changes threads less often
on its way, which an engine that keeps the interpreter busy makes dear. A message may hold a whole recording."""

Factory = Callable[[EndpointConfig], "Speaks"]
"""Builds the synthesizer of a replica."""


def load_synthesizer(config: EndpointConfig) -> Speaks:
    """The model, its codec, and an engine with a slot for each request that Serve lets in."""
    from higgs_model.engine.settings import EngineSettings
    from higgs_model.synthesizer import SynthesisSettings, Synthesizer

    return Synthesizer.from_pretrained(
        config.model,
        config.codec,
        engine=EngineSettings(max_slots=config.max_batch),
        settings=SynthesisSettings(seed=config.seed, attempts=config.attempts),
    )


class Replica:
    """A synthesizer behind a handle."""

    def __init__(self, config: EndpointConfig, factory: Factory, threads: int | None) -> None:
        import torch

        from serve.speech.synthesis import Speaker

        if threads:
            torch.set_num_threads(threads)
        library = None if config.voices is None else VoiceLibrary(open_store(config.voices))
        self._speaker = Speaker(factory(config), library, config.seed)
        self._speaker.warm_up()
        self._metrics = EngineMetrics()

    async def speak(self, job: SpeakJob) -> AsyncGenerator[Event]:
        """The events of a job."""
        async with contextlib.aclosing(self._speaker.answer(job)) as events:
            async for event in events:
                yield event

    def numbers(self) -> dict[str, float]:
        """What the engine says of itself."""
        return self._speaker.speaks.numbers()

    def check_health(self) -> None:
        """Asked by Serve every few seconds; when it raises, Serve starts another replica in place of this one."""
        self._metrics.show(self._speaker.speaks.numbers())
        if self._speaker.broken is not None:
            raise RuntimeError("the engine is broken") from self._speaker.broken


def options(config: EndpointConfig, gpus: float) -> dict[str, Any]:
    """What Serve is told of the replicas."""
    scaling: dict[str, Any] = {"num_replicas": config.min_replicas}
    if config.max_replicas > config.min_replicas:
        # A synthesizer three quarters full still takes the next request at once.
        scaling = {
            "autoscaling_config": {
                "min_replicas": config.min_replicas,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": max(1.0, 0.75 * config.max_batch),
                "upscale_delay_s": config.upscale_delay_s,
                "downscale_delay_s": config.downscale_delay_s,
            }
        }
    return scaling | {
        "name": NAME,
        "max_ongoing_requests": config.max_batch,
        # HTTP workers bound the queue: Serve would also count those that are just being handed to a free slot.
        "max_queued_requests": -1,
        "graceful_shutdown_timeout_s": config.request_timeout_s + _DRAIN_S,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        # Its line a request would only say less than ours.
        "logging_config": {"enable_access_log": False},
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": gpus, "runtime_env": TRANSPORT},
    }
