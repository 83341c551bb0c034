"""Runs the batch job as users do: a process, a manifest, an output folder."""

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
FAKE, REAL = "tests.jobs.fake_job", "jobs.synthesize"
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "2"}


def start_ray(*options, **output):
    """Run `ray start --block` in a process group of its own."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), "start", "--block", *map(str, options)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        **output,
    )


class Cluster:
    """A Ray head node in a process group of its own."""

    def __init__(self, num_cpus, *options):
        self.process = start_ray(
            *("--head", "--num-cpus", num_cpus, "--port", free_port(), "--ray-client-server-port", free_port()),
            *("--include-dashboard", "false", "--object-store-memory", 200_000_000, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self):
        said = []
        for line in self.process.stdout:
            said.append(line)
            if found := re.search(r"--address='([^']+)'", line):
                self.address = found[1]
                return self
        raise RuntimeError("".join(said))

    def __exit__(self, *_):
        kill_group(self.process)
        self.process.communicate()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def write_manifest(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def start(module, *arguments, **environment):
    """Start a job in a process group of its own, so that all of it can be killed."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(module, *arguments, **environment):
    process = start(module, *arguments, **environment)
    try:
        out, err = process.communicate(timeout=180)
    finally:
        kill_group(process)
    return process.returncode, out, err


def run_here(arguments, **options):
    """Run a job with the fake synthesizer in this process, on the running cluster."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = fake_job.run(list(map(str, arguments)), **options)
    return status, said.getvalue()


def kill_group(process):
    """Kill everything that a job has started, like a power failure."""
    for pid in [process.pid, *children(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children(pid):
    """Return all descendants of a process, deepest first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(path.parent.name)
            found += [*children(child), child]
    return found


def workers(cluster):
    """Return the processes of worker actors on a cluster, by their titles."""
    found = []
    for pid in children(cluster.process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"MapWorker" in title:
            found.append(pid)
    return found


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def results(folder):
    """Return result rows by manifest row, after checking that each is there once and its file is complete."""
    rows = read_results(open_storage(str(folder))).to_pylist()
    by_number = {row["manifest_row"]: row for row in rows}
    assert len(by_number) == len(rows)
    for row in rows:
        if row["status"] != "failed" and not str(folder).startswith("s3://"):
            info = soundfile.info(row["audio_path"])
            assert info.frames == round(row["duration_s"] * row["sample_rate"])
    return by_number
