"""Prometheus metrics of a batch job, exported by its driver through Ray as `ray_higgs_job_…`.

In: the totals and the engines' metrics, every half second. Rows and audio are counters, current values are gauges. All
metrics have the label `run`; engine metrics also have `worker`.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from jobs.synthesize.ledger import Totals

STATUSES = ("ok", "flagged", "failed", "skipped")
ENGINE_METRICS = ("running", "queued", "slots", "occupancy", "kv_blocks_used", "kv_blocks", "preemptions")
_WORKER_LABEL_CHARS = 8


class JobMetrics:
    """The metrics of one run."""

    def __init__(self, run_id: str) -> None:
        self._run_label = {"run": run_id}
        self._exported = Totals()
        self._rows_counter = Counter(
            "higgs_job_rows", description="rows finished, by status", tag_keys=("run", "status")
        )
        self._audio_counter = Counter(
            "higgs_job_audio_seconds", description="seconds of audio generated", tag_keys=("run",)
        )
        self._rows_wanted = Gauge("higgs_job_rows_wanted", description="rows in the manifest", tag_keys=("run",))
        self._engine_gauges = {
            name: Gauge(f"higgs_job_engine_{name}", description=f"{name} of an engine", tag_keys=("run", "worker"))
            for name in ENGINE_METRICS
        }

    def update(self, totals: Totals, engines: Mapping[str, Mapping[str, float]]) -> None:
        """Export what has changed since the last call."""
        for status in STATUSES:
            if increase := getattr(totals, status) - getattr(self._exported, status):
                self._rows_counter.inc(increase, self._run_label | {"status": status})
        if totals.audio_s > self._exported.audio_s:
            self._audio_counter.inc(totals.audio_s - self._exported.audio_s, self._run_label)
        self._rows_wanted.set(totals.rows, self._run_label)
        for worker, metrics in engines.items():
            for name in ENGINE_METRICS:
                if name in metrics:
                    self._engine_gauges[name].set(
                        metrics[name], self._run_label | {"worker": worker[:_WORKER_LABEL_CHARS]}
                    )
        self._exported = totals
