"""`python -m jobs.demo`: the demo's checkpoint from nothing; see `recipe`. Killed, the same command goes on.

Exit status: 0 the checkpoint is in its place · 2 bad settings, or no synthesizers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from higgs_model import demo
from jobs.demo.recipe import RECIPE, Recipe, make
from jobs.runtime.cli import ArgumentParser, run_command


def main(arguments: Sequence[str]) -> int:
    """Run the stages that the command line describes; gives the exit status."""
    parser = ArgumentParser(prog="python -m jobs.demo", description="Make the demo's checkpoint from nothing.")
    parser.add_argument("--config", type=Path, default=RECIPE, help="the recipe")
    parser.add_argument("--work", type=Path, default=Path("out/demo-voice"), help="folder for data and states")
    parser.add_argument("--output", type=Path, default=demo.CHECKPOINT_DIR, help="where the checkpoint goes")
    flags = parser.parse_args(arguments)
    make(Recipe.read(flags.config), flags.work, flags.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
