"""How alike two voices are: the pitch of their voiced frames, and the average spectrum.

In: samples (N,) float32. Out: a `VoicePrint`, and distances between prints. Crude on purpose: it can be checked by eye.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

_FRAME_S, _HOP_S = 0.04, 0.01
_LOWEST_HZ, _HIGHEST_HZ = 60.0, 400.0
_PERIODIC_FROM = 0.5
"""A frame is voiced when it is this like itself, one period later."""
_LOUD_WITHIN_DB = 25.0
_BANDS_HZ = np.geomspace(100, 7000, 33)


@dataclasses.dataclass(frozen=True)
class VoicePrint:
    """Median pitch (Hz; NaN if nothing is voiced), and the average spectrum in dB, (bands,), its mean taken away."""

    pitch_hz: float
    spectrum_db: NDArray[np.float64]

    @classmethod
    def of(cls, samples_N: NDArray[np.float32], sample_rate_hz: int) -> VoicePrint:
        """That of a recording of at least a frame."""
        size = round(_FRAME_S * sample_rate_hz)
        frames = np.lib.stride_tricks.sliding_window_view(samples_N, size)[:: round(_HOP_S * sample_rate_hz)]
        frames = (frames - frames.mean(1, keepdims=True)) * np.hanning(size)
        energy = (frames**2).sum(1)
        frames = frames[energy > energy.max() * 10 ** (-_LOUD_WITHIN_DB / 10)]
        power = np.abs(np.fft.rfft(frames, 2 * size)) ** 2
        return cls(_pitch(power, size, sample_rate_hz), _spectrum(power.mean(0), sample_rate_hz))

    def semitones(self, other: VoicePrint) -> float:
        """Between the two pitches."""
        return abs(12 * float(np.log2(self.pitch_hz / other.pitch_hz)))

    def spectral_db(self, other: VoicePrint) -> float:
        """Between the two spectra, root mean square."""
        return float(np.sqrt(np.mean((self.spectrum_db - other.spectrum_db) ** 2)))


def _pitch(power: NDArray[np.float64], size: int, sample_rate_hz: int) -> float:
    """From the autocorrelation, freed of the window's own; the shortest period nearly as good as the best."""
    correlation = np.fft.irfft(power)[:, :size]
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)[:size]
    shortest, longest = int(sample_rate_hz / _HIGHEST_HZ), int(sample_rate_hz / _LOWEST_HZ)
    likeness = (
        correlation[:, : longest + 1] / np.maximum(correlation[:, :1], 1e-12) / (window[: longest + 1] / window[0])
    )
    best = likeness[:, shortest:].max(1)
    voiced = likeness[best > _PERIODIC_FROM]
    if not len(voiced):
        return float("nan")
    good = voiced[:, shortest:] >= 0.9 * voiced[:, shortest:].max(1, keepdims=True)
    first = good.argmax(1) + shortest
    # From the first good place uphill to the top of its peak.
    periods = [int(row[at : at + shortest // 2].argmax()) + at for row, at in zip(voiced, first, strict=True)]
    return float(sample_rate_hz / np.median(periods))


def _spectrum(power: NDArray[np.float64], sample_rate_hz: int) -> NDArray[np.float64]:
    places = np.fft.rfftfreq(2 * (len(power) - 1), 1 / sample_rate_hz)
    bands = [
        power[(places >= low) & (places < high)].mean() for low, high in zip(_BANDS_HZ, _BANDS_HZ[1:], strict=False)
    ]
    decibels = 10 * np.log10(np.array(bands) + 1e-12)
    return decibels - decibels.mean()
