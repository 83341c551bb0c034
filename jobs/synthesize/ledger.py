"""Tracks which rows are done, running, or must not be retried: the single actor that all workers call.

    worker:  claim(row) ─▶ RUN | SKIP | …      …synthesis…      commit(result) ─▶ the result is stored

A worker claims a row before it starts to synthesize it, so a row that is claimed again without having been committed
has lost its worker. Which of a lost worker's rows was the cause is unknown, so all of them are suspects. A suspect is
retried with no other suspect on the same worker; if it loses a second worker, which also ran other rows, it is retried
alone. A row fails because of lost workers only if it lost at least two, and was the only row on the last one.

Results are written as they arrive, in batches when they arrive fast. A commit returns only after its results are
stored.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from jobs.storage.backends import open_storage
from jobs.storage.result_table import ResultTable
from jobs.synthesize.call_batching import CallBatcher

DUPLICATE = "duplicate_id"
"""`error_type` of a row that has the same id as an earlier row of the manifest."""
MAX_LOST_WORKERS = 2
"""Workers that a row may lose before it fails, if it ran alone on the last one."""
_EXTRA_LOADING_FAILURES = 3
"""Workers that may die while loading the model before the job fails, in addition to the number of workers."""
_MIN_COMMIT_INTERVAL_S, _MAX_COMMIT_INTERVAL_S, _COMMITS_PER_RUN = 0.2, 10.0, 500


class Admission(enum.Enum):
    """Whether a worker may run a row, and with which other rows running on it."""

    RUN = "run"
    RUN_AS_SUSPECT = "run_as_suspect"
    """The row was running when a worker was lost: run it with no other suspect on the worker."""
    RUN_ALONE = "run_alone"
    """The row was running whenever two workers were lost: run it with no other row on the worker."""
    SKIP = "skip"
    """The row is done, in this run or an earlier one."""
    REJECT = "reject"
    """The row has lost too many workers."""
    DEFER = "defer"
    """The job is stopping; the next run will process the row."""

    @property
    def runs(self) -> bool:
        """Whether the worker may run the row, in some mode."""
        return self in (Admission.RUN, Admission.RUN_AS_SUSPECT, Admission.RUN_ALONE)


@dataclasses.dataclass(frozen=True)
class RowClaim:
    """A worker's request to run a row.

    Attributes:
        number: number of the row in the manifest.
        row_id: the row's `id`.
        worker: name of the worker, unique per process: a restarted worker has a new one.
        mode: the mode that the worker is ready to run the row in: RUN, RUN_AS_SUSPECT or RUN_ALONE.
        chars: approximate length of the row's text.
    """

    number: int
    row_id: str
    script_sha256: str
    worker: str
    mode: Admission = Admission.RUN
    chars: int = 0


@dataclasses.dataclass
class Totals:
    """Counts of rows, characters and audio so far.

    Attributes:
        skipped: rows that an earlier run finished.
        chars_done: characters of the rows that this run finished.
        working_s: seconds from when the first worker had loaded the model to the latest result.
    """

    rows: int = 0
    chars: int = 0
    ok: int = 0
    flagged: int = 0
    failed: int = 0
    skipped: int = 0
    audio_s: float = 0.0
    chars_done: int = 0
    chars_skipped: int = 0
    working_s: float = 0.0

    @property
    def ended(self) -> int:
        return self.ok + self.flagged + self.failed + self.skipped


class Ledger:
    """The state of all rows of one run. Jobs run it as a Ray actor; it is plain asyncio, so that tests need no cluster.

    Args:
        output: path or URI of the job's output folder.
        schema: schema of the results.
        run_id: unique per run; the latest run owns the output folder.
        overwrite: delete the results of earlier runs instead of resuming.
    """

    def __init__(self, output: str, schema: pa.Schema, run_id: str, *, overwrite: bool = False) -> None:
        self._results = ResultTable(open_storage(output), schema, run_id)
        self._results.take_ownership()
        if overwrite:
            self._results.clear()
        else:
            self._results.load()
        self.totals = Totals()
        self._ended, self._num_workers = bytearray(), 0
        self._claims: dict[int, tuple[int, str]] = {}
        """For each claimed row without a result: the number of claims, and the latest worker."""
        self._rows_of: dict[str, set[int]] = {}
        """For each worker: the rows that it is running, or was running when it was lost."""
        self._loading: set[str] = set()
        self._lost_loading: set[str] = set()
        self._draining, self._failure_reason = False, ""
        self._outdated = CallBatcher(self._remove, _MIN_COMMIT_INTERVAL_S)
        self._commits = CallBatcher(self._append, _MIN_COMMIT_INTERVAL_S)
        self._storage_lock = asyncio.Lock()
        self._started_s, self._ready_s = time.monotonic(), 0.0
        self._engines: dict[str, dict[str, float]] = {}

    def set_expected(self, rows: int, chars: int, num_workers: int) -> int:
        """Set the size of the job; return the number of rows that earlier runs finished."""
        self.totals.rows, self.totals.chars = rows, chars
        self._ended, self._num_workers = bytearray(rows), num_workers
        return len(self._results.finished)

    def worker_loading(self, worker: str) -> None:
        """Record that a worker starts to load the model."""
        self._loading.add(worker)

    def worker_loaded(self, worker: str) -> None:
        """Record that a worker has loaded the model; earlier failures to load it no longer count."""
        self._loading.discard(worker)
        self._ready_s = self._ready_s or time.monotonic()
        self._lost_loading.clear()

    async def claim(self, claims: Sequence[RowClaim]) -> list[Admission]:
        """Decide about rows that a worker wants to run.

        Returns:
            One decision per claim. If it equals the claim's mode, the worker must run the row now; otherwise it must
            not.

        Raises:
            RuntimeError: too many workers have died while they loaded the model.
        """
        return list(await asyncio.gather(*map(self._claim, claims)))

    async def _claim(self, claim: RowClaim) -> Admission:
        number = claim.number
        if self._ended[number]:
            return Admission.SKIP
        if self._draining:
            return Admission.DEFER
        finished = self._results.finished.get(claim.row_id)
        if finished is not None:
            if finished.script_sha256 == claim.script_sha256:
                self._ended[number] = 1
                self.totals.skipped += 1
                self.totals.chars_skipped += claim.chars
                return Admission.SKIP
            await self._outdated.call(claim.row_id)
        num_lost, admission = self._admit(number)
        if admission is claim.mode:
            self._claims[number] = num_lost + 1, claim.worker
            self._rows_of.setdefault(claim.worker, set()).add(number)
        return admission

    def _admit(self, number: int) -> tuple[int, Admission]:
        """Return the number of workers that a row has lost, and whether and how it may run."""
        if number not in self._claims:
            return 0, Admission.RUN
        num_lost, worker = self._claims[number]
        if worker in self._loading:
            self._lost_loading.add(worker)
            if len(self._lost_loading) > self._num_workers + _EXTRA_LOADING_FAILURES:
                raise RuntimeError(
                    f"{len(self._lost_loading)} workers died while they loaded the model; "
                    "most likely it does not fit into memory"
                )
            return num_lost - 1, Admission.RUN if num_lost == 1 else Admission.RUN_AS_SUSPECT
        if num_lost < MAX_LOST_WORKERS:
            return num_lost, Admission.RUN_AS_SUSPECT
        return num_lost, Admission.REJECT if self._rows_of[worker] == {number} else Admission.RUN_ALONE

    async def commit(self, results: Sequence[tuple[int, int, Mapping[str, Any]]]) -> None:
        """Store results, each a row number, number of characters and result row; they are durable when this returns."""
        await asyncio.gather(*(self._commit(*result) for result in results))

    async def _commit(self, number: int, chars: int, row: Mapping[str, Any]) -> None:
        # A worker may have been lost after its result was stored and before Ray noticed.
        if self._ended[number]:
            return
        self._ended[number] = 1
        _, worker = self._claims.pop(number, (0, ""))
        self._rows_of.get(worker, set()).discard(number)
        if row["id"] in self._results.finished and row["error_type"] != DUPLICATE:
            # An earlier run finished it, and it has become invalid since.
            await self._outdated.call(row["id"])
        self._count(chars, row)
        await self._commits.call(row)

    async def _append(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[None]:
        """Write a batch. The longer a run, the longer rows are collected, so that the number of files stays bounded."""
        running_s = time.monotonic() - self._started_s
        self._commits.delay_s = min(max(running_s / _COMMITS_PER_RUN, _MIN_COMMIT_INTERVAL_S), _MAX_COMMIT_INTERVAL_S)
        async with self._storage_lock:
            await asyncio.to_thread(self._results.append, rows)
        return [None] * len(rows)

    async def _remove(self, row_ids: Sequence[str]) -> Sequence[None]:
        async with self._storage_lock:
            await asyncio.to_thread(self._results.remove, row_ids)
        return [None] * len(row_ids)

    def _count(self, chars: int, row: Mapping[str, Any]) -> None:
        status = str(row["status"])
        setattr(self.totals, status, getattr(self.totals, status) + 1)
        self.totals.audio_s += float(row.get("duration_s") or 0.0)
        self.totals.chars_done += chars
        if self._ready_s:
            self.totals.working_s = time.monotonic() - self._ready_s

    def report_engine(self, worker: str, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a worker's engine, and the last occupancy while unclaimed rows were left."""
        recorded = dict(metrics)
        if "occupancy" in recorded:
            previous = self._engines.get(worker, {}).get("occupancy_while_rows_waited", recorded["occupancy"])
            waiting = self.totals.rows - self.totals.ended - len(self._claims)
            recorded["occupancy_while_rows_waited"] = recorded["occupancy"] if waiting > 0 else previous
        self._engines[worker] = recorded

    def report_failure(self, reason: str) -> None:
        """Record why the job cannot continue; only the first reason is stored."""
        self._failure_reason = self._failure_reason or reason

    def failure_reason(self) -> str:
        """Return why the job failed, in one line; empty if no worker reported it."""
        return self._failure_reason

    def drain(self) -> None:
        """Admit no more rows."""
        self._draining = True

    async def flush(self) -> None:
        """Wait until every committed result is stored, even if the worker that committed it has been lost since."""
        await self._commits.drain()

    def snapshot(self) -> tuple[Totals, dict[str, dict[str, float]]]:
        """Return the totals so far, and the metrics of each worker's engine."""
        return self.totals, self._engines
