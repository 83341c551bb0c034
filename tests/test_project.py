"""The house rules that a machine can hold: cheap imports, one home for special ids, the README's tree and commands."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from higgs_model import tokens

ROOT = Path(__file__).parents[1]
SOURCES = [path for top in ("higgs_model", "jobs", "serve") for path in sorted((ROOT / top).rglob("*.py"))]
README = (ROOT / "README.md").read_text()


def run(*command, check=True):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, higgs_model, jobs, serve; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    assert run(sys.executable, "-c", script).stdout.strip() == "[]"


def test_every_public_name_is_there():
    script = "import higgs_model; print([getattr(higgs_model, name).__name__ for name in higgs_model.__all__])"
    names = ast.literal_eval(run(sys.executable, "-W", "ignore", "-c", script).stdout)
    assert "HiggsAudioModel" in names


def test_an_unknown_name_is_an_attribute_error():
    import higgs_model

    with pytest.raises(AttributeError, match="has no attribute 'HiggsVideoModel'"):
        _ = higgs_model.HiggsVideoModel


def test_special_ids_have_one_home():
    ids = {value for name, value in vars(tokens).items() if name.endswith("_ID")}
    assert len(ids) >= 8
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for path in SOURCES
        if path.name != "tokens.py"
        for node in ast.walk(ast.parse(path.read_text()))
        # The end of a text is a setting of the Llama backbone, not a token of ours.
        if isinstance(node, ast.Constant) and node.value in ids and path.name != "config.py"
    ]
    assert found == []


def test_rooms_stay_small():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in long.items() if lines > 450} == {}


def test_the_readmes_tree_is_the_disks():
    tree = re.search(r"```text\n(higgs_model/.*?)```", README, re.DOTALL).group(1)
    folder, listed = "", []
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if not line.startswith(" "):
            folder = name
            listed.append(name)
        elif name:
            listed.append(folder + name)
    assert [name for name in listed if not (ROOT / name).exists()] == []
    tops = {path.name + "/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    tops -= {name for name in tops if name.endswith(".egg-info/") or name in ("build/", "out/")}
    assert tops <= set(listed)


def test_the_readmes_python_runs(tmp_path):
    """From top to bottom, as a reader would."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readmes_commands_exist():
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line
    ]
    assert commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    modules = set()
    for command in commands:
        words = shlex.split(command, comments=True)
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets, command
        elif words[:2] == [".venv/bin/python", "-m"]:
            # A command that has parts, such as `jobs.benchmark model`, has help for each.
            modules.add(tuple(word for word in words[2:4] if not word.startswith("-")))
    for named in sorted(modules):
        done = run(sys.executable, "-W", "ignore", "-m", *named, "--help", check=False)
        assert done.returncode == 0, named
