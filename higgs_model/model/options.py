"""The options of a generation that are not the sampler's own: checked, and completed from the checkpoint.

What an option cannot be is said in one sentence. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from higgs_model.config import HiggsAudioConfig
from higgs_model.errors import BadInput

CACHE_IMPLEMENTATIONS = ("dynamic", "static")


def check_options(max_new_tokens: object, cache_implementation: object, streamer: object, batch_size: int) -> None:
    """Refuse options that no generation of `batch_size` rows can follow.

    Raises:
        BadInput: as said.
    """
    if not isinstance(max_new_tokens, Integral) or int(max_new_tokens) < 1:
        raise BadInput(f"max_new_tokens={max_new_tokens!r} is not a positive whole number")
    if cache_implementation not in CACHE_IMPLEMENTATIONS:
        wanted = " or ".join(CACHE_IMPLEMENTATIONS)
        raise BadInput(f"cache_implementation={cache_implementation!r} is unknown, wanted {wanted}")
    if streamer is not None and batch_size != 1:
        raise BadInput(f"a streamer follows one row, but the batch has {batch_size}")


def eos_ids(config: HiggsAudioConfig, given: int | Sequence[int] | None) -> frozenset[int]:
    """Text tokens that finish a row: those given, else the checkpoint's, else its backbone's, as in the reference."""
    for ids in (given, config.eos_token_id, config.text_config.eos_token_id):
        if ids is not None:
            return frozenset(whole_numbers("eos_token_id", ids))
    return frozenset()


def whole_numbers(name: str, given: object) -> list[int]:
    """One number or several, as a list of what fits into int64.

    Raises:
        BadInput: it holds something else.
    """
    values: list[Any] = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for value in values:
        if not isinstance(value, Integral):
            raise BadInput(f"{name}={given!r} is neither a whole number nor a sequence of them")
        if not -(2**63) <= int(value) < 2**63:
            raise BadInput(f"{name}={value} does not fit into 64 bits")
    return [int(value) for value in values]
