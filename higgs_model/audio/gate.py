"""Whether a take can be kept: what its sound and its length say, without knowing what was said.

In: the trimmed samples of a take, and how much text it had to say. Out: `Measures`, and the names of its faults. A take
without faults is good; of several with faults the one with the least is the best (`severity`). Whether the right
words were said only a recogniser knows: `TranscriptCheck` is where one is plugged in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

_WINDOW_S = 0.02
_CLIPPED_LEVEL = 0.999

SEVERITY = {
    "no_audio": 100,
    "invalid": 50,
    "silent": 50,
    "loop": 30,
    "not_ended": 20,
    "text": 15,
    "too_slow": 10,
    "too_fast": 10,
    "inner_silence": 5,
    "edge_silence": 3,
    "clipped": 2,
    "too_quiet": 2,
}
"""Every fault there is, and how much worse than none it is: the sums of two takes are compared."""


class TranscriptCheck(Protocol):
    """Something that listens, such as a speech recogniser."""

    def __call__(self, samples_N: Samples, sample_rate_hz: int, text: str, language: str | None) -> Sequence[str]:
        """What is wrong with what was said, in words; empty when it is the text."""


@dataclasses.dataclass(frozen=True)
class TakeLimits:
    """What a good take keeps within.

    Attributes:
        chars_per_s: slowest and fastest, for alphabetic writing of at least `rated_chars` characters; what is
            shorter, or written otherwise, is held to the bounds of the frame budget alone.
        inner_silence_s: the longest gap inside.
        edge_silence_s: the longest silence that was cut off at either end.
        clipped_share: of samples at full scale.
        quietest_dbfs: level of the loudest second, as root mean square.
        silent_below_dbfs: what counts as silence inside a take.
    """

    chars_per_s: tuple[float, float] = (8.0, 25.0)
    rated_chars: int = 20
    inner_silence_s: float = 2.0
    edge_silence_s: float = 1.5
    clipped_share: float = 0.001
    quietest_dbfs: float = -45.0
    silent_below_dbfs: float = -50.0


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a take had to say.

    Attributes:
        letters: characters that are spoken, without blanks and tags; None when a rate says nothing about them.
        least_s, most_s: bounds on its length.
    """

    letters: int | None
    least_s: float
    most_s: float


@dataclasses.dataclass(frozen=True)
class Measures:
    """What a take is like; levels in dB of full scale."""

    duration_s: float
    inner_silence_s: float
    peak_db: float
    loudest_s_db: float
    clipped_share: float


def measure(samples_N: Samples, sample_rate_hz: int, silent_below_dbfs: float = -50.0) -> Measures:
    """Measure a trimmed take."""
    if len(samples_N) == 0:
        return Measures(0.0, 0.0, -math.inf, -math.inf, 0.0)
    level = np.abs(samples_N)
    window = max(round(_WINDOW_S * sample_rate_hz), 1)
    count = -(-len(samples_N) // window)
    squares = np.zeros(count * window)
    squares[: len(samples_N)] = np.square(samples_N, dtype=np.float64)
    powers = squares.reshape(count, window).mean(axis=1)
    loud = np.flatnonzero(powers >= 10 ** (silent_below_dbfs / 10))
    gaps = np.diff(loud) - 1
    a_second = max(round(1 / _WINDOW_S), 1)
    seconds = np.convolve(powers, np.full(min(a_second, count), 1 / min(a_second, count)), "valid")
    return Measures(
        duration_s=len(samples_N) / sample_rate_hz,
        inner_silence_s=float(gaps.max() * window / sample_rate_hz) if len(gaps) else 0.0,
        peak_db=_db(float(level.max()) ** 2),
        loudest_s_db=_db(float(seconds.max())),
        clipped_share=float((level >= _CLIPPED_LEVEL).mean()),
    )


def faults(
    measures: Measures, wanted: Wanted, *, head_silence_s: float, tail_silence_s: float, limits: TakeLimits
) -> list[str]:
    """Names of what is wrong with a take, those of `SEVERITY`."""
    if measures.duration_s == 0:
        return ["no_audio"]
    found = {
        "silent": measures.loudest_s_db < limits.silent_below_dbfs,
        "too_fast": measures.duration_s < wanted.least_s or _rate(measures, wanted, limits) > limits.chars_per_s[1],
        "too_slow": measures.duration_s > wanted.most_s or _rate(measures, wanted, limits) < limits.chars_per_s[0],
        "inner_silence": measures.inner_silence_s > limits.inner_silence_s,
        "edge_silence": max(head_silence_s, tail_silence_s) > limits.edge_silence_s,
        "clipped": measures.clipped_share > limits.clipped_share,
        "too_quiet": limits.silent_below_dbfs <= measures.loudest_s_db < limits.quietest_dbfs,
    }
    return [name for name, there in found.items() if there]


def severity(names: Sequence[str]) -> int:
    """How bad faults are together; 0 for none."""
    return sum(SEVERITY[name] for name in names)


def _rate(measures: Measures, wanted: Wanted, limits: TakeLimits) -> float:
    """Characters a second; in the middle of what is allowed where a rate says nothing."""
    if wanted.letters is None or wanted.letters < limits.rated_chars:
        return math.sqrt(limits.chars_per_s[0] * limits.chars_per_s[1])
    return wanted.letters / measures.duration_s


def _db(power: float) -> float:
    return 10 * math.log10(power) if power > 0 else -math.inf
