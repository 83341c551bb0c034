"""Decode steps under the terms of a CUDA graph: recorded once, replayed on fixed tensors, the host asks nothing."""

import dataclasses

import numpy as np
import pytest
import torch

from higgs_model.engine import Engine, EngineSettings
from higgs_model.engine import engine as engine_room
from higgs_model.engine.attention_paged import PagedAttention
from higgs_model.engine.runner import Runner
from higgs_model.engine.watch import WatchLimits
from higgs_model.sampling import DrawPlan, SamplingParams
from tests.higgs_model.engine import requests as asked
from tests.higgs_model.engine.tape import HostAsks, Tape

SETTINGS = EngineSettings(
    max_slots=6,
    max_positions=256,
    block_size=16,
    watch=WatchLimits(loop_frames=None),
    look_ahead=1,
    row_buckets=(2, 6),
    candidates=(8, 1 << 30),
)


@pytest.fixture
def paged(monkeypatch):
    monkeypatch.setattr(engine_room, "RowAttention", PagedAttention)


def requests():
    """Fourteen with four kinds of sampling, so that slots change hands, and with them seeds and parameters."""
    return [asked.request(n, tokens=8, clip=5 + 9 * n % 40, max_frames=8 + 5 * n % 17) for n in range(14)]


def test_recorded_steps_say_what_steps_say(paged):
    network, tape = asked.model(endless=True), Tape()
    wanted, _ = asked.run(Engine(network, dataclasses.replace(SETTINGS, candidates=())), requests())
    running = Engine(network, SETTINGS, capture=tape)
    first, *others = requests()
    found = asked.run(running, [first])[0] | asked.run(running, others)[0]
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    # Few rows that take the likeliest code, and more that draw; each was run for real before it was recorded.
    assert tape.log == ["run", "record"] * 2
    assert tape.replays == running.metrics.steps


def test_a_lost_slot_changes_nothing_in_recorded_steps(paged):
    network = asked.model(endless=True)
    wanted, _ = asked.run(Engine(network, SETTINGS), requests())
    tight = Engine(network, dataclasses.replace(SETTINGS, num_blocks=14), capture=Tape())
    found, _ = asked.run(tight, requests())
    assert tight.scheduler.counters.preemptions > 0
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_recording_changes_no_slot_that_speaks(paged):
    """A kind of step that is first needed in mid-run is run and recorded without anybody noticing."""
    running = Engine(asked.model(endless=True), SETTINGS, capture=Tape())
    running.add(asked.request(0))
    for _ in range(5):
        running.step()
    before = running.runner.state.rows.clone()
    running.runner.warm_up([1, 3], [DrawPlan(5, True)])
    assert torch.equal(running.runner.state.rows, before)
    assert before[0, 0] == 1


@pytest.mark.parametrize("fault", ["asks", "mask"])
def test_a_step_that_asks_the_host_is_refused(paged, monkeypatch, fault):
    """The tape sees what a graph could not record; else the tests above would prove nothing."""
    inner = Runner._step

    def step(self, rows, plan):
        inner(self, rows, plan)
        if fault == "asks":
            bool(self.state.active.any())
        else:
            self.state.frame[self.state.active.bool()] = 0

    monkeypatch.setattr(Runner, "_step", step)
    running = Engine(asked.model(endless=True), SETTINGS, capture=Tape())
    running.add(asked.request(0))
    with pytest.raises(HostAsks):
        running.step()


def test_a_frozen_seed_would_be_seen(paged, monkeypatch):
    """The same again: a sampler that reads its seed on the host when it is recorded."""
    running = Engine(asked.model(endless=True), SETTINGS, capture=Tape())
    inner = running.runner._sampler
    running.runner._sampler = lambda logits, seed, step, *rest: inner(logits, torch.zeros_like(seed) + 5, step, *rest)
    sampling = SamplingParams(do_sample=True)
    same = [dataclasses.replace(asked.request(1), id=str(seed), seed=seed, sampling=sampling) for seed in (5, 6)]
    found, _ = asked.run(running, same)
    np.testing.assert_array_equal(found["5"], found["6"])
    found, _ = asked.run(Engine(asked.model(endless=True), SETTINGS, capture=Tape()), same)
    assert not np.array_equal(found["5"], found["6"])


def test_a_step_does_not_overwrite_what_the_host_has_not_read(paged):
    running = Engine(asked.model(endless=True), SETTINGS, capture=Tape())
    running.add(asked.request(0))
    running.step()
    plan = DrawPlan(8, True)
    first = running.runner.decode(2, plan)
    kept = first.host.clone()
    second = running.runner.decode(2, plan)
    assert torch.equal(first.host, kept)
    assert not torch.equal(second.host, kept)
    # One door more than steps that may be under way.
    assert running.runner.decode(2, plan).host.data_ptr() == first.host.data_ptr()
