"""The batch job compared with its parts in one process: audio s/s, occupancy, and rows/s.

Three runs, each in its own process, one after the other:
`alone`: a `Synthesizer` synthesizes all scripts concurrently in one process, without Ray and files.
`job`: `jobs.synthesize` synthesizes the same scripts, with files and results, timed from when its model is loaded.
`rows`: very many short rows with a synthesizer that takes no time, to measure the overhead per row.
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
    """Add this benchmark's options."""
    checkpoint.add_arguments(parser)
    parser.add_argument("--scripts", type=int, default=80, help="scripts, from one line to a minute or two")
    parser.add_argument("--slots", type=int, default=16, help="concurrent requests of the engine")
    parser.add_argument("--rows", type=int, default=100_000, help="short rows with a synthesizer that takes no time")
    parser.add_argument("--rounds", type=int, default=2, help="alternating runs of `alone` and `job`")
    parser.add_argument("--quick", action="store_true", help="few short scripts, as a smoke test")
    parser.add_argument("--part", choices=["alone", "rows"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print the results, and return them."""
    if arguments.part:
        return {"alone": measure_in_process, "rows": measure_rows}[arguments.part](arguments)
    if arguments.quick:
        arguments.scripts, arguments.rows, arguments.rounds = 6, 200, 1
        arguments.hidden_size, arguments.layers = 64, 2
    with tempfile.TemporaryDirectory(prefix="higgs-benchmark-") as folder:
        arguments.folder = Path(folder)
        arguments.model = checkpoint.resolve_checkpoint(arguments, arguments.folder / "model")
        write_scripts(arguments.folder / "scripts.jsonl", arguments.scripts)
        in_process_runs, job_runs = [], []
        for number in range(arguments.rounds):
            in_process_runs.append(_run_part(arguments, "alone"))
            job_runs.append(_run_job(arguments, arguments.folder / f"out{number}"))
        rows = _run_part(arguments, "rows") if arguments.rows else {}

    def median(runs: list[dict[str, Any]], name: str) -> float:
        return statistics.median(run[name] for run in runs)

    ratios = [
        job["audio_s_per_s"] / alone["audio_s_per_s"] for job, alone in zip(job_runs, in_process_runs, strict=True)
    ]
    result = {
        "scripts": arguments.scripts,
        "audio_s": job_runs[0]["audio_s"],
        "alone_audio_s_per_s": median(in_process_runs, "audio_s_per_s"),
        "job_audio_s_per_s": median(job_runs, "audio_s_per_s"),
        "ratio": statistics.median(ratios),
        "occupancy_alone": median(in_process_runs, "occupancy"),
        "occupancy_job": median(job_runs, "occupancy"),
        "occupancy_job_while_rows_waited": median(job_runs, "occupancy_while_rows_waited"),
        "start_up_s": statistics.median(job["elapsed_s"] - job["working_s"] for job in job_runs),
        **rows,
    }
    for name, value in result.items():
        print(f"{name:>32}  {value:.3f}" if isinstance(value, float) else f"{name:>32}  {value}")
    return result


def write_scripts(path: Path, count: int) -> None:
    """Write a realistic manifest: most scripts are a few sentences, some take minutes."""
    draw, words = random.Random(0), _WORDS.split()
    with path.open("w") as file:
        for number in range(count):
            sentences = max(1, min(round(draw.lognormvariate(1.2, 0.9)), 40))
            text = " ".join(f"{' '.join(draw.choices(words, k=draw.randrange(5, 14)))}." for _ in range(sentences))
            file.write(json.dumps({"id": f"script-{number:05d}", "text": text, "seed": number}) + "\n")


def _job_flags(arguments: argparse.Namespace, manifest: Path, output: Path, workers: int = 1) -> list[str]:
    return [
        *("--manifest", str(manifest), "--output", str(output), "--model", arguments.model),
        *("--max-batch", str(arguments.slots), "--workers", str(workers), "--attempts", "1"),
        # With random weights some scripts come out silent and fail, in both runs.
        *("--max-failed", "100%"),
    ]


# ---------------------------------------------------------------------- one process, no Ray


def measure_in_process(arguments: argparse.Namespace) -> dict[str, Any]:
    """Synthesize all scripts concurrently in this process, longest first."""
    settings = parse_settings(_job_flags(arguments, arguments.folder / "scripts.jsonl", arguments.folder / "none"))
    synthesizer = load_synthesizer(settings, WorkerResources(arguments.slots, threads=2))
    processor = RowProcessor(settings)
    plans = [processor.validate(row).plan for row in open_manifest(settings.manifest).rows()]
    plans.sort(key=lambda plan: -sum(len(chunk.text) for chunk in plan.chunks))
    samples = 0

    async def synthesize_all() -> None:
        limit = asyncio.Semaphore(ROWS_PER_SLOT * arguments.slots)

        async def synthesize(plan: Any) -> None:
            nonlocal samples
            async with limit:
                async for piece in synthesizer.stream(plan):
                    samples += len(piece.samples_N)

        await asyncio.gather(*map(synthesize, plans))

    start_s = time.perf_counter()
    asyncio.run(synthesize_all())
    seconds = time.perf_counter() - start_s
    occupancy = synthesizer.metrics()["occupancy"]
    synthesizer.close()
    return {"audio_s_per_s": samples / synthesizer.sample_rate / seconds, "occupancy": occupancy}


# ---------------------------------------------------------------------- the job


def _run_job(arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    flags = _job_flags(arguments, arguments.folder / "scripts.jsonl", output)
    command = [sys.executable, "-m", "jobs.synthesize", *flags]
    environment = os.environ | {"RAY_ADDRESS": ""}
    subprocess.run(command, check=True, env=environment)
    summary: dict[str, Any] = json.loads((output / "job.json").read_text())
    return summary


# ---------------------------------------------------------------------- rows without synthesis time


def build_instant_synthesizer(settings: JobSettings, resources: WorkerResources) -> SynthesizerProtocol:
    """Return a synthesizer that takes no time; each row is a few samples long."""
    return FakeSynthesizer(chars_per_s=_FAST_CHARS_PER_S)


def measure_rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the full pipeline with one worker per core and the driver in this process, and sample the driver's memory."""
    from jobs.synthesize.cli import run as run_job

    manifest = arguments.folder / "rows.jsonl"
    with manifest.open("w") as file:
        for number in range(arguments.rows):
            file.write(json.dumps({"id": f"row-{number:07d}", "text": f"Row {number} says a few words."}) + "\n")
    settings = parse_settings(_job_flags(arguments, manifest, arguments.folder / "rows", workers=os.cpu_count() or 1))
    memory_bytes: list[int] = []
    finished = threading.Event()

    def sample_memory() -> None:
        while not finished.wait(1.0):
            memory_bytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

    sampler = threading.Thread(target=sample_memory, daemon=True)
    sampler.start()
    os.environ["RAY_ADDRESS"] = ""
    with contextlib.redirect_stderr(sys.stdout):
        run_job(settings, open_manifest(settings.manifest), build_instant_synthesizer)
    finished.set()
    sampler.join()
    summary = json.loads((arguments.folder / "rows" / "job.json").read_text())
    second_half_bytes = memory_bytes[len(memory_bytes) // 2 :] or [0]
    return {
        "rows": summary["ok"] + summary["flagged"],
        "rows_per_s": summary["rows"] / summary["working_s"],
        "driver_peak_mb": max(memory_bytes, default=0) / 1e6,
        "driver_growth_in_second_half_mb": (max(second_half_bytes) - second_half_bytes[0]) / 1e6,
    }


def _run_part(arguments: argparse.Namespace, part: str) -> dict[str, Any]:
    """Run one part of this benchmark in its own process and return its result."""
    command = [
        *(sys.executable, "-m", "jobs.benchmark", "job", "--part", part, "--folder", str(arguments.folder)),
        *("--model", arguments.model, "--slots", str(arguments.slots), "--rows", str(arguments.rows)),
    ]
    completed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(completed.stdout.strip().splitlines()[-1])
    return result
