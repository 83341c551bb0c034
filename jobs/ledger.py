"""What is done, what is under way, and what must not be tried again: the one actor that every worker asks.

    worker:  begin(rows) ─▶ go | skip | refused      …speaks…      commit(results) ─▶ they are on the disk

A row is begun before anything is done for it, so that a row that was begun and never ended has lost its worker. Such
rows go again one at a time, beside rows that are new; one that loses a second worker alone is failed by name. Results
are written as they come, several together when they come fast, and a row's worker hears that it is done only when its
result is there for good.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from jobs.folders import open_folder
from jobs.results import Results

MOST_LOST_WORKERS = 2
_FASTEST_COMMIT_S, _SLOWEST_COMMIT_S, _COMMITS_A_RUN = 0.2, 10.0, 500


class Verdict(enum.Enum):
    """What is to become of a row."""

    GO = "go"
    ALONE = "alone"
    """It was under way when a worker was lost: one such row at a time."""
    SKIP = "skip"
    """It is done, in this run or in an earlier one."""
    REFUSED = "refused"
    """It has lost two workers."""
    LATER = "later"
    """The job is about to end; the row is left for the next run."""


@dataclasses.dataclass
class Totals:
    """What has become of all rows so far."""

    rows: int = 0
    chars: int = 0
    ok: int = 0
    flagged: int = 0
    failed: int = 0
    skipped: int = 0
    audio_s: float = 0.0
    chars_done: int = 0
    workers_lost_rows: int = 0

    @property
    def ended(self) -> int:
        return self.ok + self.flagged + self.failed + self.skipped


class Ledger:
    """Made a Ray actor by the job; plain asyncio, so that it is tested without a cluster."""

    def __init__(self, output: str, schema: pa.Schema, run_id: str, *, overwrite: bool = False) -> None:
        self._results = Results(open_folder(output), schema, run_id)
        if overwrite:
            self._results.clear()
        else:
            self._results.load()
        self.totals = Totals()
        self._begun: dict[int, int] = {}
        self._ended: set[int] = set()
        self._draining = False
        self._waiting: list[Mapping[str, Any]] = []
        self._writing: asyncio.Future[None] | None = None
        self._disk = asyncio.Lock()
        self._started_s = time.monotonic()
        self._engines: dict[str, dict[str, float]] = {}

    def expect(self, rows: int, chars: int) -> int:
        """Say how much there is in all; gives how many rows earlier runs have left."""
        self.totals.rows, self.totals.chars = rows, chars
        return len(self._results.done)

    async def begin(self, rows: Sequence[tuple[int, str | None, str | None]]) -> list[Verdict]:
        """Say that rows are about to be made: each its number, its id, and its script's hash."""
        return [self._begin(number, identity, digest) for number, identity, digest in rows]

    def _begin(self, number: int, identity: str | None, digest: str | None) -> Verdict:
        if number in self._ended:
            return Verdict.SKIP
        if self._draining:
            return Verdict.LATER
        done = self._results.done.get(identity or "")
        if done is not None and digest is not None and number not in self._begun:
            if done.script_sha256 == digest:
                self._ended.add(number)
                self.totals.skipped += 1
                return Verdict.SKIP
            self._results.take_out(identity or "")
        times = self._begun[number] = self._begun.get(number, 0) + 1
        if times == 1:
            return Verdict.GO
        self.totals.workers_lost_rows += 1
        return Verdict.REFUSED if times > MOST_LOST_WORKERS else Verdict.ALONE

    async def commit(self, rows: Sequence[tuple[int, int, Mapping[str, Any]]]) -> None:
        """Write result rows, each with its number and its characters; returns when they are there for good."""
        for number, chars, row in rows:
            if number in self._ended:
                # Its worker was lost after this was written, and before Ray knew.
                continue
            self._ended.add(number)
            self._waiting.append(row)
            self._count(chars, row)
        if not self._waiting:
            return
        if self._writing is None:
            self._writing = asyncio.ensure_future(self._write())
        await asyncio.shield(self._writing)

    async def _write(self) -> None:
        """Write what waits after a moment. A long run waits longer, so that its files do not become too many."""
        running_s = time.monotonic() - self._started_s
        await asyncio.sleep(min(max(running_s / _COMMITS_A_RUN, _FASTEST_COMMIT_S), _SLOWEST_COMMIT_S))
        rows, self._waiting, self._writing = self._waiting, [], None
        async with self._disk:
            await asyncio.to_thread(self._results.append, rows)

    def _count(self, chars: int, row: Mapping[str, Any]) -> None:
        status = str(row["status"])
        setattr(self.totals, status, getattr(self.totals, status) + 1)
        self.totals.audio_s += float(row.get("duration_s") or 0.0)
        self.totals.chars_done += chars

    def report(self, worker: str, engine: Mapping[str, float]) -> None:
        """What a worker's engine has done so far."""
        self._engines[worker] = dict(engine)

    def drain(self) -> None:
        """From now on no row is begun."""
        self._draining = True

    def snapshot(self) -> tuple[Totals, dict[str, dict[str, float]]]:
        """Totals so far, and each engine's numbers."""
        return self.totals, self._engines
