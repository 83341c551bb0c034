"""Runs a job on a Ray cluster: Ray Data reads the manifest and schedules units of rows onto a pool of worker actors.

    blocks ─▶ scan every row (id, length) ─▶ units, longest first ─▶ workers ─▶ ledger ─▶ results

Rows stay in the object store; the driver holds only a few numbers per row. A unit is one long row or several short
ones, because Ray schedules only some hundred tasks per second. Results are stored when a row ends, not when its unit
does.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from higgs_model.errors import BadInput
from jobs.runtime.ray_cluster import THREADS_PER_CPU_WORKER
from jobs.storage.manifest import LINE, Manifest, estimate_chars, parse_lines
from jobs.storage.result_table import result_schema
from jobs.synthesize.ledger import Ledger
from jobs.synthesize.metrics import JobMetrics
from jobs.synthesize.progress import Progress
from jobs.synthesize.settings import JobSettings
from jobs.synthesize.synthesizer_factory import WorkerResources
from jobs.synthesize.worker import ROWS_PER_SLOT, RowLocation, SynthesisWorker, SynthesizerFactory

_UNIT_CHARS = 900
"""Maximum text length of a unit with several rows: about a minute of speech."""
_MAX_UNIT_ROWS = 64
_MIN_UNITS_PER_CALL = 8
"""Rows share a unit only if at least this many units per concurrent row remain."""
_MAX_UNITS = 20_000
_CPU_SLOTS, _CUDA_SLOTS = 16, 192
_MAX_LOST_NODES = 10
_POLL_INTERVAL_S, _REASON_TIMEOUT_S = 0.5, 10.0


class WorkerPool:
    """The number of workers of a job and the resources of each, from the settings and the cluster.

    Args:
        fixed_size: the cluster cannot grow.

    Raises:
        BadInput: the cluster cannot grow, and has too few GPUs.
    """

    def __init__(self, settings: JobSettings, *, fixed_size: bool) -> None:
        resources = ray.cluster_resources()
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 1.0)
        self.gpus_per_worker = (
            settings.gpus_per_worker if settings.gpus_per_worker is not None else (1.0 if gpus else 0.0)
        )
        workers_by_gpu = int(gpus // self.gpus_per_worker) if self.gpus_per_worker else 0
        needed = self.gpus_per_worker * (settings.workers or 1)
        if fixed_size and needed > gpus:
            raise BadInput(
                f"{settings.workers or 1} workers with {self.gpus_per_worker:g} GPUs each need {needed:g}, and this "
                f"machine has {gpus:g}; lower --workers or --gpus-per-worker"
            )
        self.num_workers = settings.workers or max(
            workers_by_gpu if self.gpus_per_worker else int(cpus // THREADS_PER_CPU_WORKER), 1
        )
        self.slots = settings.max_batch or (_CUDA_SLOTS if self.gpus_per_worker else _CPU_SLOTS)
        # Leave a core for the tasks that read the manifest, even if there are only two.
        self.cpus_per_worker = 0 if self.gpus_per_worker or cpus <= self.num_workers else 1
        self.threads = None if self.gpus_per_worker else THREADS_PER_CPU_WORKER

    @property
    def rows_per_worker(self) -> int:
        """Concurrent rows per worker."""
        return ROWS_PER_SLOT * self.slots


def read_blocks(manifest: Manifest, limit: int | None) -> list[Any]:
    """Load the manifest into the object store; return references to tables of rows or lines, in order."""
    paths = list(manifest.paths)
    if manifest.kind == "parquet":
        dataset = ray.data.read_parquet(paths, filesystem=manifest.filesystem)
    else:
        files = ray.data.read_binary_files(paths, filesystem=manifest.filesystem)
        dataset = files.flat_map(lambda file: [{LINE: line} for line in file["bytes"].split(b"\n") if line.strip()])
    if limit is not None:
        dataset = dataset.limit(limit)
    return list(dataset.to_arrow_refs())


@ray.remote(num_cpus=1)
def scan_block(block: pa.Table) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return for every row of a block a hash of its id (0 if it has none) and the approximate length of its text."""
    if block.column_names == [LINE]:
        rows = [next(parse_lines(line), {}) for line in block[LINE].to_pylist()]
    else:
        rows = block.select([name for name in ("id", "text", "turns") if name in block.column_names]).to_pylist()
    ids = [_hash_id(row.get("id")) for row in rows]
    return np.array(ids, np.uint64), np.array([estimate_chars(row) for row in rows], np.int64)


def _hash_id(row_id: object) -> int:
    if not isinstance(row_id, str) or not row_id:
        return 0
    raw = row_id.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def plan_units(
    ids: Sequence[NDArray[np.uint64]], chars: Sequence[NDArray[np.int64]], pool: WorkerPool
) -> Iterator[list[RowLocation]]:
    """Yield units of rows in scheduling order: longest rows first, short ones grouped."""
    sizes = [len(block) for block in ids]
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    index_of = np.concatenate([np.arange(size) for size in sizes])
    all_ids, lengths = np.concatenate(ids), np.concatenate(chars)
    duplicate = np.ones(len(all_ids), bool)
    duplicate[np.unique(all_ids, return_index=True)[1]] = False
    duplicate &= all_ids != 0
    order = np.argsort(-lengths, kind="stable")
    total = len(order)
    max_rows = min(_MAX_UNIT_ROWS, total // (_MIN_UNITS_PER_CALL * pool.num_workers * pool.rows_per_worker))
    max_rows = max(max_rows, 1, math.ceil(total / _MAX_UNITS))
    unit: list[RowLocation] = []
    unit_chars = 0
    for number in order.tolist():
        full = len(unit) == max_rows or (unit_chars + lengths[number] > _UNIT_CHARS and total < _MAX_UNITS)
        if unit and full:
            yield unit
            unit, unit_chars = [], 0
        unit.append(RowLocation(number, int(block_of[number]), int(index_of[number]), bool(duplicate[number])))
        unit_chars += int(lengths[number])
    if unit:
        yield unit


class JobRun:
    """One run of a job on the cluster that Ray is connected to."""

    def __init__(
        self,
        settings: JobSettings,
        manifest: Manifest,
        factory: SynthesizerFactory,
        run_id: str,
        *,
        fixed_size: bool = False,
    ) -> None:
        self.settings, self.factory = settings, factory
        self._metrics = JobMetrics(run_id)
        context = DataContext.get_current()
        # A row may take hours, and a task ends with the last row of its unit.
        context.execution_no_progress_timeout_s = -1
        context.enable_progress_bars = False
        # Otherwise each running task starts a thread that polls the memory map of the process.
        context.memory_usage_poll_interval_s = None
        # The constructor loads nothing, so a worker that dies in it has lost its node.
        context.max_consecutive_actor_init_deaths = _MAX_LOST_NODES
        self.pool = WorkerPool(settings, fixed_size=fixed_size)
        self._blocks = read_blocks(manifest, settings.limit)
        scanned = ray.get([scan_block.remote(block) for block in self._blocks])
        self._ids, self._chars = [ids for ids, _ in scanned], [chars for _, chars in scanned]
        self.num_rows = sum(len(ids) for ids in self._ids)
        # On the driver's node, the loss of which ends the job anyway; Ray would place it on any node.
        driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.ledger = (
            ray.remote(Ledger)
            .options(num_cpus=0, max_concurrency=1000, scheduling_strategy=driver_node)
            .remote(settings.output, result_schema(manifest.schema), run_id, overwrite=settings.overwrite)
        )
        chars = int(sum(block.sum() for block in self._chars))
        self.num_finished: int = ray.get(self.ledger.set_expected.remote(self.num_rows, chars, self.pool.num_workers))

    def dataset(self) -> Dataset:
        """Return the lazy dataset whose execution is the job."""
        units = [{"unit": pickle.dumps(unit)} for unit in plan_units(self._ids, self._chars, self.pool)]
        # Every unit has at least one row, so this many concurrent calls keep all slots busy.
        max_calls = self.pool.rows_per_worker
        return ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
            SynthesisWorker,
            fn_constructor_kwargs={
                "settings": self.settings,
                "blocks": self._blocks,
                "ledger": self.ledger,
                "factory": self.factory,
                "resources": WorkerResources(self.pool.slots, self.pool.threads),
            },
            batch_size=1,
            num_gpus=self.pool.gpus_per_worker or None,
            num_cpus=self.pool.cpus_per_worker,
            compute=ActorPoolStrategy(
                size=self.pool.num_workers,
                max_concurrent_calls_per_actor=max_calls,
                max_tasks_in_flight_per_actor=max_calls,
            ),
        )

    def execute(self, progress: Progress) -> None:
        """Run the job to its end and report progress."""
        start_s, finished = time.monotonic(), threading.Event()

        def report() -> None:
            while not finished.wait(_POLL_INTERVAL_S):
                totals, engines = ray.get(self.ledger.snapshot.remote())
                progress.update(totals, time.monotonic() - start_s)
                self._metrics.update(totals, engines)

        reporter = threading.Thread(target=report, name="progress", daemon=True)
        reporter.start()
        try:
            for _ in self.dataset().iter_batches(batch_size=None, prefetch_batches=0):
                pass
            ray.get(self.ledger.flush.remote())
        finally:
            finished.set()
            reporter.join()
            progress.close()

    def failure_reason(self) -> str:
        """Return why the job failed, if a worker reported it; else an empty string."""
        try:
            reason: str = ray.get(self.ledger.failure_reason.remote(), timeout=_REASON_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            return ""
        return reason
