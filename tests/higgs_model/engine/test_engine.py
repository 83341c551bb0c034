"""The engine generates the codes of `HiggsAudioModel.generate`, whatever else it runs."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from higgs_model.engine import Engine, EngineSettings, FinishReason
from higgs_model.engine import engine as engine_module
from higgs_model.engine.attention_paged import PagedAttention
from higgs_model.engine.early_stopping import EarlyStoppingLimits
from higgs_model.errors import BadConfig, BadInput
from higgs_model.sampling import SamplingParams
from tests import builders
from tests.builders import OUT, OUT_BOS, K
from tests.higgs_model.engine import helpers

NO_EARLY_STOPPING = EarlyStoppingLimits(loop_frames=None)


def make_engine(network, **settings):
    return Engine(
        network,
        EngineSettings(
            **{"max_slots": 8, "max_positions": 512, "block_size": 16, "early_stopping": NO_EARLY_STOPPING} | settings
        ),
    )


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=f"request {name}")


@pytest.mark.parametrize("kind", [{}, {"audio_dual_ffn_layers": [1, 2]}, {"audio_adapter_type": "stack"}])
@pytest.mark.parametrize("endless", [False, True])
def test_codes_equal_those_of_generate(kind, endless):
    network = helpers.make_network(endless=endless, **kind)
    requests = helpers.mixed_requests(16)
    actual, reasons = helpers.run(make_engine(network), requests)
    assert_same(actual, {request.id: helpers.generate(network, request) for request in requests})
    if endless:
        assert {actual[str(n)].shape for n in range(0, 16, 4)} == {(K, 40)}
        assert {reasons[str(n)] for n in range(0, 16, 4)} == {FinishReason.LENGTH}


def test_network_variants_generate_the_same_codes_as_generate():
    network = helpers.make_network(audio_embed_avg=True, use_audio_out_embed_projector=True, endless=True)
    requests = helpers.mixed_requests(4)
    actual, _ = helpers.run(make_engine(network), requests)
    assert_same(actual, {request.id: helpers.generate(network, request) for request in requests})


def test_codes_do_not_depend_on_concurrent_requests():
    network = helpers.make_network(endless=True)
    requests = [helpers.make_request(n, clip=5 + n, max_frames=20 + 9 * (n % 7)) for n in range(33)]
    concurrent, _ = helpers.run(make_engine(network, max_slots=32), requests)
    for request in requests[:8]:
        assert_same(helpers.run(make_engine(network), [request])[0], {request.id: concurrent[request.id]})


def test_preemption_does_not_change_codes():
    network = helpers.make_network(endless=True)
    requests = helpers.mixed_requests(12, stream_every=5, max_frames=60)
    expected, _ = helpers.run(make_engine(network), requests)
    for look_ahead in (0, 1):
        preempting = make_engine(network, num_blocks=21, look_ahead=look_ahead)
        actual, _ = helpers.run(preempting, requests)
        assert preempting.scheduler.counters.preemptions > 2
        assert preempting.pool.used == 0
        assert_same(actual, expected)


def test_preemption_at_any_step_does_not_change_codes():
    network = helpers.make_network(endless=True)
    requests = helpers.mixed_requests(6, stream_every=3)
    expected, _ = helpers.run(make_engine(network), requests)
    random = np.random.default_rng(0)

    def preempt_at_random(engine, step):
        if step < 400 and engine.scheduler.running and random.random() < 0.2:
            victim = random.choice(list(engine.scheduler.running.values()))
            engine.runner.stop(victim.slot)
            engine.scheduler.preempt(victim)

    actual, _ = helpers.run(make_engine(network), requests, after_step=preempt_at_random)
    assert_same(actual, expected)


def test_shared_prefix_is_computed_once_and_does_not_change_codes():
    network = helpers.make_network(endless=True)
    requests = [helpers.make_request(n, voice=n % 2, tokens=40, clip=60, max_frames=30) for n in range(10)]
    separate = {request.id: helpers.run(make_engine(network), [request])[0][request.id] for request in requests}
    queued = make_engine(network, max_slots=3)
    actual, _ = helpers.run(queued, requests)
    assert_same(actual, separate)
    # The 92 positions that requests with one voice share have five full blocks, each computed once, even when all
    # requests start at the same time.
    assert queued.scheduler.counters.shared_positions == (10 - 2) * 5 * 16
    concurrent = make_engine(network, max_slots=10)
    assert_same(helpers.run(concurrent, requests)[0], separate)
    assert concurrent.scheduler.counters.shared_positions == (10 - 2) * 5 * 16
    assert concurrent.metrics.prefill_positions == queued.metrics.prefill_positions
    assert queued.pool.used == concurrent.pool.used == 0


def test_prefill_budget_does_not_change_codes():
    network = helpers.make_network(endless=True)
    requests = helpers.mixed_requests(8)
    expected, _ = helpers.run(make_engine(network), requests)
    for budget in (1, 16, 50, 1000):
        actual, _ = helpers.run(make_engine(network, prefill_positions=budget, idle_prefill_positions=budget), requests)
        assert_same(actual, expected)


def use_paged_attention(monkeypatch, kernels=None):
    """Use the attention of CUDA devices on the CPU."""
    chosen = None if kernels is None else (kernels, kernels)
    monkeypatch.setattr(engine_module, "ContiguousAttention", lambda **shape: PagedAttention(**shape, kernels=chosen))


@pytest.mark.parametrize("paged", [False, True])
def test_unwritten_memory_is_never_read(monkeypatch, paged):
    network = helpers.make_network(endless=True)
    requests = [
        *helpers.mixed_requests(6),
        *(helpers.make_request(20 + n, voice=1, tokens=40, clip=60) for n in range(2)),
    ]
    expected, _ = helpers.run(make_engine(network), requests)
    if paged:
        use_paged_attention(monkeypatch)
    poisoned = make_engine(network, max_slots=3)
    for name in ("_pool",) if paged else ("_pool", "_slots"):
        getattr(poisoned.runner.attention, name).fill_(float("nan"))
    actual, _ = helpers.run(poisoned, requests)
    assert_same(actual, expected)


def test_paged_attention_generates_the_same_codes(monkeypatch):
    """Also with preemption and shared prefixes."""
    network = helpers.make_network(endless=True)
    requests = [
        *helpers.mixed_requests(8),
        *(helpers.make_request(20 + n, voice=1, tokens=40, clip=60) for n in range(4)),
    ]
    expected, _ = helpers.run(make_engine(network), requests)
    use_paged_attention(monkeypatch)
    for chosen in ({}, {"num_blocks": 24, "look_ahead": 1, "row_buckets": (1, 2, 4, 8)}):
        actual, _ = helpers.run(make_engine(network, **chosen), requests)
        assert_same(actual, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles for it: see test_gpu")
def test_triton_kernels_generate_the_same_codes(monkeypatch):
    """In Triton's interpreter, with prompts in several spans and a shared prefix."""
    pytest.importorskip("triton", reason="Triton is available on Linux only")
    from higgs_model.engine.kernels_triton import TritonKernels

    network = helpers.make_network(endless=True)
    requests = [helpers.make_request(n, voice=n % 2, tokens=20, clip=20, max_frames=3) for n in (1, 3)]
    expected, _ = helpers.run(make_engine(network), requests)
    use_paged_attention(monkeypatch, TritonKernels(tile=32))
    actual, _ = helpers.run(make_engine(network, max_slots=2, idle_prefill_positions=32), requests)
    assert_same(actual, expected)


def test_text_before_audio_equals_generate():
    network = helpers.make_network()
    requests = [
        helpers.make_request(n, end=7, sampling=SamplingParams(do_sample=True, temperature=2.0))
        for n in range(100, 112)
    ]
    expected = {request.id: helpers.generate(network, request, steps=100) for request in requests}
    actual, reasons = helpers.run(make_engine(network), requests)
    assert {reasons[name] for name in actual if actual[name].shape[1]} == {FinishReason.STOP}
    assert sum(frames.shape[1] > 0 for frames in actual.values()) >= 2
    assert_same(actual, {name: expected[name][:, : actual[name].shape[1]] for name in expected})
    actual, _ = helpers.run(make_engine(network, max_slots=2, num_blocks=14), requests)
    assert_same(actual, {name: expected[name][:, : actual[name].shape[1]] for name in expected})


def test_text_and_audio_requests_run_concurrently():
    network = helpers.make_network(endless=True)
    text_sampling = SamplingParams(do_sample=True, temperature=2.0)
    requests = [
        helpers.make_request(n, end=7, sampling=text_sampling, max_frames=12)
        if n % 2
        else helpers.make_request(n, max_frames=12)
        for n in range(10)
    ]
    separate = {request.id: helpers.run(make_engine(network), [request])[0][request.id] for request in requests}
    for chosen in ({}, {"max_slots": 3, "num_blocks": 12}):
        assert_same(helpers.run(make_engine(network, **chosen), requests)[0], separate)


PROTOTYPES = [
    helpers.make_request(n, tokens=8 + 5 * n, clip=4 + 7 * n, voice=n % 2, max_frames=12 + 4 * n) for n in range(6)
]
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5)),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 40)),
        st.tuples(st.just("preempt"), st.integers(0, 7)),
    ),
    min_size=5,
    max_size=30,
)


@pytest.fixture(scope="module")
def reference_codes():
    network = helpers.make_network(endless=True)
    return network, {request.id: helpers.run(make_engine(network), [request])[0][request.id] for request in PROTOTYPES}


class Driver:
    """Applies arbitrary operations to an engine, whose requests are `PROTOTYPES` with new ids."""

    def __init__(self, engine):
        self.engine, self.parts, self.reasons, self.prototypes = engine, {}, {}, {}

    def add(self, number):
        name = str(len(self.prototypes))
        self.prototypes[name] = PROTOTYPES[number].id
        every = None if number % 2 else 1 + number
        request = dataclasses.replace(PROTOTYPES[number], id=name, stream_every=every, priority=number % 3)
        self.engine.add(request)

    def step(self, count=1):
        for _ in range(count):
            for update in self.engine.step():
                self.parts.setdefault(update.request_id, []).append(update.frames)
                if update.finish_reason:
                    assert update.request_id not in self.reasons
                    self.reasons[update.request_id] = update.finish_reason

    def cancel(self, number):
        self.engine.cancel(str(number))

    def preempt(self, slot):
        if slot in self.engine.scheduler.running:
            self.engine.runner.stop(slot)
            self.engine.scheduler.preempt(self.engine.scheduler.running[slot])


@settings(max_examples=8, deadline=None)
@given(operations=OPERATIONS, slots=st.integers(1, 4), look_ahead=st.integers(0, 2))
def test_codes_do_not_depend_on_any_sequence_of_events(reference_codes, operations, slots, look_ahead):
    network, expected = reference_codes
    driver = Driver(make_engine(network, max_slots=slots, num_blocks=16, look_ahead=look_ahead))
    for operation, number in operations:
        getattr(driver, operation)(number)
    for _ in range(10_000):
        if not driver.engine.has_work:
            break
        driver.step()
    assert driver.reasons.keys() == driver.prototypes.keys()
    for name, prototype in driver.prototypes.items():
        actual = np.concatenate(driver.parts[name], axis=1)
        cancelled = driver.reasons[name] is FinishReason.CANCELLED
        np.testing.assert_array_equal(
            actual, expected[prototype][:, : actual.shape[1]] if cancelled else expected[prototype]
        )
    assert driver.engine.pool.used == driver.engine.scheduler.waiting == 0
    assert not driver.engine.scheduler.running
    assert not driver.engine.runner.state.active.any()


def test_decoding_does_not_wait_for_long_prompts():
    engine = make_engine(helpers.make_network(endless=True), prefill_positions=16)
    engine.add(helpers.make_request(0, stream_every=1, max_frames=40))
    while not any(update.frames.shape[1] for update in engine.step()):
        pass
    engine.add(helpers.make_request(1, tokens=100, clip=200, max_frames=5))
    already_computed = engine.metrics.prefill_positions
    for _ in range(15):
        assert [update.frames.shape[1] for update in engine.step() if update.request_id == "0"] == [1]
    assert 0 < engine.metrics.prefill_positions - already_computed <= 15 * 16


def test_stalled_request_frees_its_slot(monkeypatch):
    engine = make_engine(
        helpers.make_network(endless=True), early_stopping=dataclasses.replace(NO_EARLY_STOPPING, stalled_steps=20)
    )
    expected, _ = helpers.run(engine, [helpers.make_request(0)])
    plan_prefill = engine.scheduler.plan_prefill

    def plan_prefill_without_request_1():
        return [(sequence, span) for sequence, span in plan_prefill() if sequence.request.id != "1"]

    monkeypatch.setattr(engine.scheduler, "plan_prefill", plan_prefill_without_request_1)
    actual, reasons = helpers.run(engine, [helpers.make_request(0), helpers.make_request(1)])
    assert reasons == {"0": FinishReason.LENGTH, "1": FinishReason.STALLED}
    assert_same({"0": actual["0"]}, expected)
    assert engine.pool.used == 0


def test_snapshot_reports_what_the_engine_did():
    engine = make_engine(helpers.make_network(endless=True), max_slots=3, num_blocks=40)
    requests = [helpers.make_request(n, voice=1, tokens=30, clip=40, sampling=SamplingParams()) for n in range(7)]
    for request in requests:
        engine.add(request)
    snapshots = []
    while engine.has_work:
        engine.step()
        snapshots.append(engine.snapshot())
    assert {type(value) for snapshot in snapshots for value in snapshot.values()} <= {int, float}
    assert snapshots[0] | {"requests": 7, "queued": 4, "running": 3, "slots": 3, "kv_blocks": 39} == snapshots[0]
    assert max(snapshot["kv_blocks_shared"] for snapshot in snapshots) >= 3
    assert max(snapshot["kv_blocks_used"] for snapshot in snapshots) <= 39
    last = snapshots[-1]
    assert last["queued"] == last["running"] == last["kv_blocks_used"] == last["text_tokens"] == 0
    assert last["finished_length"] == 7
    assert last["decode_frames"] == 7 * (40 + K - 1)
    assert last["preemptions"] == engine.scheduler.counters.preemptions
    assert last["prefill_positions"] + last["shared_positions"] >= sum(len(request.input_ids) for request in requests)
    assert 1 <= last["prefill_passes"] < 20
    assert 0.5 < last["occupancy"] <= 1
    assert last["audio_s_per_s"] == pytest.approx(last["frames_per_s"] / 25)
    assert 0 < last["first_frame_s_median"] <= last["first_frame_s_p95"]


def test_frames_are_streamed_as_soon_as_they_are_final():
    engine = make_engine(helpers.make_network(endless=True))
    engine.add(helpers.make_request(4, stream_every=1, max_frames=10))
    counts = []
    while engine.has_work:
        counts.append(sum(update.frames.shape[1] for update in engine.step()))
    # One step prefills and samples the first frame; a frame is complete K − 1 steps later because of the delay pattern.
    assert counts[: K - 1] == [0] * (K - 1)
    assert counts[K - 1 :] == [1] * 10


def test_lower_priority_value_runs_first():
    engine = make_engine(helpers.make_network(endless=True), max_slots=1)
    for number in range(4):
        engine.add(helpers.make_request(number, max_frames=5, priority=0 if number == 3 else 1))
    finished = []
    while engine.has_work:
        finished += [update.request_id for update in engine.step() if update.finish_reason]
    assert finished == ["3", "0", "1", "2"]


def test_cancelled_requests_finish_at_once():
    engine = make_engine(helpers.make_network(endless=True), max_slots=2)
    requests = [helpers.make_request(n, max_frames=50, sampling=SamplingParams()) for n in range(4)]
    expected, _ = helpers.run(make_engine(helpers.make_network(endless=True)), requests)

    def cancel(engine, step):
        if step == 10:
            engine.cancel("0")
            engine.cancel("3")
            engine.cancel("no such request")

    actual, reasons = helpers.run(engine, requests, after_step=cancel)
    assert [reasons[str(n)].value for n in range(4)] == ["cancelled", "length", "length", "cancelled"]
    assert_same({n: actual[n] for n in "12"}, {n: expected[n] for n in "12"})
    assert engine.pool.used == 0
    assert not engine.scheduler.running


def test_non_finite_logits_end_the_request():
    network = helpers.make_network(endless=True)
    with torch.no_grad():
        network.audio_decoder_proj.audio_lm_head.weight[3, 5] = float("nan")
    _, reasons = helpers.run(make_engine(network), [helpers.make_request(1)])
    assert reasons == {"1": FinishReason.INVALID}


def test_looping_clip_is_ended():
    network = helpers.make_network(endless=True)
    with torch.no_grad():
        network.audio_codebook_embeddings.weight.zero_()  # Without input or memory, it repeats itself.
        for layer in network.layers:
            layer.self_attn.o_proj.weight.zero_()
    requests = [helpers.make_request(4, max_frames=400)]
    unlimited, _ = helpers.run(make_engine(network), requests)
    actual, reasons = helpers.run(
        make_engine(network, early_stopping=EarlyStoppingLimits(loop_frames=60, loop_period=20)), requests
    )
    assert reasons == {"4": FinishReason.LOOP}
    assert 60 <= actual["4"].shape[1] < 400
    np.testing.assert_array_equal(actual["4"], unlimited["4"][:, : actual["4"].shape[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": ()}, "the prompt is empty"),
        ({"input_ids": (3, 999, OUT_BOS)}, "token ids range from 3 to 999, the vocabulary from 0 to 159"),
        ({"input_ids": (3, OUT, OUT_BOS)}, "1 placeholders for 2 clips"),
        (
            {"clips": (np.zeros((K, 3), np.int64), np.full((K, 3), 24))},
            "clip 1 has codes from 24 to 24; expected 0 to 23",
        ),
        ({"clips": (np.zeros((K, 3)), np.zeros((K, 3), np.int64))}, "clip 0 is float64"),
        ({"seed": 2**63}, "seed=9223372036854775808 does not fit into 64 bits"),
        ({"max_frames": 0}, "max_frames=0 is not positive"),
        ({"max_frames": 900}, "exceed the engine's 512 positions; shorten the prompt or lower max_frames=900"),
        ({"sampling": SamplingParams(ras_win_len=99)}, "ras_win_len=99 exceeds the engine's max_ras_win_len=32"),
    ],
)
def test_impossible_requests_are_refused_with_a_clear_message(change, message):
    engine = make_engine(helpers.make_network(endless=True))
    engine.add(helpers.make_request(1))
    with pytest.raises(BadInput, match=f"request '2': .*{message}"):
        engine.add(dataclasses.replace(helpers.make_request(2), **change))
    with pytest.raises(BadInput, match="a request with this id is already in the engine"):
        engine.add(helpers.make_request(1))
    actual, _ = helpers.run(engine, [])
    assert actual.keys() == {"1"}


@pytest.mark.parametrize(
    "kind",
    [
        {"use_audio_out_self_attention": True},
        {"audio_adapter_type": "dual_ffn_fast_forward", "audio_dual_ffn_layers": [0, 2]},
        {"use_delay_pattern": False},
    ],
)
def test_unsupported_networks_are_refused(kind):
    with pytest.raises(BadConfig, match=r"HiggsAudioModel\.generate does"):
        Engine(builders.model(**kind))
