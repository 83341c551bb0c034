"""Runs the image's build steps without a Docker engine: `python -m tests.infra.exercise_image FOLDER`.

COPY copies the files that `.dockerignore` does not exclude. RUN commands are executed in order, with the environment
that ENV sets, in a fresh virtual environment instead of the base image's Python; those that need root are only printed.
Finally the demo job is run with the installed packages, from another folder.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import dockerfile
from docker.utils.build import exclude_paths

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/Dockerfile"


def parse_steps():
    """Return the Dockerfile's commands in order."""
    return dockerfile.parse_file(str(DOCKERFILE))


def list_context():
    """Return the files of the build context, by Docker's ignore rules."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return sorted(
        name for name in exclude_paths(str(ROOT), patterns) if (ROOT / name).is_file() and name != ".dockerignore"
    )


def run_copy(step, root):
    """Execute a COPY step below `root`; return the number of files."""
    *sources, target = step.value
    count = 0
    for source in sources:
        names = [name for name in list_context() if name == source or name.startswith(f"{source}/")]
        for name in names:
            path = root / target / (name.removeprefix(f"{source}/") if name != source else Path(name).name)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, path)
        count += len(names)
    return count


def main(folder):
    """Run the Dockerfile's steps in `folder`; raise an exception if the build would fail."""
    work = Path(folder).resolve() / "work"
    work.mkdir(parents=True)
    venv.create(work.parent / "venv", with_pip=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{work.parent / 'venv/bin'}:{environment['PATH']}"
    user = "1000"
    for step in parse_steps():
        print_status(f"{step.start_line:3} {step.original.splitlines()[0]}")
        if step.cmd == "USER":
            (user,) = step.value
        elif step.cmd == "COPY":
            print_status(f"    {run_copy(step, work)} files")
        elif step.cmd == "RUN" and user == "0":
            print_status("    skipped: needs root")
        elif step.cmd == "RUN":
            subprocess.run(["bash", "-c", step.value[0]], cwd=work, env=environment, check=True)
        elif step.cmd == "ENV":
            pairs = dict(zip(step.value[::2], step.value[1::2], strict=True))
            environment |= {
                name: str(work.parent / "models") if value == "/models" else value for name, value in pairs.items()
            }
    examples = work / "jobs/examples"
    subprocess.run(
        [
            *("python", "-W", "ignore", "-m", "jobs.synthesize", "--manifest", examples / "scripts.jsonl"),
            *("--voices", examples / "voices", "--output", "out", "--limit", "2", "--attempts", "1"),
        ],
        cwd=work.parent,
        env=environment,
        check=True,
    )
    files = list((work.parent / "out/audio").rglob("*.wav"))
    print_status(f"the demo job wrote {len(files)} files")
    assert len(files) == 2


def print_status(message):
    sys.stdout.write(f"{message}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
