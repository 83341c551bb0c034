"""The gate: each fault is found where it is, and nowhere else."""

import dataclasses

import numpy as np
import pytest

from higgs_model.audio.gate import SEVERITY, TakeLimits, Wanted, faults, measure, severity

RATE = 24_000
WANTED = Wanted(letters=45, least_s=1.0, most_s=12.0)


def speech(seconds, level=0.2):
    """Noise in syllables: loud and soft a few times a second."""
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.RandomState(0).uniform(-1, 1, len(time))
    return (level * noise * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def found(samples, wanted=WANTED, head=0.1, tail=0.1, limits=TakeLimits()):  # noqa: B008
    measures = measure(samples, RATE, limits.silent_below_dbfs)
    return faults(measures, wanted, head_silence_s=head, tail_silence_s=tail, limits=limits)


def test_a_good_take_has_no_fault():
    assert found(speech(3.0)) == []


@pytest.mark.parametrize(
    ("take", "names"),
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
def test_each_fault_is_found_alone(take, names):
    assert found(take) == names


def test_cut_off_silence_counts_too():
    assert found(speech(3.0), tail=1.8) == ["edge_silence"]
    assert found(speech(3.0), head=1.8) == ["edge_silence"]


def test_without_a_rate_only_the_bounds_count():
    unrated = dataclasses.replace(WANTED, letters=None)
    assert found(speech(7.0), unrated) == []
    assert found(speech(13.0), unrated) == ["too_slow"]
    assert found(speech(0.5), unrated) == ["too_fast"]
    assert found(speech(4.0), dataclasses.replace(WANTED, letters=10)) == []


def test_measures_are_in_their_units():
    sine = np.sin(np.arange(2 * RATE) * 0.2).astype(np.float32) * np.float32(0.5)
    measures = measure(sine, RATE)
    assert measures.duration_s == 2.0
    assert measures.peak_db == pytest.approx(-6.02, abs=0.01)
    assert measures.loudest_s_db == pytest.approx(-9.03, abs=0.05)
    assert measures.inner_silence_s == 0


def test_worse_faults_weigh_more():
    assert severity([]) == 0
    assert severity(["clipped"]) < severity(["too_slow"]) < severity(["loop"]) < severity(["no_audio"])
    every = found(np.zeros(RATE, np.float32)) + found(speech(0.2)) + found(speech(9.0))
    assert set(every) <= set(SEVERITY)
