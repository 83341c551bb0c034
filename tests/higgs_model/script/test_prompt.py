"""Prompts: user text adds no special tokens; the oldest chunks are dropped first, and references remain."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model import Script
from higgs_model.errors import BadInput
from higgs_model.script.duration import estimate_frames
from higgs_model.script.plan import Plan
from higgs_model.script.prompt_builder import PromptBuilder
from higgs_model.script.voices import ReferenceCodes, Voices
from tests.higgs_model.script.conftest import TinyCodec

LONG = " ".join(f"Sentence number {number} of this rather long story goes on." for number in range(12))
HOSTILE = [
    "<|eot_id|>",
    "<|AUDIO|>",
    "<|audio_out_bos|>",
    "<|",
    "|>",
    "《|eot_id|》",
    "<\x00|eot_id|>",
    "<(|eot_id|>",
    "<\u200b|eot_id|>",
    "＜｜eot_id｜＞",
    "<<||eot_id|>",
    "<SE>",
    "\u202e",
    "\x1b",
    "eot_id",
]


@given(
    text=st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=10)), min_size=1).map("".join),
    method=st.sampled_from(["none", "word", "sentence"]),
)
@settings(max_examples=150, deadline=None)
def test_user_text_never_becomes_a_special_token(tokenizer, text, method):
    text = "Hi " + text.encode("utf-8", "ignore").decode().replace("[pause:", "")
    row = {
        "id": "a",
        "text": text,
        "scene": "S" + text,
        "voice": "described " + text,
        "chunk_method": method,
        "chunk_max_words": 3,
    }
    plan = Plan.from_script(Script.model_validate(row), Voices())
    special = set(tokenizer.get_added_vocab().values())
    prompt = PromptBuilder(plan, tokenizer, None, force_audio=False).build(0, [])
    # Begin of text; header and end of the system and user messages; start and end of the scene; answer header.
    assert sum(token_id in special for token_id in prompt.token_ids) == 1 + 3 + 3 + 2 + 2
    assert (
        tokenizer.encode(prompt.text, add_special_tokens=False).count(tokenizer.convert_tokens_to_ids("<|eot_id|>"))
        == 2
    )


@given(
    lengths=st.lists(st.integers(0, 400), min_size=12, max_size=12),
    context=st.one_of(st.none(), st.integers(0, 12)),
    max_length=st.integers(700, 2500),
)
@settings(max_examples=100, deadline=None)
def test_context_fits_and_references_remain(tokenizer, library, lengths, context, max_length):
    row = {
        "id": "a",
        "text": LONG,
        "chunk_method": "sentence",
        "chunk_max_words": 10,
        "voice": "ada",
        "context_chunks": context,
    }
    plan = Plan.from_script(Script.model_validate(row), Voices.from_folder(library))
    prompt_builder = PromptBuilder(plan, tokenizer, ReferenceCodes(TinyCodec()), max_length=max_length)
    takes = [None if length == 0 else np.zeros((8, length), dtype=np.int64) for length in lengths]
    for chunk in plan.chunks:
        prompt = prompt_builder.build(chunk.index, takes[: chunk.index])
        assert prompt.audio[0] == "ada"
        included = [int(name.removeprefix("chunk")) for name in prompt.audio[1:]]
        expected = [i for i in range(prompt.first_context_chunk, chunk.index) if takes[i] is not None]
        assert included == expected
        assert context is None or chunk.index - prompt.first_context_chunk <= context
        answer_length = prompt.max_frames + 9 + 2
        assert prompt.num_positions == len(prompt.token_ids) + sum(codes.shape[1] + 8 for codes in prompt.codes)
        assert prompt.num_positions + answer_length <= max_length


def test_chunk_that_does_not_fit_raises_an_error_with_advice(tokenizer):
    plan = Plan.from_script(Script(id="a", text="word " * 3000, chunk_method="none"), Voices())
    with pytest.raises(BadInput, match="chunk_method 'sentence'"):
        PromptBuilder(plan, tokenizer, None).build(0, [])


def test_tokenizer_without_audio_tokens_is_refused(tokenizer):
    class OtherTokenizer:
        def get_added_vocab(self):
            return {"<s>": 1}

    plan = Plan.from_script(Script(id="a", text="Hello."), Voices())
    with pytest.raises(BadInput, match="no special token"):
        PromptBuilder(plan, OtherTokenizer(), None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("The sun rises in the east, and it sets in the west, as it has done for thousands of years.", 5.5),
        ("我来到北京清华大学,今天天气很好.", 3.5),
    ],
)
def test_frame_budget_contains_real_reading_times(text, seconds):
    budget = estimate_frames(text)
    assert budget.min_frames < 0.7 * seconds * 25
    assert 0.7 * seconds * 25 < budget.expected_frames < 1.6 * seconds * 25 < budget.max_frames


def test_max_frames_of_a_row_overrides_the_estimate():
    assert Plan.from_script(Script(id="a", text="Hello there.", max_frames=77), Voices()).max_frames == (77,)
    without_limit = Plan.from_script(Script(id="a", text="Hello there."), Voices())
    assert without_limit.max_frames == (estimate_frames("Hello there.").max_frames,)
