"""Triton kernels for attention over block tables. Imported late, because only they need Triton.

`decode` is Flash-Decoding: the positions of each row are divided into `num_splits` equal parts that run in parallel,
and a second kernel combines them. `num_splits` depends on the number of rows only, so that a step can be captured and a
row's result depends only on its own length and the number of rows. `prefill` is FlashAttention by tiles of queries.
Accumulation is in float32 whatever the pool holds. Positions past a row's length are never loaded, because unwritten
memory may hold anything. Sources: "FlashAttention-2", https://arxiv.org/abs/2307.08691; "Flash-Decoding", Dao et al.
2023.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from higgs_model.engine.kernels import LayerPool, PrefillMetadata

_LOG2_E = math.log2(math.e)
_PROGRAMS_PER_SM = 4
"""Programs that saturate the memory bandwidth of one multiprocessor."""
_MAX_SPLIT_POSITIONS = 2048
"""Longer rows are split however many rows there are: otherwise all would wait for one long row."""
_MAX_SPLITS = 64


@dataclasses.dataclass(frozen=True)
class TritonKernels:
    """Kernels with one tile size.

    Attributes:
        tile: key positions per iteration of a program.
        stages: tiles whose loads are in flight at the same time (software pipelining).
    """

    tile: int = 64
    stages: int = 2

    @property
    def name(self) -> str:
        """For logs and reports."""
        return f"triton-{self.tile}x{self.stages}"

    def decode(self, queries_SHD: Tensor, pool: LayerPool, table_SB: Tensor, lengths_S: Tensor) -> Tensor:
        """(S, H, D) → (S, H, D): row s attends to its first `lengths_S[s]` positions; with none, zeros."""
        rows, heads, width = queries_SHD.shape
        block_size, kv_heads = pool.keys.shape[1:3]
        splits = _num_splits(rows * kv_heads, table_SB.shape[1] * block_size, queries_SHD.device)
        out = torch.empty_like(queries_SHD, memory_format=torch.contiguous_format)
        # For each split: the weighted sum of values, the maximum score, and the sum of weights.
        partial = out.new_empty((rows, heads, splits, width), dtype=torch.float32)
        stats = out.new_empty((rows, heads, splits, 2), dtype=torch.float32)
        padded = max(16, triton.next_power_of_2(width))
        _decode_split[(rows, kv_heads, splits)](
            queries_SHD, *_operands(pool), table_SB, lengths_S, partial, stats, out,
            queries_SHD.stride(0), queries_SHD.stride(1), pool.keys.stride(0), pool.keys.stride(1), table_SB.stride(0),
            _LOG2_E / math.sqrt(width), heads, kv_heads, width, splits,
            BLOCK_SIZE=block_size, GROUP=heads // kv_heads, ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
            WIDTH=padded, TILE=self.tile, SCALED=pool.key_scales is not None, SINGLE_SPLIT=splits == 1,
            IEEE=queries_SHD.dtype == torch.float32, num_warps=4, num_stages=self.stages,
        )  # fmt: skip
        if splits > 1:
            _combine_splits[(rows, heads)](
                partial, stats, out, heads, width, splits,
                WIDTH=padded, SPLITS=triton.next_power_of_2(splits), num_warps=4,
            )  # fmt: skip
        return out

    def prefill(self, queries_PHD: Tensor, pool: LayerPool, table_SB: Tensor, metadata: PrefillMetadata) -> Tensor:
        """(P, H, D) → (P, H, D): each query attends to the positions of its slot up to its own."""
        heads, width = queries_PHD.shape[1:]
        block_size, kv_heads = pool.keys.shape[1:3]
        out = torch.empty_like(queries_PHD, memory_format=torch.contiguous_format)
        _prefill_tile[(len(metadata.tiles_T4), heads)](
            queries_PHD, *_operands(pool), table_SB, metadata.tiles_T4, out,
            queries_PHD.stride(0), queries_PHD.stride(1), pool.keys.stride(0), pool.keys.stride(1), table_SB.stride(0),
            _LOG2_E / math.sqrt(width), heads, kv_heads, width,
            BLOCK_SIZE=block_size, GROUP=heads // kv_heads, QUERIES=metadata.tile,
            WIDTH=max(16, triton.next_power_of_2(width)), TILE=self.tile, SCALED=pool.key_scales is not None,
            IEEE=queries_PHD.dtype == torch.float32, num_warps=4, num_stages=self.stages,
        )  # fmt: skip
        return out


def _operands(pool: LayerPool) -> tuple[Tensor, ...]:
    """Return pool and scales; without scales, placeholders that are never read."""
    if pool.key_scales is None or pool.value_scales is None:
        return pool.keys, pool.values, pool.keys, pool.values
    return pool.keys, pool.values, pool.key_scales, pool.value_scales


def _num_splits(programs: int, longest: int, device: torch.device) -> int:
    """Return a power of two that fills the device with programs, with no split over `_MAX_SPLIT_POSITIONS`."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    required = max(processors * _PROGRAMS_PER_SM / programs, longest / _MAX_SPLIT_POSITIONS, 1)
    return min(triton.next_power_of_2(math.ceil(required)), _MAX_SPLITS)


@triton.jit
def _attend(
    queries, keys, values, key_scales, value_scales, table, head, first, stop, allowed,
    block_stride, position_stride, scale, kv_heads, width,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    SCALED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Attend with a tile of queries to positions [first, stop) of one slot and head; query r sees those < `allowed[r]`.

    Returns:
        The maximum score, the sum of weights, and the weighted sum of values of each query (online softmax).
    """
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    lane = tl.arange(0, WIDTH)
    max_score = tl.full([ROWS], float("-inf"), tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, stop, TILE):
        position = start + tl.arange(0, TILE)
        valid = position < stop
        block = tl.load(table + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        offset = block * block_stride + (position % BLOCK_SIZE) * position_stride + head * width
        mask = valid[:, None] & (lane < width)[None, :]
        key = tl.load(keys + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        value = tl.load(values + offset[:, None] + lane[None, :], mask=mask, other=0.0)
        scores = tl.dot(queries, tl.trans(key.to(queries.dtype)), input_precision=precision) * scale
        if SCALED:
            scale_offset = (block * BLOCK_SIZE + position % BLOCK_SIZE) * kv_heads + head
            scores *= tl.load(key_scales + scale_offset, mask=valid, other=0.0)[None, :]
        scores = tl.where((position[None, :] < allowed[:, None]) & valid[None, :], scores, float("-inf"))
        new_max = tl.maximum(max_score, tl.max(scores, 1))
        # A row without any position so far: −inf minus −inf would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(max_score - base)
        weight_sum = weight_sum * rescale + tl.sum(weights, 1)
        if SCALED:
            weights *= tl.load(value_scales + scale_offset, mask=valid, other=0.0)[None, :]
        product = tl.dot(weights.to(queries.dtype), value.to(queries.dtype), input_precision=precision)
        accumulator = accumulator * rescale[:, None] + product
        max_score = new_max
    return max_score, weight_sum, accumulator


@triton.jit
def _decode_split(
    queries, keys, values, key_scales, value_scales, table, lengths, partial, stats, out,
    query_row_stride, query_head_stride, block_stride, position_stride, table_row_stride,
    scale, heads, kv_heads, width, splits,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    SCALED: tl.constexpr, SINGLE_SPLIT: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), TILE) * TILE
    first = split * share
    stop = tl.minimum(first + share, length)
    index, lane = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (index < GROUP)[:, None] & (lane < width)[None, :]
    query_head = head * GROUP + index
    query_offset = row * query_row_stride + query_head[:, None] * query_head_stride + lane[None, :]
    query = tl.load(queries + query_offset, mask=mask, other=0.0)
    allowed = tl.zeros([ROWS], tl.int32) + length
    max_score, weight_sum, accumulator = _attend(
        query, keys, values, key_scales, value_scales, table + row * table_row_stride, head, first, stop, allowed,
        block_stride, position_stride, scale, kv_heads, width, BLOCK_SIZE, ROWS, WIDTH, TILE, SCALED, IEEE,
    )  # fmt: skip
    out_row = row * heads + query_head
    if SINGLE_SPLIT:
        result = accumulator / tl.where(weight_sum > 0, weight_sum, 1.0)[:, None]
        tl.store(out + out_row[:, None] * width + lane[None, :], result.to(out.dtype.element_ty), mask=mask)
    else:
        part = out_row * splits + split
        tl.store(partial + part[:, None] * width + lane[None, :], accumulator, mask=mask)
        tl.store(stats + part * 2, max_score, mask=index < GROUP)
        tl.store(stats + part * 2 + 1, weight_sum, mask=index < GROUP)


@triton.jit
def _combine_splits(partial, stats, out, heads, width, splits, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    out_row = tl.program_id(0) * heads + tl.program_id(1)
    split, lane = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    valid = split < splits
    max_score = tl.load(stats + (out_row * splits + split) * 2, mask=valid, other=float("-inf"))
    weight_sum = tl.load(stats + (out_row * splits + split) * 2 + 1, mask=valid, other=0.0)
    global_max = tl.max(max_score, 0)
    rescale = tl.exp2(max_score - tl.where(global_max == float("-inf"), 0.0, global_max))
    mask = valid[:, None] & (lane < width)[None, :]
    accumulator = tl.load(partial + (out_row * splits + split)[:, None] * width + lane[None, :], mask=mask, other=0.0)
    denominator = tl.sum(weight_sum * rescale, 0)
    result = tl.sum(accumulator * rescale[:, None], 0) / tl.where(denominator > 0, denominator, 1.0)
    tl.store(out + out_row * width + lane, result.to(out.dtype.element_ty), mask=lane < width)


@triton.jit
def _prefill_tile(
    queries, keys, values, key_scales, value_scales, table, tiles, out,
    query_row_stride, query_head_stride, block_stride, position_stride, table_row_stride,
    scale, heads, kv_heads, width,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    SCALED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    tile, query_head = tl.program_id(0), tl.program_id(1)
    slot, first_query = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    position, count = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    index, lane = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    mask = (index < count)[:, None] & (lane < width)[None, :]
    row = first_query + index
    query_offset = row[:, None] * query_row_stride + query_head * query_head_stride + lane[None, :]
    query = tl.load(queries + query_offset, mask=mask, other=0.0)
    allowed = position + index + 1
    _, weight_sum, accumulator = _attend(
        query, keys, values, key_scales, value_scales, table + slot * table_row_stride, query_head // GROUP, 0,
        position + count, allowed, block_stride, position_stride, scale, kv_heads, width, BLOCK_SIZE, QUERIES, WIDTH,
        TILE, SCALED, IEEE,
    )  # fmt: skip
    result = accumulator / tl.where(weight_sum > 0, weight_sum, 1.0)[:, None]
    out_row = row * heads + query_head
    tl.store(out + out_row[:, None] * width + lane[None, :], result.to(out.dtype.element_ty), mask=mask)


def candidates() -> list[Any]:
    """Return the tile sizes worth timing; the fastest one depends on the device."""
    return [TritonKernels(tile, stages) for tile, stages in ((64, 2), (64, 3), (128, 2), (32, 3))]
