"""The engine on a CUDA device against itself on the CPU. Skipped without a device."""

import asyncio
import dataclasses

import numpy as np
import pytest
import torch

from higgs_model import HiggsAudioCodec
from higgs_model.engine import Engine, FinishReason, fp8
from higgs_model.engine.codec_worker import CodecWorker
from higgs_model.engine.kernels import GatherKernels
from higgs_model.engine.loop import EngineLoop
from higgs_model.engine.runner import Runner
from higgs_model.sampling import DrawPlan, SamplingParams
from tests.higgs_model.codec import golden
from tests.higgs_model.engine import requests as asked
from tests.higgs_model.engine.gpu_cases import SETTINGS, fill, network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def exact():
    return network("cuda")


@pytest.fixture(scope="module")
def narrow():
    return network("cuda", torch.bfloat16)


def share_that_differs(found, wanted):
    """Of all frames; those that one of the two has beyond the other's end differ."""
    assert found.keys() == wanted.keys()
    same = total = 0
    for name in wanted:
        one, other = found[name], wanted[name]
        common = min(one.shape[1], other.shape[1])
        same += int((one[:, :common] == other[:, :common]).all(axis=0).sum())
        total += max(one.shape[1], other.shape[1])
    return 1 - same / total


def test_captured_steps_say_what_the_cpu_says(exact):
    """In float32 codes may part only where two are all but equally likely."""
    requests = [asked.request(n, clip=5 + n, max_frames=20 + n) for n in range(24)]
    found, reasons = asked.run(Engine(exact, SETTINGS), requests)
    # Those that are sampled may end before their limit.
    assert set(reasons.values()) <= {FinishReason.LENGTH, FinishReason.STOP}
    wanted, _ = asked.run(Engine(network(), SETTINGS), requests)
    assert share_that_differs(found, wanted) < 0.05


def test_neighbours_change_next_to_nothing(exact):
    requests = [asked.request(n, voice=n % 2, clip=40, tokens=40, max_frames=30) for n in range(32)]
    together, _ = asked.run(Engine(exact, SETTINGS), requests)
    alone = Engine(exact, SETTINGS)
    apart = {one.id: asked.run(alone, [one])[0][one.id] for one in requests}
    assert share_that_differs(together, apart) < 0.05


def test_a_lost_slot_is_made_good(exact):
    requests = asked.uneven(20, max_frames=40)
    wanted, _ = asked.run(Engine(exact, SETTINGS), requests)
    tight = Engine(exact, dataclasses.replace(SETTINGS, num_blocks=40))
    found, _ = asked.run(tight, requests)
    assert tight.scheduler.counters.preemptions > 0
    assert tight.pool.used == 0
    assert share_that_differs(found, wanted) < 0.05


def test_seeds_are_not_frozen_in_a_graph(exact):
    running = Engine(exact, SETTINGS)
    sampling = SamplingParams(do_sample=True)
    same = [dataclasses.replace(asked.request(1), id=str(n), seed=n % 4, sampling=sampling) for n in range(8)]
    found, _ = asked.run(running, same)
    for n in range(4):
        np.testing.assert_array_equal(found[str(n)], found[str(n + 4)])
    assert len({found[str(n)].tobytes() for n in range(4)}) == 4


def test_recorded_and_plain_steps_are_the_same(exact):
    """Bit by bit: replaying changes neither order nor kernels."""
    requests = asked.uneven(8)
    found, _ = asked.run(Engine(exact, SETTINGS), requests)
    wanted, _ = asked.run(Engine(exact, SETTINGS, capture=lambda step: step), requests)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_the_kernels_that_were_chosen_are_right(narrow, fp8_cache):
    """Of a pool in which everything that is no row's is NaN; lengths of all kinds, and none."""
    if fp8_cache and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 units")
    attention = Engine(narrow, dataclasses.replace(SETTINGS, fp8_cache=fp8_cache)).runner.attention
    assert not isinstance(attention.decode_kernels, GatherKernels)
    lengths, queries = fill(attention, "cuda", torch.bfloat16)
    pool = attention._layers[0]
    found = attention.decode(0, queries, lengths)
    wanted = GatherKernels().decode(queries, pool, attention._table, lengths)
    some = lengths > 0
    assert found.isfinite().all()
    torch.testing.assert_close(found[some].float(), wanted[some].float(), atol=0.03, rtol=0)


def test_sixteen_bits_stay_near_thirty_two(exact, narrow):
    """One greedy step after a prompt: the same frame for nearly all, no frame without meaning."""
    requests = [asked.request(n, sampling=SamplingParams(), max_frames=1) for n in range(32)]
    wanted, _ = asked.run(Engine(exact, SETTINGS), requests)
    found, reasons = asked.run(Engine(narrow, SETTINGS), requests)
    assert FinishReason.INVALID not in reasons.values()
    codes = [(found[name] == wanted[name]).mean() for name in wanted]
    assert np.mean(codes) > 0.8


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs a chip with fp8 units"
)
def test_eight_bits(narrow):
    weight, hidden = torch.randn(256, 128, device="cuda"), torch.randn(5, 128, device="cuda")
    linear = fp8.Fp8Linear.of(weight.bfloat16(), None)
    found = linear(hidden.bfloat16()).float()
    emulated = fp8.Fp8Linear(linear.weight.cpu(), linear.scale.cpu(), None)(hidden.bfloat16().cpu()).float()
    torch.testing.assert_close(found.cpu(), emulated, atol=0.15, rtol=0.02)
    settings = dataclasses.replace(SETTINGS, fp8_weights=True, fp8_cache=True)
    _, reasons = asked.run(Engine(narrow, settings), asked.uneven(8))
    assert FinishReason.INVALID not in reasons.values()


def test_the_host_asks_nothing_between_frames(exact):
    """A step that waited for the device would raise here."""
    running = Engine(exact, SETTINGS)
    running.add(asked.request(0, max_frames=30))
    for _ in range(4):
        running.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Reading a finished step is an event's wait, which this mode does not count.
        for _ in range(5):
            running.step()
        running.runner.start(5, length=3, step=1, seed=1, sampling=SamplingParams(), spoken=np.empty((0, 4), np.int64))
        running.runner.stop(5)
        running.runner.attention.set_blocks(6, [1, 2, 3])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recording_while_the_codec_works(exact, tmp_path):
    """Another thread's copies and allocations neither break a graph that is being recorded nor are broken by it."""
    codec = HiggsAudioCodec.from_pretrained(golden.write_original("rvq_24khz", tmp_path / "codec"))
    codes = np.random.RandomState(0).randint(0, codec.codebook_size, (codec.num_codebooks, 400))
    wanted = codec.decode(codes).numpy()
    worker, running = CodecWorker(codec.to("cuda")), Engine(exact, SETTINGS)

    async def decode():
        clip = worker.clip()
        return np.concatenate([await clip.push(codes), await clip.finish()])

    async def both():
        clips = [asyncio.create_task(decode()) for _ in range(20)]
        recording = asyncio.to_thread(running.runner.warm_up, range(2, 10), [DrawPlan(9, True)])
        return (await asyncio.gather(*clips, recording))[:-1]

    try:
        for samples in asyncio.run(both()):
            np.testing.assert_allclose(samples, wanted, atol=1e-3)
    finally:
        worker.close()
    found, _ = asked.run(running, asked.uneven(4))
    wanted_codes, _ = asked.run(Engine(exact, SETTINGS), asked.uneven(4))
    for name in found:
        np.testing.assert_array_equal(found[name], wanted_codes[name])


def test_the_asyncio_face_in_a_thread_of_its_own(exact):
    loop = EngineLoop(Engine(exact, SETTINGS))

    async def listen(number):
        parts = [update.frames async for update in loop.generate(asked.request(number, stream_every=2))]
        return np.concatenate(parts, axis=1)

    async def everyone():
        return await asyncio.gather(*(listen(number) for number in range(12)))

    try:
        found = asyncio.run(everyone())
    finally:
        loop.close()
    assert {one.shape[0] for one in found} == {4}
    # Every fourth request is greedy and goes on to its limit; the others may end before it.
    assert {found[number].shape[1] for number in range(0, 12, 4)} == {40}
    assert max(one.shape[1] for one in found) == 40


def test_too_little_memory_is_missed_at_the_start(exact, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Runner, "prefill", full)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(exact, SETTINGS)
