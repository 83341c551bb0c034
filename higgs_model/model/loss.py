"""The training loss: text cross-entropy plus the weighted mean over codebooks of audio cross-entropy.

Labels stand at the position of what they name, so a position is scored against the label of the one after it. An
audio frame is scored only against the next frame of its own clip.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from higgs_model import tokens


def text_loss(logits_BSV: Tensor, labels_BS: Tensor, attended_BS: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled tokens that have a real one (`attended_BS` bool) before them; 0 for none."""
    labels = labels_BS[:, 1:].masked_fill(~attended_BS[:, :-1], tokens.IGNORE_INDEX).flatten()
    total = summed_cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels)
    return total / (labels != tokens.IGNORE_INDEX).sum().clamp(min=1)


def codebook_losses(audio_logits_TKV: Tensor, labels_KT: Tensor, starts: Tensor) -> Tensor:
    """Mean cross-entropy of each codebook (K,); 0 for a codebook without labels.

    Args:
        audio_logits_TKV: (T, K, codebook_size + 2), at the frames of all clips one after the other.
        labels_KT: (K, T), the frames' own labels.
        starts: (clips,) where each clip starts.
    """
    labels = next_labels(labels_KT, starts)[:, :-1]
    totals = summed_codebook_cross_entropy(audio_logits_TKV[:-1], labels)
    return totals / (labels != tokens.IGNORE_INDEX).sum(dim=1).clamp(min=1)


def next_labels(labels_KT: Tensor, starts: Tensor) -> Tensor:
    """(K, T): what each frame is scored against, the labels of the frame after it in its own clip."""
    # The first frame of a clip has no frame before it that could be scored.
    is_first = torch.zeros(labels_KT.shape[1] + 1, dtype=torch.bool, device=labels_KT.device)
    is_first[starts] = True
    own = labels_KT.masked_fill(is_first[:-1], tokens.IGNORE_INDEX)
    return functional.pad(own[:, 1:], (0, 1), value=tokens.IGNORE_INDEX)[:, : labels_KT.shape[1]]


def summed_cross_entropy(logits_NV: Tensor, labels_N: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum over the labels that there are; over none it is 0 with a gradient of 0, where the mean would be NaN."""
    return functional.cross_entropy(
        logits_NV.float(),
        labels_N,
        ignore_index=tokens.IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def summed_codebook_cross_entropy(logits_TKV: Tensor, labels_KT: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(K,): the same for each codebook."""
    each = functional.cross_entropy(
        logits_TKV.float().flatten(0, 1),
        labels_KT.T.flatten(),
        ignore_index=tokens.IGNORE_INDEX,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return each.view(-1, labels_KT.shape[0]).sum(dim=0)
