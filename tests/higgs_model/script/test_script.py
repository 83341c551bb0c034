"""The schema: every fault at once, no other exception ever, and a hash that is the audio's."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from higgs_model import Script
from higgs_model.sampling import SamplingParams
from higgs_model.script.script import faults
from higgs_model.script.spoken import Lexicon
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


def _checked(row):
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
@settings(max_examples=400, deadline=None)
def test_a_row_is_a_script_or_a_validation_error(row):
    script, error = _checked(row)
    if error is not None:
        assert faults(error)
        assert str(error)
    if script is not None:
        assert script.chunks()
        assert script.content_hash()
        script.warnings()


def test_a_number_too_long_to_print_is_a_fault():
    with pytest.raises(ValidationError):
        Script.model_validate({"id": "a", "text": "Hello.", "seed": 10**5000})


@pytest.mark.parametrize("unit", ["[", "[pause:", "{", "\u202e", "[SPEAKER0] ", "x ", "\n", "<|", "。"])
def test_checking_a_huge_text_takes_linear_time(unit):
    begin = time.process_time()
    try:
        Script.model_validate({"id": "a", "text": unit * 300_000})
    except ValidationError as error:
        faults(error)
    assert time.process_time() - begin < 10


def test_every_fault_is_said_at_once():
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
    columns = {line.split(":")[0] for line in faults(caught.value)}
    assert columns == {"id", "text", "turns", "voices.Bob", "ref_text", "seed", "temperature"}


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({}, "nothing to say"),
        ({"text": "..."}, "nothing in it that can be spoken"),
        ({"text": "a", "voice": "x", "ref_audio": "y"}, "give one of"),
        ({"text": "a", "voices": {"Bob": "x"}}, "SPEAKER0"),
        (
            {"turns": [{"speaker": "SPEAKER0", "text": "a"}, {"speaker": "Bob", "text": "b"}]},
            "or none of them",
        ),
        ({"turns": [{"speaker": "Al", "text": "[SPEAKER1] b"}]}, "give each speaker a turn"),
        ({"text": "a [pause:9999s] b"}, "longest pause"),
        ({"text": "a\ud800"}, "surrogate"),
    ],
)
def test_faults_in_words(row, word):
    with pytest.raises(ValidationError, match=word):
        Script.model_validate({"id": "a", **row})


@pytest.mark.parametrize("name", ["", ".", "a/b", "a..b", "a\n", "é", "x" * 201, " a", "C:\\x"])
def test_ids_that_name_no_file(name):
    with pytest.raises(ValidationError):
        Script(id=name, text="Hello.")


def test_what_tables_make_of_a_row():
    plain = Script(
        id="a",
        turns=[{"speaker": "Al", "text": "Hi."}, {"speaker": "Bo", "text": "Oh."}],
        voices={"Al": "x"},
        seed=3,
    )
    shapes = [
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
    for shape in shapes:
        assert Script.model_validate({"id": "a", "turns": turns, **shape}) == plain
    assert Script.model_validate_json(json.dumps({"id": "a", **plain.model_dump(exclude_none=True)})) == plain


BASE = {"id": "a", "text": "[SPEAKER0] Hello there.\n[SPEAKER1] And hello to you.", "seed": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"id": "b"},
        {"text": "[SPEAKER0] Hello  there。\n\n [SPEAKER1] And hello to you"},
        {
            "text": None,
            "turns": [
                {"speaker": "SPEAKER0", "text": "Hello there."},
                {"speaker": "SPEAKER1", "text": "And hello to you."},
            ],
        },
        {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "ras_win_len": 7},
        {"chunk_method": "speaker"},
        {"chunk_max_words": 50},
        {"context_chunks": 5},
        {"voice_in_system": True},
        {"scene": "  "},
        {"anything": "else"},
    ],
)
def test_hash_stays_where_the_audio_does(change):
    assert Script.model_validate({**BASE, **change}).content_hash() == Script.model_validate(BASE).content_hash()


@pytest.mark.parametrize(
    "change",
    [
        {"text": BASE["text"] + " Yes."},
        {"text": BASE["text"].replace("there.", "there.[pause:1s]")},
        {"text": BASE["text"].replace("there.", "there.[pause:2s]")},
        {"seed": 2},
        {"temperature": 0.5},
        {"max_frames": 100},
        {"context_chunks": 0},
        {"chunk_method": "none"},
        {"scene": "A pier."},
        {"voice": "ada"},
        {"voices": {"SPEAKER1": "ada"}},
        {"voices": {"SPEAKER0": "ada"}},
        {"ref_audio": "x.wav"},
        {"ref_audio": "x.wav", "ref_text": "Hello."},
    ],
)
def test_hash_changes_with_the_audio(change):
    changed = Script.model_validate({**BASE, **change}).content_hash()
    assert changed != Script.model_validate(BASE).content_hash()


def test_hash_follows_the_contents_of_voices(tmp_path):
    script = Script(id="a", text="Hello there.", voice="ada")
    hashes = set()
    for audio, transcript in [(b"1", "one"), (b"2", "one"), (b"2", "two"), (b"2", " two\n")]:
        (tmp_path / "ada.wav").write_bytes(audio)
        (tmp_path / "ada.txt").write_text(transcript)
        hashes.add(script.content_hash(Voices.from_folder(tmp_path)))
    assert len(hashes) == 3


def test_hash_follows_the_lexicon_only_where_it_is_used():
    script = Script(id="a", text="Hello Siobhan.")
    assert script.content_hash(lexicon=Lexicon({"Siobhan": "Shivawn"})) != script.content_hash()
    assert script.content_hash(lexicon=Lexicon({"Niamh": "Neev"})) == script.content_hash()


def test_defaults_fill_gaps_only():
    script = Script(id="a", text="Hello.", seed=5).with_defaults({"seed": 1, "temperature": 0.5})
    assert (script.seed, script.temperature) == (5, 0.5)


def test_warnings_name_what_to_mend():
    script = Script(id="a", text="[SPEAKER0] Hi [whisper].\n[SPEAKER1] Oh.", voices={"SPEAKER0": "x", "SPEAKER7": "y"})
    found = " ".join(script.warnings())
    assert "[whisper]" in found
    assert "SPEAKER1 has no voice" in found
    assert "SPEAKER7 has a voice but never speaks" in found


@pytest.mark.parametrize(
    ("row", "wanted"),
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
def test_sampling_is_what_the_sampler_takes(row, wanted):
    assert SamplingParams(**Script(id="a", text="Hello.", **row).sampling()) == wanted


@pytest.mark.parametrize("temperature", [-1, float("inf"), "warm", 11])
def test_impossible_temperatures_are_faults(temperature):
    with pytest.raises(ValidationError) as error:
        Script(id="a", text="Hello.", temperature=temperature)
    assert [fault.split(":")[0] for fault in faults(error.value)] == ["temperature"]
