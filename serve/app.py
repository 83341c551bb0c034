"""`serve run serve.app:app [NAME=VALUE ...]`: the endpoint on Ray Serve. Settings: `serve.deployments.config`."""

from __future__ import annotations

import math
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from serve.deployments import ingress, replica
from serve.deployments.config import EndpointConfig, key_digests, resolve_config

_CPU_THREADS = 2


def app(arguments: dict[str, Any]) -> Application:
    """The application, from Serve's arguments and the environment.

    Raises:
        BadConfig: a setting is unknown or not possible, in one sentence.
    """
    return build(resolve_config(arguments), replica.load_synthesizer)


def build(config: EndpointConfig, factory: replica.Factory) -> Application:
    """The application with another synthesizer.

    Args:
        factory: must be importable where the replicas run.
    """
    gpus = config.gpus_per_replica
    if gpus is None:
        gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0.0
    # On a CPU the number of threads is heard in the last bit, so it is that of a batch job's worker where nobody asks
    # for more.
    threads = None if gpus else max(_CPU_THREADS, math.ceil(config.cpus_per_replica))
    synthesizers = serve.deployment(replica.Replica).options(**replica.options(config, gpus))
    workers = serve.deployment(ingress.Ingress).options(**ingress.options(config))
    digests = key_digests(config)
    return workers.bind(config, digests, synthesizers.bind(config, factory, threads))
