"""Sampling: the hash, the order of the filters, the repetition rule, and independence from neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from higgs_model.errors import BadInput
from higgs_model.sampling import DrawPlan, FrameSampler, RowSampling, SamplingParams, draw, draw_raw, uniform

MASK = (1 << 64) - 1


def by_hand(seed, step, lane):
    """SplitMix64 in Python's integers."""

    def mix(bits):
        bits = (bits + 0x9E3779B97F4A7C15) & MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        return bits ^ (bits >> 31)

    bits = mix((mix((mix(seed & MASK) + step) & MASK) + lane) & MASK)
    return ((bits >> 41) + 0.5) / 2**23


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**6), st.integers(0, 2**20))
def test_the_hash_is_the_one_documented(seed, step, lane):
    found = uniform(torch.tensor(seed), torch.tensor(step), torch.tensor(lane))
    assert found.item() == pytest.approx(by_hand(seed, step, lane), abs=1e-7)
    assert 0 < found.item() < 1


def test_the_hash_is_uniform_and_its_arguments_are_independent():
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
def test_draws_follow_transformers_distribution(seed, temperature, top_k, top_p):
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    numbers = (torch.arange(20_000) + 0.5) / 20_000
    drawn = draw(logits.expand(20_000, -1), numbers, temperature=temperature, top_k=top_k, top_p=top_p)
    found = torch.bincount(drawn, minlength=40) / 20_000
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_a_draw_never_meets_an_impossible_token():
    logits = torch.full((4, 10), float("-inf"))
    logits[:, 7] = 0
    ends = torch.tensor([2**-24, 0.5, 0.9, 1 - 2**-24])
    assert draw_raw(logits, ends).tolist() == [7] * 4
    assert draw(logits, ends, temperature=1.0, top_k=0, top_p=0.9).tolist() == [7] * 4


SIZE, K = 12, 3


def frames(params, logits, seeds, steps, window=None):
    window = torch.full((len(seeds), K, 8), -1) if window is None else window
    several = [params] if isinstance(params, SamplingParams) else params
    return FrameSampler(SIZE, SIZE)(
        logits,
        torch.tensor(seeds),
        torch.tensor(steps),
        window,
        RowSampling.of(several, SIZE + 2, "cpu"),
        DrawPlan.of(several, SIZE + 2),
    )


@given(st.integers(0, 2**32), st.permutations(range(5)))
def test_a_row_does_not_depend_on_its_neighbours(seed, order):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, K, SIZE + 2, generator=generator)
    window = torch.randint(SIZE, (5, K, 4), generator=generator)
    params = SamplingParams(
        do_sample=True, temperature=0.8, top_k=6, top_p=0.9, ras_win_len=4, ras_win_max_num_repeat=1
    )
    seeds, steps = [11, 12, 13, 14, 15], [0, 1, 2, 3, 4]
    together = frames(params, logits, seeds, steps, window)
    for row in order:
        alone = frames(params, logits[row : row + 1], [seeds[row]], [steps[row]], window[row : row + 1])
        assert torch.equal(alone[0], together[row])


@given(st.integers(0, 2**32))
def test_rows_with_different_parameters_draw_as_if_alone(seed):
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
    together = frames(rows, logits, seeds, steps, window)
    for row, params in enumerate(rows):
        mine = window[row : row + 1, :, 9 - (params.ras_win_len or 0) :]
        alone = frames(params, logits[row : row + 1], [seeds[row]], [steps[row]], mine)
        assert torch.equal(alone[0], together[row])


def test_a_repeated_code_is_drawn_again_as_sound():
    logits = torch.full((400, K, SIZE + 2), 0.0)
    logits[:, 0, 5] = 30.0  # codebook 0 always draws code 5
    logits[:, :, SIZE:] = 3.0  # and the raw distribution likes stream tokens
    window = torch.full((400, K, 7), -1)
    window[:, 0, [1, 4]] = 5
    params = SamplingParams(do_sample=True, top_k=0, ras_win_len=7, ras_win_max_num_repeat=2)
    seeds, steps = list(range(400)), [3] * 400
    assert set(frames(params, logits, seeds, steps, window)[:, 0].tolist()) == {5}

    logits[:, 0, 5] = 4.0
    params = SamplingParams(do_sample=True, temperature=0.05, top_k=0, ras_win_len=7, ras_win_max_num_repeat=2)
    again = frames(params, logits, seeds, steps, window)[:, 0]
    assert again.max() < SIZE
    assert len(again.unique()) == SIZE
    window[:, 0, 1] = -1  # one repetition is allowed
    assert set(frames(params, logits, seeds, steps, window)[:, 0].tolist()) == {5}


def test_sampling_never_draws_bos_but_greedy_is_the_networks_word():
    logits = torch.zeros(300, K, SIZE + 2)
    logits[..., SIZE] = 5.0
    drawn = frames(SamplingParams(do_sample=True, top_k=0), logits, list(range(300)), [1] * 300)
    assert (drawn != SIZE).all()
    assert (drawn == SIZE + 1).any()
    assert (frames(SamplingParams(do_sample=False), logits, [0] * 300, [1] * 300) == SIZE).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0 is not a positive number; for the likeliest token, do_sample=False"),
        ({"temperature": float("nan")}, "temperature=nan is not a positive number"),
        ({"temperature": float("inf")}, "temperature=inf is not a positive number"),
        ({"temperature": None}, "temperature=None is not a positive number"),
        ({"top_k": -1}, "top_k=-1 is not a whole number; 0 keeps all tokens"),
        ({"top_k": 2.5}, "top_k=2.5 is not a whole number"),
        ({"top_p": 0.0}, "top_p=0.0 is not a number above 0"),
        ({"top_p": 1.5}, "top_p=1.5 is not a number above 0 and at most 1"),
        ({"top_p": "0.9"}, "top_p='0.9' is not a number"),
        ({"ras_win_len": 0}, "ras_win_len=0 is not a positive whole number; None switches"),
        ({"ras_win_max_num_repeat": 0}, "ras_win_max_num_repeat=0 is not a positive whole number"),
        ({"do_sample": "yes"}, "do_sample='yes' is not True or False"),
    ],
)
def test_options_without_meaning_are_refused(option, message):
    with pytest.raises(BadInput, match=message):
        SamplingParams(**option)
