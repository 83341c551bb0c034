"""Attention over block tables, as functions of one layer's pool: three ways to compute the same.

`GatherKernels` is plain torch and runs anywhere; `VarlenKernels` is torch's own flash attention where the one installed
reads block tables; `kernels_triton` is ours. Which runs is measured once, on the device and for the shapes at hand:
`fastest` takes no kernel that fails or gives other numbers than the plain one.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from higgs_model.engine.graphs import CudaCapture
from higgs_model.engine.spans import Span
from higgs_model.engine.transfer import to_device

logger = logging.getLogger(__name__)

_QUERY_TILE = 64


@dataclasses.dataclass(frozen=True)
class LayerPool:
    """One layer's keys and values (N, size, G, D) by block, and, of an fp8 pool, their scales (N, size, G) float32."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class PreparedSpans:
    """Stretches of several slots that go through the network one after the other, as kernels want them.

    Attributes:
        spans: on the host.
        starts: (spans + 1,) int32, where each begins among all queries.
        slots: (spans,) int64.
        stops: (spans,) int32, positions that its slot has with it.
        tiles_T4: (T, 4) int32, its queries in tiles of up to `tile`: slot, first query, first position, count.
    """

    spans: tuple[Span, ...]
    starts: Tensor
    slots: Tensor
    stops: Tensor
    tiles_T4: Tensor
    tile: int = _QUERY_TILE

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> PreparedSpans:
        """Computed on the host, sent in one go."""
        starts = np.cumsum([0, *(span.length for span in spans)])
        tiles = [
            (span.slot, first + at - span.start, at, min(_QUERY_TILE, span.stop - at))
            for span, first in zip(spans, starts.tolist(), strict=False)
            for at in range(span.start, span.stop, _QUERY_TILE)
        ]
        # The longest go first: a device is done when the last tile is.
        tiles.sort(key=lambda tile: -tile[2])
        slots_stops = [*(span.slot for span in spans), *(span.stop for span in spans)]
        sent = to_device(np.array([*starts.tolist(), *slots_stops, *itertools.chain(*tiles)], np.int32), device)
        begun, slots, stops, flat = sent.split([len(spans) + 1, len(spans), len(spans), 4 * len(tiles)])
        return cls(tuple(spans), begun, slots.long(), stops, flat.view(-1, 4))


class Kernels(Protocol):
    """One way to compute attention over block tables."""

    @property
    def name(self) -> str:
        """For logs and reports."""

    def decode(self, queries_SHD: Tensor, pool: LayerPool, table_SB: Tensor, lengths_S: Tensor) -> Tensor:
        """(S, H, D) → (S, H, D): row s attends to its first `lengths_S[s]` positions; with none, anything finite."""

    def prefill(self, queries_PHD: Tensor, pool: LayerPool, table_SB: Tensor, spans: PreparedSpans) -> Tensor:
        """(P, H, D) → (P, H, D): each query attends to the positions of its slot up to its own."""


class GatherKernels:
    """Keys and values are gathered first: as much memory as the table has room for, however short sequences are."""

    name = "gather"

    def decode(self, queries_SHD: Tensor, pool: LayerPool, table_SB: Tensor, lengths_S: Tensor) -> Tensor:
        """See `Kernels`."""
        keys, values = gathered(pool, table_SB, queries_SHD.dtype)
        there_SL = torch.arange(keys.shape[1], device=keys.device) < lengths_S.unsqueeze(1)
        keys, values = (_only(there_SL, one).transpose(1, 2) for one in (keys, values))
        # A row without a position looks at zeros: attention to nothing is not a number.
        seen = there_SL | (lengths_S == 0).unsqueeze(1)
        queries = queries_SHD.unflatten(1, (keys.shape[1], -1))
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen[:, None, None]).flatten(1, 2)

    def prefill(self, queries_PHD: Tensor, pool: LayerPool, table_SB: Tensor, spans: PreparedSpans) -> Tensor:
        """See `Kernels`."""
        size, made = pool.keys.shape[1], []
        parts = queries_PHD.split([span.length for span in spans.spans])
        for span, queries in zip(spans.spans, parts, strict=True):
            table = table_SB[span.slot : span.slot + 1, : -(-span.stop // size)]
            keys, values = (one[:, : span.stop].transpose(1, 2) for one in gathered(pool, table, queries.dtype))
            positions = torch.arange(span.stop, device=queries.device)
            mask = positions <= positions[span.start :].unsqueeze(1)
            asked = queries.transpose(0, 1).unsqueeze(0)
            answer = F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask, enable_gqa=True)
            made.append(answer[0].transpose(0, 1))
        return torch.cat(made)


def gathered(pool: LayerPool, table_SB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(S, B × size, G, D) keys and values of rows of a table, an fp8 pool's as numbers."""
    found = []
    for stored, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
        if scales is None:
            found.append(stored[table_SB].flatten(1, 2))
            continue
        # Not every device picks rows of fp8: they are picked as bytes.
        narrow = stored.view(torch.uint8)[table_SB].view(stored.dtype)
        found.append((narrow.float() * scales[table_SB].unsqueeze(-1)).to(dtype).flatten(1, 2))
    return found[0], found[1]


def _only(there_SL: Tensor, stored_SLGD: Tensor) -> Tensor:
    """Zeros in memory that is not the row's: a masked number counts nothing, what is not a number counts all."""
    return stored_SLGD.where(there_SL[..., None, None], 0)


class VarlenKernels:
    """Torch's variable-length attention over tables, in 16 bits."""

    name = "varlen"

    def __init__(self, attend: Callable[..., Any]) -> None:
        self._attend = attend

    @classmethod
    def installed(cls) -> list[VarlenKernels]:
        """One, if the installed torch has it."""
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return []
        wanted = {"block_table", "seqused_k", "enable_gqa"}
        return [cls(varlen_attn)] if wanted <= inspect.signature(varlen_attn).parameters.keys() else []

    def decode(self, queries_SHD: Tensor, pool: LayerPool, table_SB: Tensor, lengths_S: Tensor) -> Tensor:
        """See `Kernels`."""
        starts = torch.arange(len(queries_SHD) + 1, dtype=torch.int32, device=queries_SHD.device)
        return self._called(queries_SHD, pool, starts, 1, table_SB, lengths_S.clamp(min=1).to(torch.int32), (-1, -1))

    def prefill(self, queries_PHD: Tensor, pool: LayerPool, table_SB: Tensor, spans: PreparedSpans) -> Tensor:
        """See `Kernels`."""
        longest = max(span.length for span in spans.spans)
        return self._called(queries_PHD, pool, spans.starts, longest, table_SB[spans.slots], spans.stops, (-1, 0))

    def _called(
        self, queries: Tensor, pool: LayerPool, starts: Tensor, longest: int, table: Tensor, used: Tensor, window: Any
    ) -> Tensor:
        if pool.key_scales is not None:
            raise TypeError("torch's attention knows no scales")
        made: Tensor = self._attend(
            queries.contiguous(),
            pool.keys,
            pool.values,
            starts,
            None,
            longest,
            table.shape[1] * pool.keys.shape[1],
            window_size=window,
            enable_gqa=True,
            seqused_k=used,
            block_table=table,
        )
        return made


Work = Callable[[Kernels], Tensor]


def fastest(
    kernels: Iterable[Kernels], work: Work, seconds: Callable[[Callable[[], object]], float], tolerance: float
) -> Kernels:
    """The one that does `work` in the least time, among those that do it at all and as `GatherKernels` does.

    Args:
        seconds: how long a call takes.
        tolerance: largest difference that still is rounding.
    """
    wanted = work(GatherKernels()).float()
    taken: dict[Kernels, float] = {}
    for one in kernels:
        try:
            error = (work(one).float() - wanted).abs().max().item()
            took_s = seconds(functools.partial(work, one))
        except Exception as fault:  # noqa: BLE001  (a kernel that this device does not run is no choice)
            logger.info("attention by %s does not run here: %s", one.name, fault)
            continue
        if error <= tolerance:
            taken[one] = took_s
        else:
            logger.warning("attention by %s is wrong by %g here, and not used", one.name, error)
    logger.info("attention, µs a call: %s", {one.name: round(1e6 * took, 1) for one, took in taken.items()})
    return min(taken, key=lambda one: taken[one], default=GatherKernels())


def cuda_seconds(call: Callable[[], object], calls: int = 10, rounds: int = 10) -> float:
    """Median seconds that the device needs for a call, which must be such that a graph can record it.

    In a graph, since that is how decode steps run: launched one by one, short kernels all take the host's time.
    """
    replay, taken = CudaCapture(torch.device("cuda"))(lambda: [call() for _ in range(calls)]), []
    for _ in range(rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1000 / calls)
    return statistics.median(taken[1:])
