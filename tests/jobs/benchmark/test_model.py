"""The model benchmark runs, its last line is JSON, and its contenders generate the same codes."""

import json
import subprocess
import sys


def test_quick_run_generates_same_codes_as_port():
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.benchmark", "model", "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(completed.stdout.splitlines()[-1])
    assert result["benchmark"] == "model"
    assert [row["batch"] for row in result["rows"]] == [1, 4]
    for row in result["rows"]:
        assert row["same_codes"] == 1.0
        assert row["ours"]["median"] > 0
    assert result["machine"]["torch"]
