"""What is done, what is under way, and what must not be tried again: the one actor that every worker asks.

    worker:  begin(row) ─▶ go | skip | …      …speaks…      commit(result) ─▶ it is on the disk

A row is begun before anything is done for it, so that a row that was begun and never ended has lost its worker. Which
of the rows that a worker had under way was to blame nobody knows: all of them are suspects. A suspect goes again with
no other suspect beside it; one that loses a second worker goes a last time with nothing beside it. A row is failed for
the loss of workers only if it lost two, the last of them with nobody else to blame.

Results are written as they come, several together when they come fast, and a row's worker hears that it is done only
when its result is there for good.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from jobs.storage.backends import open_folder
from jobs.storage.result_table import Results
from jobs.synthesize.call_batching import Batched

DUPLICATE = "duplicate_id"
"""Kind of the fault of a row whose id an earlier row of the manifest has."""
LOST_WORKERS = 2
"""Workers that a row loses before it is failed, the last of them alone."""
_SPARE_WORKERS = 3
"""Workers, beyond as many as there are, that may end while they load the model before the job gives up."""
_FASTEST_COMMIT_S, _SLOWEST_COMMIT_S, _COMMITS_A_RUN = 0.2, 10.0, 500


class Verdict(enum.Enum):
    """What is to become of a row."""

    GO = "go"
    SUSPECT = "suspect"
    """It was under way when a worker was lost: beside no other such row."""
    ALONE = "alone"
    """It was so more than once: beside no row at all."""
    SKIP = "skip"
    """It is done, in this run or in an earlier one."""
    REFUSED = "refused"
    """It has lost too many workers."""
    LATER = "later"
    """The job is about to end; the row is left for the next run."""


@dataclasses.dataclass(frozen=True)
class Ticket:
    """A row that a worker is about to make.

    Attributes:
        number: of the row in the manifest.
        worker: who asks; a worker that was started again is another one.
        beside: what the worker is ready for: GO, SUSPECT or ALONE.
        chars: about how much it has to say.
    """

    number: int
    identity: str
    script_sha256: str
    worker: str
    beside: Verdict = Verdict.GO
    chars: int = 0


@dataclasses.dataclass
class Totals:
    """What has become of all rows so far.

    `working_s` runs from when the first worker had loaded the model to the last result.
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
    """Made a Ray actor by the job; plain asyncio, so that it is tested without a cluster."""

    def __init__(self, output: str, schema: pa.Schema, run_id: str, *, overwrite: bool = False) -> None:
        self._results = Results(open_folder(output), schema, run_id)
        self._results.claim()
        if overwrite:
            self._results.clear()
        else:
            self._results.load()
        self.totals = Totals()
        self._ended, self._workers = bytearray(), 0
        self._begun: dict[int, tuple[int, str]] = {}
        """Of rows that have not ended: how often they were begun, and by whom last."""
        self._company: dict[str, set[int]] = {}
        """Of each worker, the rows that it has under way, or had when it was lost."""
        self._loading: set[str] = set()
        self._lost_loading: set[str] = set()
        self._draining, self._reason = False, ""
        self._outdated = Batched(self._take_out, _FASTEST_COMMIT_S)
        self._waiting = Batched(self._append, _FASTEST_COMMIT_S)
        self._disk = asyncio.Lock()
        self._started_s, self._ready_s = time.monotonic(), 0.0
        self._engines: dict[str, dict[str, float]] = {}

    def expect(self, rows: int, chars: int, workers: int) -> int:
        """Say how much there is in all, and for whom; gives how many rows earlier runs have left."""
        self.totals.rows, self.totals.chars = rows, chars
        self._ended, self._workers = bytearray(rows), workers
        return len(self._results.done)

    def loading(self, worker: str) -> None:
        """A worker begins to load the model."""
        self._loading.add(worker)

    def loaded(self, worker: str) -> None:
        """A worker has loaded the model: that it can be done at all is settled."""
        self._loading.discard(worker)
        self._ready_s = self._ready_s or time.monotonic()
        self._lost_loading.clear()

    async def begin(self, tickets: Sequence[Ticket]) -> list[Verdict]:
        """Say that rows are about to be made.

        Returns:
            For each row what its worker is ready for, and it is begun; or anything else, and it is not.

        Raises:
            RuntimeError: workers end while they load the model, one after the other.
        """
        return list(await asyncio.gather(*map(self._begin, tickets)))

    async def _begin(self, ticket: Ticket) -> Verdict:
        number = ticket.number
        if self._ended[number]:
            return Verdict.SKIP
        if self._draining:
            return Verdict.LATER
        done = self._results.done.get(ticket.identity)
        if done is not None:
            if done.script_sha256 == ticket.script_sha256:
                self._ended[number] = 1
                self.totals.skipped += 1
                self.totals.chars_skipped += ticket.chars
                return Verdict.SKIP
            await self._outdated.add(ticket.identity)
        times, wanted = self._history(number)
        if wanted is ticket.beside:
            self._begun[number] = times + 1, ticket.worker
            self._company.setdefault(ticket.worker, set()).add(number)
        return wanted

    def _history(self, number: int) -> tuple[int, Verdict]:
        """How many workers a row has lost, and what follows."""
        if number not in self._begun:
            return 0, Verdict.GO
        times, worker = self._begun[number]
        if worker in self._loading:
            self._lost_loading.add(worker)
            if len(self._lost_loading) > self._workers + _SPARE_WORKERS:
                raise RuntimeError(
                    f"{len(self._lost_loading)} workers ended while they loaded the model; "
                    "most likely it does not fit into memory"
                )
            return times - 1, Verdict.GO if times == 1 else Verdict.SUSPECT
        if times < LOST_WORKERS:
            return times, Verdict.SUSPECT
        return times, Verdict.REFUSED if self._company[worker] == {number} else Verdict.ALONE

    async def commit(self, results: Sequence[tuple[int, int, Mapping[str, Any]]]) -> None:
        """Write results: each a row's number, its characters, and what became of it. Then they are there for good."""
        await asyncio.gather(*(self._commit(*one) for one in results))

    async def _commit(self, number: int, chars: int, row: Mapping[str, Any]) -> None:
        # A worker may have been lost after this was written, and before Ray knew.
        if self._ended[number]:
            return
        self._ended[number] = 1
        _, worker = self._begun.pop(number, (0, ""))
        self._company.get(worker, set()).discard(number)
        if row["id"] in self._results.done and row["error_type"] != DUPLICATE:
            # It was good in an earlier run, and now it cannot even be begun.
            await self._outdated.add(row["id"])
        self._count(chars, row)
        await self._waiting.add(row)

    async def _append(self, rows: Sequence[Mapping[str, Any]]) -> Sequence[None]:
        """A long run waits longer for rows to come together, so that its files do not become too many."""
        running_s = time.monotonic() - self._started_s
        self._waiting.pause_s = min(max(running_s / _COMMITS_A_RUN, _FASTEST_COMMIT_S), _SLOWEST_COMMIT_S)
        async with self._disk:
            await asyncio.to_thread(self._results.append, rows)
        return [None] * len(rows)

    async def _take_out(self, identities: Sequence[str]) -> Sequence[None]:
        async with self._disk:
            await asyncio.to_thread(self._results.take_out, identities)
        return [None] * len(identities)

    def _count(self, chars: int, row: Mapping[str, Any]) -> None:
        status = str(row["status"])
        setattr(self.totals, status, getattr(self.totals, status) + 1)
        self.totals.audio_s += float(row.get("duration_s") or 0.0)
        self.totals.chars_done += chars
        if self._ready_s:
            self.totals.working_s = time.monotonic() - self._ready_s

    def report(self, worker: str, engine: Mapping[str, float]) -> None:
        """What a worker's engine has done so far; how full it was is kept from when rows still waited to be begun."""
        told = dict(engine)
        if "occupancy" in told:
            before = self._engines.get(worker, {}).get("occupancy_while_rows_waited", told["occupancy"])
            waiting = self.totals.rows - self.totals.ended - len(self._begun)
            told["occupancy_while_rows_waited"] = told["occupancy"] if waiting > 0 else before
        self._engines[worker] = told

    def broke(self, reason: str) -> None:
        """A worker cannot go on, nor can any other: why."""
        self._reason = self._reason or reason

    def reason(self) -> str:
        """Why the job broke, in a line; empty if no worker said."""
        return self._reason

    def drain(self) -> None:
        """From now on no row is begun."""
        self._draining = True

    async def settled(self) -> None:
        """Wait until every result is written: the worker that handed one in may be lost, and nobody wait for it."""
        await self._waiting.settled()

    def snapshot(self) -> tuple[Totals, dict[str, dict[str, float]]]:
        """Totals so far, and each engine's numbers."""
        return self.totals, self._engines
