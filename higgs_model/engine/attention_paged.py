"""Attention over the pool of blocks itself, for devices on which a step must not depend on the host.

Every slot has a row of a block table; keys and values lie where the table says, so that shared blocks are not copied
and nothing moves when a slot changes hands. Shapes depend on the number of rows alone, so that a decode step can be
captured. Where torch's variable-length attention reads block tables, it does the work; else keys and values are
gathered first, which reads as much memory as the table has room for, however short the sequences are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from higgs_model.engine.spans import Span

TRASH_BLOCK = 0
"""Never given out: rows that do not count write there."""


class PagedAttention:
    """Keys and values of all slots, in blocks."""

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
        self._block_size, self._group = block_size, num_query_heads // num_kv_heads
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        self._pool = torch.zeros(shape, dtype=dtype, device=device)
        self._flat = self._pool.flatten(2, 3)
        self._table = torch.full((max_slots, max_blocks_per_slot), TRASH_BLOCK, dtype=torch.int32, device=device)
        self._positions = torch.arange(max_blocks_per_slot * block_size, device=device)
        self._varlen = _varlen_with_tables() if self._pool.is_cuda and dtype != torch.float32 else None

    def set_blocks(self, slot: int, blocks: Sequence[int], num_shared: int) -> None:
        """Give a slot its blocks; the first `num_shared` hold its start already."""
        row = torch.tensor(blocks, dtype=torch.int32)
        self._table[slot, : len(row)] = row.to(self._table.device, non_blocking=True)

    def keep_block(self, slot: int, index: int, block: int) -> None:
        """The slot's block number `index` is full and final: it is where others look for it already."""

    def places(self, slots_P: Tensor, positions_P: Tensor, counts_P: Tensor | None = None) -> Tensor:
        """Where keys and values of positions are written; of those that do not count, in the trash."""
        size = self._block_size
        # A row that does not count may stand one past the table's end.
        columns = (positions_P // size).clamp(max=self._table.shape[1] - 1)
        places = self._table[slots_P, columns].long() * size + positions_P % size
        return places if counts_P is None else torch.where(counts_P, places, TRASH_BLOCK)

    def write(self, layer: int, keys_PHD: Tensor, values_PHD: Tensor, places_P: Tensor) -> None:
        """Store keys and values of one layer."""
        self._flat[layer, 0].index_copy_(0, places_P, keys_PHD)
        self._flat[layer, 1].index_copy_(0, places_P, values_PHD)

    def decode(self, layer: int, queries_SHD: Tensor, lengths_S: Tensor) -> Tensor:
        """(S, H, D) → (S, H, D): slot s attends to its first `lengths_S[s]` positions; with none, anything finite."""
        rows = len(queries_SHD)
        table = self._table[:rows]
        # A row without a position looks at one in the trash: attention to nothing is not a number.
        lengths = lengths_S.clamp(min=1)
        if self._varlen is not None:
            starts = torch.arange(rows + 1, dtype=torch.int32, device=table.device)
            return self._varlen(
                queries_SHD, self._pool[layer, 0], self._pool[layer, 1], starts, table, lengths, 1, table.shape[1]
            )
        keys, values = (self._pool[layer, kind][table].flatten(1, 2).transpose(1, 2) for kind in (0, 1))
        mask = (self._positions < lengths.unsqueeze(1))[:, None, None]
        queries = queries_SHD.unflatten(1, (-1, self._group))
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).flatten(1, 2)

    def prefill(self, layer: int, queries_PHD: Tensor, spans: Sequence[Span]) -> Tensor:
        """(P, H, D) → (P, H, D): queries of the spans one after the other attend to all before them, and themselves."""
        parts = queries_PHD.split([span.length for span in spans])
        return torch.cat([self._one(layer, part, span) for part, span in zip(parts, spans, strict=True)])

    def _one(self, layer: int, queries_PHD: Tensor, span: Span) -> Tensor:
        blocks = self._table[span.slot, : -(-span.stop // self._block_size)]
        keys, values = (
            self._pool[layer, kind][blocks].flatten(0, 1)[: span.stop].transpose(0, 1).unsqueeze(0) for kind in (0, 1)
        )
        mask = None
        if span.start:
            # Causality as torch knows it begins at the first key; these queries begin later.
            queries_at = torch.arange(span.start, span.stop, device=queries_PHD.device).unsqueeze(1)
            mask = self._positions[: span.stop] <= queries_at
        made = F.scaled_dot_product_attention(
            queries_PHD.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return made[0].transpose(0, 1)


def _varlen_with_tables() -> Callable[..., Tensor] | None:
    """Torch's variable-length attention, if the one installed reads block tables."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"block_table", "seqused_k", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None
    attend: Any = varlen_attn

    def call(
        queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, table: Tensor, used: Tensor, q: int, blocks: int
    ) -> Tensor:
        made: Tensor = attend(
            queries,
            keys,
            values,
            starts,
            None,
            q,
            blocks * keys.shape[1],
            window_size=(-1, -1),
            enable_gqa=True,
            seqused_k=used.to(torch.int32),
            block_table=table,
        )
        return made

    return call
