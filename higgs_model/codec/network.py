"""The codec's network: samples → latents → codes → latents → samples, for rows of equal length.

In: samples (B, N) float32 at the codec's rate, or codes (B, K, T). Out: latents (B, T, D) before
quantization, samples, or all that training needs. Module names are those of the transformers layout.

Invariant: the acoustic half gives the same latents however a recording is cut. Knows nothing of files, sample
rates other than its own, or batches of uneven clips.
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
    decoder_reach,
    encode_acoustic,
    encoder_convolutions,
    run_decoder,
)
from higgs_model.codec.config import HiggsAudioCodecConfig
from higgs_model.codec.quantizer import EuclideanCodebook, build_quantizer
from higgs_model.codec.reach import Reach, conv_output_length, cut
from higgs_model.codec.semantic import (
    EDGE_PADDING_SAMPLES,
    SemanticDecoder,
    SemanticEncoder,
    build_semantic_model,
    semantic_features,
    semantic_frames,
)
from higgs_model.codec.stages import decoder_stages, lay_out_for_stages

DecoderPass = Callable[[DacDecoder, Tensor, Tensor | None], Tensor]

PIECE_S = 120
"""Recordings up to this length are heard by the semantic model in one go."""
CONTEXT_S = 5
"""Real sound on each side of a piece of a longer recording."""
FADE_S = 1
"""Over this time the latents of one piece turn into those of the next."""


@dataclasses.dataclass(frozen=True)
class CodecOutput:
    """One pass of training: `audio` (B, N) for `codes` (B, K, T) of `latents` (B, T, D), and three losses (scalars).

    `commitment_loss` and `codebook_loss` are the quantizer's; `semantic_loss` is how far the semantic
    features that the codes give back are from those that went in.
    """

    audio: Tensor
    latents: Tensor
    codes: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    semantic_loss: Tensor


class CodecNetwork(nn.Module):
    """All modules of the codec, with random weights."""

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
        self.reach: Reach = decoder_reach(self.acoustic_decoder)
        self.decoder_stages = decoder_stages(self.acoustic_decoder)
        self._compiled_decoder: DecoderPass | None = None

    @property
    def device(self) -> torch.device:
        return self.fc2.weight.device

    def train(self, mode: bool = True) -> Self:
        """As always, but the semantic model stays in evaluation mode: it is a fixed measure, not a learner."""
        super().train(mode)
        self.semantic_model.eval()
        return self

    def cast(self, dtype: torch.dtype) -> Self:
        """Compute convolutions and semantic features in `dtype`; what decides codes stays in float32."""
        for part in (
            self.acoustic_encoder,
            self.acoustic_decoder,
            self.semantic_model,
            self.encoder_semantic,
        ):
            part.to(dtype)
        if self.device.type == "cpu":
            lay_out_for_stages(self.acoustic_decoder)
        return self

    def learn_codebooks_by_gradient(self, enabled: bool = True) -> None:
        """Train the codes as parameters, by `codebook_loss`, instead of by moving averages."""
        for module in self.quantizer.modules():
            if isinstance(module, EuclideanCodebook):
                module.embed.requires_grad_(enabled)

    @property
    def min_samples(self) -> int:
        """The shortest recording that gives a frame."""
        low, high = 1, 2 * self.config.hop_samples
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._has_frame(middle) else (middle + 1, high)
        return low

    def _has_frame(self, num_samples: int) -> bool:
        acoustic = conv_output_length(encoder_convolutions(self.acoustic_encoder), num_samples)
        return min(acoustic, semantic_frames(self.semantic_model, self.config, num_samples)) > 0

    def encode_samples(self, samples_BN: Tensor, num_codebooks: int) -> Tensor:
        """(B, N) → codes (B, K, T) int64; see `HiggsAudioCodec.encode` for recordings of more than `PIECE_S`."""
        codes = [self.quantizer.encode(latents, num_codebooks) for latents in self._latents(samples_BN)]
        return torch.cat(codes, dim=-1)

    def decode_codes(self, codes_BKT: Tensor, valid_frames_B: Tensor | None = None) -> Tensor:
        """Codes (B, K, T) → samples (B, T × hop) float32; see `run_decoder` for `valid_frames_B`."""
        latents_BDT = self.decoder_latents(codes_BKT).transpose(1, 2)
        run = self._compiled_decoder or run_decoder
        return run(self.acoustic_decoder, latents_BDT, valid_frames_B).float()

    def decoder_latents(self, codes_BKT: Tensor) -> Tensor:
        """Codes (B, K, T) → what the acoustic decoder is given, (B, T, D) in its dtype."""
        return self._to_decoder(self.quantizer.decode(codes_BKT))

    def _to_decoder(self, latents_BTD: Tensor) -> Tensor:
        return self.fc2(latents_BTD).to(self.acoustic_decoder.conv1.weight.dtype)

    def forward(self, samples_BN: Tensor, bandwidth_kbps: float | None = None) -> CodecOutput:
        """One pass of training: encode, quantize with gradients passed straight through, decode.

        Args:
            samples_BN: (B, N) float32 at the codec's rate, all rows of real length N ≥ `min_samples`, at most
                `PIECE_S` long.

        Returns:
            `audio` is as long as the frames: N rounded to a whole number of them.
        """
        latents_BTD, features_BTD = self.latents(samples_BN)
        quantized = self.quantizer(latents_BTD, self.config.codebooks_for(bandwidth_kbps))
        return dataclasses.replace(
            self.from_latents(quantized.latents, features_BTD),
            latents=latents_BTD,
            codes=quantized.codes,
            commitment_loss=quantized.commitment_loss,
            codebook_loss=quantized.codebook_loss,
        )

    def from_latents(self, latents_BTD: Tensor, features_BTD: Tensor) -> CodecOutput:
        """The second half of a pass of training: sound of latents that were not quantized, with no codes."""
        restored_BDT = self.decoder_semantic(self.fc1(latents_BTD).transpose(1, 2))
        nothing = latents_BTD.new_zeros(())
        return CodecOutput(
            audio=run_decoder(self.acoustic_decoder, self._to_decoder(latents_BTD).transpose(1, 2)).float(),
            latents=latents_BTD,
            codes=torch.empty(len(latents_BTD), 0, latents_BTD.shape[1], dtype=torch.int64, device=latents_BTD.device),
            commitment_loss=nothing,
            codebook_loss=nothing,
            semantic_loss=F.mse_loss(restored_BDT.transpose(1, 2), features_BTD.float()),
        )

    def latents(self, samples_BN: Tensor) -> tuple[Tensor, Tensor]:
        """What is quantized, (B, T, D) float32, and the semantic features (B, T, D') of samples like `forward`'s."""
        edge, num_frames = self._alignment(samples_BN.shape[1])
        features_BTD = self._features(samples_BN)[:, :num_frames]
        return self._join(F.pad(samples_BN, (edge, edge)), features_BTD), features_BTD

    def _latents(self, samples_BN: Tensor) -> Iterator[Tensor]:
        """Latents (B, T, D) float32 of a recording, in one piece or in several that follow each other."""
        num_samples, hop = samples_BN.shape[1], self.config.hop_samples
        edge, num_frames = self._alignment(num_samples)
        if num_frames * hop <= PIECE_S * self.config.sample_rate_hz:
            yield self._join(F.pad(samples_BN, (edge, edge)), self._features(samples_BN))
            return
        frames_a_s = self.config.frame_rate_hz
        fade, tail = FADE_S * frames_a_s, samples_BN.new_zeros(())
        around = Reach(CONTEXT_S * frames_a_s, (CONTEXT_S + FADE_S) * frames_a_s)
        for piece in cut(num_frames, PIECE_S * frames_a_s, around):
            ends_here = piece.stop == num_frames
            # The acoustic encoder hears the recording between two edges of silence; only the ends are made.
            first, last = (
                piece.start * hop - edge,
                num_samples + edge if ends_here else piece.stop * hop - edge,
            )
            made = (max(-first, 0), max(last - num_samples, 0))
            acoustic = F.pad(samples_BN[:, max(first, 0) : min(last, num_samples)], made)
            heard = samples_BN[:, piece.start * hop : None if ends_here else piece.stop * hop]
            latents = self._join(acoustic, self._features(heard))[:, piece.keep_start - piece.start :]
            if piece.keep_start:
                rise = torch.linspace(0, 1, fade + 2, device=latents.device)[1:-1].unsqueeze(-1)
                latents = torch.cat([tail.lerp(latents[:, :fade], rise), latents[:, fade:]], dim=1)
            kept = piece.keep_stop - piece.keep_start
            yield latents[:, :kept]
            tail = latents[:, kept : kept + fade]

    def _features(self, samples_BN: Tensor) -> Tensor:
        return semantic_features(self.semantic_model, self.config, samples_BN)

    def _join(self, acoustic_BN: Tensor, features_BTD: Tensor) -> Tensor:
        """What is quantized, (B, T, D) float32: both halves side by side, the longer one cut."""
        dtype = self.acoustic_encoder.conv1.weight.dtype
        acoustic_BDT = encode_acoustic(self.acoustic_encoder, acoustic_BN.to(dtype), self.config.hop_samples)
        semantic_BDT = self.encoder_semantic(features_BTD.to(dtype).transpose(1, 2))
        num_frames = min(acoustic_BDT.shape[-1], semantic_BDT.shape[-1])
        both = torch.cat([acoustic_BDT[..., :num_frames], semantic_BDT[..., :num_frames]], dim=1)
        return self.fc(both.transpose(1, 2).float())

    def _alignment(self, num_samples: int) -> tuple[int, int]:
        """Silence that the acoustic encoder gets on each side, in samples, and the frames of the recording.

        It gets some when it alone would give another number of frames than the semantic model.
        """
        layers = encoder_convolutions(self.acoustic_encoder)
        semantic = semantic_frames(self.semantic_model, self.config, num_samples)
        if conv_output_length(layers, num_samples) == semantic:
            return 0, semantic
        edge = EDGE_PADDING_SAMPLES * self.config.semantic_downsample_factor
        return edge, min(conv_output_length(layers, num_samples + 2 * edge), semantic)
