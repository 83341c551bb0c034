"""Attention on a CPU: contiguous keys and values per slot, and one call to torch's attention per slot.

The block pool holds only what sequences may share. Shared blocks are copied into the memory of a slot that starts with
them, and full blocks of its prompt are copied out; decoding reads a slot's own memory alone. Because torch's attention
gets one slot at a time, and always the same positions together, a slot's results do not depend on the other slots.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from higgs_model.engine.prefill_span import PrefillSpan


class ContiguousAttention:
    """The KV cache of all slots. Unwritten memory may hold anything; it is never read."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        num_query_heads: int,
        max_slots: int,
        max_blocks_per_slot: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self._block_size = block_size
        self._max_positions = max_blocks_per_slot * block_size
        self._group = num_query_heads // num_kv_heads
        self._head_starts = torch.arange(num_kv_heads, device=device) * self._max_positions
        # The positions of a head are contiguous for attention. One more slot is the target of inactive rows' writes.
        shape = (num_layers, 2, max_slots + 1, num_kv_heads, self._max_positions, head_dim)
        self._slots = torch.empty(shape, dtype=dtype, device=device)
        self._flat = self._slots.view(num_layers, 2, -1, head_dim)
        pool_shape = (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)
        self._pool = torch.empty(pool_shape, dtype=dtype, device=device)
        self._slot_size, self._null_slot = num_kv_heads * self._max_positions, max_slots

    def set_blocks(self, slot: int, blocks: Sequence[int], shared: range = range(0)) -> None:
        """Assign blocks to a slot; those with indices in `shared` are already computed."""
        for index in shared:
            start = index * self._block_size
            self._slots[:, :, slot, :, start : start + self._block_size] = self._pool[blocks[index]]

    def publish_block(self, slot: int, index: int, block: int) -> None:
        """Make block number `index` of a slot, full and final, available to other slots."""
        start = index * self._block_size
        self._pool[block] = self._slots[:, :, slot, :, start : start + self._block_size]

    def write_indices(self, slots_P: Tensor, positions_P: Tensor, active_P: Tensor | None = None) -> Tensor:
        """Return where the keys and values of positions are written; inactive ones go where nothing is read."""
        if active_P is not None:
            slots_P = torch.where(active_P, slots_P, self._null_slot)
            positions_P = torch.where(active_P, positions_P, 0)
        return ((slots_P * self._slot_size + positions_P).unsqueeze(1) + self._head_starts).flatten()

    def write(self, layer: int, keys_PHD: Tensor, values_PHD: Tensor, indices_P: Tensor) -> None:
        """Store the keys and values of one layer."""
        self._flat[layer, 0].index_copy_(0, indices_P, keys_PHD.flatten(0, 1))
        self._flat[layer, 1].index_copy_(0, indices_P, values_PHD.flatten(0, 1))

    def decode(self, layer: int, queries_SHD: Tensor, lengths_S: Tensor) -> Tensor:
        """(S, H, D) → (S, H, D): slot s attends to its first `lengths_S[s]` positions; with none, zeros."""
        attended = torch.zeros_like(queries_SHD)
        for slot, length in enumerate(lengths_S.tolist()):
            if length:
                attended[slot] = self._attend(layer, slot, queries_SHD[slot : slot + 1], length, None)[0]
        return attended

    def build_metadata(self, spans: Sequence[PrefillSpan]) -> Sequence[PrefillSpan]:
        """Return the metadata of spans for `prefill`: the spans themselves."""
        return spans

    def prefill(self, layer: int, queries_PHD: Tensor, metadata: Sequence[PrefillSpan]) -> Tensor:
        """(P, H, D) → (P, H, D): causal attention for the concatenated queries of all spans.

        Tiles start at multiples of the block size, so that they are the same however a prompt is split into spans.
        """
        attended, first = torch.empty_like(queries_PHD), 0
        for span in metadata:
            start = span.start
            while start < span.stop:
                stop = min((start // self._block_size + 1) * self._block_size, span.stop)
                rows = slice(first + start - span.start, first + stop - span.start)
                mask = _causal_mask(stop - start, stop, self._group)
                attended[rows] = self._attend(layer, span.slot, queries_PHD[rows], stop, mask)
                start = stop
            first += span.length
        return attended

    def _attend(self, layer: int, slot: int, queries_PHD: Tensor, length: int, mask: Tensor | None) -> Tensor:
        num_queries, num_heads, head_dim = queries_PHD.shape
        keys, values = (self._slots[layer, kind, slot : slot + 1, :, :length] for kind in (0, 1))
        # Query heads that share a key head become additional queries of that head, so that keys are not repeated.
        grouped = queries_PHD.view(num_queries, -1, self._group, head_dim).permute(1, 0, 2, 3).flatten(1, 2)
        output = F.scaled_dot_product_attention(grouped.unsqueeze(0), keys, values, attn_mask=mask)
        return output[0].unflatten(1, (num_queries, self._group)).permute(1, 0, 2, 3).reshape(-1, num_heads, head_dim)


@functools.lru_cache(maxsize=64)
def _causal_mask(num_queries: int, length: int, group: int) -> Tensor:
    """Return the additive mask (Q × group, length) for the last Q of `length` positions."""
    queries = torch.arange(length - num_queries, length).unsqueeze(1)
    hidden = torch.arange(length) > queries
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).repeat_interleave(group, dim=0)
