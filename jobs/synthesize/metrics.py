"""Prometheus metrics of a batch job, exported by its driver through Ray as `ray_higgs_job_…`.

In: the totals and the engines' metrics, every half second. Rows and audio are counters; current values are gauges. All
have the run as a label, and engine metrics also the worker.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from jobs.synthesize.ledger import Totals

STATES = ("ok", "flagged", "failed", "skipped")
ENGINE = ("running", "queued", "slots", "occupancy", "kv_blocks_used", "kv_blocks", "preemptions")
_NAME_CHARS = 8


class JobMetrics:
    """The metrics of one run."""

    def __init__(self, run_id: str) -> None:
        self._run = {"run": run_id}
        self._exported = Totals()
        self._rows = Counter("higgs_job_rows", description="rows finished, by status", tag_keys=("run", "status"))
        self._audio = Counter("higgs_job_audio_seconds", description="seconds of audio generated", tag_keys=("run",))
        self._wanted = Gauge("higgs_job_rows_wanted", description="rows in the manifest", tag_keys=("run",))
        self._engine = {
            name: Gauge(f"higgs_job_engine_{name}", description=f"{name} of an engine", tag_keys=("run", "worker"))
            for name in ENGINE
        }

    def update(self, totals: Totals, engines: Mapping[str, Mapping[str, float]]) -> None:
        """Export what has changed since the last call."""
        for state in STATES:
            if more := getattr(totals, state) - getattr(self._exported, state):
                self._rows.inc(more, self._run | {"status": state})
        if totals.audio_s > self._exported.audio_s:
            self._audio.inc(totals.audio_s - self._exported.audio_s, self._run)
        self._wanted.set(totals.rows, self._run)
        for worker, metrics in engines.items():
            for name in ENGINE:
                if name in metrics:
                    self._engine[name].set(metrics[name], self._run | {"worker": worker[:_NAME_CHARS]})
        self._exported = totals
