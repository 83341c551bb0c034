"""Command-line conventions: errors in one sentence, status lines on stderr, atomic output files."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from higgs_model.errors import BadInput, HiggsError
from jobs.storage.backends import StorageBackend

USAGE_ERROR = 2


class ArgumentParser(argparse.ArgumentParser):
    """Raises `BadInput` instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see {self.prog} --help")


def run_command(command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status. Errors that users can fix are reported in one sentence, with status 2.

    Args:
        command: function of the command-line arguments that returns an exit status.
        arguments: default: those of this process.
    """
    try:
        return command(sys.argv[1:] if arguments is None else arguments)
    except (HiggsError, OSError) as error:
        print_status(f"error: {error}")
        return USAGE_ERROR


def print_status(message: str) -> None:
    """Print a line to stderr; stdout is for machine-readable output."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def atomic_file(storage: StorageBackend, name: str) -> Iterator[Path]:
    """Yield a local path to write to; the file is published under its name only if the block succeeds."""
    path = storage.staging_path(name)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        Path(part).chmod(0o644)
        os.replace(part, path)
        storage.publish(path, name)
    finally:
        Path(part).unlink(missing_ok=True)
