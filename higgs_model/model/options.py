"""Validation of the generation options other than `SamplingParams`, with defaults from the checkpoint.

An invalid option raises `BadInput` in one sentence. Nothing here touches tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from higgs_model.config import HiggsAudioConfig
from higgs_model.errors import BadInput

CACHE_IMPLEMENTATIONS = ("dynamic", "static")


def check_generation_options(
    max_new_tokens: object, cache_implementation: object, streamer: object, batch_size: int
) -> None:
    """Raise `BadInput` if an option is invalid for a batch of `batch_size` rows."""
    if not isinstance(max_new_tokens, Integral) or int(max_new_tokens) < 1:
        raise BadInput(f"max_new_tokens={max_new_tokens!r} is not a positive integer")
    if cache_implementation not in CACHE_IMPLEMENTATIONS:
        choices = " or ".join(CACHE_IMPLEMENTATIONS)
        raise BadInput(f"cache_implementation={cache_implementation!r} is unknown, expected {choices}")
    if streamer is not None and batch_size != 1:
        raise BadInput(f"a streamer supports one row, but the batch has {batch_size}")


def resolve_eos_ids(config: HiggsAudioConfig, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """Return the text tokens that finish a row: the argument, else the checkpoint's, else the backbone's.

    This order of precedence is the reference's.
    """
    for ids in (eos_token_id, config.eos_token_id, config.text_config.eos_token_id):
        if ids is not None:
            return frozenset(to_int_list("eos_token_id", ids))
    return frozenset()


def to_int_list(name: str, value: object) -> list[int]:
    """Convert an integer or a sequence of integers to a list of int64 values.

    Args:
        name: the option's name in error messages.
        value: the option's value.

    Raises:
        BadInput: a value is not an integer, or exceeds 64 bits.
    """
    items: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for item in items:
        if not isinstance(item, Integral):
            raise BadInput(f"{name}={value!r} is neither an integer nor a sequence of integers")
        if not -(2**63) <= int(item) < 2**63:
            raise BadInput(f"{name}={item} does not fit into 64 bits")
    return [int(item) for item in items]
