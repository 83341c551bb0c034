"""Attention masks and position ids, built once for a forward pass and shared by all its layers.

There are three kinds of attention in the network, which differ in the keys that a query may see besides causality
and padding: all of them, only text (fast-forward layers), only audio (the audio self-attention). What a query that
takes no part sees does not matter: the layer throws its result away.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model.errors import BadInput


@dataclasses.dataclass(frozen=True)
class AttentionMasks:
    """Masks as the chosen attention implementation wants them; None where it needs none.

    For eager and sdpa: (B, 1, Q, KV) to be added to the scores. For flash attention: (B, KV) bool.
    """

    shared: Tensor | None
    text_only: Tensor | None = None
    audio_only: Tensor | None = None


def build_masks(
    attended_BL: Tensor,
    audio_BL: Tensor,
    *,
    num_queries: int,
    num_keys: int,
    has_padding: bool,
    implementation: str,
    dtype: torch.dtype,
    with_text_only: bool,
    with_audio_only: bool,
    sample_ids_BL: Tensor | None = None,
) -> AttentionMasks:
    """Masks for the last `num_queries` of L positions.

    Args:
        attended_BL, audio_BL: (B, L) bool, real positions and audio positions so far.
        num_keys: length of the keys, ≥ L; those beyond L are not written yet.
        has_padding: whether any position so far is not real; known to the caller without asking the device.
        implementation: transformers' name of the attention implementation.
        sample_ids_BL: (B, L) int64, samples packed into one row, which do not see each other; None: one a row.

    Raises:
        BadInput: flash attention cannot keep packed samples apart by masks.
    """
    has_room = num_keys > attended_BL.shape[1]
    keys = {
        "shared": attended_BL if has_padding or has_room or sample_ids_BL is not None else None,
        "text_only": attended_BL & ~audio_BL if with_text_only else None,
        "audio_only": attended_BL & audio_BL if with_audio_only else None,
    }
    if "flash" in implementation:
        if sample_ids_BL is not None:
            raise BadInput(f"packed samples need sdpa or eager attention, but the network has {implementation}")
        room = num_keys - attended_BL.shape[1]
        return AttentionMasks(
            **{kind: None if mask is None else torch.nn.functional.pad(mask, (0, room)) for kind, mask in keys.items()}
        )

    length = attended_BL.shape[1]
    queries_at = torch.arange(length - num_queries, length, device=attended_BL.device)
    causal = torch.arange(length, device=attended_BL.device) <= queries_at.unsqueeze(1)
    if sample_ids_BL is not None:
        causal = causal & (sample_ids_BL[:, -num_queries:, None] == sample_ids_BL[:, None, :])
    # Without padding, causality alone is what attention does by itself: for one query there is nothing to hide,
    # for a whole sequence sdpa has a flag. Only a continuation by several positions has to be told.
    if keys["shared"] is None and (
        1 < num_queries < length or (num_queries > 1 and not implementation.startswith("sdpa"))
    ):
        keys["shared"] = attended_BL

    def additive(keys_BL: Tensor | None) -> Tensor | None:
        if keys_BL is None:
            return None
        allowed = causal & keys_BL[:, None, :]
        if allowed.is_cuda:
            # The memory-efficient kernel gives NaN for a query without any key, such as padding on the left.
            allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
        allowed = torch.nn.functional.pad(allowed, (0, num_keys - length))
        hidden = torch.finfo(dtype).min
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, hidden).unsqueeze(1)

    return AttentionMasks(**{kind: additive(keys_BL) for kind, keys_BL in keys.items()})


def count_positions(attended_BS: Tensor, num_past: Tensor | int, sample_ids_BS: Tensor | None = None) -> Tensor:
    """(B, S) int64 position ids. They count real tokens only; where padding stands does not matter.

    Args:
        attended_BS: bool, real positions.
        num_past: real positions before these, as `KVCache.num_attended` has them.
        sample_ids_BS: int64, samples packed into one row, each of which counts from 0; None: one a row.
    """
    position_ids = num_past + attended_BS.cumsum(dim=1) - 1
    if sample_ids_BS is not None:
        begins = torch.ones_like(sample_ids_BS, dtype=torch.bool)
        begins[:, 1:] = sample_ids_BS[:, 1:] != sample_ids_BS[:, :-1]
        position_ids = position_ids - position_ids.where(begins, 0).cummax(dim=1).values
    return position_ids.masked_fill(~attended_BS, 1)
