"""Silence at the ends of a take, dropped while the take is still being made.

In: samples in any portions. Out: the same without the silence before the first sound and after the last, but for a
little room that soft consonants and breath need. What is given out does not depend on the portions, and nothing is
held back longer than it may still turn out to be the silence at the end: therefore silence is a level, not a share of
a loudest moment that nobody knows yet.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

_WINDOW_S = 0.01


@dataclasses.dataclass(frozen=True)
class Silence:
    """What counts as silence, and how much of it stays.

    Attributes:
        below_dbfs: level, as root mean square over 10 ms.
        keep_head_s, keep_tail_s: what stays before the first and after the last sound.
    """

    below_dbfs: float = -50.0
    keep_head_s: float = 0.03
    keep_tail_s: float = 0.1


class EdgeTrimmer:
    """The ends of one take.

    Attributes:
        head_samples, tail_samples: silence that was found at the ends, what stayed of it included.
    """

    def __init__(self, sample_rate_hz: int, silence: Silence = Silence()) -> None:
        self._window = max(round(_WINDOW_S * sample_rate_hz), 1)
        self._power = 10 ** (silence.below_dbfs / 10)
        self._keep_head = round(silence.keep_head_s * sample_rate_hz)
        self._keep_tail = round(silence.keep_tail_s * sample_rate_hz)
        self._held = np.empty(0, np.float32)
        self._measured = 0
        self._started = False
        self.head_samples = self.tail_samples = 0

    def push(self, samples_N: Samples) -> Samples:
        """Take the next samples, and give those that are known to lie between sounds."""
        return self._through(samples_N, last=False)

    def finish(self) -> Samples:
        """Say that no sample follows, and give what stays at the end. A take without any sound is empty."""
        rest = self._through(np.empty(0, np.float32), last=True)
        if not self._started:
            self.head_samples += len(self._held)
            return rest
        self.tail_samples = len(self._held)
        return np.concatenate([rest, self._held[: self._keep_tail]])

    def _through(self, samples_N: Samples, *, last: bool) -> Samples:
        self._held = np.concatenate([self._held, samples_N.astype(np.float32, copy=False)])
        loud = self._loud_windows(last=last)
        if len(loud) == 0:
            if not self._started:
                # Of the silence at the start only what may stay is remembered.
                spare = max(self._measured - self._keep_head, 0)
                self._drop(spare)
                self.head_samples += spare
            return np.empty(0, np.float32)
        first = 0
        if not self._started:
            self._started = True
            first = max(loud[0] - self._keep_head, 0)
            self.head_samples += int(loud[0])
        stop = min(int(loud[-1]) + self._window, len(self._held))
        made = self._held[first:stop]
        self._drop(stop)
        return made

    def _loud_windows(self, *, last: bool) -> NDArray[np.int64]:
        """Where in the held samples windows begin that are not silent, among those not measured before."""
        fresh = self._held[self._measured :]
        count = -(-len(fresh) // self._window) if last else len(fresh) // self._window
        filled = np.zeros(count * self._window)
        part = fresh[: len(filled)]
        filled[: len(part)] = part
        powers = np.square(filled).reshape(count, self._window).mean(axis=1)
        loud: NDArray[np.int64] = np.flatnonzero(powers >= self._power) * self._window + self._measured
        self._measured = min(self._measured + count * self._window, len(self._held))
        return loud

    def _drop(self, count: int) -> None:
        self._held = self._held[count:]
        self._measured -= min(count, self._measured)
