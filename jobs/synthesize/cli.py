"""The batch job: a manifest of scripts in; audio files, a table of results and a summary out.

    python -m jobs.synthesize --manifest scripts.parquet --output out

Exit status: 0 every row ok or flagged · 1 the job itself broke, or was stopped · 2 bad arguments or no manifest, said
in one line before any model is loaded · 3 finished, but more rows failed than `--max-failed` allows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from higgs_model.errors import HiggsError
from jobs.runtime.cli import BAD_ARGUMENTS, say
from jobs.runtime.ray_cluster import connect
from jobs.storage.backends import open_folder
from jobs.storage.manifest import Manifest, open_manifest
from jobs.storage.result_table import RESULTS
from jobs.synthesize.dry_run import dry_run
from jobs.synthesize.progress import Progress, format_duration
from jobs.synthesize.row_processing import RowMaker
from jobs.synthesize.settings import JobSettings, describe_sources, resolve_settings
from jobs.synthesize.synthesizer_factory import check_local_model, find_check, load_synthesizer

OK, BROKEN, TOO_MANY_FAILED = 0, 1, 3
MODEL_LICENCE = "Boson Higgs Audio 2 Community License"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the command line describes; gives the exit status."""
    try:
        settings, sources = resolve_settings(sys.argv[1:] if arguments is None else arguments)
        manifest = open_manifest(settings.manifest)
        if settings.dry_run:
            return dry_run(settings, manifest)
        # Whatever cannot be opened is said now.
        RowMaker(settings)
        if settings.check is not None:
            find_check(settings.check)
        if not os.environ.get("RAY_ADDRESS"):
            check_local_model(settings.model)
    except (HiggsError, OSError) as error:
        say(f"error: {error}")
        return BAD_ARGUMENTS
    say(describe_sources(settings, sources))
    return run(settings, manifest)


def run(settings: JobSettings, manifest: Manifest, factory: Any = None) -> int:
    """Run a job whose arguments are good.

    Args:
        factory: builds the workers' synthesizers; by default `load_synthesizer`.
    """
    import ray

    from jobs.synthesize.pipeline import Run

    own = not ray.is_initialized()
    if own:
        connect()
    started, start_s = datetime.now(UTC), time.monotonic()
    folder = open_folder(settings.output)
    folder.sweep("audio")
    stop, job = Stop(settings.grace_s), None
    try:
        run_id = f"{started:%Y%m%d%H%M%S}-{uuid.uuid4().hex[:6]}"
        # A cluster that was joined may grow, be it that somebody adds machines or that they are asked for.
        alone = own and not os.environ.get("RAY_ADDRESS")
        job = Run(settings, manifest, factory or load_synthesizer, run_id, fixed=alone)
        say(f"{job.num_rows} rows, {job.pool.workers} workers with {job.pool.slots} slots each")
        if job.found_done:
            say(f"{job.found_done} rows are done from earlier runs; --overwrite makes them again")
        with stop.watching(job.ledger):
            job.execute(Progress())
        totals, engines = ray.get(job.ledger.snapshot.remote())
        for place in ("audio", RESULTS):
            folder.sweep(place)
    except KeyboardInterrupt:
        say("stopped; run the same command again to go on")
        return BROKEN
    except HiggsError as error:
        say(f"error: {error}")
        return BAD_ARGUMENTS
    except Exception as error:  # noqa: BLE001  (whatever broke the job is said in a line, and in Ray's logs at length)
        say(f"error: the job broke: {(job and job.reason()) or _last_line(error)}")
        return BROKEN
    finally:
        if own:
            ray.shutdown()
    summary = summarize(settings, totals, engines, started, time.monotonic() - start_s)
    folder.put("job.json", json.dumps(summary, indent=2).encode())
    return report(settings, folder.locate(RESULTS), summary, stopped=stop.asked.is_set())


class Stop:
    """A job that was told to end: rows under way may finish, for a while."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s, self.asked = grace_s, threading.Event()
        self._ledger: Any = None

    def watching(self, ledger: Any) -> Stop:
        """Listen to SIGTERM while the job runs."""
        self._ledger = ledger
        return self

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._drain)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _drain(self, number: int, frame: FrameType | None) -> None:
        if self.asked.is_set():
            return
        self.asked.set()
        say(f"told to stop: rows under way have {self._grace_s:.0f} s to end")
        self._ledger.drain.remote()
        timer = threading.Timer(self._grace_s, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()


def summarize(
    settings: JobSettings, totals: Any, engines: dict[str, dict[str, float]], started: datetime, seconds: float
) -> dict[str, Any]:
    """What `job.json` holds."""
    numbers = list(engines.values())
    return {
        "started": started.isoformat(timespec="seconds"),
        "elapsed_s": round(seconds, 3),
        "working_s": round(totals.working_s, 3),
        "rows": totals.rows,
        "ok": totals.ok,
        "flagged": totals.flagged,
        "failed": totals.failed,
        "skipped": totals.skipped,
        "audio_s": round(totals.audio_s, 3),
        "audio_s_per_s": round(totals.audio_s / totals.working_s, 3) if totals.working_s else 0.0,
        "occupancy": _mean(numbers, "occupancy"),
        "occupancy_while_rows_waited": _mean(numbers, "occupancy_while_rows_waited"),
        "engines": engines,
        "settings": settings.model_dump(),
        "model_licence": MODEL_LICENCE,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "ray", "pyarrow")}
        | {"python": platform.python_version(), "higgs-audio-batch": importlib.metadata.version("higgs-audio-batch")},
    }


def _mean(engines: Sequence[Mapping[str, float]], name: str) -> float | None:
    return round(sum(one.get(name, 0.0) for one in engines) / len(engines), 3) if engines else None


def report(settings: JobSettings, results: str, summary: dict[str, Any], *, stopped: bool) -> int:
    """Say how it went; gives the exit status."""
    say(
        f"{summary['ok']} ok, {summary['flagged']} flagged, {summary['failed']} failed, "
        f"{summary['skipped']} already done; "
        f"{summary['audio_s'] / 3600:.2f} h of audio in {format_duration(summary['elapsed_s'])} "
        f"({summary['audio_s_per_s']:.1f} audio s/s); results are in {results}"
    )
    if stopped:
        say("stopped before the end; run the same command again to go on")
        return BROKEN
    allowed = settings.allowed_failures(summary["rows"])
    if summary["failed"] > allowed:
        say(f"{summary['failed']} rows failed and {allowed} may; see the columns error_type and error of {results}")
        return TOO_MANY_FAILED
    return OK


def _last_line(error: Exception) -> str:
    """Of an error, whose text may be a whole traceback, what it said itself."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:300]}"
