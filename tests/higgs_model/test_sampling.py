"""Sampling: the hash, the order of the filters, repetition-aware sampling, and independence of rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from higgs_model.errors import BadInput
from higgs_model.sampling import (
    FrameSampler,
    SamplingParams,
    SamplingPlan,
    SamplingTensors,
    sample_tokens,
    sample_unfiltered,
    uniform,
)

MASK = (1 << 64) - 1


def reference_uniform(seed, step, lane):
    """SplitMix64 with Python integers."""

    def mix(bits):
        bits = (bits + 0x9E3779B97F4A7C15) & MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        return bits ^ (bits >> 31)

    bits = mix((mix((mix(seed & MASK) + step) & MASK) + lane) & MASK)
    return ((bits >> 41) + 0.5) / 2**23


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**6), st.integers(0, 2**20))
def test_uniform_matches_the_documented_hash(seed, step, lane):
    found = uniform(torch.tensor(seed), torch.tensor(step), torch.tensor(lane))
    assert found.item() == pytest.approx(reference_uniform(seed, step, lane), abs=1e-7)
    assert 0 < found.item() < 1


def test_uniform_is_uniform_and_independent_across_its_arguments():
    numbers = uniform(torch.arange(500)[:, None, None], torch.arange(200)[None, :, None], torch.arange(16))
    assert numbers.double().mean().item() == pytest.approx(0.5, abs=5 * 0.2887 / numbers.numel() ** 0.5)
    counts = torch.histc(numbers, bins=64, min=0, max=1)
    assert (counts / counts.mean() - 1).abs().max() < 0.04
    between_seeds = torch.corrcoef(numbers.flatten(1)).fill_diagonal_(0)
    assert between_seeds.abs().max() < 6 / 3200**0.5
    between_lanes = torch.corrcoef(numbers.flatten(0, 1).T).fill_diagonal_(0)
    assert between_lanes.abs().max() < 6 / 100_000**0.5


@given(
    st.integers(0, 2**32),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 5, 50]),
    st.sampled_from([0.1, 0.6, 0.95, 1.0]),
)
@settings(max_examples=60)
def test_sample_tokens_follows_the_distribution_of_transformers(seed, temperature, top_k, top_p):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    uniforms = (torch.arange(20_000) + 0.5) / 20_000
    sampled = sample_tokens(logits.expand(20_000, -1), uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
    found = torch.bincount(sampled, minlength=40) / 20_000
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_sampling_never_returns_an_impossible_token():
    logits = torch.full((4, 10), float("-inf"))
    logits[:, 7] = 0
    uniforms = torch.tensor([2**-24, 0.5, 0.9, 1 - 2**-24])
    assert sample_unfiltered(logits, uniforms).tolist() == [7] * 4
    assert sample_tokens(logits, uniforms, temperature=1.0, top_k=0, top_p=0.9).tolist() == [7] * 4


SIZE, K = 12, 3


def sample_frames(params, logits, seeds, steps, window=None):
    window = torch.full((len(seeds), K, 8), -1) if window is None else window
    rows = [params] if isinstance(params, SamplingParams) else params
    return FrameSampler(SIZE, SIZE)(
        logits,
        torch.tensor(seeds),
        torch.tensor(steps),
        window,
        SamplingTensors.from_params(rows, SIZE + 2, "cpu"),
        SamplingPlan.from_params(rows, SIZE + 2),
    )


@given(st.integers(0, 2**32), st.permutations(range(5)))
def test_frame_sampler_samples_each_row_independently(seed, order):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, K, SIZE + 2, generator=generator)
    window = torch.randint(SIZE, (5, K, 4), generator=generator)
    params = SamplingParams(
        do_sample=True, temperature=0.8, top_k=6, top_p=0.9, ras_win_len=4, ras_win_max_num_repeat=1
    )
    seeds, steps = [11, 12, 13, 14, 15], [0, 1, 2, 3, 4]
    batched = sample_frames(params, logits, seeds, steps, window)
    for row in order:
        alone = sample_frames(params, logits[row : row + 1], [seeds[row]], [steps[row]], window[row : row + 1])
        assert torch.equal(alone[0], batched[row])


@given(st.integers(0, 2**32))
def test_frame_sampler_supports_different_parameters_per_row(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(6, K, SIZE + 2, generator=generator)
    window = torch.randint(-1, SIZE, (6, K, 9), generator=generator)
    rows = [
        SamplingParams(),
        SamplingParams(do_sample=True, top_k=0),
        SamplingParams(do_sample=True, temperature=0.3, top_k=3),
        SamplingParams(do_sample=True, top_p=0.4, ras_win_len=9, ras_win_max_num_repeat=1),
        SamplingParams(ras_win_len=2, ras_win_max_num_repeat=1),
        SamplingParams(do_sample=True, temperature=3.0, top_k=5, top_p=0.9, ras_win_len=5),
    ]
    seeds, steps = [11, 12, 13, 14, 15, 16], [0, 1, 2, 3, 4, 5]
    batched = sample_frames(rows, logits, seeds, steps, window)
    for row, params in enumerate(rows):
        row_window = window[row : row + 1, :, 9 - (params.ras_win_len or 0) :]
        alone = sample_frames(params, logits[row : row + 1], [seeds[row]], [steps[row]], row_window)
        assert torch.equal(alone[0], batched[row])


def test_repeated_code_is_resampled_without_stream_tokens():
    logits = torch.full((400, K, SIZE + 2), 0.0)
    logits[:, 0, 5] = 30.0  # codebook 0 always samples code 5
    logits[:, :, SIZE:] = 3.0  # and stream tokens are likely in the unfiltered distribution
    window = torch.full((400, K, 7), -1)
    window[:, 0, [1, 4]] = 5
    params = SamplingParams(do_sample=True, top_k=0, ras_win_len=7, ras_win_max_num_repeat=2)
    seeds, steps = list(range(400)), [3] * 400
    assert set(sample_frames(params, logits, seeds, steps, window)[:, 0].tolist()) == {5}

    logits[:, 0, 5] = 4.0
    params = SamplingParams(do_sample=True, temperature=0.05, top_k=0, ras_win_len=7, ras_win_max_num_repeat=2)
    resampled = sample_frames(params, logits, seeds, steps, window)[:, 0]
    assert resampled.max() < SIZE
    assert len(resampled.unique()) == SIZE
    window[:, 0, 1] = -1  # one repetition is allowed
    assert set(sample_frames(params, logits, seeds, steps, window)[:, 0].tolist()) == {5}


def test_frame_sampler_excludes_bos_unless_greedy():
    logits = torch.zeros(300, K, SIZE + 2)
    logits[..., SIZE] = 5.0
    sampled = sample_frames(SamplingParams(do_sample=True, top_k=0), logits, list(range(300)), [1] * 300)
    assert (sampled != SIZE).all()
    assert (sampled == SIZE + 1).any()
    assert (sample_frames(SamplingParams(do_sample=False), logits, [0] * 300, [1] * 300) == SIZE).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0 is not a positive number; for greedy decoding set do_sample=False"),
        ({"temperature": float("nan")}, "temperature=nan is not a positive number"),
        ({"temperature": float("inf")}, "temperature=inf is not a positive number"),
        ({"temperature": None}, "temperature=None is not a positive number"),
        ({"top_k": -1}, "top_k=-1 is not a non-negative integer; 0 keeps all tokens"),
        ({"top_k": 2.5}, "top_k=2.5 is not a non-negative integer"),
        ({"top_p": 0.0}, "top_p=0.0 is not a number above 0"),
        ({"top_p": 1.5}, "top_p=1.5 is not a number above 0 and at most 1"),
        ({"top_p": "0.9"}, "top_p='0.9' is not a number"),
        ({"ras_win_len": 0}, "ras_win_len=0 is not a positive integer; None disables"),
        ({"ras_win_max_num_repeat": 0}, "ras_win_max_num_repeat=0 is not a positive integer"),
        ({"do_sample": "yes"}, "do_sample='yes' is not True or False"),
    ],
)
def test_invalid_sampling_params_raise(option, message):
    with pytest.raises(BadInput, match=message):
        SamplingParams(**option)
