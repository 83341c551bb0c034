"""Drawing a token from logits, for many independent rows at once.

Randomness is counter-based: what a row draws follows from its seed, its step and its lane (which codebook, first draw
or second) alone, never from its neighbours or from how often anything was drawn before. The integer hash gives the
same numbers on every device. A draw is the inverse of the distribution function at that number, so that one number a
token is enough.

Order and meaning of temperature, top-k, top-p follow transformers' logits processors; repetition-aware sampling follows
"VALL-E 2", https://arxiv.org/abs/2406.05370, as the reference implementation applies it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model.errors import BadInput

TEXT_LANE = 1 << 20
"""The lane of text tokens; codebook k draws in lanes 2 k (first) and 2 k + 1 (again after a repetition)."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        do_sample: False takes the likeliest token always.
        temperature: > 0; divides the logits.
        top_k: how many likeliest tokens stay; 0 is all.
        top_p: the smallest set of likeliest tokens with at least this probability stays; 1.0 is all.
        ras_win_len: frames in which a code may not repeat too often; None is no such rule.
        ras_win_max_num_repeat: a code found at least so often in its window is drawn again, from the distribution
            before temperature, top-k and top-p.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    ras_win_len: int | None = None
    ras_win_max_num_repeat: int = 2

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise BadInput(f"temperature={self.temperature} is not positive; for the likeliest token, do_sample=False")
        if self.top_k < 0:
            raise BadInput(f"top_k={self.top_k} is negative; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p={self.top_p} is not above 0 and at most 1")
        if self.ras_win_len is not None and self.ras_win_len < 1:
            raise BadInput(f"ras_win_len={self.ras_win_len} is not positive; None switches the rule off")
        if self.ras_win_max_num_repeat < 1:
            raise BadInput(f"ras_win_max_num_repeat={self.ras_win_max_num_repeat} is not positive")


def uniform(seed: Tensor, step: Tensor, lane: Tensor) -> Tensor:
    """Numbers in (0, 1), float32, one for each broadcast (seed, step, lane), all int64.

    The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied after each of the three is mixed in.
    """
    bits = _mix(_mix(_mix(seed) + step) + lane)
    # 23 bits and a half are exact in float32, so that neither 0 nor 1 comes out by rounding.
    return ((bits >> 41) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_FACTOR_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_FACTOR_2 = -7723592293110705685  # 0x94D049BB133111EB


def _mix(bits: Tensor) -> Tensor:
    bits = bits + _GOLDEN
    bits = (bits ^ _shifted(bits, 30)) * _FACTOR_1
    bits = (bits ^ _shifted(bits, 27)) * _FACTOR_2
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def draw(logits: Tensor, numbers: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Draw one token a row.

    Args:
        logits: (…, V) float32.
        numbers: (…) in (0, 1), from `uniform`.

    Returns:
        (…) int64.
    """
    vocabulary = logits.shape[-1]
    scores, ids = (logits / temperature).topk(min(top_k or vocabulary, vocabulary))
    probabilities = scores.softmax(dim=-1)
    if top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    return ids.gather(-1, _inverse(probabilities, numbers)).squeeze(-1)


def draw_raw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw one token a row from the whole distribution; shapes as in `draw`."""
    return _inverse(logits.softmax(dim=-1), numbers).squeeze(-1)


def _inverse(weights: Tensor, numbers: Tensor) -> Tensor:
    """Where the running sum of `weights` (…, V) passes `numbers` of its total: (…, 1) int64."""
    running = weights.cumsum(dim=-1)
    wanted = numbers.unsqueeze(-1) * running[..., -1:]
    # The first index whose sum is above: an index of weight zero never is.
    return (running <= wanted).sum(dim=-1, keepdim=True).clamp(max=weights.shape[-1] - 1)


@dataclasses.dataclass(frozen=True)
class FrameSampler:
    """Draws frames: one code in each codebook, each for itself.

    Attributes:
        codebook_size: the ids from here on are the stream tokens `bos_id` and `eos_id`.
    """

    params: SamplingParams
    codebook_size: int
    bos_id: int

    def __call__(self, logits_BKV: Tensor, seed_B: Tensor, step_B: Tensor, window_BKW: Tensor) -> Tensor:
        """Draw the next frame of every row.

        Args:
            logits_BKV: (B, K, codebook_size + 2).
            seed_B, step_B: int64 on the same device.
            window_BKW: (B, K, ras_win_len) the last frames, filled with −1 where there were none; width 0 without
                the repetition rule.

        Returns:
            (B, K) int64.
        """
        logits = logits_BKV.float()
        params = self.params
        lanes = 2 * torch.arange(logits.shape[1], device=logits.device)
        seed, step = seed_B.unsqueeze(1), step_B.unsqueeze(1)
        if params.do_sample:
            # BOS only ever fills the start of a clip, where it is set and not drawn.
            drawn = draw(
                _without(logits, self.bos_id, self.bos_id + 1),
                uniform(seed, step, lanes),
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
            )
        else:
            drawn = logits.argmax(dim=-1)
        if params.ras_win_len is None:
            return drawn
        repeats = (window_BKW == drawn.unsqueeze(-1)).sum(dim=-1)
        # What is drawn again is meant to be sound: a stream token there would end or break the clip.
        sound = _without(logits, self.codebook_size, logits.shape[-1])
        again = draw_raw(sound, uniform(seed, step, lanes + 1))
        return torch.where(repeats >= params.ras_win_max_num_repeat, again, drawn)


def _without(logits: Tensor, first: int, end: int) -> Tensor:
    masked = logits.clone()
    masked[..., first:end] = float("-inf")
    return masked
