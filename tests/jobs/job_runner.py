"""Runs the batch job as users do: as a process, with a manifest and an output folder."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import soundfile

from jobs.storage.backends import open_storage
from jobs.storage.result_table import read_results
from tests.jobs import fake_job

ROOT = Path(__file__).parents[2]
FAKE_JOB = "tests.jobs.fake_job"
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "2"}


def start_ray(*options, **output):
    """Run `ray start --block` in its own process group."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--block", *map(str, options)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        **output,
    )


class Cluster:
    """A Ray head node in its own process group."""

    def __init__(self, num_cpus, *options):
        self.process = start_ray(
            *("--head", "--num-cpus", num_cpus, "--port", free_port(), "--ray-client-server-port", free_port()),
            *("--include-dashboard", "false", "--object-store-memory", 200_000_000, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self):
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if match := re.search(r"--address='([^']+)'", line):
                self.address = match[1]
                return self
        raise RuntimeError("".join(lines))

    def __exit__(self, *_):
        kill_group(self.process)
        self.process.communicate()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def write_manifest(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def start_job(module, *arguments, **environment):
    """Start a job in its own process group, so that all its processes can be killed."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_job(module, *arguments, **environment):
    process = start_job(module, *arguments, **environment)
    try:
        stdout, stderr = process.communicate(timeout=180)
    finally:
        kill_group(process)
    return process.returncode, stdout, stderr


def run_in_process(arguments, **options):
    """Run a job with the fake synthesizer in this process, on the running cluster; return its status and stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = fake_job.run(list(map(str, arguments)), **options)
    return status, stderr.getvalue()


def kill_group(process):
    """Kill all processes that a job has started, like a power failure."""
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid):
    """Return the ids of all descendants of a process, deepest first."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(path.parent.name)
            pids += [*descendants(child), child]
    return pids


def worker_pids(cluster):
    """Return the process ids of the worker actors on a cluster."""
    pids = []
    for pid in descendants(cluster.process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"MapWorker" in title:
            pids.append(pid)
    return pids


def wait_for(condition, timeout_s=90):
    """Poll a condition until it is true; return its value."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError


def checked_results(folder):
    """Return the result rows by manifest row; check that each occurs once and its audio file is complete."""
    rows = read_results(open_storage(str(folder))).to_pylist()
    by_number = {row["manifest_row"]: row for row in rows}
    assert len(by_number) == len(rows)
    for row in rows:
        if row["status"] != "failed" and not str(folder).startswith("s3://"):
            info = soundfile.info(row["audio_path"])
            assert info.frames == round(row["duration_s"] * row["sample_rate"])
    return by_number
