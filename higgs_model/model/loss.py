"""The training loss: text cross-entropy plus the weighted mean over codebooks of audio cross-entropy.

Labels stand at the position of what they name, so a position is scored against the label of the one after it. An
audio frame is scored only against the next frame of its own clip.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from higgs_model import tokens


def text_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled tokens, a scalar; 0 when there are none."""
    return _mean_cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())


def codebook_losses(audio_logits_TKV: Tensor, labels_KT: Tensor, starts: Tensor) -> Tensor:
    """Mean cross-entropy of each codebook (K,); 0 for a codebook without labels.

    Args:
        audio_logits_TKV: (T, K, codebook_size + 2), at the frames of all clips one after the other.
        labels_KT: (K, T), the frames' own labels.
        starts: (clips,) where each clip starts.
    """
    # The first frame of a clip has no frame before it that could be scored.
    is_first = torch.zeros(labels_KT.shape[1] + 1, dtype=torch.bool, device=labels_KT.device)
    is_first[starts] = True
    labels = labels_KT.masked_fill(is_first[:-1], tokens.IGNORE_INDEX)[:, 1:]
    logits = audio_logits_TKV[:-1]
    return torch.stack([_mean_cross_entropy(logits[:, k], labels[k]) for k in range(labels.shape[0])])


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    # A sum over no label is 0 with a gradient of 0, where the built-in mean is NaN.
    total = functional.cross_entropy(logits.float(), labels, ignore_index=tokens.IGNORE_INDEX, reduction="sum")
    return total / (labels != tokens.IGNORE_INDEX).sum().clamp(min=1)
