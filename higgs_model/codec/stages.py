"""The acoustic decoder as a chain of stages, each of which keeps the context of its own convolutions and no more.

In: latents (T, D) of one clip, in portions of any size. Out: samples (N,), in portions, as soon as they are final.
Joined, they are what `run_decoder` gives for all the latents at once.

A stage is one change of rate. Its convolutions reach a few positions to each side at *their* rate, so what a stage
computes twice where two portions meet shrinks with every stage, and is far less than the frames that the whole
network would need again. Stages cut their input once more, into pieces whose activations fit a processor's caches.

Positions lie in rows and channels in columns, (T, C), the transpose of torch's convention: convolutions are fastest
so on a CPU, 1 × 1 and transposed convolutions are plain matrix products, and activations run over flat memory.
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
from higgs_model.codec.reach import Reach, network_reach, open_positions

_PIECE_BYTES = 4 << 20
"""Activations of a piece: with their temporaries they stay in a processor's caches, and are many enough for it."""
_FLAT_COLUMNS = 64
"""Fewer channels are repeated to rows about this long, for activations that multiply row by row."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the decoder that turns each position into `factor` positions.

    Attributes:
        run: maps (T, C) to (T × factor, C'), with zeros around it as its convolutions pad.
        reach: the positions of the input that take part in what one of them becomes.
        open_positions: of the output, at its end, that may still change while the input goes on.
        piece_positions: of the output, made at a time.
    """

    run: Callable[[Tensor], Tensor]
    factor: int
    reach: Reach
    open_positions: int
    piece_positions: int


def decoder_stages(decoder: DacDecoder) -> list[Stage]:
    """The stages of a decoder: one a block; the first and the last convolution go with their neighbours."""
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
                run=_StageRun(block, first_conv, last_conv),
                factor=block.conv_t1.stride[0],
                reach=network_reach(layers),
                open_positions=open_positions(layers),
                piece_positions=_PIECE_BYTES // position_bytes,
            )
        )
    return stages


def lookahead_frames(stages: Sequence[Stage]) -> int:
    """Frames that must follow a frame before all its samples are final."""
    held_back, hop = 0, 1
    for stage in stages:
        held_back, hop = held_back * stage.factor + stage.open_positions, hop * stage.factor
    return -(-held_back // hop)


def lay_out_for_stages(decoder: DacDecoder) -> None:
    """Store weights in the order in which stages read them, which spares a copy at every call; values stay."""
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
            weight = layer.weight
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)


class DecoderStream:
    """All stages at work on one clip: latents in as they come, samples out as soon as they are final."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._streams = [_StageStream(stage) for stage in stages]

    def push(self, latents_TD: Tensor, *, last: bool) -> Tensor:
        """Take the next latents (T, D), the `last` ones or not, and give the next final samples (N,)."""
        made = [samples_N1.flatten() for samples_N1, _ in self._through(0, latents_TD, last)]
        return torch.cat(made)

    def _through(self, index: int, portion_TC: Tensor, last: bool) -> Iterator[tuple[Tensor, bool]]:
        """Final pieces of stage `index` and of all after it. Each goes to the end before the next one is begun."""
        if index == len(self._streams):
            yield portion_TC, last
            return
        for piece_TC, last_piece in self._streams[index].push(portion_TC, last):
            yield from self._through(index + 1, piece_TC, last_piece)


class _StageStream:
    """A stage at work on one clip. Between pushes it holds the positions that later ones still need."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._held_TC: Tensor | None = None
        self._held_from = 0
        self._done = 0

    def push(self, new_TC: Tensor, last: bool) -> Iterator[tuple[Tensor, bool]]:
        """Take positions (T, C), and give pieces (T', C') of the result in order, at least one, and which is last."""
        stage, reach, factor = self.stage, self.stage.reach, self.stage.factor
        held_TC = new_TC if self._held_TC is None else torch.cat([self._held_TC, new_TC])
        held_from, received = self._held_from, self._held_from + len(held_TC)
        begun = self._done
        final = max(received * factor - (0 if last else stage.open_positions), begun)
        self._done, self._held_from = final, max(final // factor - reach.before, held_from)
        # A copy: a view would keep the whole portion alive.
        self._held_TC = held_TC[self._held_from - held_from :].clone()
        for start, stop in _even_pieces(begun, final, stage.piece_positions):
            first = max(start // factor - reach.before, 0)
            made = stage.run(held_TC[first - held_from : min(-(-stop // factor) + reach.after, received) - held_from])
            yield made[start - first * factor : stop - first * factor], last and stop == final


def _even_pieces(start: int, stop: int, longest: int) -> Iterator[tuple[int, int]]:
    """Cut [start, stop) into as few pieces as may be, of nearly one length; an empty range is one empty piece."""
    count = max(-(-(stop - start) // longest), 1)
    for index in range(count):
        yield start + (stop - start) * index // count, start + (stop - start) * (index + 1) // count


@dataclasses.dataclass(frozen=True)
class _StageRun:
    """The arithmetic of one stage: a block, and the whole decoder's first or last convolution where it has them."""

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
    # As an image one pixel high, which is the shape for which torch knows rows of channels.
    image = hidden_TC.t()[None, :, None]
    made = F.conv2d(
        image,
        layer.weight.unsqueeze(2),
        layer.bias,
        padding=(0, int(layer.padding[0])),
        dilation=(1, layer.dilation[0]),
    )
    return made[0, :, 0].t()


def _upsample(layer: nn.ConvTranspose1d, hidden_TC: Tensor) -> Tensor:
    """A transposed convolution whose kernel is two strides long: every position adds to its own and the next stride."""
    stride, padding = layer.stride[0], int(layer.padding[0])
    both = hidden_TC @ layer.weight.transpose(1, 2).flatten(1)
    num_positions, half = len(hidden_TC), stride * layer.out_channels
    bias = layer.bias.repeat(stride) if layer.bias is not None else both.new_zeros(half)
    made = both.new_empty(num_positions + 1, half)
    torch.add(both[:1, :half], bias, out=made[:1])
    torch.add(both[1:, :half], both[:-1, half:], out=made[1:-1]).add_(bias)
    torch.add(both[-1:, half:], bias, out=made[-1:])
    return made.view(-1, layer.out_channels)[padding : padding + num_positions * stride]


def _snake(snake: Snake1d, hidden_TC: Tensor) -> Tensor:
    """x + sin²(αx) / α."""
    alpha = snake.alpha.flatten()
    repeats = math.gcd(len(hidden_TC), max(_FLAT_COLUMNS // len(alpha), 1))
    alpha = alpha.repeat(repeats)
    flat = hidden_TC.reshape(-1, len(alpha))
    wave = (flat * alpha).sin_()
    return wave.square_().mul_((alpha + 1e-9).reciprocal()).add_(flat).view_as(hidden_TC)
