"""The engine on a CUDA device compared with itself on the CPU."""

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
    """Return the share of frames that differ; frames beyond the end of the shorter clip count as different."""
    assert found.keys() == wanted.keys()
    same = total = 0
    for name in wanted:
        one, other = found[name], wanted[name]
        common = min(one.shape[1], other.shape[1])
        same += int((one[:, :common] == other[:, :common]).all(axis=0).sum())
        total += max(one.shape[1], other.shape[1])
    return 1 - same / total


def test_captured_steps_agree_with_the_cpu(exact):
    """In float32, codes may differ only where two are almost equally likely."""
    requests = [asked.request(n, clip=5 + n, max_frames=20 + n) for n in range(24)]
    found, reasons = asked.run(Engine(exact, SETTINGS), requests)
    # Sampled requests may end before their limit.
    assert set(reasons.values()) <= {FinishReason.LENGTH, FinishReason.STOP}
    wanted, _ = asked.run(Engine(network(), SETTINGS), requests)
    assert share_that_differs(found, wanted) < 0.05


def test_concurrent_requests_change_almost_no_frames(exact):
    requests = [asked.request(n, voice=n % 2, clip=40, tokens=40, max_frames=30) for n in range(32)]
    together, _ = asked.run(Engine(exact, SETTINGS), requests)
    alone = Engine(exact, SETTINGS)
    apart = {one.id: asked.run(alone, [one])[0][one.id] for one in requests}
    assert share_that_differs(together, apart) < 0.05


def test_preemption_changes_almost_no_frames(exact):
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


def test_captured_and_eager_steps_are_identical(exact):
    """Bit-identical: replaying changes neither order nor kernels."""
    requests = asked.uneven(8)
    found, _ = asked.run(Engine(exact, SETTINGS), requests)
    wanted, _ = asked.run(Engine(exact, SETTINGS, capture=lambda step: step), requests)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_selected_kernels_are_correct(narrow, fp8_cache):
    """On a pool whose unused memory is NaN, with rows of many lengths and of none."""
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


def test_bfloat16_agrees_with_float32(exact, narrow):
    """After one greedy step, nearly all frames are the same, and none is invalid."""
    requests = [asked.request(n, sampling=SamplingParams(), max_frames=1) for n in range(32)]
    wanted, _ = asked.run(Engine(exact, SETTINGS), requests)
    found, reasons = asked.run(Engine(narrow, SETTINGS), requests)
    assert FinishReason.INVALID not in reasons.values()
    codes = [(found[name] == wanted[name]).mean() for name in wanted]
    assert np.mean(codes) > 0.8


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs a chip with fp8 units"
)
def test_fp8_weights_and_cache_run(narrow):
    weight, hidden = torch.randn(256, 128, device="cuda"), torch.randn(5, 128, device="cuda")
    linear = fp8.Fp8Linear.from_weight(weight.bfloat16(), None)
    found = linear(hidden.bfloat16()).float()
    emulated = fp8.Fp8Linear(linear.weight.cpu(), linear.scale.cpu(), None)(hidden.bfloat16().cpu()).float()
    torch.testing.assert_close(found.cpu(), emulated, atol=0.15, rtol=0.02)
    settings = dataclasses.replace(SETTINGS, fp8_weights=True, fp8_cache=True)
    _, reasons = asked.run(Engine(narrow, settings), asked.uneven(8))
    assert FinishReason.INVALID not in reasons.values()


def test_decode_steps_do_not_synchronize(exact):
    """A step that synchronized with the device would raise."""
    running = Engine(exact, SETTINGS)
    running.add(asked.request(0, max_frames=30))
    for _ in range(4):
        running.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Reading results waits for an event, which this mode does not count.
        for _ in range(5):
            running.step()
        running.runner.start(
            5, length=3, step=1, seed=1, sampling=SamplingParams(), history_WK=np.empty((0, 4), np.int64)
        )
        running.runner.stop(5)
        running.runner.attention.set_blocks(6, [1, 2, 3])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_while_the_codec_decodes_in_another_thread(exact, tmp_path):
    """Copies and allocations of another thread neither break a capture nor are broken by it."""
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


def test_engine_loop_serves_concurrent_clients(exact):
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
    # Every fourth request is greedy and reaches its limit; the others may end before it.
    assert {found[number].shape[1] for number in range(0, 12, 4)} == {40}
    assert max(one.shape[1] for one in found) == 40


def test_lack_of_memory_is_detected_at_startup(exact, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Runner, "prefill", full)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(exact, SETTINGS)
