"""Planning of decoder batches: windows of many clips that the decoder processes together.

In: the lengths of the clips. Out: batches of windows of equal length that cover every frame of every clip once.
Only `collate` touches tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from higgs_model.codec.receptive_field import ReceptiveField, Window, split_windows


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Size of decoder batches.

    Attributes:
        window_frames: frames kept per window, in addition to its context.
        batch_frames: maximum number of frames per batch, context and padding included.
        multiple_frames: clips shorter than a window are padded to a multiple of this.
    """

    window_frames: int
    batch_frames: int
    multiple_frames: int

    def window_length(self, receptive_field: ReceptiveField) -> int:
        """Return the frames of a full window, context included."""
        return self.window_frames + receptive_field.before + receptive_field.after


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows (clip index, window) to decode together, each padded to `length` frames."""

    rows: tuple[tuple[int, Window], ...]
    length: int


def plan_batches(lengths: Sequence[int], receptive_field: ReceptiveField, shape: BatchShape) -> Iterator[Batch]:
    """Yield batches for clips of the given lengths; windows of similar length share a batch."""
    rows = [
        (clip, window)
        for clip, num_frames in enumerate(lengths)
        for window in split_windows(num_frames, shape.window_length(receptive_field), receptive_field)
    ]
    by_length: dict[int, list[tuple[int, Window]]] = {}
    for clip, window in rows:
        padded = -(-window.length // shape.multiple_frames) * shape.multiple_frames
        by_length.setdefault(min(padded, shape.window_length(receptive_field)), []).append((clip, window))
    for length, group in sorted(by_length.items(), reverse=True):
        step = max(shape.batch_frames // length, 1)
        for first in range(0, len(group), step):
            yield Batch(tuple(group[first : first + step]), length)


def collate(clips_KT: Sequence[Tensor], batch: Batch, num_rows: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Collate the codes of a batch.

    Args:
        num_rows: pad the batch to this many rows and always return the valid frames, so that all batches have one
            shape.

    Returns:
        Codes (B, K, T), zero-padded, and the number of valid frames of each row (B,), or None if all frames are valid.
    """
    first = clips_KT[batch.rows[0][0]]
    codes_BKT = first.new_zeros(num_rows or len(batch.rows), first.shape[0], batch.length)
    for row, (clip, window) in enumerate(batch.rows):
        codes_BKT[row, :, : window.length] = clips_KT[clip][:, window.start : window.stop]
    valid_frames = [window.length for _, window in batch.rows]
    if num_rows is None and min(valid_frames) == batch.length:
        return codes_BKT, None
    valid_frames += [batch.length] * (len(codes_BKT) - len(valid_frames))
    return codes_BKT, torch.tensor(valid_frames, device=first.device)
