"""The engine benchmark runs and reports all of its results."""

import json
import subprocess
import sys


def test_quick_run_reports_every_metric():
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.benchmark", "engine", "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(completed.stdout.splitlines()[-1])
    assert result["benchmark"] == "engine"
    (row,) = result["rows"]
    assert row["slots"] == 4
    assert row["changed_frames"] == 0
    assert row["ratio"] > 0
    assert 0 < row["occupancy"] <= 1
    assert 0 < row["step_of_floor"] < 1
    assert row["first_frame_s"].keys() == {"1", "4"}
    assert all(0 < quantiles["median"] <= quantiles["p95"] for quantiles in row["first_frame_s"].values())


def test_soak_frees_all_kv_blocks():
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.benchmark", "engine", "--slots", "4", "--soak", "40"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(completed.stdout.splitlines()[-1])
    assert result["blocks_held_at_the_end"] == 0
    assert [mark["requests"] for mark in result["marks"]] == list(range(4, 41, 4))
