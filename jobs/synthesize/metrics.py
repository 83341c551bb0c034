"""What a batch job tells Prometheus, from its driver, by way of Ray: as `ray_higgs_job_…` on the head's metrics port.

In: totals and engines' numbers, as they are told every half second. Rows and audio are counters, of which Prometheus
takes rates; what is true now is a gauge. Each carries the run; an engine's numbers also carry its worker.
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
        self._told = Totals()
        self._rows = Counter("higgs_job_rows", description="rows that have ended", tag_keys=("run", "status"))
        self._audio = Counter("higgs_job_audio_seconds", description="seconds of audio made", tag_keys=("run",))
        self._wanted = Gauge("higgs_job_rows_wanted", description="rows of the manifest", tag_keys=("run",))
        self._engine = {
            name: Gauge(f"higgs_job_engine_{name}", description=f"{name} of an engine", tag_keys=("run", "worker"))
            for name in ENGINE
        }

    def show(self, totals: Totals, engines: Mapping[str, Mapping[str, float]]) -> None:
        """Export what has changed."""
        for state in STATES:
            if more := getattr(totals, state) - getattr(self._told, state):
                self._rows.inc(more, self._run | {"status": state})
        if totals.audio_s > self._told.audio_s:
            self._audio.inc(totals.audio_s - self._told.audio_s, self._run)
        self._wanted.set(totals.rows, self._run)
        for worker, numbers in engines.items():
            for name in ENGINE:
                if name in numbers:
                    self._engine[name].set(numbers[name], self._run | {"worker": worker[:_NAME_CHARS]})
        self._told = totals
