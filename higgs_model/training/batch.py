"""A training batch: the model's inputs, and the index tensors that describe its layout.

The collator creates it on the host, and the trainer moves it to the device; a step never reads its values back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from higgs_model import tokens
from higgs_model.model.merge import Expansion


@dataclasses.dataclass(frozen=True)
class BatchIndices:
    """Index tensors of a batch, computed on the host so that a step never waits for the device.

    S counts expanded positions; all positions index (B, S) flattened.

    Attributes:
        expansion: the layout of the expanded sequences.
        valid_features: indices of the valid features of the audio tower, in (windows, positions) flattened.
        text_positions, audio_positions: positions on the text and on the audio path.
        target_positions, target_ids: (N,) positions that predict a token, and these target tokens.
        target_frames, target_codes_KF: (F,) positions that predict codes, and these codes (K, F); −100: no target.
        num_valid: number of positions without padding.
    """

    expansion: Expansion
    valid_features: Tensor
    text_positions: Tensor
    audio_positions: Tensor
    target_positions: Tensor
    target_ids: Tensor
    target_frames: Tensor
    target_codes_KF: Tensor
    num_valid: int

    @classmethod
    def from_expansion(
        cls, expansion: Expansion, num_features: Tensor, window_features: int, next_codes_KT: Tensor
    ) -> BatchIndices:
        """Compute the indices of a batch.

        Args:
            expansion: the layout of the expanded sequences.
            num_features: (windows,), valid features of each window of the audio tower.
            window_features: number of features of a full window.
            next_codes_KT: target codes of each output frame; −100: no target.
        """
        audio = expansion.audio_mask_BS.flatten()
        next_labels = tokens.IGNORE_INDEX * torch.ones_like(expansion.input_ids_BS)
        if expansion.labels_BS is not None:
            next_labels[:, :-1] = expansion.labels_BS[:, 1:]
        has_target = next_labels.flatten() != tokens.IGNORE_INDEX
        has_codes = (next_codes_KT != tokens.IGNORE_INDEX).any(dim=0)
        is_valid = torch.arange(window_features) < num_features.unsqueeze(1)
        return cls(
            expansion=expansion,
            valid_features=is_valid.flatten().nonzero().squeeze(1),
            text_positions=(~audio).nonzero().squeeze(1),
            audio_positions=audio.nonzero().squeeze(1),
            target_positions=has_target.nonzero().squeeze(1),
            target_ids=next_labels.flatten()[has_target],
            target_frames=expansion.audio_out_positions[has_codes],
            target_codes_KF=next_codes_KT[:, has_codes],
            num_valid=int(expansion.attention_mask_BS.sum()),
        )

    @property
    def num_positions(self) -> int:
        """Number of positions B × S, padding included."""
        return self.expansion.input_ids_BS.numel()


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arguments of `HiggsAudioModel.forward` by name, and what training needs in addition.

    Attributes:
        indices: index tensors of the expanded batch.
        num_labels: number of target tokens.
        num_code_labels: (K,) number of target codes of each codebook.
    """

    input_ids: Tensor
    attention_mask: Tensor
    audio_features: Tensor | None
    audio_feature_attention_mask: Tensor | None
    audio_in_ids: Tensor | None
    audio_in_ids_start: Tensor | None
    audio_out_ids: Tensor
    audio_out_ids_start: Tensor
    label_ids: Tensor
    label_audio_ids: Tensor
    indices: BatchIndices
    num_labels: int
    num_code_labels: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device, asynchronously if its memory is pinned."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy the batch to pinned memory."""
        return _map_tensors(self, lambda tensor: tensor.pin_memory())

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of `HiggsAudioModel.forward` and `generate`."""
        names = [field.name for field in dataclasses.fields(self) if not field.name.startswith(("num_", "indices"))]
        return {name: getattr(self, name) for name in names}


Record = TypeVar("Record", bound="Batch | BatchIndices | Expansion")


def _map_tensors(record: Record, function: Callable[[Tensor], Tensor]) -> Record:
    """Return a copy of a record with a function applied to all tensors, nested records included."""
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = function(value)
        elif isinstance(value, BatchIndices | Expansion):
            values[name] = _map_tensors(value, function)
    return type(record)(**values)
