"""AdamW, its learning rate at each step, and what is frozen."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from higgs_model.errors import BadConfig
from higgs_model.model.freezing import PartiallyFrozenEmbedding
from higgs_model.model.model import HiggsAudioModel
from higgs_model.training.settings import Freeze, Optimizer

_WITHOUT_DECAY = (nn.Embedding, PartiallyFrozenEmbedding, nn.LayerNorm, LlamaRMSNorm)


def learning_rate(settings: Optimizer, step: int) -> float:
    """Of step 0, 1, …: rising in a line through the warm-up, then falling as half a cosine to its final share."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    falling = max(settings.steps - settings.warmup_steps, 1)
    progress = min((step - settings.warmup_steps) / falling, 1.0)
    share = settings.final_share + (1 - settings.final_share) * (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * share


def build_optimizer(model: HiggsAudioModel, settings: Optimizer) -> torch.optim.AdamW:
    """For all that is not frozen. Norms, biases and embeddings do not decay: a row that is never seen would vanish.

    Raises:
        BadConfig: everything is frozen.
    """
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _WITHOUT_DECAY)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise BadConfig("freeze leaves nothing to train")
    decaying = [one for one in trained if one.dim() > 1 and id(one) not in spared]
    others = [one for one in trained if one.dim() <= 1 or id(one) in spared]
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def freeze(model: HiggsAudioModel, settings: Freeze) -> None:
    """Stop training what the settings say."""
    if settings.llm:
        model.freeze_llm(freeze_embed=False)
    if settings.embed is not False:
        model.freeze_embed(None if settings.embed is True else settings.embed)
    if settings.text_head is not False:
        model.freeze_text_head(None if settings.text_head is True else settings.text_head)
    if settings.audio_tower:
        model.freeze_audio_tower()
    if settings.audio_encoder_proj:
        model.freeze_audio_encoder_proj()
