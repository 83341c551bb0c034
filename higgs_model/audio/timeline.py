"""Takes and pauses, one after the other, as one recording.

In: pauses of so many samples, and the samples of takes in any portions. Out: the samples of the recording, in order.
Every take begins and ends with a short fade, so that no join clicks; pauses are filled with faint noise, so that they
sound like the room and not like a lost connection. Positions are counted in samples: pauses are exact, and what comes
out is as long as all that went in. The same takes give the same samples, however they were cut into portions.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

_TABLE_SAMPLES = 1 << 16


class Timeline:
    """One recording under way.

    Args:
        fade_s: at each end of a take.
        room_tone_dbfs: level of the noise in pauses, as root mean square; None for digital silence.

    Attributes:
        position: samples that belong to the recording so far, those that `push` still holds back included.
    """

    def __init__(self, sample_rate_hz: int, *, fade_s: float = 0.005, room_tone_dbfs: float | None = -75.0) -> None:
        length = round(fade_s * sample_rate_hz)
        self._rise = (np.arange(1, length + 1) / (length + 1)).astype(np.float32)
        self._tone = 0.0 if room_tone_dbfs is None else 10 ** (room_tone_dbfs / 20)
        self._held = np.empty(0, np.float32)
        self._in_take = 0
        self.position = 0

    def pause(self, num_samples: int) -> Samples:
        """So many samples of room tone. Only between takes."""
        places = np.arange(self.position, self.position + num_samples) % _TABLE_SAMPLES
        self.position += num_samples
        return _noise()[places] * np.float32(self._tone)

    def push(self, samples_N: Samples) -> Samples:
        """Go on with a take, or begin one; the last few samples are held back for the fade at its end."""
        faded = samples_N.astype(np.float32, copy=True)
        rise = self._rise[self._in_take : self._in_take + len(faded)]
        faded[: len(rise)] *= rise
        self._in_take += len(faded)
        self.position += len(faded)
        together = np.concatenate([self._held, faded])
        ready = max(len(together) - len(self._rise), 0)
        self._held = together[ready:]
        return together[:ready]

    def end_take(self) -> Samples:
        """The end of the take under way."""
        fall = self._rise[: len(self._held)][::-1]
        rest, self._held, self._in_take = self._held * fall, np.empty(0, np.float32), 0
        return rest


@functools.cache
def _noise() -> Samples:
    """White noise of level 1, the same in every run."""
    return np.random.RandomState(0).standard_normal(_TABLE_SAMPLES).astype(np.float32)
