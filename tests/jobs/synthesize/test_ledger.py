"""The ledger: every row ends exactly once, whichever workers are lost, and only rows that kill workers fail."""

import asyncio
import contextlib
import dataclasses
import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.storage.backends import open_storage
from jobs.storage.result_table import read_results, result_schema
from jobs.synthesize.ledger import Admission, Ledger, RowClaim
from jobs.synthesize.worker import WorkerConcurrency

SCHEMA = result_schema(pa.schema([]))


def create_ledger(folder, rows, **options):
    ledger = Ledger(str(folder), SCHEMA, options.pop("run_id", "run"), **options)
    for batcher in (ledger._commits, ledger._outdated):
        batcher.delay_s = 0
    ledger.set_expected(rows, 0, 1)
    return ledger


def result(number, digest="a", status="ok", error_type=None):
    return number, 1, {"id": f"row-{number}", "status": status, "script_sha256": digest, "error_type": error_type}


def claim(number, worker="w", mode=Admission.RUN, digest="a"):
    return RowClaim(number, f"row-{number}", digest, worker, mode)


def statuses(folder):
    rows = read_results(open_storage(str(folder))).to_pylist()
    status_by_id = {row["id"]: (row["status"], row["error_type"]) for row in rows}
    assert len(status_by_id) == len(rows)
    return status_by_id


class WorkerLostError(Exception):
    pass


@dataclasses.dataclass
class Worker:
    """Runs rows like a job's worker, until one of them kills it."""

    ledger: Ledger
    name: str
    poison: frozenset[int]
    rng: random.Random
    max_rows: int
    lost: bool = False

    async def work(self, numbers):
        concurrency = WorkerConcurrency(self.max_rows)
        tasks = [asyncio.create_task(self._process_row(concurrency, number)) for number in numbers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _process_row(self, concurrency, number):
        admission = Admission.RUN
        while admission.runs:
            admission = await self._claim_and_run(concurrency, number, admission)
        if admission is Admission.REJECT:
            await self.ledger.commit([result(number, status="failed", error_type="worker_lost")])

    async def _claim_and_run(self, concurrency, number, mode):
        async with concurrency.enter(mode) as release_slot:
            if self.lost:
                raise WorkerLostError
            (admission,) = await self.ledger.claim([claim(number, self.name, mode)])
            if admission is not mode:
                return admission
            for _ in range(self.rng.randrange(4)):
                await asyncio.sleep(0)
            if self.lost or number in self.poison:
                self.lost = True
                raise WorkerLostError
            await release_slot()
            await self.ledger.commit([result(number)])
            return Admission.SKIP


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    poison=st.sets(st.integers(0, 11), max_size=3),
    max_rows=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_only_rows_that_kill_workers_fail(tmp_path_factory, rows, poison, max_rows, seed):
    folder = tmp_path_factory.mktemp("ledger")
    poison = frozenset(number for number in poison if number < rows)

    async def job():
        ledger = create_ledger(folder, rows)
        lost = 0
        while lost < 30:
            worker = Worker(ledger, f"w{lost}", poison, random.Random(seed + lost), max_rows)
            with contextlib.suppress(WorkerLostError):
                await worker.work(range(rows))
                break
            lost += 1
        await ledger.flush()
        return lost

    lost = asyncio.run(job())
    status_by_id = statuses(folder)
    assert set(status_by_id) == {f"row-{number}" for number in range(rows)}
    assert {name for name, (status, _) in status_by_id.items() if status == "failed"} == {f"row-{n}" for n in poison}
    assert lost <= 3 * len(poison)


def test_row_that_loses_a_second_worker_alone_is_rejected(tmp_path):
    async def job():
        ledger = create_ledger(tmp_path, 1)
        assert await ledger.claim([claim(0, "a")]) == [Admission.RUN]
        assert await ledger.claim([claim(0, "b")]) == [Admission.RUN_AS_SUSPECT]
        assert await ledger.claim([claim(0, "b", Admission.RUN_AS_SUSPECT)]) == [Admission.RUN_AS_SUSPECT]
        assert await ledger.claim([claim(0, "c")]) == [Admission.REJECT]

    asyncio.run(job())


def test_workers_lost_while_loading_do_not_count_against_rows(tmp_path):
    async def job():
        ledger = create_ledger(tmp_path, 2)
        for name in "abcd":
            assert await ledger.claim([claim(0, name)]) == [Admission.RUN]
            ledger.worker_loading(name)
        assert await ledger.claim([claim(0, "e")]) == [Admission.RUN]
        ledger.worker_loading("e")
        with pytest.raises(RuntimeError, match="while they loaded the model"):
            await ledger.claim([claim(0, "f")])

    asyncio.run(job())


def test_next_run_processes_missing_failed_and_changed_rows(tmp_path):
    async def first():
        ledger = create_ledger(tmp_path, 4)
        await ledger.claim([claim(number) for number in range(3)])
        await ledger.commit([result(0), result(1), result(2, status="failed", error_type="internal")])

    async def second():
        ledger = create_ledger(tmp_path, 4, run_id="second")
        claims = [claim(0), claim(1, digest="b"), claim(2), claim(3)]
        assert await ledger.claim(claims) == [Admission.SKIP, Admission.RUN, Admission.RUN, Admission.RUN]
        # Outdated results are removed before the rows run again.
        assert set(statuses(tmp_path)) == {"row-0"}
        await ledger.commit([result(1, "b"), result(2), result(3)])
        await ledger.commit([result(3)])
        return ledger.totals

    asyncio.run(first())
    totals = asyncio.run(second())
    assert (totals.ok, totals.skipped, totals.ended) == (3, 1, 4)
    assert statuses(tmp_path) == {f"row-{number}": ("ok", None) for number in range(4)}


def test_row_that_became_invalid_is_in_the_results_once(tmp_path):
    async def run(run_id, row):
        ledger = create_ledger(tmp_path, 2, run_id=run_id)
        await ledger.commit([row])

    asyncio.run(run("a", result(0)))
    asyncio.run(run("b", result(0, status="failed", error_type="invalid_row")))
    assert statuses(tmp_path) == {"row-0": ("failed", "invalid_row")}


def test_run_cannot_write_after_another_run_took_over(tmp_path):
    async def run_both():
        old = create_ledger(tmp_path, 2, run_id="old")
        await old.commit([result(0)])
        new = create_ledger(tmp_path, 2, run_id="new")
        with pytest.raises(RuntimeError, match="run new has taken over"):
            await old.commit([result(1)])
        await new.commit([result(1)])

    asyncio.run(run_both())
    assert set(statuses(tmp_path)) == {"row-0", "row-1"}


def test_draining_defers_new_rows(tmp_path):
    async def job():
        ledger = create_ledger(tmp_path, 2)
        await ledger.claim([claim(0)])
        ledger.drain()
        assert await ledger.claim([claim(1)]) == [Admission.DEFER]
        await ledger.commit([result(0)])

    asyncio.run(job())
    assert set(statuses(tmp_path)) == {"row-0"}


def test_results_have_one_schema_and_odd_values_are_converted(tmp_path):
    schema = result_schema(pa.schema([("pages", pa.int64()), ("note", pa.string())]))
    odd = {"id": "\ud800", "pages": "many", "note": {"deep": [1]}, "status": "failed", "script_sha256": None}

    async def job():
        ledger = Ledger(str(tmp_path), schema, "run")
        ledger.set_expected(1, 0, 1)
        await ledger.commit([(0, 1, odd | {"error_type": "invalid_row"})])

    asyncio.run(job())
    (part,) = (tmp_path / "results").glob("*.parquet")
    table = pq.read_table(io.BytesIO(part.read_bytes()))
    assert table.schema.equals(schema)
    (row,) = table.to_pylist()
    assert (row["id"], row["pages"], row["note"]) == ("?", None, '{"deep": [1]}')


def test_occupancy_while_rows_waited_is_preserved(tmp_path):
    async def report():
        ledger = create_ledger(tmp_path, 2)
        await ledger.claim([claim(0)])
        ledger.report_engine("w", {"occupancy": 0.9})
        await ledger.claim([claim(1)])
        await ledger.commit([result(0)])
        ledger.report_engine("w", {"occupancy": 0.5})
        ledger.report_engine("other", {"occupancy": 0.4})
        return ledger.snapshot()[1]

    engines = asyncio.run(report())
    assert engines["w"] == {"occupancy": 0.5, "occupancy_while_rows_waited": 0.9}
    assert engines["other"]["occupancy_while_rows_waited"] == 0.4
