"""Loudness according to ITU-R BS.1770: K-weighted, gated level in LUFS, and true peak.

In: mono samples and their rate, at once or in blocks of any size. Out: integrated loudness, true peak, and the constant
gain that follows from both. The filters come from the Audio EQ Cookbook (high shelf of 4 dB at 1500 Hz, high pass at
38 Hz), as in pyloudnorm, for any sample rate.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

_BLOCK_S, _STEP_S, _STEPS_PER_BLOCK = 0.4, 0.1, 4
_ABSOLUTE_GATE_LUFS, _RELATIVE_GATE_LU = -70.0, -10.0
_OFFSET_LUFS = -0.691
"""Calibrates a full-scale sine of 1 kHz to −3.01 LUFS."""
_PEAK_TAPS = 24
"""Per phase; the example in BS.1770 has 12."""
_IMPULSE_S = 0.15
"""Length of the K-weighting response. Its slowest pole is at 38 Hz, so the truncated tail is below 1e-13."""


def integrated_loudness_lufs(samples_N: Samples, sample_rate_hz: int) -> float:
    """Return the loudness of a recording; −∞ for silence, or if it is shorter than one block of 0.4 s."""
    meter = LoudnessMeter(sample_rate_hz)
    meter.add(samples_N)
    return meter.integrated_lufs


def normalize_loudness(samples_N: Samples, sample_rate_hz: int, target_lufs: float = -23.0) -> Samples:
    """Scale a recording to the target loudness by a constant gain; return it unchanged if it has no loudness."""
    loudness_lufs = integrated_loudness_lufs(samples_N, sample_rate_hz)
    if loudness_lufs == -math.inf:
        return samples_N
    return samples_N * np.float32(10 ** ((target_lufs - loudness_lufs) / 20))


class LoudnessMeter:
    """Streaming measurement of integrated loudness. Memory: 36,000 numbers per hour of audio."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._rate_hz = sample_rate_hz
        self._impulse = _k_impulse(sample_rate_hz)
        self._overlap = np.zeros(len(self._impulse) - 1)
        self._num_samples = 0
        self._steps: list[float] = []
        """Energy of each completed step of 0.1 s."""
        self._step_energy = 0.0

    def add(self, samples_N: Samples) -> None:
        """Add the next samples."""
        size = 1 << (4 * len(self._impulse)).bit_length()
        step, response = size - len(self._impulse) + 1, _frequency_response(self._rate_hz, size)
        for start in range(0, len(samples_N), step):
            block = samples_N[start : start + step].astype(np.float64)
            filtered = np.fft.irfft(np.fft.rfft(block, size) * response, size)
            filtered[: len(self._overlap)] += self._overlap
            # Overlap-add: the tail of the response extends into the next block.
            self._overlap = filtered[len(block) : len(block) + len(self._overlap)]
            self._accumulate(np.square(filtered[: len(block)]))

    @property
    def integrated_lufs(self) -> float:
        """Loudness of all samples so far; −∞ for silence, or below 0.4 s."""
        duration_s = self._num_samples / self._rate_hz
        if duration_s < _BLOCK_S:
            return -math.inf
        num_blocks = round((duration_s - _BLOCK_S) / _STEP_S) + 1
        energy = np.cumsum([0.0, *self._steps, self._step_energy])
        last = len(energy) - 1
        starts = np.arange(num_blocks)
        powers = energy[np.minimum(starts + _STEPS_PER_BLOCK, last)] - energy[np.minimum(starts, last)]
        powers /= _BLOCK_S * self._rate_hz
        powers = powers[_lufs(powers) >= _ABSOLUTE_GATE_LUFS]
        if len(powers) == 0:
            return -math.inf
        powers = powers[_lufs(powers) > _lufs(powers.mean()) + _RELATIVE_GATE_LU]
        return float(_lufs(powers.mean()))

    def _accumulate(self, powers_N: npt.NDArray[np.float64]) -> None:
        while len(powers_N):
            boundary = int(_BLOCK_S * ((len(self._steps) + 1) / _STEPS_PER_BLOCK) * self._rate_hz)
            in_step = powers_N[: boundary - self._num_samples]
            self._step_energy += float(in_step.sum())
            self._num_samples += len(in_step)
            powers_N = powers_N[len(in_step) :]
            if self._num_samples == boundary:
                self._steps.append(self._step_energy)
                self._step_energy = 0.0


class TruePeakMeter:
    """Streaming measurement of the true peak, which may lie between two samples.

    Oversamples four times as in BS.1770, with a filter twice as long as the example there.
    """

    def __init__(self) -> None:
        self._history = np.zeros(_PEAK_TAPS - 1, np.float32)
        self._highest = 0.0

    def add(self, samples_N: Samples) -> None:
        """Add the next samples."""
        joined = np.concatenate([self._history, samples_N.astype(np.float32, copy=False)])
        self._history = joined[-(_PEAK_TAPS - 1) :]
        peaks = [np.abs(samples_N).max(initial=0.0)]
        if len(joined) >= _PEAK_TAPS:
            peaks += [np.abs(np.convolve(joined, phase, "valid")).max(initial=0.0) for phase in _peak_phases()]
        self._highest = max(self._highest, *(float(peak) for peak in peaks))

    @property
    def dbtp(self) -> float:
        """True peak so far in dB relative to full scale; −∞ for silence."""
        return 20 * math.log10(self._highest) if self._highest > 0 else -math.inf


def constant_gain_db(
    loudness_lufs: float, peak_dbtp: float, *, target_lufs: float | None, limit_dbtp: float | None
) -> float:
    """Return the constant gain that brings a recording to the target, or as close to it as the peak limit allows.

    Args:
        loudness_lufs, peak_dbtp: measurements of the recording.
        target_lufs: None for no target. A recording without loudness (−∞) has no target either.
        limit_dbtp: maximum true peak after the gain; None: no limit.
    """
    gain_db = 0.0 if target_lufs is None or loudness_lufs == -math.inf else target_lufs - loudness_lufs
    if limit_dbtp is not None and peak_dbtp != -math.inf:
        gain_db = min(gain_db, limit_dbtp - peak_dbtp)
    return gain_db


def _lufs(power: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return _OFFSET_LUFS + 10 * np.log10(np.maximum(power, 1e-30))


@functools.cache
def _peak_phases() -> tuple[npt.NDArray[np.float32], ...]:
    """Return the polyphase filters of a windowed sinc, which interpolate at quarters of a sample."""
    positions = np.arange(_PEAK_TAPS * 4) - (_PEAK_TAPS * 4 - 1) / 2 - 0.5
    taps = np.sinc(positions / 4) * np.kaiser(_PEAK_TAPS * 4, 5.0)
    phases = [taps[offset::4] for offset in range(4)]
    return tuple((phase / phase.sum()).astype(np.float32) for phase in phases)


@functools.lru_cache(maxsize=8)
def _frequency_response(sample_rate_hz: int, size: int) -> npt.NDArray[np.complex128]:
    return np.fft.rfft(_k_impulse(sample_rate_hz), size)


@functools.lru_cache(maxsize=8)
def _k_impulse(sample_rate_hz: int) -> npt.NDArray[np.float64]:
    impulse = np.zeros(max(int(_IMPULSE_S * sample_rate_hz), 1))
    impulse[0] = 1.0
    for b, a in (_high_shelf(sample_rate_hz), _high_pass(sample_rate_hz)):
        impulse = _biquad(impulse, b, a)
    return impulse


Coefficients = tuple[float, float, float]


def _high_shelf(sample_rate_hz: int) -> tuple[Coefficients, Coefficients]:
    gain = 10 ** (4.0 / 40)
    cosine, alpha = _cookbook_terms(sample_rate_hz, 1500.0, 1 / math.sqrt(2))
    root = 2 * math.sqrt(gain) * alpha
    plus, minus = gain + 1, gain - 1
    b = (
        gain * (plus + minus * cosine + root),
        -2 * gain * (minus + plus * cosine),
        gain * (plus + minus * cosine - root),
    )
    a = (plus - minus * cosine + root, 2 * (minus - plus * cosine), plus - minus * cosine - root)
    return b, a


def _high_pass(sample_rate_hz: int) -> tuple[Coefficients, Coefficients]:
    cosine, alpha = _cookbook_terms(sample_rate_hz, 38.0, 0.5)
    return ((1 + cosine) / 2, -(1 + cosine), (1 + cosine) / 2), (1 + alpha, -2 * cosine, 1 - alpha)


def _cookbook_terms(sample_rate_hz: int, corner_hz: float, quality: float) -> tuple[float, float]:
    """Return cos ω and α of the Audio EQ Cookbook."""
    angle = 2 * math.pi * corner_hz / sample_rate_hz
    return math.cos(angle), math.sin(angle) / (2 * quality)


def _biquad(signal: npt.NDArray[np.float64], b: Coefficients, a: Coefficients) -> npt.NDArray[np.float64]:
    out = np.zeros_like(signal)
    x1 = x2 = y1 = y2 = 0.0
    for index, x in enumerate(signal.tolist()):
        y = (b[0] * x + b[1] * x1 + b[2] * x2 - a[1] * y1 - a[2] * y2) / a[0]
        out[index] = y
        x1, x2, y1, y2 = x, x1, y, y1
    return out
