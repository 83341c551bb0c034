"""Estimates how long a text takes to speak, with bounds, from reading rates of different writing systems.

The bounds detect takes that did not end or broke off, so they are generous on both sides; `expected_frames` is the
estimate for planning. Linear in the text; does not depend on chunks, voices or the model.
"""

from __future__ import annotations

import dataclasses
import math
import re

from higgs_model.script.languages import HAN_KANA, UNSPACED

FRAMES_PER_S = 25

_TAG = re.compile(r"<SE(?:_[se])?>[^<]{0,80}</SE(?:_[se])?>|\[SPEAKER\d+\]")
_SOUND_S = (0.2, 2.0, 10.0)
"""Duration of a sound tag: minimum, typical, maximum."""
_START_S = (0.0, 0.3, 3.0)
"""Added to any text: minimum, typical, maximum. Short lines deviate more from the rates."""

_RATES: tuple[tuple[re.Pattern[str], tuple[float, float, float]], ...] = (
    # Characters per second: fastest, typical, slowest. A digit is read as a whole word.
    (re.compile(r"\d"), (12.0, 3.5, 1.2)),
    (re.compile(rf"[{HAN_KANA}]"), (12.0, 5.0, 2.0)),
    (re.compile(r"[\uac00-\ud7a3]"), (12.0, 5.5, 2.2)),
    (re.compile(rf"[{UNSPACED}\u0900-\u0dff]"), (30.0, 11.0, 4.0)),
    (re.compile(r"[^\s\d]"), (35.0, 13.0, 5.5)),
)


@dataclasses.dataclass(frozen=True)
class FrameBudget:
    """Bounds of a take in frames: a shorter one lacks text, a longer one did not end."""

    min_frames: int
    expected_frames: int
    max_frames: int


def estimate_frames(text: str, frames_per_s: float = FRAMES_PER_S) -> FrameBudget:
    """Return the bounds for a chunk's text, including its tags."""
    num_sounds = len([tag for tag in _TAG.findall(text) if tag.startswith("<")])
    text = _TAG.sub(" ", text)
    seconds = [start + num_sounds * sound for start, sound in zip(_START_S, _SOUND_S, strict=True)]
    for pattern, rates in _RATES:
        text, count = pattern.subn("", text)
        seconds = [total + count / rate for total, rate in zip(seconds, rates, strict=True)]
    min_s, expected_s, max_s = seconds
    return FrameBudget(
        min_frames=math.floor(min_s * frames_per_s),
        expected_frames=math.ceil(expected_s * frames_per_s),
        max_frames=math.ceil(max_s * frames_per_s),
    )
