"""Streaming time stretching: faster or slower speech at the same pitch (WSOLA, by audiotsm).

Takes mono float samples in blocks of any size; N input samples yield N / speed output samples. Speed 1 returns the
input unchanged.
"""

from __future__ import annotations

import math

import numpy as np
from audiotsm import wsola
from audiotsm.io.array import ArrayReader, ArrayWriter
from numpy.typing import NDArray

from higgs_model.errors import BadInput

Samples = NDArray[np.float32]

MIN_SPEED, MAX_SPEED = 0.25, 4.0
_FRAME_S = 0.04
"""Longer than two periods of a low voice."""
_MAX_STAGE_SPEED = 2.0
"""Above this, audiotsm 0.1.2 drops too many samples: when its hop exceeds its frame, it skips the samples between two
frames twice."""


class TimeStretcher:
    """Changes the speed of one recording.

    Args:
        speed: 2 halves the duration.
        sample_rate_hz: sample rate of the input.

    Raises:
        BadInput: `speed` is out of range.
    """

    def __init__(self, speed: float, sample_rate_hz: int) -> None:
        if not MIN_SPEED <= speed <= MAX_SPEED:
            raise BadInput(f"speed={speed}; expected {MIN_SPEED} to {MAX_SPEED}")
        num_stages = 0 if speed == 1 else 1 if speed <= _MAX_STAGE_SPEED else 2
        self._stages = [_Stage(speed ** (1 / num_stages), round(_FRAME_S * sample_rate_hz)) for _ in range(num_stages)]

    def push(self, samples_N: Samples) -> Samples:
        """Add samples and return the output that is final."""
        for stage in self._stages:
            samples_N = stage.push(samples_N)
        return samples_N

    def finish(self) -> Samples:
        """End the recording and return the rest of the output."""
        rest = np.empty(0, np.float32)
        for stage in self._stages:
            rest = np.concatenate([stage.push(rest), stage.finish()])
        return rest


class _Stage:
    """Time stretching by a ratio of integer hops that approximates the requested speed."""

    def __init__(self, speed: float, frame: int) -> None:
        hop = min(range(frame // 2, frame // 3, -1), key=lambda hop: abs(round(hop * speed) / hop - speed))
        self._analysis_hop, self._synthesis_hop, self._frame = round(hop * speed), hop, frame
        self._stretcher = wsola(1, frame_length=frame, analysis_hop=self._analysis_hop, synthesis_hop=hop)
        self._num_in = self._num_out = 0

    def push(self, samples_N: Samples) -> Samples:
        self._num_in += len(samples_N)
        return self._limit(self._run(samples_N))

    def finish(self) -> Samples:
        # A sample is output only with its complete frame, so silence is appended to flush the last ones.
        silence = np.zeros(math.ceil(4 * self._frame * max(self._analysis_hop / self._synthesis_hop, 1)), np.float32)
        rest = self._limit(self._run(silence))
        missing = self._expected_out() - self._num_out
        return np.pad(rest, (0, missing))

    def _run(self, samples_N: Samples) -> Samples:
        reader, writer = ArrayReader(samples_N[np.newaxis]), ArrayWriter(1)
        while not reader.empty:
            self._stretcher.read_from(reader)
            self._stretcher.write_to(writer)
        stretched: Samples = writer.data[0].astype(np.float32)
        return stretched

    def _expected_out(self) -> int:
        return self._num_in * self._synthesis_hop // self._analysis_hop

    def _limit(self, stretched_N: Samples) -> Samples:
        """Cut the output to the expected total length, and count it."""
        stretched_N = stretched_N[: self._expected_out() - self._num_out]
        self._num_out += len(stretched_N)
        return stretched_N
