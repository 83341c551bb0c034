"""The training loss: text cross-entropy plus the weighted mean of the codebooks' cross-entropies.

Labels are aligned with the inputs and shifted here: each position is scored against the label of the next one, and each
audio frame against the next frame of the same clip.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from higgs_model import tokens
from higgs_model.model.inputs import ModelInputs
from higgs_model.model.output import HiggsAudioOutput


def text_loss(logits_BSV: Tensor, labels_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """Return the mean cross-entropy over labelled tokens that do not follow padding; 0 if there are none."""
    labels = labels_BS[:, 1:].masked_fill(~attention_mask_BS[:, :-1], tokens.IGNORE_INDEX).flatten()
    total = summed_cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels)
    return total / (labels != tokens.IGNORE_INDEX).sum().clamp(min=1)


def codebook_losses(audio_logits_TKV: Tensor, labels_KT: Tensor, starts: Tensor) -> Tensor:
    """Return the mean cross-entropy of each codebook (K,); 0 for a codebook without labels.

    Args:
        audio_logits_TKV: (T, K, codebook_size + 2), at the concatenated frames of all clips.
        labels_KT: (K, T), the labels of these frames, not shifted.
        starts: (clips,) first frame of each clip.
    """
    labels = next_labels(labels_KT, starts)[:, :-1]
    totals = summed_codebook_cross_entropy(audio_logits_TKV[:-1], labels)
    return totals / (labels != tokens.IGNORE_INDEX).sum(dim=1).clamp(min=1)


def next_labels(labels_KT: Tensor, starts: Tensor) -> Tensor:
    """Return the targets (K, T) of each frame: the labels of the next frame of the same clip."""
    # No frame is scored against the first frame of a clip.
    is_first = torch.zeros(labels_KT.shape[1] + 1, dtype=torch.bool, device=labels_KT.device)
    is_first[starts] = True
    labels = labels_KT.masked_fill(is_first[:-1], tokens.IGNORE_INDEX)
    return functional.pad(labels[:, 1:], (0, 1), value=tokens.IGNORE_INDEX)[:, : labels_KT.shape[1]]


def summed_cross_entropy(logits_NV: Tensor, labels_N: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy summed over all labels. Without labels, it is 0 with zero gradients; a mean is NaN."""
    return functional.cross_entropy(
        logits_NV.float(),
        labels_N,
        ignore_index=tokens.IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def summed_codebook_cross_entropy(logits_TKV: Tensor, labels_KT: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the summed cross-entropy of each codebook (K,)."""
    losses = functional.cross_entropy(
        logits_TKV.float().flatten(0, 1),
        labels_KT.T.flatten(),
        ignore_index=tokens.IGNORE_INDEX,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view(-1, labels_KT.shape[0]).sum(dim=0)


def add_losses(
    output: HiggsAudioOutput, inputs: ModelInputs, attention_mask_BS: Tensor, codebook_weights_K: Tensor
) -> None:
    """Set the losses of an output for which labels were given, and their sum.

    Args:
        output: the output to complete, in place.
        inputs: the inputs with the audio labels.
        attention_mask_BS: bool, positions that are not padding.
        codebook_weights_K: weight of each codebook in the audio loss.
    """
    if output.expanded_labels is not None and output.logits is not None:
        output.llm_loss = text_loss(output.logits, output.expanded_labels, attention_mask_BS)
    if inputs.label_audio_ids is not None and output.audio_logits is not None:
        output.codebook_losses = codebook_losses(
            output.audio_logits, inputs.label_audio_ids, inputs.audio_out_ids_start
        )
        output.audio_loss = (output.codebook_losses * codebook_weights_K).sum()
    losses = [loss for loss in (output.llm_loss, output.audio_loss) if loss is not None]
    if losses:
        # Keep a head without labels in the graph: data-parallel training waits for the gradient of every parameter.
        heads = [logits[:0].sum() for logits in (output.logits, output.audio_logits) if logits is not None]
        output.loss = torch.stack([*losses, *heads]).sum()
