"""The loss of a batch, as a module that data-parallel wrappers can wrap.

The same losses as `HiggsAudioModel.forward` gives, with two differences that training needs: logits are computed only
where something is learnt, and each loss is a sum divided by what the caller says, so that the gradient of a step does
not depend on how its samples were cut into batches and given to workers.
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
from higgs_model.training.settings import Loss


@dataclasses.dataclass(frozen=True)
class Losses:
    """Of one batch: `total` is minimised; `text` () and `codebooks` (K,) are sums over its labels, for the log."""

    total: Tensor
    text: Tensor
    codebooks: Tensor


class Objective(nn.Module):
    """A network and what it is trained for.

    Raises:
        BadConfig: the weights are not as many as the network has codebooks.
    """

    def __init__(self, model: HiggsAudioModel, settings: Loss) -> None:
        super().__init__()
        num_codebooks = model.config.audio_num_codebooks
        weights = settings.codebooks or (1.0,) * num_codebooks
        if len(weights) != num_codebooks:
            raise BadConfig(f"loss.codebooks has {len(weights)} weights, but the network has {num_codebooks} codebooks")
        self.model = model
        self._settings = settings
        scaled = torch.tensor(weights, dtype=torch.float32, device=model.embed_tokens_device)
        self.codebook_weights: Tensor
        self.register_buffer("codebook_weights", scaled / scaled.sum(), persistent=False)

    def forward(self, batch: Batch, num_labels: Tensor) -> Losses:
        """Losses of a batch that is on the network's device.

        Args:
            num_labels: (1 + K,) float32, how many tokens and how many codes of each codebook are learnt in the whole
                step, which sums are divided by.
        """
        model, settings, places = self.model, self._settings, batch.places
        hidden = self._hidden(batch).flatten(0, 1)
        text = hidden.new_zeros((), dtype=torch.float32)
        if model.config.use_text_head:
            logits = model.audio_decoder_proj.text_logits(hidden[places.learnt_at])
            text = summed_cross_entropy(logits, places.learnt_ids, settings.label_smoothing)
        audio_logits = model.audio_decoder_proj.audio_logits(hidden[places.frames_at])
        codebooks = summed_codebook_cross_entropy(audio_logits, places.frame_codes_KF, settings.label_smoothing)
        counts = num_labels.clamp(min=1)
        weighted = (codebooks / counts[1:] * self.codebook_weights).sum()
        return Losses(settings.text * text / counts[0] + settings.audio * weighted, text, codebooks)

    def _hidden(self, batch: Batch) -> Tensor:
        """(B, S, D): the batch through the backbone, without a look at what is on the device."""
        model, places, expansion = self.model, batch.places, batch.places.expansion
        features, codes = None, None
        if batch.audio_features is not None and batch.audio_feature_attention_mask is not None:
            encoded = model.encode_features(batch.audio_features, batch.audio_feature_attention_mask)
            features = None if encoded is None else encoded[0].flatten(0, 1)[places.features_from]
        if batch.audio_in_ids is not None:
            codes = model.embed_frames(batch.audio_in_ids.T)
        embeddings = expansion.filled(
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
            has_padding=places.num_real < places.num_positions,
            sample_ids_BS=expansion.sample_ids_BS,
            routing=Routing(audio_BS.unsqueeze(-1), None, (places.text_at, places.audio_at)),
        )
