"""The loss of a batch, as a module that DDP and FSDP can wrap.

The losses equal those of `HiggsAudioModel.forward`, with two differences: logits are computed only at positions with a
target, and each loss is a sum divided by a number that the caller provides, so that the gradient of a step does not
depend on how its samples are divided into batches and among workers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from higgs_model.errors import BadConfig
from higgs_model.model.layers import Routing
from higgs_model.model.loss import summed_codebook_cross_entropy, summed_cross_entropy
from higgs_model.model.model import HiggsAudioModel
from higgs_model.training.batch import Batch
from higgs_model.training.settings import LossSettings


@dataclasses.dataclass(frozen=True)
class Losses:
    """Losses of a batch: `total` is minimized; `text` () and `codebooks` (K,) are sums over the labels, for the log."""

    total: Tensor
    text: Tensor
    codebooks: Tensor


class Objective(nn.Module):
    """A model and its training loss.

    Raises:
        BadConfig: the number of codebook weights differs from the number of codebooks.
    """

    def __init__(self, model: HiggsAudioModel, settings: LossSettings) -> None:
        super().__init__()
        num_codebooks = model.config.audio_num_codebooks
        weights = settings.codebooks or (1.0,) * num_codebooks
        if len(weights) != num_codebooks:
            raise BadConfig(f"loss.codebooks has {len(weights)} weights, but the model has {num_codebooks} codebooks")
        self.model = model
        self._settings = settings
        codebook_weights = torch.tensor(weights, dtype=torch.float32, device=model.embed_tokens_device)
        self.codebook_weights: Tensor
        self.register_buffer("codebook_weights", codebook_weights / codebook_weights.sum(), persistent=False)

    def forward(self, batch: Batch, num_labels: Tensor) -> Losses:
        """Return the losses of a batch on the model's device.

        Args:
            batch: the batch.
            num_labels: (1 + K,) float32, number of target tokens, and of target codes of each codebook, in the entire
                step; the sums are divided by them.
        """
        model, settings, indices = self.model, self._settings, batch.indices
        hidden = self._hidden_states(batch).flatten(0, 1)
        text = hidden.new_zeros((), dtype=torch.float32)
        if model.config.use_text_head:
            logits = model.audio_decoder_proj.text_logits(hidden[indices.target_positions])
            text = summed_cross_entropy(logits, indices.target_ids, settings.label_smoothing)
        audio_logits = model.audio_decoder_proj.audio_logits(hidden[indices.target_frames])
        codebooks = summed_codebook_cross_entropy(audio_logits, indices.target_codes_KF, settings.label_smoothing)
        counts = num_labels.clamp(min=1)
        weighted = (codebooks / counts[1:] * self.codebook_weights).sum()
        return Losses(settings.text * text / counts[0] + settings.audio * weighted, text, codebooks)

    def _hidden_states(self, batch: Batch) -> Tensor:
        """Return the backbone's hidden states (B, S, D) without synchronizing with the device."""
        model, indices, expansion = self.model, batch.indices, batch.indices.expansion
        features, codes = None, None
        if batch.audio_features is not None and batch.audio_feature_attention_mask is not None:
            encoded = model.encode_features(batch.audio_features, batch.audio_feature_attention_mask)
            features = None if encoded is None else encoded[0].flatten(0, 1)[indices.valid_features]
        if batch.audio_in_ids is not None:
            codes = model.embed_frames(batch.audio_in_ids.T)
        embeddings = expansion.merge_embeddings(
            model.embed_tokens(batch.input_ids),
            audio_in_features=features,
            audio_in_codes=codes,
            audio_out=model.embed_frames(batch.audio_out_ids.T),
        )
        audio_BS = expansion.audio_mask_BS
        return model.backbone(
            embeddings,
            expansion.attention_mask_BS,
            audio_BS,
            has_padding=indices.num_valid < indices.num_positions,
            sample_ids_BS=expansion.sample_ids_BS,
            routing=Routing(audio_BS.unsqueeze(-1), None, (indices.text_positions, indices.audio_positions)),
        )
