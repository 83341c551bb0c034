"""Shared test set-up: one thread per worker, no Hub, and Triton's interpreter without a GPU."""

import contextlib
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# By default Ray's workers have a lower priority than the tests that run at the same time.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray's name)
# Triton reads this when it is imported, which torch may do.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

# The suite already uses all cores; more threads per worker would only compete.
torch.set_num_threads(1)

# GPU tests run with the packages of `higgs_model` alone.
with contextlib.suppress(ImportError):
    import hypothesis

    # A busy machine must not fail tests.
    hypothesis.settings.register_profile("no-deadline", deadline=None)
    hypothesis.settings.load_profile("no-deadline")


@pytest.fixture
def bucket():
    """An empty bucket on a real S3 server over HTTP."""
    from tests.s3 import Bucket

    bucket = Bucket()
    yield bucket
    bucket.stop()
