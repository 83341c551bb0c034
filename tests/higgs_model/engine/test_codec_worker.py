"""Decoding beside the engine: a clip's samples depend on its frames alone."""

import asyncio
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model.engine.codec_worker import CodecWorker, WorkerStopped, next_portion_frames
from higgs_model.errors import BadInput


@pytest.fixture(params=[False, True], ids=["single", "batched"])
def worker(request, codec):
    worker = CodecWorker(codec, batched=request.param)
    yield worker
    worker.close()


def make_codes(codec, num_frames, seed=0):
    return np.random.RandomState(seed).randint(0, codec.codebook_size, (codec.num_codebooks, num_frames))


async def decode(worker, codes_KT, sizes):
    """Decode a clip pushed in portions of the given sizes, cyclically."""
    clip, parts, start, count = worker.open_clip(), [], 0, 0
    while start < codes_KT.shape[1]:
        size = sizes[count % len(sizes)]
        parts.append(await clip.push(codes_KT[:, start : start + size]))
        start, count = start + size, count + 1
    return np.concatenate([*parts, await clip.finish()])


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    batched=st.booleans(),
)
def test_samples_depend_on_the_clips_frames_alone(load, lengths, sizes, batched):
    codec = load("rvq_24khz")
    worker = CodecWorker(codec, batched=batched)
    clips = [make_codes(codec, length, seed) for seed, length in enumerate(lengths)]

    async def decode_all():
        return await asyncio.gather(*(decode(worker, clip, sizes) for clip in clips))

    actual = asyncio.run(decode_all())
    for clip, samples in zip(clips, actual, strict=True):
        np.testing.assert_allclose(samples, codec.decode(clip).numpy(), atol=1e-4)
        if not batched:
            # Bit-identical, however its frames arrived and whatever else was decoded.
            np.testing.assert_array_equal(samples, asyncio.run(decode(worker, clip, [clip.shape[1]])))
    worker.close()


def test_first_samples_arrive_early(worker, codec):
    async def push_first():
        return len(await worker.open_clip().push(make_codes(codec, 30)))

    assert asyncio.run(push_first()) > 0


def test_portions_grow_up_to_the_maximum():
    starts = [0]
    while starts[-1] < 1000:
        starts.append(starts[-1] + next_portion_frames(starts[-1]))
    assert starts[:8] == [0, 8, 16, 32, 64, 128, 256, 384]


def test_empty_clip_has_no_samples(worker):
    assert len(asyncio.run(worker.open_clip().finish())) == 0


def test_invalid_codes_fail_only_their_own_clip(worker, codec):
    good = make_codes(codec, 50)

    async def decode_both():
        bad = np.full_like(good, codec.codebook_size)
        return await asyncio.gather(decode(worker, bad, [50]), decode(worker, good, [50]), return_exceptions=True)

    # Repeated, so that both are pending at the same time.
    for _ in range(10):
        error, samples = asyncio.run(decode_both())
    assert isinstance(error, BadInput)
    np.testing.assert_allclose(samples, codec.decode(good).numpy(), atol=1e-4)


def test_closing_fails_pending_clips(codec, monkeypatch):
    worker, entered, resume = CodecWorker(codec), threading.Event(), threading.Event()
    original = worker._decode_single

    def slow(job):
        entered.set()
        resume.wait(10)
        original(job)

    monkeypatch.setattr(worker, "_decode_single", slow)

    async def close_while_decoding():
        first, second = (asyncio.create_task(decode(worker, make_codes(codec, 20), [20])) for _ in range(2))
        await asyncio.to_thread(entered.wait, 10)
        closing = asyncio.create_task(asyncio.to_thread(worker.close))
        await asyncio.sleep(0.05)
        resume.set()
        await closing
        return await asyncio.gather(first, second, return_exceptions=True)

    assert any(isinstance(result, WorkerStopped) for result in asyncio.run(close_while_decoding()))
    with pytest.raises(WorkerStopped):
        asyncio.run(decode(worker, make_codes(codec, 20), [20]))


def test_cancelled_portion_is_not_decoded(codec, monkeypatch):
    worker = CodecWorker(codec)
    decoded, original = [], worker._decode_single

    def slow(job):
        decoded.append(job.frames_KT.shape[1])
        time.sleep(0.2)
        original(job)

    monkeypatch.setattr(worker, "_decode_single", slow)

    async def cancel_one():
        remaining = asyncio.create_task(decode(worker, make_codes(codec, 8), [8]))
        cancelled = asyncio.create_task(decode(worker, make_codes(codec, 7), [7]))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        return await remaining

    assert len(asyncio.run(cancel_one())) == 8 * codec.hop_samples
    worker.close()
    assert 7 not in decoded
