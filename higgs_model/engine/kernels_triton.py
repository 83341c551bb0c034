"""Attention over block tables as Triton kernels. Imported late: only where they run is Triton needed.

`decode` is flash decoding: the positions of each row are cut into `num_splits` equal parts that run side by side, and a
second kernel joins them. `num_splits` is fixed by the number of rows, so that a step can be captured and a row's result
depends on its own length alone among steps of as many rows. `prefill` is flash attention by tiles of queries.
Sums are float32 whatever the pool holds. Positions past a row's length are never loaded: unwritten memory may hold
anything. Sources: "FlashAttention-2", https://arxiv.org/abs/2307.08691; "Flash-Decoding", Dao et al. 2023.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from higgs_model.engine.kernels import LayerPool, PreparedSpans

_LOG2_E = math.log2(math.e)
_PROGRAMS_A_PROCESSOR = 4
"""Programs that keep one multiprocessor's memory pipes busy."""
_LONGEST_PART = 2048
"""Positions after which a row is cut, however many rows there are: else one long row keeps all others waiting."""
_MOST_SPLITS = 64


@dataclasses.dataclass(frozen=True)
class TritonKernels:
    """Kernels of one tile size.

    Attributes:
        tile: positions that a program looks at in one go.
        stages: tiles whose loads are under way at the same time.
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
        made = torch.empty_like(queries_SHD, memory_format=torch.contiguous_format)
        # Of each part: the weighted sum of values, and beside it the greatest score and the sum of weights.
        parts = made.new_empty((rows, heads, splits, width), dtype=torch.float32)
        marks = made.new_empty((rows, heads, splits, 2), dtype=torch.float32)
        padded = max(16, triton.next_power_of_2(width))
        _decode_part[(rows, kv_heads, splits)](
            queries_SHD, *_operands(pool), table_SB, lengths_S, parts, marks, made,
            queries_SHD.stride(0), queries_SHD.stride(1), pool.keys.stride(0), pool.keys.stride(1), table_SB.stride(0),
            _LOG2_E / math.sqrt(width), heads, kv_heads, width, splits,
            BLOCK_SIZE=block_size, GROUP=heads // kv_heads, ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
            WIDTH=padded, TILE=self.tile, SCALED=pool.key_scales is not None, ALONE=splits == 1,
            IEEE=queries_SHD.dtype == torch.float32, num_warps=4, num_stages=self.stages,
        )  # fmt: skip
        if splits > 1:
            _decode_join[(rows, heads)](
                parts, marks, made, heads, width, splits,
                WIDTH=padded, SPLITS=triton.next_power_of_2(splits), num_warps=4,
            )  # fmt: skip
        return made

    def prefill(self, queries_PHD: Tensor, pool: LayerPool, table_SB: Tensor, spans: PreparedSpans) -> Tensor:
        """(P, H, D) → (P, H, D): each query attends to the positions of its slot up to its own."""
        heads, width = queries_PHD.shape[1:]
        block_size, kv_heads = pool.keys.shape[1:3]
        made = torch.empty_like(queries_PHD, memory_format=torch.contiguous_format)
        _prefill_tile[(len(spans.tiles_T4), heads)](
            queries_PHD, *_operands(pool), table_SB, spans.tiles_T4, made,
            queries_PHD.stride(0), queries_PHD.stride(1), pool.keys.stride(0), pool.keys.stride(1), table_SB.stride(0),
            _LOG2_E / math.sqrt(width), heads, kv_heads, width,
            BLOCK_SIZE=block_size, GROUP=heads // kv_heads, QUERIES=spans.tile,
            WIDTH=max(16, triton.next_power_of_2(width)), TILE=self.tile, SCALED=pool.key_scales is not None,
            IEEE=queries_PHD.dtype == torch.float32, num_warps=4, num_stages=self.stages,
        )  # fmt: skip
        return made


def _operands(pool: LayerPool) -> tuple[Tensor, ...]:
    """Pool and scales; where there are none, something in their place that is never read."""
    if pool.key_scales is None or pool.value_scales is None:
        return pool.keys, pool.values, pool.keys, pool.values
    return pool.keys, pool.values, pool.key_scales, pool.value_scales


def _num_splits(programs: int, longest: int, device: torch.device) -> int:
    """A power of two: enough programs to fill the device, and no part longer than `_LONGEST_PART`."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = max(processors * _PROGRAMS_A_PROCESSOR / programs, longest / _LONGEST_PART, 1)
    return min(triton.next_power_of_2(math.ceil(wanted)), _MOST_SPLITS)


@triton.jit
def _attend(
    queries, keys, values, key_scales, value_scales, table, head, first, stop, allowed,
    block_stride, place_stride, scale, kv_heads, width,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    SCALED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Rows of queries against positions [first, stop) of one slot and head; query r sees those below `allowed[r]`."""
    precision: tl.constexpr = "ieee" if IEEE else "tf32"
    lane = tl.arange(0, WIDTH)
    greatest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(first, stop, TILE):
        at = start + tl.arange(0, TILE)
        there = at < stop
        block = tl.load(table + at // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        place = block * block_stride + (at % BLOCK_SIZE) * place_stride + head * width
        whole = there[:, None] & (lane < width)[None, :]
        key = tl.load(keys + place[:, None] + lane[None, :], mask=whole, other=0.0)
        value = tl.load(values + place[:, None] + lane[None, :], mask=whole, other=0.0)
        scores = tl.dot(queries, tl.trans(key.to(queries.dtype)), input_precision=precision) * scale
        if SCALED:
            mark = (block * BLOCK_SIZE + at % BLOCK_SIZE) * kv_heads + head
            scores *= tl.load(key_scales + mark, mask=there, other=0.0)[None, :]
        scores = tl.where((at[None, :] < allowed[:, None]) & there[None, :], scores, float("-inf"))
        higher = tl.maximum(greatest, tl.max(scores, 1))
        # A row that has seen nothing yet: minus infinity from itself would not be a number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(greatest - base)
        total = total * shrink + tl.sum(weights, 1)
        if SCALED:
            weights *= tl.load(value_scales + mark, mask=there, other=0.0)[None, :]
        product = tl.dot(weights.to(queries.dtype), value.to(queries.dtype), input_precision=precision)
        summed = summed * shrink[:, None] + product
        greatest = higher
    return greatest, total, summed


@triton.jit
def _decode_part(
    queries, keys, values, key_scales, value_scales, table, lengths, parts, marks, made,
    query_row, query_head, block_stride, place_stride, table_row,
    scale, heads, kv_heads, width, splits,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    SCALED: tl.constexpr, ALONE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), TILE) * TILE
    first = split * share
    stop = tl.minimum(first + share, length)
    member, lane = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mine = (member < GROUP)[:, None] & (lane < width)[None, :]
    asking = head * GROUP + member
    query = tl.load(queries + row * query_row + asking[:, None] * query_head + lane[None, :], mask=mine, other=0.0)
    allowed = tl.zeros([ROWS], tl.int32) + length
    greatest, total, summed = _attend(
        query, keys, values, key_scales, value_scales, table + row * table_row, head, first, stop, allowed,
        block_stride, place_stride, scale, kv_heads, width, BLOCK_SIZE, ROWS, WIDTH, TILE, SCALED, IEEE,
    )  # fmt: skip
    out = row * heads + asking
    if ALONE:
        answer = summed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(made + out[:, None] * width + lane[None, :], answer.to(made.dtype.element_ty), mask=mine)
    else:
        part = out * splits + split
        tl.store(parts + part[:, None] * width + lane[None, :], summed, mask=mine)
        tl.store(marks + part * 2, greatest, mask=member < GROUP)
        tl.store(marks + part * 2 + 1, total, mask=member < GROUP)


@triton.jit
def _decode_join(parts, marks, made, heads, width, splits, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    out = tl.program_id(0) * heads + tl.program_id(1)
    split, lane = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    there = split < splits
    greatest = tl.load(marks + (out * splits + split) * 2, mask=there, other=float("-inf"))
    total = tl.load(marks + (out * splits + split) * 2 + 1, mask=there, other=0.0)
    highest = tl.max(greatest, 0)
    shrink = tl.exp2(greatest - tl.where(highest == float("-inf"), 0.0, highest))
    whole = there[:, None] & (lane < width)[None, :]
    summed = tl.load(parts + (out * splits + split)[:, None] * width + lane[None, :], mask=whole, other=0.0)
    all_weights = tl.sum(total * shrink, 0)
    answer = tl.sum(summed * shrink[:, None], 0) / tl.where(all_weights > 0, all_weights, 1.0)
    tl.store(made + out * width + lane, answer.to(made.dtype.element_ty), mask=lane < width)


@triton.jit
def _prefill_tile(
    queries, keys, values, key_scales, value_scales, table, tiles, made,
    query_row, query_head, block_stride, place_stride, table_row,
    scale, heads, kv_heads, width,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    SCALED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    tile, asking = tl.program_id(0), tl.program_id(1)
    slot, packed = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    at, count = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    member, lane = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    mine = (member < count)[:, None] & (lane < width)[None, :]
    row = packed + member
    query = tl.load(queries + row[:, None] * query_row + asking * query_head + lane[None, :], mask=mine, other=0.0)
    allowed = at + member + 1
    _, total, summed = _attend(
        query, keys, values, key_scales, value_scales, table + slot * table_row, asking // GROUP, 0, at + count,
        allowed, block_stride, place_stride, scale, kv_heads, width, BLOCK_SIZE, QUERIES, WIDTH, TILE, SCALED, IEEE,
    )  # fmt: skip
    answer = summed / tl.where(total > 0, total, 1.0)[:, None]
    out = row * heads + asking
    tl.store(made + out[:, None] * width + lane[None, :], answer.to(made.dtype.element_ty), mask=mine)


def candidates() -> list[Any]:
    """Tile sizes worth measuring; which is fastest differs from device to device."""
    return [TritonKernels(tile, stages) for tile, stages in ((64, 2), (64, 3), (128, 2), (32, 3))]
