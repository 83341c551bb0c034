"""The asyncio face: many clients at once, some of whom leave; and an engine that breaks."""

import asyncio
import contextlib

import numpy as np
import pytest

from higgs_model.engine import Engine, EngineSettings
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


def test_clients_get_what_they_asked_for(running):
    requests = [asked.request(n, stream_every=1 + n % 3) for n in range(9)]

    async def everyone():
        return await asyncio.gather(*(listen(running, one) for one in requests))

    found = asyncio.run(everyone())
    wanted, _ = asked.run(Engine(asked.model(endless=True), running.engine.settings), requests)
    for one, frames in zip(requests, found, strict=True):
        np.testing.assert_array_equal(frames, wanted[one.id])


def test_who_stops_listening_frees_the_slot(running):
    async def leave():
        async with contextlib.aclosing(running.generate(asked.request(4, stream_every=1, max_frames=300))) as updates:
            async for _ in updates:
                break
        # Cancellation is mailed first, so that the same id may come again.
        return await listen(running, asked.request(4, max_frames=10))

    assert asyncio.run(leave()).shape[1] == 10
    assert running.engine.pool.used == 0


def test_bad_requests_are_told_so(running):
    async def ask():
        with pytest.raises(BadInput, match="max_frames=0"):
            await listen(running, asked.request(1, max_frames=0))
        return await listen(running, asked.request(8, max_frames=5))

    assert asyncio.run(ask()).shape[1] == 5


def test_a_broken_engine_says_so_to_all(running):
    def explode(*_):
        raise ZeroDivisionError("a fault of ours")

    async def ask():
        waiting = asyncio.create_task(listen(running, asked.request(4, max_frames=300)))
        await asyncio.sleep(0.05)
        running.engine.runner.decode = explode
        with pytest.raises(EngineStopped, match="a fault of ours"):
            await waiting
        with pytest.raises(EngineStopped):
            await listen(running, asked.request(2))

    asyncio.run(ask())
