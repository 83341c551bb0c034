"""Invalid input: `forward` and `generate` raise one sentence that names the input and the problem."""

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


def valid_batch():
    return builders.batch([9, 12], [5, 7])


def with_changes(**changes):
    return {**valid_batch(), **changes}


def with_value(name, index, value):
    inputs = valid_batch()
    inputs[name][index] = value
    return inputs


ids = valid_batch()["input_ids"]
codes = valid_batch()["audio_out_ids"]
INVALID_BATCHES = {
    "no prompt": (with_changes(input_ids=None), "the prompt is empty"),
    "no tokens": (with_changes(input_ids=ids[:, :0]), "the prompt is empty"),
    "no rows": (with_changes(input_ids=ids[:0]), "the prompt is empty"),
    "masked row": (with_value("attention_mask", 1, 0), r"attention_mask masks the audio placeholder at row 1, token 6"),
    "one dimension": (with_changes(input_ids=ids[0]), r"input_ids has shape \(12\), expected \(batch, tokens\)"),
    "float ids": (with_changes(input_ids=ids.float()), "input_ids has dtype torch.float32, expected integers"),
    "id too large": (
        with_value("input_ids", (0, 4), 160),
        r"input_ids\[0, 4\] = 160 is outside the vocabulary: .* 0 to 159",
    ),
    "negative id": (with_value("input_ids", (1, 0), -3), r"input_ids\[1, 0\] = -3 is outside"),
    "list of ids": (with_changes(input_ids=[[1, 2]]), "input_ids is a list, expected a torch.Tensor"),
    "array of codes": (
        with_changes(audio_out_ids=codes.numpy()),
        "audio_out_ids is a ndarray, expected a torch.Tensor",
    ),
    "mask of twos": (
        with_changes(attention_mask=torch.full_like(ids, 2)),
        "attention_mask has values other than 0 and 1",
    ),
    "mask shape": (with_changes(attention_mask=torch.ones(2, 3)), r"attention_mask has shape \(2, 3\), .* \(2, 12\)"),
    "clip missing": (
        with_changes(audio_out_ids_start=torch.tensor([0])),
        r"audio_out_ids: 1 given, but the prompt has 2 <\|AUDIO_OUT\|>",
    ),
    "placeholder missing": (
        with_value("input_ids", (1, 6), 5),
        r"audio_out_ids: 2 given, .* has 1 <\|AUDIO_OUT\|>",
    ),
    "no codes at all": (
        with_changes(audio_out_ids=None, audio_out_ids_start=None),
        r"audio_out_ids: 0 given, but the prompt has 2",
    ),
    "starts without codes": (
        with_changes(audio_out_ids=None),
        "audio_out_ids_start has 2 clips, but audio_out_ids is missing",
    ),
    "codes without starts": (with_changes(audio_out_ids_start=None), "audio_out_ids_start is missing"),
    "code too large": (
        with_value("audio_out_ids", (2, 3), 26),
        r"audio_out_ids\[2, 3\] = 26 is outside the codebook .* 0 to 25",
    ),
    "negative code": (with_value("audio_out_ids", (0, 0), -1), r"audio_out_ids\[0, 0\] = -1 is outside"),
    "codebooks": (
        with_changes(audio_out_ids=codes[:3]),
        r"audio_out_ids has shape \(3, 12\), expected \(4 codebooks, frames\)",
    ),
    "float codes": (
        with_changes(audio_out_ids=codes.float()),
        "audio_out_ids has dtype torch.float32, expected integers",
    ),
    "starts beyond": (
        with_changes(audio_out_ids_start=torch.tensor([0, 99])),
        r"= \[0, 99\] must start with 0.* 12 frames",
    ),
    "starts fall": (
        with_changes(audio_out_ids_start=torch.tensor([0, -1])),
        r"= \[0, -1\] must start with 0, never decrease",
    ),
    "starts late": (with_changes(audio_out_ids_start=torch.tensor([2, 5])), r"= \[2, 5\] must start with 0"),
    "recording without audio": (
        with_value("input_ids", (0, 4), IN),
        r"1 <\|AUDIO\|> but no audio for it: this network takes audio_in_ids",
    ),
    "recordings without placeholder": (
        with_changes(audio_in_ids=codes, audio_in_ids_start=torch.tensor([0])),
        r"audio_in_ids: 1 given, but the prompt has 0 <\|AUDIO\|>",
    ),
}


@pytest.mark.parametrize("entry", ["forward", "generate"])
@pytest.mark.parametrize(("inputs", "message"), INVALID_BATCHES.values(), ids=INVALID_BATCHES)
def test_invalid_batch_raises(codes_in, inputs, message, entry):
    with pytest.raises(BadInput, match=message) as caught:
        getattr(codes_in, entry)(**inputs)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, HiggsError)
    assert isinstance(caught.value, ValueError)


def test_empty_row_is_named(codes_in):
    with pytest.raises(BadInput, match="the prompt in row 1 is empty: its attention_mask is all zeros"):
        codes_in(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 1], [0, 0]]))


def test_row_of_empty_clips_raises(codes_in):
    with pytest.raises(BadInput, match="the prompt in row 0 is empty: it consists of clips without frames"):
        codes_in(torch.tensor([[OUT]]), audio_out_ids=codes[:, :0], audio_out_ids_start=torch.tensor([0]))


def mels(clips=1, frames=MEL_FRAMES, bins=MELS):
    return torch.zeros(clips, bins, frames)


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (mels(frames=39), None, "audio_features has 39 mel frames, but the audio tower requires exactly 40: pad"),
        (mels(bins=9), None, r"audio_features has shape \(1, 9, 40\), expected \(clips, 8 mel bins, mel frames\)"),
        (mels(clips=2), None, r"audio_features: 2 given, but the prompt has 1 <\|AUDIO\|>"),
        (
            mels().index_fill(1, torch.tensor([3]), float("nan")),
            None,
            "audio_features of clip 0 contains NaN or infinity",
        ),
        (
            mels().index_fill(1, torch.tensor([3]), float("inf")),
            None,
            "audio_features of clip 0 contains NaN or infinity",
        ),
        (mels(), torch.ones(1, 41), r"audio_feature_attention_mask has shape \(1, 41\), .* \(1, 8, 40\)"),
        (mels(), torch.full((1, 40), 2), "audio_feature_attention_mask has values other than 0 and 1"),
        (mels(), torch.arange(40)[None] > 5, "has a 1 after a 0: padding must follow the mel frames of a clip"),
        (mels().long(), None, "audio_features has dtype torch.int64, expected floating-point"),
        (None, None, r"1 <\|AUDIO\|> but no audio .* this network takes audio_features or audio_in_ids"),
    ],
)
def test_invalid_features_raise(with_tower, features, mask, message):
    with pytest.raises(BadInput, match=message):
        with_tower(torch.tensor([[1, IN, 2]]), audio_features=features, audio_feature_attention_mask=mask)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"label_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"label_ids has shape \(2, 3\), expected \(2, 12\)"),
        ({"label_ids": ids + 100}, r"label_ids\[0, 0\] = \d+ is outside the predictable ids"),
        ({"label_audio_ids": codes[:, 1:]}, r"label_audio_ids has shape \(4, 11\), expected \(4, 12\)"),
        ({"label_audio_ids": codes - 50}, r"label_audio_ids\[0, 0\] = -\d+ is outside the predictable ids"),
    ],
)
def test_invalid_labels_raise(codes_in, labels, message):
    with pytest.raises(BadInput, match=message):
        codes_in(**valid_batch(), **labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not a positive integer"),
        ({"temperature": -1.0}, "temperature=-1.0 is not a positive number"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged' is unknown, expected dynamic or static"),
        ({"max_new_tokens": None}, "max_new_tokens=None is not a positive integer"),
        ({"seed": 2**64}, "seed=18446744073709551616 does not fit into 64 bits"),
        ({"seed": "a"}, "seed='a' is neither an integer nor a sequence of integers"),
        ({"eos_token_id": [1.5]}, r"eos_token_id=\[1.5\] is neither an integer"),
        ({"seed": [1]}, "got 1 seeds for a batch of 2"),
        ({"streamer": object()}, "a streamer supports one row, but the batch has 2"),
    ],
)
def test_invalid_generation_options_raise(codes_in, options, message):
    with pytest.raises(BadInput, match=message):
        codes_in.generate(**valid_batch(), **options)


def test_empty_clips_of_a_collator_are_ignored(codes_in):
    """Collators return tensors of shape (0, 0) without clips."""
    no_codes, no_starts = torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    prompt = torch.tensor([[1, 2, 3]])
    output = codes_in(
        prompt,
        audio_in_ids=no_codes,
        audio_in_ids_start=no_starts,
        audio_out_ids=no_codes,
        audio_out_ids_start=no_starts,
    )
    assert torch.equal(output.logits, codes_in(prompt).logits)
    assert output.audio_logits.shape == (0, K, builders.SIZE + 2)


def test_clip_without_frames_expands_to_nothing(codes_in):
    prompt = torch.tensor([[1, OUT, 2, OUT, 3]])
    output = codes_in(prompt, audio_out_ids=codes[:, :4], audio_out_ids_start=torch.tensor([0, 0]), use_cache=True)
    assert output.expanded_input_ids.tolist() == [[1, 2, OUT, OUT, OUT, OUT, 3]]
