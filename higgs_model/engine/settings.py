"""How large an engine is and how it works, with what a machine suggests where nothing is said."""

from __future__ import annotations

import dataclasses
import os

import torch

from higgs_model.engine import fp8
from higgs_model.engine.watch import WatchLimits
from higgs_model.errors import BadConfig
from higgs_model.model.model import HiggsAudioModel

_CPU_MEMORY_SHARE = 0.25
_CUDA_MEMORY_SHARE = 0.9
_CUDA_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_CUDA_CANDIDATES = (64, 1 << 30)
"""The usual top-k of 50, and all codes that there are."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """Everything that can be chosen; None and 0 are filled in by `completed`.

    Attributes:
        max_slots: requests that speak at the same time.
        max_positions: of a prompt and its answer together.
        block_size: positions of a KV block; prompts share whole blocks.
        num_blocks: of the pool; 0: as many as memory allows, at most what all slots together can use.
        prefill_positions: of prompts run between two frames while somebody speaks; 0: by device.
        idle_prefill_positions: the same while nobody does; 0: by device.
        max_ras_win_len: the longest repetition window that a request may ask for.
        look_ahead: decode steps that may be under way before the host reads the oldest one's result; None: by device.
        watch: when a clip has lost its way.
        fp8_weights: multiply what speech needs in 8 bits. Needs a chip with fp8 units; codes then differ.
        fp8_cache: keep keys and values in 8 bits: twice the room, half the reading. The same holds.
        row_buckets: numbers of rows that a decode step runs; empty: by device.
        candidates: likeliest codes that a decode step looks at, one kind of step for each; empty: what its rows need.
    """

    max_slots: int = 16
    max_positions: int = 8192
    block_size: int = 64
    num_blocks: int = 0
    prefill_positions: int = 0
    idle_prefill_positions: int = 0
    max_ras_win_len: int = 32
    look_ahead: int | None = None
    watch: WatchLimits = WatchLimits()
    fp8_weights: bool = False
    fp8_cache: bool = False
    row_buckets: tuple[int, ...] = ()
    candidates: tuple[int, ...] = ()

    def completed(self, model: HiggsAudioModel) -> EngineSettings:
        """With all gaps filled in for a loaded model, from the memory that is free now.

        Raises:
            BadConfig: a number is too small, the device lacks what is asked for, or memory is too small.
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

    def _affordable_blocks(self, model: HiggsAudioModel, max_positions: int, most_positions: int) -> int:
        """Blocks of the pool for all slots, or as many as fit beside the largest pass over prompts."""
        text = model.config.text_config
        width_bytes = text.head_dim + 4 if self.fp8_cache else text.head_dim * model.dtype.itemsize
        block_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * width_bytes * self.block_size
        useful = self.max_slots * -(-max_positions // self.block_size) + 1
        if model.embed_tokens_device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(model.embed_tokens_device)
            affordable = free * _CUDA_MEMORY_SHARE - most_positions * _activation_bytes(model)
            if self.fp8_weights:
                affordable -= sum(parameter.numel() for parameter in model.layers.parameters())
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            affordable = free * _CPU_MEMORY_SHARE
        num_blocks = min(useful, int(affordable // block_bytes))
        if num_blocks < 2:
            raise BadConfig(
                f"engine settings: not one KV block of {block_bytes} bytes fits into the {free} bytes that are free; "
                "lower idle_prefill_positions, or take a device with more memory"
            )
        return num_blocks


def _activation_bytes(model: HiggsAudioModel) -> int:
    """What a position of a prompt takes, at most, while it goes through a layer."""
    text = model.config.text_config
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    numbers = 8 * text.hidden_size + 5 * text.intermediate_size + 4 * heads * text.head_dim
    return int(numbers * model.dtype.itemsize)


def _buckets(max_slots: int, on_cuda: bool) -> tuple[int, ...]:
    """Numbers of rows that a step runs: on CUDA each is a graph of its own."""
    if on_cuda:
        return (*(size for size in _CUDA_BUCKETS if size < max_slots), max_slots)
    return tuple(range(1, max_slots + 1))
