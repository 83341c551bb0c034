"""Semantic features of the codec: a self-supervised speech model at the codec's frame rate.

In: samples at the codec's sample rate. Out: features (B, T, D), the mean over *all* hidden states of a frozen HuBERT or
WavLM; and the two convolutional networks between these features and the latents to quantize.

The speech model is that of transformers. It is always in evaluation mode and takes no gradients, whatever mode the
codec is in, except for a small one trained from scratch (`training.codec`). Its attention and HuBERT-base's first
normalization span its whole input, so the features of an excerpt differ slightly from those of the full recording.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import HubertModel, PreTrainedModel, WavLMModel

from higgs_model.audio.resample import resample_sinc
from higgs_model.codec.config import HiggsAudioCodecConfig
from higgs_model.codec.receptive_field import conv_output_length

EDGE_PADDING_SAMPLES = 160
"""Zeros before and after a recording in the speech model's input."""
_MODELS = {"hubert": HubertModel, "wavlm": WavLMModel}


def build_semantic_model(config: HiggsAudioCodecConfig) -> PreTrainedModel:
    """Build the speech model, randomly initialized and frozen, with the weight norm of its convolution folded."""
    model = _MODELS[config.semantic.model_type](config.semantic)
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return model.eval().requires_grad_(False)


def semantic_frames(model: PreTrainedModel, config: HiggsAudioCodecConfig, num_samples: int) -> int:
    """Return the frames of semantic features of `num_samples` at the codec's sample rate."""
    resampled = -(-num_samples * config.semantic_sample_rate_hz // config.sample_rate_hz)
    convolutions = [layer.conv for layer in model.feature_extractor.conv_layers]
    features = conv_output_length(convolutions, resampled + 2 * EDGE_PADDING_SAMPLES)
    factor = config.semantic_downsample_factor
    return features // factor if config.semantic_downsampling == "avg" else -(-features // factor)


def semantic_features(model: PreTrainedModel, config: HiggsAudioCodecConfig, samples_BN: Tensor) -> Tensor:
    """Return features at the codec's frame rate, with gradients only if the model's parameters require them.

    Args:
        samples_BN: (B, N) float32 at the codec's sample rate, no row padded.

    Returns:
        (B, T, D) in the speech model's dtype.
    """
    samples_BN = resample_sinc(samples_BN, config.sample_rate_hz, config.semantic_sample_rate_hz)
    samples_BN = F.pad(samples_BN, (EDGE_PADDING_SAMPLES, EDGE_PADDING_SAMPLES)).to(model.dtype)
    states = model(samples_BN, output_hidden_states=True).hidden_states
    features = torch.stack(states, dim=1).mean(dim=1)
    factor = config.semantic_downsample_factor
    if config.semantic_downsampling == "avg":
        return F.avg_pool1d(features.transpose(1, 2), factor, factor).transpose(1, 2)
    return features[:, ::factor]


class _ResidualUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv1d(channels, channels, 1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.conv2(F.elu(self.conv1(F.elu(hidden))))


class _EncoderBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.res_units = nn.ModuleList([_ResidualUnit(channels), _ResidualUnit(channels)])
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        for unit in self.res_units:
            hidden = unit(hidden)
        return self.conv(hidden)


class _DecoderBlock(_EncoderBlock):
    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv(hidden)
        for unit in self.res_units:
            hidden = unit(hidden)
        return hidden


class SemanticEncoder(nn.Module):
    """Features (B, D, T) → latents (B, D', T)."""

    def __init__(self, feature_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(feature_dim, latent_dim, 3, padding=1, bias=False)
        self.conv_blocks = nn.ModuleList([_EncoderBlock(latent_dim), _EncoderBlock(latent_dim)])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv(hidden)
        for block in self.conv_blocks:
            hidden = block(hidden)
        return hidden


class SemanticDecoder(nn.Module):
    """Latents (B, D', T) → features (B, D, T); used in training only."""

    def __init__(self, latent_dim: int, feature_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(latent_dim, feature_dim, 3, padding=1, bias=False)
        self.conv_blocks = nn.ModuleList([_DecoderBlock(feature_dim), _DecoderBlock(feature_dim)])
        self.conv2 = nn.Conv1d(feature_dim, feature_dim, 3, padding=1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv1(hidden)
        for block in self.conv_blocks:
            hidden = block(hidden)
        return self.conv2(hidden)
