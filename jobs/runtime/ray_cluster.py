"""What jobs say to Ray before they begin. Ray is imported where it is used: faulty command lines do not wait for it."""

from __future__ import annotations

import logging
import os

THREADS_A_CPU_WORKER = 2
"""Always the same: sums are rounded as threads share them, so that this number is heard in the last bit."""


def connect() -> None:
    """Join the cluster of this machine's environment, or start one for this job alone."""
    import ray

    # Every pool of actors makes Ray's core warn of something that Ray Data itself does.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    # Of its own progress this job tells itself.
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
