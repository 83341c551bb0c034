"""The job on a cluster: Ray Data reads the manifest, hands units of rows to a pool of workers, and waits for them.

    blocks ─▶ look at every row (id, length) ─▶ units, longest first ─▶ workers ─▶ ledger ─▶ results

Rows travel through the object store only; the driver holds a few numbers a row. A unit is one long row, or several
short ones: Ray hands out some hundred units a second, and rows may be shorter than that. Results are written when a
row ends, not when its unit does.
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
from jobs.runtime.ray_cluster import THREADS_A_CPU_WORKER
from jobs.storage.manifest import LINE, Manifest, estimated_chars, parse_lines
from jobs.storage.result_table import schema_for
from jobs.synthesize.ledger import Ledger
from jobs.synthesize.metrics import JobMetrics
from jobs.synthesize.progress import Progress
from jobs.synthesize.settings import JobSettings
from jobs.synthesize.synthesizer_factory import Capacity
from jobs.synthesize.worker import ROWS_A_SLOT, Factory, RowPlace, SynthesisWorker

_UNIT_CHARS = 900
"""About a minute of speech: what a unit of short rows has to say at most."""
_UNIT_ROWS = 64
_UNITS_A_WORKER = 8
"""Units that there should be for each row under way, before rows are put together."""
_MOST_UNITS = 20_000
_CPU_SLOTS, _CUDA_SLOTS = 16, 192
_LOST_MACHINES = 10
_POLL_S, _REASON_S = 0.5, 10.0


class Pool:
    """How many workers there are, and what each has.

    Args:
        fixed: whether the cluster will never be larger than it is now.

    Raises:
        BadInput: it cannot hold one.
    """

    def __init__(self, settings: JobSettings, *, fixed: bool) -> None:
        resources = ray.cluster_resources()
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 1.0)
        self.gpus_a_worker = (
            settings.gpus_per_worker if settings.gpus_per_worker is not None else (1.0 if gpus else 0.0)
        )
        by_gpu = int(gpus // self.gpus_a_worker) if self.gpus_a_worker else 0
        wanted = self.gpus_a_worker * (settings.workers or 1)
        if fixed and wanted > gpus:
            raise BadInput(
                f"{settings.workers or 1} workers with {self.gpus_a_worker:g} GPUs each need {wanted:g}, and this "
                f"machine has {gpus:g}; lower --workers or --gpus-per-worker"
            )
        self.workers = settings.workers or max(by_gpu if self.gpus_a_worker else int(cpus // THREADS_A_CPU_WORKER), 1)
        self.slots = settings.max_batch or (_CUDA_SLOTS if self.gpus_a_worker else _CPU_SLOTS)
        # One core is left for what reads the manifest, even where there are but two.
        self.cpus_a_worker = 0 if self.gpus_a_worker or cpus <= self.workers else 1
        self.threads = None if self.gpus_a_worker else THREADS_A_CPU_WORKER

    @property
    def rows_at_once(self) -> int:
        """Rows under way in one worker."""
        return ROWS_A_SLOT * self.slots


def read_blocks(manifest: Manifest, limit: int | None) -> list[Any]:
    """The manifest in the object store: references to tables of rows, or of lines, in order."""
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
def look(block: pa.Table) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Of every row of a block: a fingerprint of its id (0 if it has none), and how much it has to say."""
    if block.column_names == [LINE]:
        rows = [next(parse_lines(line), {}) for line in block[LINE].to_pylist()]
    else:
        rows = block.select([name for name in ("id", "text", "turns") if name in block.column_names]).to_pylist()
    ids = [_fingerprint(row.get("id")) for row in rows]
    return np.array(ids, np.uint64), np.array([estimated_chars(row) for row in rows], np.int64)


def _fingerprint(identity: object) -> int:
    if not isinstance(identity, str) or not identity:
        return 0
    raw = identity.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def plan_units(
    ids: Sequence[NDArray[np.uint64]], chars: Sequence[NDArray[np.int64]], pool: Pool
) -> Iterator[list[RowPlace]]:
    """Rows in the order in which they are handed out, longest first, short ones several together."""
    sizes = [len(one) for one in ids]
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    index_of = np.concatenate([np.arange(size) for size in sizes])
    all_ids, lengths = np.concatenate(ids), np.concatenate(chars)
    duplicate = np.ones(len(all_ids), bool)
    duplicate[np.unique(all_ids, return_index=True)[1]] = False
    duplicate &= all_ids != 0
    order = np.argsort(-lengths, kind="stable")
    total = len(order)
    most_rows = min(_UNIT_ROWS, total // (_UNITS_A_WORKER * pool.workers * pool.rows_at_once))
    most_rows = max(most_rows, 1, math.ceil(total / _MOST_UNITS))
    unit: list[RowPlace] = []
    unit_chars = 0
    for number in order.tolist():
        full = len(unit) == most_rows or (unit_chars + lengths[number] > _UNIT_CHARS and total < _MOST_UNITS)
        if unit and full:
            yield unit
            unit, unit_chars = [], 0
        unit.append(RowPlace(number, int(block_of[number]), int(index_of[number]), bool(duplicate[number])))
        unit_chars += int(lengths[number])
    if unit:
        yield unit


class Run:
    """One run of a job on a cluster that Ray is connected to."""

    def __init__(
        self, settings: JobSettings, manifest: Manifest, factory: Factory, run_id: str, *, fixed: bool = False
    ) -> None:
        self.settings, self.factory = settings, factory
        self._metrics = JobMetrics(run_id)
        context = DataContext.get_current()
        # A row may take hours, and a unit ends with its last row.
        context.execution_no_progress_timeout_s = -1
        context.enable_progress_bars = False
        # A thread for each unit under way that reads the process's memory map again and again.
        context.memory_usage_poll_interval_s = None
        # Workers load nothing when they are made: one that dies then has lost its machine.
        context.max_consecutive_actor_init_deaths = _LOST_MACHINES
        self.pool = Pool(settings, fixed=fixed)
        self._blocks = read_blocks(manifest, settings.limit)
        looked = ray.get([look.remote(block) for block in self._blocks])
        self._ids, self._chars = [one for one, _ in looked], [one for _, one in looked]
        self.num_rows = sum(len(one) for one in self._ids)
        # Beside the driver: whoever loses the driver loses the job anyway. Ray itself would put it anywhere.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.ledger = (
            ray.remote(Ledger)
            .options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here)
            .remote(settings.output, schema_for(manifest.schema), run_id, overwrite=settings.overwrite)
        )
        chars = int(sum(one.sum() for one in self._chars))
        self.found_done: int = ray.get(self.ledger.expect.remote(self.num_rows, chars, self.pool.workers))

    def dataset(self) -> Dataset:
        """The lazy dataset whose execution is the job."""
        units = [{"unit": pickle.dumps(unit)} for unit in plan_units(self._ids, self._chars, self.pool)]
        calls = self.pool.rows_at_once
        return ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
            SynthesisWorker,
            fn_constructor_kwargs={
                "settings": self.settings,
                "blocks": self._blocks,
                "ledger": self.ledger,
                "factory": self.factory,
                "capacity": Capacity(self.pool.slots, self.pool.threads),
            },
            batch_size=1,
            num_gpus=self.pool.gpus_a_worker or None,
            num_cpus=self.pool.cpus_a_worker,
            compute=ActorPoolStrategy(
                size=self.pool.workers, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=calls
            ),
        )

    def execute(self, progress: Progress) -> None:
        """Run to the end, showing how far it is."""
        start_s, ended = time.monotonic(), threading.Event()

        def watch() -> None:
            while not ended.wait(_POLL_S):
                totals, engines = ray.get(self.ledger.snapshot.remote())
                progress.update(totals, time.monotonic() - start_s)
                self._metrics.show(totals, engines)

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            for _ in self.dataset().iter_batches(batch_size=None, prefetch_batches=0):
                pass
            ray.get(self.ledger.settled.remote())
        finally:
            ended.set()
            watcher.join()
            progress.close()

    def reason(self) -> str:
        """Why the job broke, if a worker knew; else nothing."""
        try:
            said: str = ray.get(self.ledger.reason.remote(), timeout=_REASON_S)
        except (ray.exceptions.RayError, TimeoutError):
            return ""
        return said
