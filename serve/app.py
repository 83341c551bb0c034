"""The endpoint on Ray Serve: `serve run serve.app:app [NAME=VALUE ...]`; settings: `serve.deployments.settings`."""

from __future__ import annotations

import math
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from serve.deployments import ingress, replica
from serve.deployments.settings import EndpointSettings, key_digests, resolve_config

_CPU_THREADS = 2


def app(arguments: dict[str, Any]) -> Application:
    """Build the application from Serve's arguments and the environment.

    Raises:
        BadConfig: a setting is unknown or invalid; the message is one sentence.
    """
    return build(resolve_config(arguments), replica.load_synthesizer)


def build(config: EndpointSettings, factory: replica.SynthesizerFactory) -> Application:
    """Build the application with any synthesizer.

    Args:
        factory: builds the synthesizer of a replica; must be importable where replicas run.
    """
    gpus = config.gpus_per_replica
    if gpus is None:
        gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0.0
    # On a CPU the thread count affects the last bits of the audio, so it matches a batch job's worker unless more CPUs
    # are configured.
    threads = None if gpus else max(_CPU_THREADS, math.ceil(config.cpus_per_replica))
    synthesizers = serve.deployment(replica.SynthesizerReplica).options(**replica.deployment_options(config, gpus))
    workers = serve.deployment(ingress.Ingress).options(**ingress.deployment_options(config))
    digests = key_digests(config)
    return workers.bind(config, digests, synthesizers.bind(config, factory, threads))
