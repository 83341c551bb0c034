"""Prompts, chunks and normalized text equal the reference implementation's, by character and by token id."""

import hashlib
import json

import numpy as np
import pytest

from higgs_model import Script
from higgs_model.script.normalize import normalize
from higgs_model.script.plan import Plan
from higgs_model.script.prompt_builder import PromptBuilder
from tests.higgs_model.script.conftest import REFERENCE

CASES = {case["row"]["id"]: case for case in REFERENCE["cases"]}


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@pytest.mark.parametrize(("text", "expected"), REFERENCE["normalized"])
def test_normalized_text_equals_the_reference(text, expected):
    assert normalize(text) == expected


def _misses_paragraphs(case):
    """Return whether the reference misses the paragraphs that it intends to split by."""
    return case["row"]["chunk_method"] == "word" and "\n\n" in case["row"]["text"]


def _has_blank_chunks(case):
    """Return whether the reference creates chunks of single spaces, as it does for Chinese split word by word."""
    return not all(chunk["text"].strip() for chunk in case["chunks"])


COMPARABLE = [name for name, case in CASES.items() if not _misses_paragraphs(case) and not _has_blank_chunks(case)]


@pytest.mark.parametrize("name", COMPARABLE)
def test_dry_run_equals_the_reference(name, voices):
    case = CASES[name]
    lines = Plan.from_script(Script.model_validate(case["row"]), voices).dry_run()
    assert [line["text"] for line in lines] == [chunk["text"] for chunk in case["chunks"]]
    assert [line["audio"] for line in lines] == [chunk["audio"] for chunk in case["chunks"]]
    last = len(lines) - 1
    for number, (line, chunk) in enumerate(zip(lines, case["chunks"], strict=True)):
        actual = line["prompt"] if number == last else _digest(line["prompt"])
        assert actual == chunk["prompt"]


@pytest.mark.parametrize("name", COMPARABLE)
def test_token_ids_equal_the_reference(name, voices, tokenizer, codes):
    case = CASES[name]
    plan = Plan.from_script(Script.model_validate(case["row"]), voices)
    prompt_builder = PromptBuilder(plan, tokenizer, codes, force_audio=False)
    takes = [np.full((8, 10 + number), number) for number in range(len(plan.chunks))]
    for chunk in plan.chunks:
        prompt = prompt_builder.build(chunk.index, takes[: chunk.index])
        expected = case["chunks"][chunk.index]
        assert _digest(json.dumps(prompt.token_ids)) == expected["ids"]
        assert list(prompt.audio) == expected["audio"]
        assert tokenizer.decode(prompt.token_ids, clean_up_tokenization_spaces=False) == prompt.text
        placeholders = prompt.text.count("<|AUDIO|>") + prompt.text.count("<|AUDIO_OUT|>")
        assert placeholders == len(prompt.codes) == len(prompt.audio)
        clip_positions = sum(codes.shape[1] + 9 - 1 for codes in prompt.codes)
        assert prompt.num_positions == len(prompt.token_ids) + clip_positions


def test_force_audio_appends_one_token(voices, tokenizer, codes):
    plan = Plan.from_script(Script(id="a", text="Hello there."), voices)
    unforced = PromptBuilder(plan, tokenizer, codes, force_audio=False).build(0, [])
    forced = PromptBuilder(plan, tokenizer, codes).build(0, [])
    assert forced.token_ids == [*unforced.token_ids, tokenizer.convert_tokens_to_ids("<|audio_out_bos|>")]
    assert forced.num_positions == unforced.num_positions + 1


def test_word_splits_each_paragraph_separately(voices):
    case = next(case for case in CASES.values() if _misses_paragraphs(case))
    lines = Plan.from_script(Script.model_validate(case["row"]), voices).dry_run()
    text = "".join(line["text"] + " " for line in lines)
    assert text.split() == "".join(chunk["text"] + " " for chunk in case["chunks"]).split()
    assert sum(line["text"].endswith("\n\n") for line in lines) == 2


def test_blank_chunks_are_merged(voices):
    case = next(case for case in CASES.values() if _has_blank_chunks(case))
    lines = Plan.from_script(Script.model_validate(case["row"]), voices).dry_run()
    assert all(line["text"].strip() for line in lines)
    assert "".join(line["text"] for line in lines) == "".join(chunk["text"] for chunk in case["chunks"])


def test_voice_of_the_first_speaker_equals_the_voice_of_the_script(voices):
    row = dict(CASES["shared"]["row"])
    assert len(Script.model_validate(row).speaker_tags()) > 1
    row["voices"] = {"SPEAKER0": row.pop("voice")}
    lines = Plan.from_script(Script.model_validate(row), voices).dry_run()
    assert [line["prompt"] for line in lines] == [chunk["prompt"] for chunk in CASES["shared"]["chunks"]]
    row["voices"] = {"SPEAKER1": "ada"}
    assert (
        "\n\n[SPEAKER1] "
        in Plan.from_script(Script.model_validate(row), voices).dry_run()[0]["prompt"].split("<|AUDIO_OUT")[0]
    )
