"""The codec's network: samples → latents → codes → latents → samples, for rows of equal length.

In: samples (B, N) float32 at the codec's sample rate, or codes (B, K, T). Out: codes, latents (B, T, D) before
quantization, samples, or a `CodecOutput` for training. Module names are those of the transformers layout.

Invariant: the acoustic latents do not depend on how a recording is split into windows. Does not handle files, other
sample rates, or batches of clips of different lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.dac.modeling_dac import DacDecoder, DacEncoder

from higgs_model.codec.acoustic import (
    build_acoustic,
    decoder_receptive_field,
    encode_acoustic,
    encoder_convolutions,
    run_decoder,
)
from higgs_model.codec.config import HiggsAudioCodecConfig
from higgs_model.codec.quantizer import EuclideanCodebook, build_quantizer
from higgs_model.codec.receptive_field import ReceptiveField, conv_output_length, split_windows
from higgs_model.codec.semantic import (
    EDGE_PADDING_SAMPLES,
    SemanticDecoder,
    SemanticEncoder,
    build_semantic_model,
    semantic_features,
    semantic_frames,
)
from higgs_model.codec.stages import decoder_stages, optimize_weight_layout

DecoderForward = Callable[[DacDecoder, Tensor, Tensor | None], Tensor]

ENCODER_WINDOW_S = 120
"""Longest recording that is encoded in a single pass; longer ones are encoded in windows of this length."""
ENCODER_CONTEXT_S = 5
"""Real context on each side of a window."""
CROSSFADE_S = 1
"""Crossfade between the latents of consecutive windows."""


@dataclasses.dataclass(frozen=True)
class CodecOutput:
    """Output of a training forward pass.

    Attributes:
        audio: (B, N) float32, the reconstruction.
        latents: (B, T, D), before quantization.
        codes: (B, K, T) int64.
        commitment_loss, codebook_loss: the quantizer's losses (scalars).
        semantic_loss: mean squared error of the reconstructed semantic features (scalar).
    """

    audio: Tensor
    latents: Tensor
    codes: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    semantic_loss: Tensor


class CodecNetwork(nn.Module):
    """All modules of the codec, randomly initialized."""

    acoustic_encoder: DacEncoder
    acoustic_decoder: DacDecoder
    semantic_model: PreTrainedModel

    def __init__(self, config: HiggsAudioCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.acoustic_encoder, self.acoustic_decoder = build_acoustic(config)
        self.semantic_model = build_semantic_model(config)
        self.encoder_semantic = SemanticEncoder(config.semantic.hidden_size, config.semantic_width)
        self.decoder_semantic = SemanticDecoder(config.semantic_width, config.semantic.hidden_size)
        self.fc = nn.Linear(config.latent_width, config.quantizer_width)
        self.fc1 = nn.Linear(config.quantizer_width, config.semantic_width)
        self.fc2 = nn.Linear(config.quantizer_width, config.acoustic_dim)
        self.quantizer = build_quantizer(config)
        self.receptive_field: ReceptiveField = decoder_receptive_field(self.acoustic_decoder)
        self.decoder_stages = decoder_stages(self.acoustic_decoder)
        self._compiled_decoder: DecoderForward | None = None

    @property
    def device(self) -> torch.device:
        return self.fc2.weight.device

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; the semantic model always stays in evaluation mode, because it is frozen."""
        super().train(mode)
        self.semantic_model.eval()
        return self

    def cast(self, dtype: torch.dtype) -> Self:
        """Cast convolutions and the semantic model to `dtype`; the quantizer and its projections stay in float32."""
        for part in (
            self.acoustic_encoder,
            self.acoustic_decoder,
            self.semantic_model,
            self.encoder_semantic,
        ):
            part.to(dtype)
        if self.device.type == "cpu":
            optimize_weight_layout(self.acoustic_decoder)
        return self

    def train_codebooks_by_gradient(self, enabled: bool = True) -> None:
        """Train codebooks as parameters with `codebook_loss` instead of by moving averages."""
        for module in self.quantizer.modules():
            if isinstance(module, EuclideanCodebook):
                module.embed.requires_grad_(enabled)

    @property
    def min_samples(self) -> int:
        """Length of the shortest recording with at least one frame, in samples."""
        low, high = 1, 2 * self.config.hop_samples
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._has_frames(middle) else (middle + 1, high)
        return low

    def _has_frames(self, num_samples: int) -> bool:
        acoustic = conv_output_length(encoder_convolutions(self.acoustic_encoder), num_samples)
        return min(acoustic, semantic_frames(self.semantic_model, self.config, num_samples)) > 0

    def encode_samples(self, samples_BN: Tensor, num_codebooks: int) -> Tensor:
        """Encode samples (B, N) to codes (B, K, T) int64; see `HiggsAudioCodec.encode` for long recordings."""
        codes = [self.quantizer.encode(latents, num_codebooks) for latents in self._windowed_latents(samples_BN)]
        return torch.cat(codes, dim=-1)

    def decode_codes(self, codes_BKT: Tensor, valid_frames_B: Tensor | None = None) -> Tensor:
        """Decode codes (B, K, T) to samples (B, T × hop) float32; see `run_decoder` for `valid_frames_B`."""
        latents_BDT = self.decoder_latents(codes_BKT).transpose(1, 2)
        run = self._compiled_decoder or run_decoder
        return run(self.acoustic_decoder, latents_BDT, valid_frames_B).float()

    def decoder_latents(self, codes_BKT: Tensor) -> Tensor:
        """Return the acoustic decoder's input (B, T, D), in its dtype, for codes (B, K, T)."""
        return self._to_decoder(self.quantizer.decode(codes_BKT))

    def _to_decoder(self, latents_BTD: Tensor) -> Tensor:
        return self.fc2(latents_BTD).to(self.acoustic_decoder.conv1.weight.dtype)

    def forward(self, samples_BN: Tensor, bandwidth_kbps: float | None = None) -> CodecOutput:
        """Encode, quantize with a straight-through estimator, and decode.

        Args:
            samples_BN: (B, N) float32 at the codec's sample rate, no row padded; `min_samples` ≤ N, and at most
                `ENCODER_WINDOW_S` long.
            bandwidth_kbps: target bandwidth, for fewer codebooks; None: all.

        Returns:
            The output; `audio` has a whole number of frames, so its length can differ from N.
        """
        latents_BTD, features_BTD = self.encode_latents(samples_BN)
        quantized = self.quantizer(latents_BTD, self.config.num_codebooks_for(bandwidth_kbps))
        return dataclasses.replace(
            self.decode_latents(quantized.latents, features_BTD),
            latents=latents_BTD,
            codes=quantized.codes,
            commitment_loss=quantized.commitment_loss,
            codebook_loss=quantized.codebook_loss,
        )

    def decode_latents(self, latents_BTD: Tensor, features_BTD: Tensor) -> CodecOutput:
        """Run the second half of `forward` on given latents, without quantization; `codes` is empty.

        Args:
            latents_BTD: (B, T, D) float32, the decoder's input.
            features_BTD: (B, T, D') semantic features to reconstruct.
        """
        restored_BDT = self.decoder_semantic(self.fc1(latents_BTD).transpose(1, 2))
        zero = latents_BTD.new_zeros(())
        return CodecOutput(
            audio=run_decoder(self.acoustic_decoder, self._to_decoder(latents_BTD).transpose(1, 2)).float(),
            latents=latents_BTD,
            codes=torch.empty(len(latents_BTD), 0, latents_BTD.shape[1], dtype=torch.int64, device=latents_BTD.device),
            commitment_loss=zero,
            codebook_loss=zero,
            semantic_loss=F.mse_loss(restored_BDT.transpose(1, 2), features_BTD.detach().float()),
        )

    def encode_latents(self, samples_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents (B, T, D) float32 to quantize and the semantic features (B, T, D') of samples (B, N)."""
        padding_samples, num_frames = self._align(samples_BN.shape[1])
        features_BTD = self._semantic_features(samples_BN)[:, :num_frames]
        return self._fuse(F.pad(samples_BN, (padding_samples, padding_samples)), features_BTD), features_BTD

    def _windowed_latents(self, samples_BN: Tensor) -> Iterator[Tensor]:
        """Yield the latents (B, T, D) float32 of recordings, in consecutive parts if they are long."""
        num_samples, hop = samples_BN.shape[1], self.config.hop_samples
        padding_samples, num_frames = self._align(num_samples)
        if num_frames * hop <= ENCODER_WINDOW_S * self.config.sample_rate_hz:
            yield self._fuse(F.pad(samples_BN, (padding_samples, padding_samples)), self._semantic_features(samples_BN))
            return
        rate_hz = self.config.frame_rate_hz
        fade, tail = CROSSFADE_S * rate_hz, samples_BN.new_zeros(())
        context = ReceptiveField(ENCODER_CONTEXT_S * rate_hz, (ENCODER_CONTEXT_S + CROSSFADE_S) * rate_hz)
        for window in split_windows(num_frames, ENCODER_WINDOW_S * rate_hz, context):
            is_last = window.stop == num_frames
            # The acoustic encoder's input is the recording with zero padding at both ends; inner edges are real.
            first, last = (
                window.start * hop - padding_samples,
                num_samples + padding_samples if is_last else window.stop * hop - padding_samples,
            )
            padding = (max(-first, 0), max(last - num_samples, 0))
            acoustic_BN = F.pad(samples_BN[:, max(first, 0) : min(last, num_samples)], padding)
            semantic_BN = samples_BN[:, window.start * hop : None if is_last else window.stop * hop]
            latents = self._fuse(acoustic_BN, self._semantic_features(semantic_BN))
            latents = latents[:, window.keep_start - window.start :]
            if window.keep_start:
                weights = torch.linspace(0, 1, fade + 2, device=latents.device)[1:-1].unsqueeze(-1)
                latents = torch.cat([tail.lerp(latents[:, :fade], weights), latents[:, fade:]], dim=1)
            keep_frames = window.keep_stop - window.keep_start
            yield latents[:, :keep_frames]
            tail = latents[:, keep_frames : keep_frames + fade]

    def _semantic_features(self, samples_BN: Tensor) -> Tensor:
        return semantic_features(self.semantic_model, self.config, samples_BN)

    def _fuse(self, acoustic_BN: Tensor, features_BTD: Tensor) -> Tensor:
        """Return the latents (B, T, D) float32 to quantize: acoustic and semantic latents, the longer one truncated."""
        dtype = self.acoustic_encoder.conv1.weight.dtype
        acoustic_BDT = encode_acoustic(self.acoustic_encoder, acoustic_BN.to(dtype), self.config.hop_samples)
        semantic_BDT = self.encoder_semantic(features_BTD.to(dtype).transpose(1, 2))
        num_frames = min(acoustic_BDT.shape[-1], semantic_BDT.shape[-1])
        both = torch.cat([acoustic_BDT[..., :num_frames], semantic_BDT[..., :num_frames]], dim=1)
        return self.fc(both.transpose(1, 2).float())

    def _align(self, num_samples: int) -> tuple[int, int]:
        """Return the zero padding of the acoustic encoder's input on each side, in samples, and the number of frames.

        The input is padded if the acoustic and the semantic encoder would otherwise return different frame counts.
        """
        layers = encoder_convolutions(self.acoustic_encoder)
        semantic = semantic_frames(self.semantic_model, self.config, num_samples)
        if conv_output_length(layers, num_samples) == semantic:
            return 0, semantic
        padding_samples = EDGE_PADDING_SAMPLES * self.config.semantic_downsample_factor
        return padding_samples, min(conv_output_length(layers, num_samples + 2 * padding_samples), semantic)
