"""The acoustic half of the codec: transformers' DAC encoder and decoder, run piece by piece.

In: samples (B, N) for the encoder, latents (B, D, T) for the decoder. Out: latents (B, D, T), samples (B, N).

The networks and their weights are transformers' `DacEncoder` and `DacDecoder`. Higgs's decoder differs from
DAC's in two places: each transposed convolution gets an output padding of `stride % 2`, so that T frames give
exactly T × hop samples, and there is no final tanh.

The forward passes are written out here, for two reasons: a row of a batch may be shorter than the batch, and
what lies beyond its end must be zero before *every* convolution, as it is when the row stands alone; and
without gradients the activation works in place. `stages` runs the same decoder the way a CPU likes it.
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
from higgs_model.codec.reach import Reach, conv_output_length, cut, network_reach

ENCODER_WINDOW_SAMPLES = 240_000
"""Encoder input at a time: 10 s at 24 kHz. At the published width that is some 200 MB of activations."""


def build_acoustic(config: HiggsAudioCodecConfig) -> tuple[DacEncoder, DacDecoder]:
    """DAC's encoder and decoder at the configuration's widths, with Higgs's two changes."""
    dac = DacConfig(
        encoder_hidden_size=config.encoder_channels,
        downsampling_ratios=list(config.ratios),
        decoder_hidden_size=config.decoder_channels,
    )
    # DAC derives both of these from the encoder; here they are free.
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
    """The encoder's convolutions in the order of the signal."""
    layers = [encoder.conv1]
    for block in encoder.block:
        layers += [*_unit_convolutions(block), block.conv1]
    return [*layers, encoder.conv2]


def decoder_convolutions(decoder: DacDecoder) -> list[nn.Conv1d | nn.ConvTranspose1d]:
    """The decoder's convolutions in the order of the signal."""
    layers = [decoder.conv1]
    for block in decoder.block:
        layers += block_convolutions(block)
    return [*layers, decoder.conv2]


def block_convolutions(block: DacDecoderBlock) -> list[nn.Conv1d | nn.ConvTranspose1d]:
    """The convolutions of one of the decoder's blocks in the order of the signal."""
    return [block.conv_t1, *_unit_convolutions(block)]


def _units(block: DacEncoderBlock | DacDecoderBlock) -> tuple[DacResidualUnit, ...]:
    return block.res_unit1, block.res_unit2, block.res_unit3


def _unit_convolutions(block: DacEncoderBlock | DacDecoderBlock) -> Iterator[nn.Conv1d]:
    for unit in _units(block):
        yield unit.conv1
        yield unit.conv2


def decoder_reach(decoder: DacDecoder) -> Reach:
    """Frames before and after a frame that take part in its samples."""
    return network_reach(decoder_convolutions(decoder))


def encode_acoustic(encoder: DacEncoder, samples_BN: Tensor, hop: int) -> Tensor:
    """Latents of whole clips, computed in pieces with real context: the same as in one go.

    Args:
        samples_BN: (B, N), all rows of real length N.

    Returns:
        (B, D, T), T as the convolutions give it.
    """
    layers = encoder_convolutions(encoder)
    num_samples = samples_BN.shape[1]
    num_frames = conv_output_length(layers, num_samples)
    window = max(ENCODER_WINDOW_SAMPLES // hop, 1)
    reach = network_reach(layers)
    if torch.is_grad_enabled() or num_frames <= window + reach.before + reach.after:
        return run_encoder(encoder, samples_BN)
    pieces = []
    for piece in cut(num_frames, window + reach.before + reach.after, reach):
        stop = num_samples if piece.stop == num_frames else piece.stop * hop
        latents = run_encoder(encoder, samples_BN[:, piece.start * hop : stop])
        pieces.append(latents[..., piece.keep_start - piece.start : piece.keep_stop - piece.start])
    return torch.cat(pieces, dim=-1)


def run_encoder(encoder: DacEncoder, samples_BN: Tensor) -> Tensor:
    """(B, N) → (B, D, T) in one go."""
    hidden = encoder.conv1(samples_BN.unsqueeze(1))
    for block in encoder.block:
        for unit in _units(block):
            hidden = _residual(unit, hidden, None)
        hidden = block.conv1(_snake(block.snake1, hidden))
    return encoder.conv2(_snake(encoder.snake1, hidden))


def run_decoder(decoder: DacDecoder, latents_BDT: Tensor, valid_frames_B: Tensor | None = None) -> Tensor:
    """Samples of latents.

    Args:
        latents_BDT: (B, D, T).
        valid_frames_B: (B,) int64, how many frames of each row are real; None: all. What a row gives beyond its end
            is meaningless, and what it gives before does not depend on what lies beyond.

    Returns:
        (B, T × hop).
    """
    ends_B11 = None if valid_frames_B is None else valid_frames_B.view(-1, 1, 1)
    hidden = decoder.conv1(_zero_beyond(latents_BDT, ends_B11))
    for block in decoder.block:
        hidden, ends_B11 = _decoder_block(block, hidden, ends_B11)
    return _decoder_end(decoder, hidden, ends_B11)


def _decoder_block(block: DacDecoderBlock, hidden: Tensor, ends_B11: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One change of rate; what is valid grows with it."""
    hidden = block.conv_t1(_zero_beyond(_snake(block.snake1, hidden), ends_B11))
    ends_B11 = None if ends_B11 is None else ends_B11 * block.conv_t1.stride[0]
    for unit in _units(block):
        hidden = _residual(unit, hidden, ends_B11)
    return hidden, ends_B11


def _decoder_end(decoder: DacDecoder, hidden: Tensor, ends_B11: Tensor | None) -> Tensor:
    return decoder.conv2(_zero_beyond(_snake(decoder.snake1, hidden), ends_B11)).squeeze(1)


def _residual(unit: DacResidualUnit, hidden: Tensor, ends_B11: Tensor | None) -> Tensor:
    inner = unit.conv1(_zero_beyond(_snake(unit.snake1, hidden), ends_B11))
    inner = unit.conv2(_snake(unit.snake2, inner))
    return hidden + inner if torch.is_grad_enabled() else inner.add_(hidden)


def _snake(snake: Snake1d, hidden: Tensor) -> Tensor:
    """x + sin²(αx) / α, without temporaries when no gradient is wanted."""
    alpha = snake.alpha
    if torch.compiler.is_compiling():
        return hidden + (alpha + 1e-9).reciprocal() * torch.sin(alpha * hidden).square()
    if torch.is_grad_enabled():
        return cast(Tensor, _SnakeWithGradient.apply(alpha, hidden))
    wave = (hidden * alpha).sin_()
    return wave.square_().mul_((alpha + 1e-9).reciprocal()).add_(hidden)


class _SnakeWithGradient(torch.autograd.Function):
    """With sin² y = (1 − cos 2y) / 2, and nothing kept but 2αx: half the passes over memory of the plain expression."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, hidden: Tensor) -> Tensor:
        angle = hidden * (2 * alpha)
        ctx.save_for_backward(alpha, angle)
        return torch.cos(angle).sub_(1).mul_((alpha + 1e-9).reciprocal().mul_(-0.5)).add_(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        alpha, angle = ctx.saved_tensors
        slope = torch.sin(angle).mul_(gradient)
        height = torch.cos(angle).sub_(1).mul_(gradient)
        by_alpha = (angle * slope).add_(height).sum((0, 2), keepdim=True) / (2 * alpha.square() + 1e-9)
        return by_alpha, slope.add_(gradient)


def _zero_beyond(hidden: Tensor, ends_B11: Tensor | None) -> Tensor:
    if ends_B11 is None:
        return hidden
    return hidden * (torch.arange(hidden.shape[-1], device=hidden.device) < ends_B11)
