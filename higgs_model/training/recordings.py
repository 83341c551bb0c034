"""Recordings in memory, and crops of them that depend on a seed and a number alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from higgs_model.errors import BadInput

_FULL_SCALE = 32768.0


class Recordings:
    """Recordings of one sample rate; a long one is met as often as its length says.

    Args:
        recordings: (N,) each, int16, or floats of full scale ±1.
    """

    def __init__(self, recordings: Sequence[NDArray[np.int16] | NDArray[np.float32]]) -> None:
        if not any(len(samples) for samples in recordings):
            raise BadInput("there is no recording to learn from.")
        self._samples = np.concatenate([_sixteen_bits(samples) for samples in recordings])
        self._ends = np.cumsum([len(samples) for samples in recordings])

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    def crops(self, count: int, num_samples: int, seed: int, number: int) -> Tensor:
        """Crops (count, num_samples) float32, drawn by `seed` and `number`; what a recording lacks is silence."""
        draw = np.random.default_rng((seed, number))
        crops = np.zeros((count, num_samples), np.int16)
        for crop, place in zip(crops, draw.integers(self.num_samples, size=count), strict=True):
            index = int(np.searchsorted(self._ends, place, side="right"))
            first, last = (int(self._ends[index - 1]) if index else 0), int(self._ends[index])
            start = int(draw.integers(first, max(last - num_samples, first) + 1))
            part = self._samples[start : min(start + num_samples, last)]
            crop[: len(part)] = part
        return torch.from_numpy(crops.astype(np.float32) / _FULL_SCALE)


def _sixteen_bits(samples: NDArray[np.int16] | NDArray[np.float32]) -> NDArray[np.int16]:
    if samples.dtype == np.int16:
        return samples.astype(np.int16, copy=False)
    return np.clip(samples * _FULL_SCALE, -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)
