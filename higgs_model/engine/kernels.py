"""Three implementations of attention over block tables, as functions of one layer's pool.

`GatherKernels` is plain torch and runs anywhere; `VarlenKernels` is torch's own flash attention, if the installed torch
supports block tables; `kernels_triton` has kernels written for this engine. `select_fastest` times them on the device
with the actual shapes, and rejects kernels that fail or whose results differ from those of `GatherKernels`.
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
from higgs_model.engine.prefill_span import PrefillSpan
from higgs_model.engine.transfer import to_device

logger = logging.getLogger(__name__)

_QUERY_TILE = 64


@dataclasses.dataclass(frozen=True)
class LayerPool:
    """One layer's keys and values (N, block_size, G, D), and the scales (N, block_size, G) of an fp8 pool."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class PrefillMetadata:
    """The metadata of prefill spans on the device; the queries of all spans are concatenated.

    Attributes:
        spans: on the host.
        starts: (spans + 1,) int32, index of each span's first query.
        slots: (spans,) int64.
        stops: (spans,) int32, positions of the slot including the span.
        tiles_T4: (T, 4) int32, tiles of up to `tile` queries: slot, first query, first position, count.
    """

    spans: tuple[PrefillSpan, ...]
    starts: Tensor
    slots: Tensor
    stops: Tensor
    tiles_T4: Tensor
    tile: int = _QUERY_TILE

    @classmethod
    def from_spans(cls, spans: Sequence[PrefillSpan], device: torch.device) -> PrefillMetadata:
        """Compute the metadata on the host and copy it to the device at once."""
        starts = np.cumsum([0, *(span.length for span in spans)])
        tiles = [
            (span.slot, first + at - span.start, at, min(_QUERY_TILE, span.stop - at))
            for span, first in zip(spans, starts.tolist(), strict=False)
            for at in range(span.start, span.stop, _QUERY_TILE)
        ]
        # Longest first, because the device is done only with its last tile.
        tiles.sort(key=lambda tile: -tile[2])
        slots_stops = [*(span.slot for span in spans), *(span.stop for span in spans)]
        packed = to_device(np.array([*starts.tolist(), *slots_stops, *itertools.chain(*tiles)], np.int32), device)
        starts_S, slots, stops, flat = packed.split([len(spans) + 1, len(spans), len(spans), 4 * len(tiles)])
        return cls(tuple(spans), starts_S, slots.long(), stops, flat.view(-1, 4))


class Kernels(Protocol):
    """An implementation of attention over block tables."""

    @property
    def name(self) -> str:
        """For logs and reports."""

    def decode(self, queries_SHD: Tensor, pool: LayerPool, table_SB: Tensor, lengths_S: Tensor) -> Tensor:
        """(S, H, D) → (S, H, D): row s attends to its first `lengths_S[s]` positions; with none, it is arbitrary."""

    def prefill(self, queries_PHD: Tensor, pool: LayerPool, table_SB: Tensor, metadata: PrefillMetadata) -> Tensor:
        """(P, H, D) → (P, H, D): each query attends to the positions of its slot up to its own."""


class GatherKernels:
    """Plain torch. Copies the keys and values of the full block table to contiguous tensors, so it needs memory."""

    name = "gather"

    def decode(self, queries_SHD: Tensor, pool: LayerPool, table_SB: Tensor, lengths_S: Tensor) -> Tensor:
        """See `Kernels`."""
        keys, values = gather(pool, table_SB, queries_SHD.dtype)
        valid_SL = torch.arange(keys.shape[1], device=keys.device) < lengths_S.unsqueeze(1)
        keys, values = (_zero_invalid(valid_SL, stored).transpose(1, 2) for stored in (keys, values))
        # A row without positions attends to zeros: a softmax over nothing is NaN.
        mask = valid_SL | (lengths_S == 0).unsqueeze(1)
        queries = queries_SHD.unflatten(1, (keys.shape[1], -1))
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None]).flatten(1, 2)

    def prefill(self, queries_PHD: Tensor, pool: LayerPool, table_SB: Tensor, metadata: PrefillMetadata) -> Tensor:
        """See `Kernels`."""
        size, outputs = pool.keys.shape[1], []
        parts = queries_PHD.split([span.length for span in metadata.spans])
        for span, queries in zip(metadata.spans, parts, strict=True):
            table = table_SB[span.slot : span.slot + 1, : -(-span.stop // size)]
            keys, values = (stored[:, : span.stop].transpose(1, 2) for stored in gather(pool, table, queries.dtype))
            positions = torch.arange(span.stop, device=queries.device)
            mask = positions <= positions[span.start :].unsqueeze(1)
            queries = queries.transpose(0, 1).unsqueeze(0)
            output = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)


def gather(pool: LayerPool, table_SB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the keys and values (S, B × block_size, G, D) of the rows of a table, dequantized from an fp8 pool."""
    gathered = []
    for stored, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
        if scales is None:
            gathered.append(stored[table_SB].flatten(1, 2))
            continue
        # As bytes, because not every device can index rows of fp8.
        quantized = stored.view(torch.uint8)[table_SB].view(stored.dtype)
        gathered.append((quantized.float() * scales[table_SB].unsqueeze(-1)).to(dtype).flatten(1, 2))
    return gathered[0], gathered[1]


def _zero_invalid(valid_SL: Tensor, stored_SLGD: Tensor) -> Tensor:
    """Zero memory that is not the row's: a NaN would spread even with a weight of zero."""
    return stored_SLGD.where(valid_SL[..., None, None], 0)


class VarlenKernels:
    """Torch's variable-length flash attention over block tables, in 16 bits."""

    name = "varlen"

    def __init__(self, attend: Callable[..., Any]) -> None:
        self._attend = attend

    @classmethod
    def installed(cls) -> list[VarlenKernels]:
        """Return a list with the kernels if the installed torch supports block tables, else an empty one."""
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return []
        required = {"block_table", "seqused_k", "enable_gqa"}
        return [cls(varlen_attn)] if required <= inspect.signature(varlen_attn).parameters.keys() else []

    def decode(self, queries_SHD: Tensor, pool: LayerPool, table_SB: Tensor, lengths_S: Tensor) -> Tensor:
        """See `Kernels`."""
        starts = torch.arange(len(queries_SHD) + 1, dtype=torch.int32, device=queries_SHD.device)
        return self._run(queries_SHD, pool, starts, 1, table_SB, lengths_S.clamp(min=1).to(torch.int32), (-1, -1))

    def prefill(self, queries_PHD: Tensor, pool: LayerPool, table_SB: Tensor, metadata: PrefillMetadata) -> Tensor:
        """See `Kernels`."""
        longest = max(span.length for span in metadata.spans)
        table = table_SB[metadata.slots]
        return self._run(queries_PHD, pool, metadata.starts, longest, table, metadata.stops, (-1, 0))

    def _run(
        self, queries: Tensor, pool: LayerPool, starts: Tensor, longest: int, table: Tensor, used: Tensor, window: Any
    ) -> Tensor:
        if pool.key_scales is not None:
            raise TypeError("torch's varlen attention does not support an fp8 cache")
        output: Tensor = self._attend(
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
        return output


Work = Callable[[Kernels], Tensor]


def select_fastest(
    kernels: Iterable[Kernels], work: Work, seconds: Callable[[Callable[[], object]], float], tolerance: float
) -> Kernels:
    """Return the kernels that do `work` fastest, among those whose results agree with `GatherKernels`.

    Args:
        seconds: times a call.
        tolerance: largest absolute difference that is attributed to rounding.
    """
    expected = work(GatherKernels()).float()
    timings: dict[Kernels, float] = {}
    for candidate in kernels:
        try:
            error = (work(candidate).float() - expected).abs().max().item()
            elapsed_s = seconds(functools.partial(work, candidate))
        except Exception as failure:  # noqa: BLE001  (a kernel may fail in any way on a device that it does not support)
            logger.info("attention kernel %s does not run on this device: %s", candidate.name, failure)
            continue
        if error <= tolerance:
            timings[candidate] = elapsed_s
        else:
            logger.warning("attention kernel %s is off by %g on this device and is not used", candidate.name, error)
    logger.info("attention kernels, µs per call: %s", {kernel.name: round(1e6 * s, 1) for kernel, s in timings.items()})
    return min(timings, key=lambda kernel: timings[kernel], default=GatherKernels())


def cuda_seconds(call: Callable[[], object], calls: int = 10, rounds: int = 10) -> float:
    """Return the median seconds that the device takes for a call, which must be capturable.

    It is timed in a CUDA graph, as in decode steps: launched one by one, short kernels would only show the host's time.
    """
    replay, elapsed_s = CudaCapture(torch.device("cuda"))(lambda: [call() for _ in range(calls)]), []
    for _ in range(rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        elapsed_s.append(begin.elapsed_time(end) / 1000 / calls)
    return statistics.median(elapsed_s[1:])
