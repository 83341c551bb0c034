"""Shared test set-up: one thread per worker, no Hub, and Triton's interpreter without a GPU."""

import contextlib
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Ray's workers would stand back behind the tests that run beside them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (its name)
# Triton looks when it is imported, which torch may do.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

# The suite runs on all cores already; more threads a worker only make them wait for each other.
torch.set_num_threads(1)

# The GPU tests run on machines that have the network's packages and no others.
with contextlib.suppress(ImportError):
    import hypothesis

    # A busy machine is not a failure.
    hypothesis.settings.register_profile("house", deadline=None)
    hypothesis.settings.load_profile("house")


@pytest.fixture
def bucket():
    """An empty bucket on a real S3 server over HTTP."""
    from tests.s3 import Bucket

    bucket = Bucket()
    yield bucket
    bucket.stop()
