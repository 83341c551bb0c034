"""Fixtures: a voice library of short tones, a codec without weights, and the tokenizer of the golden cases."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerFast

from higgs_model.script.voices import ReferenceCodes, Voices

GOLDEN = Path(__file__).parents[2] / "golden" / "script"
REFERENCE = json.loads((GOLDEN / "reference.json").read_text(encoding="utf-8"))
SAMPLE_RATE = 24_000


class TinyCodec:
    """A codec whose codes are computed from the samples without weights; it counts its calls."""

    sample_rate = SAMPLE_RATE

    def __init__(self):
        self.calls = 0

    def encode(self, waveform, sample_rate):
        self.calls += 1
        frames = len(waveform) * 25 // sample_rate
        return (np.arange(8 * frames).reshape(8, frames) + int(abs(waveform).sum())) % 1024


def tone(seconds, hz=220.0, sample_rate=SAMPLE_RATE, level=0.3):
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * sample_rate)) / sample_rate)).astype(np.float32)


def wav(samples, sample_rate=SAMPLE_RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


@pytest.fixture(scope="session")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_file=str(GOLDEN / "tokenizer.json"))


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    for number, (name, transcript) in enumerate(REFERENCE["voices"].items()):
        (folder / f"{name}.wav").write_bytes(wav(tone(4 + number, 200 + 50 * number)))
        (folder / f"{name}.txt").write_text(transcript, encoding="utf-8")
    (folder / "profile.yaml").write_text(json.dumps({"profiles": REFERENCE["profiles"]}), encoding="utf-8")
    return folder


@pytest.fixture
def voices(library):
    return Voices.from_folder(library)


@pytest.fixture
def codes():
    return ReferenceCodes(TinyCodec())
