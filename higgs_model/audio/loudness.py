"""Loudness after ITU-R BS.1770: the K-weighting, and the level above two gates.

In: mono samples and their rate. Out: LUFS, or the samples at a wanted loudness. Filter coefficients are those
of the audio equalizer cookbook (high shelf 4 dB at 1500 Hz, high pass at 38 Hz), as in pyloudnorm, at any
sample rate.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]

_BLOCK_S, _STEP_SHARE = 0.4, 0.25
_ABSOLUTE_GATE_LUFS, _RELATIVE_GATE_LU = -70.0, -10.0
_OFFSET_LUFS = -0.691
"""Makes a 1 kHz sine of full scale read −3.01."""
_IMPULSE_S = 0.15
"""After this the response of the weighting, whose slowest pole lies at 38 Hz, is below 1e-13."""


def integrated_loudness_lufs(samples_N: Samples, sample_rate_hz: int) -> float:
    """Loudness of a recording; −∞ for silence, and for less than the 0.4 s that a measurement needs."""
    weighted = _k_weighted(samples_N, sample_rate_hz)
    duration_s = len(samples_N) / sample_rate_hz
    if duration_s < _BLOCK_S:
        return -math.inf
    num_blocks = round((duration_s - _BLOCK_S) / (_BLOCK_S * _STEP_SHARE)) + 1
    energy = np.concatenate([[0.0], np.cumsum(np.square(weighted))])
    starts = np.array([int(_BLOCK_S * (block * _STEP_SHARE) * sample_rate_hz) for block in range(num_blocks)])
    stops = np.array([int(_BLOCK_S * (block * _STEP_SHARE + 1) * sample_rate_hz) for block in range(num_blocks)])
    powers = (energy[np.minimum(stops, len(weighted))] - energy[starts]) / (_BLOCK_S * sample_rate_hz)
    powers = powers[_lufs(powers) >= _ABSOLUTE_GATE_LUFS]
    if len(powers) == 0:
        return -math.inf
    powers = powers[_lufs(powers) > _lufs(powers.mean()) + _RELATIVE_GATE_LU]
    return float(_lufs(powers.mean()))


def normalize_loudness(samples_N: Samples, sample_rate_hz: int, target_lufs: float = -23.0) -> Samples:
    """The recording at the wanted loudness by one constant gain; what cannot be measured stays as it is."""
    loudness_lufs = integrated_loudness_lufs(samples_N, sample_rate_hz)
    if loudness_lufs == -math.inf:
        return samples_N
    return samples_N * np.float32(10 ** ((target_lufs - loudness_lufs) / 20))


def _lufs(power: npt.ArrayLike) -> npt.NDArray[np.float64]:
    return _OFFSET_LUFS + 10 * np.log10(np.maximum(power, 1e-30))


def _k_weighted(samples_N: Samples, sample_rate_hz: int) -> npt.NDArray[np.float64]:
    """The samples through both filters, block by block in the frequency domain."""
    impulse = _k_impulse(sample_rate_hz)
    size = 1 << (4 * len(impulse)).bit_length()
    step = size - len(impulse) + 1
    response = np.fft.rfft(impulse, size)
    out = np.zeros(len(samples_N) + size)
    for start in range(0, len(samples_N), step):
        block = np.fft.rfft(samples_N[start : start + step].astype(np.float64), size)
        out[start : start + size] += np.fft.irfft(block * response, size)
    return out[: len(samples_N)]


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
