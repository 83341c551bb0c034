"""The training loss: text cross-entropy plus the weighted mean over codebooks of audio cross-entropy.

Labels stand at the position of what they name, so a position is scored against the label of the one after it. An
audio frame is scored only against the next frame of its own clip.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from higgs_model import tokens
from higgs_model.model.inputs import ModelInputs
from higgs_model.model.output import HiggsAudioOutput


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


def add_losses(output: HiggsAudioOutput, inputs: ModelInputs, attended_BS: Tensor, codebook_weights_K: Tensor) -> None:
    """Put into an output the losses that there are labels for, and their sum.

    Args:
        attended_BS: bool, real positions.
        codebook_weights_K: of the codebooks' losses in the audio loss.
    """
    if output.expanded_labels is not None and output.logits is not None:
        output.llm_loss = text_loss(output.logits, output.expanded_labels, attended_BS)
    if inputs.label_audio_ids is not None and output.audio_logits is not None:
        output.codebook_losses = codebook_losses(
            output.audio_logits, inputs.label_audio_ids, inputs.audio_out_ids_start
        )
        output.audio_loss = (output.codebook_losses * codebook_weights_K).sum()
    parts = [part for part in (output.llm_loss, output.audio_loss) if part is not None]
    if parts:
        # A head without labels is still in the graph: data-parallel training waits for all gradients.
        heads = [logits[:0].sum() for logits in (output.logits, output.audio_logits) if logits is not None]
        output.loss = torch.stack([*parts, *heads]).sum()
