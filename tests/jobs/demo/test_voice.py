"""The demo checkpoint produces intelligible speech in the requested voice, and stops at the end of the text."""

import numpy as np
import pytest
import soundfile
import torch

from higgs_model import Script, demo
from higgs_model.engine.settings import EngineSettings
from higgs_model.synthesizer import SynthesisSettings, Synthesizer
from higgs_model.synthesizer.loading import load_model
from jobs.demo.dataset import draw_utterances
from jobs.demo.recipe import MAX_BYTES
from jobs.demo.recognition import SpeechRecognizer, WordErrors, count_word_errors, split_words
from jobs.demo.voice_similarity import VoicePrint
from tests.test_project import ROOT

# One worker, so that the speech is generated once.
pytestmark = pytest.mark.xdist_group("voice")

VOICES = ROOT / "jobs" / "examples" / "voices"
NUM_SENTENCES = 12
SAMPLING = {"temperature": 0.5, "top_k": 30, "language": "en"}


def test_demo_loads_by_name_and_by_path():
    by_name, by_path = (load_model(name, None, torch.device("cpu")) for name in (demo.NAME, demo.CHECKPOINT_DIR))
    assert by_name.codec_id == by_path.codec_id
    for expected, found in zip(by_path.model.parameters(), by_name.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (by_name.codec.num_codebooks, by_name.codec.sample_rate, by_name.codec.hop_samples) == (8, 24_000, 960)
    assert sum(path.stat().st_size for path in demo.CHECKPOINT_DIR.rglob("*") if path.is_file()) <= MAX_BYTES


@pytest.fixture(scope="module")
def speech():
    """Sentences that are not in the training data, in two voices: for each voice, texts and waveforms."""
    utterances = draw_utterances({"en": 0}, NUM_SENTENCES, 0)
    sentences = [utterance.text for utterance in utterances if utterance.split == "text"]
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


def test_recognizer_understands_the_sentences(speech):
    recognizer = SpeechRecognizer()
    transcripts = [(split_words(text), recognizer.transcribe(waveform, 24_000)) for text, waveform in speech["mira"]]
    matched = sum((count_word_errors(text, transcript) for text, transcript in transcripts), WordErrors())
    # Each text against the transcript of another sentence: the error rate of unrelated speech.
    mismatched = sum(
        (count_word_errors(text, transcripts[index - 1][1]) for index, (text, _) in enumerate(transcripts)),
        WordErrors(),
    )
    assert matched.rate < 0.85 * mismatched.rate


def test_clones_have_the_pitch_of_their_reference(speech):
    references = {
        name: VoicePrint.from_samples(*soundfile.read(VOICES / f"{name}.flac", dtype="float32")) for name in speech
    }
    for name, utterances in speech.items():
        pitch_hz = np.median([VoicePrint.from_samples(waveform, 24_000).pitch_hz for _, waveform in utterances])
        distances = {other: abs(np.log(pitch_hz / reference.pitch_hz)) for other, reference in references.items()}
        assert min(distances, key=distances.get) == name


def test_speech_ends_with_the_text(speech):
    for text, waveform in speech["mira"] + speech["jonas"]:
        assert 4 < len(text) / (len(waveform) / 24_000) < 40
