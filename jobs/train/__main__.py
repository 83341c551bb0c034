"""See `command`."""

from __future__ import annotations

import sys

from jobs.commands import run_command
from jobs.train.command import train

if __name__ == "__main__":
    sys.exit(run_command(train))
