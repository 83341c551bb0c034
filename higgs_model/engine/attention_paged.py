"""Paged attention: keys and values stay in the block pool, and every slot has a row of a block table.

Shared blocks are not copied. Shapes depend on the number of rows alone, so that decode steps can be captured. `kernels`
has the implementations; unwritten memory may hold anything, and none of them lets it affect a result.
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
    PrefillMetadata,
    VarlenKernels,
    cuda_seconds,
    select_fastest,
)
from higgs_model.engine.prefill_span import PrefillSpan
from higgs_model.engine.transfer import to_device

NULL_BLOCK = 0
"""Never allocated; inactive rows write there."""

_TYPICAL_POSITIONS = 600
"""Length at which kernels are timed: a voice, a sentence and half of its answer."""
_TOLERANCE = 0.03
"""Largest absolute error accepted, for standard normal inputs in 16 bits."""


class PagedAttention:
    """The KV cache of all slots, in blocks.

    Args:
        fp8_cache: store keys and values in fp8, with a scale per position and head.
        kernels: for decoding and for prefill; None: the fastest ones on this device.
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
        self._table = torch.full((max_slots, max_blocks_per_slot), NULL_BLOCK, dtype=torch.int32, device=device)
        self._layers = [self._layer(index) for index in range(num_layers)]
        self.decode_kernels, self.prefill_kernels = kernels or self._default_kernels(num_query_heads, dtype)

    def _layer(self, index: int) -> LayerPool:
        scales = (None, None) if self._scales is None else (self._scales[index, 0], self._scales[index, 1])
        return LayerPool(self._pool[index, 0], self._pool[index, 1], *scales)

    def set_blocks(self, slot: int, blocks: Sequence[int], shared: range = range(0)) -> None:
        """Assign blocks to a slot; `shared` is not needed, because shared blocks are read in place."""
        self._table[slot, : len(blocks)] = to_device(np.array(blocks, np.int32), self._table.device)

    def publish_block(self, slot: int, index: int, block: int) -> None:
        """Do nothing: other slots read the block in place."""

    def write_indices(self, slots_P: Tensor, positions_P: Tensor, active_P: Tensor | None = None) -> Tensor:
        """Return where the keys and values of positions are written; inactive ones go to the null block."""
        size = self._block_size
        # The position of an inactive row may be one past the end of the table.
        columns = (positions_P // size).clamp(max=self._table.shape[1] - 1)
        indices = self._table[slots_P, columns].long() * size + positions_P % size
        return indices if active_P is None else torch.where(active_P, indices, NULL_BLOCK)

    def write(self, layer: int, keys_PHD: Tensor, values_PHD: Tensor, indices_P: Tensor) -> None:
        """Store the keys and values of one layer."""
        pool = self._layers[layer]
        stores = ((pool.keys, pool.key_scales, keys_PHD), (pool.values, pool.value_scales, values_PHD))
        for stored, scales, new in stores:
            if scales is None:
                stored.flatten(0, 1).index_copy_(0, indices_P, new)
                continue
            quantized, scale = fp8.quantize(new)
            # As bytes, because not every device can copy rows of fp8.
            stored.view(torch.uint8).flatten(0, 1).index_copy_(0, indices_P, quantized.view(torch.uint8))
            scales.flatten(0, 1).index_copy_(0, indices_P, scale.squeeze(-1))

    def decode(self, layer: int, queries_SHD: Tensor, lengths_S: Tensor) -> Tensor:
        """(S, H, D) → (S, H, D): slot s attends to its first `lengths_S[s]` positions; with none, it is arbitrary."""
        table = self._table[: len(queries_SHD)]
        return self.decode_kernels.decode(queries_SHD, self._layers[layer], table, lengths_S)

    def build_metadata(self, spans: Sequence[PrefillSpan]) -> PrefillMetadata:
        """Return the metadata of spans for `prefill`, once for all layers."""
        return PrefillMetadata.from_spans(spans, self._table.device)

    def prefill(self, layer: int, queries_PHD: Tensor, metadata: PrefillMetadata) -> Tensor:
        """(P, H, D) → (P, H, D): causal attention for the concatenated queries of all spans."""
        return self.prefill_kernels.prefill(queries_PHD, self._layers[layer], self._table, metadata)

    # ------------------------------------------------------------------ the choice of kernels

    def _default_kernels(self, num_query_heads: int, dtype: torch.dtype) -> tuple[Kernels, Kernels]:
        """Return the kernels for decoding and prefill; float32, which only tests use on a GPU, takes the plain ones."""
        if self._table.device.type != "cuda" or dtype.itemsize > 2:
            return GatherKernels(), GatherKernels()
        from higgs_model.engine import kernels_triton

        choices: list[Kernels] = [*VarlenKernels.installed(), *kernels_triton.candidates()]
        return self.select_kernels(num_query_heads, dtype, choices, cuda_seconds)

    def select_kernels(
        self,
        num_query_heads: int,
        dtype: torch.dtype,
        choices: Sequence[Kernels],
        seconds: Callable[[Callable[[], object]], float],
    ) -> tuple[Kernels, Kernels]:
        """Return the fastest of `choices`, for decoding and for prefill, with slots of a typical length.

        It uses the block table and the memory of one layer.

        Args:
            seconds: times a call.
        """
        device = self._table.device
        pool, size = self._layers[0], self._block_size
        slots, num_blocks = len(self._table), len(pool.keys)
        blocks = min(-(-_TYPICAL_POSITIONS // size), self._table.shape[1])
        length = min(_TYPICAL_POSITIONS, blocks * size)
        # Only the used columns: plain attention would gather everything that the table has room for.
        table = self._table[:, :blocks]
        # If there are fewer blocks than the slots need, slots share them, which does not change the speed.
        table.copy_(1 + torch.arange(slots * blocks, device=device).view(slots, -1) % (num_blocks - 1))
        used = table.flatten().long()
        for stored, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
            numbers = torch.randn((len(used), *stored.shape[1:]), device=device, dtype=dtype)
            if scales is None:
                stored[used] = numbers
            else:
                quantized, scale = fp8.quantize(numbers)
                stored.view(torch.uint8)[used], scales[used] = quantized.view(torch.uint8), scale.squeeze(-1)
            if length % size and slots * blocks < num_blocks:
                # A kernel that reads unwritten memory must not be selected.
                (stored if scales is None else scales)[table[:, -1].long(), length % size :] = float("nan")
        heads, width = num_query_heads, pool.keys.shape[-1]
        lengths = torch.full((slots,), length, device=device)
        queries = torch.randn(slots, heads, width, device=device, dtype=dtype)
        metadata = self.build_metadata([PrefillSpan(slot, 0, length) for slot in range(min(slots, 4))])
        prompt = torch.randn(len(metadata.spans) * length, heads, width, device=device, dtype=dtype)
        chosen = (
            select_fastest(choices, lambda kernels: kernels.decode(queries, pool, table, lengths), seconds, _TOLERANCE),
            select_fastest(
                choices, lambda kernels: kernels.prefill(prompt, pool, table, metadata), seconds, _TOLERANCE
            ),
        )
        self._table.fill_(NULL_BLOCK)
        return chosen
