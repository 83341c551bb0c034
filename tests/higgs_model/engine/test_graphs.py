"""Decode steps obey the rules of CUDA graphs: captured once, replayed on fixed tensors, no synchronization."""

import dataclasses

import numpy as np
import pytest
import torch

from higgs_model.engine import Engine, EngineSettings
from higgs_model.engine import engine as engine_module
from higgs_model.engine.attention_paged import PagedAttention
from higgs_model.engine.runner import Runner
from higgs_model.engine.watch import WatchLimits
from higgs_model.sampling import DrawPlan, SamplingParams
from tests.higgs_model.engine import requests as asked
from tests.higgs_model.engine.tape import HostSync, Tape

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
    monkeypatch.setattr(engine_module, "RowAttention", PagedAttention)


def requests():
    """Return fourteen requests with four kinds of sampling, so that slots are reused with other parameters."""
    return [asked.request(n, tokens=8, clip=5 + 9 * n % 40, max_frames=8 + 5 * n % 17) for n in range(14)]


def test_captured_steps_generate_the_same_codes_as_eager_ones(paged):
    network, tape = asked.model(endless=True), Tape()
    wanted, _ = asked.run(Engine(network, dataclasses.replace(SETTINGS, candidates=())), requests())
    running = Engine(network, SETTINGS, capture=tape)
    first, *others = requests()
    found = asked.run(running, [first])[0] | asked.run(running, others)[0]
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    # One step for few greedy rows and one for more sampled ones; each ran for real before it was captured.
    assert tape.log == ["run", "record"] * 2
    assert tape.replays == running.metrics.steps


def test_preemption_does_not_change_codes_of_captured_steps(paged):
    network = asked.model(endless=True)
    wanted, _ = asked.run(Engine(network, SETTINGS), requests())
    tight = Engine(network, dataclasses.replace(SETTINGS, num_blocks=14), capture=Tape())
    found, _ = asked.run(tight, requests())
    assert tight.scheduler.counters.preemptions > 0
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])


def test_capture_does_not_change_decoding_slots(paged):
    """A step that is first needed while requests are running is captured without affecting them."""
    running = Engine(asked.model(endless=True), SETTINGS, capture=Tape())
    running.add(asked.request(0))
    for _ in range(5):
        running.step()
    before = running.runner.state.rows.clone()
    running.runner.warm_up([1, 3], [DrawPlan(5, True)])
    assert torch.equal(running.runner.state.rows, before)
    assert before[0, 0] == 1


@pytest.mark.parametrize("fault", ["asks", "mask"])
def test_tape_rejects_a_step_that_synchronizes_with_the_host(paged, monkeypatch, fault):
    """Otherwise the tests above would prove nothing."""
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
    with pytest.raises(HostSync):
        running.step()


def test_tape_reveals_a_seed_that_is_frozen_at_capture(paged, monkeypatch):
    """With a sampler that reads its seed on the host during capture."""
    running = Engine(asked.model(endless=True), SETTINGS, capture=Tape())
    inner = running.runner._sampler
    running.runner._sampler = lambda logits, seed, step, *rest: inner(logits, torch.zeros_like(seed) + 5, step, *rest)
    sampling = SamplingParams(do_sample=True)
    same = [dataclasses.replace(asked.request(1), id=str(seed), seed=seed, sampling=sampling) for seed in (5, 6)]
    found, _ = asked.run(running, same)
    np.testing.assert_array_equal(found["5"], found["6"])
    found, _ = asked.run(Engine(asked.model(endless=True), SETTINGS, capture=Tape()), same)
    assert not np.array_equal(found["5"], found["6"])


def test_step_does_not_overwrite_unread_results(paged):
    running = Engine(asked.model(endless=True), SETTINGS, capture=Tape())
    running.add(asked.request(0))
    running.step()
    plan = DrawPlan(8, True)
    first = running.runner.decode(2, plan)
    kept = first.host.clone()
    second = running.runner.decode(2, plan)
    assert torch.equal(first.host, kept)
    assert not torch.equal(second.host, kept)
    # There is one buffer more than there may be steps in flight.
    assert running.runner.decode(2, plan).host.data_ptr() == first.host.data_ptr()
