"""A Ray cluster for the jobs of all tests."""

import os

import pytest

from tests.jobs.job_runner import Cluster


@pytest.fixture(scope="session")
def cluster():
    with Cluster(num_cpus=2) as cluster:
        before = os.environ.get("RAY_ADDRESS")
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
        os.environ.pop("RAY_ADDRESS")
        if before is not None:
            os.environ["RAY_ADDRESS"] = before
