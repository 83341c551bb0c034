"""The Whisper-like audio tower of the understanding variant, and the projector from it into the backbone.

Mel spectrogram → two convolutions (the second halves the length) → learned positions → Whisper encoder layers →
average pool by 2 → layer norm → linear. 30 s of mels are 3,000 frames, 1,500 positions, 750 features: 25 a second.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from higgs_model.config import HiggsAudioConfig, HiggsAudioEncoderConfig
from higgs_model.errors import BadInput


class HiggsAudioFeatureProjector(nn.Module):
    """Tower features to the backbone's width."""

    def __init__(self, config: HiggsAudioConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.audio_encoder_config.d_model, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(…, d_model) → (…, D)."""
        projected: Tensor = self.linear(features)
        return projected


class HiggsAudioEncoder(nn.Module):
    """The tower up to its layer norm. Its positions are fixed sinusoids in checkpoints and are never trained."""

    def __init__(self, config: HiggsAudioEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.embed_positions.requires_grad_(False)
        self.layers = nn.ModuleList(WhisperEncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.avg_pooler = nn.AvgPool1d(2, stride=2)

    @property
    def num_mel_frames(self) -> int:
        """The only length that mel spectrograms may have."""
        strides: int = self.conv1.stride[0] * self.conv2.stride[0]
        return self.config.max_source_positions * strides

    def forward(self, mels: Tensor, mel_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode clips.

        Args:
            mels: (clips, mel bins, mel frames); padded to `num_mel_frames`.
            mel_mask: (clips, mel frames), 1 where a mel frame is real; real ones come first.

        Returns:
            features (clips, positions, d_model) and how many of each clip's are real (clips,) int64.

        Raises:
            BadInput: the mels have another length.
        """
        if mels.shape[0] == 0:
            return self._no_clips(), torch.zeros(0, dtype=torch.int64, device=mels.device)
        if mels.shape[-1] != self.num_mel_frames:
            raise BadInput(
                f"audio_features are {mels.shape[-1]} mel frames long, but the audio tower takes exactly "
                f"{self.num_mel_frames}: pad them to that length"
            )
        hidden = mels.to(self.conv1.weight)
        hidden = nn.functional.gelu(self.conv1(hidden))
        hidden = nn.functional.gelu(self.conv2(hidden))
        hidden = hidden.transpose(1, 2) + self.embed_positions.weight
        hidden = nn.functional.dropout(hidden, p=self.config.dropout, training=self.training)

        # Lengths after the second convolution and after the pool.
        num_positions = (mel_mask.sum(dim=-1).long() - 1) // 2 + 1
        num_features = (num_positions - 2) // 2 + 1
        mask = self._attention_mask(num_positions, hidden)
        for layer in self.layers:
            if self.training and torch.rand([]) < self.config.encoder_layerdrop:
                continue
            hidden = layer(hidden, mask)
            # transformers returned a tuple here before the layers were simplified.
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        hidden = self.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
        return self.layer_norm(hidden), num_features

    def _attention_mask(self, num_positions: Tensor, hidden: Tensor) -> Tensor:
        """Real positions, as the attention implementation wants them: (clips, S) bool or (clips, 1, S, S) added."""
        length = hidden.shape[1]
        real = torch.arange(length, device=hidden.device) < num_positions.unsqueeze(1)
        if "flash" in self.config._attn_implementation:
            return real
        added = torch.zeros_like(real, dtype=hidden.dtype).masked_fill(~real, torch.finfo(hidden.dtype).min)
        return added[:, None, None, :].expand(-1, 1, length, -1)

    def _no_clips(self) -> Tensor:
        """No features, but with every parameter in the graph: data-parallel training waits for all gradients."""
        width = self.config.d_model
        touched = sum(parameter.flatten()[:0].sum() for parameter in self.parameters())
        weight = self.conv1.weight
        return weight.new_zeros(0, self.config.max_source_positions // 2, width) + touched
