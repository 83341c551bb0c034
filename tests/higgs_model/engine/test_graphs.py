"""Decode steps obey the rules of CUDA graphs: captured once, replayed on fixed tensors, no synchronization."""

import dataclasses

import numpy as np
import pytest
import torch

from higgs_model.engine import Engine, EngineSettings
from higgs_model.engine import engine as engine_module
from higgs_model.engine.attention_paged import PagedAttention
from higgs_model.engine.early_stopping import EarlyStoppingLimits
from higgs_model.engine.runner import Runner
from higgs_model.sampling import SamplingParams, SamplingPlan
from tests.higgs_model.engine import helpers
from tests.higgs_model.engine.fake_capture import FakeCudaCapture, HostSync

SETTINGS = EngineSettings(
    max_slots=6,
    max_positions=256,
    block_size=16,
    early_stopping=EarlyStoppingLimits(loop_frames=None),
    look_ahead=1,
    row_buckets=(2, 6),
    candidates=(8, 1 << 30),
)


@pytest.fixture
def paged(monkeypatch):
    monkeypatch.setattr(engine_module, "ContiguousAttention", PagedAttention)


def make_requests():
    """Return fourteen requests with four kinds of sampling, so that slots are reused with other parameters."""
    return [helpers.make_request(n, tokens=8, clip=5 + 9 * n % 40, max_frames=8 + 5 * n % 17) for n in range(14)]


def test_captured_steps_generate_the_same_codes_as_eager_ones(paged):
    network, capture = helpers.make_network(endless=True), FakeCudaCapture()
    expected, _ = helpers.run(Engine(network, dataclasses.replace(SETTINGS, candidates=())), make_requests())
    engine = Engine(network, SETTINGS, capture=capture)
    first, *others = make_requests()
    actual = helpers.run(engine, [first])[0] | helpers.run(engine, others)[0]
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])
    # One step for few greedy rows and one for more sampled ones; each ran for real before it was captured.
    assert capture.log == ["run", "record"] * 2
    assert capture.replays == engine.metrics.steps


def test_preemption_does_not_change_codes_of_captured_steps(paged):
    network = helpers.make_network(endless=True)
    expected, _ = helpers.run(Engine(network, SETTINGS), make_requests())
    preempting = Engine(network, dataclasses.replace(SETTINGS, num_blocks=14), capture=FakeCudaCapture())
    actual, _ = helpers.run(preempting, make_requests())
    assert preempting.scheduler.counters.preemptions > 0
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])


def test_capture_does_not_change_decoding_slots(paged):
    """A step that is first needed while requests are running is captured without affecting them."""
    engine = Engine(helpers.make_network(endless=True), SETTINGS, capture=FakeCudaCapture())
    engine.add(helpers.make_request(0))
    for _ in range(5):
        engine.step()
    rows = engine.runner.state.rows.clone()
    engine.runner.warm_up([1, 3], [SamplingPlan(5, True)])
    assert torch.equal(engine.runner.state.rows, rows)
    assert rows[0, 0] == 1


@pytest.mark.parametrize("sync", ["item", "mask"])
def test_fake_capture_rejects_a_step_that_synchronizes_with_the_host(paged, monkeypatch, sync):
    """Otherwise the tests above would prove nothing."""
    original = Runner._step

    def step(self, rows, plan):
        original(self, rows, plan)
        if sync == "item":
            bool(self.state.active.any())
        else:
            self.state.frame[self.state.active.bool()] = 0

    monkeypatch.setattr(Runner, "_step", step)
    engine = Engine(helpers.make_network(endless=True), SETTINGS, capture=FakeCudaCapture())
    engine.add(helpers.make_request(0))
    with pytest.raises(HostSync):
        engine.step()


def test_fake_capture_reveals_a_seed_that_is_frozen_at_capture(paged, monkeypatch):
    """With a sampler that reads its seed on the host during capture."""
    engine = Engine(helpers.make_network(endless=True), SETTINGS, capture=FakeCudaCapture())
    sampler = engine.runner._sampler
    engine.runner._sampler = lambda logits, seed, step, *rest: sampler(logits, torch.zeros_like(seed) + 5, step, *rest)
    sampling = SamplingParams(do_sample=True)
    requests = [
        dataclasses.replace(helpers.make_request(1), id=str(seed), seed=seed, sampling=sampling) for seed in (5, 6)
    ]
    actual, _ = helpers.run(engine, requests)
    np.testing.assert_array_equal(actual["5"], actual["6"])
    actual, _ = helpers.run(Engine(helpers.make_network(endless=True), SETTINGS, capture=FakeCudaCapture()), requests)
    assert not np.array_equal(actual["5"], actual["6"])


def test_step_does_not_overwrite_unread_results(paged):
    engine = Engine(helpers.make_network(endless=True), SETTINGS, capture=FakeCudaCapture())
    engine.add(helpers.make_request(0))
    engine.step()
    plan = SamplingPlan(8, True)
    first = engine.runner.decode(2, plan)
    unread = first.host.clone()
    second = engine.runner.decode(2, plan)
    assert torch.equal(first.host, unread)
    assert not torch.equal(second.host, unread)
    # There is one buffer more than there may be steps in flight.
    assert engine.runner.decode(2, plan).host.data_ptr() == first.host.data_ptr()
