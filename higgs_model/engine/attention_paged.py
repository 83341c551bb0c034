"""Attention over the pool of blocks itself, for devices on which a step must not depend on the host.

Every slot has a row of a block table; keys and values lie where the table says, so that shared blocks are not copied
and nothing moves when a slot changes hands. Shapes depend on the number of rows alone, so that a decode step can be
captured. `kernels` has the ways to compute it; unwritten memory may hold anything, none of them lets it through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from higgs_model.engine import fp8
from higgs_model.engine.kernels import (
    GatherKernels,
    Kernels,
    LayerPool,
    PreparedSpans,
    VarlenKernels,
    cuda_seconds,
    fastest,
)
from higgs_model.engine.spans import Span
from higgs_model.engine.transfer import to_device

TRASH_BLOCK = 0
"""Never given out: rows that do not count write there."""

_TYPICAL_POSITIONS = 600
"""A voice, a sentence and half of its answer: what the choice of kernels is measured with."""
_TOLERANCE = 0.03
"""Of attention to normal random numbers in 16 bits."""


class PagedAttention:
    """Keys and values of all slots, in blocks.

    Args:
        fp8_cache: keep keys and values in 8 bits, with a scale for each position and head.
        kernels: how attention is computed, for decoding and for prompts; None: the fastest ones here.
    """

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
        fp8_cache: bool = False,
        kernels: tuple[Kernels, Kernels] | None = None,
    ) -> None:
        self._block_size = block_size
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim)
        self._pool = torch.empty(shape, dtype=fp8.DTYPE if fp8_cache else dtype, device=device)
        self._scales = torch.empty(shape[:-1], device=device) if fp8_cache else None
        self._table = torch.full((max_slots, max_blocks_per_slot), TRASH_BLOCK, dtype=torch.int32, device=device)
        self._layers = [self._layer(index) for index in range(num_layers)]
        self.decode_kernels, self.prefill_kernels = kernels or self._fastest(num_query_heads, dtype)

    def _layer(self, index: int) -> LayerPool:
        scales = (None, None) if self._scales is None else (self._scales[index, 0], self._scales[index, 1])
        return LayerPool(self._pool[index, 0], self._pool[index, 1], *scales)

    def set_blocks(self, slot: int, blocks: Sequence[int], shared: range = range(0)) -> None:
        """Give a slot its blocks; those of the indices `shared` hold their content already."""
        self._table[slot, : len(blocks)] = to_device(np.array(blocks, np.int32), self._table.device)

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
        pool = self._layers[layer]
        stores = ((pool.keys, pool.key_scales, keys_PHD), (pool.values, pool.value_scales, values_PHD))
        for stored, scales, given in stores:
            if scales is None:
                stored.flatten(0, 1).index_copy_(0, places_P, given)
                continue
            narrow, scale = fp8.quantized(given)
            # Not every device copies rows of fp8: they are copied as bytes.
            stored.view(torch.uint8).flatten(0, 1).index_copy_(0, places_P, narrow.view(torch.uint8))
            scales.flatten(0, 1).index_copy_(0, places_P, scale.squeeze(-1))

    def decode(self, layer: int, queries_SHD: Tensor, lengths_S: Tensor) -> Tensor:
        """(S, H, D) → (S, H, D): slot s attends to its first `lengths_S[s]` positions; with none, anything finite."""
        table = self._table[: len(queries_SHD)]
        return self.decode_kernels.decode(queries_SHD, self._layers[layer], table, lengths_S)

    def prepare(self, spans: Sequence[Span]) -> PreparedSpans:
        """What `prefill` needs to know of spans, once for all layers."""
        return PreparedSpans.of(spans, self._table.device)

    def prefill(self, layer: int, queries_PHD: Tensor, spans: PreparedSpans) -> Tensor:
        """(P, H, D) → (P, H, D): queries of the spans one after the other attend to all before them, and themselves."""
        return self.prefill_kernels.prefill(queries_PHD, self._layers[layer], self._table, spans)

    # ------------------------------------------------------------------ the choice of kernels

    def _fastest(self, num_query_heads: int, dtype: torch.dtype) -> tuple[Kernels, Kernels]:
        """For decoding and for prompts; numbers of 32 bits, which only tests have on a GPU, go the plain way."""
        if self._table.device.type != "cuda" or dtype.itemsize > 2:
            return GatherKernels(), GatherKernels()
        from higgs_model.engine import kernels_triton

        choices: list[Kernels] = [*VarlenKernels.installed(), *kernels_triton.candidates()]
        return self.measured(num_query_heads, dtype, choices, cuda_seconds)

    def measured(
        self,
        num_query_heads: int,
        dtype: torch.dtype,
        choices: Sequence[Kernels],
        seconds: Callable[[Callable[[], object]], float],
    ) -> tuple[Kernels, Kernels]:
        """The best of `choices` by `seconds`, with slots of a usual length; the table and one layer are used for it."""
        device = self._table.device
        pool, size = self._layers[0], self._block_size
        slots, num_blocks = len(self._table), len(pool.keys)
        blocks = min(-(-_TYPICAL_POSITIONS // size), self._table.shape[1])
        length = min(_TYPICAL_POSITIONS, blocks * size)
        # Of as many columns as are used: plain attention would gather whatever the table has room for.
        table = self._table[:, :blocks]
        # Slots may share blocks here: more slots than blocks are as fast to read.
        table.copy_(1 + torch.arange(slots * blocks, device=device).view(slots, -1) % (num_blocks - 1))
        used = table.flatten().long()
        for stored, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
            numbers = torch.randn((len(used), *stored.shape[1:]), device=device, dtype=dtype)
            if scales is None:
                stored[used] = numbers
            else:
                narrow, scale = fp8.quantized(numbers)
                stored.view(torch.uint8)[used], scales[used] = narrow.view(torch.uint8), scale.squeeze(-1)
            if length % size and slots * blocks < num_blocks:
                # Unwritten memory may hold anything: a kernel that lets it through is none.
                (stored if scales is None else scales)[table[:, -1].long(), length % size :] = float("nan")
        heads, width = num_query_heads, pool.keys.shape[-1]
        lengths = torch.full((slots,), length, device=device)
        queries = torch.randn(slots, heads, width, device=device, dtype=dtype)
        spans = self.prepare([Span(slot, 0, length) for slot in range(min(slots, 4))])
        prompt = torch.randn(len(spans.spans) * length, heads, width, device=device, dtype=dtype)
        chosen = (
            fastest(choices, lambda one: one.decode(queries, pool, table, lengths), seconds, _TOLERANCE),
            fastest(choices, lambda one: one.prefill(prompt, pool, table, spans), seconds, _TOLERANCE),
        )
        self._table.fill_(TRASH_BLOCK)
        return chosen
