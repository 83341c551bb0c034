"""`python -m jobs.demo`: build the demo checkpoint from scratch; see `recipe`. The same command resumes after a stop.

Exit status: 0 the checkpoint is written · 2 invalid settings, or a synthesizer is not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from higgs_model import demo
from jobs.demo.recipe import RECIPE, Recipe, build_checkpoint
from jobs.runtime.cli import ArgumentParser, run_command


def main(arguments: Sequence[str]) -> int:
    """Build the checkpoint that a command line describes and return the exit status."""
    parser = ArgumentParser(prog="python -m jobs.demo", description="Build the demo checkpoint from scratch.")
    parser.add_argument("--config", type=Path, default=RECIPE, help="YAML file of the recipe")
    parser.add_argument("--work", type=Path, default=Path("out/demo-voice"), help="folder for data and training states")
    parser.add_argument("--output", type=Path, default=demo.CHECKPOINT_DIR, help="folder for the checkpoint")
    flags = parser.parse_args(arguments)
    build_checkpoint(Recipe.read(flags.config), flags.work, flags.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
