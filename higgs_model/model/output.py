"""The output of a forward pass."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from transformers.utils import ModelOutput

from higgs_model.model.cache import KVCache


@dataclasses.dataclass
class HiggsAudioOutput(ModelOutput):
    """Output of `HiggsAudioModel.forward`. S is the expanded length, T the number of audio-out frames of the batch.

    Attributes:
        loss: llm_loss + audio_loss, or the one that has labels.
        llm_loss, audio_loss: scalars; audio_loss is the weighted sum of codebook_losses.
        codebook_losses: (K,).
        logits: (B, S, V), or None without a text head.
        audio_logits: (T, K, codebook_size + 2) float32, at audio-out positions row by row.
        expanded_input_ids: (B, S), placeholders repeated.
        expanded_labels: (B, S), or None.
        audio_in_mask, audio_in_discrete_codes_mask, audio_out_mask: (B, S) bool.
        attention_mask: (B, S) bool.
        past_key_values: the cache; None without `use_cache`.
    """

    loss: Tensor | None = None
    llm_loss: Tensor | None = None
    audio_loss: Tensor | None = None
    codebook_losses: Tensor | None = None
    logits: Tensor | None = None
    audio_logits: Tensor | None = None
    expanded_input_ids: Tensor | None = None
    expanded_labels: Tensor | None = None
    audio_in_mask: Tensor | None = None
    audio_in_discrete_codes_mask: Tensor | None = None
    audio_out_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    past_key_values: KVCache | None = None
