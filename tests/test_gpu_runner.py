"""The runner of the GPU tests: only a test that kills its process fails, and only the packages of `higgs_model` are
needed to collect them.
"""

import subprocess
import sys
from pathlib import Path

from tests.gpu import FILES, run_isolated

ROOT = Path(__file__).parents[1]
TESTS = """
import os

def test_before(): pass
def test_wrong(): assert False
def test_kills_its_process(): os._exit(3)
def test_after(): pass
"""
# Packages that GPU tests must not need.
ABSENT = ("ray", "boto3", "moto", "hypothesis", "xdist", "soundfile", "pydantic", "pyarrow", "fastapi")
COLLECT = f"""
import os, sys
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
sys.modules.update(dict.fromkeys({ABSENT!r}))
import pytest
raise SystemExit(pytest.main(["-q", "--collect-only", "-o", "addopts=", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_only_the_test_that_kills_its_process_fails(tmp_path):
    path = tmp_path / "test_four.py"
    path.write_text(TESTS)
    outcomes = {nodeid.split("::")[1]: outcome for nodeid, outcome in run_isolated([str(path)]).items()}
    assert outcomes == {
        "test_before": "passed",
        "test_wrong": "failed",
        "test_kills_its_process": "started",
        "test_after": "passed",
    }


def test_gpu_tests_need_only_the_models_packages():
    command = [sys.executable, "-c", COLLECT, *FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_captured_steps_agree_with_the_cpu" in done.stdout
