"""Attention masks and position ids, built once per forward pass and shared by all layers.

The network has three kinds of causal attention, which differ in their keys: all keys, text keys only (fast-forward
layers), audio keys only (audio self-attention). Queries that do not take part may attend to anything, because the layer
discards their output.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from higgs_model.errors import BadInput


@dataclasses.dataclass(frozen=True)
class AttentionMasks:
    """Masks in the form that the attention implementation expects; None where it needs none.

    For eager and sdpa: (B, 1, Q, KV), added to the scores. For flash attention: (B, KV) bool.
    """

    shared: Tensor | None
    text_only: Tensor | None = None
    audio_only: Tensor | None = None


def build_masks(
    attention_mask_BL: Tensor,
    audio_mask_BL: Tensor,
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
    """Build the masks for the last `num_queries` of L positions.

    Args:
        attention_mask_BL, audio_mask_BL: (B, L) bool, positions that are not padding, and audio positions.
        num_queries: number of new positions.
        num_keys: length of the keys, ≥ L; keys beyond L are not written yet.
        has_padding: whether any position is padding; passed in to avoid a synchronisation with the device.
        implementation: name of the attention implementation in transformers.
        dtype: dtype of additive masks.
        with_text_only, with_audio_only: whether to build these masks.
        sample_ids_BL: (B, L) int64, ids of samples packed into one row, which do not attend to each other; None
            without packing.

    Raises:
        BadInput: packed samples with flash attention, which cannot separate them by masks.
    """
    has_unwritten_keys = num_keys > attention_mask_BL.shape[1]
    keys = {
        "shared": attention_mask_BL if has_padding or has_unwritten_keys or sample_ids_BL is not None else None,
        "text_only": attention_mask_BL & ~audio_mask_BL if with_text_only else None,
        "audio_only": attention_mask_BL & audio_mask_BL if with_audio_only else None,
    }
    if "flash" in implementation:
        if sample_ids_BL is not None:
            raise BadInput(f"packed samples need sdpa or eager attention, but the network uses {implementation}")
        num_unwritten = num_keys - attention_mask_BL.shape[1]
        return AttentionMasks(
            **{
                kind: None if mask is None else torch.nn.functional.pad(mask, (0, num_unwritten))
                for kind, mask in keys.items()
            }
        )

    length = attention_mask_BL.shape[1]
    query_positions = torch.arange(length - num_queries, length, device=attention_mask_BL.device)
    causal = torch.arange(length, device=attention_mask_BL.device) <= query_positions.unsqueeze(1)
    if sample_ids_BL is not None:
        causal = causal & (sample_ids_BL[:, -num_queries:, None] == sample_ids_BL[:, None, :])
    # Without padding, the causal mask can be implicit: a single query attends to all keys, and sdpa has a flag for a
    # complete sequence. Only a continuation by several positions needs an explicit mask.
    if keys["shared"] is None and (
        1 < num_queries < length or (num_queries > 1 and not implementation.startswith("sdpa"))
    ):
        keys["shared"] = attention_mask_BL

    def additive(keys_BL: Tensor | None) -> Tensor | None:
        if keys_BL is None:
            return None
        allowed = causal & keys_BL[:, None, :]
        if allowed.is_cuda:
            # The memory-efficient kernel returns NaN for a query without any key, such as left padding.
            allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
        allowed = torch.nn.functional.pad(allowed, (0, num_keys - length))
        masked = torch.finfo(dtype).min
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, masked).unsqueeze(1)

    return AttentionMasks(**{kind: additive(keys_BL) for kind, keys_BL in keys.items()})


def compute_position_ids(
    attention_mask_BS: Tensor, num_past: Tensor | int, sample_ids_BS: Tensor | None = None
) -> Tensor:
    """Return position ids (B, S) int64, which do not count padding.

    Args:
        attention_mask_BS: bool, positions that are not padding.
        num_past: `KVCache.num_tokens` before these positions.
        sample_ids_BS: int64, ids of samples packed into one row, each of which counts from 0; None without packing.
    """
    position_ids = num_past + attention_mask_BS.cumsum(dim=1) - 1
    if sample_ids_BS is not None:
        is_first = torch.ones_like(sample_ids_BS, dtype=torch.bool)
        is_first[:, 1:] = sample_ids_BS[:, 1:] != sample_ids_BS[:, :-1]
        position_ids = position_ids - position_ids.where(is_first, 0).cummax(dim=1).values
    return position_ids.masked_fill(~attention_mask_BS, 1)
