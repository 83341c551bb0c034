"""infra/README.md: all commands, flags and files exist."""

import re
import shlex
from pathlib import Path

import pytest

from jobs.synthesize.settings import parse_settings
from tests.infra.kustomized import build

ROOT = Path(__file__).parents[2]
README = (ROOT / "infra/README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line]
RAY_COMMANDS = [line for line in COMMANDS if line.startswith(".venv/bin/ray ")]


def split_command(command):
    """Split a command into words, with placeholders for shell substitutions."""
    return shlex.split(re.sub(r"\$\(.*?\)|\$PWD", "/x", command))


def test_every_command_is_an_expected_tool():
    known = {"make", "export", ".venv/bin/ray", "docker", "kubectl", "helm", "curl", "prometheus"}
    assert {split_command(command)[0] for command in COMMANDS} <= known
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", RAY_COMMANDS, ids=lambda line: "-".join(line.split()[1:4]))
def test_flags_of_ray_commands_exist(command):
    words, _, _ = (part.split() for part in command.partition(" -- "))
    names = [word for word in words[1:3] if not word.startswith("-") and word.isalpha()]
    names = names if names[0] == "job" else names[:1]
    from ray.scripts.scripts import cli

    subcommand = cli
    for name in names:
        subcommand = subcommand.commands[name]
    flags = {option for parameter in subcommand.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= flags, command


def test_submitted_jobs_have_valid_settings():
    jobs = [command.partition(" -- ")[2] for command in RAY_COMMANDS if "job submit" in command]
    assert len(jobs) >= 3
    for job in jobs:
        words = shlex.split(job.replace("$PWD", "/x"))
        assert words[:3] in (["python", "-m", "jobs.synthesize"], ["/x/.venv/bin/python", "-m", "jobs.synthesize"])
        parse_settings(words[3:])


def test_referenced_files_exist():
    for path in re.findall(r"infra/[\w./-]+", README):
        assert (ROOT / path.rstrip(".")).exists(), path
    listed = re.findall(r"^\| `([\w./]+)`", README, re.MULTILINE)
    assert {name.rstrip("/") for name in listed} | {"README.md"} == {path.name for path in (ROOT / "infra").iterdir()}


def test_kubernetes_names_match_the_manifests():
    """KubeRay names the submitter after the job, and services and the token's Secret after the cluster."""
    kinds = ("job", "service", "cluster")
    resources = [resource for kind in kinds for resource in build(ROOT / f"infra/kuberay/gpu/{kind}")]
    names = {resource["kind"]: resource["metadata"]["name"] for resource in resources}
    for part in (
        f"get rayjob {names['RayJob']} ",
        f"logs --follow job/{names['RayJob']}",
        f"get rayservice {names['RayService']} ",
        f"service/{names['RayService']}-serve-svc 8000",
        f"service/{names['RayCluster']}-head-svc 8265",
        f"get secret {names['RayCluster']} -o",
        "create secret generic higgs ",
    ):
        assert any(part in command for command in COMMANDS), part
