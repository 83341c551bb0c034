"""Whether a clip under way is still worth its slot: loops and silence, seen from its codes alone.

In: the frames of a clip so far, in delayed form. Out: a reason to end it, or None. Speech never repeats a stretch of
frames code by code; a model that has lost its way does.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from higgs_model.engine.request import FinishReason


@dataclasses.dataclass(frozen=True)
class WatchLimits:
    """What is still taken for speech.

    Attributes:
        loop_frames: the same frames again and again for so long are a loop; None: not watched.
        loop_period: the longest stretch of frames that is looked for again, at most a third of `loop_frames`.
        silence_frames: silence for so long ends a clip; None: not watched.
        silent_codes: codes of the first codebook that the codec gives to silence.
        every: frames between two looks.
        stalled_steps: steps of the engine in which a request that has a slot must get on.
    """

    loop_frames: int | None = 100
    loop_period: int = 33
    silence_frames: int | None = 200
    silent_codes: frozenset[int] = frozenset()
    every: int = 25
    stalled_steps: int = 1000


def verdict(limits: WatchLimits, frames_TK: NDArray[np.int64]) -> FinishReason | None:
    """Look at the end of a clip, (T, K)."""
    silence = limits.silence_frames
    if silence and limits.silent_codes and len(frames_TK) >= silence:
        silent = np.isin(frames_TK[-silence:, 0], list(limits.silent_codes))
        if silent.all():
            return FinishReason.SILENCE
    loop = limits.loop_frames
    if loop and len(frames_TK) >= loop:
        recent = frames_TK[-loop:]
        for period in _periods(recent, min(limits.loop_period, loop // 3)):
            if (recent[period:] == recent[:-period]).all():
                return FinishReason.LOOP
    return None


def _periods(frames_TK: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """How long ago the last frame was there before: only these can be periods."""
    before = frames_TK[-longest - 1 : -1][::-1]
    return np.flatnonzero((before == frames_TK[-1]).all(axis=1)) + 1
