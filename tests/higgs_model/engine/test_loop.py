"""The asyncio interface: many concurrent clients, cancellation, and an engine that fails."""

import asyncio
import contextlib
import dataclasses
import threading

import numpy as np
import pytest
import torch

from higgs_model.engine import Engine, EngineSettings, FinishReason
from higgs_model.engine.loop import EngineLoop, EngineStopped
from higgs_model.engine.watch import WatchLimits
from higgs_model.errors import BadInput
from tests.higgs_model.engine import requests as asked


@pytest.fixture
def running():
    settings = EngineSettings(max_slots=4, max_positions=512, block_size=16, watch=WatchLimits(loop_frames=None))
    loop = EngineLoop(Engine(asked.model(endless=True), settings))
    yield loop
    loop.close()


async def listen(loop, request):
    parts = [update.frames async for update in loop.generate(request)]
    return np.concatenate(parts, axis=1)


def test_concurrent_clients_get_their_own_frames(running):
    requests = [asked.request(n, stream_every=1 + n % 3) for n in range(9)]

    async def everyone():
        return await asyncio.gather(*(listen(running, one) for one in requests))

    found = asyncio.run(everyone())
    wanted, _ = asked.run(Engine(asked.model(endless=True), running.engine.settings), requests)
    for one, frames in zip(requests, found, strict=True):
        np.testing.assert_array_equal(frames, wanted[one.id])


def test_closing_the_iterator_frees_the_slot(running):
    async def leave():
        async with contextlib.aclosing(running.generate(asked.request(4, stream_every=1, max_frames=300))) as updates:
            async for _ in updates:
                break
        # Cancellation is queued first, so that the id can be used again.
        return await listen(running, asked.request(4, max_frames=10))

    assert asyncio.run(leave()).shape[1] == 10
    assert running.engine.pool.used == 0


def test_invalid_request_raises_at_its_caller(running):
    async def ask():
        with pytest.raises(BadInput, match="max_frames=0"):
            await listen(running, asked.request(1, max_frames=0))
        return await listen(running, asked.request(8, max_frames=5))

    assert asyncio.run(ask()).shape[1] == 5


def test_engine_failure_reaches_all_callers(running):
    def explode(*_):
        raise ZeroDivisionError("an internal error")

    async def ask():
        waiting = asyncio.create_task(listen(running, asked.request(4, max_frames=300)))
        await asyncio.sleep(0.05)
        running.engine.runner.decode = explode
        with pytest.raises(EngineStopped, match="an internal error"):
            await waiting
        with pytest.raises(EngineStopped):
            await listen(running, asked.request(2))

    asyncio.run(ask())


def test_closing_stops_waiting_callers(running):
    async def ask():
        waiting = [asyncio.create_task(listen(running, asked.request(n, max_frames=400))) for n in (0, 4)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(running.close)
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in found] == [EngineStopped, EngineStopped]
        with pytest.raises(EngineStopped):
            await listen(running, asked.request(2))

    asyncio.run(ask())
    running.close()


def test_out_of_memory_is_the_cause_of_engine_stopped(running):
    """The owner of the engine can tell it from other failures, and continue with fewer slots."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    running.engine.runner.prefill = full

    async def ask():
        with pytest.raises(EngineStopped, match="out of memory") as stopped:
            await listen(running, asked.request(4))
        assert isinstance(stopped.value.__cause__, torch.OutOfMemoryError)
        with pytest.raises(EngineStopped) as later:
            await listen(running, asked.request(5))
        assert isinstance(later.value.__cause__, torch.OutOfMemoryError)

    asyncio.run(ask())


def test_malformed_request_does_not_stop_the_engine(running):
    strange = dataclasses.replace(asked.request(1), clips=(None, object()))

    async def ask():
        with pytest.raises(BadInput):
            await listen(running, strange)
        with pytest.raises(TypeError):
            await listen(running, dataclasses.replace(asked.request(1), max_frames="many"))
        return await listen(running, asked.request(4, max_frames=5))

    assert asyncio.run(ask()).shape[1] == 5


def test_clients_may_run_in_different_event_loops(running):
    """One closes its iterator from another event loop than its own; the others get all of their frames."""
    found, updates = {}, running.generate(asked.request(0, stream_every=1, max_frames=300))

    async def first():
        return (await anext(updates)).frames.shape[1]

    def client(number):
        found[number] = asyncio.run(listen(running, asked.request(number, max_frames=30)))

    with asyncio.Runner() as own:
        assert own.run(first()) >= 1
        threads = [threading.Thread(target=client, args=(number,)) for number in (4, 5, 8)]
        for one in threads:
            one.start()
        asyncio.run(updates.aclose())
        for one in threads:
            one.join()
    wanted, _ = asked.run(
        Engine(asked.model(endless=True), running.engine.settings), [asked.request(n, max_frames=30) for n in found]
    )
    for number, frames in found.items():
        np.testing.assert_array_equal(frames, wanted[str(number)])
    assert asyncio.run(listen(running, asked.request(0, max_frames=3))).shape[1] == 3
    assert running.engine.metrics.finished[FinishReason.CANCELLED] == 1
