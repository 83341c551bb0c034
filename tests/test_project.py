"""Conventions that a machine can check: cheap imports, one definition of special ids, and documentation that runs."""

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
PAGES = {
    name: (ROOT / name).read_text()
    for name in (
        "README.md",
        "higgs_model/README.md",
        "jobs/README.md",
        "jobs/benchmark/README.md",
        "serve/README.md",
        "infra/README.md",
        "infra/capacity.md",
    )
}


def run(*command, check=True):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=check)


def test_importing_the_packages_loads_nothing_heavy():
    script = "import sys, higgs_model, jobs, serve; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    assert run(sys.executable, "-c", script).stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    script = "import higgs_model; print([getattr(higgs_model, name).__name__ for name in higgs_model.__all__])"
    names = ast.literal_eval(run(sys.executable, "-W", "ignore", "-c", script).stdout)
    assert "HiggsAudioModel" in names


def test_unknown_public_name_is_an_attribute_error():
    import higgs_model

    with pytest.raises(AttributeError, match="has no attribute 'HiggsVideoModel'"):
        _ = higgs_model.HiggsVideoModel


def test_special_ids_are_defined_once():
    ids = {value for name, value in vars(tokens).items() if name.endswith("_ID")}
    assert len(ids) >= 8
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for path in SOURCES
        if path.name != "tokens.py"
        for node in ast.walk(ast.parse(path.read_text()))
        # eos_token_id belongs to the Llama configuration, not to our special tokens.
        if isinstance(node, ast.Constant) and node.value in ids and path.name != "config.py"
    ]
    assert found == []


def test_modules_stay_small():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > 450} == {}


@pytest.mark.parametrize("folder", ["jobs", "serve"])
def test_top_level_contains_only_packages_commands_and_the_app(folder):
    modules = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    commands = {name for name in modules if "python -m jobs." + name.removesuffix(".py") in PAGES["jobs/README.md"]}
    assert modules - commands <= {"app.py"}


# ---------------------------------------------------------------------- documentation


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_tree_in_the_readme_matches_the_disk():
    tree = re.search(r"```text\n(higgs_model/.*?)```", PAGES["README.md"], re.DOTALL).group(1)
    folder, listed = "", []
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
            listed.append(name)
        else:
            listed.append(folder + name)
    assert [name for name in listed if not (ROOT / name).exists()] == []
    folders = {path for path in ROOT.iterdir() if path.is_dir() and path.name in {"higgs_model", "jobs", "serve"}}
    packages = {f"{path.parent.name}/{path.name}/" for top in folders for path in top.iterdir() if contains_files(path)}
    assert packages <= set(listed)


def contains_files(path):
    return path.is_dir() and path.name != "__pycache__" and any(child.is_file() for child in path.iterdir())


def test_questions_in_the_readme_name_definitions_that_exist():
    table = PAGES["README.md"].split("| question | answer |\n|---|---|\n")[1].split("\n\n")[0]
    rows = table.splitlines()
    assert len(rows) == 10
    for row in rows:
        answers = re.findall(r"`(\w+)` in `([\w/]+\.py)`", row)
        assert answers, row
        for name, file in answers:
            assert re.search(rf"^ *(async )?(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), row
        assert [file for file in re.findall(r"`([\w/]+\.py)`", row) if not (ROOT / file).is_file()] == [], row


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [page for page in PAGES if "```python\n" in PAGES[page]])
def test_python_blocks_run_from_top_to_bottom(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_commands_exist():
    """Every `make` target, and every module that is run with -m, which must have help."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    modules = set()
    for text in PAGES.values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for command in filter(None, block.splitlines()):
                words = shlex.split(command, comments=True)
                if words[:1] == ["make"]:
                    assert set(words[1:]) <= targets, command
                elif words[:2] == [".venv/bin/python", "-m"]:
                    # Subcommands such as `jobs.benchmark model` have help of their own.
                    modules.add(tuple(word for word in words[2:4] if not word.startswith("-")))
    assert len(modules) >= 10
    # In one process, because importing torch and Ray takes longer than anything else here.
    done = run(sys.executable, "-W", "ignore", "-c", RUN_HELP, *(" ".join(module) for module in sorted(modules)))
    assert done.stdout.count("usage: ") == len(modules)


RUN_HELP = """
import runpy, sys

for command in sys.argv[1:]:
    module, *subcommand = command.split()
    sys.argv = [module, *subcommand, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        assert not exit.code, command
"""
