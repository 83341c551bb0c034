"""The schema reports all errors at once as a ValidationError, and the hash identifies the audio."""

import datetime
import decimal
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from higgs_model import Script
from higgs_model.errors import BadInput
from higgs_model.sampling import SamplingParams
from higgs_model.script.plan import Plan
from higgs_model.script.prompt import render
from higgs_model.script.script import error_messages
from higgs_model.script.spoken_forms import Lexicon
from higgs_model.script.voices import Voices

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=30),
    st.binary(max_size=5),
    st.sampled_from(
        [
            "\ud800",
            "\ud83d\ude00",
            "\u202eabc",
            "../../etc/passwd",
            "a\x00b",
            "[pause:9",
            "{x}",
            "a" * 100_000,
            10**4000,
        ]
    ),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(SCALARS, inner, max_size=4))
)
COLUMNS = st.sampled_from([*Script.model_fields, "extra"])


def _validate(row):
    try:
        return Script.model_validate(row), None
    except ValidationError as error:
        return None, error


@given(
    row=st.one_of(
        VALUES,
        st.dictionaries(COLUMNS, VALUES),
        st.fixed_dictionaries({"id": st.just("a"), "text": st.text()}),
    )
)
@settings(max_examples=250, deadline=None)
def test_any_row_is_a_script_or_a_validation_error(row):
    script, error = _validate(row)
    if error is not None:
        assert error_messages(error)
        assert str(error)
    if script is not None:
        assert script.chunks()
        assert script.content_hash()
        script.warnings()


def test_integer_too_long_to_print_is_an_error():
    with pytest.raises(ValidationError):
        Script.model_validate({"id": "a", "text": "Hello.", "seed": 10**5000})


@pytest.mark.parametrize("unit", ["[", "[pause:", "{", "\u202e", "[SPEAKER0] ", "x ", "\n", "<|", "。", "a"])
def test_huge_text_is_a_script_or_a_validation_error(unit):
    script, error = _validate({"id": "a", "text": unit * 300_000})
    assert script is not None or error_messages(error)


@pytest.mark.parametrize("column", ["turns", "voices", "text", "scene", "seed", "id"])
def test_values_of_any_type_and_depth_raise_only_validation_errors(column):
    deep = "x"
    for _ in range(5000):
        deep = {"speaker": "a", "text": "b", "x": [deep]}
    values = [deep, [deep], decimal.Decimal("1.5"), datetime.date(2024, 3, 5), object(), np.datetime64("2024-03-05")]
    values += [np.array([[1, 2]]), {1, 2}, range(3), b"a", 10**5000, {None: None}, lambda: None, pa.scalar("a")]
    for value in values:
        script, error = _validate({"id": "a", "turns": [{"speaker": "a", "text": "b"}], column: value})
        assert script is not None or error_messages(error)


def test_null_of_any_type_is_a_missing_value():
    row = {"id": "a", "text": "Hello.", "scene": pd.NA, "voice": pd.NaT, "seed": np.nan, "turns": None, "voices": {}}
    assert Script.model_validate(row) == Script(id="a", text="Hello.")


def test_thousands_of_speakers_are_accepted_until_they_exceed_the_context():
    turns = [{"speaker": f"Speaker {number}", "text": "Hello there, my friends."} for number in range(3_000)]
    script = Script.model_validate({"id": "a", "turns": turns, "voices": {"Speaker 0": "a low voice"}})
    assert len(script.warnings()) == 2_999
    assert script.speaker_name("SPEAKER2999") == "Speaker 2999"
    with pytest.raises(BadInput, match="of the model's 8192 positions"):
        Plan.from_script(Script.model_validate({"id": "a", "turns": turns}), Voices()).dry_run()


def test_control_characters_are_removed_before_checks():
    script = Script(id="a", text="[SPEA\x00KER1] Hi [pau\x07se:1s]there <\x00|eot_id|>, you.\x1b")
    assert script.speaker_tags() == ["SPEAKER1"]
    assert [chunk.text for chunk in script.chunks()] == ["[SPEAKER1] Hi", "there <|eot_id|>, you."]


def test_all_errors_are_reported_at_once():
    row = {
        "id": "../x",
        "text": "[SPEAKER0]\n[SPEAKER1] hi [pause:x]",
        "turns": [],
        "voice": "a",
        "voices": {"Bob": 3},
        "ref_text": "x",
        "seed": True,
        "temperature": 99,
    }
    with pytest.raises(ValidationError) as caught:
        Script.model_validate(row)
    columns = {line.split(":")[0] for line in error_messages(caught.value)}
    assert columns == {"id", "text", "turns", "voices.Bob", "ref_text", "seed", "temperature"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "set text or turns"),
        ({"text": "..."}, "contains nothing to speak"),
        ({"text": "a", "voice": "x", "ref_audio": "y"}, "set only one of"),
        ({"text": "a", "voices": {"Bob": "x"}}, "SPEAKER0"),
        (
            {"turns": [{"speaker": "SPEAKER0", "text": "a"}, {"speaker": "Bob", "text": "b"}]},
            "or none",
        ),
        ({"turns": [{"speaker": "Al", "text": "[SPEAKER1] b"}]}, "use one turn per speaker"),
        ({"text": "a [pause:9999s] b"}, "the maximum"),
        ({"text": "a\ud800"}, "surrogate"),
        ({"text": "a", "voices": [("SPEAKER0", "x"), ("SPEAKER0", "y")]}, "appears twice"),
    ],
)
def test_invalid_row_is_explained(row, message):
    with pytest.raises(ValidationError, match=message):
        Script.model_validate({"id": "a", **row})


@pytest.mark.parametrize("name", ["", ".", "a/b", "a..b", "a\n", "é", "x" * 201, " a", "C:\\x"])
def test_invalid_id_is_refused(name):
    with pytest.raises(ValidationError):
        Script(id=name, text="Hello.")


def test_table_values_are_normalized():
    plain = Script(
        id="a",
        turns=[{"speaker": "Al", "text": "Hi."}, {"speaker": "Bo", "text": "Oh."}],
        voices={"Al": "x"},
        seed=3,
    )
    variants = [
        {
            "voices": [("Al", "x"), ("Bo", None)],
            "seed": 3.0,
            "text": None,
            "scene": float("nan"),
            "other": object(),
        },
        {
            "voices": [{"speaker": "Al", "voice": "x"}],
            "seed": np.int64(3),
            "top_k": np.float64("nan"),
            "text": "",
        },
    ]
    turns = np.array([{"speaker": "Al", "text": "Hi."}, {"speaker": "Bo", "text": "Oh."}])
    for variant in variants:
        assert Script.model_validate({"id": "a", "turns": turns, **variant}) == plain
    assert Script.model_validate_json(json.dumps({"id": "a", **plain.model_dump(exclude_none=True)})) == plain


def _none_or_one_of(**columns):
    return {name: st.one_of(st.none(), st.sampled_from(values)) for name, values in columns.items()}


TURNS = [{"speaker": "SPEAKER0", "text": "Hello there."}, {"speaker": "SPEAKER1", "text": "And hello to you."}]
CONTENT = {
    "text": st.sampled_from(
        [
            {"text": "[SPEAKER0] Hello there.\n[SPEAKER1] And hello to you."},
            {"text": "[SPEAKER0] Hello  there。\n\n [SPEAKER1] And\x00 hello to you"},
            {"turns": TURNS},
            {"text": "[SPEAKER0] Hello there.[pause:1s]\n[SPEAKER1] And hello to you."},
            {"text": "[SPEAKER0] Hello there.[pause:1000ms]\n[SPEAKER1] And hello to you."},
            {"text": "[SPEAKER0] Hello there.[pause:2s]\n[SPEAKER1] And hello to you."},
            {"text": "Hello there, 2 friends."},
            {"text": "Hello there, two friends."},
        ]
    ),
    "voice": st.sampled_from(
        [
            {},
            {"voice": "ada"},
            {"voice": "same as ada"},
            {"voices": {"SPEAKER0": "ada"}},
            {"voices": {"SPEAKER0": "copy"}},
            {"voices": {"SPEAKER1": "ada"}},
            {"voices": {"SPEAKER0": "ada", "SPEAKER1": "other"}},
            {"voices": [{"speaker": "SPEAKER1", "voice": "other"}, {"speaker": "SPEAKER0", "voice": "copy"}]},
            {"voice": "profile:calm"},
            {"voice": "A calm voice."},
            {"voices": {"SPEAKER0": "profile:calm", "SPEAKER1": "ada"}},
            {"ref_audio": "ada.wav"},
            {"ref_audio": "ada.wav", "ref_text": "One two."},
            {"ref_audio": "copy.wav", "ref_text": " One two.\n"},
            {"voice": "untranscribed"},
        ]
    ),
}
OPTIONS = _none_or_one_of(
    id=["a", "b"],
    anything=["else"],
    chunk_method=["auto", "speaker", "none", "sentence"],
    chunk_max_words=[50, 2],
    chunk_max_turns=[1, 2],
    context_chunks=[0, 1, 5],
    voice_in_system=[True, False],
    scene=["  ", "A pier.", " A pier.\n"],
    spoken_forms=[True, False],
    seed=[1],
    temperature=[1, 1.0, 0.5, 0],
    top_k=[50, 10],
    top_p=[0.95],
    ras_win_len=[7, 0, -1],
    max_frames=[100],
)


class HashVoiceReader:
    """A library in which two names and a row's own recording have the same audio and transcript."""

    files = {"ada.wav": b"A", "ada.txt": b"One two.", "copy.wav": b"A", "copy.txt": b" One two.\n"}
    files |= {
        "other.wav": b"B",
        "other.txt": b"Three.",
        "untranscribed.wav": b"A",
        "profile.yaml": b"profiles: {calm: A calm voice.}",
    }

    def names(self):
        return list(self.files)

    def read(self, name):
        return self.files[name]


HASH_VOICES = Voices(HashVoiceReader(), HashVoiceReader().read)


def _list_audio_inputs(script):
    """Return everything that affects the audio: an oracle that is independent of the hash."""
    references = script.references(HASH_VOICES)
    audio = {name: voice.audio for name, voice in references.recordings.items()}
    chunks = script.chunks()
    prompts = [render([message]) + str([audio[name] for name in message.clips]) for message in references.messages]
    chunk_inputs = [
        (chunk.prompt_text, chunk.boundary, chunk.silence_before_ms, chunk.silence_after_ms) for chunk in chunks
    ]
    limit = len(chunks) if script.context_chunks is None else script.context_chunks
    context = [list(range(max(0, index - limit), index)) for index in range(len(chunks))]
    return prompts, chunk_inputs, context, script.seed, script.max_frames, script.sampling()


ROWS = st.fixed_dictionaries({"id": st.just("a"), **CONTENT, **OPTIONS})


@given(first=ROWS, second=ROWS, keep=st.sets(st.sampled_from([*CONTENT, *OPTIONS])))
@settings(max_examples=200, deadline=None)
def test_hash_changes_exactly_when_the_audio_could(first, second, keep):
    second |= {name: first[name] for name in keep}
    scripts = []
    for row in (first, second):
        columns = {name: value for name, value in row.items() if name not in CONTENT}
        scripts.append(
            Script.model_validate({**columns, "id": row["id"] or "c", "language": "en", **row["text"], **row["voice"]})
        )
    same_hash = scripts[0].content_hash(HASH_VOICES) == scripts[1].content_hash(HASH_VOICES)
    assert same_hash == (_list_audio_inputs(scripts[0]) == _list_audio_inputs(scripts[1]))


def test_hash_depends_on_the_content_of_voices(tmp_path):
    script = Script(id="a", text="Hello there.", voice="ada")
    hashes = set()
    for audio, transcript in [(b"1", "one"), (b"2", "one"), (b"2", "two"), (b"2", " two\n")]:
        (tmp_path / "ada.wav").write_bytes(audio)
        (tmp_path / "ada.txt").write_text(transcript)
        hashes.add(script.content_hash(Voices.from_folder(tmp_path)))
    assert len(hashes) == 3


def test_hash_depends_on_the_lexicon_only_if_it_applies():
    script = Script(id="a", text="Hello Siobhan.")
    assert script.content_hash(lexicon=Lexicon({"Siobhan": "Shivawn"})) != script.content_hash()
    assert script.content_hash(lexicon=Lexicon({"Niamh": "Neev"})) == script.content_hash()


def test_defaults_apply_only_to_missing_values():
    script = Script(id="a", text="Hello.", seed=5).with_defaults({"seed": 1, "temperature": 0.5})
    assert (script.seed, script.temperature) == (5, 0.5)


def test_likely_mistakes_have_warnings():
    script = Script(id="a", text="[SPEAKER0] Hi [whisper].\n[SPEAKER1] Oh.", voices={"SPEAKER0": "x", "SPEAKER7": "y"})
    warnings = " ".join(script.warnings())
    assert "[whisper]" in warnings
    assert "SPEAKER1 has no voice" in warnings
    assert "SPEAKER7 has a voice but never speaks" in warnings


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, SamplingParams(do_sample=True, top_p=0.95, ras_win_len=7)),
        ({"temperature": 0}, SamplingParams(do_sample=False, ras_win_len=7)),
        ({"temperature": 0, "top_k": 3, "top_p": 0.1, "ras_win_len": -1}, SamplingParams(do_sample=False)),
        (
            {"temperature": 0.7, "top_k": 0, "ras_win_len": 5, "ras_win_max_num_repeat": 1},
            SamplingParams(True, 0.7, 0, 0.95, 5, 1),
        ),
    ],
)
def test_sampling_parameters_have_the_reference_defaults(row, expected):
    assert SamplingParams(**Script(id="a", text="Hello.", **row).sampling()) == expected


@pytest.mark.parametrize("temperature", [-1, float("inf"), "warm", 11])
def test_invalid_temperature_is_refused(temperature):
    with pytest.raises(ValidationError) as error:
        Script(id="a", text="Hello.", temperature=temperature)
    assert [message.split(":")[0] for message in error_messages(error.value)] == ["temperature"]
