"""Connects jobs to a Ray cluster. Ray is imported late, so that invalid command lines fail fast."""

from __future__ import annotations

import logging
import os

THREADS_PER_CPU_WORKER = 2
"""Fixed, because the number of threads affects how sums are rounded, and thus the last bits of the audio."""


def connect() -> None:
    """Connect to the cluster at RAY_ADDRESS, or start a local one for this job."""
    import ray

    # Ray Data's actor pools cause warnings in Ray Core that users can do nothing about.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    # The job reports its own progress.
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
