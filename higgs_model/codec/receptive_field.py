"""Receptive fields of convolutional networks, and windows that split a long sequence without changing the result.

In: the convolutions of a network in signal order. Out: its receptive field in frames (positions on the coarse side of
the network), and windows over a sequence of frames with that much real context.

Invariant: the kept parts of the windows tile the sequence exactly once and in order. Each kept part has
`receptive_field.before` frames of context before it and `receptive_field.after` after it, unless the sequence starts or
ends there. Every layer pads with its own zeros, so the start or end of a sequence must be the start or end of a window;
zero-padding the input is not equivalent. Operates on lengths only, never on samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from torch import nn

Convolution = nn.Conv1d | nn.ConvTranspose1d


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """Frames before and after a frame that its output depends on."""

    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Window:
    """Frames [start, stop) are the network's input; the output of [keep_start, keep_stop) is exact and is kept."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def receptive_field_of(convolutions: Sequence[Convolution]) -> ReceptiveField:
    """Return a network's receptive field in frames.

    In a decoder (transposed convolutions) a frame is one input position, and its output is all samples of that frame.
    In an encoder a frame is one output position, and the receptive field is measured in input hops, rounded up.
    """
    hop = Fraction(1)
    for layer in convolutions:
        hop = hop * layer.stride[0] if isinstance(layer, nn.ConvTranspose1d) else hop / layer.stride[0]
    if hop >= 1:
        first, last = _input_span(convolutions, 0, int(hop) - 1)
        return ReceptiveField(before=max(-first, 0), after=max(last, 0))
    hop_samples = int(1 / hop)
    first, last = _input_span(convolutions, 0, 0)
    return ReceptiveField(
        before=max(math.ceil(-first / hop_samples), 0),
        after=max(math.ceil((last + 1 - hop_samples) / hop_samples), 0),
    )


def lookahead_positions(convolutions: Sequence[Convolution]) -> int:
    """Return how many positions at the end of a decoder's output depend on input that has not arrived yet."""
    count = 0
    while _input_span(convolutions, 0, -count - 1)[1] >= 0:
        count += 1
    return count


def _input_span(convolutions: Sequence[Convolution], first: int, last: int) -> tuple[int, int]:
    """Return the first and last input position that the output positions first … last depend on."""
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
        raise TypeError(f"convolution padding is {padding!r}; expected a number")
    return padding


def conv_output_length(convolutions: Iterable[nn.Conv1d], length: int) -> int:
    """Return the output length for an input of `length` positions; 0 if the input is too short for a layer."""
    for layer in convolutions:
        span = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
        length = (length + 2 * _padding(layer) - span) // layer.stride[0] + 1
        if length <= 0:
            return 0
    return length


def split_windows(num_frames: int, window: int, receptive_field: ReceptiveField) -> list[Window]:
    """Split [0, num_frames) into windows: a single one if it fits, else all exactly `window` frames long.

    The first window starts at frame 0, and the last one ends at the last frame and overlaps its neighbour as needed.
    """
    if window <= receptive_field.before + receptive_field.after:
        raise ValueError(f"a window of {window} frames is no longer than its context ({receptive_field})")
    if num_frames <= window:
        return [Window(0, num_frames, 0, num_frames)] if num_frames else []
    windows = []
    done = 0
    while done < num_frames:
        start = min(max(done - receptive_field.before, 0), num_frames - window)
        stop = start + window
        keep_stop = num_frames if stop == num_frames else stop - receptive_field.after
        windows.append(Window(start, stop, done, keep_stop))
        done = keep_stop
    return windows
