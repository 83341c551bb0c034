"""The dataset of the demo model, and the measures of its speech."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from higgs_model import Script
from higgs_model.errors import BadInput
from jobs.demo.conversations import build_conversations
from jobs.demo.dataset import draw_utterances
from jobs.demo.recognition import count_word_errors, split_words
from jobs.demo.sentences import LANGUAGES, Grammar
from jobs.demo.voice_similarity import VoicePrint
from jobs.demo.voices import VOICES

COUNTS = {"en": 400, "de": 150, "es": 150}
WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=8)


def test_sentences_are_distinct_and_reproducible():
    for language in LANGUAGES:
        first, again = (list(itertools.islice(Grammar.load(language).sentences(3), 200)) for _ in range(2))
        assert first == again
        assert len(set(first)) == 200
        assert first != list(itertools.islice(Grammar.load(language).sentences(4), 200))
        assert not any(mark in sentence for sentence in first for mark in "{}_")
        assert all(sentence[0].isupper() or not sentence[0].isalpha() for sentence in first)


def test_irregular_endings():
    grammar = Grammar(
        ("They {do}ed two {thing}s.",), {"do": ("carry",), "thing": ("box",)}, {"carry": {"ed": "carried"}}
    )
    assert next(grammar.sentences(0)) == "They carried two boxs."


def test_splits_are_disjoint_in_sentences_and_held_out_voices():
    rows = list(draw_utterances(COUNTS, 30, 0))
    texts = [(row.language, row.text) for row in rows]
    assert len(set(texts)) == len(texts)
    training_voices = {row.voice.name for row in rows if row.split == "train"}
    assert len(training_voices) >= 24
    assert {row.voice.name for row in rows if row.split == "voice"}.isdisjoint(training_voices)
    assert {row.voice.name for row in rows if row.split == "text"} <= training_voices
    assert len({row.id for row in rows}) == len(rows)
    # Held-out splits do not change with the amount of training data.
    doubled = draw_utterances({name: 2 * count for name, count in COUNTS.items()}, 30, 0)
    assert [row for row in doubled if row.split != "train"] == [row for row in rows if row.split != "train"]


ROWS = [
    {
        "text": f"Sentence {index}.",
        "language": ("en", "de")[index % 2],
        "speaker": f"v{index % 8 // 2}",
        "audio": f"{index}.npy",
        "duration_s": 2.0 + index % 3,
    }
    for index in range(400)
]


def reference_path(row):
    return f"encoded-{row['audio']}"


def test_conversations_have_the_prompts_of_scripts():
    conversations = list(build_conversations(ROWS, 60, 0, reference_path))
    assert conversations == list(build_conversations(ROWS, 60, 0, reference_path))
    assert len({conversation["id"] for conversation in conversations}) == 60
    rows = {row["audio"]: row for row in ROWS}
    for conversation in conversations:
        exchanges = text_and_audio(conversation["messages"])
        num_references = conversation["start_index"] // 2
        assert all(path.startswith("encoded-") for _, path in exchanges[:num_references])
        references = [rows[path.removeprefix("encoded-")] for _, path in exchanges[:num_references]]
        turns = [rows[path] for _, path in exchanges[num_references:]]
        assert len({row["audio"] for row in references + turns}) == 5
        assert len({row["language"] for row in references + turns}) == 1
        assert max(row["duration_s"] for row in references + turns) <= 3
        assert len({row["speaker"] for row in references}) == num_references
        if num_references == 1:
            assert [text for text, _ in exchanges] == [row["text"] for row in references + turns]
            assert {row["speaker"] for row in turns} == {references[0]["speaker"]}
            continue
        assert all(previous["speaker"] != row["speaker"] for previous, row in itertools.pairwise(turns))
        # A script with these turns has the same prompts, with speakers numbered alike.
        script = [{"speaker": row["speaker"], "text": row["text"]} for row in references + turns]
        chunks = Script.model_validate({"id": "a", "turns": script, "chunk_method": "speaker"}).chunks()
        assert [text for text, _ in exchanges] == [chunk.prompt_text for chunk in chunks]
    assert {conversation["start_index"] // 2 for conversation in conversations} == {1, 2, 3}


def test_conversations_need_enough_voices_and_sentences():
    with pytest.raises(BadInput, match="3 voices with 5 sentences"):
        list(build_conversations(ROWS[:40], 1, 0, reference_path))
    assert not list(build_conversations(ROWS[:40], 0, 0, reference_path))


def text_and_audio(messages):
    """The text of each user message, and the recording in the assistant's answer."""
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    parts = [message["content"][0] for message in messages]
    return [(user["text"], assistant["audio_url"]) for user, assistant in zip(parts[::2], parts[1::2], strict=True)]


def test_voices_have_a_command_line_for_each_language():
    assert len({voice.name for voice in VOICES}) == len(VOICES)
    for voice in VOICES:
        for language in voice.accents:
            assert not any("{" in part for part in voice.command_line(language))


@given(WORDS, WORDS)
def test_word_errors_are_a_distance(reference, hypothesis):
    forward, backward = count_word_errors(reference, hypothesis), count_word_errors(hypothesis, reference)
    assert forward.errors == backward.errors
    assert (forward.errors == 0) == (reference == hypothesis)
    assert abs(len(reference) - len(hypothesis)) <= forward.errors <= max(len(reference), len(hypothesis))


def test_split_words():
    assert split_words("“Don’t,” said Anna; it's 3.") == ["don't", "said", "anna", "it's"]


def synthesize_vowel(pitch_hz, formant_hz, seconds=1.0):
    time_s = np.arange(int(24_000 * seconds)) / 24_000
    harmonics = np.arange(1, int(8000 / pitch_hz))
    weights = np.exp(-(((harmonics * pitch_hz - formant_hz) / 500) ** 2)) + 0.01
    return (weights @ np.sin(2 * np.pi * pitch_hz * harmonics[:, None] * time_s) * 0.1).astype(np.float32)


@pytest.mark.parametrize("pitch_hz", [80, 123, 210, 330])
def test_pitch_of_a_vowel(pitch_hz):
    assert VoicePrint.from_samples(synthesize_vowel(pitch_hz, 700), 24_000).pitch_hz == pytest.approx(
        pitch_hz, rel=0.02
    )


def test_voice_prints_distinguish_voices():
    voice, similar, higher, brighter = (
        VoicePrint.from_samples(synthesize_vowel(*pitch_and_formant), 24_000)
        for pitch_and_formant in ((120, 700), (121, 720), (180, 700), (120, 2000))
    )
    assert voice.pitch_distance_semitones(similar) < 0.5 < 5 < voice.pitch_distance_semitones(higher)
    assert voice.spectral_distance_db(similar) < 0.3 * voice.spectral_distance_db(brighter)
    noise = np.random.default_rng(0).normal(size=24_000).astype(np.float32)
    assert np.isnan(VoicePrint.from_samples(noise, 24_000).pitch_hz)
