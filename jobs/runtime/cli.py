"""What the small commands share: a command line whose faults are one sentence, and files that are whole or absent."""

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
from jobs.storage.backends import Folder

BAD_ARGUMENTS = 2


class Arguments(argparse.ArgumentParser):
    """A command line that raises `BadInput` where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see {self.prog} --help")


def run_command(command: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command; what its user can mend is said in one sentence, with exit status 2."""
    try:
        return command(sys.argv[1:] if arguments is None else arguments)
    except (HiggsError, OSError) as error:
        say(f"error: {error}")
        return BAD_ARGUMENTS


def say(message: str) -> None:
    """One line for people; stdout is for what programs read."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def whole_file(folder: Folder, name: str) -> Iterator[Path]:
    """A local path to write a file at, which gets its name in the folder when the block ends well."""
    path = folder.draft(name)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part")
    os.close(handle)
    try:
        yield Path(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        Path(part).chmod(0o644)
        os.replace(part, path)
        folder.publish(path, name)
    finally:
        Path(part).unlink(missing_ok=True)
