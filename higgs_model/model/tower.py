"""The Whisper-like audio tower of the understanding variant, and the projector from it into the backbone.

Mel spectrogram → two convolutions (the second halves the length) → learned positions → Whisper encoder layers →
average pool by 2 → layer norm → linear. 30 s of mels are 3,000 frames, 1,500 positions, 750 features: 25 per second.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import (
    WhisperAttention,
    WhisperEncoderLayer,
    eager_attention_forward,
)

from higgs_model.config import HiggsAudioConfig, HiggsAudioEncoderConfig


class HiggsAudioFeatureProjector(nn.Module):
    """Projects features of the tower to the backbone's width."""

    def __init__(self, config: HiggsAudioConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.audio_encoder_config.d_model, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(…, d_model) → (…, D)."""
        projected: Tensor = self.linear(features)
        return projected


class HiggsAudioEncoderAttention(WhisperAttention):
    """Whisper's attention, but scaling the scores as the reference does, instead of the queries.

    The two differ only in rounding, which accumulates over many layers, especially in bfloat16.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """(clips, S, d_model) → the same shape, and the attention weights if the implementation returns them."""
        clips, length, _width = hidden_states.shape
        queries, keys, values = (
            project(hidden_states).view(clips, length, self.num_heads, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        attended, weights = attend(self, queries, keys, values, attention_mask, dropout=dropout, scaling=self.scaling)
        return self.out_proj(attended.reshape(clips, length, -1)), weights


class HiggsAudioEncoderLayer(WhisperEncoderLayer):
    """Whisper's encoder layer with `HiggsAudioEncoderAttention`."""

    def __init__(self, config: HiggsAudioEncoderConfig) -> None:
        super().__init__(config)
        self.self_attn = HiggsAudioEncoderAttention(
            embed_dim=config.d_model,
            num_heads=config.encoder_attention_heads,
            dropout=config.attention_dropout,
            config=config,
        )


class HiggsAudioEncoder(nn.Module):
    """The tower up to its layer norm. Its position embeddings, sinusoids in all checkpoints, are frozen."""

    def __init__(self, config: HiggsAudioEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.embed_positions.requires_grad_(False)
        self.layers = nn.ModuleList(HiggsAudioEncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.avg_pooler = nn.AvgPool1d(2, stride=2)

    def forward(self, mels: Tensor, mel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode recordings.

        Args:
            mels: (clips, mel bins, `config.num_mel_frames`).
            mel_mask: (clips, mel frames) bool, True for mel frames and False for the padding after them.

        Returns:
            features (clips, positions, d_model), and the number of each clip that are not padding, (clips,) int64.
        """
        if mels.shape[0] == 0:
            return self._no_clips(), torch.zeros(0, dtype=torch.int64, device=mels.device)
        hidden = mels.to(self.conv1.weight)
        hidden = nn.functional.gelu(self.conv1(hidden))
        hidden = nn.functional.gelu(self.conv2(hidden))
        hidden = hidden.transpose(1, 2) + self.embed_positions.weight
        hidden = nn.functional.dropout(hidden, p=self.config.dropout, training=self.training)

        # Lengths after the second convolution and after the pool.
        num_positions = (mel_mask.sum(dim=-1) - 1) // 2 + 1
        num_features = (num_positions - 2) // 2 + 1
        mask = self._attention_mask(num_positions, hidden)
        for layer in self.layers:
            if self.training and torch.rand([]) < self.config.encoder_layerdrop:
                continue
            hidden = layer(hidden, mask)
        hidden = self.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
        return self.layer_norm(hidden), num_features

    def _attention_mask(self, num_positions: Tensor, hidden: Tensor) -> Tensor:
        """Return the padding mask for the attention implementation: (clips, S) bool, or (clips, 1, S, S) additive."""
        length = hidden.shape[1]
        mask = torch.arange(length, device=hidden.device) < num_positions.unsqueeze(1)
        if "flash" in self.config._attn_implementation:
            return mask
        additive = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return additive[:, None, None, :].expand(-1, 1, length, -1)

    def _no_clips(self) -> Tensor:
        """Return no features, with every parameter in the graph: data-parallel training waits for all gradients."""
        width = self.config.d_model
        zero = sum(parameter.flatten()[:0].sum() for parameter in self.parameters())
        weight = self.conv1.weight
        return weight.new_zeros(0, self.config.max_source_positions // 2, width) + zero
