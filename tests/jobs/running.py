"""Running the batch job as its users do: a process, a manifest, an output folder."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import soundfile

from jobs.folders import open_folder
from jobs.results import read_results

ROOT = Path(__file__).parents[2]
FAKE, REAL = "tests.jobs.fake_job", "jobs.synthesize"


def write_manifest(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def start(module, *arguments, **environment):
    """The job's process; its own process group, so that all of it can be killed."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": ""} | environment,
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


def kill_group(process):
    """End everything that a job has started, as a machine that loses its power would."""
    for pid in [process.pid, *children(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children(pid):
    """All processes under one, deepest first."""
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


def workers(process):
    """The job's actors, by what Ray calls their processes."""
    found = []
    for pid in children(process.pid):
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
    """Result rows by manifest row, each there once, every file of them whole."""
    rows = read_results(open_folder(str(folder))).to_pylist()
    by_number = {row["manifest_row"]: row for row in rows}
    assert len(by_number) == len(rows)
    for row in rows:
        if row["status"] != "failed" and not str(folder).startswith("s3://"):
            info = soundfile.info(row["audio_path"])
            assert info.frames == round(row["duration_s"] * row["sample_rate"])
    return by_number
