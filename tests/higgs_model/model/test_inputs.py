"""Bad input: refused in one sentence that names what and where, by `forward` and by `generate` alike."""

import pytest
import torch

from higgs_model.errors import BadInput, HiggsError
from tests import builders
from tests.builders import IN, MEL_FRAMES, MELS, OUT, K


@pytest.fixture(scope="module")
def codes_in():
    return builders.model()


@pytest.fixture(scope="module")
def with_tower():
    return builders.model(skip_audio_tower=False)


def good():
    return builders.batch([9, 12], [5, 7])


def changed(**changes):
    return {**good(), **changes}


def poked(name, at, value):
    inputs = good()
    inputs[name][at] = value
    return inputs


ids = good()["input_ids"]
codes = good()["audio_out_ids"]
BAD = {
    "no prompt": (changed(input_ids=None), "the prompt is empty"),
    "no tokens": (changed(input_ids=ids[:, :0]), "the prompt is empty"),
    "no rows": (changed(input_ids=ids[:0]), "the prompt is empty"),
    "masked row": (poked("attention_mask", 1, 0), r"attention_mask hides the audio placeholder at row 1, token 6"),
    "one dimension": (changed(input_ids=ids[0]), r"input_ids have shape \(12\), wanted \(batch, tokens\)"),
    "float ids": (changed(input_ids=ids.float()), "input_ids are torch.float32, wanted integers"),
    "id too large": (
        poked("input_ids", (0, 4), 160),
        r"input_ids\[0, 4\] = 160 is outside the vocabulary: .* 0 to 159",
    ),
    "negative id": (poked("input_ids", (1, 0), -3), r"input_ids\[1, 0\] = -3 is outside"),
    "mask shape": (changed(attention_mask=torch.ones(2, 3)), r"attention_mask has shape \(2, 3\), .* \(2, 12\)"),
    "clip missing": (
        changed(audio_out_ids_start=torch.tensor([0])),
        r"audio_out_ids hold 1 clips, but the prompt has 2 <\|AUDIO_OUT\|>",
    ),
    "placeholder missing": (poked("input_ids", (1, 6), 5), r"hold 2 clips, but the prompt has 1 <\|AUDIO_OUT\|>"),
    "no codes at all": (
        changed(audio_out_ids=None, audio_out_ids_start=None),
        r"audio_out_ids hold 0 clips, but the prompt has 2",
    ),
    "starts without codes": (
        changed(audio_out_ids=None),
        "audio_out_ids_start names 2 clips, but audio_out_ids is missing",
    ),
    "codes without starts": (changed(audio_out_ids_start=None), "audio_out_ids_start is missing"),
    "code too large": (
        poked("audio_out_ids", (2, 3), 26),
        r"audio_out_ids\[2, 3\] = 26 is outside a codebook .* 0 to 25",
    ),
    "negative code": (poked("audio_out_ids", (0, 0), -1), r"audio_out_ids\[0, 0\] = -1 is outside"),
    "codebooks": (
        changed(audio_out_ids=codes[:3]),
        r"audio_out_ids have shape \(3, 12\), wanted \(4 codebooks, frames\)",
    ),
    "float codes": (changed(audio_out_ids=codes.float()), "audio_out_ids are torch.float32, wanted integers"),
    "starts beyond": (changed(audio_out_ids_start=torch.tensor([0, 99])), r"= \[0, 99\] must begin with 0.* 12 frames"),
    "starts fall": (changed(audio_out_ids_start=torch.tensor([0, -1])), r"= \[0, -1\] must begin with 0, never fall"),
    "starts late": (changed(audio_out_ids_start=torch.tensor([2, 5])), r"= \[2, 5\] must begin with 0"),
    "recording without audio": (
        poked("input_ids", (0, 4), IN),
        r"1 <\|AUDIO\|> but no audio that this network can take: it wants audio_in_ids",
    ),
    "recordings without placeholder": (
        changed(audio_in_ids=codes, audio_in_ids_start=torch.tensor([0])),
        r"audio_in_ids hold 1 clips, but the prompt has 0 <\|AUDIO\|>",
    ),
}


@pytest.mark.parametrize("entry", ["forward", "generate"])
@pytest.mark.parametrize(("inputs", "message"), BAD.values(), ids=BAD)
def test_bad_batches_are_refused(codes_in, inputs, message, entry):
    with pytest.raises(BadInput, match=message) as caught:
        getattr(codes_in, entry)(**inputs)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, HiggsError)
    assert isinstance(caught.value, ValueError)


def test_an_empty_row_is_named(codes_in):
    with pytest.raises(BadInput, match="the prompt in row 1 is empty: its attention_mask is all zero"):
        codes_in(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 1], [0, 0]]))


def mels(clips=1, frames=MEL_FRAMES, bins=MELS):
    return torch.zeros(clips, bins, frames)


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (mels(frames=39), None, "audio_features are 39 mel frames long, but the audio tower takes exactly 40: pad"),
        (mels(bins=9), None, r"audio_features have shape \(1, 9, 40\), wanted \(clips, 8 mel bins, mel frames\)"),
        (mels(clips=2), None, r"audio_features hold 2 clips, but the prompt has 1 <\|AUDIO\|>"),
        (mels().index_fill(1, torch.tensor([3]), float("nan")), None, "audio_features of clip 0 hold NaN or infinity"),
        (mels().index_fill(1, torch.tensor([3]), float("inf")), None, "audio_features of clip 0 hold NaN or infinity"),
        (mels(), torch.ones(1, 41), r"audio_feature_attention_mask has shape \(1, 41\), .* \(1, 8, 40\)"),
        (None, None, r"1 <\|AUDIO\|> but no audio .* it wants audio_features or audio_in_ids"),
    ],
)
def test_bad_features_are_refused(with_tower, features, mask, message):
    with pytest.raises(BadInput, match=message):
        with_tower(torch.tensor([[1, IN, 2]]), audio_features=features, audio_feature_attention_mask=mask)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"label_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"label_ids have shape \(2, 3\), wanted \(2, 12\)"),
        ({"label_ids": ids + 100}, r"label_ids\[0, 0\] = \d+ is outside what can be predicted"),
        ({"label_audio_ids": codes[:, 1:]}, r"label_audio_ids have shape \(4, 11\), wanted \(4, 12\)"),
        ({"label_audio_ids": codes - 50}, r"label_audio_ids\[0, 0\] = -\d+ is outside what can be predicted"),
    ],
)
def test_bad_labels_are_refused(codes_in, labels, message):
    with pytest.raises(BadInput, match=message):
        codes_in(**good(), **labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not positive"),
        ({"temperature": -1.0}, "temperature=-1.0 is not positive"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' is unknown, wanted dynamic or static"),
        ({"seed": [1]}, "1 seeds were given for a batch of 2"),
        ({"streamer": object()}, "a streamer follows one row, but the batch has 2"),
    ],
)
def test_bad_options_are_refused(codes_in, options, message):
    with pytest.raises(BadInput, match=message):
        codes_in.generate(**good(), **options)


def test_what_a_collator_leaves_empty_is_no_clip(codes_in):
    """Collators give (0, 0) where there are no clips."""
    nothing, starts = torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    prompt = torch.tensor([[1, 2, 3]])
    output = codes_in(
        prompt, audio_in_ids=nothing, audio_in_ids_start=starts, audio_out_ids=nothing, audio_out_ids_start=starts
    )
    assert torch.equal(output.logits, codes_in(prompt).logits)
    assert output.audio_logits.shape == (0, K, builders.SIZE + 2)


def test_a_clip_may_have_no_frames(codes_in):
    prompt = torch.tensor([[1, OUT, 2, OUT, 3]])
    output = codes_in(prompt, audio_out_ids=codes[:, :4], audio_out_ids_start=torch.tensor([0, 0]), use_cache=True)
    assert output.expanded_input_ids.tolist() == [[1, 2, OUT, OUT, OUT, OUT, 3]]
