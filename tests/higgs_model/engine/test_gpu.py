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
from higgs_model.sampling import SamplingParams, SamplingPlan
from tests.higgs_model.codec import golden
from tests.higgs_model.engine import helpers
from tests.higgs_model.engine.gpu_cases import SETTINGS, fill_pool, make_network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def float32_network():
    return make_network("cuda")


@pytest.fixture(scope="module")
def bfloat16_network():
    return make_network("cuda", torch.bfloat16)


def differing_share(actual, expected):
    """Return the share of frames that differ; frames beyond the end of the shorter clip count as different."""
    assert actual.keys() == expected.keys()
    same = total = 0
    for name in expected:
        clip, other = actual[name], expected[name]
        common = min(clip.shape[1], other.shape[1])
        same += int((clip[:, :common] == other[:, :common]).all(axis=0).sum())
        total += max(clip.shape[1], other.shape[1])
    return 1 - same / total


def test_captured_steps_agree_with_the_cpu(float32_network):
    """In float32, codes may differ only where two are almost equally likely."""
    requests = [helpers.make_request(n, clip=5 + n, max_frames=20 + n) for n in range(24)]
    actual, reasons = helpers.run(Engine(float32_network, SETTINGS), requests)
    # Sampled requests may end before their limit.
    assert set(reasons.values()) <= {FinishReason.LENGTH, FinishReason.STOP}
    expected, _ = helpers.run(Engine(make_network(), SETTINGS), requests)
    assert differing_share(actual, expected) < 0.05


def test_concurrent_requests_change_almost_no_frames(float32_network):
    requests = [helpers.make_request(n, voice=n % 2, clip=40, tokens=40, max_frames=30) for n in range(32)]
    together, _ = helpers.run(Engine(float32_network, SETTINGS), requests)
    alone = Engine(float32_network, SETTINGS)
    separate = {request.id: helpers.run(alone, [request])[0][request.id] for request in requests}
    assert differing_share(together, separate) < 0.05


def test_preemption_changes_almost_no_frames(float32_network):
    requests = helpers.mixed_requests(20, max_frames=40)
    expected, _ = helpers.run(Engine(float32_network, SETTINGS), requests)
    preempting = Engine(float32_network, dataclasses.replace(SETTINGS, num_blocks=40))
    actual, _ = helpers.run(preempting, requests)
    assert preempting.scheduler.counters.preemptions > 0
    assert preempting.pool.used == 0
    assert differing_share(actual, expected) < 0.05


def test_seeds_are_not_frozen_in_a_graph(float32_network):
    engine = Engine(float32_network, SETTINGS)
    sampling = SamplingParams(do_sample=True)
    requests = [
        dataclasses.replace(helpers.make_request(1), id=str(n), seed=n % 4, sampling=sampling) for n in range(8)
    ]
    actual, _ = helpers.run(engine, requests)
    for n in range(4):
        np.testing.assert_array_equal(actual[str(n)], actual[str(n + 4)])
    assert len({actual[str(n)].tobytes() for n in range(4)}) == 4


def test_captured_and_eager_steps_are_identical(float32_network):
    """Bit-identical: replaying changes neither order nor kernels."""
    requests = helpers.mixed_requests(8)
    actual, _ = helpers.run(Engine(float32_network, SETTINGS), requests)
    expected, _ = helpers.run(Engine(float32_network, SETTINGS, capture=lambda step: step), requests)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_selected_kernels_are_correct(bfloat16_network, fp8_cache):
    """On a pool whose unused memory is NaN, with rows of many lengths and of none."""
    if fp8_cache and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 units")
    attention = Engine(bfloat16_network, dataclasses.replace(SETTINGS, fp8_cache=fp8_cache)).runner.attention
    assert not isinstance(attention.decode_kernels, GatherKernels)
    lengths, queries = fill_pool(attention, "cuda", torch.bfloat16)
    pool = attention._layers[0]
    actual = attention.decode(0, queries, lengths)
    expected = GatherKernels().decode(queries, pool, attention._table, lengths)
    has_positions = lengths > 0
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[has_positions].float(), expected[has_positions].float(), atol=0.03, rtol=0)


def test_bfloat16_agrees_with_float32(float32_network, bfloat16_network):
    """After one greedy step, nearly all frames are the same, and none is invalid."""
    requests = [helpers.make_request(n, sampling=SamplingParams(), max_frames=1) for n in range(32)]
    expected, _ = helpers.run(Engine(float32_network, SETTINGS), requests)
    actual, reasons = helpers.run(Engine(bfloat16_network, SETTINGS), requests)
    assert FinishReason.INVALID not in reasons.values()
    shares = [(actual[name] == expected[name]).mean() for name in expected]
    assert np.mean(shares) > 0.8


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs fp8 units")
def test_fp8_weights_and_cache_run(bfloat16_network):
    weight, hidden = torch.randn(256, 128, device="cuda"), torch.randn(5, 128, device="cuda")
    linear = fp8.Fp8Linear.from_weight(weight.bfloat16(), None)
    actual = linear(hidden.bfloat16()).float()
    emulated = fp8.Fp8Linear(linear.weight.cpu(), linear.scale.cpu(), None)(hidden.bfloat16().cpu()).float()
    torch.testing.assert_close(actual.cpu(), emulated, atol=0.15, rtol=0.02)
    settings = dataclasses.replace(SETTINGS, fp8_weights=True, fp8_cache=True)
    _, reasons = helpers.run(Engine(bfloat16_network, settings), helpers.mixed_requests(8))
    assert FinishReason.INVALID not in reasons.values()


def test_decode_steps_do_not_synchronize(float32_network):
    """A step that synchronized with the device would raise."""
    engine = Engine(float32_network, SETTINGS)
    engine.add(helpers.make_request(0, max_frames=30))
    for _ in range(4):
        engine.step()
    value = torch.zeros(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            value.item()
        # Reading results waits for an event, which this mode does not count.
        for _ in range(5):
            engine.step()
        engine.runner.start(
            5, length=3, step=1, seed=1, sampling=SamplingParams(), history_WK=np.empty((0, 4), np.int64)
        )
        engine.runner.stop(5)
        engine.runner.attention.set_blocks(6, [1, 2, 3])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_while_the_codec_decodes_in_another_thread(float32_network, tmp_path):
    """Copies and allocations of another thread neither break a capture nor are broken by it."""
    codec = HiggsAudioCodec.from_pretrained(golden.write_original("rvq_24khz", tmp_path / "codec"))
    codes = np.random.RandomState(0).randint(0, codec.codebook_size, (codec.num_codebooks, 400))
    expected = codec.decode(codes).numpy()
    worker, engine = CodecWorker(codec.to("cuda")), Engine(float32_network, SETTINGS)

    async def decode():
        clip = worker.open_clip()
        return np.concatenate([await clip.push(codes), await clip.finish()])

    async def decode_and_capture():
        clips = [asyncio.create_task(decode()) for _ in range(20)]
        capture = asyncio.to_thread(engine.runner.warm_up, range(2, 10), [SamplingPlan(9, True)])
        return (await asyncio.gather(*clips, capture))[:-1]

    try:
        for samples in asyncio.run(decode_and_capture()):
            np.testing.assert_allclose(samples, expected, atol=1e-3)
    finally:
        worker.close()
    actual, _ = helpers.run(engine, helpers.mixed_requests(4))
    expected_codes, _ = helpers.run(Engine(float32_network, SETTINGS), helpers.mixed_requests(4))
    for name in actual:
        np.testing.assert_array_equal(actual[name], expected_codes[name])


def test_engine_loop_serves_concurrent_clients(float32_network):
    loop = EngineLoop(Engine(float32_network, SETTINGS))

    async def collect_frames(number):
        parts = [update.frames async for update in loop.generate(helpers.make_request(number, stream_every=2))]
        return np.concatenate(parts, axis=1)

    async def run_clients():
        return await asyncio.gather(*(collect_frames(number) for number in range(12)))

    try:
        actual = asyncio.run(run_clients())
    finally:
        loop.close()
    assert {frames.shape[0] for frames in actual} == {4}
    # Every fourth request is greedy and reaches its limit; the others may end before it.
    assert {actual[number].shape[1] for number in range(0, 12, 4)} == {40}
    assert max(frames.shape[1] for frames in actual) == 40


def test_lack_of_memory_is_detected_at_startup(float32_network, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Runner, "prefill", fail)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(float32_network, SETTINGS)
