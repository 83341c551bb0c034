"""What the demo voice is made from, and what judges it."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from higgs_model import Script
from higgs_model.errors import BadInput
from jobs.demo.conversations import conversations
from jobs.demo.data import choose
from jobs.demo.hearing import word_errors, words_of
from jobs.demo.likeness import VoicePrint
from jobs.demo.sentences import LANGUAGES, Grammar
from jobs.demo.voices import VOICES

COUNTS = {"en": 400, "de": 150, "es": 150}
WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=8)


def test_sentences_are_those_of_the_seed_and_no_two_alike():
    for language in LANGUAGES:
        first, again = (list(itertools.islice(Grammar.of(language).sentences(3), 200)) for _ in range(2))
        assert first == again
        assert len(set(first)) == 200
        assert first != list(itertools.islice(Grammar.of(language).sentences(4), 200))
        assert not any(mark in sentence for sentence in first for mark in "{}_")
        assert all(sentence[0].isupper() or not sentence[0].isalpha() for sentence in first)


def test_endings_of_their_own():
    grammar = Grammar(
        ("They {do}ed two {thing}s.",), {"do": ("carry",), "thing": ("box",)}, {"carry": {"ed": "carried"}}
    )
    assert next(grammar.sentences(0)) == "They carried two boxs."


def test_splits_share_no_sentence_and_held_out_voices_are_new():
    rows = list(choose(COUNTS, 30, 0))
    texts = [(row.language, row.text) for row in rows]
    assert len(set(texts)) == len(texts)
    trained = {row.voice.name for row in rows if row.split == "train"}
    assert len(trained) >= 24
    assert {row.voice.name for row in rows if row.split == "voice"}.isdisjoint(trained)
    assert {row.voice.name for row in rows if row.split == "text"} <= trained
    assert len({row.id for row in rows}) == len(rows)
    # More training changes nothing that is held out.
    more = [row for row in choose({name: 2 * count for name, count in COUNTS.items()}, 30, 0) if row.split != "train"]
    assert more == [row for row in rows if row.split != "train"]


SPOKEN = [
    {
        "text": f"Sentence {at}.",
        "language": ("en", "de")[at % 2],
        "speaker": f"v{at % 8 // 2}",
        "audio": f"{at}.npy",
        "duration_s": 2.0 + at % 3,
    }
    for at in range(400)
]


def heard(row):
    return f"heard-{row['audio']}"


def test_conversations_stand_as_scripts_ask_for_them():
    made = list(conversations(SPOKEN, 60, 0, heard))
    assert made == list(conversations(SPOKEN, 60, 0, heard))
    assert len({row["id"] for row in made}) == 60
    rows = {row["audio"]: row for row in SPOKEN}
    for row in made:
        said = pairs(row["messages"])
        first = row["start_index"] // 2
        references, turns = said[:first], said[first:]
        assert all(path.startswith("heard-") for _, path in references)
        shown = [rows[path.removeprefix("heard-")] for _, path in references]
        answers = [rows[path] for _, path in turns]
        assert len({one["audio"] for one in shown + answers}) == 5
        assert len({one["language"] for one in shown + answers}) == 1
        assert max(one["duration_s"] for one in shown + answers) <= 3
        assert len({one["speaker"] for one in shown}) == first
        # Before it stands what a script of these turns is asked with, its speakers numbered alike.
        if first == 1:
            assert [text for text, _ in said] == [one["text"] for one in shown + answers]
            assert {one["speaker"] for one in answers} == {shown[0]["speaker"]}
            continue
        assert all(one["speaker"] != other["speaker"] for one, other in itertools.pairwise(answers))
        script = [{"speaker": one["speaker"], "text": one["text"]} for one in shown + answers]
        chunks = Script.model_validate({"id": "a", "turns": script, "chunk_method": "speaker"}).chunks()
        assert [text for text, _ in said] == [chunk.prompt_text for chunk in chunks]
    assert {row["start_index"] // 2 for row in made} == {1, 2, 3}


def test_no_conversation_of_voices_that_say_too_little():
    with pytest.raises(BadInput, match="3 voices with 5 sentences"):
        list(conversations(SPOKEN[:40], 1, 0, heard))
    assert not list(conversations(SPOKEN[:40], 0, 0, heard))


def pairs(messages):
    """What users ask, and the recording that answers it."""
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    parts = [message["content"][0] for message in messages]
    return [(asked["text"], answer["audio_url"]) for asked, answer in zip(parts[::2], parts[1::2], strict=True)]


def test_voices_speak_what_they_say_they_speak():
    assert len({voice.name for voice in VOICES}) == len(VOICES)
    for voice in VOICES:
        for language in voice.accents:
            assert not any("{" in part for part in voice.arguments(language))


@given(WORDS, WORDS)
def test_word_errors_are_a_distance(said, heard):
    there, back = word_errors(said, heard), word_errors(heard, said)
    assert there.errors == back.errors
    assert (there.errors == 0) == (said == heard)
    assert abs(len(said) - len(heard)) <= there.errors <= max(len(said), len(heard))


def test_words_of_a_text():
    assert words_of("“Don’t,” said Anna; it's 3.") == ["don't", "said", "anna", "it's"]


def vowel(pitch_hz, formant_hz, seconds=1.0):
    time_s = np.arange(int(24_000 * seconds)) / 24_000
    orders = np.arange(1, int(8000 / pitch_hz))
    weights = np.exp(-(((orders * pitch_hz - formant_hz) / 500) ** 2)) + 0.01
    return (weights @ np.sin(2 * np.pi * pitch_hz * orders[:, None] * time_s) * 0.1).astype(np.float32)


@pytest.mark.parametrize("pitch_hz", [80, 123, 210, 330])
def test_pitch_is_found(pitch_hz):
    assert VoicePrint.of(vowel(pitch_hz, 700), 24_000).pitch_hz == pytest.approx(pitch_hz, rel=0.02)


def test_prints_tell_voices_apart():
    one, same, higher, other = (
        VoicePrint.of(vowel(*sound), 24_000) for sound in ((120, 700), (121, 720), (180, 700), (120, 2000))
    )
    assert one.semitones(same) < 0.5 < 5 < one.semitones(higher)
    assert one.spectral_db(same) < 0.3 * one.spectral_db(other)
    assert np.isnan(VoicePrint.of(np.random.default_rng(0).normal(size=24_000).astype(np.float32), 24_000).pitch_hz)
