"""Streaming measurement of loudness and true peak. The codec's tests compare the loudness with pyloudnorm."""

import math

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model.audio.loudness import LoudnessMeter, TruePeakMeter, constant_gain_db, integrated_loudness_lufs

RATE = 24_000


def speech(seconds, seed=0):
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.RandomState(seed).uniform(-1, 1, len(time))
    return (0.3 * noise * np.clip(np.sin(2 * np.pi * 0.4 * time + seed), 0, 1)).astype(np.float32)


# A block may be a single sample, but hundreds of thousands of such blocks would be slow.
SIZES = st.lists(st.integers(1, 60_000), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 500 * len(sizes))


@settings(max_examples=20)
@given(seconds=st.floats(0.1, 12), sizes=SIZES)
def test_meters_are_independent_of_block_sizes(seconds, sizes):
    samples = speech(seconds)
    loudness, peak, expected_peak = LoudnessMeter(RATE), TruePeakMeter(), TruePeakMeter()
    start, block = 0, 0
    while start < len(samples):
        size = sizes[block % len(sizes)]
        loudness.add(samples[start : start + size])
        peak.add(samples[start : start + size])
        start, block = start + size, block + 1
    expected_peak.add(samples)
    assert loudness.integrated_lufs == pytest.approx(integrated_loudness_lufs(samples, RATE), abs=1e-6)
    assert peak.dbtp == pytest.approx(expected_peak.dbtp, abs=1e-6)


def test_full_scale_sine_has_minus_three_lufs():
    sine = np.sin(2 * np.pi * 1000 * np.arange(5 * 48_000) / 48_000).astype(np.float32)
    assert integrated_loudness_lufs(sine, 48_000) == pytest.approx(-3.01, abs=0.05)


def test_true_peak_meter_finds_peaks_between_samples():
    """All samples of a sine at a quarter of the rate are 3 dB below its crest."""
    sine = np.sin(np.pi / 2 * np.arange(RATE) + np.pi / 4).astype(np.float32)
    fade = np.minimum(1, np.arange(RATE) / 2000) * np.minimum(1, np.arange(RATE)[::-1] / 2000)
    meter = TruePeakMeter()
    meter.add((sine * fade).astype(np.float32))
    assert 20 * math.log10(np.abs(sine).max()) == pytest.approx(-3.01, abs=0.01)
    assert meter.dbtp == pytest.approx(0.0, abs=0.2)


@pytest.mark.parametrize("seed", range(4))
def test_true_peak_matches_high_quality_oversampling(seed):
    noise = soxr.resample(speech(2.0, seed), RATE, 8000)
    oversampled = soxr.resample(noise, 8000, 64_000, quality="VHQ")
    meter = TruePeakMeter()
    meter.add(noise.astype(np.float32))
    assert meter.dbtp == pytest.approx(20 * math.log10(np.abs(oversampled).max()), abs=0.4)


def test_silence_and_short_recordings_have_no_loudness():
    meter = LoudnessMeter(RATE)
    meter.add(np.zeros(RATE, np.float32))
    assert meter.integrated_lufs == -math.inf
    assert integrated_loudness_lufs(speech(0.3), RATE) == -math.inf
    assert TruePeakMeter().dbtp == -math.inf


@pytest.mark.parametrize(
    ("loudness", "peak", "target", "limit", "gain"),
    [
        (-23.0, -10.0, -16.0, None, 7.0),
        (-23.0, -6.0, -16.0, -1.0, 5.0),
        (-10.0, -0.5, -16.0, -1.0, -6.0),
        (-23.0, 0.5, None, -1.0, -1.5),
        (-23.0, -6.0, None, -1.0, 0.0),
        (-math.inf, -60.0, -16.0, -1.0, 0.0),
        (-math.inf, -math.inf, -16.0, -1.0, 0.0),
    ],
)
def test_constant_gain_respects_target_and_peak_limit(loudness, peak, target, limit, gain):
    assert constant_gain_db(loudness, peak, target_lufs=target, limit_dbtp=limit) == pytest.approx(gain)
