"""The delay pattern: applied and undone, structure of the stream, and the incremental `DelayState`."""

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
def test_undo_delay_pattern_inverts_apply(codes):
    delayed = apply_delay_pattern(codes, BOS, EOS)
    assert delayed.shape == (codes.shape[0], codes.shape[1] + codes.shape[0] - 1)
    assert delayed.dtype == codes.dtype
    assert torch.equal(undo_delay_pattern(delayed), codes)


@given(clips())
def test_delayed_codebooks_are_padded_with_bos_and_eos(codes):
    delayed = apply_delay_pattern(codes, BOS, EOS)
    for k, row in enumerate(delayed):
        expected = [BOS] * k + codes[k].tolist() + [EOS] * (codes.shape[0] - 1 - k)
        assert row.tolist() == expected


@given(clips(), st.booleans())
def test_from_stream_recovers_a_complete_clip(codes, delay):
    stream = to_stream(codes, BOS, EOS, delay)
    assert stream.shape[1] == codes.shape[1] + 2 + (codes.shape[0] - 1 if delay else 0)
    assert torch.equal(from_stream(stream, SIZE, delay), codes)


@given(clips(min_frames=1), st.integers(1, 60))
def test_from_stream_keeps_the_complete_frames_of_a_truncated_clip(codes, columns):
    stream = to_stream(codes, BOS, EOS)[:, :columns]
    complete = min(max(stream.shape[1] - codes.shape[0], 0), codes.shape[1])
    assert torch.equal(from_stream(stream, SIZE), codes[:, :complete])


def test_to_stream_matches_the_example_in_the_docstring():
    codes = torch.tensor([[1, 2], [3, 4], [5, 6]])
    b, e = BOS, EOS
    assert to_stream(codes, b, e).tolist() == [[b, 1, 2, e, e, e], [b, b, 3, 4, e, e], [b, b, b, 5, 6, e]]


@given(clips(min_frames=1))
def test_delay_state_reproduces_the_stream_of_a_clip(codes):
    """Sampling the codes of a stream step by step returns that stream, and the clip ends with its last frame."""
    stream = to_stream(codes, BOS, EOS)
    state = DelayState.initial(1)
    active = torch.ones(1, dtype=torch.bool)
    for column in range(1, stream.shape[1]):
        expected = stream[:, column].unsqueeze(0)
        # Forced positions do not depend on the sampled codes.
        sampled = expected.masked_fill(expected == BOS, 0)
        frame, ended = state.step(sampled, active, BOS, EOS)
        assert torch.equal(frame, expected)
        assert bool(ended) == (column == stream.shape[1] - 1)
    assert state.num_started.tolist() == [0]
    assert state.num_remaining.tolist() == [NOT_ENDING]


@given(st.integers(1, 12), st.data())
def test_delay_state_ends_a_clip_after_its_first_eos(num_codebooks, data):
    """If codebook i samples the first EOS, codebooks before it follow at once; the clip ends K − i − 1 frames later."""
    first = data.draw(st.integers(0, num_codebooks - 1))
    state = DelayState.initial(1)
    active = torch.ones(1, dtype=torch.bool)
    sound = torch.zeros(1, num_codebooks, dtype=torch.int64)
    for _ in range(num_codebooks):
        frame, ended = state.step(sound, active, BOS, EOS)
        assert not ended
    sampled = sound.clone()
    sampled[0, first] = EOS
    frame, ended = state.step(sampled, active, BOS, EOS)
    assert frame[0].tolist() == [EOS] * (first + 1) + [0] * (num_codebooks - first - 1)
    steps = 0
    while not ended:
        frame, ended = state.step(sound, active, BOS, EOS)
        num_forced = first + 1 + steps
        assert frame[0].tolist() == [EOS] * num_forced + [0] * (num_codebooks - num_forced)
        steps += 1
    assert steps == num_codebooks - first - 1


@given(clips(min_frames=3), st.integers(1, 30))
def test_delay_state_resumes_from_the_last_frame(codes, cut):
    """Before its first EOS, a clip can be cut anywhere and resumed from its last frame alone."""
    stream = to_stream(codes, BOS, EOS)
    cut = min(cut, codes.shape[1])
    resumed = DelayState.resume(stream[:, cut].unsqueeze(0), BOS, EOS)
    stepped = DelayState.initial(1)
    for column in range(1, cut + 1):
        stepped.step(stream[:, column].unsqueeze(0), torch.ones(1, dtype=torch.bool), BOS, EOS)
    assert torch.equal(resumed.num_started, stepped.num_started)
    assert torch.equal(resumed.num_remaining, stepped.num_remaining)


def test_delay_state_of_an_inactive_clip_is_unchanged():
    state = DelayState.initial(2)
    sampled = torch.tensor([[1, 2, 3], [EOS, 2, 3]])
    _, ended = state.step(sampled, torch.tensor([True, False]), BOS, EOS)
    assert ended.tolist() == [False, False]
    assert state.num_started.tolist() == [1, 0]
    assert state.num_remaining.tolist() == [NOT_ENDING, NOT_ENDING]
