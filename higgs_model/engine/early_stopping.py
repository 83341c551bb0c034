"""Detects clips that are not worth continuing, loops and silence, from their codes alone.

In: the frames of a clip so far, in delayed form. Out: a reason to end it, or None. Speech never repeats a run of frames
code by code; a degenerate generation does.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from higgs_model.engine.request import FinishReason


@dataclasses.dataclass(frozen=True)
class EarlyStoppingLimits:
    """Thresholds of loop, silence and stall detection.

    Attributes:
        loop_frames: a clip whose last frames repeat for this long is a loop; None disables detection.
        loop_period: the longest period to detect, at most a third of `loop_frames`.
        silence_frames: a clip that is silent for this long is ended; None disables detection.
        silent_codes: codes of the first codebook that the codec assigns to silence.
        check_every: frames between two checks.
        stalled_steps: engine steps within which a request that has a slot must make progress.
    """

    loop_frames: int | None = 100
    loop_period: int = 33
    silence_frames: int | None = 200
    silent_codes: frozenset[int] = frozenset()
    check_every: int = 25
    stalled_steps: int = 1000


def early_stop_reason(limits: EarlyStoppingLimits, frames_TK: NDArray[np.int64]) -> FinishReason | None:
    """Return SILENCE or LOOP if the end of a clip (T, K) is either, else None."""
    silence = limits.silence_frames
    if silence and limits.silent_codes and len(frames_TK) >= silence:
        silent = np.isin(frames_TK[-silence:, 0], list(limits.silent_codes))
        if silent.all():
            return FinishReason.SILENCE
    loop = limits.loop_frames
    if loop and len(frames_TK) >= loop:
        recent = frames_TK[-loop:]
        for period in _candidate_periods(recent, min(limits.loop_period, loop // 3)):
            if (recent[period:] == recent[:-period]).all():
                return FinishReason.LOOP
    return None


def _candidate_periods(frames_TK: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Return the distances at which the last frame occurred before: only these can be periods."""
    previous = frames_TK[-longest - 1 : -1][::-1]
    return np.flatnonzero((previous == frames_TK[-1]).all(axis=1)) + 1
