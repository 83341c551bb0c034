"""The training command: errors in settings and data, resuming after a kill, and equal results on a cluster."""

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from higgs_model.script.voices import Voices
from higgs_model.synthesizer.loading import load_model
from higgs_model.training.batch_sampler import SequenceSpec
from higgs_model.training.samples import SampleReader
from higgs_model.training.settings import TrainingSettings, load_settings
from jobs.benchmark.random_model import build
from jobs.runtime.cli import run_command
from jobs.train import train
from tests.higgs_model.training import helpers
from tests.jobs.job_runner import ROOT, start_job


def write_settings(folder, network=None, **others):
    """Write a settings file for a short training, as a user would."""
    settings = helpers.build_settings(folder, network, **others)
    values = settings.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def update_settings(path, **others):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | others))
    return path


BAD_SETTINGS = {
    "optimizer.steps: Field required": {"optimizer": {}},
    "unknown setting optimizer.learning_rat; did you mean learning_rate?": {
        "optimizer": {"steps": 1, "learning_rat": 1e-3}
    },
    "unknown setting sede; did you mean seed?": {"sede": 1},
    "init: set either checkpoint (fine-tuning) or config": {"init": {}},
    "init: config requires tokenizer": {"init": {"config": {}}},
    "batch: positions=64 is less than longest=128": {"batch": {"positions": 64, "longest": 128}},
    "previews require parallel: ddp": {"parallel": "fsdp", "previews": {"every": 1, "rows": [{"text": "a"}]}},
    "previews.rows: 0: text: missing: set text or turns": {"previews": {"every": 1, "rows": [{"id": "a"}]}},
    "output: must be a folder shared by all workers, not a URI": {"output": "s3://bucket/out"},
    "loss.codebooks: weights must not be negative": {"loss": {"codebooks": [1, -1]}},
    "is not a folder": {"init": {"checkpoint": "/nowhere"}},
    "'/nowhere.jsonl' does not exist": {"data": {"manifest": "/nowhere.jsonl"}},
}


@pytest.mark.parametrize(("message", "invalid"), BAD_SETTINGS.items(), ids=BAD_SETTINGS)
def test_invalid_settings_print_one_line(tmp_path, capsys, message, invalid):
    path = update_settings(write_settings(tmp_path), **invalid)
    assert run_command(train, ["--config", str(path)]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_settings_and_rows_of_readme_and_example_are_valid():
    section = (ROOT / "jobs/README.md").read_text().split("## Train\n")[1].split("\n## ")[0]
    yaml_block, json_block = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("yaml", "json"))
    settings = TrainingSettings.model_validate(yaml.safe_load(yaml_block))
    assert settings.freeze.llm
    lines = [line for line in yaml_block.splitlines() if not line.startswith("  checkpoint:")]
    from_scratch = yaml.safe_load("\n".join(re.sub(r"^( *)# ", r"\1", line) for line in lines))
    assert from_scratch["init"].keys() == {"config", "tokenizer"}
    assert load_settings(ROOT / "jobs" / "examples" / "train.yaml").previews is not None
    voices = Voices(read_bytes=lambda name: (ROOT / "jobs" / "examples" / "voices" / "ada.flac").read_bytes())
    example = (ROOT / "jobs" / "examples" / "train.jsonl").read_text()
    rows = [json.loads(line) for text in (json_block, example) for line in text.splitlines()]
    samples = [SampleReader(helpers.TOKENIZER, voices).read(row, number) for number, row in enumerate(rows)]
    assert len(samples) == 6
    assert [sample.reference is not None for sample in samples] == [True, False, False, True, True, True]


def test_misspelled_config_key_is_rejected(tmp_path, capsys):
    path = write_settings(tmp_path, {"audio_num_codebook": 3})
    assert run_command(train, ["--config", str(path)]) == 2
    assert "unknown key 'audio_num_codebook'; did you mean 'audio_num_codebooks'?" in capsys.readouterr().err


def test_config_that_does_not_match_the_tokenizer_is_rejected(tmp_path, capsys):
    path = write_settings(tmp_path, {"audio_out_token_idx": 7})
    helpers.write_rows(tmp_path)
    assert run_command(train, ["--config", str(path)]) == 2
    assert "audio_out_token_idx=7, but the tokenizer's <|AUDIO_OUT|> is 266" in capsys.readouterr().err


def test_invalid_rows_are_reported_or_skipped(tmp_path, capsys):
    path = write_settings(tmp_path)
    rows = helpers.write_rows(tmp_path)
    np.save(tmp_path / "2.npy", np.full((helpers.K, 4), 99))
    lines = [json.dumps(row) for row in rows]
    lines[1] = json.dumps(rows[1] | {"audio": "gone.npy"})
    lines[4] = "{not JSON"
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert run_command(train, ["--config", str(path)]) == 2
    stderr = capsys.readouterr().err
    assert "has 3 invalid rows, data.bad_rows allows 0: " in stderr
    assert "row 1 (r1): 'gone.npy' cannot be read" in stderr
    assert "2.npy' has codes from 99 to 99; expected 0 to 11" in stderr
    assert "row 4: the line is not JSON" in stderr
    data = yaml.safe_load(path.read_text())["data"]
    assert run_command(train, ["--config", str(update_settings(path, data=data | {"bad_rows": 3}))]) == 0
    stderr = capsys.readouterr().err
    assert stderr.count("skipped: ") == 3
    assert "done; the model is in" in stderr


def test_repaired_recording_is_prepared_again(tmp_path, capsys):
    path = write_settings(tmp_path)
    helpers.write_rows(tmp_path)
    good = (tmp_path / "2.npy").read_bytes()
    (tmp_path / "2.npy").write_bytes(b"nothing")
    assert run_command(train, ["--config", str(path)]) == 2
    assert "2.npy' is not a valid .npy file" in capsys.readouterr().err
    (tmp_path / "2.npy").write_bytes(good)
    assert run_command(train, ["--config", str(path)]) == 0


def test_training_does_not_resume_on_different_data(tmp_path, capsys):
    path = write_settings(tmp_path)
    helpers.write_rows(tmp_path)
    assert run_command(train, ["--config", str(path)]) == 0
    helpers.write_rows(tmp_path, count=4)
    assert run_command(train, ["--config", str(path)]) == 2
    assert "has a training run on different data: the manifest" in capsys.readouterr().err


def test_empty_validation_set_fails_before_training(tmp_path, capsys):
    path = write_settings(tmp_path)
    helpers.write_rows(tmp_path)
    (tmp_path / "valid.jsonl").write_text('{"text": "a", "audio": "gone.npy"}\n')
    data = yaml.safe_load(path.read_text())["data"] | {"validation": str(tmp_path / "valid.jsonl"), "bad_rows": 1}
    assert run_command(train, ["--config", str(update_settings(path, data=data))]) == 2
    assert "valid.jsonl' has no usable validation sample" in capsys.readouterr().err


def test_training_resumed_after_a_kill_has_identical_losses(tmp_path):
    (tmp_path / "uninterrupted").mkdir()
    many = {"steps": 120, "learning_rate": 1e-3}
    path = write_settings(tmp_path, optimizer=many, checkpoints={"every": 10})
    helpers.write_rows(tmp_path, 12, speaker=lambda number: f"s{number % 2}")
    uninterrupted = update_settings(
        write_settings(tmp_path / "uninterrupted", optimizer=many), data={"manifest": str(tmp_path / "train.jsonl")}
    )
    assert run_command(train, ["--config", str(uninterrupted)]) == 0
    # Rounding depends on the number of threads, which is one in this process.
    process = start_job("jobs.train", "--config", path, OMP_NUM_THREADS="1")
    checkpoints = tmp_path / "out" / "checkpoints"
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    last_checkpoint = max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    assert last_checkpoint < 120
    assert run_command(train, ["--config", str(path)]) == 0
    assert helpers.read_losses(helpers.build_settings(tmp_path)) == helpers.read_losses(
        helpers.build_settings(tmp_path / "uninterrupted")
    )


def test_recordings_are_encoded_and_previews_are_synthesized(tmp_path):
    """WAV files become codes, a checkpoint, and previews as WAV files."""
    _, codec, _ = build()
    codec.save_pretrained(tmp_path / "codec")
    generator = np.random.default_rng(0)
    rows = []
    for number in range(3):
        wave = generator.standard_normal(24_000).astype(np.float32) * 0.1
        soundfile.write(tmp_path / f"{number}.wav", wave, 24_000)
        rows.append({"text": f"Row {number}.", "audio": f"{number}.wav", "speaker": "s"})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    preview = {"id": "hello", "text": "Hello.", "ref_audio": str(tmp_path / "0.wav"), "ref_text": "Row 0."}
    network = {"audio_num_codebooks": 8, "audio_codebook_size": codec.codebook_size}
    given = {"codec": str(tmp_path / "codec"), "previews": {"every": 6, "rows": [preview], "max_frames": 20}}
    path = write_settings(tmp_path, network, **given)
    assert run_command(train, ["--config", str(path)]) == 0
    settings = helpers.build_settings(tmp_path, network, **given)
    shard = next((tmp_path / "out" / "prepared").glob("*/*.safetensors"))
    samples = helpers.prepare_dataset(settings, [], shard.parent)
    for number in range(3):
        wave, rate = soundfile.read(tmp_path / f"{number}.wav", dtype="float32")
        found = samples.example(SequenceSpec((number,), -1, 0)).recordings[-1].codes_KT
        assert np.array_equal(found, codec.encode(wave, rate).numpy())
    loaded = load_model(tmp_path / "out" / "model", None, torch.device("cpu"))
    assert torch.equal(loaded.codec.encode(wave, rate), codec.encode(wave, rate))
    assert loaded.tokenizer.get_vocab() == helpers.TOKENIZER.get_vocab()
    wave, rate = soundfile.read(tmp_path / "out" / "previews" / "step-00000006" / "hello.wav")
    assert rate == codec.sample_rate
    assert len(wave) % codec.hop_samples == 0


@pytest.mark.xdist_group("ray")
@pytest.mark.usefixtures("cluster")
def test_cluster_training_matches_a_single_process(tmp_path):
    """Ray Data prepares the same samples; two Ray Train workers match one process that accumulates two batches."""
    helpers.write_rows(tmp_path, 12)
    (tmp_path / "alone").mkdir()
    batch = {"positions": 160, "longest": 160}
    alone = write_settings(tmp_path / "alone", batch=batch | {"accumulate": 2})
    update_settings(alone, data={"manifest": str(tmp_path / "train.jsonl")})
    assert run_command(train, ["--config", str(alone)]) == 0
    process = start_job("jobs.train", "--config", write_settings(tmp_path, batch=batch), "--workers", 2)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "done; the model is in" in stderr
    assert "step 6: loss " in stderr
    losses = [helpers.read_losses(helpers.build_settings(folder)) for folder in (tmp_path / "alone", tmp_path)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    shards = [sorted(Path(tmp_path, output, "prepared").glob("*/*")) for output in ("alone/out", "out")]
    assert [path.name for path in shards[0]] == [path.name for path in shards[1]]
    for expected, found in zip(*shards, strict=True):
        torch.testing.assert_close(load_file(found), load_file(expected), atol=0, rtol=0)
