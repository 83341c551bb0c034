"""`HiggsAudioModel`: the network with checkpoint loading and saving, and generation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from higgs_model.model import generation, layouts
from higgs_model.model.network import HiggsAudioNetwork


class HiggsAudioModel(HiggsAudioNetwork):
    """The Higgs Audio v2 model, with the interface of a transformers model.

    `from_pretrained` and `save_pretrained` support both checkpoint layouts (see `layouts`). `generate` is the reference
    implementation for every variant of the network; `higgs_model.engine` is the fast one.
    """

    generate = generation.generate

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        attn_implementation: str | None = None,
    ) -> HiggsAudioModel:
        """Load a checkpoint in the original or the transformers layout, in evaluation mode.

        Args:
            path_or_hub_id: a folder, or a repository of the Hugging Face Hub.
            dtype: dtype of the weights; None or "auto": the checkpoint's.
            device: where each weight goes, straight from its file; None: the CPU. There, weights that keep their dtype
                stay memory-mapped: replace such a file, never overwrite it in place.
            revision: branch, tag or commit on the Hub; the model's `revision` is the resolved commit.
            local_files_only: never contact the Hub, as HF_HUB_OFFLINE=1 does for the whole process.
            attn_implementation: "eager", "sdpa" or "flash_attention_2"; None: the default of transformers.

        Raises:
            BadCheckpoint: the checkpoint is missing, unreadable, or does not match its configuration.
            BadConfig: its configuration is inconsistent, or `dtype` or `device` is invalid.
        """
        return layouts.load_model(
            cls,
            path_or_hub_id,
            dtype=dtype,
            device=device,
            revision=revision,
            local_files_only=local_files_only,
            attn_implementation=attn_implementation,
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        layout: layouts.Layout = "original",
        max_shard_size: int | str = "5GB",
        state: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Save config.json and safetensors files, with partially frozen rows concatenated.

        Args:
            save_directory: created if missing.
            layout: "original" for the reference implementation, "transformers" for the port in transformers.
            max_shard_size: weights are split into several files above this size.
            state: tensors to save in place of the model's own, which may be sharded over several processes.
            dtype: of the saved weights; None: that of the model.

        Raises:
            BadConfig: `layout` is unknown, or the transformers layout cannot express this network.
        """
        layouts.save_model(self, save_directory, layout=layout, max_shard_size=max_shard_size, state=state, dtype=dtype)
