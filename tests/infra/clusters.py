"""Ray clusters with several nodes on this machine, each in a process group of its own."""

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

# A machine that is gone is noticed after seconds, not after half a minute; one that is only slow has its time.
IMPATIENT = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_metrics_report_interval_ms": "1000",
}


class Head(Cluster):
    """A head node with a dashboard, which accepts jobs."""

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
        """Nodes that live; none before the dashboard does."""
        with (
            contextlib.suppress(urllib.error.URLError),
            urllib.request.urlopen(f"{self.url}/nodes?view=summary") as answer,
        ):
            nodes = json.load(answer)["data"]["summary"]
            return [node for node in nodes if node["raylet"].get("state") == "ALIVE"]
        return []

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


def processes(node, name):
    """Return a node's processes whose title contains a name, such as an actor's class."""
    titles = [Path(f"/proc/{pid}/cmdline") for pid in descendants(node.process.pid)]
    return [path.parent.name for path in titles if path.exists() and name.encode() in path.read_bytes()]


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
        """As a machine that loses its power."""
        kill_group(self.process)
        self.process.wait()
