"""Recordings in memory, and random crops of them that depend only on a seed and a number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgs_model.errors import BadInput

_FULL_SCALE = 32768.0


class Recordings:
    """Recordings of one sample rate, sampled in proportion to their length.

    Args:
        recordings: (N,) each; int16, or floating point with full scale ±1.

    Raises:
        BadInput: there are no samples.
    """

    def __init__(self, recordings: Sequence[NDArray[np.int16] | NDArray[np.float32]]) -> None:
        if not any(len(samples) for samples in recordings):
            raise BadInput("there is no recording to train on.")
        self._samples = np.concatenate([_to_int16(samples) for samples in recordings])
        self._ends = np.cumsum([len(samples) for samples in recordings])

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def crops(self, count: int, num_samples: int, seed: int, number: int) -> Tensor:
        """Return crops (count, num_samples) float32 that depend on `seed` and `number`, zero-padded if needed."""
        random = np.random.default_rng((seed, number))
        crops = np.zeros((count, num_samples), np.int16)
        for crop, position in zip(crops, random.integers(self.num_samples, size=count), strict=True):
            index = int(np.searchsorted(self._ends, position, side="right"))
            first, last = (int(self._ends[index - 1]) if index else 0), int(self._ends[index])
            start = int(random.integers(first, max(last - num_samples, first) + 1))
            part = self._samples[start : min(start + num_samples, last)]
            crop[: len(part)] = part
        return torch.from_numpy(crops.astype(np.float32) / _FULL_SCALE)


def _to_int16(samples: NDArray[np.int16] | NDArray[np.float32]) -> NDArray[np.int16]:
    if samples.dtype == np.int16:
        return samples.astype(np.int16, copy=False)
    return np.clip(samples * _FULL_SCALE, -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)
