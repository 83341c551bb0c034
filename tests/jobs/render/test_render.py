"""Rendering from stored codes reproduces the job's files, and writes other formats."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch

from higgs_model.audio.loudness import integrated_loudness_lufs
from higgs_model.codec.codec import HiggsAudioCodec
from higgs_model.engine.codec_worker import CodecWorker
from higgs_model.engine.request import FinishReason, Update
from higgs_model.synthesizer import SynthesisSettings, Synthesizer
from higgs_model.synthesizer.loading import load_model
from jobs.export.__main__ import export
from jobs.render.cli import render
from jobs.render.renderer import Renderer, RenderSettings, recording_length
from jobs.runtime.cli import run_command
from jobs.runtime.ray_cluster import THREADS_PER_CPU_WORKER
from jobs.storage.backends import open_storage
from jobs.storage.code_archive import unpack_recording
from jobs.storage.result_table import read_results
from tests.jobs.finished_jobs import finished_job
from tests.jobs.job_runner import run_job

ROWS = [
    {"id": "story", "text": "The mill\n\n[pause:0.3s] There was a mill. It was old.\n\nNobody was in. [pause:0.7s]",
     "chunk_method": "sentence", "chunk_max_words": 8, "seed": 3, "language": "en"},
    {"id": "talk", "turns": [{"speaker": name, "text": "My turn to speak now."} for name in "ABA"], "language": "en"},
    {"id": "early", "text": "[pause:250ms] It begins late.", "language": "en"},
]  # fmt: skip
SCHEMA = (("text", pa.string()), ("turns", pa.string()))
CODEBOOK_SIZE = 256
OPTIONS = {"attempts": 2, "keep_codes": True}
FORMATS = {
    "default": {},
    "other sample rate": {"sample_rate": 44_100},
    "flac": {"format": "flac"},
    "mp3": {"format": "mp3"},
    "opus": {"format": "opus", "sample_rate": 48_000},
    "loud": {"loudness_lufs": -20.0, "true_peak_dbtp": -3.0},
}


class RandomCodes:
    """A fake engine: its codes depend only on the seed, and are streamed like those of the real engine."""

    async def generate(self, request):
        random = np.random.default_rng(request.seed)
        frames = int(random.integers(15, 45))
        for start in range(0, frames, request.stream_every):
            count = min(request.stream_every, frames - start)
            reason = FinishReason.STOP if start + count == frames else None
            yield Update(request.id, random.integers(0, CODEBOOK_SIZE, (8, count)), reason)


@contextlib.contextmanager
def synthesizer():
    """The real synthesizer with the demo's codec, loaded as in a job."""
    parts = load_model("demo", None, torch.device("cpu"))
    settings = SynthesisSettings(attempts=2)
    loaded = Synthesizer(RandomCodes(), CodecWorker(parts.codec), parts.tokenizer, references=None, settings=settings)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Jobs with the same manifest in every format: their output folders and results."""
    folder = tmp_path_factory.mktemp("jobs")
    with synthesizer() as demo:
        return {
            name: (folder / name, finished_job(folder / name, ROWS, demo, SCHEMA, **OPTIONS, **settings))
            for name, settings in FORMATS.items()
        }


def renderer_for(source, output, **settings):
    return Renderer(RenderSettings(str(source), str(output), "demo", None, **({"format": "wav"} | settings)))


@pytest.fixture
def render_job(tmp_path):
    """Return a function that renders all rows of a job in this process."""
    renderers = []

    def render_rows(source, **settings):
        renderers.append(renderer_for(source, tmp_path / "rendered", **settings))
        return {row["id"]: renderers[-1].render(row) for row in read_results(open_storage(str(source))).to_pylist()}

    yield render_rows
    for renderer in renderers:
        renderer.close()


@pytest.mark.parametrize("name", FORMATS)
def test_rendered_files_equal_those_of_a_job(jobs, render_job, name):
    """Byte for byte, whatever format and sample rate the job wrote."""
    _, expected = jobs[name]
    for source in {"other sample rate", name}:
        results = render_job(jobs[source][0], **FORMATS[name])
        for row in expected.values():
            result = results[row["id"]]
            assert result["error"] is None
            assert Path(result["audio_path"]).read_bytes() == Path(row["audio_path"]).read_bytes(), (source, row["id"])
            for column in ("audio_sha256", "duration_s", "sample_rate", "status", "chunks", "seed"):
                assert result[column] == row[column], column


def test_pauses_are_preserved(jobs):
    folder, rows = jobs["default"]
    samples, rate = soundfile.read(rows["early"]["audio_path"])
    assert rows["early"]["chunks"][0]["start_s"] == 0.25
    assert np.abs(samples[: rate // 4]).max() < 0.002
    archived = unpack_recording((folder / "codes").rglob("story.npz").__next__().read_bytes())
    assert recording_length(archived, rows["story"]["duration_s"]) == archived.sample_ranges[-1][1] + 0.7 * rate


def test_loudness_reaches_the_target(jobs, render_job):
    row = render_job(jobs["flac"][0], loudness_lufs=-30.0)["talk"]
    assert integrated_loudness_lufs(*soundfile.read(row["audio_path"], dtype="float32")) == pytest.approx(-30, abs=0.1)


def replace_with_other_codes(path):
    path.write_bytes(next(path.parents[1].rglob("early.npz")).read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "does not exist; run the job with --keep-codes"),
        (lambda path: path.write_bytes(b"no codes"), "contains no readable codes"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "contains no readable codes"),
        (replace_with_other_codes, "has other chunks than the result"),
    ],
)
def test_row_without_codes_fails_and_leaves_no_file(tmp_path, jobs, render_job, damage, message):
    shutil.copytree(jobs["opus"][0], tmp_path / "job")
    damage(next((tmp_path / "job/codes").rglob("talk.npz")))
    results = render_job(tmp_path / "job", format="flac")
    assert (results["talk"]["status"], results["talk"]["error_type"]) == ("failed", "no_codes")
    assert message in results["talk"]["error"]
    assert "\n" not in results["talk"]["error"]
    assert results["talk"]["audio_path"] is None
    assert results["early"]["status"] in ("ok", "flagged")
    files = sorted(path.name for path in (tmp_path / "rendered").rglob("*") if path.is_file())
    assert files == ["early.flac", "story.flac"]


def test_codes_of_another_codec_are_refused(jobs, render_job, monkeypatch):
    monkeypatch.setattr(HiggsAudioCodec, "sample_rate", 16_000)
    for row in render_job(jobs["flac"][0]).values():
        assert row["error_type"] == "no_codes"
        assert "pass the codec of the job with --codec" in row["error"]


def test_render_command_and_resume(tmp_path, capsys):
    """As users run it, on Ray; finished rows are not rendered again."""
    # As many as in a job's worker, before its codec thread starts, because they affect the last bit of the audio.
    torch.set_num_threads(THREADS_PER_CPU_WORKER)
    try:
        rows = [*ROWS, {"id": "bad", "text": ""}]
        with synthesizer() as demo:
            before = finished_job(tmp_path / "out", rows, demo, SCHEMA, **OPTIONS)
    finally:
        torch.set_num_threads(1)
    assert before.pop("bad")["status"] == "failed"
    arguments = ["--results", f"{tmp_path}/out", "--format", "wav", "--output", f"{tmp_path}/b"]
    status, stdout, stderr = run_job("jobs.render", *arguments)
    assert (status, stdout) == (0, ""), stderr
    assert "3 recordings, 0 already done" in stderr
    assert "3 rendered, 0 failed" in stderr
    after = read_results(open_storage(f"{tmp_path}/b")).to_pylist()
    assert {row["id"]: row["audio_sha256"] for row in after} == {
        name: row["audio_sha256"] for name, row in before.items()
    }
    assert run_command(export, ["--results", f"{tmp_path}/b", "--to", "nemo"]) == 0
    assert run_command(render, arguments) == 0
    assert "3 already done" in capsys.readouterr().err


def test_output_rendered_with_other_settings_is_refused(tmp_path, jobs, capsys):
    shutil.copytree(jobs["opus"][0], tmp_path / "job")
    (tmp_path / "job-mp3").mkdir()
    (tmp_path / "job-mp3/render.json").write_text(json.dumps({"format": "mp3", "sample_rate": 44_100}))
    assert run_command(render, ["--results", f"{tmp_path}/job", "--format", "mp3"]) == 2
    assert "rendered with other settings (model, sample_rate)" in capsys.readouterr().err
    assert run_command(render, ["--results", f"{tmp_path}/job", "--format", "mp3", "--output", f"{tmp_path}/job"]) == 2
    assert "the job's own folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--results", "/nowhere", "--format", "mp3"), "no results under /nowhere"),
        (("--results", "JOB", "--format", "aiff"), "aiff"),
        (("--results", "JOB", "--format", "opus", "--sample-rate", "44100"), "opus does not support 44100 Hz"),
        (("--results", "JOB", "--format", "wav", "--sample-rate", "high"), "'high' is out of range; expected 8000"),
        (("--results", "JOB", "--format", "wav", "--loudness-lufs", "3"), "expected -60 to 0"),
        (("--results", "JOB", "--format", "wav", "--model", "/nowhere"), "/nowhere"),
        (("--results", "BARE", "--format", "wav"), "no codes; run the job with --keep-codes"),
    ],
)
def test_invalid_arguments_are_reported_in_one_sentence(tmp_path, jobs, capsys, arguments, message):
    finished_job(tmp_path / "bare", [{"id": "a", "text": "Words.", "language": "en"}])
    names = {"JOB": str(jobs["flac"][0]), "BARE": str(tmp_path / "bare")}
    arguments = [names.get(argument, argument) for argument in arguments]
    assert run_command(render, [*arguments, "--output", str(tmp_path / "r")]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.splitlines()) == 1
