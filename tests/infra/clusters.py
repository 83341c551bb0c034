"""Ray clusters of several nodes on this machine, each node in a process group of its own, as machines would be."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from ray.job_submission import JobSubmissionClient

from tests.jobs.running import ENVIRONMENT, ROOT, Cluster, free_port, kill_group, workers

# A machine that is gone is noticed after seconds, not half a minute.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_metrics_report_interval_ms": "1000",
}


class Head(Cluster):
    """A head with a dashboard, which takes jobs."""

    def __init__(self, num_cpus):
        self.dashboard_port, self.metrics_port = free_port(), free_port()
        # Short: names of sockets go on behind it, and are bounded.
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        super().__init__(
            num_cpus,
            *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", self.dashboard_port),
            *("--dashboard-agent-listen-port", free_port(), "--metrics-export-port", self.metrics_port),
            *("--temp-dir", self.folder),
        )

    def __exit__(self, *_):
        super().__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def session(self):
        """Logs, and what Ray has unpacked."""
        (session,) = self.folder.glob("session_2*")
        return session

    @property
    def url(self):
        return f"http://127.0.0.1:{self.dashboard_port}"

    def nodes(self):
        """Nodes that live."""
        with urllib.request.urlopen(f"{self.url}/nodes?view=summary") as answer:
            nodes = json.load(answer)["data"]["summary"]
        return [node for node in nodes if node["raylet"]["state"] == "ALIVE"]

    def metrics(self):
        """What the head exports to Prometheus, as text."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as answer:
            return answer.read().decode()

    def client(self):
        """A job client, as soon as the head takes jobs."""
        end = time.monotonic() + 60
        while True:
            try:
                return JobSubmissionClient(self.url)
            except ConnectionError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.3)


class Node:
    """A further node of a cluster."""

    def __init__(self, head, num_cpus, *options):
        command = [
            *(Path(sys.executable).with_name("ray"), "start", "--block", "--address", head.address),
            *("--num-cpus", num_cpus, "--dashboard-agent-listen-port", free_port()),
            *("--metrics-export-port", free_port(), "--object-store-memory", 100_000_000, *options),
        ]
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """As a machine that loses its power."""
        kill_group(self.process)
        self.process.wait()

    def workers(self):
        """Actors of jobs on it."""
        return workers(self)
