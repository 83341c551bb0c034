"""Which windows of which clips the decoder runs together.

In: the lengths of the clips. Out: batches of windows of one length, covering every frame of every clip once.
Touches no tensor but in `gather`, which lays the codes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from higgs_model.codec.reach import Reach, Window, cut


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """How large batches are: a window keeps `window_frames` frames besides its context; a batch has up to
    `batch_frames` frames in all; clips shorter than a window are filled up to a multiple of
    `multiple_frames`.
    """

    window_frames: int
    batch_frames: int
    multiple_frames: int

    def window_length(self, reach: Reach) -> int:
        """Frames of a whole window, context and all."""
        return self.window_frames + reach.before + reach.after


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows (clip, window) that go through the decoder together, each filled up to `length` frames."""

    rows: tuple[tuple[int, Window], ...]
    length: int


def plan(lengths: Sequence[int], reach: Reach, shape: BatchShape) -> Iterator[Batch]:
    """Batches for clips of the given lengths; windows of similar length run together."""
    rows = [
        (clip, window)
        for clip, num_frames in enumerate(lengths)
        for window in cut(num_frames, shape.window_length(reach), reach)
    ]
    by_length: dict[int, list[tuple[int, Window]]] = {}
    for clip, window in rows:
        filled = -(-window.length // shape.multiple_frames) * shape.multiple_frames
        by_length.setdefault(min(filled, shape.window_length(reach)), []).append((clip, window))
    for length, members in sorted(by_length.items(), reverse=True):
        step = max(shape.batch_frames // length, 1)
        for first in range(0, len(members), step):
            yield Batch(tuple(members[first : first + step]), length)


def gather(clips_KT: Sequence[Tensor], batch: Batch, num_rows: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Lay out a batch.

    Args:
        num_rows: fill the batch up to so many rows, and always say which frames are valid: one shape for all.

    Returns:
        codes (B, K, T), zeros beyond each row's end, and each row's valid frames (B,), or None when all are.
    """
    first = clips_KT[batch.rows[0][0]]
    codes_BKT = first.new_zeros(num_rows or len(batch.rows), first.shape[0], batch.length)
    for row, (clip, window) in enumerate(batch.rows):
        codes_BKT[row, :, : window.length] = clips_KT[clip][:, window.start : window.stop]
    frames = [window.length for _, window in batch.rows]
    if num_rows is None and min(frames) == batch.length:
        return codes_BKT, None
    frames += [batch.length] * (len(codes_BKT) - len(frames))
    return codes_BKT, torch.tensor(frames, device=first.device)
