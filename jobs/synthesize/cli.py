"""The batch job: a manifest of scripts in; audio files, a result table and a summary out.

    python -m jobs.synthesize --manifest scripts.parquet --output out

Exit status: 0 every row is ok or flagged · 1 the job itself failed, or was stopped · 2 invalid arguments or unreadable
manifest, reported in one line before any model is loaded · 3 finished, but more rows failed than `--max-failed` allows.
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
from jobs.runtime.cli import USAGE_ERROR, print_status
from jobs.runtime.ray_cluster import connect
from jobs.storage.backends import open_storage
from jobs.storage.manifest import Manifest, open_manifest
from jobs.storage.result_table import RESULTS
from jobs.synthesize.dry_run import dry_run
from jobs.synthesize.progress import Progress, format_duration
from jobs.synthesize.row_processing import RowProcessor
from jobs.synthesize.settings import JobSettings, describe_sources, resolve_settings
from jobs.synthesize.synthesizer_factory import check_local_model, find_check, load_synthesizer

OK, JOB_FAILED, TOO_MANY_FAILED = 0, 1, 3
MODEL_LICENCE = "Boson Higgs Audio 2 Community License"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that a command line describes; return the exit status."""
    try:
        settings, sources = resolve_settings(sys.argv[1:] if arguments is None else arguments)
        manifest = open_manifest(settings.manifest)
        if settings.dry_run:
            return dry_run(settings, manifest)
        # Fail early if anything cannot be opened.
        RowProcessor(settings)
        if settings.check is not None:
            find_check(settings.check)
        if not os.environ.get("RAY_ADDRESS"):
            check_local_model(settings.model)
    except (HiggsError, OSError) as error:
        print_status(f"error: {error}")
        return USAGE_ERROR
    print_status(describe_sources(settings, sources))
    return run(settings, manifest)


def run(settings: JobSettings, manifest: Manifest, factory: Any = None) -> int:
    """Run a job with valid settings; return the exit status.

    Args:
        factory: a `SynthesizerFactory`; default: `load_synthesizer`.
    """
    import ray

    from jobs.synthesize.pipeline import JobRun

    owns_ray = not ray.is_initialized()
    if owns_ray:
        connect()
    started_at, start_s = datetime.now(UTC), time.monotonic()
    output = open_storage(settings.output)
    output.remove_partial("audio")
    stop, job = GracefulStop(settings.grace_s), None
    try:
        run_id = f"{started_at:%Y%m%d%H%M%S}-{uuid.uuid4().hex[:6]}"
        # An existing cluster may grow, by autoscaling or by hand; a local one does not.
        local = owns_ray and not os.environ.get("RAY_ADDRESS")
        job = JobRun(settings, manifest, factory or load_synthesizer, run_id, fixed_size=local)
        print_status(f"{job.num_rows} rows, {job.pool.num_workers} workers with {job.pool.slots} slots each")
        if job.num_finished:
            print_status(f"{job.num_finished} rows were finished by earlier runs; --overwrite does them again")
        with stop.draining(job.ledger):
            job.execute(Progress())
        totals, engines = ray.get(job.ledger.snapshot.remote())
        for subfolder in ("audio", RESULTS):
            output.remove_partial(subfolder)
    except KeyboardInterrupt:
        print_status("stopped; run the same command again to resume")
        return JOB_FAILED
    except HiggsError as error:
        print_status(f"error: {error}")
        return USAGE_ERROR
    except Exception as error:  # noqa: BLE001  (reported in one line here, and in full in Ray's logs)
        print_status(f"error: the job failed: {(job and job.failure_reason()) or _last_line(error)}")
        return JOB_FAILED
    finally:
        if owns_ray:
            ray.shutdown()
    summary = summarize(settings, totals, engines, started_at, time.monotonic() - start_s)
    output.write("job.json", json.dumps(summary, indent=2).encode())
    return report(settings, output.locate(RESULTS), summary, stopped=stop.requested.is_set())


class GracefulStop:
    """Handles SIGTERM: no more rows start, and running rows have `grace_s` seconds to finish before SIGINT."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s, self.requested = grace_s, threading.Event()
        self._ledger: Any = None

    def draining(self, ledger: Any) -> GracefulStop:
        """Return a context manager in which SIGTERM drains a job's ledger."""
        self._ledger = ledger
        return self

    def __enter__(self) -> None:
        self._previous_handler = signal.signal(signal.SIGTERM, self._drain)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous_handler)

    def _drain(self, number: int, frame: FrameType | None) -> None:
        if self.requested.is_set():
            return
        self.requested.set()
        print_status(f"received SIGTERM: running rows have {self._grace_s:.0f} s to finish")
        self._ledger.drain.remote()
        timer = threading.Timer(self._grace_s, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()


def summarize(
    settings: JobSettings, totals: Any, engines: dict[str, dict[str, float]], started_at: datetime, seconds: float
) -> dict[str, Any]:
    """Return the content of `job.json`: totals, throughput, settings and versions."""
    metrics = list(engines.values())
    return {
        "started": started_at.isoformat(timespec="seconds"),
        "elapsed_s": round(seconds, 3),
        "working_s": round(totals.working_s, 3),
        "rows": totals.rows,
        "ok": totals.ok,
        "flagged": totals.flagged,
        "failed": totals.failed,
        "skipped": totals.skipped,
        "audio_s": round(totals.audio_s, 3),
        "audio_s_per_s": round(totals.audio_s / totals.working_s, 3) if totals.working_s else 0.0,
        "occupancy": _mean(metrics, "occupancy"),
        "occupancy_while_rows_waited": _mean(metrics, "occupancy_while_rows_waited"),
        "engines": engines,
        "settings": settings.model_dump(),
        "model_licence": MODEL_LICENCE,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "ray", "pyarrow")}
        | {"python": platform.python_version(), "higgs-audio-batch": importlib.metadata.version("higgs-audio-batch")},
    }


def _mean(engines: Sequence[Mapping[str, float]], name: str) -> float | None:
    return round(sum(metrics.get(name, 0.0) for metrics in engines) / len(engines), 3) if engines else None


def report(settings: JobSettings, results: str, summary: dict[str, Any], *, stopped: bool) -> int:
    """Print the summary of a run; return the exit status."""
    print_status(
        f"{summary['ok']} ok, {summary['flagged']} flagged, {summary['failed']} failed, "
        f"{summary['skipped']} already done; "
        f"{summary['audio_s'] / 3600:.2f} h of audio in {format_duration(summary['elapsed_s'])} "
        f"({summary['audio_s_per_s']:.1f} audio s/s); results are in {results}"
    )
    if stopped:
        print_status("stopped before the end; run the same command again to resume")
        return JOB_FAILED
    allowed = settings.allowed_failures(summary["rows"])
    if summary["failed"] > allowed:
        failed = summary["failed"]
        print_status(f"{failed} rows failed, --max-failed allows {allowed}; see error_type and error in {results}")
        return TOO_MANY_FAILED
    return OK


def _last_line(error: Exception) -> str:
    """Return the last line of an error; the messages of Ray's errors contain entire tracebacks."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:300]}"
