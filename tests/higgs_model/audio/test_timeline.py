"""Joins: exact lengths, soft edges, the same samples however they came."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from higgs_model.audio.timeline import Timeline

RATE = 24_000


def join(parts, size):
    """Parts are pauses (integers) and takes (arrays); takes are pushed in portions."""
    timeline, made, marks = Timeline(RATE), [], []
    for part in parts:
        marks.append(timeline.position)
        if isinstance(part, int):
            made.append(timeline.pause(part))
            continue
        made += [timeline.push(part[start : start + size]) for start in range(0, len(part), size)]
        made.append(timeline.end_take())
    return np.concatenate([np.empty(0, np.float32), *made]), [*marks, timeline.position]


take = st.integers(0, 3000).map(lambda n: np.full(n, 0.5, np.float32))


@given(st.lists(st.integers(0, 5000) | take, max_size=8), st.integers(1, 4000))
def test_what_comes_out_is_as_long_as_what_went_in(parts, size):
    made, marks = join(parts, size)
    lengths = [part if isinstance(part, int) else len(part) for part in parts]
    assert marks == [0, *np.cumsum(lengths).tolist()]
    assert len(made) == sum(lengths)
    np.testing.assert_array_equal(made, join(parts, 1_000_000)[0])


def test_edges_fade_and_the_middle_is_untouched():
    made, _ = join([np.ones(RATE, np.float32)], 999)
    fade = round(0.005 * RATE)
    assert made[0] < 0.02
    assert made[-1] < 0.02
    assert (np.diff(made[:fade]) > 0).all()
    assert (np.diff(made[-fade:]) < 0).all()
    assert (made[fade:-fade] == 1).all()


def test_a_pause_sounds_like_a_room():
    made, _ = join([2 * RATE], 1)
    level_db = 20 * np.log10(np.sqrt(np.mean(made.astype(np.float64) ** 2)))
    assert -75.3 < level_db < -74.7
    silent = Timeline(RATE, room_tone_dbfs=None).pause(100)
    assert not silent.any()
