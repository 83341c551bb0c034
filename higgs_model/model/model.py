"""`HiggsAudioModel`: the network together with its checkpoints and generation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from higgs_model.model import generation, layouts
from higgs_model.model.network import HiggsAudioNetwork


class HiggsAudioModel(HiggsAudioNetwork):
    """The Higgs Audio v2 model, with the interface of a transformers model.

    `from_pretrained` and `save_pretrained` read and write both checkpoint layouts (see `layouts`). `generate` is the
    reference path that every variant of the network can take; `higgs_model.engine` is the fast one.
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
        """Load a checkpoint of the original or of the transformers layout, ready for inference.

        Args:
            path_or_hub_id: a folder, or a repository of the Hugging Face hub.
            dtype: of the weights; None is what the checkpoint says.
            device: where the weights go, each straight from its file; None is the CPU, where weights whose dtype does
                not change stay mapped to the file: replace such a file, never overwrite it in place.
            revision: branch, tag or commit on the hub; what was found is in `revision` of the model.
            local_files_only: never ask the hub, as HF_HUB_OFFLINE=1 does for all.
            attn_implementation: "eager", "sdpa" or "flash_attention_2"; None is the best that is installed.

        Raises:
            BadCheckpoint: it is not there, cannot be read, or holds other tensors than its configuration asks for.
            BadConfig: its configuration contradicts itself.
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
        """Write config.json and safetensors, split rows joined.

        Args:
            layout: "original" is read by the reference implementation, "transformers" by transformers' port.
            state: the tensors to write in place of the model's own, which may be spread over several processes.
            dtype: of what is written; None: as the weights are.

        Raises:
            BadConfig: the transformers layout cannot express this network.
        """
        layouts.save_model(self, save_directory, layout=layout, max_shard_size=max_shard_size, state=state, dtype=dtype)
