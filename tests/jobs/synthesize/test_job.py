"""The whole batch job: every row exactly once, whatever happens to processes, rows and files."""

import json
import os
import random
import signal

import numpy as np
import pytest
import soundfile

from jobs.synthesize.cli import main
from tests.jobs import fake_job
from tests.jobs.running import FAKE, results, run_here, start, wait_for, workers, write_manifest

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # Ray's own deprecation warnings.
    pytest.mark.filterwarnings("ignore"),
    # All of these tests share one cluster.
    pytest.mark.xdist_group("ray"),
]
KILLS = int(os.environ.get("JOB_TEST_KILLS", "2"))
"""How often each kind of process is killed at a random moment; more with JOB_TEST_KILLS."""

BAD_ROWS = [
    ({"text": "No id at all."}, "invalid_row", "id"),
    ({"id": None, "text": "A null id."}, "invalid_row", "id"),
    ({"id": 7, "text": "A number as id."}, "invalid_row", "id"),
    ({"id": "", "text": "An empty id."}, "invalid_row", "id"),
    ({"id": "../../etc/passwd", "text": "A path."}, "invalid_row", "id"),
    ({"id": "a/b", "text": "A folder."}, "invalid_row", "id"),
    ({"id": "x" * 300, "text": "A long id."}, "invalid_row", "id"),
    ({"id": "good0", "text": "The same id again."}, "duplicate_id", "good0"),
    ({"id": "b1", "text": None}, "invalid_row", "text"),
    ({"id": "b2", "text": ""}, "invalid_row", "text"),
    ({"id": "b3", "text": " \t\n "}, "invalid_row", "text"),
    ({"id": "b4", "text": "?!... --"}, "invalid_row", "text"),
    ({"id": "b5", "text": ["a", "list"]}, "invalid_row", "text"),
    ({"id": "b6", "text": "Hello.", "voice": "nobody"}, "bad_input", "nobody"),
    ({"id": "b7", "text": "Hello.", "voice": "profile:nobody"}, "bad_input", "nobody"),
    ({"id": "b8", "text": "Hello.", "voice": "corrupt"}, "bad_input", ""),
    ({"id": "b9", "text": "Hello.", "voice": "tiny"}, "bad_input", "0.10 s"),
    ({"id": "b10", "text": "Hello.", "voice": "endless"}, "bad_input", "600.00 s"),
    ({"id": "b11", "text": "Hello.", "ref_audio": "/nowhere/at/all.wav"}, "bad_input", "/nowhere/at/all.wav"),
    ({"id": "b12", "text": "Hello.", "seed": -1}, "invalid_row", "seed"),
    ({"id": "b13", "text": "Hello.", "seed": "one"}, "invalid_row", "seed"),
    ({"id": "b14", "text": "Hello.", "temperature": -1}, "invalid_row", "temperature"),
    ({"id": "b15", "text": "Hello.", "top_p": 0}, "invalid_row", "top_p"),
    ({"id": "b16", "text": "Hello.", "chunk_method": "chapters"}, "invalid_row", "chunk_method"),
    ({"id": "b17", "text": "Hello.", "turns": [{"speaker": "A", "text": "Both."}]}, "invalid_row", "turns"),
    ({"id": "b18", "turns": [{"speaker": "A"}]}, "invalid_row", "turns"),
    ({"id": "b19", "turns": "A: Hello."}, "invalid_row", "turns"),
    ({"id": "b20", "text": "Hello.", "max_frames": 0}, "invalid_row", "max_frames"),
    ({"id": "b21", "text": "boom"}, "internal", "an unexpected error"),
    (b'{"id": "b22", "text": "half a li', "invalid_row", "JSON"),
    (b'["b23", "Hello."]', "invalid_row", "JSON"),
    (b'{"id": "b24", "text": "\xff\xfe"}', "invalid_row", "JSON"),
]
ODD_ROWS = [
    {"id": "o1", "text": "Greedy, please.", "temperature": 0},
    {"id": "o2", "text": "A voice without a transcript.", "voice": "mute"},
    {"id": "o3", "text": "Bells \x07 and \x00 nulls \x1b[31m in it."},
    {"id": "o4", "text": "Say <|eot_id|> and <|audio_out_bos|> as they are written."},
    {"id": "o5", "text": "long text " * 20_000},
    {"id": "o6", "text": "\u202eright to left\u202c and \U0001f600 faces"},
    {"id": "o7", "text": "Unknown columns stay.", "colour": {"hue": 3}, "take": True},
]


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    sound = lambda seconds: 0.2 * np.sin(np.arange(round(24_000 * seconds)) * 0.05)  # noqa: E731
    for name, seconds in {"ann": 4, "mute": 4, "tiny": 0.1, "endless": 600}.items():
        soundfile.write(folder / f"{name}.wav", sound(seconds), 24_000)
        if name != "mute":
            (folder / f"{name}.txt").write_text("Some words that were said.")
    (folder / "corrupt.wav").write_bytes(b"RIFF of another kind")
    return folder


def test_invalid_rows_are_reported_and_others_succeed(tmp_path, voices):
    good = [{"id": f"good{n}", "text": f"This is good row number {n}."} for n in range(5)]
    rows = [good[0], *(row for row, _, _ in BAD_ROWS), *good[1:], *ODD_ROWS]
    out = tmp_path / "out"
    arguments = ("--manifest", write_manifest(tmp_path / "m.jsonl", rows), "--output", out, "--voices", voices)
    status, said = run_here(arguments)
    assert status == 3, said
    found = results(out)
    assert sorted(found) == list(range(len(rows)))
    for number, (_, kind, words) in enumerate(BAD_ROWS, start=1):
        row = found[number]
        assert (row["status"], row["error_type"]) == ("failed", kind), row
        assert words in row["error"]
        assert "\n" not in row["error"]
        assert row["audio_path"] is None
    for number in (0, *range(len(BAD_ROWS) + 1, len(rows))):
        assert found[number]["status"] == "ok", found[number]
    assert json.loads(found[len(rows) - 1]["colour"]) == {"hue": 3}
    assert f"{len(BAD_ROWS)} rows failed" in said
    summary = json.loads((out / "job.json").read_text())
    assert (summary["failed"], summary["ok"]) == (len(BAD_ROWS), len(rows) - len(BAD_ROWS))
    # With --max-failed the job succeeds, and a row that became invalid is in the results once.
    rows[0]["voice"] = "nobody"
    write_manifest(tmp_path / "m.jsonl", rows)
    status, said = run_here((*arguments, "--max-failed", "90%"))
    assert status == 0, said
    again = results(out)
    assert sorted(again) == list(range(len(rows)))
    assert (again[0]["status"], again[0]["error_type"]) == ("failed", "bad_input")


def uneven_rows(count):
    rows = [{"id": f"row-{n}", "text": f"Row {n} says a few words. " * (1 + n % 7), "seed": n} for n in range(count)]
    return [*rows, {"id": "long", "text": "A long row goes on and on. " * 24}]


def hashes(found):
    return {row["id"]: row["audio_sha256"] for row in found.values()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cluster):
    folder = tmp_path_factory.mktemp("undisturbed")
    manifest = write_manifest(folder / "m.jsonl", uneven_rows(40))
    status, said = run_here(("--manifest", manifest, "--output", folder / "out"))
    assert status == 0, said
    return hashes(results(folder / "out"))


@pytest.mark.parametrize("seed", range(KILLS))
def test_driver_killed_at_a_random_moment(tmp_path, undisturbed, seed):
    """The next run, started at once, skips every finished row, and its output is the same."""
    manifest, out = write_manifest(tmp_path / "m.jsonl", uneven_rows(40)), tmp_path / "out"
    arguments = ("--manifest", manifest, "--output", out, "--workers", 2, "--max-batch", 2)
    job = start(FAKE, *arguments, FAKE_PACE="0.15")
    moment = random.Random(seed).randrange(1, 20)
    wait_for(lambda: len(list(out.rglob("*.wav"))) >= moment)
    job.kill()
    job.communicate()
    finished = len(results(out)) if list((out / "results").glob("*.parquet")) else 0
    status, said = run_here(arguments)
    assert status == 0, said
    done_before = int(said.rsplit(" already done", 1)[0].split()[-1])
    assert finished <= done_before < 41
    assert hashes(results(out)) == undisturbed
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize("seed", range(KILLS))
def test_worker_killed_at_a_random_moment(tmp_path, undisturbed, cluster, seed):
    """Its rows are done again elsewhere, in the same run."""
    manifest, out = write_manifest(tmp_path / "m.jsonl", uneven_rows(40)), tmp_path / "out"
    arguments = ("--manifest", manifest, "--output", out, "--workers", 2, "--max-batch", 2)
    job = start(FAKE, *arguments, FAKE_PACE="0.12")
    moment = random.Random(seed).randrange(1, 20)
    wait_for(lambda: len(list(out.rglob("*.wav"))) >= moment)
    os.kill(random.Random(seed).choice(wait_for(lambda: workers(cluster))), signal.SIGKILL)
    _, said = job.communicate(timeout=180)
    assert job.returncode == 0, said
    assert hashes(results(out)) == undisturbed
    assert not list(out.rglob("*.part"))


def test_only_the_row_that_kills_workers_fails(tmp_path):
    rows = [*uneven_rows(12), {"id": "poison", "text": "This row will crash the worker."}]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    arguments = ("--manifest", manifest, "--output", tmp_path / "out", "--max-batch", 2)
    status, said = run_here(arguments, pace=0.1)
    assert status == 3, said
    found = {row["id"]: row for row in results(tmp_path / "out").values()}
    assert found.pop("poison")["error_type"] == "worker_lost"
    assert {row["status"] for row in found.values()} == {"ok"}
    assert len(found) == 13


def test_workers_that_cannot_load_the_model_end_the_job(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", uneven_rows(3))
    arguments = ("--manifest", manifest, "--output", tmp_path / "out")
    status, said = run_here(arguments, factory=fake_job.crash_while_loading)
    assert status == 1
    assert "workers died while they loaded the model" in said.splitlines()[-1]


def test_out_of_memory_halves_the_slots_and_continues(tmp_path):
    rows = [{"id": f"r{n}", "text": f"Row {n} needs much memory."} for n in range(9)]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    status, said = run_here(("--manifest", manifest, "--output", tmp_path / "out", "--max-batch", 16))
    assert status == 0, said
    assert len(results(tmp_path / "out")) == 9


def test_sigterm_lets_running_rows_finish(tmp_path, undisturbed):
    manifest, out = write_manifest(tmp_path / "m.jsonl", uneven_rows(40)), tmp_path / "out"
    arguments = ("--manifest", manifest, "--output", out, "--max-batch", 2)
    job = start(FAKE, *arguments, "--grace-s", 60, FAKE_PACE="0.12")
    wait_for(lambda: len(list(out.rglob("*.wav"))) >= 3)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 1, said
    assert "run the same command again" in said
    made = len(results(out))
    assert 3 <= made < 41
    status, said = run_here(arguments)
    assert status == 0, said
    assert f"{made} already done" in said
    assert hashes(results(out)) == undisturbed


def test_only_changed_rows_are_done_again(tmp_path):
    rows = uneven_rows(8)
    arguments = ("--manifest", tmp_path / "m.jsonl", "--output", tmp_path / "out")
    write_manifest(tmp_path / "m.jsonl", rows)
    assert run_here(arguments)[0] == 0
    before = hashes(results(tmp_path / "out"))
    rows[3]["text"] = "Row 3 says something else now."
    rows.append({"id": "new", "text": "A row that was not there."})
    write_manifest(tmp_path / "m.jsonl", rows)
    # As left behind by killed writers.
    unfinished = [tmp_path / "out" / folder / ".a1b2.part" for folder in ("audio", "results")]
    for path in unfinished:
        path.write_bytes(b"half a f")
    status, said = run_here(arguments)
    assert status == 0, said
    assert "2 ok" in said
    assert "8 already done" in said
    assert not any(path.exists() for path in unfinished)
    after = hashes(results(tmp_path / "out"))
    assert {name for name in after if after[name] != before.get(name)} == {"row-3", "new"}


def test_output_does_not_depend_on_workers_or_batch_size(tmp_path, voices):
    """The real pipeline with the demo model, byte for byte."""
    rows = [
        {"id": f"r{n}", "text": "One sentence here. And another one, a little longer.", "voice": "ann", "seed": n}
        for n in range(3)
    ]
    rows.append({"id": "d", "turns": [{"speaker": s, "text": "My turn to speak now."} for s in "ABA"], "seed": 1})
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    same = ("--manifest", manifest, "--voices", str(voices), "--max-frames", "30", "--attempts", "2", "--output")
    for name, options in {"two": ("--workers", "2", "--max-batch", "3"), "one": ("--workers", "1")}.items():
        assert main([*same, str(tmp_path / name), *options]) == 0
    assert hashes(results(tmp_path / "one")) == hashes(results(tmp_path / "two"))
