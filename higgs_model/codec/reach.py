"""How far a convolutional network sees, and how a long sequence is cut so that nothing is lost at the cuts.

In: the convolutions of a network in the order in which a signal passes them. Out: how many units before and
after a unit of the coarse sequence (a frame) take part in it, and windows over the sequence with that much
real context.

Invariant: the parts that windows keep tile the sequence once and in order, and each kept part has
`reach.before` units of context before it and `reach.after` after it, unless the sequence begins or ends
there. A network computes zero padding anew in every layer, so a real beginning or end must be the beginning
or end of a window; it can never be imitated by zeros. Nothing here touches a sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from torch import nn

Convolution = nn.Conv1d | nn.ConvTranspose1d


@dataclasses.dataclass(frozen=True)
class Reach:
    """Frames before and after a frame that its samples depend on, or that depend on its samples."""

    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Window:
    """Frames [start, stop) go through the network; of them [keep_start, keep_stop) are right and are kept."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def network_reach(convolutions: Sequence[Convolution]) -> Reach:
    """What one frame of the coarse side needs or touches.

    Walks back from the output positions of one unit to the input positions that take part in them. For a
    decoder (transposed convolutions) the unit is a frame of its input; for an encoder it is one output
    position, and the reach is counted in input hops.
    """
    hop = Fraction(1)
    for layer in convolutions:
        hop = hop * layer.stride[0] if isinstance(layer, nn.ConvTranspose1d) else hop / layer.stride[0]
    if hop >= 1:
        first, last = _needed(convolutions, 0, int(hop) - 1)
        return Reach(before=max(-first, 0), after=max(last, 0))
    hop_samples = int(1 / hop)
    first, last = _needed(convolutions, 0, 0)
    return Reach(
        before=max(math.ceil(-first / hop_samples), 0),
        after=max(math.ceil((last + 1 - hop_samples) / hop_samples), 0),
    )


def open_positions(convolutions: Sequence[Convolution]) -> int:
    """How many positions at the end of a decoder's output may still change while its input goes on."""
    count = 0
    while _needed(convolutions, 0, -count - 1)[1] >= 0:
        count += 1
    return count


def _needed(convolutions: Sequence[Convolution], first: int, last: int) -> tuple[int, int]:
    """The first and last input position that the output positions first … last depend on."""
    for layer in reversed(convolutions):
        span, stride, padding = (
            layer.dilation[0] * (layer.kernel_size[0] - 1),
            layer.stride[0],
            _padding(layer),
        )
        if isinstance(layer, nn.ConvTranspose1d):
            first, last = -((span - first - padding) // stride), (last + padding) // stride
        else:
            first, last = first * stride - padding, last * stride - padding + span
    return first, last


def _padding(layer: Convolution) -> int:
    padding = layer.padding[0]
    if isinstance(padding, str):
        raise TypeError(f"padding {padding!r} has no number; give the convolution a number")
    return padding


def conv_output_length(convolutions: Iterable[nn.Conv1d], length: int) -> int:
    """Positions that come out when `length` positions go in; 0 when a layer has too few to work on."""
    for layer in convolutions:
        span = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
        length = (length + 2 * _padding(layer) - span) // layer.stride[0] + 1
        if length <= 0:
            return 0
    return length


def cut(num_frames: int, window: int, reach: Reach) -> list[Window]:
    """Windows over [0, num_frames): one alone if it fits, else all exactly `window` frames long.

    The first begins at frame 0 and the last ends at the last frame, so that only real ends are ends; the last
    one overlaps its neighbour as much as it must.
    """
    if window <= reach.before + reach.after:
        raise ValueError(f"a window of {window} frames keeps nothing of a reach of {reach}")
    if num_frames <= window:
        return [Window(0, num_frames, 0, num_frames)] if num_frames else []
    windows = []
    kept = 0
    while kept < num_frames:
        start = min(max(kept - reach.before, 0), num_frames - window)
        stop = start + window
        keep_stop = num_frames if stop == num_frames else stop - reach.after
        windows.append(Window(start, stop, kept, keep_stop))
        kept = keep_stop
    return windows
