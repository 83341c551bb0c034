"""`python -m tests.gpu`: run all tests marked `gpu`, without pytest plugins, Ray or boto3.

A kernel that fails on the device breaks the process: every later CUDA call fails as well. So the tests run in one
process until that happens, and the remaining ones in a new process; a failing kernel only fails its own test.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = sorted(str(path) for path in Path(__file__).parent.rglob("test_gpu.py"))


class Outcomes:
    """A pytest plugin that writes each test's outcome, until the device is broken."""

    def __init__(self, path, done):
        self._path, self._done = Path(path), done

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if item.nodeid not in self._done]

    def pytest_runtest_logstart(self, nodeid, location):
        self._write(nodeid, "started")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome)

    def pytest_runtest_logfinish(self, nodeid, location):
        if not _device_works():
            sys.stdout.flush()
            os._exit(3)

    def _write(self, nodeid, outcome):
        # Opened for each line, so that the line is on disk if the process dies.
        with self._path.open("a") as lines:
            lines.write(json.dumps([nodeid, outcome]) + "\n")


def _device_works():
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _read(path):
    """Return {test: outcome}; a process that dies leaves its last test `started`."""
    outcomes = {}
    for line in Path(path).read_text().splitlines():
        nodeid, outcome = json.loads(line)
        if outcomes.get(nodeid) != "failed":
            outcomes[nodeid] = outcome
    return outcomes


def run_isolated(arguments):
    """Run pytest with these arguments in as many processes as necessary.

    Returns:
        {test: `passed`, `skipped`, `failed`, or `started` if its process died}.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes"
        path.touch()
        while True:
            before = len(_read(path))
            code = subprocess.run(
                [sys.executable, "-m", "tests.gpu", "--record", str(path), *arguments], check=False
            ).returncode
            outcomes = _read(path)
            # 3 is our status for a broken device, the others are pytest's. A run without progress is not repeated.
            if code in (0, 1, 2, 4, 5) or len(outcomes) == before:
                return outcomes


def _child(path, arguments):
    import pytest

    # Without the project's own options, which require pytest-xdist.
    options = ["-q", "-rs", "-o", "addopts=", "-p", "no:cacheprovider"]
    return pytest.main([*options, *arguments], plugins=[Outcomes(path, _read(path))])


def main(arguments):
    outcomes = run_isolated(arguments or ["-m", "gpu", *FILES])
    failed = [nodeid for nodeid, outcome in outcomes.items() if outcome in ("failed", "started")]
    counts = {name: list(outcomes.values()).count(name) for name in ("passed", "skipped")}
    lines = [f"FAILED {nodeid}" for nodeid in failed]
    lines.append(f"{counts['passed']} passed, {len(failed)} failed, {counts['skipped']} skipped")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failed or not outcomes else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        raise SystemExit(_child(sys.argv[2], sys.argv[3:]))
    raise SystemExit(main(sys.argv[1:]))
