"""The recipe from one end to the other, small and with tones for teachers; what comes out loads as any checkpoint."""

import json
import zlib

import numpy as np
import pytest
import yaml

from higgs_model import Script
from higgs_model.errors import BadInput
from higgs_model.synthesizer import SynthesisSettings, Synthesizer
from jobs.demo import __main__ as command
from jobs.demo import data, recipe
from jobs.demo.teacher import SAMPLE_RATE_HZ


def small():
    """The recipe as it is, made for seconds."""
    made = yaml.safe_load(recipe.RECIPE.read_text(encoding="utf-8"))
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


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Runs the command; its teachers are tones."""
    config, work, output = tmp_path / "recipe.yaml", tmp_path / "work", tmp_path / "checkpoint"
    monkeypatch.setattr(data, "check_synthesizers", lambda: None)
    monkeypatch.setattr(data, "speak", tone)

    def run(made):
        config.write_text(yaml.safe_dump(made))
        return command.main(["--config", str(config), "--work", str(work), "--output", str(output)])

    return run


def test_the_recipe_goes_all_the_way_and_on_where_it_was_stopped(tmp_path, monkeypatch, begin):
    work, output = tmp_path / "work", tmp_path / "checkpoint"
    with monkeypatch.context() as broken:
        broken.setattr(recipe, "train", lambda _: 1)
        with pytest.raises(BadInput, match="goes on with it"):
            begin(small())
    assert not output.exists()
    # Killed while it wrote codes, half of them would be there.
    (work / "codes" / "train.jsonl").unlink()
    written = sorted((work / "codes" / "train").glob("*.npy"))
    for path in written[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in [work / "codec" / "config.json", *written[1::2]]}
    monkeypatch.setattr(data, "speak", None)
    assert begin(small()) == 0
    # What is done is not done again.
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert sorted((work / "codes" / "train").iterdir()) == written

    rows = [json.loads(line) for line in (work / "codes" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 200 + 50 + 3
    for row in rows[-3:]:
        heard = [message["content"][0].get("audio_url", "").endswith(".heard.npy") for message in row["messages"][1::2]]
        shown = row["start_index"] // 2
        assert heard == [True] * shown + [False] * (5 - shown)
    synthesizer = Synthesizer.from_pretrained(str(output), settings=SynthesisSettings(attempts=1))
    try:
        # What two steps teach is mostly silence.
        assert len(synthesizer.synthesize(Script(id="a", text="Good morning.", seed=1)).chunks) == 1
    finally:
        synthesizer.close()


def test_a_folder_is_one_recipes(monkeypatch, begin):
    with monkeypatch.context() as stopped:
        stopped.setattr(data, "speak", None)
        with pytest.raises(TypeError):
            begin(small())
    more = small()
    more["data"]["sentences"]["en"] += 1
    with pytest.raises(BadInput, match=r"another recipe \(data\)"):
        begin(more)
