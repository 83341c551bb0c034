"""The recipe from one end to the other, small and with tones for teachers; what comes out loads as any checkpoint."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml

from higgs_model import Script
from higgs_model.errors import BadInput
from higgs_model.synthesizer import SynthesisSettings, Synthesizer
from jobs.demo import __main__ as command
from jobs.demo import data, recipe
from jobs.demo.teacher import SAMPLE_RATE_HZ

RECIPE = Path(command.__file__).with_name("recipe.yaml")


def small():
    """The recipe as it is, made for seconds."""
    made = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    made["data"] = {"sentences": {"en": 200, "de": 50}, "held_out": 2, "conversations": 3}
    made["codec"]["codec"] |= {"decoder_channels": 64, "acoustic_dim": 16, "codebook_dim": 16, "codebook_size": 32}
    made["codec"]["training"] |= {"steps": 2, "taught_steps": 2, "crop_frames": 4, "batch_size": 1}
    made["model"]["init"]["config"]["audio_codebook_size"] = 32
    made["model"]["optimizer"] |= {"steps": 2, "warmup_steps": 1}
    made["model"]["validate_every"] = 2
    return made


def tone(voice, language, text):
    times = np.arange(len(text) * SAMPLE_RATE_HZ // 50) / SAMPLE_RATE_HZ
    pitch_hz = 100 + zlib.crc32(voice.name.encode()) % 100
    return (0.5 * np.sin(2 * np.pi * pitch_hz * times)).astype(np.float32)


def test_the_recipe_goes_all_the_way_and_on_where_it_was_stopped(tmp_path, monkeypatch):
    config, work, output = tmp_path / "recipe.yaml", tmp_path / "work", tmp_path / "checkpoint"
    config.write_text(yaml.safe_dump(small()))
    monkeypatch.setattr(data, "check_synthesizers", lambda: None)
    monkeypatch.setattr(data, "speak", tone)
    arguments = ["--config", str(config), "--work", str(work), "--output", str(output)]
    with monkeypatch.context() as broken:
        broken.setattr(recipe, "train", lambda _: 1)
        with pytest.raises(BadInput, match="goes on with it"):
            command.main(arguments)
    assert not output.exists()
    # What is done is not done again.
    monkeypatch.setattr(data, "speak", None)
    assert command.main(arguments) == 0

    rows = (work / "codes" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 200 + 50 + 3
    assert sum('"start_index"' in row for row in rows) == 3
    synthesizer = Synthesizer.from_pretrained(str(output), settings=SynthesisSettings(attempts=1))
    try:
        # What two steps teach is mostly silence.
        assert len(synthesizer.synthesize(Script(id="a", text="Good morning.", seed=1)).chunks) == 1
    finally:
        synthesizer.close()
