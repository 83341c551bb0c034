"""The complete batch job: every row exactly once, whatever fails."""

import json
import os
import random
import signal

import numpy as np
import pytest
import soundfile

from jobs.synthesize.cli import main
from tests.jobs import fake_job
from tests.jobs.job_runner import (
    FAKE_JOB,
    checked_results,
    run_in_process,
    start_job,
    wait_for,
    worker_pids,
    write_manifest,
)

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    # Ray's own deprecation warnings.
    pytest.mark.filterwarnings("ignore"),
    # These tests share one cluster.
    pytest.mark.xdist_group("ray"),
]
KILLS = int(os.environ.get("JOB_TEST_KILLS", "2"))
"""How often each kind of process is killed at a random time; set JOB_TEST_KILLS for more."""

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
    tone = lambda duration_s: 0.2 * np.sin(np.arange(round(24_000 * duration_s)) * 0.05)  # noqa: E731
    for name, duration_s in {"ann": 4, "mute": 4, "tiny": 0.1, "endless": 600}.items():
        soundfile.write(folder / f"{name}.wav", tone(duration_s), 24_000)
        if name != "mute":
            (folder / f"{name}.txt").write_text("Some words that were said.")
    (folder / "corrupt.wav").write_bytes(b"RIFF, but not audio")
    return folder


def test_invalid_rows_are_reported_and_others_succeed(tmp_path, voices):
    good = [{"id": f"good{n}", "text": f"This is good row number {n}."} for n in range(5)]
    rows = [good[0], *(row for row, _, _ in BAD_ROWS), *good[1:], *ODD_ROWS]
    out = tmp_path / "out"
    arguments = ("--manifest", write_manifest(tmp_path / "m.jsonl", rows), "--output", out, "--voices", voices)
    status, stderr = run_in_process(arguments)
    assert status == 3, stderr
    results = checked_results(out)
    assert sorted(results) == list(range(len(rows)))
    for number, (_, error_type, message) in enumerate(BAD_ROWS, start=1):
        row = results[number]
        assert (row["status"], row["error_type"]) == ("failed", error_type), row
        assert message in row["error"]
        assert "\n" not in row["error"]
        assert row["audio_path"] is None
    for number in (0, *range(len(BAD_ROWS) + 1, len(rows))):
        assert results[number]["status"] == "ok", results[number]
    assert json.loads(results[len(rows) - 1]["colour"]) == {"hue": 3}
    assert f"{len(BAD_ROWS)} rows failed" in stderr
    summary = json.loads((out / "job.json").read_text())
    assert (summary["failed"], summary["ok"]) == (len(BAD_ROWS), len(rows) - len(BAD_ROWS))
    # With --max-failed the job succeeds, and a row that has become invalid is in the results once.
    rows[0]["voice"] = "nobody"
    write_manifest(tmp_path / "m.jsonl", rows)
    status, stderr = run_in_process((*arguments, "--max-failed", "90%"))
    assert status == 0, stderr
    again = checked_results(out)
    assert sorted(again) == list(range(len(rows)))
    assert (again[0]["status"], again[0]["error_type"]) == ("failed", "bad_input")


def rows_of_various_lengths(count):
    rows = [{"id": f"row-{n}", "text": f"Row {n} says a few words. " * (1 + n % 7), "seed": n} for n in range(count)]
    return [*rows, {"id": "long", "text": "A long row goes on and on. " * 24}]


def audio_hashes(folder):
    return {row["id"]: row["audio_sha256"] for row in checked_results(folder).values()}


@pytest.fixture(scope="module")
def expected_hashes(tmp_path_factory, cluster):
    """The hashes of the audio files of a run without failures."""
    folder = tmp_path_factory.mktemp("undisturbed")
    manifest = write_manifest(folder / "m.jsonl", rows_of_various_lengths(40))
    status, stderr = run_in_process(("--manifest", manifest, "--output", folder / "out"))
    assert status == 0, stderr
    return audio_hashes(folder / "out")


@pytest.mark.parametrize("seed", range(KILLS))
def test_next_run_resumes_after_driver_was_killed(tmp_path, expected_hashes, seed):
    """The next run, started immediately, skips all finished rows, and the output is identical."""
    manifest, out = write_manifest(tmp_path / "m.jsonl", rows_of_various_lengths(40)), tmp_path / "out"
    arguments = ("--manifest", manifest, "--output", out, "--workers", 2, "--max-batch", 2)
    job = start_job(FAKE_JOB, *arguments, FAKE_PACE="0.15")
    moment = random.Random(seed).randrange(1, 20)
    wait_for(lambda: len(list(out.rglob("*.wav"))) >= moment)
    job.kill()
    job.communicate()
    finished = len(checked_results(out)) if list((out / "results").glob("*.parquet")) else 0
    status, stderr = run_in_process(arguments)
    assert status == 0, stderr
    done_before = int(stderr.rsplit(" already done", 1)[0].split()[-1])
    assert finished <= done_before < 41
    assert audio_hashes(out) == expected_hashes
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize("seed", range(KILLS))
def test_rows_of_a_killed_worker_are_retried_in_the_same_run(tmp_path, expected_hashes, cluster, seed):
    manifest, out = write_manifest(tmp_path / "m.jsonl", rows_of_various_lengths(40)), tmp_path / "out"
    arguments = ("--manifest", manifest, "--output", out, "--workers", 2, "--max-batch", 2)
    job = start_job(FAKE_JOB, *arguments, FAKE_PACE="0.12")
    moment = random.Random(seed).randrange(1, 20)
    wait_for(lambda: len(list(out.rglob("*.wav"))) >= moment)
    os.kill(random.Random(seed).choice(wait_for(lambda: worker_pids(cluster))), signal.SIGKILL)
    _, stderr = job.communicate(timeout=180)
    assert job.returncode == 0, stderr
    assert audio_hashes(out) == expected_hashes
    assert not list(out.rglob("*.part"))


def test_only_the_row_that_kills_workers_fails(tmp_path):
    rows = [*rows_of_various_lengths(12), {"id": "poison", "text": "This row will crash the worker."}]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    arguments = ("--manifest", manifest, "--output", tmp_path / "out", "--max-batch", 2)
    status, stderr = run_in_process(arguments, pace=0.1)
    assert status == 3, stderr
    results = {row["id"]: row for row in checked_results(tmp_path / "out").values()}
    assert results.pop("poison")["error_type"] == "worker_lost"
    assert {row["status"] for row in results.values()} == {"ok"}
    assert len(results) == 13


def test_job_fails_if_workers_cannot_load_the_model(tmp_path):
    manifest = write_manifest(tmp_path / "m.jsonl", rows_of_various_lengths(3))
    arguments = ("--manifest", manifest, "--output", tmp_path / "out")
    status, stderr = run_in_process(arguments, factory=fake_job.crash_while_loading)
    assert status == 1
    assert "workers died while they loaded the model" in stderr.splitlines()[-1]


def test_out_of_memory_halves_the_slots_and_continues(tmp_path):
    rows = [{"id": f"r{n}", "text": f"Row {n} needs much memory."} for n in range(9)]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    status, stderr = run_in_process(("--manifest", manifest, "--output", tmp_path / "out", "--max-batch", 16))
    assert status == 0, stderr
    assert len(checked_results(tmp_path / "out")) == 9


def test_sigterm_lets_running_rows_finish(tmp_path, expected_hashes):
    manifest, out = write_manifest(tmp_path / "m.jsonl", rows_of_various_lengths(40)), tmp_path / "out"
    arguments = ("--manifest", manifest, "--output", out, "--max-batch", 2)
    job = start_job(FAKE_JOB, *arguments, "--grace-s", 60, FAKE_PACE="0.12")
    wait_for(lambda: len(list(out.rglob("*.wav"))) >= 3)
    job.send_signal(signal.SIGTERM)
    _, stderr = job.communicate(timeout=120)
    assert job.returncode == 1, stderr
    assert "run the same command again" in stderr
    num_finished = len(checked_results(out))
    assert 3 <= num_finished < 41
    status, stderr = run_in_process(arguments)
    assert status == 0, stderr
    assert f"{num_finished} already done" in stderr
    assert audio_hashes(out) == expected_hashes


def test_only_changed_and_new_rows_are_synthesized_again(tmp_path):
    rows = rows_of_various_lengths(8)
    arguments = ("--manifest", tmp_path / "m.jsonl", "--output", tmp_path / "out")
    write_manifest(tmp_path / "m.jsonl", rows)
    assert run_in_process(arguments)[0] == 0
    before = audio_hashes(tmp_path / "out")
    rows[3]["text"] = "Row 3 says something else now."
    rows.append({"id": "new", "text": "A row that was not there."})
    write_manifest(tmp_path / "m.jsonl", rows)
    # As killed writers leave them behind.
    unfinished = [tmp_path / "out" / folder / ".a1b2.part" for folder in ("audio", "results")]
    for path in unfinished:
        path.write_bytes(b"half a f")
    status, stderr = run_in_process(arguments)
    assert status == 0, stderr
    assert "2 ok" in stderr
    assert "8 already done" in stderr
    assert not any(path.exists() for path in unfinished)
    after = audio_hashes(tmp_path / "out")
    assert {name for name in after if after[name] != before.get(name)} == {"row-3", "new"}


def test_output_does_not_depend_on_workers_or_batch_size(tmp_path, voices):
    """With the real pipeline and the demo model, byte for byte."""
    rows = [
        {"id": f"r{n}", "text": "One sentence here. And another one, a little longer.", "voice": "ann", "seed": n}
        for n in range(3)
    ]
    rows.append({"id": "d", "turns": [{"speaker": s, "text": "My turn to speak now."} for s in "ABA"], "seed": 1})
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    arguments = ("--manifest", manifest, "--voices", str(voices), "--max-frames", "30", "--attempts", "2", "--output")
    for name, options in {"two": ("--workers", "2", "--max-batch", "3"), "one": ("--workers", "1")}.items():
        assert main([*arguments, str(tmp_path / name), *options]) == 0
    assert audio_hashes(tmp_path / "one") == audio_hashes(tmp_path / "two")
