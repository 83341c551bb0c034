"""The asyncio interface: many concurrent clients, cancellation, and an engine that fails."""

import asyncio
import contextlib
import dataclasses
import threading

import numpy as np
import pytest
import torch

from higgs_model.engine import Engine, EngineSettings, FinishReason
from higgs_model.engine.early_stopping import EarlyStoppingLimits
from higgs_model.engine.loop import EngineLoop, EngineStopped
from higgs_model.errors import BadInput
from tests.higgs_model.engine import helpers


@pytest.fixture
def engine_loop():
    settings = EngineSettings(
        max_slots=4, max_positions=512, block_size=16, early_stopping=EarlyStoppingLimits(loop_frames=None)
    )
    engine_loop = EngineLoop(Engine(helpers.make_network(endless=True), settings))
    yield engine_loop
    engine_loop.close()


async def collect_frames(engine_loop, request):
    parts = [update.frames async for update in engine_loop.generate(request)]
    return np.concatenate(parts, axis=1)


def test_concurrent_clients_get_their_own_frames(engine_loop):
    requests = [helpers.make_request(n, stream_every=1 + n % 3) for n in range(9)]

    async def run_clients():
        return await asyncio.gather(*(collect_frames(engine_loop, request) for request in requests))

    actual = asyncio.run(run_clients())
    expected, _ = helpers.run(Engine(helpers.make_network(endless=True), engine_loop.engine.settings), requests)
    for request, frames in zip(requests, actual, strict=True):
        np.testing.assert_array_equal(frames, expected[request.id])


def test_closing_the_iterator_frees_the_slot(engine_loop):
    async def close_and_reuse_id():
        async with contextlib.aclosing(
            engine_loop.generate(helpers.make_request(4, stream_every=1, max_frames=300))
        ) as updates:
            async for _ in updates:
                break
        # Cancellation is queued first, so that the id can be used again.
        return await collect_frames(engine_loop, helpers.make_request(4, max_frames=10))

    assert asyncio.run(close_and_reuse_id()).shape[1] == 10
    assert engine_loop.engine.pool.used == 0


def test_invalid_request_raises_at_its_caller(engine_loop):
    async def run_clients():
        with pytest.raises(BadInput, match="max_frames=0"):
            await collect_frames(engine_loop, helpers.make_request(1, max_frames=0))
        return await collect_frames(engine_loop, helpers.make_request(8, max_frames=5))

    assert asyncio.run(run_clients()).shape[1] == 5


def test_engine_failure_reaches_all_callers(engine_loop):
    def fail(*_):
        raise ZeroDivisionError("an internal error")

    async def run_clients():
        waiting = asyncio.create_task(collect_frames(engine_loop, helpers.make_request(4, max_frames=300)))
        await asyncio.sleep(0.05)
        engine_loop.engine.runner.decode = fail
        with pytest.raises(EngineStopped, match="an internal error"):
            await waiting
        with pytest.raises(EngineStopped):
            await collect_frames(engine_loop, helpers.make_request(2))

    asyncio.run(run_clients())


def test_closing_stops_waiting_callers(engine_loop):
    async def run_clients():
        waiting = [
            asyncio.create_task(collect_frames(engine_loop, helpers.make_request(n, max_frames=400))) for n in (0, 4)
        ]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(engine_loop.close)
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [EngineStopped, EngineStopped]
        with pytest.raises(EngineStopped):
            await collect_frames(engine_loop, helpers.make_request(2))

    asyncio.run(run_clients())
    engine_loop.close()


def test_out_of_memory_is_the_cause_of_engine_stopped(engine_loop):
    """The owner of the engine can tell it from other failures, and continue with fewer slots."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine_loop.engine.runner.prefill = fail

    async def run_clients():
        with pytest.raises(EngineStopped, match="out of memory") as stopped:
            await collect_frames(engine_loop, helpers.make_request(4))
        assert isinstance(stopped.value.__cause__, torch.OutOfMemoryError)
        with pytest.raises(EngineStopped) as later:
            await collect_frames(engine_loop, helpers.make_request(5))
        assert isinstance(later.value.__cause__, torch.OutOfMemoryError)

    asyncio.run(run_clients())


def test_malformed_request_does_not_stop_the_engine(engine_loop):
    malformed = dataclasses.replace(helpers.make_request(1), clips=(None, object()))

    async def run_clients():
        with pytest.raises(BadInput):
            await collect_frames(engine_loop, malformed)
        with pytest.raises(TypeError):
            await collect_frames(engine_loop, dataclasses.replace(helpers.make_request(1), max_frames="many"))
        return await collect_frames(engine_loop, helpers.make_request(4, max_frames=5))

    assert asyncio.run(run_clients()).shape[1] == 5


def test_clients_may_run_in_different_event_loops(engine_loop):
    """One closes its iterator from another event loop than its own; the others get all of their frames."""
    actual, updates = {}, engine_loop.generate(helpers.make_request(0, stream_every=1, max_frames=300))

    async def count_first_frames():
        return (await anext(updates)).frames.shape[1]

    def run_client(number):
        actual[number] = asyncio.run(collect_frames(engine_loop, helpers.make_request(number, max_frames=30)))

    with asyncio.Runner() as runner:
        assert runner.run(count_first_frames()) >= 1
        threads = [threading.Thread(target=run_client, args=(number,)) for number in (4, 5, 8)]
        for thread in threads:
            thread.start()
        asyncio.run(updates.aclose())
        for thread in threads:
            thread.join()
    expected, _ = helpers.run(
        Engine(helpers.make_network(endless=True), engine_loop.engine.settings),
        [helpers.make_request(n, max_frames=30) for n in actual],
    )
    for number, frames in actual.items():
        np.testing.assert_array_equal(frames, expected[str(number)])
    assert asyncio.run(collect_frames(engine_loop, helpers.make_request(0, max_frames=3))).shape[1] == 3
    assert engine_loop.engine.metrics.finished[FinishReason.CANCELLED] == 1
