"""The ledger: every row ends once, whoever is lost meanwhile; only rows to blame are failed for it."""

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

from jobs.storage.backends import open_folder
from jobs.storage.result_table import read_results, schema_for
from jobs.synthesize.ledger import Ledger, Ticket, Verdict
from jobs.synthesize.worker import Company

SCHEMA = schema_for(pa.schema([]))


def ledger(folder, rows, **options):
    made = Ledger(str(folder), SCHEMA, options.pop("run_id", "run"), **options)
    for batched in (made._waiting, made._outdated):
        batched.pause_s = 0
    made.expect(rows, 0, 1)
    return made


def result(number, digest="a", status="ok", error_type=None):
    return number, 1, {"id": f"row-{number}", "status": status, "script_sha256": digest, "error_type": error_type}


def ticket(number, worker="w", beside=Verdict.GO, digest="a"):
    return Ticket(number, f"row-{number}", digest, worker, beside)


def statuses(folder):
    rows = read_results(open_folder(str(folder))).to_pylist()
    found = {row["id"]: (row["status"], row["error_type"]) for row in rows}
    assert len(found) == len(rows)
    return found


class WorkerLostError(Exception):
    pass


@dataclasses.dataclass
class Worker:
    """Makes rows as the job's worker does, until one of them ends it."""

    ledger: Ledger
    name: str
    poison: frozenset[int]
    draw: random.Random
    rows_at_once: int
    lost: bool = False

    async def work(self, numbers):
        company = Company(self.rows_at_once)
        tasks = [asyncio.create_task(self._row(company, number)) for number in numbers]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _row(self, company, number):
        verdict = Verdict.GO
        while verdict in (Verdict.GO, Verdict.SUSPECT, Verdict.ALONE):
            verdict = await self._make(company, number, verdict)
        if verdict is Verdict.REFUSED:
            await self.ledger.commit([result(number, status="failed", error_type="worker_lost")])

    async def _make(self, company, number, beside):
        async with company.entered(beside) as leave_room:
            if self.lost:
                raise WorkerLostError
            (verdict,) = await self.ledger.begin([ticket(number, self.name, beside)])
            if verdict is not beside:
                return verdict
            for _ in range(self.draw.randrange(4)):
                await asyncio.sleep(0)
            if self.lost or number in self.poison:
                self.lost = True
                raise WorkerLostError
            await leave_room()
            await self.ledger.commit([result(number)])
            return Verdict.SKIP


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    poison=st.sets(st.integers(0, 11), max_size=3),
    rows_at_once=st.integers(1, 4),
    seed=st.integers(0, 100),
)
def test_only_rows_to_blame_are_failed(tmp_path_factory, rows, poison, rows_at_once, seed):
    folder = tmp_path_factory.mktemp("ledger")
    poison = frozenset(number for number in poison if number < rows)

    async def job():
        made = ledger(folder, rows)
        lost = 0
        while lost < 30:
            worker = Worker(made, f"w{lost}", poison, random.Random(seed + lost), rows_at_once)
            with contextlib.suppress(WorkerLostError):
                await worker.work(range(rows))
                break
            lost += 1
        await made.settled()
        return lost

    lost = asyncio.run(job())
    found = statuses(folder)
    assert set(found) == {f"row-{number}" for number in range(rows)}
    assert {name for name, (status, _) in found.items() if status == "failed"} == {f"row-{n}" for n in poison}
    assert lost <= 3 * len(poison)


def test_a_row_alone_is_failed_with_its_second_worker(tmp_path):
    async def job():
        made = ledger(tmp_path, 1)
        assert await made.begin([ticket(0, "a")]) == [Verdict.GO]
        assert await made.begin([ticket(0, "b")]) == [Verdict.SUSPECT]
        assert await made.begin([ticket(0, "b", Verdict.SUSPECT)]) == [Verdict.SUSPECT]
        assert await made.begin([ticket(0, "c")]) == [Verdict.REFUSED]

    asyncio.run(job())


def test_workers_lost_while_loading_are_no_rows_fault(tmp_path):
    async def job():
        made = ledger(tmp_path, 2)
        for name in "abcd":
            assert await made.begin([ticket(0, name)]) == [Verdict.GO]
            made.loading(name)
        assert await made.begin([ticket(0, "e")]) == [Verdict.GO]
        made.loading("e")
        with pytest.raises(RuntimeError, match="while they loaded the model"):
            await made.begin([ticket(0, "f")])

    asyncio.run(job())


def test_the_next_run_makes_what_is_missing_failed_or_changed(tmp_path):
    async def first():
        made = ledger(tmp_path, 4)
        await made.begin([ticket(number) for number in range(3)])
        await made.commit([result(0), result(1), result(2, status="failed", error_type="internal")])

    async def second():
        made = ledger(tmp_path, 4, run_id="second")
        tickets = [ticket(0), ticket(1, digest="b"), ticket(2), ticket(3)]
        assert await made.begin(tickets) == [Verdict.SKIP, Verdict.GO, Verdict.GO, Verdict.GO]
        # Nothing is there twice or out of date at any moment.
        assert set(statuses(tmp_path)) == {"row-0"}
        await made.commit([result(1, "b"), result(2), result(3)])
        await made.commit([result(3)])
        return made.totals

    asyncio.run(first())
    totals = asyncio.run(second())
    assert (totals.ok, totals.skipped, totals.ended) == (3, 1, 4)
    assert statuses(tmp_path) == {f"row-{number}": ("ok", None) for number in range(4)}


def test_a_row_that_was_good_and_is_faulty_now_is_there_once(tmp_path):
    async def run(run_id, row):
        made = ledger(tmp_path, 2, run_id=run_id)
        await made.commit([row])

    asyncio.run(run("a", result(0)))
    asyncio.run(run("b", result(0, status="failed", error_type="invalid_row")))
    assert statuses(tmp_path) == {"row-0": ("failed", "invalid_row")}


def test_a_run_that_still_lives_writes_no_more_once_another_has_begun(tmp_path):
    async def both():
        old = ledger(tmp_path, 2, run_id="old")
        await old.commit([result(0)])
        new = ledger(tmp_path, 2, run_id="new")
        with pytest.raises(RuntimeError, match="the run new has taken over"):
            await old.commit([result(1)])
        await new.commit([result(1)])

    asyncio.run(both())
    assert set(statuses(tmp_path)) == {"row-0", "row-1"}


def test_draining_begins_nothing_new(tmp_path):
    async def job():
        made = ledger(tmp_path, 2)
        await made.begin([ticket(0)])
        made.drain()
        assert await made.begin([ticket(1)]) == [Verdict.LATER]
        await made.commit([result(0)])

    asyncio.run(job())
    assert set(statuses(tmp_path)) == {"row-0"}


def test_results_have_one_schema_and_hold_odd_values(tmp_path):
    schema = schema_for(pa.schema([("pages", pa.int64()), ("note", pa.string())]))
    odd = {"id": "\ud800", "pages": "many", "note": {"deep": [1]}, "status": "failed", "script_sha256": None}

    async def job():
        made = Ledger(str(tmp_path), schema, "run")
        made.expect(1, 0, 1)
        await made.commit([(0, 1, odd | {"error_type": "invalid_row"})])

    asyncio.run(job())
    (part,) = (tmp_path / "results").glob("*.parquet")
    table = pq.read_table(io.BytesIO(part.read_bytes()))
    assert table.schema.equals(schema)
    (row,) = table.to_pylist()
    assert (row["id"], row["pages"], row["note"]) == ("?", None, '{"deep": [1]}')


def test_how_full_an_engine_was_is_kept_from_before_its_last_rows(tmp_path):
    async def told():
        book = ledger(tmp_path, 2)
        await book.begin([ticket(0)])
        book.report("w", {"occupancy": 0.9})
        await book.begin([ticket(1)])
        await book.commit([result(0)])
        book.report("w", {"occupancy": 0.5})
        book.report("other", {"occupancy": 0.4})
        return book.snapshot()[1]

    engines = asyncio.run(told())
    assert engines["w"] == {"occupancy": 0.5, "occupancy_while_rows_waited": 0.9}
    assert engines["other"]["occupancy_while_rows_waited"] == 0.4
