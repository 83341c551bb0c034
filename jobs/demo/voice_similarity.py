"""Similarity of two voices: the pitch of their voiced frames, and their long-term average spectrum.

In: samples (N,) float32. Out: a `VoicePrint`, and distances between voice prints. Deliberately simple, so that the
values can be checked by eye; not a speaker verification model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

_FRAME_S, _HOP_S = 0.04, 0.01
_MIN_PITCH_HZ, _MAX_PITCH_HZ = 60.0, 400.0
_VOICING_THRESHOLD = 0.5
"""A frame is voiced if its normalized autocorrelation at one pitch period exceeds this."""
_MAX_BELOW_PEAK_DB = 25.0
"""Quieter frames are ignored."""
_BANDS_HZ = np.geomspace(100, 7000, 33)


@dataclasses.dataclass(frozen=True)
class VoicePrint:
    """Median pitch in Hz (NaN without voiced frames), and the average spectrum in dB, (bands,), with zero mean."""

    pitch_hz: float
    spectrum_db: NDArray[np.float64]

    @classmethod
    def from_samples(cls, samples_N: NDArray[np.float32], sample_rate_hz: int) -> VoicePrint:
        """Compute the voice print of a recording at least one frame (40 ms) long."""
        size = round(_FRAME_S * sample_rate_hz)
        frames = np.lib.stride_tricks.sliding_window_view(samples_N, size)[:: round(_HOP_S * sample_rate_hz)]
        frames = (frames - frames.mean(1, keepdims=True)) * np.hanning(size)
        energy = (frames**2).sum(1)
        frames = frames[energy > energy.max() * 10 ** (-_MAX_BELOW_PEAK_DB / 10)]
        power = np.abs(np.fft.rfft(frames, 2 * size)) ** 2
        return cls(_median_pitch(power, size, sample_rate_hz), _average_spectrum(power.mean(0), sample_rate_hz))

    def pitch_distance_semitones(self, other: VoicePrint) -> float:
        """Return the distance between the median pitches, in semitones."""
        return abs(12 * float(np.log2(self.pitch_hz / other.pitch_hz)))

    def spectral_distance_db(self, other: VoicePrint) -> float:
        """Return the root mean square difference of the average spectra, in dB."""
        return float(np.sqrt(np.mean((self.spectrum_db - other.spectrum_db) ** 2)))


def _median_pitch(power: NDArray[np.float64], size: int, sample_rate_hz: int) -> float:
    """Estimate pitch from the autocorrelation, corrected for the window's own.

    Of each voiced frame the shortest period is taken whose correlation is within 10 % of the best, which avoids octave
    errors downwards.
    """
    autocorrelation = np.fft.irfft(power)[:, :size]
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)[:size]
    shortest, longest = int(sample_rate_hz / _MAX_PITCH_HZ), int(sample_rate_hz / _MIN_PITCH_HZ)
    normalized = (
        autocorrelation[:, : longest + 1]
        / np.maximum(autocorrelation[:, :1], 1e-12)
        / (window[: longest + 1] / window[0])
    )
    best = normalized[:, shortest:].max(1)
    voiced = normalized[best > _VOICING_THRESHOLD]
    if not len(voiced):
        return float("nan")
    candidates = voiced[:, shortest:] >= 0.9 * voiced[:, shortest:].max(1, keepdims=True)
    starts = candidates.argmax(1) + shortest
    # The first candidate is on a slope; the period is at the peak that follows it.
    periods = [
        int(row[start : start + shortest // 2].argmax()) + start for row, start in zip(voiced, starts, strict=True)
    ]
    return float(sample_rate_hz / np.median(periods))


def _average_spectrum(power: NDArray[np.float64], sample_rate_hz: int) -> NDArray[np.float64]:
    frequencies = np.fft.rfftfreq(2 * (len(power) - 1), 1 / sample_rate_hz)
    bands = [
        power[(frequencies >= low) & (frequencies < high)].mean()
        for low, high in zip(_BANDS_HZ, _BANDS_HZ[1:], strict=False)
    ]
    decibels = 10 * np.log10(np.array(bands) + 1e-12)
    return decibels - decibels.mean()
