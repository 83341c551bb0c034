"""The actor of the batch job: rows in, audio files and result rows out.

One worker holds one `Synthesizer` and keeps its engine full: rows of all units that Ray has handed to it are under way
at the same time, on an event loop of the worker's own, which Ray never blocks. Whatever happens to a row becomes that
row's result. What happens to the engine does not: out of memory, it is built anew with half the slots; broken
otherwise, too often, the worker ends itself, and Ray starts another. The driver only names this class: torch is
imported where it is used, which is in the worker.
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
from jobs.storage.manifest import Row, estimated_chars, row_of
from jobs.synthesize.call_batching import Batched
from jobs.synthesize.ledger import DUPLICATE, LOST_WORKERS, Ticket, Verdict
from jobs.synthesize.row_processing import BadRow, Checked, RowMaker, Speaks
from jobs.synthesize.settings import JobSettings
from jobs.synthesize.synthesizer_factory import Capacity

logger = logging.getLogger(__name__)

ROWS_A_SLOT = 2
"""Rows under way for each slot: while one's take is decoded and judged, another's is spoken."""
_CALL_EVERY_S = 0.03
"""The ledger is asked about several rows at once."""
_MOST_BROKEN_ENGINES = 3

Factory = Callable[[JobSettings, Capacity], Speaks]
"""Builds a worker's synthesizer."""


@dataclasses.dataclass(frozen=True)
class RowPlace:
    """Where a row stands: its number in the manifest, the block that holds it, and its place there."""

    number: int
    block: int
    index: int
    duplicate: bool = False


class SynthesisWorker:
    """Ray Data calls one of these, in its own process, with a unit of rows at a time.

    Args:
        blocks: the manifest's blocks in Ray's object store: tables, or lines.
        ledger: the job's `Ledger` actor.
        factory: builds the synthesizer.
        capacity: of this worker.
    """

    def __init__(
        self,
        settings: JobSettings,
        blocks: Sequence[Any],
        ledger: Any,
        factory: Factory,
        capacity: Capacity,
    ) -> None:
        self._blocks, self._ledger, self._factory, self._capacity = blocks, ledger, factory, capacity
        self._maker = RowMaker(settings)
        self._settings = settings
        self._speaks: Speaks | None = None
        self._broken = 0
        self._loop = asyncio.new_event_loop()
        self._building = asyncio.Lock()
        self._company = Company(ROWS_A_SLOT * capacity.slots)
        # Ray's name of an actor stays when the actor is started again.
        self._name = uuid.uuid4().hex
        self._begin = Batched(self._begin_all, _CALL_EVERY_S)
        self._results = Batched(self._commit_all, _CALL_EVERY_S)
        threading.Thread(target=self._loop.run_forever, name="rows", daemon=True).start()

    async def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make the rows of a unit; gives how many there were, for results go their own way."""
        places = [place for unit in batch["unit"] for place in pickle.loads(unit)]
        made = asyncio.run_coroutine_threadsafe(self._unit(places), self._loop)
        await asyncio.wrap_future(made)
        return {"rows": np.array([len(places)])}

    async def _unit(self, places: Sequence[RowPlace]) -> None:
        try:
            async with self._company.room():
                looked = await asyncio.to_thread(self._look, places)
            await asyncio.gather(*map(self._row, looked))
        except Exception as error:
            # Of an error that ends the job Ray keeps nothing but its traceback.
            cause = getattr(error, "cause", None) or error
            await self._ledger.broke.remote(f"{type(cause).__name__}: {cause}".partition("\n")[0])
            raise
        if self._speaks is not None:
            self._ledger.report.remote(self._name, self._speaks.numbers())

    def _look(self, places: Sequence[RowPlace]) -> list[_Looked]:
        """The rows of a unit, each with what is wrong with it or all that making it needs."""
        blocks = dict(zip(needed := {place.block for place in places}, map(self._block, needed), strict=True))
        looked = []
        for place in places:
            row = row_of(blocks[place.block], place.index)
            try:
                if place.duplicate:
                    raise BadRow(DUPLICATE, f"the id {row.get('id')!r} is already that of an earlier row")
                found: Checked | BadRow = self._maker.check(row)
            except BadRow as fault:
                found = fault
            looked.append(_Looked(place.number, row, estimated_chars(row), found))
        return looked

    async def _row(self, looked: _Looked) -> None:
        """See a row to its end, be it with others or, if it may be to blame for lost workers, without."""
        checked = looked.found
        if isinstance(checked, BadRow):
            return await self._commit(looked, self._maker.failed(looked.row, checked))
        verdict = Verdict.GO
        while verdict in (Verdict.GO, Verdict.SUSPECT, Verdict.ALONE):
            verdict = await self._make(looked, checked, verdict)
        if verdict is Verdict.REFUSED:
            lost = BadRow("worker_lost", f"{LOST_WORKERS} or more workers ended while they made this row")
            await self._commit(looked, self._maker.failed(looked.row, lost, checked))
        return None

    async def _make(self, looked: _Looked, checked: Checked, beside: Verdict) -> Verdict:
        """Make a row beside those that it may be made beside. Gives SKIP when it is done, else what it waits for."""
        async with self._company.entered(beside) as leave_room:
            ticket = Ticket(looked.number, checked.script.id, checked.sha256, self._name, beside, looked.chars)
            verdict = await self._begin.add(ticket)
            if verdict is beside:
                result = await self._made(looked.row, checked)
                await leave_room()
                await self._commit(looked, result)
                verdict = Verdict.SKIP
            return verdict

    async def _commit(self, looked: _Looked, result: Mapping[str, Any]) -> None:
        whole = {"manifest_row": looked.number, "error_type": None, **result}
        await self._results.add((looked.number, looked.chars, whole))

    async def _begin_all(self, tickets: Sequence[Ticket]) -> list[Verdict]:
        verdicts: list[Verdict] = await self._ledger.begin.remote(tickets)
        return verdicts

    async def _commit_all(self, results: Sequence[tuple[int, int, Mapping[str, Any]]]) -> list[None]:
        await self._ledger.commit.remote(results)
        return [None] * len(results)

    async def _made(self, row: Row, checked: Checked) -> Mapping[str, Any]:
        """The result of a row, whatever happens."""
        while True:
            speaks = await self._synthesizer()
            try:
                return await self._maker.make(speaks, row, checked)
            except _engine_errors() as error:
                await self._rebuild(speaks, error)
            except BadRow as fault:
                return self._maker.failed(row, fault, checked)
            except HiggsError as error:
                return self._maker.failed(row, BadRow("bad_input", str(error)), checked)
            except OSError as error:
                return self._maker.failed(row, BadRow("storage", str(error)), checked)
            except Exception as error:
                logger.exception("row %s", row.get("id"))
                return self._maker.failed(row, BadRow("internal", f"{type(error).__name__}: {error}"), checked)

    async def _synthesizer(self) -> Speaks:
        """The synthesizer, loaded when the first row needs it: a job that has nothing to do loads nothing."""
        async with self._building:
            if self._speaks is None:
                await self._ledger.loading.remote(self._name)
                self._speaks = await asyncio.to_thread(self._factory, self._settings, self._capacity)
                await self._ledger.loaded.remote(self._name)
            return self._speaks

    async def _rebuild(self, broken: Speaks, error: Exception) -> None:
        """Replace a synthesizer whose engine has stopped, unless another row has done so already."""
        async with self._building:
            if self._speaks is not broken:
                return
            import torch

            out_of_memory = isinstance(error, torch.OutOfMemoryError) or isinstance(
                error.__cause__, torch.OutOfMemoryError
            )
            if out_of_memory and self._capacity.slots > 1:
                self._capacity = dataclasses.replace(self._capacity, slots=math.ceil(self._capacity.slots / 2))
                logger.warning("out of memory: going on with %d requests at a time", self._capacity.slots)
            else:
                self._broken += 1
                logger.error("the engine broke: %s", error, exc_info=error)
            if self._broken >= _MOST_BROKEN_ENGINES:
                # Raising would be tried again on this very process; its end is what Ray answers with a new one.
                os._exit(1)
            await asyncio.to_thread(broken.close)
            self._speaks = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _block(self, number: int) -> pa.Table:
        block: pa.Table = ray.get(self._blocks[number])
        return block


@dataclasses.dataclass(frozen=True)
class _Looked:
    """A row that was read: about how much it has to say, and what making it needs or what is wrong with it."""

    number: int
    row: Row
    chars: int
    found: Checked | BadRow


def _engine_errors() -> tuple[type[Exception], ...]:
    """What an engine raises that cannot go on; what was never imported cannot have been raised."""
    if "torch" not in sys.modules:
        return ()
    import torch

    from higgs_model.engine.loop import EngineStopped

    return EngineStopped, torch.OutOfMemoryError


class Company:
    """Which rows a worker has under way beside which.

    Args:
        rows: that may be under way at the same time.
    """

    def __init__(self, rows: int) -> None:
        self._room, self._suspects = asyncio.Semaphore(rows), asyncio.Lock()
        self._under_way = 0
        self._empty, self._open = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self._open.set()

    def room(self) -> asyncio.Semaphore:
        """Held while a row is looked at, or made and no suspect."""
        return self._room

    @contextlib.asynccontextmanager
    async def entered(self, beside: Verdict) -> AsyncGenerator[Callable[[], Awaitable[None]]]:
        """Be under way: beside others (GO), beside no other suspect (SUSPECT), or beside nobody (ALONE).

        Gives a function that lets the next row in; until it has ended here, its result included, a row is still under
        way for those that want to be alone.
        """
        async with contextlib.AsyncExitStack() as room:
            await room.enter_async_context(self._room if beside is Verdict.GO else self._suspects)
            if beside is Verdict.GO:
                await self._open.wait()
            while beside is Verdict.ALONE and self._under_way:
                await self._empty.wait()
            if beside is Verdict.ALONE:
                self._open.clear()
            try:
                with self._counted():
                    yield room.aclose if beside is Verdict.GO else contextlib.AsyncExitStack().aclose
            finally:
                if beside is Verdict.ALONE:
                    self._open.set()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._under_way += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._empty.set()
