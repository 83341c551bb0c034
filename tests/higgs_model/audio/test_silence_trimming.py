"""Trimming removes silence at the ends, keeps all sound, and does not depend on block sizes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from higgs_model.audio.silence_trimming import SilenceTrimmer, TrimSettings

RATE = 24_000


def sound(seconds, level=0.1):
    return (level * np.sin(np.arange(round(seconds * RATE)) * 0.3)).astype(np.float32)


def silence(seconds):
    return np.random.RandomState(1).standard_normal(round(seconds * RATE)).astype(np.float32) * np.float32(1e-4)


def trim(samples, sizes=(1_000_000,), settings=TrimSettings()):  # noqa: B008
    trimmer, parts, start, block = SilenceTrimmer(RATE, settings), [], 0, 0
    while start < len(samples):
        size = sizes[block % len(sizes)]
        parts.append(trimmer.push(samples[start : start + size]))
        start, block = start + size, block + 1
    return np.concatenate([*parts, trimmer.finish()]), trimmer


def test_trimmer_removes_silence_only_at_the_ends():
    take = np.concatenate([silence(0.7), sound(1.0), silence(0.4), sound(0.5), silence(0.9)])
    trimmed, trimmer = trim(take)
    start, stop = round(0.67 * RATE), round(2.7 * RATE)
    np.testing.assert_array_equal(trimmed, take[start:stop])
    assert trimmer.head_samples == round(0.7 * RATE)
    assert trimmer.tail_samples == round(0.9 * RATE)


@given(
    pieces=st.lists(st.tuples(st.booleans(), st.integers(1, 9000)), max_size=6),
    sizes=st.lists(st.integers(1, 7000), min_size=1, max_size=4),
)
def test_trimmer_is_independent_of_block_sizes_and_keeps_all_sound(pieces, sizes):
    take = np.concatenate([np.empty(0, np.float32), *((sound if loud else silence)(n / RATE) for loud, n in pieces)])
    expected, trimmer = trim(take)
    trimmed, block_trimmer = trim(take, sizes)
    np.testing.assert_array_equal(trimmed, expected)
    assert (trimmer.head_samples, trimmer.tail_samples) == (block_trimmer.head_samples, block_trimmer.tail_samples)
    # All samples that are clearly sound are kept, in order.
    loud = np.flatnonzero(np.abs(take) > 0.05)
    if len(loud) > 500:
        kept_loud = np.flatnonzero(np.abs(expected) > 0.05)
        np.testing.assert_array_equal(take[loud], expected[kept_loud])
    assert len(expected) <= len(take)


def test_trimming_silence_returns_nothing():
    trimmed, trimmer = trim(silence(3.0), [777])
    assert len(trimmed) == 0
    assert trimmer.head_samples == 3 * RATE


def test_silence_threshold_is_configurable():
    take = np.concatenate([silence(0.5), sound(0.5)])
    assert len(trim(take, settings=TrimSettings(threshold_dbfs=-120))[0]) == len(take)
    assert len(trim(take, settings=TrimSettings(threshold_dbfs=0))[0]) == 0


def test_trimmer_buffers_a_bounded_amount_of_leading_silence():
    trimmer = SilenceTrimmer(RATE)
    for _ in range(100):
        trimmer.push(silence(1.0))
    assert len(trimmer._pending) < RATE
