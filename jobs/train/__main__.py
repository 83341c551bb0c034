"""Entry point of `python -m jobs.train`; see `cli`."""

from __future__ import annotations

import sys

from jobs.runtime.cli import run_command
from jobs.train.cli import train

if __name__ == "__main__":
    sys.exit(run_command(train))
