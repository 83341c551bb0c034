"""The benchmark runs, its last line is JSON, and its contenders say the same."""

import json
import subprocess
import sys


def test_a_quick_round():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.benchmark", "model", "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "model"
    assert [row["batch"] for row in result["rows"]] == [1, 4]
    for row in result["rows"]:
        assert row["same_codes"] == 1.0
        assert row["ours"]["median"] > 0
    assert result["machine"]["torch"]
