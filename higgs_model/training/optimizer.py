"""AdamW, the learning rate schedule, and freezing of parameters."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from higgs_model.errors import BadConfig
from higgs_model.model.freezing import PartiallyFrozenEmbedding
from higgs_model.model.model import HiggsAudioModel
from higgs_model.training.settings import FreezeSettings, OptimizerSettings

_MODULES_WITHOUT_DECAY = (nn.Embedding, PartiallyFrozenEmbedding, nn.LayerNorm, LlamaRMSNorm)


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """Return the learning rate of step 0, 1, …: linear warm-up, then cosine decay to the fraction `final_share`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    decay_steps = max(settings.steps - settings.warmup_steps, 1)
    progress = min((step - settings.warmup_steps) / decay_steps, 1.0)
    fraction = settings.final_share + (1 - settings.final_share) * (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * fraction


def build_optimizer(model: HiggsAudioModel, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Build the optimizer of all trainable parameters.

    Norms, biases and embeddings have no weight decay, because embeddings of unused tokens would decay to zero.

    Raises:
        BadConfig: all parameters are frozen.
    """
    without_decay = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _MODULES_WITHOUT_DECAY)
        for parameter in module.parameters()
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise BadConfig("freeze: no trainable parameters are left")
    decayed = [parameter for parameter in trainable if parameter.dim() > 1 and id(parameter) not in without_decay]
    others = [parameter for parameter in trainable if parameter.dim() <= 1 or id(parameter) in without_decay]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def freeze_parameters(model: HiggsAudioModel, settings: FreezeSettings) -> None:
    """Freeze the configured parts of the model."""
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
