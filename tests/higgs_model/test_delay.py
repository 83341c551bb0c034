"""The delay pattern: inverse, grammar, and the same pattern a frame at a time."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from higgs_model.delay import (
    NOT_ENDING,
    DelayState,
    apply_delay_pattern,
    from_stream,
    to_stream,
    undo_delay_pattern,
)

SIZE = 16
BOS, EOS = SIZE, SIZE + 1


@st.composite
def clips(draw, min_frames=0):
    num_codebooks = draw(st.integers(1, 12))
    num_frames = draw(st.integers(min_frames, 40))
    seed = draw(st.integers(0, 2**32))
    return torch.randint(SIZE, (num_codebooks, num_frames), generator=torch.Generator().manual_seed(seed))


@given(clips())
def test_undo_is_the_inverse_of_apply(codes):
    delayed = apply_delay_pattern(codes, BOS, EOS)
    assert delayed.shape == (codes.shape[0], codes.shape[1] + codes.shape[0] - 1)
    assert delayed.dtype == codes.dtype
    assert torch.equal(undo_delay_pattern(delayed), codes)


@given(clips())
def test_each_codebook_is_its_codes_between_its_fill(codes):
    delayed = apply_delay_pattern(codes, BOS, EOS)
    for k, row in enumerate(delayed):
        expected = [BOS] * k + codes[k].tolist() + [EOS] * (codes.shape[0] - 1 - k)
        assert row.tolist() == expected


@given(clips(), st.booleans())
def test_a_whole_clip_comes_back_from_its_stream(codes, delay):
    stream = to_stream(codes, BOS, EOS, delay)
    assert stream.shape[1] == codes.shape[1] + 2 + (codes.shape[0] - 1 if delay else 0)
    assert torch.equal(from_stream(stream, SIZE, delay), codes)


@given(clips(min_frames=1), st.integers(1, 60))
def test_a_clip_cut_off_keeps_its_complete_frames(codes, columns):
    stream = to_stream(codes, BOS, EOS)[:, :columns]
    complete = min(max(stream.shape[1] - codes.shape[0], 0), codes.shape[1])
    assert torch.equal(from_stream(stream, SIZE), codes[:, :complete])


def test_the_picture_in_the_docstring():
    codes = torch.tensor([[1, 2], [3, 4], [5, 6]])
    b, e = BOS, EOS
    assert to_stream(codes, b, e).tolist() == [[b, 1, 2, e, e, e], [b, b, 3, 4, e, e], [b, b, b, 5, 6, e]]


@given(clips(min_frames=1))
def test_state_follows_the_stream_of_a_clip(codes):
    """Drawing at each step what the stream holds gives the stream back, and the clip ends with its last frame."""
    stream = to_stream(codes, BOS, EOS)
    state = DelayState.new(1)
    active = torch.ones(1, dtype=torch.bool)
    for column in range(1, stream.shape[1]):
        wanted = stream[:, column].unsqueeze(0)
        # What is forced does not depend on what was drawn there.
        drawn = wanted.masked_fill(wanted == BOS, 0)
        frame, ended = state.step(drawn, active, BOS, EOS)
        assert torch.equal(frame, wanted)
        assert bool(ended) == (column == stream.shape[1] - 1)
    assert state.started.tolist() == [0]
    assert state.remaining.tolist() == [NOT_ENDING]


@given(st.integers(1, 12), st.data())
def test_a_clip_ends_after_its_first_eos(num_codebooks, data):
    """When codebook i gives the first EOS, those before it follow at once, and the end comes K − i − 1 frames later."""
    first = data.draw(st.integers(0, num_codebooks - 1))
    state = DelayState.new(1)
    active = torch.ones(1, dtype=torch.bool)
    sound = torch.zeros(1, num_codebooks, dtype=torch.int64)
    for _ in range(num_codebooks):
        frame, ended = state.step(sound, active, BOS, EOS)
        assert not ended
    drawn = sound.clone()
    drawn[0, first] = EOS
    frame, ended = state.step(drawn, active, BOS, EOS)
    assert frame[0].tolist() == [EOS] * (first + 1) + [0] * (num_codebooks - first - 1)
    steps = 0
    while not ended:
        frame, ended = state.step(sound, active, BOS, EOS)
        forced = first + 1 + steps
        assert frame[0].tolist() == [EOS] * forced + [0] * (num_codebooks - forced)
        steps += 1
    assert steps == num_codebooks - first - 1


@given(clips(min_frames=3), st.integers(1, 30))
def test_resuming_goes_on_where_the_clip_stood(codes, at):
    """Up to its first EOS a clip may be cut anywhere and taken up again from its last frame alone."""
    stream = to_stream(codes, BOS, EOS)
    at = min(at, codes.shape[1])
    state = DelayState.resume(stream[:, at].unsqueeze(0), BOS, EOS)
    fresh = DelayState.new(1)
    for column in range(1, at + 1):
        fresh.step(stream[:, column].unsqueeze(0), torch.ones(1, dtype=torch.bool), BOS, EOS)
    assert torch.equal(state.started, fresh.started)
    assert torch.equal(state.remaining, fresh.remaining)


def test_a_clip_that_is_not_active_is_left_alone():
    state = DelayState.new(2)
    drawn = torch.tensor([[1, 2, 3], [EOS, 2, 3]])
    _, ended = state.step(drawn, torch.tensor([True, False]), BOS, EOS)
    assert ended.tolist() == [False, False]
    assert state.started.tolist() == [1, 0]
    assert state.remaining.tolist() == [NOT_ENDING, NOT_ENDING]
