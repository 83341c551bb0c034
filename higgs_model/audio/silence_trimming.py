"""Streaming removal of silence at the start and the end of a take.

In: samples in blocks of any size. Out: the same samples without the silence before the first and after the last sound,
except for a short padding that soft consonants and breath need. The output does not depend on the block sizes, and
samples are held back only while they may still turn out to be trailing silence. Silence is therefore an absolute level
and not relative to the peak, which is unknown until the end.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

_WINDOW_S = 0.01


@dataclasses.dataclass(frozen=True)
class TrimSettings:
    """What counts as silence, and how much of it is kept.

    Attributes:
        threshold_dbfs: level below which a window of 10 ms is silent, as root mean square.
        keep_head_s, keep_tail_s: silence to keep before the first and after the last sound.
    """

    threshold_dbfs: float = -50.0
    keep_head_s: float = 0.03
    keep_tail_s: float = 0.1


class SilenceTrimmer:
    """Trims the silence at both ends of one take.

    Attributes:
        head_samples, tail_samples: length of the silence found at each end, including what is kept of it.
    """

    def __init__(self, sample_rate_hz: int, settings: TrimSettings = TrimSettings()) -> None:
        self._window = max(round(_WINDOW_S * sample_rate_hz), 1)
        self._threshold_power = 10 ** (settings.threshold_dbfs / 10)
        self._keep_head = round(settings.keep_head_s * sample_rate_hz)
        self._keep_tail = round(settings.keep_tail_s * sample_rate_hz)
        self._pending = np.empty(0, np.float32)
        self._num_measured = 0
        self._started = False
        self.head_samples = self.tail_samples = 0

    def push(self, samples_N: Samples) -> Samples:
        """Add the next samples and return those that are certain to be kept."""
        return self._process(samples_N, last=False)

    def finish(self) -> Samples:
        """End the take and return the samples kept at its end. A take without any sound is empty."""
        rest = self._process(np.empty(0, np.float32), last=True)
        if not self._started:
            self.head_samples += len(self._pending)
            return rest
        self.tail_samples = len(self._pending)
        return np.concatenate([rest, self._pending[: self._keep_tail]])

    def _process(self, samples_N: Samples, *, last: bool) -> Samples:
        self._pending = np.concatenate([self._pending, samples_N.astype(np.float32, copy=False)])
        loud = self._find_loud_windows(last=last)
        if len(loud) == 0:
            if not self._started:
                # Leading silence is buffered only as far as it may be kept.
                excess = max(self._num_measured - self._keep_head, 0)
                self._drop(excess)
                self.head_samples += excess
            return np.empty(0, np.float32)
        start = 0
        if not self._started:
            self._started = True
            start = max(loud[0] - self._keep_head, 0)
            self.head_samples += int(loud[0])
        stop = min(int(loud[-1]) + self._window, len(self._pending))
        ready = self._pending[start:stop]
        self._drop(stop)
        return ready

    def _find_loud_windows(self, *, last: bool) -> NDArray[np.int64]:
        """Measure the new windows of the pending samples, and return the start of each that is not silent."""
        unmeasured = self._pending[self._num_measured :]
        count = -(-len(unmeasured) // self._window) if last else len(unmeasured) // self._window
        padded = np.zeros(count * self._window)
        available = unmeasured[: len(padded)]
        padded[: len(available)] = available
        powers = np.square(padded).reshape(count, self._window).mean(axis=1)
        loud: NDArray[np.int64] = np.flatnonzero(powers >= self._threshold_power) * self._window + self._num_measured
        self._num_measured = min(self._num_measured + count * self._window, len(self._pending))
        return loud

    def _drop(self, count: int) -> None:
        self._pending = self._pending[count:]
        self._num_measured -= min(count, self._num_measured)
