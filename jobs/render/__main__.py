"""`python -m jobs.render`."""

import sys

from jobs.render.cli import render
from jobs.runtime.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(render))
