"""Quality checks of takes, based on their signal and duration; the words are not checked.

Takes the trimmed samples of a take and the duration expected from its text; returns `TakeMeasurements` and the names of
its faults. A take without faults is good; otherwise the best take is the one with the lowest `severity`. Only a speech
recognizer can check the words: `TranscriptCheck` is the interface for one.
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
"""All faults with their weights; takes are compared by the sum of the weights of their faults."""


class TranscriptCheck(Protocol):
    """A check of the spoken words, such as a speech recogniser."""

    def __call__(self, samples_N: Samples, sample_rate_hz: int, text: str, language: str | None) -> Sequence[str]:
        """Return a description of each deviation from the text; empty if there is none."""


@dataclasses.dataclass(frozen=True)
class TakeLimits:
    """Limits of a good take.

    Attributes:
        chars_per_s: minimum and maximum speaking rate, for alphabetic text of at least `min_rated_chars` characters.
            Other text is checked against the bounds of the frame budget only.
        min_rated_chars: shorter text has no speaking rate.
        max_inner_silence_s: longest pause within the take.
        max_edge_silence_s: longest silence trimmed from either end.
        max_clipped_fraction: fraction of samples at full scale.
        min_level_dbfs: level of the loudest second, as root mean square.
        silence_threshold_dbfs: level below which a window of the take is silent, as root mean square.
    """

    chars_per_s: tuple[float, float] = (8.0, 25.0)
    min_rated_chars: int = 20
    max_inner_silence_s: float = 2.0
    max_edge_silence_s: float = 1.5
    max_clipped_fraction: float = 0.001
    min_level_dbfs: float = -45.0
    silence_threshold_dbfs: float = -50.0


@dataclasses.dataclass(frozen=True)
class ExpectedTake:
    """Properties of a take that follow from its text.

    Attributes:
        num_chars: spoken characters, without whitespace and tags; None if a speaking rate is not meaningful.
        min_s, max_s: bounds on the duration.
    """

    num_chars: int | None
    min_s: float
    max_s: float


@dataclasses.dataclass(frozen=True)
class TakeMeasurements:
    """Measurements of a take.

    Attributes:
        duration_s: duration of the trimmed take.
        inner_silence_s: longest pause within the take.
        peak_dbfs: sample peak.
        loudest_second_dbfs: level of the loudest second, as root mean square.
        clipped_fraction: fraction of samples at full scale.
    """

    duration_s: float
    inner_silence_s: float
    peak_dbfs: float
    loudest_second_dbfs: float
    clipped_fraction: float


def measure_take(samples_N: Samples, sample_rate_hz: int, silence_threshold_dbfs: float = -50.0) -> TakeMeasurements:
    """Measure a trimmed take."""
    if len(samples_N) == 0:
        return TakeMeasurements(0.0, 0.0, -math.inf, -math.inf, 0.0)
    magnitudes = np.abs(samples_N)
    window = max(round(_WINDOW_S * sample_rate_hz), 1)
    count = -(-len(samples_N) // window)
    squares = np.zeros(count * window)
    squares[: len(samples_N)] = np.square(samples_N, dtype=np.float64)
    powers = squares.reshape(count, window).mean(axis=1)
    loud = np.flatnonzero(powers >= 10 ** (silence_threshold_dbfs / 10))
    gaps = np.diff(loud) - 1
    windows_per_second = min(max(round(1 / _WINDOW_S), 1), count)
    second_powers = np.convolve(powers, np.full(windows_per_second, 1 / windows_per_second), "valid")
    return TakeMeasurements(
        duration_s=len(samples_N) / sample_rate_hz,
        inner_silence_s=float(gaps.max() * window / sample_rate_hz) if len(gaps) else 0.0,
        peak_dbfs=_power_to_db(float(magnitudes.max()) ** 2),
        loudest_second_dbfs=_power_to_db(float(second_powers.max())),
        clipped_fraction=float((magnitudes >= _CLIPPED_LEVEL).mean()),
    )


def find_faults(
    measured: TakeMeasurements,
    expected: ExpectedTake,
    *,
    head_silence_s: float,
    tail_silence_s: float,
    limits: TakeLimits,
) -> list[str]:
    """Return the names of a take's faults, which are keys of `SEVERITY`.

    Args:
        head_silence_s, tail_silence_s: silence trimmed from the ends of the take.
    """
    if measured.duration_s == 0:
        return ["no_audio"]
    chars_per_s = _speaking_rate(measured, expected, limits)
    level_dbfs = measured.loudest_second_dbfs
    checks = {
        "silent": level_dbfs < limits.silence_threshold_dbfs,
        "too_fast": measured.duration_s < expected.min_s or chars_per_s > limits.chars_per_s[1],
        "too_slow": measured.duration_s > expected.max_s or chars_per_s < limits.chars_per_s[0],
        "inner_silence": measured.inner_silence_s > limits.max_inner_silence_s,
        "edge_silence": max(head_silence_s, tail_silence_s) > limits.max_edge_silence_s,
        "clipped": measured.clipped_fraction > limits.max_clipped_fraction,
        "too_quiet": limits.silence_threshold_dbfs <= level_dbfs < limits.min_level_dbfs,
    }
    return [name for name, failed in checks.items() if failed]


def severity(names: Sequence[str]) -> int:
    """Return the total weight of a take's faults; 0 for none."""
    return sum(SEVERITY[name] for name in names)


def _speaking_rate(measured: TakeMeasurements, expected: ExpectedTake, limits: TakeLimits) -> float:
    """Return characters per second, or the middle of the allowed range if a rate is not meaningful."""
    if expected.num_chars is None or expected.num_chars < limits.min_rated_chars:
        return math.sqrt(limits.chars_per_s[0] * limits.chars_per_s[1])
    return expected.num_chars / measured.duration_s


def _power_to_db(power: float) -> float:
    return 10 * math.log10(power) if power > 0 else -math.inf
