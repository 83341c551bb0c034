"""The actor of the batch job: units of rows in, audio files and result rows out.

A worker holds one `Synthesizer` and keeps its engine full: the rows of all units that Ray has assigned to it run
concurrently, on a separate event loop that Ray never blocks. Errors of a row become that row's result. Engine failures
do not: after an out-of-memory error the engine is rebuilt with half the slots; after any other failure it is rebuilt
unchanged, until the third one ends the process and Ray starts another worker. The driver only refers to this class, so
torch is imported where it is used, in the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import pickle
import sys
import threading
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from higgs_model.errors import HiggsError
from jobs.storage.manifest import Row, estimate_chars, get_row
from jobs.synthesize.call_batching import CallBatcher
from jobs.synthesize.ledger import DUPLICATE, MAX_LOST_WORKERS, Admission, RowClaim
from jobs.synthesize.row_processing import RowFailure, RowProcessor, SynthesizerProtocol, ValidatedRow
from jobs.synthesize.settings import JobSettings
from jobs.synthesize.synthesizer_factory import WorkerResources

logger = logging.getLogger(__name__)

ROWS_PER_SLOT = 2
"""Concurrent rows per slot: while the take of one row is decoded and checked, the slot generates for another."""
_LEDGER_CALL_INTERVAL_S = 0.03
"""Calls to the ledger are batched."""
_MAX_ENGINE_FAILURES = 3

SynthesizerFactory = Callable[[JobSettings, WorkerResources], SynthesizerProtocol]
"""Builds the synthesizer of a worker."""


@dataclasses.dataclass(frozen=True)
class RowLocation:
    """A row's number in the manifest, its block, its index in that block, and whether an earlier row has its id."""

    number: int
    block: int
    index: int
    duplicate: bool = False


class SynthesisWorker:
    """A callable class for Ray Data's actor pool; each call processes one unit of rows.

    Args:
        blocks: references to the manifest's blocks in Ray's object store: tables of rows, or of JSON lines.
        ledger: handle of the job's `Ledger` actor.
        factory: builds the synthesizer.
        resources: CPU threads and concurrent requests of this worker.
    """

    def __init__(
        self,
        settings: JobSettings,
        blocks: Sequence[Any],
        ledger: Any,
        factory: SynthesizerFactory,
        resources: WorkerResources,
    ) -> None:
        self._blocks, self._ledger, self._factory, self._resources = blocks, ledger, factory, resources
        self._processor = RowProcessor(settings)
        self._settings = settings
        self._synthesizer: SynthesizerProtocol | None = None
        self._num_engine_failures = 0
        self._loop = asyncio.new_event_loop()
        self._load_lock = asyncio.Lock()
        self._concurrency = WorkerConcurrency(ROWS_PER_SLOT * resources.slots)
        # Not Ray's actor id, which survives a restart of the actor.
        self._name = uuid.uuid4().hex
        self._claims = CallBatcher(self._claim_batch, _LEDGER_CALL_INTERVAL_S)
        self._commits = CallBatcher(self._commit_batch, _LEDGER_CALL_INTERVAL_S)
        threading.Thread(target=self._loop.run_forever, name="rows", daemon=True).start()

    async def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Process the rows of a unit. Return only their number, because results go through the ledger."""
        locations = [location for unit in batch["unit"] for location in pickle.loads(unit)]
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._process_unit(locations), self._loop))
        return {"rows": np.array([len(locations)])}

    async def _process_unit(self, locations: Sequence[RowLocation]) -> None:
        try:
            async with self._concurrency.limit():
                rows = await asyncio.to_thread(self._scan_rows, locations)
            await asyncio.gather(*map(self._process_row, rows))
        except Exception as error:
            # From an error that ends the job, the driver gets only a traceback, so the ledger records the reason.
            cause = getattr(error, "cause", None) or error
            await self._ledger.report_failure.remote(f"{type(cause).__name__}: {cause}".partition("\n")[0])
            raise
        if self._synthesizer is not None:
            self._ledger.report_engine.remote(self._name, self._synthesizer.metrics())

    def _scan_rows(self, locations: Sequence[RowLocation]) -> list[ScannedRow]:
        """Read and validate the rows of a unit."""
        needed = {location.block for location in locations}
        blocks = {number: self._get_block(number) for number in needed}
        rows = []
        for location in locations:
            row = get_row(blocks[location.block], location.index)
            try:
                if location.duplicate:
                    raise RowFailure(DUPLICATE, f"the id {row.get('id')!r} is already used by an earlier row")
                outcome: ValidatedRow | RowFailure = self._processor.validate(row)
            except RowFailure as error:
                outcome = error
            rows.append(ScannedRow(location.number, row, estimate_chars(row), outcome))
        return rows

    async def _process_row(self, scanned: ScannedRow) -> None:
        """Process a row: concurrently with others or, if it may have killed workers, isolated from them."""
        valid = scanned.outcome
        if isinstance(valid, RowFailure):
            return await self._commit(scanned, self._processor.failed_result(scanned.row, valid))
        admission = Admission.RUN
        while admission.runs:
            admission = await self._claim_and_run(scanned, valid, admission)
        if admission is Admission.REJECT:
            lost = RowFailure("worker_lost", f"{MAX_LOST_WORKERS} or more workers died while they ran this row")
            await self._commit(scanned, self._processor.failed_result(scanned.row, lost, valid))
        return None

    async def _claim_and_run(self, scanned: ScannedRow, valid: ValidatedRow, mode: Admission) -> Admission:
        """Run a row if the ledger admits it in this mode. Return SKIP if it is done, else the ledger's decision."""
        async with self._concurrency.enter(mode) as release_slot:
            claim = RowClaim(scanned.number, valid.script.id, valid.sha256, self._name, mode, scanned.chars)
            admission = await self._claims.call(claim)
            if admission is mode:
                result = await self._synthesize(scanned.row, valid)
                await release_slot()
                await self._commit(scanned, result)
                admission = Admission.SKIP
            return admission

    async def _commit(self, scanned: ScannedRow, result: Mapping[str, Any]) -> None:
        complete = {"manifest_row": scanned.number, "error_type": None, **result}
        await self._commits.call((scanned.number, scanned.chars, complete))

    async def _claim_batch(self, claims: Sequence[RowClaim]) -> list[Admission]:
        admissions: list[Admission] = await self._ledger.claim.remote(claims)
        return admissions

    async def _commit_batch(self, results: Sequence[tuple[int, int, Mapping[str, Any]]]) -> list[None]:
        await self._ledger.commit.remote(results)
        return [None] * len(results)

    async def _synthesize(self, row: Row, valid: ValidatedRow) -> Mapping[str, Any]:
        """Return the result row, a failed one if the row cannot be synthesized."""
        while True:
            synthesizer = await self._get_synthesizer()
            try:
                return await self._processor.synthesize(synthesizer, row, valid)
            except _engine_errors() as error:
                await self._replace_synthesizer(synthesizer, error)
            except RowFailure as error:
                return self._processor.failed_result(row, error, valid)
            except HiggsError as error:
                return self._processor.failed_result(row, RowFailure("bad_input", str(error)), valid)
            except OSError as error:
                return self._processor.failed_result(row, RowFailure("storage", str(error)), valid)
            except Exception as error:
                logger.exception("row %s", row.get("id"))
                internal = RowFailure("internal", f"{type(error).__name__}: {error}")
                return self._processor.failed_result(row, internal, valid)

    async def _get_synthesizer(self) -> SynthesizerProtocol:
        """Return the synthesizer; load it at the first row, so that a job with nothing to do loads no model."""
        async with self._load_lock:
            if self._synthesizer is None:
                await self._ledger.worker_loading.remote(self._name)
                self._synthesizer = await asyncio.to_thread(self._factory, self._settings, self._resources)
                await self._ledger.worker_loaded.remote(self._name)
            return self._synthesizer

    async def _replace_synthesizer(self, failed: SynthesizerProtocol, error: Exception) -> None:
        """Close a synthesizer with a failed engine, unless another row has done so; the next row loads a new one."""
        async with self._load_lock:
            if self._synthesizer is not failed:
                return
            import torch

            out_of_memory = isinstance(error, torch.OutOfMemoryError) or isinstance(
                error.__cause__, torch.OutOfMemoryError
            )
            if out_of_memory and self._resources.slots > 1:
                self._resources = dataclasses.replace(self._resources, slots=math.ceil(self._resources.slots / 2))
                logger.warning("out of memory: continuing with %d concurrent requests", self._resources.slots)
            else:
                self._num_engine_failures += 1
                logger.error("the engine failed: %s", error, exc_info=error)
            if self._num_engine_failures >= _MAX_ENGINE_FAILURES:
                # After an exception, Ray would retry in this process; a process that exits is replaced.
                os._exit(1)
            await asyncio.to_thread(failed.close)
            self._synthesizer = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _get_block(self, number: int) -> pa.Table:
        block: pa.Table = ray.get(self._blocks[number])
        return block


@dataclasses.dataclass(frozen=True)
class ScannedRow:
    """A row of the manifest with the approximate length of its text and the result of its validation."""

    number: int
    row: Row
    chars: int
    outcome: ValidatedRow | RowFailure


def _engine_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions after which an engine cannot continue; none can occur before torch is imported."""
    if "torch" not in sys.modules:
        return ()
    import torch

    from higgs_model.engine.loop import EngineStopped

    return EngineStopped, torch.OutOfMemoryError


class WorkerConcurrency:
    """Controls which rows of a worker run at the same time.

    Args:
        rows: maximum number of concurrent rows.
    """

    def __init__(self, rows: int) -> None:
        self._limit, self._suspect_lock = asyncio.Semaphore(rows), asyncio.Lock()
        self._num_running = 0
        self._idle, self._admitting = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._admitting.set()

    def limit(self) -> asyncio.Semaphore:
        """Return the semaphore to hold while rows are scanned; rows that are not suspects hold it while they run."""
        return self._limit

    @contextlib.asynccontextmanager
    async def enter(self, mode: Admission) -> AsyncGenerator[Callable[[], Awaitable[None]]]:
        """Wait until a row may run: concurrently (RUN), as the only suspect (RUN_AS_SUSPECT), or alone (RUN_ALONE).

        Yields:
            A function that admits the next row early. For rows that must run alone, this one counts as running until
            the context ends, after its result is stored.
        """
        async with contextlib.AsyncExitStack() as acquired:
            await acquired.enter_async_context(self._limit if mode is Admission.RUN else self._suspect_lock)
            if mode is Admission.RUN:
                await self._admitting.wait()
            while mode is Admission.RUN_ALONE and self._num_running:
                await self._idle.wait()
            if mode is Admission.RUN_ALONE:
                self._admitting.clear()
            try:
                with self._running():
                    yield acquired.aclose if mode is Admission.RUN else contextlib.AsyncExitStack().aclose
            finally:
                if mode is Admission.RUN_ALONE:
                    self._admitting.set()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()
