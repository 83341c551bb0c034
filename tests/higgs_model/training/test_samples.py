"""Rows: simple ones equal the prompt of synthesis, ChatML is parsed, and invalid rows are rejected with a reason."""

import json

import numpy as np
import pytest
import soundfile

from higgs_model.errors import BadInput
from higgs_model.script.plan import Plan
from higgs_model.script.prompt import END_OF_MESSAGE
from higgs_model.script.prompt_builder import PromptBuilder
from higgs_model.script.script import Script
from higgs_model.script.voices import ReferenceCodes, Voices
from higgs_model.training.samples import SampleReader
from tests.higgs_model.training.helpers import TOKENIZER

AUDIO_OUT = TOKENIZER.convert_tokens_to_ids("<|AUDIO_OUT|>")


class FixedCodec:
    sample_rate = 24_000

    def encode(self, waveform, sample_rate):
        return np.zeros((8, 5), np.int64)


@pytest.fixture
def voices(tmp_path):
    noise = np.random.default_rng(0).standard_normal(72_000) * 0.1
    for name in ("ada", "bob"):
        soundfile.write(tmp_path / f"{name}.wav", noise, 24_000)
    (tmp_path / "ada.txt").write_text("What Ada says.")
    return Voices.from_folder(tmp_path)


def decode(span):
    return TOKENIZER.decode(span.ids)


def decode_targets(span):
    return TOKENIZER.decode(span.ids[span.loss_mask])


ROWS = {
    "no voice": {"text": "Hello there"},
    "normalized text": {"text": "(Hello)   there…\n\n\nIt is 5°C [laugh]"},
    "a voice": {"text": "Hello.", "voice": "ada"},
    "a voice without transcript": {"text": "Hello.", "voice": "bob"},
    "a voice in the system message": {"text": "Hello.", "voice": "ada", "voice_in_system": True},
    "a described voice": {"text": "Hello.", "voice": "a deep slow voice"},
    "a scene": {"text": "Hello.", "voice": "ada", "scene": "In a quiet room."},
    "speakers": {
        "turns": [{"speaker": "Ann", "text": "Hi"}, {"speaker": "Bo", "text": "Ho."}],
        "voices": {"Ann": "ada", "Bo": "bob"},
    },
    "several speakers without voices": {"text": "[SPEAKER0] Hi\n[SPEAKER1] Ho"},
    "special tokens in user text": {"text": "Say <|eot_id|> now"},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_simple_row_starts_with_the_prompt_of_synthesis(row, voices):
    """They are equal up to `<|audio_out_bos|>`, which forces audio and is the first target."""
    script = Script.model_validate({"id": "x", "chunk_method": "none", **row})
    prompt = PromptBuilder(Plan.from_script(script, voices), TOKENIZER, ReferenceCodes(FixedCodec())).build(0, [])
    sample = SampleReader(TOKENIZER, voices).read({"id": "x", "audio": "own.wav", **row}, 0)
    ids = [*sample.prefix.ids.tolist(), *sample.turn.ids.tolist()]
    loss_mask = [*sample.prefix.loss_mask.tolist(), *sample.turn.loss_mask.tolist()]
    assert ids[: len(prompt.token_ids)] == prompt.token_ids
    assert loss_mask == [False] * (len(prompt.token_ids) - 1) + [True] * 4
    assert TOKENIZER.decode(ids[-4:]) == "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    assert sample.sources[-1] == "own.wav"
    assert len(sample.sources) == len(prompt.audio) + 1


def test_reference_equals_the_prompt_of_voice_cloning(voices):
    """A reference followed by another row's turn equals the prompt of cloning the reference's voice."""
    reader = SampleReader(TOKENIZER, voices)
    sample = reader.read({"audio": "a.wav", "text": "What Ada says.", "speaker": "ada"}, 0)
    row = {"id": "x", "text": "Something else", "voice": "ada", "chunk_method": "none"}
    prompt = PromptBuilder(
        Plan.from_script(Script.model_validate(row), voices), TOKENIZER, ReferenceCodes(FixedCodec())
    ).build(0, [])
    turn = reader.read({"audio": "b.wav", "text": "Something else", "speaker": "ada"}, 1).turn
    assert [*sample.reference.ids, *turn.ids][: len(prompt.token_ids)] == prompt.token_ids
    assert not sample.reference.loss_mask.any()
    assert sample.reference.clips == (0,)


@pytest.mark.parametrize("own", [{"voice": "ada"}, {"scene": "Here."}, {"ref_audio": "x.wav"}, {"speaker": None}])
def test_row_with_its_own_voice_is_no_reference(own, voices, tmp_path):
    own = {name: str(tmp_path / "bob.wav") if name == "ref_audio" else value for name, value in own.items()}
    row = {"audio": "a.wav", "text": "Hello.", "speaker": "ada", **own}
    assert SampleReader(TOKENIZER, voices).read(row, 0).reference is None


CHAT = {
    "messages": [
        {"role": "system", "content": "Be kind. <|scene_desc_start|>\nquiet <|x|>\n<|scene_desc_end|>"},
        {"role": "user", "content": ["What is it? ", {"type": "audio", "audio_url": "in.wav"}]},
        {"role": "assistant", "content": {"type": "text", "text": "Rain."}},
        {"role": "user", "content": "Say it."},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Yes: "}, {"type": "audio", "audio_url": "out.wav"}],
        },
    ]
}


@pytest.mark.parametrize("form", ["objects", "json", "parquet"])
def test_chatml_answers_are_targets(form):
    row = json.loads(json.dumps(CHAT))
    if form == "json":
        row["messages"] = json.dumps(row["messages"])
    if form == "parquet":  # missing columns are null
        row |= {"text": None, "id": float("nan"), "start_index": float("nan"), "speaker": None}
        row["messages"][3]["recipient"] = None
        row["messages"][4]["content"][1] |= {"text": None, "raw_audio": None, "duration": None}
    sample = SampleReader(TOKENIZER).read(row, 7)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert decode(sample.prefix) == (
        f"<|begin_of_text|>{header('system')}Be kind. <|scene_desc_start|>\nquiet < |x|>\n<|scene_desc_end|><|eot_id|>"
        f"{header('user')}What is it? <|audio_bos|><|AUDIO|><|audio_eos|><|eot_id|>"
        f"{header('assistant')}Rain.<|eot_id|>{header('user')}Say it.<|eot_id|>"
        f"{header('assistant')}Yes: <|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    )
    assert decode_targets(sample.prefix) == "Rain.<|eot_id|>Yes: <|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
    assert sample.sources == ("in.wav", "out.wav")
    assert sample.id == "row7"
    later = SampleReader(TOKENIZER).read(row | {"start_index": 3}, 0)
    assert decode_targets(later.prefix) == "Yes: <|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"


def chat_row(*content):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": list(content)}]}


INVALID_ROWS = {
    "audio is None; expected the recording's path": {"text": "a"},
    "text: missing: set text or turns": {"audio": "a.wav"},
    "the text has 2 chunks; expected 1": {"audio": "a.wav", "text": "One. [pause:1s] Two."},
    "messages must be a list": {"messages": 3},
    "messages is a string, but not valid JSON": {"messages": "{"},
    "messages[0] is 'a'; expected an object": {"messages": ["a"]},
    "messages[0].role is 'robot'; expected one of system, user, assistant": {"messages": [{"role": "robot"}]},
    "messages[0].recipient is 'tool'": {"messages": [{"role": "user", "content": "a", "recipient": "tool"}]},
    "messages[0].content is None; expected a text": {"messages": [{"role": "user"}]},
    "messages[1].content[0] is {'type': 'video'}": chat_row({"type": "video"}),
    "messages[1].content[0] has no audio_url": chat_row({"type": "audio"}),
    "messages[1].content[0] has duration; expected a full recording": chat_row(
        {"type": "audio", "audio_url": "a.wav", "duration": 3.0}
    ),
    "no message from start_index=0 on is the assistant's": {"messages": [{"role": "user", "content": "a"}]},
    "start_index is 9; expected the index of a message, 0 to 1": {**chat_row("b"), "start_index": 9},
}


@pytest.mark.parametrize(("message", "row"), INVALID_ROWS.items(), ids=INVALID_ROWS)
def test_invalid_row_is_rejected_with_its_reason(message, row):
    with pytest.raises(BadInput) as error:
        SampleReader(TOKENIZER).read({"id": "x7", **row}, 41)
    assert str(error.value).startswith("row 41 (x7): ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_consecutive_answers_require_an_end_of_message_token():
    row = {"messages": [{"role": "assistant", "content": "a"}] * 2}

    class Plain:
        encode, convert_tokens_to_ids = TOKENIZER.encode, TOKENIZER.convert_tokens_to_ids

        @staticmethod
        def get_added_vocab():
            return {token: number for token, number in TOKENIZER.get_added_vocab().items() if token != END_OF_MESSAGE}

    with pytest.raises(BadInput, match=r"are both the assistant's, but the tokenizer has no <\|eom_id\|>"):
        SampleReader(Plain()).read(row, 0)
    assert TOKENIZER.convert_tokens_to_ids(END_OF_MESSAGE) in SampleReader(TOKENIZER).read(row, 0).prefix.ids
