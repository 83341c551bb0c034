"""Fixtures: the demo model, loaded once per test process, and a voice library in memory."""

import io

import numpy as np
import pytest
import soundfile

from higgs_model.engine import EngineSettings
from higgs_model.script.voices import Voices
from higgs_model.synthesizer import Synthesizer


class MemoryVoiceReader:
    """A voice store with two recordings and a profile."""

    def __init__(self):
        time = np.arange(4 * 24_000) / 24_000
        self.files = {"profile.yaml": b"profiles: {deep: a deep voice}"}
        for number, name in enumerate(("ann", "bob")):
            file = io.BytesIO()
            tone = 0.3 * np.sin(2 * np.pi * (200 + 90 * number) * time) * (0.5 + 0.5 * np.sin(9 * time))
            soundfile.write(file, tone.astype(np.float32), 24_000, format="WAV", subtype="PCM_16")
            self.files |= {f"{name}.wav": file.getvalue(), f"{name}.txt": b"This is what I sound like, more or less."}

    def names(self):
        return list(self.files)

    def read(self, name):
        return self.files[name]


@pytest.fixture(scope="session")
def voices():
    return Voices(MemoryVoiceReader())


@pytest.fixture(scope="session")
def demo(voices):
    """Share one engine between tests, because results do not depend on concurrent scripts."""
    synthesizer = Synthesizer.from_pretrained("demo", voices=voices, engine=EngineSettings(max_slots=8), device="cpu")
    yield synthesizer
    synthesizer.close()
