"""Timeline: exact lengths, fades, and independence of block sizes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from higgs_model.audio.timeline import Timeline

RATE = 24_000


def join(parts, size):
    """Join pauses (integers) and takes (arrays), which are pushed in blocks of `size` samples."""
    timeline, output, positions = Timeline(RATE), [], []
    for part in parts:
        positions.append(timeline.position)
        if isinstance(part, int):
            output.append(timeline.pause(part))
            continue
        output += [timeline.push(part[start : start + size]) for start in range(0, len(part), size)]
        output.append(timeline.end_take())
    return np.concatenate([np.empty(0, np.float32), *output]), [*positions, timeline.position]


take = st.integers(0, 3000).map(lambda n: np.full(n, 0.5, np.float32))


@given(st.lists(st.integers(0, 5000) | take, max_size=8), st.integers(1, 4000))
def test_timeline_preserves_lengths_and_is_independent_of_block_sizes(parts, size):
    samples, positions = join(parts, size)
    lengths = [part if isinstance(part, int) else len(part) for part in parts]
    assert positions == [0, *np.cumsum(lengths).tolist()]
    assert len(samples) == sum(lengths)
    np.testing.assert_array_equal(samples, join(parts, 1_000_000)[0])


def test_takes_fade_only_at_their_ends():
    samples, _ = join([np.ones(RATE, np.float32)], 999)
    fade = round(0.005 * RATE)
    assert samples[0] < 0.02
    assert samples[-1] < 0.02
    assert (np.diff(samples[:fade]) > 0).all()
    assert (np.diff(samples[-fade:]) < 0).all()
    assert (samples[fade:-fade] == 1).all()


def test_pause_has_the_level_of_the_room_tone():
    samples, _ = join([2 * RATE], 1)
    level_db = 20 * np.log10(np.sqrt(np.mean(samples.astype(np.float64) ** 2)))
    assert -75.3 < level_db < -74.7
    silent = Timeline(RATE, room_tone_dbfs=None).pause(100)
    assert not silent.any()
