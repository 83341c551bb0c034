"""Joins takes and pauses into one recording.

In: pauses as numbers of samples, and the samples of takes in blocks of any size. Out: the samples of the recording, in
order. Every take starts and ends with a short fade, so that joins do not click; pauses are filled with faint noise, so
that they sound like room tone and not like a dropped connection. Positions are counted in samples: pauses are exact,
and the output is as long as all inputs together. The same takes yield the same samples, whatever the block sizes.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

_NOISE_SAMPLES = 1 << 16


class Timeline:
    """One recording under construction.

    Args:
        sample_rate_hz: sample rate of the recording.
        fade_s: length of the fade at each end of a take.
        room_tone_dbfs: level of the noise in pauses, as root mean square; None for digital silence.

    Attributes:
        position: length of the recording so far in samples, including those that `push` still holds back.
    """

    def __init__(self, sample_rate_hz: int, *, fade_s: float = 0.005, room_tone_dbfs: float | None = -75.0) -> None:
        length = round(fade_s * sample_rate_hz)
        self._fade_in = (np.arange(1, length + 1) / (length + 1)).astype(np.float32)
        self._room_tone_rms = 0.0 if room_tone_dbfs is None else 10 ** (room_tone_dbfs / 20)
        self._pending = np.empty(0, np.float32)
        self._take_samples = 0
        self.position = 0

    def pause(self, num_samples: int) -> Samples:
        """Append room tone and return it. Only valid between takes."""
        indices = np.arange(self.position, self.position + num_samples) % _NOISE_SAMPLES
        self.position += num_samples
        return _noise()[indices] * np.float32(self._room_tone_rms)

    def push(self, samples_N: Samples) -> Samples:
        """Append samples to the current take, or start one, and return those that are final.

        The last few samples are held back for the fade at the end of the take.
        """
        faded = samples_N.astype(np.float32, copy=True)
        fade_in = self._fade_in[self._take_samples : self._take_samples + len(faded)]
        faded[: len(fade_in)] *= fade_in
        self._take_samples += len(faded)
        self.position += len(faded)
        pending = np.concatenate([self._pending, faded])
        num_final = max(len(pending) - len(self._fade_in), 0)
        self._pending = pending[num_final:]
        return pending[:num_final]

    def end_take(self) -> Samples:
        """End the current take and return its last samples, faded out."""
        fade_out = self._fade_in[: len(self._pending)][::-1]
        rest, self._pending, self._take_samples = self._pending * fade_out, np.empty(0, np.float32), 0
        return rest


@functools.cache
def _noise() -> Samples:
    """Return white noise with a root mean square of 1, identical in every run."""
    return np.random.RandomState(0).standard_normal(_NOISE_SAMPLES).astype(np.float32)
