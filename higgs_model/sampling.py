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
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from higgs_model.errors import BadInput

TEXT_LANE = 1 << 20
"""The lane of text tokens; codebook k draws in lanes 2 k (first) and 2 k + 1 (again after a repetition)."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        do_sample: False takes the likeliest token; with `ras_win_len`, a code that repeats too often is still drawn,
            from the seed.
        temperature: > 0; divides the logits.
        top_k: how many likeliest tokens stay; 0 is all.
        top_p: the smallest set of likeliest tokens with at least this probability stays; 1.0 is all.
        ras_win_len: frames in which a code may not repeat too often; None is no such rule.
        ras_win_max_num_repeat: a code found at least so often in its window is drawn again, from the distribution
            before temperature, top-k and top-p.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    ras_win_len: int | None = None
    ras_win_max_num_repeat: int = 2

    def __post_init__(self) -> None:
        for name, kind, holds, wanted in _LIMITS:
            value = getattr(self, name)
            if value is None and name == "ras_win_len":
                continue
            if not isinstance(value, kind) or not holds(value):
                raise BadInput(f"{name}={value!r} is not {wanted}")


_LIMITS: tuple[tuple[str, type, Callable[[Any], bool], str], ...] = (
    ("do_sample", bool, lambda _: True, "True or False"),
    (
        "temperature",
        Real,
        lambda value: 0 < value < math.inf,
        "a positive number; for the likeliest token, do_sample=False",
    ),
    ("top_k", Integral, lambda value: value >= 0, "a whole number; 0 keeps all tokens"),
    ("top_p", Real, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    ("ras_win_len", Integral, lambda value: value >= 1, "a positive whole number; None switches the rule off"),
    ("ras_win_max_num_repeat", Integral, lambda value: value >= 1, "a positive whole number"),
)


def uniform(seed: Tensor, step: Tensor, lane: Tensor) -> Tensor:
    """Numbers in (0, 1), float32, one for each broadcast (seed, step, lane), all int64.

    The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied after each of the three is mixed in.
    """
    bits = _mix(_mix(_mix(seed) + step) + lane)
    # 23 bits and a half are exact in float32, so that neither 0 nor 1 comes out by rounding.
    return ((bits >> 41) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


# SplitMix64's constants, as signed int64.
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


def draw(
    logits: Tensor,
    numbers: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    candidates: int | None = None,
) -> Tensor:
    """Draw one token a row.

    Args:
        logits: (…, V) float32.
        numbers: (…) in (0, 1), from `uniform`.
        temperature, top_k, top_p: for all rows, or tensors that broadcast against (…, 1), `top_k` then without 0.
        candidates: how many likeliest tokens are looked at, at least every `top_k`; needed when that is a tensor. It
            does not change what is drawn.

    Returns:
        (…) int64.
    """
    vocabulary = logits.shape[-1]
    if not isinstance(top_k, Tensor):
        top_k = candidates = min(top_k or vocabulary, vocabulary)
    scores, ids = logits.topk(candidates or vocabulary)
    # Not normalised: sums over more or fewer tokens that do not count would round differently.
    weights = ((scores - scores[..., :1]) / temperature).exp()
    if isinstance(top_k, Tensor):
        weights = weights.masked_fill(torch.arange(scores.shape[-1], device=scores.device) >= top_k, 0)
    if isinstance(top_p, Tensor) or top_p < 1:
        running = weights.cumsum(dim=-1)
        kept = running - weights < top_p * running[..., -1:]
        weights = weights.where(kept | (torch.as_tensor(top_p, device=kept.device) >= 1), 0)
    return ids.gather(-1, _inverse(weights, numbers)).squeeze(-1)


def draw_raw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw one token a row from the whole distribution; shapes as in `draw`."""
    return _inverse((logits - logits.amax(dim=-1, keepdim=True)).exp(), numbers).squeeze(-1)


def _inverse(weights: Tensor, numbers: Tensor) -> Tensor:
    """Where the running sum of `weights` (…, V) passes `numbers` of its total: (…, 1) int64."""
    running = weights.cumsum(dim=-1)
    wanted = numbers.unsqueeze(-1) * running[..., -1:]
    # The first index whose sum is above: an index of weight zero never is.
    return (running <= wanted).sum(dim=-1, keepdim=True).clamp(max=weights.shape[-1] - 1)


@dataclasses.dataclass(frozen=True)
class RowSampling:
    """`SamplingParams` of B rows as tensors (B, 1), so that one pass draws for rows that differ in them.

    `top_k` is the whole vocabulary where all tokens stay, `ras_win_len` is 0 where there is no such rule.
    """

    do_sample: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    ras_win_len: Tensor
    ras_win_max_num_repeat: Tensor

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], vocabulary: int, device: torch.device | str) -> RowSampling:
        """Parameters of all rows, in order."""

        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        return cls(
            do_sample=column([row.do_sample for row in rows], torch.bool),
            temperature=column([row.temperature for row in rows], torch.float32),
            top_k=column([min(row.top_k or vocabulary, vocabulary) for row in rows], torch.int64),
            top_p=column([row.top_p for row in rows], torch.float32),
            ras_win_len=column([row.ras_win_len or 0 for row in rows], torch.int64),
            ras_win_max_num_repeat=column([row.ras_win_max_num_repeat for row in rows], torch.int64),
        )


@dataclasses.dataclass(frozen=True)
class DrawPlan:
    """What a pass over several rows must do at all; it never changes what a row draws.

    Attributes:
        candidates: at least every row's `top_k`; 0 when no row samples.
        repetition_rule: whether any row has one.
    """

    candidates: int
    repetition_rule: bool

    @classmethod
    def of(cls, rows: Iterable[SamplingParams], vocabulary: int) -> DrawPlan:
        """The least that serves all rows."""
        rows = list(rows)
        return cls(
            max((min(row.top_k or vocabulary, vocabulary) for row in rows if row.do_sample), default=0),
            any(row.ras_win_len for row in rows),
        )


@dataclasses.dataclass(frozen=True)
class FrameSampler:
    """Draws frames: one code in each codebook, each for itself.

    Attributes:
        codebook_size: the ids from here on are the stream tokens.
        bos_id: the one of them that fills the start of a clip.
    """

    codebook_size: int
    bos_id: int

    def __call__(
        self,
        logits_BKV: Tensor,
        seed_B: Tensor,
        step_B: Tensor,
        window_BKW: Tensor,
        rows: RowSampling,
        plan: DrawPlan,
    ) -> Tensor:
        """Draw the next frame of every row.

        Args:
            logits_BKV: (B, K, codebook_size + 2).
            seed_B, step_B: int64 on the same device.
            window_BKW: the last W frames, at least as many as any `ras_win_len`, filled with −1 where there were none.

        Returns:
            (B, K) int64.
        """
        logits = logits_BKV.float()
        lanes = 2 * torch.arange(logits.shape[1], device=logits.device)
        seed, step = seed_B.unsqueeze(1), step_B.unsqueeze(1)
        drawn = logits.argmax(dim=-1)
        if plan.candidates:
            # BOS only ever fills the start of a clip, where it is set and not drawn.
            sampled = draw(
                _without(logits, self.bos_id, self.bos_id + 1),
                uniform(seed, step, lanes),
                temperature=rows.temperature.unsqueeze(2),
                top_k=rows.top_k.unsqueeze(2),
                top_p=rows.top_p.unsqueeze(2),
                candidates=plan.candidates,
            )
            drawn = torch.where(rows.do_sample, sampled, drawn)
        if not plan.repetition_rule:
            return drawn
        age = torch.arange(window_BKW.shape[2], 0, -1, device=logits.device)
        watched_B1W = age <= rows.ras_win_len.unsqueeze(2)
        repeats = ((window_BKW == drawn.unsqueeze(-1)) & watched_B1W).sum(dim=-1)
        repeated = (repeats >= rows.ras_win_max_num_repeat) & (rows.ras_win_len > 0)
        # What is drawn again is meant to be sound: a stream token there would end or break the clip.
        sound = _without(logits, self.codebook_size, logits.shape[-1])
        return torch.where(repeated, draw_raw(sound, uniform(seed, step, lanes + 1)), drawn)


def _without(logits: Tensor, first: int, end: int) -> Tensor:
    masked = logits.clone()
    masked[..., first:end] = float("-inf")
    return masked
