"""Silence at the ends goes, sound stays, portions do not matter."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from higgs_model.audio.edges import EdgeTrimmer, Silence

RATE = 24_000


def sound(seconds, level=0.1):
    return (level * np.sin(np.arange(round(seconds * RATE)) * 0.3)).astype(np.float32)


def quiet(seconds):
    return np.random.RandomState(1).standard_normal(round(seconds * RATE)).astype(np.float32) * np.float32(1e-4)


def trim(samples, sizes=(1_000_000,), silence=Silence()):  # noqa: B008
    trimmer, parts, start, turn = EdgeTrimmer(RATE, silence), [], 0, 0
    while start < len(samples):
        size = sizes[turn % len(sizes)]
        parts.append(trimmer.push(samples[start : start + size]))
        start, turn = start + size, turn + 1
    return np.concatenate([*parts, trimmer.finish()]), trimmer


def test_the_ends_go_and_the_middle_stays():
    take = np.concatenate([quiet(0.7), sound(1.0), quiet(0.4), sound(0.5), quiet(0.9)])
    kept, trimmer = trim(take)
    start, stop = round(0.67 * RATE), round(2.7 * RATE)
    np.testing.assert_array_equal(kept, take[start:stop])
    assert trimmer.head_samples == round(0.7 * RATE)
    assert trimmer.tail_samples == round(0.9 * RATE)


@given(
    pieces=st.lists(st.tuples(st.booleans(), st.integers(1, 9000)), max_size=6),
    sizes=st.lists(st.integers(1, 7000), min_size=1, max_size=4),
)
def test_portions_do_not_matter_and_no_sound_is_lost(pieces, sizes):
    take = np.concatenate([np.empty(0, np.float32), *((sound if loud else quiet)(n / RATE) for loud, n in pieces)])
    whole, first = trim(take)
    parts, second = trim(take, sizes)
    np.testing.assert_array_equal(parts, whole)
    assert (first.head_samples, first.tail_samples) == (second.head_samples, second.tail_samples)
    # All that is clearly sound is still there, and in place.
    loud = np.flatnonzero(np.abs(take) > 0.05)
    if len(loud) > 500:
        kept = np.flatnonzero(np.abs(whole) > 0.05)
        np.testing.assert_array_equal(take[loud], whole[kept])
    assert len(whole) <= len(take)


def test_silence_alone_is_nothing():
    kept, trimmer = trim(quiet(3.0), [777])
    assert len(kept) == 0
    assert trimmer.head_samples == 3 * RATE


def test_the_level_is_a_setting():
    take = np.concatenate([quiet(0.5), sound(0.5)])
    assert len(trim(take, silence=Silence(below_dbfs=-120))[0]) == len(take)
    assert len(trim(take, silence=Silence(below_dbfs=0))[0]) == 0


def test_memory_does_not_grow_with_silence_before_a_sound():
    trimmer = EdgeTrimmer(RATE)
    for _ in range(100):
        trimmer.push(quiet(1.0))
    assert len(trimmer._held) < RATE
