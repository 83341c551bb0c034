"""Multi-node Ray clusters on this machine; each node has its own process group."""

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from ray.job_submission import JobSubmissionClient

from tests.jobs.job_runner import Cluster, descendants, free_port, kill_group, start_ray

# The loss of a node is noticed within seconds instead of half a minute; slow nodes are still tolerated.
FAST_FAILURE_DETECTION = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_metrics_report_interval_ms": "1000",
}


class Head(Cluster):
    """A head node with a dashboard, which accepts jobs."""

    def __init__(self, num_cpus):
        self.dashboard_port, self.metrics_port = free_port(), free_port()
        # Short, because it is a prefix of socket paths, whose length is limited.
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
        """The session folder, which contains logs and unpacked packages."""
        (session,) = self.folder.glob("session_2*")
        return session

    @property
    def url(self):
        return f"http://127.0.0.1:{self.dashboard_port}"

    def nodes(self):
        """Return the alive nodes; none before the dashboard is up."""
        with (
            contextlib.suppress(urllib.error.URLError),
            urllib.request.urlopen(f"{self.url}/nodes?view=summary") as response,
        ):
            nodes = json.load(response)["data"]["summary"]
            return [node for node in nodes if node["raylet"].get("state") == "ALIVE"]
        return []

    def metrics(self):
        """Return the head's metrics in Prometheus text format."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics") as response:
            return response.read().decode()

    def client(self):
        """Return a job client as soon as the head accepts jobs."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return JobSubmissionClient(self.url)
            except ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.3)


def find_processes(node, name):
    """Return the ids of a node's processes whose title contains `name`, such as an actor's class."""
    cmdlines = [Path(f"/proc/{pid}/cmdline") for pid in descendants(node.process.pid)]
    return [path.parent.name for path in cmdlines if path.exists() and name.encode() in path.read_bytes()]


class Node:
    """A worker node of a cluster."""

    def __init__(self, head, num_cpus, *options):
        self.process = start_ray(
            *("--address", head.address, "--num-cpus", num_cpus, "--dashboard-agent-listen-port", free_port()),
            *("--metrics-export-port", free_port(), "--object-store-memory", 100_000_000, *options),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        """Kill the node without a clean shutdown, like a machine that loses power."""
        kill_group(self.process)
        self.process.wait()
