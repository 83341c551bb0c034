"""A batch as a training step takes it: what the network is given, and where everything in it is.

Made on the host by the collator, and moved to the device as a whole; a step looks at no value of it there.
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
class Places:
    """Where everything in a batch is, decided on the host, so that no step waits for the device. S is expanded.

    Attributes:
        features_from: which of the audio tower's features, (pieces, positions) flattened, are real.
        text_at, audio_at: positions that take the text and the audio path; like all that follow, in (B, S) flattened.
        learnt_at, learnt_ids: (N,) each position after which a token is learnt, and that token.
        frames_at, frame_codes_KF: (F,) each frame after which codes are learnt, and those (K, F); −100 for none.
        num_real: positions that are no padding.
    """

    expansion: Expansion
    features_from: Tensor
    text_at: Tensor
    audio_at: Tensor
    learnt_at: Tensor
    learnt_ids: Tensor
    frames_at: Tensor
    frame_codes_KF: Tensor
    num_real: int

    @classmethod
    def of(cls, expansion: Expansion, num_features: Tensor, positions_a_piece: int, next_codes_KT: Tensor) -> Places:
        """From the expansion, the features of each piece (pieces,), and what is learnt after each frame."""
        audio = expansion.audio_mask_BS.flatten()
        following = tokens.IGNORE_INDEX * torch.ones_like(expansion.input_ids_BS)
        if expansion.labels_BS is not None:
            following[:, :-1] = expansion.labels_BS[:, 1:]
        learnt = following.flatten() != tokens.IGNORE_INDEX
        scored = (next_codes_KT != tokens.IGNORE_INDEX).any(dim=0)
        real = torch.arange(positions_a_piece) < num_features.unsqueeze(1)
        return cls(
            expansion=expansion,
            features_from=real.flatten().nonzero().squeeze(1),
            text_at=(~audio).nonzero().squeeze(1),
            audio_at=audio.nonzero().squeeze(1),
            learnt_at=learnt.nonzero().squeeze(1),
            learnt_ids=following.flatten()[learnt],
            frames_at=expansion.out_to[scored],
            frame_codes_KF=next_codes_KT[:, scored],
            num_real=int(expansion.attention_mask_BS.sum()),
        )

    @property
    def num_positions(self) -> int:
        """B × S, padding included."""
        return self.expansion.input_ids_BS.numel()


@dataclasses.dataclass(frozen=True)
class Batch:
    """What `HiggsAudioModel.forward` takes, under its names, and what a training needs besides.

    Attributes:
        places: the same, expanded.
        num_labels: how many tokens are learnt.
        num_code_labels: (K,) how many codes of each codebook.
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
    places: Places
    num_labels: int
    num_code_labels: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The same on a device, without waiting for it where memory is pinned."""
        return _changed(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in memory that a GPU can fetch by itself."""
        return _changed(self, lambda tensor: tensor.pin_memory())

    def inputs(self) -> dict[str, Any]:
        """Arguments of `HiggsAudioModel.forward` and `generate`."""
        names = [field.name for field in dataclasses.fields(self) if not field.name.startswith(("num_", "places"))]
        return {name: getattr(self, name) for name in names}


Record = TypeVar("Record", bound="Batch | Places | Expansion")


def _changed(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """The same record of other tensors, however deep they are in it."""
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    for name, value in values.items():
        if isinstance(value, Tensor):
            values[name] = change(value)
        elif isinstance(value, Places | Expansion):
            values[name] = _changed(value, change)
    return type(record)(**values)
