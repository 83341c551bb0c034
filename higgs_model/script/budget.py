"""How long a piece of text takes to say: bounds in frames, from how fast each kind of writing is read aloud.

The bounds are for catching takes that ran on or broke off, so they are generous on both sides; `expected` is
the middle that plans are made with. Linear in the text; knows nothing of chunks, voices or the model.
"""

from __future__ import annotations

import dataclasses
import math
import re

from higgs_model.script.languages import HAN_KANA, UNSPACED

FRAMES_PER_S = 25

_TAG = re.compile(r"<SE(?:_[se])?>[^<]{0,80}</SE(?:_[se])?>|\[SPEAKER\d+\]")
_SOUND_S = (0.2, 2.0, 10.0)
"""A sound tag: at least, as a rule, at most."""
_START_S = (0.0, 0.3, 3.0)
"""Around any speech: breath, and the room in which a short line may differ from the rule."""

_KINDS: tuple[tuple[re.Pattern[str], tuple[float, float, float]], ...] = (
    # Characters a second: fastest, as a rule, slowest. Digits stand for whole words.
    (re.compile(r"\d"), (12.0, 3.5, 1.2)),
    (re.compile(rf"[{HAN_KANA}]"), (12.0, 5.0, 2.0)),
    (re.compile(r"[\uac00-\ud7a3]"), (12.0, 5.5, 2.2)),
    (re.compile(rf"[{UNSPACED}\u0900-\u0dff]"), (30.0, 11.0, 4.0)),
    (re.compile(r"[^\s\d]"), (35.0, 13.0, 5.5)),
)


@dataclasses.dataclass(frozen=True)
class FrameBudget:
    """Bounds of a take: shorter than `least` has lost text, longer than `most` does not end."""

    least: int
    expected: int
    most: int


def frame_budget(text: str, frames_per_s: float = FRAMES_PER_S) -> FrameBudget:
    """Bounds for a chunk's text, tags included as they stand."""
    sounds = len([tag for tag in _TAG.findall(text) if tag.startswith("<")])
    text = _TAG.sub(" ", text)
    seconds = [start + sounds * sound for start, sound in zip(_START_S, _SOUND_S, strict=True)]
    for pattern, rates in _KINDS:
        text, count = pattern.subn("", text)
        seconds = [total + count / rate for total, rate in zip(seconds, rates, strict=True)]
    least, expected, most = seconds
    return FrameBudget(
        least=math.floor(least * frames_per_s),
        expected=math.ceil(expected * frames_per_s),
        most=math.ceil(most * frames_per_s),
    )
