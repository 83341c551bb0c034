"""The quality gate: each fault is detected, and only that fault."""

import dataclasses

import numpy as np
import pytest

from higgs_model.audio.take_checks import SEVERITY, ExpectedTake, TakeLimits, find_faults, measure_take, severity

RATE = 24_000
EXPECTED = ExpectedTake(num_chars=45, min_s=1.0, max_s=12.0)


def speech(seconds, level=0.2):
    """Noise with the rhythm of syllables: amplitude-modulated a few times per second."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.RandomState(0).uniform(-1, 1, len(time))
    return (level * noise * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def check(samples, expected=EXPECTED, head=0.1, tail=0.1, limits=TakeLimits()):  # noqa: B008
    measured = measure_take(samples, RATE, limits.silence_threshold_dbfs)
    return find_faults(measured, expected, head_silence_s=head, tail_silence_s=tail, limits=limits)


def test_good_take_has_no_faults():
    assert check(speech(3.0)) == []


@pytest.mark.parametrize(
    ("take", "faults"),
    [
        (np.empty(0, np.float32), ["no_audio"]),
        (np.zeros(3 * RATE, np.float32), ["silent"]),
        (speech(1.2), ["too_fast"]),
        (speech(7.0), ["too_slow"]),
        (np.concatenate([speech(1.5), np.zeros(round(2.3 * RATE), np.float32), speech(1.0)]), ["inner_silence"]),
        (np.sign(speech(3.0)) * np.float32(1.0), ["clipped"]),
        (speech(3.0, 0.012), ["too_quiet"]),
    ],
)
def test_each_fault_is_detected_alone(take, faults):
    assert check(take) == faults


def test_trimmed_silence_is_a_fault():
    assert check(speech(3.0), tail=1.8) == ["edge_silence"]
    assert check(speech(3.0), head=1.8) == ["edge_silence"]


def test_take_without_speaking_rate_is_checked_by_duration_only():
    unrated = dataclasses.replace(EXPECTED, num_chars=None)
    assert check(speech(7.0), unrated) == []
    assert check(speech(13.0), unrated) == ["too_slow"]
    assert check(speech(0.5), unrated) == ["too_fast"]
    assert check(speech(4.0), dataclasses.replace(EXPECTED, num_chars=10)) == []


def test_measurements_have_the_documented_units():
    sine = np.sin(np.arange(2 * RATE) * 0.2).astype(np.float32) * np.float32(0.5)
    measured = measure_take(sine, RATE)
    assert measured.duration_s == 2.0
    assert measured.peak_dbfs == pytest.approx(-6.02, abs=0.01)
    assert measured.loudest_second_dbfs == pytest.approx(-9.03, abs=0.05)
    assert measured.inner_silence_s == 0


def test_severity_ranks_faults():
    assert severity([]) == 0
    assert severity(["clipped"]) < severity(["too_slow"]) < severity(["loop"]) < severity(["no_audio"])
    all_faults = check(np.zeros(RATE, np.float32)) + check(speech(0.2)) + check(speech(9.0))
    assert set(all_faults) <= set(SEVERITY)
