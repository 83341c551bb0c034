"""Exports of finished jobs, read by the tools that they are for."""

import gzip
import io
import json
import os
from pathlib import Path

import lhotse
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import srt
import webvtt
from lhotse import CutSet, RecordingSet, SupervisionSet
from lhotse.qa import validate_recordings_and_supervisions

from jobs.export import shards
from jobs.export.__main__ import export
from jobs.runtime.cli import run_command
from jobs.storage.backends import open_storage
from tests.jobs.finished_jobs import finished_job

ROWS = [
    {"id": "story", "voice": "A calm old voice.", "language": "en",
     "text": "Once there was a mill.\n\nIt stood by a river, and nobody knew how old it was. [laugh] So.",
     "chunk_method": "sentence", "chunk_max_words": 9,
     "collection": "tales", "weight": 0.5},
    {"id": "talk", "turns": [{"speaker": "Ann", "text": "Good morning & hello."}, {"speaker": "Bob", "text": "Hi."}],
     "voices": {"Ann": "A low voice.", "Bob": "A high voice."}, "seed": 4, "language": "en"},
    {"id": "bad", "text": None},
    {"id": "plain", "text": "[SPEAKER0] One. [SPEAKER1] Two.", "language": "en", "collection": "tests"},
]  # fmt: skip
SCHEMA = [("turns", pa.string()), ("voices", pa.string()), ("text", pa.string()), ("voice", pa.string()),
          ("language", pa.string()), ("collection", pa.string()), ("weight", pa.float64())]  # fmt: skip


def job(folder, **settings):
    return finished_job(folder, ROWS, schema=SCHEMA, format="flac", **settings)


def run(capsys, *arguments):
    status = run_command(export, list(map(str, arguments)))
    return status, capsys.readouterr().err


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_nemo_manifest_refers_to_the_files_of_the_job(tmp_path, capsys):
    job(tmp_path / "out")
    status, stderr = run(capsys, "--results", tmp_path / "out", "--to", "nemo")
    assert status == 0
    assert stderr.count("\n") == 1
    assert "3 recordings, 3 items" in stderr
    assert "excluded: 1 failed" in stderr
    rows = read_jsonl(tmp_path / "out/export/nemo/manifest.jsonl")
    assert [row["id"] for row in rows] == ["story", "talk", "plain"]  # as in the manifest
    for row in rows:
        info = soundfile.info(row["audio_filepath"])
        assert row["duration"] == info.frames / info.samplerate
        assert row["chars_per_sec"] == pytest.approx(len(row["text"]) / row["duration"], abs=1e-3)
        assert "offset" not in row
    story, talk, plain = rows
    assert story["text"] == "Once there was a mill. It stood by a river, and nobody knew how old it was. So."
    assert (story["speaker"], story["language"]) == ("A calm old voice.", "en")
    assert (story["collection"], story["weight"]) == ("tales", 0.5)
    assert talk["text"] == "Good morning & hello. Hi."
    assert talk["speaker"] == "A low voice., A high voice."
    # No voice is set, so the model picks another one in every script.
    assert plain["speaker"] == "plain/SPEAKER0, plain/SPEAKER1"
    assert (story["attempts"], story["finish_reason"], story["faults"], story["model"]) == (1, "stop", "", "demo")


@pytest.mark.parametrize("rate", [None, 16_000])
def test_nemo_chunks_have_offsets(tmp_path, capsys, rate):
    results = job(tmp_path / "out", sample_rate=rate)
    run(capsys, "--results", tmp_path / "out", "--to", "nemo", "--level", "chunk", "--output", tmp_path / "n")
    rows = [row for row in read_jsonl(tmp_path / "n/manifest.jsonl") if row["audio_filepath"].endswith("/story.flac")]
    assert [row["id"] for row in rows] == [f"story-{n:05d}" for n in range(len(rows))]
    assert len(rows) == len(results["story"]["chunks"]) >= 3
    for row, chunk in zip(rows, results["story"]["chunks"], strict=True):
        assert row["offset"] == pytest.approx(chunk["start_s"], abs=1e-4)
        assert row["offset"] + row["duration"] == pytest.approx(chunk["end_s"], abs=1e-4)
        assert (row["offset"] * (rate or 24_000)).is_integer()
        assert row["seed"] == chunk["seed"]
    assert rows[-1]["offset"] + rows[-1]["duration"] == pytest.approx(results["story"]["duration_s"], abs=1e-9)


@pytest.mark.parametrize("level", ["script", "chunk"])
def test_lhotse_loads_and_validates_the_manifests(tmp_path, capsys, level):
    results = job(tmp_path / "out", sample_rate=22_050)
    output = tmp_path / "lhotse"
    assert run(capsys, "--results", tmp_path / "out", "--to", "lhotse", "--level", level, "--output", output)[0] == 0
    recordings = RecordingSet.from_file(output / "recordings.jsonl.gz")
    supervisions = SupervisionSet.from_file(output / "supervisions.jsonl.gz")
    validate_recordings_and_supervisions(recordings, supervisions, read_data=True)
    assert [recording.id for recording in recordings] == ["story", "talk", "plain"]
    for recording in recordings:
        assert recording.duration == recording.num_samples / recording.sampling_rate
        assert recording == lhotse.Recording.from_file(recording.sources[0].source, recording_id=recording.id)
    count = sum(len(row["chunks"]) for row in results.values() if row["status"] == "ok")
    assert len(supervisions) == (3 if level == "script" else count)
    cuts = CutSet.from_manifests(recordings, supervisions).trim_to_supervisions()
    for cut in cuts:
        assert cut.load_audio().shape == (1, cut.num_samples)
    story = next(supervision for supervision in supervisions if supervision.recording_id == "story")
    assert story.custom["collection"] == "tales"
    assert (story.speaker, story.language) == ("A calm old voice.", "en")


def test_exports_are_deterministic(tmp_path, capsys):
    job(tmp_path / "out")
    for name in ("a", "b"):
        run(capsys, "--results", tmp_path / "out", "--to", "lhotse", "--output", tmp_path / name)
    for name in ("recordings.jsonl.gz", "supervisions.jsonl.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert gzip.decompress((tmp_path / "a/recordings.jsonl.gz").read_bytes()).count(b"\n") == 3


def test_hf_shards_contain_audio_features(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ITEMS", 2)
    results = job(tmp_path / "out")
    stale = tmp_path / "hf/data/train-00007-of-00008.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"from an earlier export")
    assert run(capsys, "--results", tmp_path / "out", "--to", "hf", "--output", tmp_path / "hf")[0] == 0
    names = sorted(path.name for path in (tmp_path / "hf/data").iterdir())
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    tables = [pq.read_table(tmp_path / "hf/data" / name) for name in names]
    # As `datasets` 5.2 serializes `Audio()` and `Value(...)`.
    features = json.loads(tables[0].schema.metadata[b"huggingface"])["info"]["features"]
    assert features["audio"] == {"_type": "Audio"}
    assert features["duration"] == features["weight"] == {"dtype": "float64", "_type": "Value"}
    assert features["text"] == features["collection"] == {"dtype": "string", "_type": "Value"}
    assert features["seed"] == {"dtype": "int64", "_type": "Value"}
    assert list(features) == tables[0].column_names
    assert tables[0].schema.field("audio").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["id"] for row in rows] == ["story", "talk", "plain"]
    for row in rows:
        assert row["audio"]["bytes"] == Path(results[row["id"]]["audio_path"]).read_bytes()
        assert row["audio"]["path"] == f"{row['id']}.flac"
        info = soundfile.info(io.BytesIO(row["audio"]["bytes"]))
        assert row["duration"] == info.frames / info.samplerate
    assert [row["weight"] for row in rows] == [0.5, None, None]


def test_hf_shards_of_chunks_contain_their_samples(tmp_path, capsys):
    results = job(tmp_path / "out")
    run(capsys, "--results", tmp_path / "out", "--to", "hf", "--level", "chunk", "--output", tmp_path / "hf")
    rows = pq.read_table(tmp_path / "hf/data/train-00000-of-00001.parquet").to_pylist()
    parts = [row for row in rows if row["id"].startswith("story-")]
    assert len(parts) == len(results["story"]["chunks"])
    joined = np.concatenate([soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")[0] for row in parts])
    assert np.array_equal(joined, soundfile.read(results["story"]["audio_path"], dtype="int16")[0])


def test_hf_shards_are_bounded_in_size(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 300_000)
    finished_job(
        tmp_path, [{"id": f"r{n}", "text": "Some words for a few seconds. " * 2, "language": "en"} for n in range(5)]
    )
    recordings = shards.Recordings(open_storage(str(tmp_path)))
    numbers = [number for _, _, number in shards._assign_shards(recordings, "script")]
    assert numbers == sorted(numbers)
    assert numbers[-1] >= 1
    assert shards.write_shards(recordings, open_storage(str(tmp_path)), open_storage(str(tmp_path)), "script") == 5


@pytest.mark.parametrize(("kind", "reader"), [("srt", srt), ("vtt", webvtt)])
def test_subtitle_files_mirror_the_audio_files(tmp_path, capsys, kind, reader):
    results = job(tmp_path / "out")
    assert run(capsys, "--results", tmp_path / "out", "--to", kind, "--output", tmp_path / "out")[0] == 0
    for name in ("story", "talk", "plain"):
        text = Path(results[name]["audio_path"]).with_suffix(f".{kind}").read_text()
        if reader is srt:
            ends = [subtitle.end.total_seconds() for subtitle in srt.parse(text)]
        else:
            ends = [caption.end_in_seconds for caption in webvtt.from_string(text)]
        assert ends[-1] == pytest.approx(results[name]["duration_s"], abs=1.0 if reader is webvtt else 0.002)
    talk = Path(results["talk"]["audio_path"]).with_suffix(f".{kind}").read_text()
    assert ("Ann: Good morning & hello." if kind == "srt" else "<v Ann>Good morning &amp; hello.") in talk
    story = Path(results["story"]["audio_path"]).with_suffix(f".{kind}").read_text()
    assert "[Laughter]" in story
    assert "<SE>" not in story
    assert "<v" not in story


def test_excluded_rows_are_reported(tmp_path, capsys):
    results = job(tmp_path / "out")
    os.unlink(results["plain"]["audio_path"])
    parts = sorted((tmp_path / "out/results").glob("*.parquet"))
    for part in parts:
        table = pq.read_table(part)
        states = ["flagged" if name == "talk" else state for name, state in
                  zip(table["id"].to_pylist(), table["status"].to_pylist(), strict=True)]  # fmt: skip
        column = table.schema.get_field_index("status")
        pq.write_table(table.set_column(column, "status", pa.array(states)), part)
    status, stderr = run(capsys, "--results", tmp_path / "out", "--to", "nemo", "--only", "ok")
    assert status == 3
    assert "1 recordings, 1 items" in stderr
    assert "1 failed, 1 flagged, 1 without audio file" in stderr
    status, stderr = run(capsys, "--results", tmp_path / "out", "--to", "nemo")
    assert "2 recordings, 2 items" in stderr
    for name in ("story", "talk"):
        os.unlink(results[name]["audio_path"])
    status, stderr = run(capsys, "--results", tmp_path / "out", "--to", "nemo")
    assert status == 2
    assert "nothing to export" in stderr
    # The previous export is still there.
    assert len(read_jsonl(tmp_path / "out/export/nemo/manifest.jsonl")) == 2


def test_moved_folder_can_be_exported(tmp_path, capsys):
    job(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    run(capsys, "--results", tmp_path / "elsewhere", "--to", "nemo")
    for row in read_jsonl(tmp_path / "elsewhere/export/nemo/manifest.jsonl"):
        assert Path(row["audio_filepath"]).is_file()


def test_nested_parquet_columns_are_preserved(tmp_path, capsys):
    turn = pa.struct([("speaker", pa.string()), ("text", pa.string())])
    schema = [("turns", pa.list_(turn)), ("voices", pa.map_(pa.string(), pa.string()))]
    finished_job(tmp_path, [ROWS[1]], schema=schema)
    run(capsys, "--results", tmp_path, "--to", "nemo", "--level", "chunk")
    rows = read_jsonl(tmp_path / "export/nemo/manifest.jsonl")
    assert [row["speaker"] for row in rows] == ["A low voice.", "A high voice."]


# The scratch folder of S3 storage is cleaned up implicitly, when the storage is garbage-collected.
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
def test_export_from_s3(bucket, capsys, monkeypatch):
    bucket.set_environment(monkeypatch)
    job(f"{bucket.uri}/out")
    for kind in ("nemo", "hf", "vtt"):
        assert run(capsys, "--results", f"{bucket.uri}/out", "--to", kind)[0] == 0
    names = [name for name in bucket.names() if name.startswith("out/export")]
    assert "out/export/nemo/manifest.jsonl" in names
    assert "out/export/hf/data/train-00000-of-00001.parquet" in names
    assert sum(key.endswith(".vtt") for key in names) == 3
    content = bucket.get("out/export/nemo/manifest.jsonl")
    assert json.loads(content.splitlines()[0])["audio_filepath"].startswith(f"{bucket.uri}/out/audio/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--results", "/nowhere", "--to", "nemo"), "no results under /nowhere"),
        (("--results", "ftp://there", "--to", "nemo"), "ftp://there"),
        (("--to", "nemo"), "--results"),
        (("--results", "x", "--to", "kaldi"), "kaldi"),
        (("--results", "x", "--to", "srt", "--level", "chunk"), "srt has one file per script"),
    ],
)
def test_invalid_export_is_reported_in_one_sentence(capsys, arguments, message):
    status, stderr = run(capsys, *arguments)
    assert status == 2
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_failed_export_leaves_no_partial_files(tmp_path, capsys):
    results = job(tmp_path / "out")
    Path(results["talk"]["audio_path"]).chmod(0o644)
    Path(results["talk"]["audio_path"]).write_bytes(b"not audio")
    status, stderr = run(
        capsys, "--results", tmp_path / "out", "--to", "hf", "--level", "chunk", "--output", tmp_path / "h"
    )
    assert status == 2
    assert "talk.flac" in stderr
    assert not [path for path in (tmp_path / "h").rglob("*") if path.is_file()]
