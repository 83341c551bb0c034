"""Simulated GPUs in the real pipeline."""

import argparse
import math

import pytest

from jobs.benchmark import scale

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # Ray's own deprecation warnings.
    pytest.mark.filterwarnings("ignore"),
    # All of these tests share one cluster.
    pytest.mark.xdist_group("ray"),
]


def test_throughput_is_limited_by_slot_rate(tmp_path):
    arguments = argparse.Namespace(row_s=6.0, workers=1, slots=4)
    # 4 slots at 10 audio s/s each: 40 audio s/s, or between 6 and 7 rows/s.
    slow = scale.run_job_with_fake_gpus(tmp_path, "slow", 40, arguments, slot_rate=10.0)
    fast = scale.run_job_with_fake_gpus(tmp_path, "fast", 40, arguments, slot_rate=math.inf)
    assert slow["rows_per_s"] < 1.15 * 40 / 6 < fast["rows_per_s"]
    assert fast["occupancy"] < slow["occupancy"] <= 1.0
