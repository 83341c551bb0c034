"""The embedded checkpoint speaks: what is said can be made out, in the voice that was asked for, until it is said."""

import numpy as np
import pytest
import soundfile
import torch

from higgs_model import Script, demo
from higgs_model.engine.settings import EngineSettings
from higgs_model.synthesizer import SynthesisSettings, Synthesizer
from higgs_model.synthesizer.loading import load_model
from jobs.demo.data import choose
from jobs.demo.hearing import Recogniser, WordErrors, word_errors, words_of
from jobs.demo.likeness import VoicePrint
from jobs.demo.recipe import MAX_BYTES
from tests.test_project import ROOT

# What is spoken is spoken once.
pytestmark = pytest.mark.xdist_group("voice")

VOICES = ROOT / "jobs" / "examples" / "voices"
NUM_SENTENCES = 12
SAMPLING = {"temperature": 0.5, "top_k": 30, "language": "en"}


def test_it_is_a_checkpoint_like_any_other():
    named, found = (load_model(name, None, torch.device("cpu")) for name in (demo.NAME, demo.CHECKPOINT_DIR))
    assert named.codec_id == found.codec_id
    for one, other in zip(named.model.parameters(), found.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert (named.codec.num_codebooks, named.codec.sample_rate, named.codec.hop_samples) == (8, 24_000, 960)
    assert sum(path.stat().st_size for path in demo.CHECKPOINT_DIR.rglob("*") if path.is_file()) <= MAX_BYTES


@pytest.fixture(scope="module")
def spoken():
    """Sentences that it was not taught, in two voices."""
    sentences = [one.text for one in choose({"en": 0}, NUM_SENTENCES, 0) if one.split == "text"]
    synthesizer = Synthesizer.from_pretrained(
        demo.NAME, voices=VOICES, engine=EngineSettings(max_slots=8), settings=SynthesisSettings(attempts=2)
    )
    try:
        yield {
            voice: [
                (text, synthesizer.synthesize(Script(id="x", text=text, voice=voice, seed=1, **SAMPLING)).waveform)
                for text in sentences
            ]
            for voice in ("mira", "jonas")
        }
    finally:
        synthesizer.close()


def test_a_recogniser_hears_what_was_to_be_said(spoken):
    recogniser = Recogniser()
    heard = [(words_of(text), recogniser.words(sound, 24_000)) for text, sound in spoken["mira"]]
    right = sum((word_errors(said, found) for said, found in heard), WordErrors())
    # Against the next sentence: what it would be if it said something else.
    wrong = sum((word_errors(said, heard[at - 1][1]) for at, (said, _) in enumerate(heard)), WordErrors())
    assert right.rate < 0.85 * wrong.rate


def test_voices_are_like_their_references(spoken):
    prints = {name: VoicePrint.of(*soundfile.read(VOICES / f"{name}.flac", dtype="float32")) for name in spoken}
    own = {
        name: np.median([VoicePrint.of(sound, 24_000).pitch_hz for _, sound in sounds])
        for name, sounds in spoken.items()
    }
    for name, pitch_hz in own.items():
        far = {other: abs(np.log(pitch_hz / made.pitch_hz)) for other, made in prints.items()}
        assert min(far, key=far.get) == name


def test_it_stops_when_all_is_said(spoken):
    for text, sound in spoken["mira"] + spoken["jonas"]:
        assert 4 < len(text) / (len(sound) / 24_000) < 40
