"""The loss of a batch, as a module that data-parallel wrappers can wrap.

The same losses as `HiggsAudioModel.forward` gives, with two differences that training needs: logits are computed only
where something is learnt, and each loss is a sum divided by what the caller says, so that the gradient of a step does
not depend on how its samples were cut into batches and given to workers.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from higgs_model import tokens
from higgs_model.errors import BadConfig
from higgs_model.model.inputs import ModelInputs
from higgs_model.model.loss import next_labels, summed_codebook_cross_entropy, summed_cross_entropy
from higgs_model.model.merge import TRAINING_ROUND_TO
from higgs_model.model.model import HiggsAudioModel
from higgs_model.training.collator import Batch
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
        model, settings = self.model, self._settings
        merged = model.merge(
            _inputs(batch), left_padding=False, round_to=TRAINING_ROUND_TO, sample_ids_BS=batch.sample_ids
        )
        hidden = model.backbone(
            merged.embeddings_BSD, merged.attention_mask_BS, merged.audio_mask_BS, sample_ids_BS=merged.sample_ids_BS
        )
        text = hidden.new_zeros((), dtype=torch.float32)
        if model.config.use_text_head and merged.labels_BS is not None:
            following = merged.labels_BS[:, 1:]
            learnt = following != tokens.IGNORE_INDEX
            logits = model.audio_decoder_proj.text_logits(hidden[:, :-1][learnt])
            text = summed_cross_entropy(logits, following[learnt], settings.label_smoothing)
        labels = next_labels(batch.label_audio_ids, batch.audio_out_ids_start)
        frames = (labels != tokens.IGNORE_INDEX).any(dim=0)
        audio_logits = model.audio_decoder_proj.audio_logits(hidden[merged.audio_out_mask_BS][frames])
        codebooks = summed_codebook_cross_entropy(audio_logits, labels[:, frames], settings.label_smoothing)
        counts = num_labels.clamp(min=1)
        weighted = (codebooks / counts[1:] * self.codebook_weights).sum()
        return Losses(settings.text * text / counts[0] + settings.audio * weighted, text, codebooks)


def _inputs(batch: Batch) -> ModelInputs:
    names = [field.name for field in dataclasses.fields(ModelInputs)]
    return ModelInputs(**{name: getattr(batch, name) for name in names})
