"""The endpoint's benchmark runs as it is documented: behind HAProxy, as the image has it."""

import json
import subprocess
import sys


def test_the_quick_round_measures_the_endpoint_behind_haproxy():
    command = [sys.executable, "-W", "ignore", "-m", "jobs.benchmark", "serve", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["proxy"] == "haproxy"
    assert told["overhead"]["endpoint_ms"] > 0
    for row in told["by_clients"].values():
        assert row["endpoint"]["audio_s_per_s"]["median"] > 0
        # Over HTTP as much is heard as without.
        assert row["audio_s"] > 1
