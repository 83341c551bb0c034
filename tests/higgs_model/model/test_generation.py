"""Reference generation: batches, seeds, modes, streaming, limits."""

import pytest
import torch

from higgs_model.delay import from_stream
from higgs_model.errors import BadInput
from higgs_model.model import KVCache
from tests import builders
from tests.builders import AUDIO_EOS, BOS, EOS, EOT, OUT, OUT_BOS, SIZE, K


def select_row(batch, row, clip_frames):
    """Return one row of a batch without padding."""
    mask = batch["attention_mask"][row].bool()
    start = batch["audio_out_ids_start"][row]
    return {
        "input_ids": batch["input_ids"][row, mask].unsqueeze(0),
        "audio_out_ids": batch["audio_out_ids"][:, start : start + clip_frames[row]],
        "audio_out_ids_start": torch.tensor([0]),
    }


def assert_equal_up_to_rounding(found, expected):
    """Compare outputs of networks in double precision.

    Rounding differs between shapes and processors, but is far smaller than the effect of a wrong position. Some logits
    are returned as float32, which rounds them once more.
    """
    assert found.dtype == expected.dtype
    bound = max(1e-9, 4 * torch.finfo(found.dtype).eps)
    torch.testing.assert_close(found, expected, atol=bound * expected.abs().max().item(), rtol=0)


VARIANTS = {
    "dual ffn": {},
    "fast forward": {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [0, 2]},
    "audio attention": {"use_audio_out_self_attention": True, "audio_dual_ffn_layers": [0, 2]},
    "stack": {"audio_adapter_type": "stack"},
}


@pytest.mark.parametrize("end", [OUT_BOS, 7], ids=["audio", "text first"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_batched_row_generates_the_same_as_alone(variant, attention, end):
    model = builders.model(seed=5, **variant)
    model.set_attn_implementation(attention)
    frames = [5, 11, 7]
    batch = builders.batch([9, 17, 12], frames, seed=2, end=end)
    options = {"max_new_tokens": 40, "do_sample": True, "top_p": 0.85, "ras_win_len": 5}
    seeds = [3, 1, 4]
    batched = model.generate(**batch, **options, seed=seeds)
    for row in range(3):
        alone = model.generate(**select_row(batch, row, frames), **options, seed=seeds[row])
        row_clips = [c for c, r in zip(batched.audio_sequences, batched.audio_rows, strict=True) if r == row]
        assert len(row_clips) == len(alone.audio_sequences)
        for found, expected in zip(row_clips, alone.audio_sequences, strict=True):
            assert torch.equal(found, expected)
        prompt_length = batch["input_ids"].shape[1]
        answer = alone.sequences[0, int(batch["attention_mask"][row].sum()) :]
        assert torch.equal(batched.sequences[row, prompt_length : prompt_length + len(answer)], answer)


def test_eager_and_sdpa_agree():
    batch = builders.batch([9, 17], [5, 11], seed=2)
    logits = []
    for attention in ("sdpa", "eager"):
        model = builders.model(skip_audio_tower=False, use_audio_out_self_attention=True)
        model.set_attn_implementation(attention)
        output = model(**batch)
        logits.append(output.logits[output.attention_mask])
    # Eager attention computes its softmax in float32, whatever the dtype of the network.
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4 * max(1.0, logits[1].abs().max().item()), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_cached_continuation_equals_a_single_pass(variant):
    """Run text and audio in several passes over one cache, and compare with a single pass."""
    model = builders.model(seed=3, **variant).double()
    generator = torch.Generator().manual_seed(0)
    codes = builders.clip(generator, 9)
    prompt = torch.tensor([[1, 2, OUT_BOS, OUT, AUDIO_EOS, 3, OUT_BOS, OUT, 4, 5]])
    expected = model(prompt, audio_out_ids=codes, audio_out_ids_start=torch.tensor([0, 5]), use_cache=True)
    for max_length in (None, 64):
        cache = KVCache(max_length)
        parts = [
            model(
                prompt[:, :4], audio_out_ids=codes[:, :5], audio_out_ids_start=torch.tensor([0]), past_key_values=cache
            ),
            model(prompt[:, 4:7], past_key_values=cache),
            model(
                prompt[:, 7:9], audio_out_ids=codes[:, 5:], audio_out_ids_start=torch.tensor([0]), past_key_values=cache
            ),
            model(prompt[:, 9:], past_key_values=cache),
        ]
        assert_equal_up_to_rounding(torch.cat([p.logits for p in parts], 1), expected.logits)
        assert_equal_up_to_rounding(torch.cat([p.audio_logits for p in parts]), expected.audio_logits)


def test_full_static_cache_raises():
    model = builders.model()
    cache = KVCache(4)
    model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
    with pytest.raises(BadInput, match="the sequence needs 5 positions, but the static cache has 4"):
        model(torch.tensor([[4, 5]]), past_key_values=cache)


def test_seeds_determine_the_output():
    model = builders.model()
    batch = builders.batch([9, 9], [5, 5])
    options = {"max_new_tokens": 30, "do_sample": True, "top_k": 0}
    first, second = (model.generate(**batch, **options, seed=1).audio_sequences for _ in range(2))
    other = model.generate(**batch, **options, seed=2).audio_sequences
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(0)
    unseeded = model.generate(**batch, **options).audio_sequences
    assert not torch.equal(unseeded[0], model.generate(**batch, **options).audio_sequences[0])
    torch.manual_seed(0)
    assert torch.equal(unseeded[0], model.generate(**batch, **options).audio_sequences[0])


def test_generated_clips_follow_the_delay_pattern():
    """Whatever is sampled, BOS occurs only at the start, and codebook 0 has only EOS after its first EOS."""
    model = builders.model(seed=8)
    with torch.no_grad():  # make EOS occur now and then
        model.audio_decoder_proj.audio_lm_head.weight.view(K, SIZE + 2, -1)[:, EOS] *= 1.3
    batch = builders.batch([9] * 16, [5] * 16)
    output = model.generate(**batch, max_new_tokens=60, do_sample=True, top_k=0, seed=list(range(16)))
    ended = 0
    for clip in output.audio_sequences:
        for k, row in enumerate(clip.tolist()):
            assert row[: k + 1] == [BOS] * min(k + 1, len(row))
            assert BOS not in row[k + 1 :]
            if k == 0 and EOS in row:
                assert set(row[row.index(EOS) :]) == {EOS}
        ended += (clip[: K - 1, -1] == EOS).all().item()
    assert ended > 10
    assert len(output.audio_sequences) >= 16


def test_generation_stops_at_the_given_eos_token():
    model = builders.model(seed=2)
    prompt = torch.tensor([[1, 2, 3]])
    unlimited = model.generate(prompt, max_new_tokens=12, eos_token_id=[]).sequences[0, 3:].tolist()
    stop = unlimited[4]
    stopped = model.generate(prompt, max_new_tokens=12, eos_token_id=stop).sequences[0, 3:].tolist()
    assert stopped == unlimited[: unlimited.index(stop) + 1]
    model.config.eos_token_id = stop
    assert model.generate(prompt, max_new_tokens=12).sequences[0, 3:].tolist() == stopped


@pytest.mark.parametrize("placeholder", [builders.IN, OUT])
def test_placeholders_are_never_generated(placeholder):
    model = builders.model()
    with torch.no_grad():
        model.audio_decoder_proj.text_lm_head.weight[placeholder] = 50.0
    output = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=30, eos_token_id=[])
    answer = output.sequences[0, 3:].tolist()
    # Each <|AUDIO_OUT|> in the answer stands for a clip and was not sampled.
    assert answer.count(OUT) == len(output.audio_sequences)
    assert builders.IN not in answer


class Recorder:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


def test_streamer_receives_all_tokens_and_frames_in_order():
    model = builders.model(seed=4)
    with torch.no_grad():
        model.audio_decoder_proj.audio_lm_head.weight.view(K, SIZE + 2, -1)[0, EOS] *= 2
    prompt = torch.tensor([[1, 2, OUT_BOS]])
    recorder = Recorder()
    output = model.generate(prompt, max_new_tokens=60, streamer=recorder, seed=5, do_sample=True, eos_token_id=EOT)
    assert recorder.ended == 1
    assert torch.equal(recorder.values[0], prompt)
    frames = [value for value in recorder.values[1:] if value.shape == (K,)]
    tokens = [value.item() for value in recorder.values[1:] if value.shape == (1,)]
    assert torch.equal(torch.stack(frames, dim=1), torch.cat(output.audio_sequences, dim=1))
    # The last frame marks the end of a clip; AUDIO_EOS is not streamed.
    assert tokens == [token for token in output.sequences[0, 3:].tolist() if token != AUDIO_EOS]
    assert AUDIO_EOS in output.sequences[0].tolist()


def test_row_ends_with_its_clip_without_a_text_head():
    model = builders.model(use_text_head=False)
    assert model(torch.tensor([[1, 2]])).logits is None
    with torch.no_grad():
        model.audio_decoder_proj.audio_lm_head.weight.view(K, SIZE + 2, -1)[:, EOS] *= 3
    output = model.generate(torch.tensor([[1, OUT_BOS]]), max_new_tokens=200, do_sample=True, seed=1)
    assert output.sequences.tolist() == [[1, OUT_BOS, OUT]]
    assert output.audio_sequences[0].shape[1] < 200
    with pytest.raises(
        BadInput, match=r"no text head and generates audio only: end every prompt with <\|audio_out_bos\|>"
    ):
        model.generate(torch.tensor([[1, 2]]))


def test_step_limit_keeps_the_last_complete_frame():
    model = builders.model()
    builders.suppress_stream_tokens(model.audio_decoder_proj.audio_lm_head.weight, K, SIZE + 2)
    output = model.generate(torch.tensor([[1, OUT_BOS]]), max_new_tokens=20)
    assert output.audio_sequences[0].shape == (K, 20)
    assert from_stream(output.audio_sequences[0], SIZE).shape == (K, 20 - K)


class PoisonedCache(KVCache):
    """A cache whose unwritten positions are NaN, so that reading one is detected."""

    def _ensure_capacity(self, stored, like, dim):
        buffer = super()._ensure_capacity(stored, like, dim)
        if stored is not buffer and buffer.is_floating_point():
            written = 0 if stored is None else stored.shape[dim]
            buffer.narrow(dim, written, buffer.shape[dim] - written).fill_(float("nan"))
        return buffer


@pytest.mark.parametrize("cache_class", [KVCache, PoisonedCache])
def test_growing_cache_keeps_its_contents_and_reads_no_unwritten_position(cache_class):
    model = builders.model(seed=3, use_audio_out_self_attention=True).double()
    prompt = torch.randint(1, 100, (1, 600), generator=torch.Generator().manual_seed(0))
    expected = model(prompt, use_cache=True).logits
    cache = cache_class()
    parts = [model(piece, past_key_values=cache).logits for piece in prompt.split([100, 150, 1, 149, 200], dim=1)]
    assert_equal_up_to_rounding(torch.cat(parts, 1), expected)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("nothing", "past_key_values is a str, expected a higgs_model"),
        (None, "holds a batch of 1, but .* 2"),
    ],
)
def test_cache_of_another_type_or_batch_size_raises(cache, message):
    model = builders.model()
    if cache is None:
        cache = model(torch.tensor([[1, 2]]), use_cache=True).past_key_values
    with pytest.raises(BadInput, match=message):
        model(torch.tensor([[1], [2]]), past_key_values=cache)
