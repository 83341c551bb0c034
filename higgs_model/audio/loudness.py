"""Loudness after ITU-R BS.1770: the K-weighting, and the level above two gates.

In: mono samples and their rate, whole or in portions. Out: LUFS, the true peak, and the one gain that follows from
both. Filter coefficients are those of the audio equalizer cookbook (high shelf 4 dB at 1500 Hz, high pass at 38 Hz),
as in pyloudnorm, at any sample rate.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

_BLOCK_S, _STEP_S, _STEPS_A_BLOCK = 0.4, 0.1, 4
_ABSOLUTE_GATE_LUFS, _RELATIVE_GATE_LU = -70.0, -10.0
_OFFSET_LUFS = -0.691
"""Makes a 1 kHz sine of full scale read −3.01."""
_PEAK_TAPS = 24
_IMPULSE_S = 0.15
"""After this the response of the weighting, whose slowest pole lies at 38 Hz, is below 1e-13."""


def integrated_loudness_lufs(samples_N: Samples, sample_rate_hz: int) -> float:
    """Loudness of a recording; −∞ for silence, and for less than the 0.4 s that a measurement needs."""
    meter = LoudnessMeter(sample_rate_hz)
    meter.add(samples_N)
    return meter.integrated_lufs


def normalize_loudness(samples_N: Samples, sample_rate_hz: int, target_lufs: float = -23.0) -> Samples:
    """The recording at the wanted loudness by one constant gain; what cannot be measured stays as it is."""
    loudness_lufs = integrated_loudness_lufs(samples_N, sample_rate_hz)
    if loudness_lufs == -math.inf:
        return samples_N
    return samples_N * np.float32(10 ** ((target_lufs - loudness_lufs) / 20))


class LoudnessMeter:
    """Loudness of a recording that comes in portions; an hour of it is remembered as 36,000 numbers."""

    def __init__(self, sample_rate_hz: int) -> None:
        self._rate_hz = sample_rate_hz
        self._impulse = _k_impulse(sample_rate_hz)
        self._carry = np.zeros(len(self._impulse) - 1)
        self._num_samples = 0
        self._steps: list[float] = []
        """Energy of each tenth of a second that is over."""
        self._step_energy = 0.0

    def add(self, samples_N: Samples) -> None:
        """Hear the next samples."""
        size = 1 << (4 * len(self._impulse)).bit_length()
        step, response = size - len(self._impulse) + 1, _response(self._rate_hz, size)
        for start in range(0, len(samples_N), step):
            block = samples_N[start : start + step].astype(np.float64)
            made = np.fft.irfft(np.fft.rfft(block, size) * response, size)
            made[: len(self._carry)] += self._carry
            # The tail of the response goes on into the next block.
            self._carry = made[len(block) : len(block) + len(self._carry)]
            self._count(np.square(made[: len(block)]))

    @property
    def integrated_lufs(self) -> float:
        """Loudness of all that was heard; −∞ for silence and for less than 0.4 s."""
        duration_s = self._num_samples / self._rate_hz
        if duration_s < _BLOCK_S:
            return -math.inf
        num_blocks = round((duration_s - _BLOCK_S) / _STEP_S) + 1
        energy = np.cumsum([0.0, *self._steps, self._step_energy])
        last = len(energy) - 1
        firsts = np.arange(num_blocks)
        powers = energy[np.minimum(firsts + _STEPS_A_BLOCK, last)] - energy[np.minimum(firsts, last)]
        powers /= _BLOCK_S * self._rate_hz
        powers = powers[_lufs(powers) >= _ABSOLUTE_GATE_LUFS]
        if len(powers) == 0:
            return -math.inf
        powers = powers[_lufs(powers) > _lufs(powers.mean()) + _RELATIVE_GATE_LU]
        return float(_lufs(powers.mean()))

    def _count(self, powers_N: npt.NDArray[np.float64]) -> None:
        while len(powers_N):
            boundary = int(_BLOCK_S * ((len(self._steps) + 1) / _STEPS_A_BLOCK) * self._rate_hz)
            taken = powers_N[: boundary - self._num_samples]
            self._step_energy += float(taken.sum())
            self._num_samples += len(taken)
            powers_N = powers_N[len(taken) :]
            if self._num_samples == boundary:
                self._steps.append(self._step_energy)
                self._step_energy = 0.0


class TruePeakMeter:
    """The highest level that a player will make of a recording between its samples: BS.1770's measurement at four times
    the rate, with a filter twice as long as its example.
    """

    def __init__(self) -> None:
        self._carry = np.zeros(_PEAK_TAPS - 1, np.float32)
        self._highest = 0.0

    def add(self, samples_N: Samples) -> None:
        """Hear the next samples."""
        joined = np.concatenate([self._carry, samples_N.astype(np.float32, copy=False)])
        self._carry = joined[-(_PEAK_TAPS - 1) :]
        peaks = [np.abs(samples_N).max(initial=0.0)]
        if len(joined) >= _PEAK_TAPS:
            peaks += [np.abs(np.convolve(joined, phase, "valid")).max(initial=0.0) for phase in _peak_phases()]
        self._highest = max(self._highest, *(float(peak) for peak in peaks))

    @property
    def dbtp(self) -> float:
        """dB of full scale; −∞ for silence."""
        return 20 * math.log10(self._highest) if self._highest > 0 else -math.inf


def constant_gain_db(
    loudness_lufs: float, peak_dbtp: float, *, target_lufs: float | None, limit_dbtp: float | None
) -> float:
    """The one gain that brings a recording to the target, or as near to it as the peak's limit allows."""
    gain_db = 0.0 if target_lufs is None or loudness_lufs == -math.inf else target_lufs - loudness_lufs
    if limit_dbtp is not None and peak_dbtp != -math.inf:
        gain_db = min(gain_db, limit_dbtp - peak_dbtp)
    return gain_db


def _lufs(power: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return _OFFSET_LUFS + 10 * np.log10(np.maximum(power, 1e-30))


@functools.cache
def _peak_phases() -> tuple[npt.NDArray[np.float32], ...]:
    """The three filters that make the samples between two samples: a windowed sinc."""
    places = np.arange(_PEAK_TAPS * 4) - (_PEAK_TAPS * 4 - 1) / 2 - 0.5
    taps = np.sinc(places / 4) * np.kaiser(_PEAK_TAPS * 4, 5.0)
    phases = [taps[offset::4] for offset in range(4)]
    return tuple((phase / phase.sum()).astype(np.float32) for phase in phases)


@functools.lru_cache(maxsize=8)
def _response(sample_rate_hz: int, size: int) -> npt.NDArray[np.complex128]:
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
    cosine, alpha = _angle(sample_rate_hz, 1500.0, 1 / math.sqrt(2))
    root = 2 * math.sqrt(gain) * alpha
    up, down = gain + 1, gain - 1
    b = (
        gain * (up + down * cosine + root),
        -2 * gain * (down + up * cosine),
        gain * (up + down * cosine - root),
    )
    a = (up - down * cosine + root, 2 * (down - up * cosine), up - down * cosine - root)
    return b, a


def _high_pass(sample_rate_hz: int) -> tuple[Coefficients, Coefficients]:
    cosine, alpha = _angle(sample_rate_hz, 38.0, 0.5)
    return ((1 + cosine) / 2, -(1 + cosine), (1 + cosine) / 2), (1 + alpha, -2 * cosine, 1 - alpha)


def _angle(sample_rate_hz: int, corner_hz: float, quality: float) -> tuple[float, float]:
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
