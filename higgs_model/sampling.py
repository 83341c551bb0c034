"""Sampling of tokens from logits, for a batch of independent rows.

Random numbers are counter-based: a row's number depends only on its seed, its step and its subsequence (the codebook,
and whether it is the first or second draw), never on other rows or on earlier draws. The integer hash returns the same
numbers on every device. Sampling inverts the cumulative distribution at that number, so it needs one number per token.

Order and meaning of temperature, top-k and top-p follow transformers' logits processors. Repetition-aware sampling
(RAS) follows "VALL-E 2", https://arxiv.org/abs/2406.05370, as the reference implementation applies it.
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

TEXT_SUBSEQUENCE = 1 << 20
"""Subsequence of text tokens. Codebook k uses 2 k for its first draw and 2 k + 1 for its second, after a repetition."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled.

    Attributes:
        do_sample: False selects the most likely token (greedy); with `ras_win_len`, a code that repeats too often is
            still resampled, using the seed.
        temperature: divides the logits; > 0.
        top_k: number of most likely tokens to keep; 0 keeps all.
        top_p: keep the smallest set of most likely tokens with at least this total probability; 1.0 keeps all.
        ras_win_len: window of repetition-aware sampling, in frames; None disables it.
        ras_win_max_num_repeat: a code that occurs at least this often in its window is resampled from the distribution
            before temperature, top-k and top-p.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    ras_win_len: int | None = None
    ras_win_max_num_repeat: int = 2

    def __post_init__(self) -> None:
        for name, kind, is_valid, expected in _CONSTRAINTS:
            value = getattr(self, name)
            if value is None and name == "ras_win_len":
                continue
            if not isinstance(value, kind) or not is_valid(value):
                raise BadInput(f"{name}={value!r} is not {expected}")


_CONSTRAINTS: tuple[tuple[str, type, Callable[[Any], bool], str], ...] = (
    ("do_sample", bool, lambda _: True, "True or False"),
    (
        "temperature",
        Real,
        lambda value: 0 < value < math.inf,
        "a positive number; for greedy decoding set do_sample=False",
    ),
    ("top_k", Integral, lambda value: value >= 0, "a non-negative integer; 0 keeps all tokens"),
    ("top_p", Real, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    ("ras_win_len", Integral, lambda value: value >= 1, "a positive integer; None disables repetition-aware sampling"),
    ("ras_win_max_num_repeat", Integral, lambda value: value >= 1, "a positive integer"),
)


def uniform(seed: Tensor, step: Tensor, lane: Tensor) -> Tensor:
    """Return float32 numbers in (0, 1), one for each element of the broadcast int64 arguments.

    The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied once after each argument is added.
    """
    bits = _mix(_mix(_mix(seed) + step) + lane)
    # 23 bits plus one half are exact in float32, so rounding yields neither 0 nor 1.
    return ((bits >> 41) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)


# SplitMix64's constants, as signed int64.
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_FACTOR_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_FACTOR_2 = -7723592293110705685  # 0x94D049BB133111EB


def _mix(bits: Tensor) -> Tensor:
    bits = bits + _GOLDEN
    bits = (bits ^ _logical_shift_right(bits, 30)) * _FACTOR_1
    bits = (bits ^ _logical_shift_right(bits, 27)) * _FACTOR_2
    return bits ^ _logical_shift_right(bits, 31)


def _logical_shift_right(bits: Tensor, places: int) -> Tensor:
    """Shift right without sign extension; torch's shift is arithmetic."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    candidates: int | None = None,
) -> Tensor:
    """Sample one token per row.

    Args:
        logits: (…, V) float32.
        uniforms: (…) in (0, 1), from `uniform`.
        temperature, top_k, top_p: scalars for all rows, or tensors that broadcast against (…, 1). A `top_k` tensor
            must not contain 0.
        candidates: number of most likely tokens to consider, at least every `top_k`; required if that is a tensor. It
            does not change the result.

    Returns:
        (…) int64.
    """
    vocab_size = logits.shape[-1]
    if not isinstance(top_k, Tensor):
        top_k = candidates = min(top_k or vocab_size, vocab_size)
    scores, ids = logits.topk(candidates or vocab_size)
    # Not normalised: a sum that includes more or fewer excluded tokens would round differently.
    weights = ((scores - scores[..., :1]) / temperature).exp()
    if isinstance(top_k, Tensor):
        weights = weights.masked_fill(torch.arange(scores.shape[-1], device=scores.device) >= top_k, 0)
    if isinstance(top_p, Tensor) or top_p < 1:
        cumulative = weights.cumsum(dim=-1)
        in_nucleus = cumulative - weights < top_p * cumulative[..., -1:]
        weights = weights.where(in_nucleus | (torch.as_tensor(top_p, device=in_nucleus.device) >= 1), 0)
    return ids.gather(-1, _invert_cdf(weights, uniforms)).squeeze(-1)


def sample_unfiltered(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one token per row from the full distribution; shapes as in `sample_tokens`."""
    return _invert_cdf((logits - logits.amax(dim=-1, keepdim=True)).exp(), uniforms).squeeze(-1)


def _invert_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the index (…, 1) at which the cumulative sum of `weights` (…, V) exceeds `uniforms` times its total."""
    cumulative = weights.cumsum(dim=-1)
    threshold = uniforms.unsqueeze(-1) * cumulative[..., -1:]
    # The first index whose sum exceeds the threshold never has weight zero.
    return (cumulative <= threshold).sum(dim=-1, keepdim=True).clamp(max=weights.shape[-1] - 1)


@dataclasses.dataclass(frozen=True)
class SamplingTensors:
    """The `SamplingParams` of B rows as tensors (B, 1), so that one pass samples rows with different parameters.

    `top_k` is the vocabulary size where all tokens are kept, and `ras_win_len` is 0 where RAS is disabled.
    """

    do_sample: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    ras_win_len: Tensor
    ras_win_max_num_repeat: Tensor

    @classmethod
    def from_params(
        cls, rows: Sequence[SamplingParams], vocab_size: int, device: torch.device | str
    ) -> SamplingTensors:
        """Stack the parameters of all rows, in order."""

        def column(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        return cls(
            do_sample=column([row.do_sample for row in rows], torch.bool),
            temperature=column([row.temperature for row in rows], torch.float32),
            top_k=column([min(row.top_k or vocab_size, vocab_size) for row in rows], torch.int64),
            top_p=column([row.top_p for row in rows], torch.float32),
            ras_win_len=column([row.ras_win_len or 0 for row in rows], torch.int64),
            ras_win_max_num_repeat=column([row.ras_win_max_num_repeat for row in rows], torch.int64),
        )


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The computation that a batch needs. It never changes what a row samples.

    Attributes:
        candidates: number of most likely tokens to consider, at least every row's `top_k`; 0 if all rows are greedy.
        repetition_aware: whether any row uses RAS.
    """

    candidates: int
    repetition_aware: bool

    @classmethod
    def from_params(cls, rows: Iterable[SamplingParams], vocab_size: int) -> SamplingPlan:
        """Return the smallest plan that covers all rows."""
        rows = list(rows)
        return cls(
            max((min(row.top_k or vocab_size, vocab_size) for row in rows if row.do_sample), default=0),
            any(row.ras_win_len for row in rows),
        )


@dataclasses.dataclass(frozen=True)
class FrameSampler:
    """Samples frames: one code per codebook, each independently.

    Attributes:
        codebook_size: first id of the stream tokens.
        bos_id: the stream token that fills the start of a clip.
    """

    codebook_size: int
    bos_id: int

    def __call__(
        self,
        logits_BKV: Tensor,
        seed_B: Tensor,
        step_B: Tensor,
        window_BKW: Tensor,
        rows: SamplingTensors,
        plan: SamplingPlan,
    ) -> Tensor:
        """Sample the next frame of every row.

        Args:
            logits_BKV: (B, K, codebook_size + 2).
            seed_B, step_B: int64, on the device of the logits.
            window_BKW: the last W frames, W at least every `ras_win_len`; −1 where there was no frame yet.

        Returns:
            (B, K) int64.
        """
        logits = logits_BKV.float()
        subsequences = 2 * torch.arange(logits.shape[1], device=logits.device)
        seed, step = seed_B.unsqueeze(1), step_B.unsqueeze(1)
        codes = logits.argmax(dim=-1)
        if plan.candidates:
            # BOS occurs only at the start of a clip, where the delay pattern sets it.
            sampled = sample_tokens(
                _masked(logits, self.bos_id, self.bos_id + 1),
                uniform(seed, step, subsequences),
                temperature=rows.temperature.unsqueeze(2),
                top_k=rows.top_k.unsqueeze(2),
                top_p=rows.top_p.unsqueeze(2),
                candidates=plan.candidates,
            )
            codes = torch.where(rows.do_sample, sampled, codes)
        if not plan.repetition_aware:
            return codes
        age = torch.arange(window_BKW.shape[2], 0, -1, device=logits.device)
        in_window_B1W = age <= rows.ras_win_len.unsqueeze(2)
        repeats = ((window_BKW == codes.unsqueeze(-1)) & in_window_B1W).sum(dim=-1)
        is_repetition = (repeats >= rows.ras_win_max_num_repeat) & (rows.ras_win_len > 0)
        # Only codes replace codes: BOS or EOS would break or end the clip.
        code_logits = _masked(logits, self.codebook_size, logits.shape[-1])
        resampled = sample_unfiltered(code_logits, uniform(seed, step, subsequences + 1))
        return torch.where(is_repetition, resampled, codes)


def _masked(logits: Tensor, first: int, end: int) -> Tensor:
    """Return a copy of the logits with the ids [first, end) at minus infinity."""
    masked = logits.clone()
    masked[..., first:end] = float("-inf")
    return masked
