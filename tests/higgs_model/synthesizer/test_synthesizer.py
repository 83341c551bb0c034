"""Synthesis of scripts: complete, in order, and independent of concurrent scripts."""

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest

from higgs_model import Script
from higgs_model.errors import BadInput
from higgs_model.script.chunking import Chunk
from higgs_model.synthesizer import Pauses, SynthesisSettings, Synthesizer
from higgs_model.synthesizer.synthesizer import _drop_old_takes, pause_after_ms

DIALOGUE = {
    "id": "dialogue",
    "turns": [
        {"speaker": "Ann", "text": "Good morning, did you sleep well?"},
        {"speaker": "Bob", "text": "Well enough, thank you for asking."},
        {"speaker": "Ann", "text": "Then let us begin. [pause:0.7s] The day is short."},
    ],
    "voices": {"Ann": "ann", "Bob": "bob"},
}
STORY = {
    "id": "story",
    "text": "The mill\n\n" + "\n\n".join(f"Once there was a miller with {n} sons and a mill." for n in range(2, 7)),
    "chunk_method": "sentence",
    "chunk_max_words": 14,
    "voice": "ann",
}


def script(row, **changes):
    return Script.model_validate({"max_frames": 40, "seed": 5} | row | changes)


def with_settings(demo, **changes):
    """Return a synthesizer with changed settings and the same engine and codec."""
    return Synthesizer(
        demo.engine,
        demo.worker,
        demo._tokenizer,
        references=demo._references,
        voices=demo.voices,
        settings=dataclasses.replace(demo.settings, **changes),
    )


async def collect(synthesizer, script, **options):
    plan = await asyncio.to_thread(synthesizer.plan, script)
    pieces = [piece async for piece in synthesizer.stream(plan, **options)]
    samples = np.concatenate([piece.samples_N for piece in pieces])
    return samples, [piece.chunk for piece in pieces if piece.chunk is not None]


def test_dialogue_has_a_chunk_per_turn(demo):
    speech = demo.synthesize(script(DIALOGUE))
    assert [chunk.speakers for chunk in speech.chunks] == [("Ann",), ("Bob",), ("Ann",), ("Ann",)]
    assert speech.waveform.dtype == np.float32
    assert np.isfinite(speech.waveform).all()
    assert speech.sample_rate == 24_000
    first, *_, last = speech.chunks
    assert first.start_sample == 0
    assert last.stop_sample == len(speech.waveform)
    gaps = [b.start_sample - a.stop_sample for a, b in zip(speech.chunks, speech.chunks[1:], strict=False)]
    assert gaps == [14_400, 14_400, 16_800]  # two turns of 0.6 s, and the requested pause


def test_chunks_have_silence_between_them(demo):
    speech = demo.synthesize(script(DIALOGUE))
    for chunk in speech.chunks:
        # There is only room tone between chunks.
        after = speech.waveform[chunk.stop_sample : chunk.stop_sample + 10_000]
        assert np.abs(after).max(initial=0) < 0.002 or chunk is speech.chunks[-1]


def test_audio_does_not_depend_on_concurrent_scripts(demo):
    alone = demo.synthesize(script(DIALOGUE)).waveform

    async def synthesize_concurrently():
        others = [collect(demo, script(STORY, seed=n)) for n in range(5)]
        results = await asyncio.gather(collect(demo, script(DIALOGUE)), *others, collect(demo, script(DIALOGUE)))
        return results[0][0], results[-1][0], [samples for samples, _ in results[1:-1]]

    first, second, others = asyncio.run(synthesize_concurrently())
    np.testing.assert_array_equal(first, alone)
    np.testing.assert_array_equal(second, alone)
    assert len({samples.tobytes() for samples in others}) == len(others)


def test_live_audio_is_bit_identical_to_the_first_take(demo):
    single_attempt = with_settings(demo, attempts=1)
    expected, _ = asyncio.run(collect(single_attempt, script(DIALOGUE)))
    live, _ = asyncio.run(collect(single_attempt, script(DIALOGUE), live=True))
    np.testing.assert_array_equal(live, expected)


def test_live_samples_are_yielded_before_the_chunk_ends(demo):
    async def get_first_piece():
        plan = demo.plan(script(DIALOGUE, max_frames=200))
        async with contextlib.aclosing(demo.stream(plan, live=True)) as pieces:
            async for piece in pieces:
                if len(piece.samples_N):
                    return piece
        return None

    assert asyncio.run(get_first_piece()).chunk is None
    # Closing the iterator frees the slot.
    asyncio.run(collect(demo, script(STORY, max_frames=5)))
    assert demo.engine.engine.snapshot()["running"] == 0


def test_faulty_takes_are_retried_and_all_attempts_recorded(demo):
    speech = demo.synthesize(script(STORY, max_frames=30))
    takes = [chunk.take for chunk in speech.chunks]
    assert any(len(take.attempts) > 1 for take in takes)
    for take in takes:
        seeds = [attempt.seed for attempt in take.attempts]
        assert len(set(seeds)) == len(seeds) <= 3
        assert take.codes_KT.shape == (8, take.attempt.frames)
        assert take.passed_checks or len(take.attempts) == 3
        if take.passed_checks:
            assert take.attempt_index == len(take.attempts) - 1


def test_transcript_check_runs_only_on_takes_without_faults(demo):
    checked = []

    def check(samples, rate, text, language):
        checked.append((len(samples), rate, text, language))
        return ["said something else"] if len(checked) == 1 else []

    lenient = dataclasses.replace(demo.settings.limits, chars_per_s=(0.1, 10_000), max_inner_silence_s=100)
    synthesizer = with_settings(demo, check=check, limits=lenient, attempts=6)
    greeting = Script.model_validate({"id": "x", "text": "Well, hello.", "language": "en", "seed": 3})
    (chunk,) = synthesizer.synthesize(greeting).chunks
    assert checked[0][1:] == (24_000, "Well, hello.", "en")
    checked_attempts = [attempt for attempt in chunk.take.attempts if attempt.notes or not attempt.faults]
    assert checked_attempts[0].faults == ("text",)
    assert checked_attempts[0].notes == ("said something else",)
    assert chunk.take.passed_checks


class MemoryStore:
    """A segment store in memory."""

    def __init__(self):
        self.segments, self.loads = {}, []

    def load(self, segment):
        self.loads.append(segment)
        return self.segments.get(segment)

    def save(self, segment, takes):
        self.segments[segment] = takes


def test_segments_are_joined_in_order_and_stored(demo):
    synthesizer = with_settings(demo, segment_s=4.0)
    plan = synthesizer.plan(script(STORY))
    ranges = synthesizer.segments(plan)
    assert len(ranges) > 2
    store = MemoryStore()
    samples, chunks = asyncio.run(collect(synthesizer, script(STORY), segment_store=store))
    assert [chunk.index for chunk in chunks] == list(range(len(plan.chunks)))
    assert sorted(store.segments, key=lambda segment: segment.start) == ranges
    # A later run generates only the missing segments, with the same samples.
    del store.segments[ranges[1]]
    num_requests = demo.engine.engine.metrics.requests
    resumed, _ = asyncio.run(collect(synthesizer, script(STORY), segment_store=store))
    np.testing.assert_array_equal(resumed, samples)
    assert 0 < demo.engine.engine.metrics.requests - num_requests <= 3 * len(ranges[1])


def test_invalid_script_raises_a_clear_error(demo):
    with pytest.raises(BadInput, match="carl"):
        demo.synthesize(script(STORY, voice="carl"))
    with pytest.raises(BadInput, match="ras_win_len=999"):
        demo.synthesize(script(STORY, ras_win_len=999))


def test_empty_take_is_flagged_and_has_no_duration(demo):
    synthesizer = with_settings(
        demo, silence=dataclasses.replace(demo.settings.silence, threshold_dbfs=0.0), attempts=2
    )
    speech = synthesizer.synthesize(script(DIALOGUE))
    assert {chunk.take.attempt.faults[-1] for chunk in speech.chunks} == {"no_audio"}
    assert all(chunk.start_sample == chunk.stop_sample for chunk in speech.chunks)


@pytest.mark.parametrize(
    ("chunk", "expected_ms"),
    [
        (Chunk(0, "It ends.", boundary="sentence"), 200),
        (Chunk(0, "It ends.", boundary="paragraph"), 500),
        (Chunk(0, "Chapter One", boundary="paragraph"), 900),
        (Chunk(0, "It ends.", boundary="turn"), 600),
        (Chunk(0, "It ends.", boundary="pause", silence_after_ms=1500), 1500),
        (Chunk(0, "It ends.", boundary="end"), 0),
        (Chunk(0, "It ends.", boundary="end", silence_after_ms=250), 250),
    ],
)
def test_pause_depends_on_the_boundary(chunk, expected_ms):
    assert pause_after_ms(chunk, Pauses()) == expected_ms


def test_takes_beyond_the_context_are_dropped():
    history = [np.zeros((8, 100), np.int64) for _ in range(50)]
    _drop_old_takes(history, 1000)
    remaining = [index for index, take in enumerate(history) if take is not None]
    assert remaining == list(range(39, 50))


def test_invalid_settings_are_refused():
    for changes in ({"attempts": 0}, {"segment_s": 0.0}, {"segments_at_once": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            SynthesisSettings(**changes)
    with pytest.raises(ValueError, match="turn=-1"):
        Pauses(turn=-1)
