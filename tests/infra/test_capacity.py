"""The capacity page: its values match the measurements, and its tables are computed from them."""

import pickle
import re
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest

from jobs.benchmark import capacity, scale
from jobs.benchmark.__main__ import NAMES
from jobs.synthesize import ledger

ROOT = Path(__file__).parents[2]
TEXT = capacity.PAGE.read_text()
N = capacity.parse_numbers(TEXT)
BENCHMARKS = (ROOT / "jobs/benchmark/README.md").read_text()


def test_every_value_states_its_source():
    rows = [line for line in TEXT.split("## ")[0].splitlines() if line.startswith("| `")]
    assert len(rows) == len(N) >= 12
    known = {name: how for name, _, _, how, _ in capacity._NUMBER.findall(TEXT)}
    assert (known["gpu_audio_s_per_s"], known["job_share"]) == ("measured", "assumed")
    assert {name for name, how in known.items() if how == "measured"} >= {
        "rows_per_s",
        "s3_part_mb",
        "driver_bytes_a_row",
    }


def test_tables_are_computed_from_the_values():
    """To update them: `python -m jobs.benchmark capacity --write infra/capacity.md`."""
    assert capacity.fill_tables(TEXT, N) == TEXT
    assert capacity.fill_tables(TEXT, N | {"gpu_audio_s_per_s": 250.0}) != TEXT


def test_formulas_match_hand_computed_values():
    # 100 audio seconds per second, of which a job keeps 0.94: 94 audio hours per hour, at 3 $ per GPU hour.
    assert capacity.effective_rate({"gpu_audio_s_per_s": 100, "job_share": 0.94}) == pytest.approx(94)
    assert capacity.cost_per_audio_hour(3, 94) == pytest.approx(0.0319, abs=1e-4)
    assert capacity.gpus_for(10_000, 24, 94) == 5  # 4 GPUs generate 9,024 hours
    assert capacity.gpus_for(94 * 24, 24, 94) == 1
    assert capacity.rows_per_s_demand(100, 94, 10) == pytest.approx(940)
    assert capacity.rows_per_s_through(940, 360) == 360
    # One minute of WAV is 2.9 MB: one call. Ten are 28.8 MB: four parts of 8 MB, and a call before and after them.
    assert [capacity.s3_writes(seconds, N) for seconds in (60, 600)] == [1, 6]


def test_measured_values_match_the_benchmark_page():
    (gpu_rate,) = re.findall(r"900 scripts of uneven length \| (\d+) audio s/s", BENCHMARKS)
    assert N["gpu_audio_s_per_s"] == float(gpu_rate)
    (rows_per_s,) = re.findall(r"(\d[\d,]*) rows a second", BENCHMARKS)
    assert N["rows_per_s"] == float(rows_per_s.replace(",", ""))
    assert N["wav_mb_an_hour"] == 24_000 * 2 * 3600 / 1e6
    assert N["result_part_every_s"] == ledger._MAX_COMMIT_INTERVAL_S


def test_driver_memory_per_row():
    from jobs.synthesize.pipeline import plan_units

    count, draw = 200_000, np.random.default_rng(0)
    pool = types.SimpleNamespace(num_workers=100, rows_per_worker=384)
    tracemalloc.start()
    ids = [draw.integers(1, 2**63, 1000).astype(np.uint64) for _ in range(count // 1000)]
    chars = [draw.integers(75, 225, 1000) for _ in range(count // 1000)]
    units = [pickle.dumps(unit) for unit in plan_units(ids, chars, pool)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert units
    assert 0.5 * N["driver_bytes_a_row"] < peak / count < 1.1 * N["driver_bytes_a_row"]


def test_capacity_and_scale_are_benchmark_commands():
    assert {"capacity", "scale"} <= set(NAMES)


def test_fake_gpus_generate_audio_at_the_given_rate():
    """Concurrent rows take as long as generating their audio at the rate of all slots."""
    import asyncio
    import time

    from higgs_model.script.plan import Plan
    from higgs_model.script.script import Script
    from higgs_model.script.voices import Voices

    fakes = scale.FakeGpus(slots=4, slot_rate=50.0)
    script = Script.model_validate({"id": "a", "text": "river " * 25, "chunk_method": "none"})
    plan = Plan.from_script(script, Voices(), None)
    audio_s = sum(len(chunk.text) for chunk in plan.chunks) / 15

    async def synthesize():
        async for _ in fakes.stream(plan):
            pass

    async def synthesize_all():
        await asyncio.gather(*(synthesize() for _ in range(8)))

    start_s = time.monotonic()
    asyncio.run(synthesize_all())
    ideal_s = 8 * audio_s / (4 * 50.0)
    assert ideal_s <= time.monotonic() - start_s < 3 * ideal_s + 0.2
    assert 0.3 < fakes.metrics()["occupancy"] <= 1.0
