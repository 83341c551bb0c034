"""The actor of the batch job: rows in, audio files and result rows out.

One worker holds one `Synthesizer` and keeps its engine full: rows of all units that Ray has handed to it are under way
at the same time, on an event loop of the worker's own, which Ray never blocks. Whatever happens to a row becomes that
row's result. What happens to the engine does not: out of memory, it is built anew with half the slots; broken
otherwise, too often, the worker ends itself, and Ray starts another.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch

from higgs_model.engine.loop import EngineStopped
from higgs_model.errors import HiggsError
from jobs.ledger import Verdict
from jobs.manifest import BROKEN, Row, estimated_chars, parse_lines
from jobs.rows import BadRow, Checked, RowMaker, Speaks
from jobs.settings import JobSettings

logger = logging.getLogger(__name__)

ROWS_A_SLOT = 2
"""Rows under way for each slot: while one's take is decoded and judged, another's is spoken."""
_MOST_BROKEN_ENGINES = 3

Factory = Callable[[JobSettings, int], Speaks]
"""Builds a synthesizer for so many slots."""


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
        slots: requests that its engine runs at the same time.
        threads: of the processor, for this worker.
    """

    def __init__(
        self,
        settings: JobSettings,
        blocks: Sequence[Any],
        ledger: Any,
        factory: Factory,
        slots: int,
        threads: int | None = None,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._blocks, self._ledger, self._factory, self._slots = blocks, ledger, factory, slots
        self._maker = RowMaker(settings)
        self._settings = settings
        self._speaks: Speaks | None = None
        self._broken = 0
        self._loop = asyncio.new_event_loop()
        self._building, self._alone = asyncio.Lock(), asyncio.Semaphore(1)
        self._room = asyncio.Semaphore(ROWS_A_SLOT * slots)
        self._name = ray.get_runtime_context().get_actor_id() or "local"
        threading.Thread(target=self._loop.run_forever, name="rows", daemon=True).start()

    async def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make the rows of a unit; gives how many there were, for results go their own way."""
        places = [place for unit in batch["unit"] for place in pickle.loads(unit)]
        made = asyncio.run_coroutine_threadsafe(self._unit(places), self._loop)
        await asyncio.wrap_future(made)
        return {"rows": np.array([len(places)])}

    async def _unit(self, places: Sequence[RowPlace]) -> None:
        await asyncio.gather(*(self._row(place) for place in places))
        if self._speaks is not None:
            self._ledger.report.remote(self._name, self._speaks.numbers())

    async def _row(self, place: RowPlace) -> None:
        async with self._room:
            row = await asyncio.to_thread(self._read, place)
            result = await self._result(place, row)
            if result is not None:
                whole = {"manifest_row": place.number, **result}
                await self._ledger.commit.remote([(place.number, estimated_chars(row), whole)])

    async def _result(self, place: RowPlace, row: Row) -> Mapping[str, Any] | None:
        """What becomes of a row; None if that is not for this worker, or not for this run, to say."""
        try:
            if place.duplicate:
                raise BadRow("duplicate_id", f"the id {row.get('id')!r} is already that of an earlier row")
            checked = await asyncio.to_thread(self._maker.check, row)
        except BadRow as fault:
            return self._maker.failed(row, fault)
        verdict = await self._begin(place, checked)
        if verdict is Verdict.GO:
            return await self._made(row, checked)
        if verdict is Verdict.ALONE:
            async with self._alone:
                return await self._made(row, checked)
        if verdict is Verdict.REFUSED:
            lost = BadRow("worker_lost", "two workers were lost while they made this row, so it is not tried again")
            return self._maker.failed(row, lost, checked)
        return None

    async def _made(self, row: Row, checked: Checked) -> Mapping[str, Any]:
        """The result of a row, whatever happens."""
        while True:
            speaks = await self._synthesizer()
            try:
                return await self._maker.make(speaks, row, checked)
            except (EngineStopped, torch.OutOfMemoryError) as error:
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
                self._speaks = await asyncio.to_thread(self._factory, self._settings, self._slots)
            return self._speaks

    async def _rebuild(self, broken: Speaks, error: Exception) -> None:
        """Replace a synthesizer whose engine has stopped, unless another row has done so already."""
        async with self._building:
            if self._speaks is not broken:
                return
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or isinstance(
                error.__cause__, torch.OutOfMemoryError
            )
            if out_of_memory and self._slots > 1:
                self._slots = math.ceil(self._slots / 2)
                logger.warning("out of memory: going on with %d requests at a time", self._slots)
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

    def _read(self, place: RowPlace) -> Row:
        block = ray.get(self._blocks[place.block])
        if "line" in block.column_names and len(block.column_names) == 1:
            row = next(parse_lines(block["line"][place.index].as_py()), {BROKEN: "the line is empty"})
        else:
            row = block.slice(place.index, 1).to_pylist()[0]
        return row

    async def _begin(self, place: RowPlace, checked: Checked) -> Verdict:
        (verdict,) = await self._ledger.begin.remote([(place.number, checked.script.id, checked.sha256)])
        return Verdict(verdict)
