"""The acoustic decoder as a pipeline of stages, each buffering only the context of its own convolutions.

In: latents (T, D) of one clip, in portions of any size. Out: samples (N,), in portions, as soon as they are final.
Concatenated, they equal the output of `run_decoder` for all latents at once.

A stage is one upsampling block. The receptive field of its convolutions is a few positions at *its* rate, so the
overlap that is recomputed between portions shrinks with every stage, and is much smaller than the overlap that the full
network would recompute. Stages further split their input into tiles whose activations fit a CPU's caches.

Activations are (T, C), channels last, unlike torch's convention: on CPUs convolutions are fastest in this layout, 1 × 1
and transposed convolutions are plain matrix products, and elementwise operations run over contiguous memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.dac.modeling_dac import DacDecoder, DacDecoderBlock, DacResidualUnit, Snake1d

from higgs_model.codec.acoustic import block_convolutions
from higgs_model.codec.receptive_field import ReceptiveField, lookahead_positions, receptive_field_of

_TILE_BYTES = 4 << 20
"""Activations per tile: small enough to stay in the caches with their temporaries, large enough for efficiency."""
_MIN_ROW_LENGTH = 64
"""Narrower activations are viewed as rows of about this length, because elementwise operations vectorize by row."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the decoder that upsamples by `factor`.

    Attributes:
        run: maps (T, C) to (T × factor, C'), with the zero padding of its convolutions.
        factor: output positions per input position.
        receptive_field: receptive field in input positions.
        lookahead_positions: output positions at the end that depend on input that has not arrived yet.
        tile_positions: output positions per tile.
    """

    run: Callable[[Tensor], Tensor]
    factor: int
    receptive_field: ReceptiveField
    lookahead_positions: int
    tile_positions: int


def decoder_stages(decoder: DacDecoder) -> list[Stage]:
    """Return the stages of a decoder, one per block; the first and last convolution belong to their neighbours."""
    last = len(decoder.block) - 1
    stages = []
    for index, block in enumerate(decoder.block):
        first_conv, last_conv = (decoder if index == 0 else None), (decoder if index == last else None)
        layers = block_convolutions(block)
        if first_conv:
            layers = [decoder.conv1, *layers]
        if last_conv:
            layers = [*layers, decoder.conv2]
        position_bytes = block.conv_t1.out_channels * block.conv_t1.weight.element_size()
        stages.append(
            Stage(
                run=_StageForward(block, first_conv, last_conv),
                factor=block.conv_t1.stride[0],
                receptive_field=receptive_field_of(layers),
                lookahead_positions=lookahead_positions(layers),
                tile_positions=_TILE_BYTES // position_bytes,
            )
        )
    return stages


def lookahead_frames(stages: Sequence[Stage]) -> int:
    """Return the number of frames that must follow a frame before all its samples are final."""
    lookahead, hop = 0, 1
    for stage in stages:
        lookahead, hop = lookahead * stage.factor + stage.lookahead_positions, hop * stage.factor
    return -(-lookahead // hop)


def optimize_weight_layout(decoder: DacDecoder) -> None:
    """Store the weights in the memory layout that stages read, which avoids a copy per call; values do not change."""
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            weight = layer.weight
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)


class DecoderStream:
    """Decodes one clip through all stages: latents in as they arrive, samples out as soon as they are final."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._streams = [_StageStream(stage) for stage in stages]

    def push(self, latents_TD: Tensor, *, last: bool) -> Tensor:
        """Append latents (T, D) and return the samples (N,) that became final; `last` marks the end of the clip."""
        samples = [samples_N1.flatten() for samples_N1, _ in self._run_from(0, latents_TD, last)]
        return torch.cat(samples)

    def _run_from(self, index: int, portion_TC: Tensor, last: bool) -> Iterator[tuple[Tensor, bool]]:
        """Run stage `index` and all later ones, depth first: a tile passes all stages before the next one starts."""
        if index == len(self._streams):
            yield portion_TC, last
            return
        for tile_TC, last_tile in self._streams[index].push(portion_TC, last):
            yield from self._run_from(index + 1, tile_TC, last_tile)


class _StageStream:
    """A stage's state for one clip: the input positions that later output depends on."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._buffer_TC: Tensor | None = None
        self._buffer_start = 0
        self._emitted = 0

    def push(self, new_TC: Tensor, last: bool) -> Iterator[tuple[Tensor, bool]]:
        """Append positions (T, C) and yield the final output as tiles (T', C'), at least one, each with an end flag."""
        stage, field, factor = self.stage, self.stage.receptive_field, self.stage.factor
        buffer_TC = new_TC if self._buffer_TC is None else torch.cat([self._buffer_TC, new_TC])
        buffer_start, received = self._buffer_start, self._buffer_start + len(buffer_TC)
        emitted = self._emitted
        final = max(received * factor - (0 if last else stage.lookahead_positions), emitted)
        self._emitted, self._buffer_start = final, max(final // factor - field.before, buffer_start)
        # A copy: a view would keep the whole portion alive.
        self._buffer_TC = buffer_TC[self._buffer_start - buffer_start :].clone()
        for start, stop in _even_tiles(emitted, final, stage.tile_positions):
            first = max(start // factor - field.before, 0)
            end = min(-(-stop // factor) + field.after, received)
            output = stage.run(buffer_TC[first - buffer_start : end - buffer_start])
            yield output[start - first * factor : stop - first * factor], last and stop == final


def _even_tiles(start: int, stop: int, max_length: int) -> Iterator[tuple[int, int]]:
    """Split [start, stop) into as few tiles as possible, of nearly equal length; an empty range is one empty tile."""
    count = max(-(-(stop - start) // max_length), 1)
    for index in range(count):
        yield start + (stop - start) * index // count, start + (stop - start) * (index + 1) // count


@dataclasses.dataclass(frozen=True)
class _StageForward:
    """Forward pass of a stage: a block, preceded or followed by the decoder's first or last convolution."""

    block: DacDecoderBlock
    first: DacDecoder | None
    last: DacDecoder | None

    def __call__(self, hidden_TC: Tensor) -> Tensor:
        if not len(hidden_TC):
            return hidden_TC.new_empty(0, 1 if self.last else self.block.conv_t1.out_channels)
        if self.first:
            hidden_TC = _convolve(self.first.conv1, hidden_TC)
        hidden_TC = _upsample(self.block.conv_t1, _snake(self.block.snake1, hidden_TC))
        for unit in (self.block.res_unit1, self.block.res_unit2, self.block.res_unit3):
            hidden_TC = _residual(unit, hidden_TC)
        if self.last:
            hidden_TC = _convolve(self.last.conv2, _snake(self.last.snake1, hidden_TC))
        return hidden_TC


def _residual(unit: DacResidualUnit, hidden_TC: Tensor) -> Tensor:
    inner = _snake(unit.snake2, _convolve(unit.conv1, _snake(unit.snake1, hidden_TC)))
    return F.linear(inner, unit.conv2.weight.squeeze(2), unit.conv2.bias).add_(hidden_TC)


def _convolve(layer: nn.Conv1d, hidden_TC: Tensor) -> Tensor:
    # As an image of height 1, because torch supports channels-last layouts only for images.
    image = hidden_TC.t()[None, :, None]
    output = F.conv2d(
        image,
        layer.weight.unsqueeze(2),
        layer.bias,
        padding=(0, int(layer.padding[0])),
        dilation=(1, layer.dilation[0]),
    )
    return output[0, :, 0].t()


def _upsample(layer: nn.ConvTranspose1d, hidden_TC: Tensor) -> Tensor:
    """Apply a transposed convolution with kernel size 2 × stride: a position contributes to its and the next stride."""
    stride, padding = layer.stride[0], int(layer.padding[0])
    both = hidden_TC @ layer.weight.transpose(1, 2).flatten(1)
    num_positions, half = len(hidden_TC), stride * layer.out_channels
    bias = layer.bias.repeat(stride) if layer.bias is not None else both.new_zeros(half)
    output = both.new_empty(num_positions + 1, half)
    torch.add(both[:1, :half], bias, out=output[:1])
    torch.add(both[1:, :half], both[:-1, half:], out=output[1:-1]).add_(bias)
    torch.add(both[-1:, half:], bias, out=output[-1:])
    return output.view(-1, layer.out_channels)[padding : padding + num_positions * stride]


def _snake(snake: Snake1d, hidden_TC: Tensor) -> Tensor:
    """Return x + sin²(αx) / α."""
    alpha = snake.alpha.flatten()
    repeats = math.gcd(len(hidden_TC), max(_MIN_ROW_LENGTH // len(alpha), 1))
    alpha = alpha.repeat(repeats)
    flat = hidden_TC.reshape(-1, len(alpha))
    wave = (flat * alpha).sin_()
    return wave.square_().mul_((alpha + 1e-9).reciprocal()).add_(flat).view_as(hidden_TC)
