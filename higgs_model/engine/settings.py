"""Settings of an engine, with defaults that depend on the device."""

from __future__ import annotations

import dataclasses
import os

import torch

from higgs_model.engine import fp8
from higgs_model.engine.early_stopping import EarlyStoppingLimits
from higgs_model.errors import BadConfig
from higgs_model.model.model import HiggsAudioModel

_CPU_MEMORY_SHARE = 0.25
_CUDA_MEMORY_SHARE = 0.9
_CUDA_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_CUDA_CANDIDATES = (64, 1 << 30)
"""One plan for the usual top-k of 50, and one for all codes."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Settings of an engine; `resolve` replaces None, 0 and () by defaults for the device.

    Attributes:
        max_slots: requests that run concurrently.
        max_positions: maximum length of a prompt with its answer.
        block_size: positions per KV block; prompts share only full blocks.
        num_blocks: size of the block pool; 0: as many as memory allows, at most what all slots together can use.
        prefill_positions: prefill budget between two decode steps; 0: chosen for the device.
        idle_prefill_positions: prefill budget while nothing decodes; 0: chosen for the device.
        max_ras_win_len: maximum window of repetition-aware sampling.
        look_ahead: decode steps that may be in flight before the host reads the oldest result; None: chosen for the
            device.
        early_stopping: when a clip is ended early.
        fp8_weights: multiply with fp8 weights during audio decoding. Requires fp8 units; codes then differ.
        fp8_cache: store the KV cache in fp8: twice the capacity, half the memory traffic. Requires fp8 units; codes
            differ.
        row_buckets: batch sizes to which decode steps are padded, with a captured step for each; empty: chosen for the
            device.
        candidates: top-k sizes for which decode steps are captured; empty: as many as the requests need.
    """

    max_slots: int = 16
    max_positions: int = 8192
    block_size: int = 64
    num_blocks: int = 0
    prefill_positions: int = 0
    idle_prefill_positions: int = 0
    max_ras_win_len: int = 32
    look_ahead: int | None = None
    early_stopping: EarlyStoppingLimits = EarlyStoppingLimits()
    fp8_weights: bool = False
    fp8_cache: bool = False
    row_buckets: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()

    def resolve(self, model: HiggsAudioModel) -> EngineSettings:
        """Return a copy with all defaults resolved for a loaded model and the memory that is free now.

        Raises:
            BadConfig: a number is too small, the device lacks a feature, or there is too little memory.
        """
        for name in ("max_slots", "max_positions", "block_size", "max_ras_win_len"):
            if getattr(self, name) < 1:
                raise BadConfig(f"engine settings: {name}={getattr(self, name)} is not positive")
        device = model.embed_tokens_device
        for name in ("fp8_weights", "fp8_cache"):
            if getattr(self, name):
                fp8.check_supported(device, name)
        on_cuda = device.type == "cuda"
        max_positions = min(self.max_positions, model.config.text_config.max_position_embeddings)
        idle_prefill_positions = self.idle_prefill_positions or (16384 if on_cuda else 16 * self.block_size)
        return dataclasses.replace(
            self,
            max_positions=max_positions,
            num_blocks=self.num_blocks or self._affordable_blocks(model, max_positions, idle_prefill_positions),
            prefill_positions=self.prefill_positions or (4096 if on_cuda else 8 * self.block_size),
            idle_prefill_positions=idle_prefill_positions,
            look_ahead=(1 if on_cuda else 0) if self.look_ahead is None else self.look_ahead,
            row_buckets=self.row_buckets or _buckets(self.max_slots, on_cuda),
            candidates=self.candidates or (_CUDA_CANDIDATES if on_cuda else ()),
        )

    def _affordable_blocks(self, model: HiggsAudioModel, max_positions: int, idle_prefill_positions: int) -> int:
        """Return how many blocks all slots can use, or how many fit in memory next to the largest prefill pass."""
        text = model.config.text_config
        width_bytes = text.head_dim + 4 if self.fp8_cache else text.head_dim * model.dtype.itemsize
        block_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * width_bytes * self.block_size
        useful = self.max_slots * -(-max_positions // self.block_size) + 1
        if model.embed_tokens_device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(model.embed_tokens_device)
            affordable = free * _CUDA_MEMORY_SHARE - idle_prefill_positions * _activation_bytes(model)
            if self.fp8_weights:
                affordable -= sum(parameter.numel() for parameter in model.layers.parameters())
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            affordable = free * _CPU_MEMORY_SHARE
        num_blocks = min(useful, int(affordable // block_bytes))
        if num_blocks < 2:
            raise BadConfig(
                f"engine settings: a KV block takes {block_bytes} bytes, and {free} bytes are free; "
                "lower idle_prefill_positions, or use a device with more memory"
            )
        return num_blocks


def _activation_bytes(model: HiggsAudioModel) -> int:
    """Return the peak memory of activations per position of a prefill pass."""
    text = model.config.text_config
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    values = 8 * text.hidden_size + 5 * text.intermediate_size + 4 * heads * text.head_dim
    return int(values * model.dtype.itemsize)


def _buckets(max_slots: int, on_cuda: bool) -> tuple[int, ...]:
    """Return the numbers of rows to which decode steps are rounded up; on CUDA, each is captured as a graph."""
    if on_cuda:
        return (*(size for size in _CUDA_BUCKETS if size < max_slots), max_slots)
    return tuple(range(1, max_slots + 1))
