"""The engine's benchmark runs, and what it says is complete."""

import json
import subprocess
import sys


def test_a_quick_round():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.benchmark", "engine", "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "engine"
    assert result["changed_frames"] == 0
    assert result["ratio"] > 0
    assert 0 < result["occupancy"] <= 1
    assert result["first_frame_s"] > 0


def test_a_soak_leaves_nothing_behind():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.benchmark", "engine", "--slots", "4", "--soak", "40"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["blocks_used_at_the_end"] == 0
    assert [mark["requests"] for mark in result["marks"]] == list(range(4, 41, 4))
