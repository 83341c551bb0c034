"""The endpoint benchmark runs with its default proxy, HAProxy, which the container image uses too."""

import json
import subprocess
import sys


def test_quick_run_measures_endpoint_behind_haproxy():
    command = [sys.executable, "-W", "ignore", "-m", "jobs.benchmark", "serve", "--quick"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert completed.returncode == 0, completed.stderr[-2000:]
    result = json.loads(completed.stdout.splitlines()[-1])
    assert result["proxy"] == "haproxy"
    assert result["overhead"]["endpoint_ms"] > 0
    for row in result["by_clients"].values():
        assert row["endpoint"]["audio_s_per_s"]["median"] > 0
        # The endpoint returned audio.
        assert row["audio_s"] > 1
