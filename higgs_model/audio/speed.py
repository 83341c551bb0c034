"""Faster or slower speech at the same pitch, while the samples come (WSOLA, by audiotsm).

In: mono float samples in any portions. Out: so many that all of them together are N / speed for N. Nothing is changed
at speed 1.
"""

from __future__ import annotations

import math

import numpy as np
from audiotsm import wsola
from audiotsm.io.array import ArrayReader, ArrayWriter
from numpy.typing import NDArray

from higgs_model.errors import BadInput

Samples = NDArray[np.float32]

SLOWEST, FASTEST = 0.25, 4.0
_FRAME_S = 0.04
"""Longer than two periods of a low voice."""
_FASTEST_STAGE = 2.0
"""Beyond it audiotsm 0.1.2 leaves out more than it should: its hop grows beyond its frame, and what lies between is
taken away twice."""


class SpeedChanger:
    """One recording under way.

    Args:
        speed: 2 takes half the time.
    """

    def __init__(self, speed: float, sample_rate_hz: int) -> None:
        if not SLOWEST <= speed <= FASTEST:
            raise BadInput(f"speed={speed}; wanted {SLOWEST} to {FASTEST}")
        count = 0 if speed == 1 else 1 if speed <= _FASTEST_STAGE else 2
        self._stages = [_Stage(speed ** (1 / count), round(_FRAME_S * sample_rate_hz)) for _ in range(count)]

    def push(self, samples_N: Samples) -> Samples:
        """What is final after these samples."""
        for stage in self._stages:
            samples_N = stage.push(samples_N)
        return samples_N

    def finish(self) -> Samples:
        """The rest."""
        rest = np.empty(0, np.float32)
        for stage in self._stages:
            rest = np.concatenate([stage.push(rest), stage.finish()])
        return rest


class _Stage:
    """A change of speed by a ratio of two whole numbers of samples that is close to what is wanted."""

    def __init__(self, speed: float, frame: int) -> None:
        hop = min(range(frame // 2, frame // 3, -1), key=lambda hop: abs(round(hop * speed) / hop - speed))
        self._taken_hop, self._given_hop, self._frame = round(hop * speed), hop, frame
        self._stretcher = wsola(1, frame_length=frame, analysis_hop=self._taken_hop, synthesis_hop=hop)
        self._taken = self._given = 0

    def push(self, samples_N: Samples) -> Samples:
        self._taken += len(samples_N)
        return self._counted(self._run(samples_N))

    def finish(self) -> Samples:
        # What is last leaves with the frame that it is in, so there is silence behind it.
        silence = np.zeros(math.ceil(4 * self._frame * max(self._taken_hop / self._given_hop, 1)), np.float32)
        rest = self._counted(self._run(silence))
        missing = self._wanted() - self._given
        return np.pad(rest, (0, missing))

    def _run(self, samples_N: Samples) -> Samples:
        reader, writer = ArrayReader(samples_N[np.newaxis]), ArrayWriter(1)
        while not reader.empty:
            self._stretcher.read_from(reader)
            self._stretcher.write_to(writer)
        made: Samples = writer.data[0].astype(np.float32)
        return made

    def _wanted(self) -> int:
        return self._taken * self._given_hop // self._taken_hop

    def _counted(self, made_N: Samples) -> Samples:
        made_N = made_N[: self._wanted() - self._given]
        self._given += len(made_N)
        return made_N
