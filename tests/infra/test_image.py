"""The Dockerfile, checked without building the image; `exercise_image.py` runs its steps."""

import subprocess
import sys
import tomllib
from pathlib import Path

from tests.infra.exercise_image import DOCKERFILE, ROOT, list_context, parse_steps, run_copy

MEGABYTE = 1 << 20


def test_hadolint_accepts_the_dockerfile():
    """hadolint detects unknown instructions, unpinned base images, and pipelines that hide errors."""
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "--no-color", DOCKERFILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_image_is_based_on_ray_and_runs_without_root():
    commands = parse_steps()
    (base,) = [step.value[0] for step in commands if step.cmd == "FROM"]
    (argument,) = [step.value[0] for step in commands if step.cmd == "ARG" and "=" in step.value[0]]
    version = argument.removeprefix("RAY_VERSION=")
    assert base == "rayproject/ray:${RAY_VERSION}-py311"
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text().split()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"
    users = [step.value[0] for step in commands if step.cmd == "USER"]
    assert users[-1] == "1000"


def test_packages_are_installed_before_code_is_copied():
    """Code changes must not invalidate the largest layer."""
    order = [(step.cmd, " ".join(step.value)) for step in parse_steps()]
    packages = next(n for n, (command, text) in enumerate(order) if command == "RUN" and "--requirement" in text)
    code = [n for n, (command, text) in enumerate(order) if command == "COPY" and "higgs_model" in text]
    assert packages < min(code)


def test_weights_are_in_a_volume():
    (environment,) = [step.value for step in parse_steps() if step.cmd == "ENV"]
    (volume,) = [step.value for step in parse_steps() if step.cmd == "VOLUME"]
    assert dict(zip(environment[::2], environment[1::2], strict=True))["HF_HOME"] == volume[0]


def test_build_context_is_small_and_complete(tmp_path):
    names = list_context()
    tops = {name.split("/")[0] for name in names}
    files = {"pyproject.toml", "constraints.txt", "LICENSE", "THIRD_PARTY.md", "README.md"}
    assert tops == files | {"higgs_model", "jobs", "serve"}
    assert not [name for name in names if "__pycache__" in name]
    assert sum((ROOT / name).stat().st_size for name in names) < 20 * MEGABYTE
    assert all(run_copy(step, tmp_path) for step in parse_steps() if step.cmd == "COPY")
    for name in ("serve/http/page.html", "higgs_model/py.typed", "jobs/examples/scripts.jsonl", "pyproject.toml"):
        assert (tmp_path / name).is_file()
