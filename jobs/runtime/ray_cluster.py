"""Connects jobs to Ray, which is imported late so that invalid command lines fail fast."""

from __future__ import annotations

import logging
import os

THREADS_PER_CPU_WORKER = 2
"""Constant, because the number of threads changes how sums are rounded, and so the last bits of the audio."""


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start a local one for this job."""
    import ray

    # Ray Data's actor pools make Ray's core log warnings that users can do nothing about.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    # The job reports its own progress.
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
