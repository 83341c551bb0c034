"""The recipe end to end, small and with tones as teachers; its result loads like any other checkpoint."""

import json
import zlib

import numpy as np
import pytest
import yaml

from higgs_model import Script
from higgs_model.errors import BadInput
from higgs_model.synthesizer import SynthesisSettings, Synthesizer
from jobs.demo import __main__ as command
from jobs.demo import dataset, recipe
from jobs.demo.teacher import SAMPLE_RATE_HZ


def small_recipe():
    """The project's recipe, reduced to run in seconds."""
    config = yaml.safe_load(recipe.RECIPE.read_text(encoding="utf-8"))
    config["data"] = {"sentences": {"en": 200, "de": 50}, "held_out": 2, "conversations": 3}
    config["codec"]["codec"] |= {"decoder_channels": 64, "acoustic_dim": 16, "codebook_dim": 16, "codebook_size": 32}
    config["codec"]["training"] |= {"steps": 2, "taught_steps": 2, "crop_frames": 4, "batch_size": 1}
    config["model"]["init"]["config"]["audio_codebook_size"] = 32
    config["model"]["optimizer"] |= {"steps": 2, "warmup_steps": 1}
    config["model"]["validate_every"] = 2
    return config


def synthesize_tone(voice, language, text):
    times = np.arange(len(text) * SAMPLE_RATE_HZ // 50) / SAMPLE_RATE_HZ
    pitch_hz = 100 + zlib.crc32(voice.name.encode()) % 100
    return (0.5 * np.sin(2 * np.pi * pitch_hz * times)).astype(np.float32)


@pytest.fixture
def run_recipe(tmp_path, monkeypatch):
    """Runs the command with tones as teachers."""
    path, work, output = tmp_path / "recipe.yaml", tmp_path / "work", tmp_path / "checkpoint"
    monkeypatch.setattr(dataset, "check_synthesizers", lambda: None)
    monkeypatch.setattr(dataset, "synthesize", synthesize_tone)

    def run(config):
        path.write_text(yaml.safe_dump(config))
        return command.main(["--config", str(path), "--work", str(work), "--output", str(output)])

    return run


def test_recipe_resumes_and_finishes(tmp_path, monkeypatch, run_recipe):
    work, output = tmp_path / "work", tmp_path / "checkpoint"
    with monkeypatch.context() as failing:
        failing.setattr(recipe, "train", lambda _: 1)
        with pytest.raises(BadInput, match="to resume it"):
            run_recipe(small_recipe())
    assert not output.exists()
    # As if the encoding had been killed halfway.
    (work / "codes" / "train.jsonl").unlink()
    written = sorted((work / "codes" / "train").glob("*.npy"))
    for path in written[::2]:
        path.unlink()
    mtimes = {path: path.stat().st_mtime_ns for path in [work / "codec" / "config.json", *written[1::2]]}
    monkeypatch.setattr(dataset, "synthesize", None)
    assert run_recipe(small_recipe()) == 0
    # Finished work is not repeated.
    assert {path: path.stat().st_mtime_ns for path in mtimes} == mtimes
    assert sorted((work / "codes" / "train").iterdir()) == written

    rows = [json.loads(line) for line in (work / "codes" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 200 + 50 + 3
    for row in rows[-3:]:
        audio = [message["content"][0].get("audio_url", "") for message in row["messages"][1::2]]
        num_references = row["start_index"] // 2
        assert [path.endswith(".encoded.npy") for path in audio] == [index < num_references for index in range(5)]
    synthesizer = Synthesizer.from_pretrained(str(output), settings=SynthesisSettings(attempts=1))
    try:
        # After two training steps the output is mostly silence.
        assert len(synthesizer.synthesize(Script(id="a", text="Good morning.", seed=1)).chunks) == 1
    finally:
        synthesizer.close()


def test_work_folder_belongs_to_one_recipe(monkeypatch, run_recipe):
    with monkeypatch.context() as interrupted:
        interrupted.setattr(dataset, "synthesize", None)
        with pytest.raises(TypeError):
            run_recipe(small_recipe())
    other = small_recipe()
    other["data"]["sentences"]["en"] += 1
    with pytest.raises(BadInput, match=r"another recipe \(data differs\)"):
        run_recipe(other)
