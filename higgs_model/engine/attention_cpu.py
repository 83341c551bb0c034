"""Attention on a CPU: each slot's keys and values in a row of their own, each slot attended to by itself.

The pool of blocks holds only what sequences may share. A sequence that begins with shared blocks has them copied
into its row, and full blocks of a prompt are copied out of it; decoding touches rows alone. Because torch's attention
gets one slot at a time, and always the same positions together, nothing here depends on a slot's neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from higgs_model.engine.spans import Span


class RowAttention:
    """Keys and values of all slots. Unwritten memory holds anything; nothing reads it."""

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
        self._room = max_blocks_per_slot * block_size
        self._group = num_query_heads // num_kv_heads
        self._head_starts = torch.arange(num_kv_heads, device=device) * self._room
        # A head's positions lie side by side: attention reads them in one go. The slot after the last one takes what
        # slots that do not count write.
        shape = (num_layers, 2, max_slots + 1, num_kv_heads, self._room, head_dim)
        self._rows = torch.empty(shape, dtype=dtype, device=device)
        self._flat = self._rows.view(num_layers, 2, -1, head_dim)
        pool_shape = (num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim)
        self._pool = torch.empty(pool_shape, dtype=dtype, device=device)
        self._slot_size, self._trash = num_kv_heads * self._room, max_slots

    def set_blocks(self, slot: int, blocks: Sequence[int], shared: range = range(0)) -> None:
        """Give a slot its blocks; those of the indices `shared` hold their content already."""
        for index in shared:
            start = index * self._block_size
            self._rows[:, :, slot, :, start : start + self._block_size] = self._pool[blocks[index]]

    def keep_block(self, slot: int, index: int, block: int) -> None:
        """The slot's block number `index` is full and final: let others share it."""
        start = index * self._block_size
        self._pool[block] = self._rows[:, :, slot, :, start : start + self._block_size]

    def places(self, slots_P: Tensor, positions_P: Tensor, counts_P: Tensor | None = None) -> Tensor:
        """Where keys and values of positions are written; of those that do not count, where nobody reads."""
        if counts_P is not None:
            slots_P = torch.where(counts_P, slots_P, self._trash)
            positions_P = torch.where(counts_P, positions_P, 0)
        return ((slots_P * self._slot_size + positions_P).unsqueeze(1) + self._head_starts).flatten()

    def write(self, layer: int, keys_PHD: Tensor, values_PHD: Tensor, places_P: Tensor) -> None:
        """Store keys and values of one layer."""
        self._flat[layer, 0].index_copy_(0, places_P, keys_PHD.flatten(0, 1))
        self._flat[layer, 1].index_copy_(0, places_P, values_PHD.flatten(0, 1))

    def decode(self, layer: int, queries_SHD: Tensor, lengths_S: Tensor) -> Tensor:
        """(S, H, D) → (S, H, D): slot s attends to its first `lengths_S[s]` positions; with none, zeros."""
        attended = torch.zeros_like(queries_SHD)
        for slot, length in enumerate(lengths_S.tolist()):
            if length:
                attended[slot] = self._attend(layer, slot, queries_SHD[slot : slot + 1], length, None)[0]
        return attended

    def prepare(self, spans: Sequence[Span]) -> Sequence[Span]:
        """What `prefill` needs to know of spans."""
        return spans

    def prefill(self, layer: int, queries_PHD: Tensor, spans: Sequence[Span]) -> Tensor:
        """(P, H, D) → (P, H, D): queries of the spans one after the other attend to all before them, and themselves.

        Tiles begin at multiples of the block size, so that they are the same however a prompt is cut into spans.
        """
        attended, first = torch.empty_like(queries_PHD), 0
        for span in spans:
            start = span.start
            while start < span.stop:
                stop = min((start // self._block_size + 1) * self._block_size, span.stop)
                here = slice(first + start - span.start, first + stop - span.start)
                mask = _causal(stop - start, stop, self._group)
                attended[here] = self._attend(layer, span.slot, queries_PHD[here], stop, mask)
                start = stop
            first += span.length
        return attended

    def _attend(self, layer: int, slot: int, queries_PHD: Tensor, length: int, mask: Tensor | None) -> Tensor:
        num_queries, num_heads, head_dim = queries_PHD.shape
        keys, values = (self._rows[layer, kind, slot : slot + 1, :, :length] for kind in (0, 1))
        # Heads that share keys stand as further queries of one head: nothing is repeated in memory.
        grouped = queries_PHD.view(num_queries, -1, self._group, head_dim).permute(1, 0, 2, 3).flatten(1, 2)
        made = F.scaled_dot_product_attention(grouped.unsqueeze(0), keys, values, attn_mask=mask)
        return made[0].unflatten(1, (num_queries, self._group)).permute(1, 0, 2, 3).reshape(-1, num_heads, head_dim)


@functools.lru_cache(maxsize=64)
def _causal(num_queries: int, length: int, group: int) -> Tensor:
    """(Q × group, length) for the last queries of `length` positions, to be added to scores."""
    queries = torch.arange(length - num_queries, length).unsqueeze(1)
    hidden = torch.arange(length) > queries
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")).repeat_interleave(group, dim=0)
