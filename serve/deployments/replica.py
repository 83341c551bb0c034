"""The synthesizer deployment: each replica holds one engine, which batches the requests of all ingress replicas.

Heavy imports are deferred to the constructor, so that only replica processes load torch and the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from serve.deployments.settings import EndpointSettings
from serve.http.request_log import EngineMetrics
from serve.speech.events import Event, SynthesisRequest
from serve.voices.voice_library import VoiceLibrary
from serve.voices.voice_store import open_voice_store

if TYPE_CHECKING:
    from serve.speech.synthesis import SynthesizerProtocol

DEPLOYMENT_NAME = "Synthesizer"
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 5, 30
_DRAIN_S = 5

RUNTIME_ENV = {
    "env_vars": {
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    }
}
"""Runtime environment of both deployments. Their coroutines do not block, so they may share Serve's event loop: audio
then crosses fewer threads, and thread switches are slow while the engine keeps the interpreter busy. The message limit
is raised because a gRPC message may contain a full recording."""

SynthesizerFactory = Callable[[EndpointSettings], "SynthesizerProtocol"]
"""Builds the synthesizer of a replica."""


def load_synthesizer(config: EndpointSettings) -> SynthesizerProtocol:
    """Load the model and codec, with an engine that has a slot for each concurrent request."""
    from higgs_model.engine.settings import EngineSettings
    from higgs_model.synthesizer import SynthesisSettings, Synthesizer

    return Synthesizer.from_pretrained(
        config.model,
        config.codec,
        engine=EngineSettings(max_slots=config.max_batch),
        settings=SynthesisSettings(seed=config.seed, attempts=config.attempts),
    )


class SynthesizerReplica:
    """A synthesizer replica.

    Args:
        factory: builds the synthesizer.
        threads: number of torch CPU threads; None: torch's default.
    """

    def __init__(self, config: EndpointSettings, factory: SynthesizerFactory, threads: int | None) -> None:
        import torch

        from serve.speech.synthesis import RequestSynthesizer

        if threads:
            torch.set_num_threads(threads)
        library = None if config.voices is None else VoiceLibrary(open_voice_store(config.voices))
        self._synthesizer = RequestSynthesizer(factory(config), library, config.seed)
        self._synthesizer.warm_up()
        self._metrics = EngineMetrics()

    async def synthesize(self, request: SynthesisRequest) -> AsyncGenerator[Event]:
        """Yield the events of a request."""
        async with contextlib.aclosing(self._synthesizer.stream(request)) as events:
            async for event in events:
                yield event

    def metrics(self) -> dict[str, float]:
        """Return the engine's metrics."""
        return self._synthesizer.synthesizer.metrics()

    def check_health(self) -> None:
        """Raise if the engine has failed. Serve calls this every few seconds and replaces a replica that raises."""
        self._metrics.update(self._synthesizer.synthesizer.metrics())
        if self._synthesizer.engine_error is not None:
            raise RuntimeError("the engine has failed") from self._synthesizer.engine_error


def deployment_options(config: EndpointSettings, gpus: float) -> dict[str, Any]:
    """Return the deployment's Serve options."""
    scaling: dict[str, Any] = {"num_replicas": config.min_replicas}
    if config.max_replicas > config.min_replicas:
        # Scale up at three quarters of the slots, while a replica can still start the next request at once.
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
        "name": DEPLOYMENT_NAME,
        "max_ongoing_requests": config.max_batch,
        # ingress replicas bound the queue. Serve's bound would also count requests on their way to a free slot.
        "max_queued_requests": -1,
        "graceful_shutdown_timeout_s": config.request_timeout_s + _DRAIN_S,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        # The endpoint's own request log is more detailed.
        "logging_config": {"enable_access_log": False},
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": gpus, "runtime_env": RUNTIME_ENV},
    }
