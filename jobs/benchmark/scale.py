"""The job with hundreds of GPUs that are not there: the real pipeline, files and results, with engines that only wait.

Each worker stands for many GPUs: its rows end as often as all of theirs together would. So driver, ledger and
storage see the events of hundreds of GPUs, and what is measured is theirs alone. First the rows a second that they can
take at most, with engines that take no time. Then, for each number of GPUs, the rows a second that come through, beside
what the arithmetic of `capacity` says: as many as the GPUs ask for, or that most.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import io
import json
import os
import random
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from higgs_model.script.plan import Plan
from higgs_model.synthesizer.fake import FakeSynthesizer
from higgs_model.synthesizer.records import Piece
from jobs.benchmark.capacity import rows_per_s_through, rows_per_s_wanted
from jobs.storage.manifest import open_manifest
from jobs.synthesize.settings import JobSettings, parse_settings
from jobs.synthesize.synthesizer_factory import WorkerResources

_CHARS_A_SECOND = 15.0
_NO_FILES_TO_SPEAK_OF = 1e6
"""Characters a second of the files, which are a few samples long: bytes are not what is measured."""
_WORDS = "river boats morning harbour quiet houses carried nobody asked where small light would find water again"


class FakeGpus(FakeSynthesizer):
    """Several GPUs: their rows end as often as they would, though fewer are under way.

    Args:
        slots: of all of them.
        slot_rate: seconds of audio a second that a slot makes.
    """

    def __init__(self, slots: int, slot_rate: float) -> None:
        super().__init__(chars_per_s=_NO_FILES_TO_SPEAK_OF)
        self._slots, self._slot_rate, self._free = slots, slot_rate, asyncio.Semaphore(slots)
        self._busy_s, self._began_s = 0.0, 0.0

    async def stream(self, plan: Plan, **options: Any) -> AsyncGenerator[Piece]:
        """The pieces of a row, when its time is over."""
        async with self._free:
            began_s = time.monotonic()
            self._began_s = self._began_s or began_s
            chars = sum(len(chunk.text) for chunk in plan.chunks)
            await asyncio.sleep(chars / _CHARS_A_SECOND / self._slot_rate)
            self._busy_s += time.monotonic() - began_s
        async for piece in super().stream(plan, **options):
            yield piece

    def metrics(self) -> dict[str, float]:
        """Of the slots' time, how much was used."""
        elapsed_s = max(time.monotonic() - self._began_s, 1e-9) if self._began_s else 1.0
        return {"occupancy": self._busy_s / elapsed_s / self._slots}


def fake_gpus(settings: JobSettings, capacity: WorkerResources, *, slot_rate: float) -> FakeGpus:
    """A worker's GPUs."""
    return FakeGpus(capacity.slots, slot_rate)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of this benchmark."""
    parser.add_argument("--gpus", type=int, nargs="+", default=[10, 50, 200, 400], help="how many, one run each")
    parser.add_argument("--rate", type=float, default=100.0, help="seconds of audio a second of one GPU")
    parser.add_argument("--row-s", type=float, default=10.0, help="seconds of audio of a row, on average")
    parser.add_argument("--slots", type=int, default=16, help="rows that a process has under way")
    parser.add_argument("--workers", type=int, default=4, help="processes that stand for all of them")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each run is to take")
    parser.add_argument("--quick", action="store_true", help="small, to see that it works")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if arguments.quick:
        arguments.gpus, arguments.workers, arguments.seconds = [4], 2, 2.0
    os.environ["RAY_ADDRESS"] = ""
    with tempfile.TemporaryDirectory(prefix="higgs-scale-") as name:
        folder = Path(name)
        rows = round(max(arguments.seconds * 200, 200))
        limit = measure(folder, "limit", rows, arguments, slot_rate=float("inf"))["rows_per_s"]
        print(f"at most {limit:.0f} rows a second, {rows} rows")
        print("  GPUs  rows/s wanted  predicted    got  got/predicted  GPU time used")
        found = []
        for gpus in arguments.gpus:
            wanted = rows_per_s_wanted(gpus, arguments.rate, arguments.row_s)
            predicted = rows_per_s_through(wanted, limit)
            slot_rate = arguments.rate * gpus / (arguments.slots * arguments.workers)
            got = measure(folder, f"{gpus}", round(predicted * arguments.seconds), arguments, slot_rate)
            one = {"gpus": gpus, "rows_per_s_wanted": wanted, "rows_per_s_predicted": predicted, **got}
            found.append(one | {"ratio": one["rows_per_s"] / predicted})
            print(
                f"{gpus:>6}  {wanted:>13.0f}  {predicted:>9.0f}  {one['rows_per_s']:>5.0f}  "
                f"{one['rows_per_s'] / predicted:>13.2f}  {one['occupancy']:>12.0%}"
            )
    return {"rows_per_s_limit": limit, "runs": found, "row_s": arguments.row_s, "rate": arguments.rate}


def write_rows(path: Path, count: int, row_s: float) -> None:
    """A manifest of rows that are as long on average, and uneven as in life."""
    draw, words = random.Random(0), _WORDS.split()
    with path.open("w") as file:
        for number in range(count):
            chars = round(row_s * _CHARS_A_SECOND * draw.uniform(0.5, 1.5))
            text = " ".join(draw.choices(words, k=chars // 6 + 1))[: max(chars, 8)]
            file.write(json.dumps({"id": f"row-{number:07d}", "text": text}) + "\n")


def measure(folder: Path, name: str, rows: int, arguments: argparse.Namespace, slot_rate: float) -> dict[str, float]:
    """One run of the job: its rows a second from when workers stand, and the share of the slots' time in use."""
    from jobs.synthesize.cli import run as run_job

    manifest, output = folder / f"{name}.jsonl", folder / name
    write_rows(manifest, rows, arguments.row_s)
    flags = ["--manifest", str(manifest), "--output", str(output), "--chunk-method", "none"]
    settings = parse_settings([*flags, "--workers", str(arguments.workers), "--max-batch", str(arguments.slots)])
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = run_job(settings, open_manifest(settings.manifest), functools.partial(fake_gpus, slot_rate=slot_rate))
    summary = json.loads((output / "job.json").read_text())
    if status or summary["failed"]:
        raise RuntimeError(f"exit status {status}: {said.getvalue().splitlines()[-1]}")
    return {"rows_per_s": rows / summary["working_s"], "occupancy": summary["occupancy"] or 0.0}
