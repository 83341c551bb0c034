"""How large an engine is and how it works, with what a machine suggests where nothing is said."""

from __future__ import annotations

import dataclasses
import os

import torch

from higgs_model.engine.watch import WatchLimits
from higgs_model.errors import BadConfig
from higgs_model.model.model import HiggsAudioModel
from higgs_model.sampling import DrawPlan

_CPU_MEMORY_SHARE = 0.25
_CUDA_MEMORY_SHARE = 0.85
_CUDA_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


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
    draw_plan: DrawPlan | None = None
    row_buckets: tuple[int, ...] = ()

    def completed(self, model: HiggsAudioModel) -> EngineSettings:
        """With all gaps filled in for a loaded model, from the memory that is free now.

        Raises:
            BadConfig: a number is too small, or not even one sequence fits into memory.
        """
        for name in ("max_slots", "max_positions", "block_size", "max_ras_win_len"):
            if getattr(self, name) < 1:
                raise BadConfig(f"engine settings: {name}={getattr(self, name)} is not positive")
        text, on_cuda = model.config.text_config, model.embed_tokens_device.type == "cuda"
        max_positions = min(self.max_positions, text.max_position_embeddings)
        position_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
        useful = self.max_slots * -(-max_positions // self.block_size) + 1
        num_blocks = self.num_blocks or min(useful, _free_bytes(model) // (position_bytes * self.block_size))
        if num_blocks < 2:
            raise BadConfig(
                f"engine settings: not one KV block of {position_bytes * self.block_size} bytes fits into memory"
            )
        vocabulary = model.config.num_codebook_rows
        return dataclasses.replace(
            self,
            max_positions=max_positions,
            num_blocks=int(num_blocks),
            prefill_positions=self.prefill_positions or (4096 if on_cuda else 8 * self.block_size),
            idle_prefill_positions=self.idle_prefill_positions or (16384 if on_cuda else 16 * self.block_size),
            look_ahead=(1 if on_cuda else 0) if self.look_ahead is None else self.look_ahead,
            # One plan for all requests means one graph a number of rows.
            draw_plan=self.draw_plan or (DrawPlan(vocabulary, True) if on_cuda else None),
            row_buckets=self.row_buckets or _buckets(self.max_slots, on_cuda),
        )


def _buckets(max_slots: int, on_cuda: bool) -> tuple[int, ...]:
    """Numbers of rows that a step runs: on CUDA each is a graph of its own."""
    if on_cuda:
        return (*(size for size in _CUDA_BUCKETS if size < max_slots), max_slots)
    return tuple(range(1, max_slots + 1))


def _free_bytes(model: HiggsAudioModel) -> int:
    device = model.embed_tokens_device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _CUDA_MEMORY_SHARE)
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(pages * _CPU_MEMORY_SHARE)
