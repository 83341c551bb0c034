"""`python -m tests.gpu`: every test marked `gpu`, on a machine that need not have pytest's plugins, Ray or boto3.

A kernel that fails on the device breaks its whole process: every later call of CUDA fails as well. So the tests run in
one process until that happens; the rest then run in a new one, and a failure is that of its own test alone.
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
        # Opened for each line, so that it is on the disk when the process goes down.
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
    """Run pytest with these arguments in as many processes as it takes.

    Returns:
        {test: `passed`, `skipped`, `failed`, or `started` when it took its process down}.
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
            # 0 to 5 but 3 are pytest's own ends; a process that got nowhere will not get anywhere the next time.
            if code in (0, 1, 2, 4, 5) or len(outcomes) == before:
                return outcomes


def _child(path, arguments):
    import pytest

    # Nothing of the project's own options, which ask for pytest-xdist.
    options = ["-q", "-rs", "-o", "addopts=", "-p", "no:cacheprovider"]
    return pytest.main([*options, *arguments], plugins=[Outcomes(path, _read(path))])


def main(arguments):
    outcomes = run_isolated(arguments or ["-m", "gpu", *FILES])
    bad = [nodeid for nodeid, outcome in outcomes.items() if outcome in ("failed", "started")]
    counts = {name: list(outcomes.values()).count(name) for name in ("passed", "skipped")}
    lines = [f"FAILED {nodeid}" for nodeid in bad]
    lines.append(f"{counts['passed']} passed, {len(bad)} failed, {counts['skipped']} skipped")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if bad or not outcomes else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        raise SystemExit(_child(sys.argv[2], sys.argv[3:]))
    raise SystemExit(main(sys.argv[1:]))
