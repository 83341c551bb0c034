"""Acoustic encoder and decoder of the codec: transformers' DAC networks.

In: samples (B, N) for the encoder, latents (B, D, T) for the decoder. Out: latents (B, D, T), samples (B, N).

Networks and weights are transformers' `DacEncoder` and `DacDecoder`. The Higgs decoder differs from DAC's in two
places: each transposed convolution has an output padding of `stride % 2`, so that T frames become exactly T × hop
samples, and there is no final tanh.

The forward passes are reimplemented here for two reasons. A row may be shorter than its batch, and its padding must be
zero before *every* convolution, as it is when the row is decoded alone; and without gradients the activation works in
place. `stages` implements the same decoder for CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DacConfig
from transformers.models.dac.modeling_dac import (
    DacDecoder,
    DacDecoderBlock,
    DacEncoder,
    DacEncoderBlock,
    DacResidualUnit,
    Snake1d,
)

from higgs_model.codec.config import HiggsAudioCodecConfig
from higgs_model.codec.receptive_field import ReceptiveField, conv_output_length, receptive_field_of, split_windows

ENCODER_WINDOW_SAMPLES = 240_000
"""Samples per encoder pass: 10 s at 24 kHz, about 200 MB of activations at the published width."""


def build_acoustic(config: HiggsAudioCodecConfig) -> tuple[DacEncoder, DacDecoder]:
    """Build DAC's encoder and decoder with the configured widths and the two changes of Higgs Audio."""
    dac = DacConfig(
        encoder_hidden_size=config.encoder_channels,
        downsampling_ratios=list(config.ratios),
        decoder_hidden_size=config.decoder_channels,
    )
    # DAC derives both from the encoder; Higgs Audio sets them independently.
    dac.upsampling_ratios = list(config.ratios)
    dac.hidden_size = config.acoustic_dim
    encoder, decoder = DacEncoder(dac), DacDecoder(dac)
    decoder.tanh = nn.Identity()
    for module in decoder.modules():
        if isinstance(module, nn.ConvTranspose1d):
            module.output_padding = (module.stride[0] % 2,)
    for network in (encoder, decoder):
        network.apply(_init_weights)
    return encoder, decoder


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv1d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def encoder_convolutions(encoder: DacEncoder) -> list[nn.Conv1d]:
    """Return the encoder's convolutions in signal order."""
    layers = [encoder.conv1]
    for block in encoder.block:
        layers += [*_residual_convolutions(block), block.conv1]
    return [*layers, encoder.conv2]


def decoder_convolutions(decoder: DacDecoder) -> list[nn.Conv1d | nn.ConvTranspose1d]:
    """Return the decoder's convolutions in signal order."""
    layers = [decoder.conv1]
    for block in decoder.block:
        layers += block_convolutions(block)
    return [*layers, decoder.conv2]


def block_convolutions(block: DacDecoderBlock) -> list[nn.Conv1d | nn.ConvTranspose1d]:
    """Return the convolutions of a decoder block in signal order."""
    return [block.conv_t1, *_residual_convolutions(block)]


def _residual_units(block: DacEncoderBlock | DacDecoderBlock) -> tuple[DacResidualUnit, ...]:
    return block.res_unit1, block.res_unit2, block.res_unit3


def _residual_convolutions(block: DacEncoderBlock | DacDecoderBlock) -> Iterator[nn.Conv1d]:
    for unit in _residual_units(block):
        yield unit.conv1
        yield unit.conv2


def decoder_receptive_field(decoder: DacDecoder) -> ReceptiveField:
    """Return the decoder's receptive field in frames."""
    return receptive_field_of(decoder_convolutions(decoder))


def encode_acoustic(encoder: DacEncoder, samples_BN: Tensor, hop: int) -> Tensor:
    """Encode clips to latents in windows with real context; the result equals that of a single pass.

    With gradients enabled, it is a single pass.

    Args:
        samples_BN: (B, N), no row padded.

    Returns:
        (B, D, T); T follows from the convolutions.
    """
    layers = encoder_convolutions(encoder)
    num_samples = samples_BN.shape[1]
    num_frames = conv_output_length(layers, num_samples)
    receptive_field = receptive_field_of(layers)
    window_frames = max(ENCODER_WINDOW_SAMPLES // hop, 1) + receptive_field.before + receptive_field.after
    if torch.is_grad_enabled() or num_frames <= window_frames:
        return run_encoder(encoder, samples_BN)
    parts = []
    for window in split_windows(num_frames, window_frames, receptive_field):
        stop = num_samples if window.stop == num_frames else window.stop * hop
        latents = run_encoder(encoder, samples_BN[:, window.start * hop : stop])
        parts.append(latents[..., window.keep_start - window.start : window.keep_stop - window.start])
    return torch.cat(parts, dim=-1)


def run_encoder(encoder: DacEncoder, samples_BN: Tensor) -> Tensor:
    """Encode samples (B, N) to latents (B, D, T) in a single pass."""
    hidden = encoder.conv1(samples_BN.unsqueeze(1))
    for block in encoder.block:
        for unit in _residual_units(block):
            hidden = _residual(unit, hidden, None)
        hidden = block.conv1(_snake(block.snake1, hidden))
    return encoder.conv2(_snake(encoder.snake1, hidden))


def run_decoder(decoder: DacDecoder, latents_BDT: Tensor, valid_frames_B: Tensor | None = None) -> Tensor:
    """Decode latents to samples.

    Args:
        latents_BDT: (B, D, T).
        valid_frames_B: (B,) int64, number of valid frames of each row; None: all. The output of padding frames is
            meaningless and does not affect the valid ones.

    Returns:
        (B, T × hop).
    """
    lengths_B11 = None if valid_frames_B is None else valid_frames_B.view(-1, 1, 1)
    hidden = decoder.conv1(_zero_padding(latents_BDT, lengths_B11))
    for block in decoder.block:
        hidden, lengths_B11 = _decoder_block(block, hidden, lengths_B11)
    return _decoder_output(decoder, hidden, lengths_B11)


def _decoder_block(block: DacDecoderBlock, hidden: Tensor, lengths_B11: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Upsample by the block's stride; valid lengths grow accordingly."""
    hidden = block.conv_t1(_zero_padding(_snake(block.snake1, hidden), lengths_B11))
    lengths_B11 = None if lengths_B11 is None else lengths_B11 * block.conv_t1.stride[0]
    for unit in _residual_units(block):
        hidden = _residual(unit, hidden, lengths_B11)
    return hidden, lengths_B11


def _decoder_output(decoder: DacDecoder, hidden: Tensor, lengths_B11: Tensor | None) -> Tensor:
    return decoder.conv2(_zero_padding(_snake(decoder.snake1, hidden), lengths_B11)).squeeze(1)


def _residual(unit: DacResidualUnit, hidden: Tensor, lengths_B11: Tensor | None) -> Tensor:
    inner = unit.conv1(_zero_padding(_snake(unit.snake1, hidden), lengths_B11))
    inner = unit.conv2(_snake(unit.snake2, inner))
    return hidden + inner if torch.is_grad_enabled() else inner.add_(hidden)


def _snake(snake: Snake1d, hidden: Tensor) -> Tensor:
    """Return x + sin²(αx) / α; in place on a single temporary when gradients are disabled."""
    alpha = snake.alpha
    if torch.compiler.is_compiling():
        return hidden + (alpha + 1e-9).reciprocal() * torch.sin(alpha * hidden).square()
    if torch.is_grad_enabled():
        return cast(Tensor, _SnakeFunction.apply(alpha, hidden))
    wave = (hidden * alpha).sin_()
    return wave.square_().mul_((alpha + 1e-9).reciprocal()).add_(hidden)


class _SnakeFunction(torch.autograd.Function):
    """Snake by sin² y = (1 − cos 2y) / 2, saving only 2αx: half the memory passes of the plain expression."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, hidden: Tensor) -> Tensor:
        angle = hidden * (2 * alpha)
        ctx.save_for_backward(alpha, angle)
        return torch.cos(angle).sub_(1).mul_((alpha + 1e-9).reciprocal().mul_(-0.5)).add_(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        alpha, angle = ctx.saved_tensors
        sine = torch.sin(angle).mul_(gradient)
        cosine = torch.cos(angle).sub_(1).mul_(gradient)
        alpha_gradient = (angle * sine).add_(cosine).sum((0, 2), keepdim=True) / (2 * alpha.square() + 1e-9)
        return alpha_gradient, sine.add_(gradient)


def _zero_padding(hidden: Tensor, lengths_B11: Tensor | None) -> Tensor:
    if lengths_B11 is None:
        return hidden
    return hidden * (torch.arange(hidden.shape[-1], device=hidden.device) < lengths_B11)
