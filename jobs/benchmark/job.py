"""The batch job against its own parts in one process: audio seconds a second, occupancy, and rows a second.

Three runs, each in a process of its own, one after the other:
`alone`: a `Synthesizer` synthesizer all scripts at once in one process; no Ray, no files.
`job`: `jobs.synthesize` makes the same scripts, with files and results, from when its model is loaded.
`rows`: very many short rows with a synthesizer that takes no time, to see what rows themselves cost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from higgs_model.synthesizer.fake import FakeSynthesizer
from jobs.benchmark import checkpoint
from jobs.storage.manifest import open_manifest
from jobs.synthesize.row_processing import RowProcessor, SynthesizerProtocol
from jobs.synthesize.settings import JobSettings, parse_settings
from jobs.synthesize.synthesizer_factory import WorkerResources, load_synthesizer
from jobs.synthesize.worker import ROWS_PER_SLOT

_WORDS = "river boats morning harbour quiet houses carried nobody asked where small light would find water again"
_FAST_CHARS_PER_S = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of this benchmark."""
    checkpoint.add_arguments(parser)
    parser.add_argument("--scripts", type=int, default=80, help="scripts, from a line to a minute or two")
    parser.add_argument("--slots", type=int, default=16, help="requests that the engine runs at the same time")
    parser.add_argument("--rows", type=int, default=100_000, help="short rows with a synthesizer that takes no time")
    parser.add_argument("--rounds", type=int, default=2, help="runs of `alone` and `job`, in turn")
    parser.add_argument("--quick", action="store_true", help="few and short, to see that it works")
    parser.add_argument("--part", choices=["alone", "rows"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the table, and return it."""
    if arguments.part:
        return {"alone": alone, "rows": rows}[arguments.part](arguments)
    if arguments.quick:
        arguments.scripts, arguments.rows, arguments.rounds = 6, 200, 1
        arguments.hidden_size, arguments.layers = 64, 2
    with tempfile.TemporaryDirectory(prefix="higgs-benchmark-") as folder:
        arguments.folder = Path(folder)
        arguments.model = checkpoint.named_or_random(arguments, arguments.folder / "model")
        write_scripts(arguments.folder / "scripts.jsonl", arguments.scripts)
        alones, jobs = [], []
        for number in range(arguments.rounds):
            alones.append(_in_a_process(arguments, "alone"))
            jobs.append(_job(arguments, arguments.folder / f"out{number}"))
        many = _in_a_process(arguments, "rows") if arguments.rows else {}
    ratios = [job["audio_s_per_s"] / one["audio_s_per_s"] for job, one in zip(jobs, alones, strict=True)]
    result = {
        "scripts": arguments.scripts,
        "audio_s": jobs[0]["audio_s"],
        "alone_audio_s_per_s": statistics.median(one["audio_s_per_s"] for one in alones),
        "job_audio_s_per_s": statistics.median(one["audio_s_per_s"] for one in jobs),
        "ratio": statistics.median(ratios),
        "occupancy_alone": statistics.median(one["occupancy"] for one in alones),
        "occupancy_job": statistics.median(one["occupancy"] for one in jobs),
        "occupancy_job_while_rows_waited": statistics.median(one["occupancy_while_rows_waited"] for one in jobs),
        "start_up_s": statistics.median(one["elapsed_s"] - one["working_s"] for one in jobs),
        **many,
    }
    for name, value in result.items():
        print(f"{name:>32}  {value:.3f}" if isinstance(value, float) else f"{name:>32}  {value}")
    return result


def write_scripts(path: Path, count: int) -> None:
    """A manifest as in life: most scripts are a few sentences, some go on for minutes."""
    draw, words = random.Random(0), _WORDS.split()
    with path.open("w") as file:
        for number in range(count):
            sentences = max(1, min(round(draw.lognormvariate(1.2, 0.9)), 40))
            text = " ".join(f"{' '.join(draw.choices(words, k=draw.randrange(5, 14)))}." for _ in range(sentences))
            file.write(json.dumps({"id": f"script-{number:05d}", "text": text, "seed": number}) + "\n")


def _flags(arguments: argparse.Namespace, manifest: Path, output: Path, workers: int = 1) -> list[str]:
    return [
        *("--manifest", str(manifest), "--output", str(output), "--model", arguments.model),
        *("--max-batch", str(arguments.slots), "--workers", str(workers), "--attempts", "1"),
        # Of some texts random weights make silence, alone as in the job.
        *("--max-failed", "100%"),
    ]


# ---------------------------------------------------------------------- one process, no Ray


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    """All scripts at once, longest first, in this process."""
    settings = parse_settings(_flags(arguments, arguments.folder / "scripts.jsonl", arguments.folder / "none"))
    synthesizer = load_synthesizer(settings, WorkerResources(arguments.slots, threads=2))
    processor = RowProcessor(settings)
    plans = [processor.validate(row).plan for row in open_manifest(settings.manifest).rows()]
    plans.sort(key=lambda plan: -sum(len(chunk.text) for chunk in plan.chunks))
    samples = 0

    async def speak_all() -> None:
        room = asyncio.Semaphore(ROWS_PER_SLOT * arguments.slots)

        async def speak(plan: Any) -> None:
            nonlocal samples
            async with room:
                async for piece in synthesizer.stream(plan):
                    samples += len(piece.samples_N)

        await asyncio.gather(*map(speak, plans))

    start_s = time.perf_counter()
    asyncio.run(speak_all())
    seconds = time.perf_counter() - start_s
    occupancy = synthesizer.metrics()["occupancy"]
    synthesizer.close()
    return {"audio_s_per_s": samples / synthesizer.sample_rate / seconds, "occupancy": occupancy}


# ---------------------------------------------------------------------- the job


def _job(arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    flags = _flags(arguments, arguments.folder / "scripts.jsonl", output)
    command = [sys.executable, "-m", "jobs.synthesize", *flags]
    environment = os.environ | {"RAY_ADDRESS": ""}
    subprocess.run(command, check=True, env=environment)
    summary: dict[str, Any] = json.loads((output / "job.json").read_text())
    return summary


# ---------------------------------------------------------------------- rows that take no time


def instant(settings: JobSettings, capacity: WorkerResources) -> SynthesizerProtocol:
    """Synthesizes so fast that a row is a few samples long."""
    return FakeSynthesizer(chars_per_s=_FAST_CHARS_PER_S)


def rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole pipeline, a worker a core, with the driver in this process, whose memory is watched."""
    from jobs.synthesize.cli import run as run_job

    manifest = arguments.folder / "rows.jsonl"
    with manifest.open("w") as file:
        for number in range(arguments.rows):
            file.write(json.dumps({"id": f"row-{number:07d}", "text": f"Row {number} says a few words."}) + "\n")
    settings = parse_settings(_flags(arguments, manifest, arguments.folder / "rows", workers=os.cpu_count() or 1))
    memory: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    os.environ["RAY_ADDRESS"] = ""
    with contextlib.redirect_stderr(sys.stdout):
        run_job(settings, open_manifest(settings.manifest), instant)
    ended.set()
    watcher.join()
    summary = json.loads((arguments.folder / "rows" / "job.json").read_text())
    half = memory[len(memory) // 2 :] or [0]
    return {
        "rows": summary["ok"] + summary["flagged"],
        "rows_per_s": summary["rows"] / summary["working_s"],
        "driver_peak_mb": max(memory, default=0) / 1e6,
        "driver_growth_in_second_half_mb": (max(half) - half[0]) / 1e6,
    }


def _in_a_process(arguments: argparse.Namespace, part: str) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "jobs.benchmark", "job", "--part", part, "--folder", str(arguments.folder)),
        *("--model", arguments.model, "--slots", str(arguments.slots), "--rows", str(arguments.rows)),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
