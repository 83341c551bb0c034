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
from higgs_model.engine.watch import WatchLimits
from higgs_model.errors import BadConfig, BadInput
from higgs_model.sampling import SamplingParams
from tests import builders
from tests.builders import OUT, OUT_BOS, K
from tests.higgs_model.engine import requests as asked

NO_WATCH = WatchLimits(loop_frames=None)


def engine(network, **settings):
    return Engine(
        network,
        EngineSettings(**{"max_slots": 8, "max_positions": 512, "block_size": 16, "watch": NO_WATCH} | settings),
    )


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=f"request {name}")


@pytest.mark.parametrize("kind", [{}, {"audio_dual_ffn_layers": [1, 2]}, {"audio_adapter_type": "stack"}])
@pytest.mark.parametrize("endless", [False, True])
def test_codes_equal_those_of_generate(kind, endless):
    network = asked.model(endless=endless, **kind)
    requests = asked.uneven(16)
    found, reasons = asked.run(engine(network), requests)
    assert_same(found, {one.id: asked.plainly(network, one) for one in requests})
    if endless:
        assert {found[str(n)].shape for n in range(0, 16, 4)} == {(K, 40)}
        assert {reasons[str(n)] for n in range(0, 16, 4)} == {FinishReason.LENGTH}


def test_network_variants_generate_the_same_codes_as_generate():
    network = asked.model(audio_embed_avg=True, use_audio_out_embed_projector=True, endless=True)
    requests = asked.uneven(4)
    found, _ = asked.run(engine(network), requests)
    assert_same(found, {one.id: asked.plainly(network, one) for one in requests})


def test_codes_do_not_depend_on_concurrent_requests():
    network = asked.model(endless=True)
    requests = [asked.request(n, clip=5 + n, max_frames=20 + 9 * (n % 7)) for n in range(33)]
    crowd, _ = asked.run(engine(network, max_slots=32), requests)
    for one in requests[:8]:
        assert_same(asked.run(engine(network), [one])[0], {one.id: crowd[one.id]})


def test_preemption_does_not_change_codes():
    network = asked.model(endless=True)
    requests = asked.uneven(12, stream_every=5, max_frames=60)
    wanted, _ = asked.run(engine(network), requests)
    for look_ahead in (0, 1):
        tight = engine(network, num_blocks=21, look_ahead=look_ahead)
        found, _ = asked.run(tight, requests)
        assert tight.scheduler.counters.preemptions > 2
        assert tight.pool.used == 0
        assert_same(found, wanted)


def test_preemption_at_any_step_does_not_change_codes():
    network = asked.model(endless=True)
    requests = asked.uneven(6, stream_every=3)
    wanted, _ = asked.run(engine(network), requests)
    random = np.random.default_rng(0)

    def disturb(running, turn):
        if turn < 400 and running.scheduler.running and random.random() < 0.2:
            victim = random.choice(list(running.scheduler.running.values()))
            running.runner.stop(victim.slot)
            running.scheduler.preempt(victim)

    found, _ = asked.run(engine(network), requests, between=disturb)
    assert_same(found, wanted)


def test_shared_prefix_is_computed_once_and_does_not_change_codes():
    network = asked.model(endless=True)
    requests = [asked.request(n, voice=n % 2, tokens=40, clip=60, max_frames=30) for n in range(10)]
    apart = {one.id: asked.run(engine(network), [one])[0][one.id] for one in requests}
    together = engine(network, max_slots=3)
    found, _ = asked.run(together, requests)
    assert_same(found, apart)
    # Each voice's 92 common positions have five full blocks, each computed once, even when all requests start at once.
    assert together.scheduler.counters.shared_positions == (10 - 2) * 5 * 16
    at_once = engine(network, max_slots=10)
    assert_same(asked.run(at_once, requests)[0], apart)
    assert at_once.scheduler.counters.shared_positions == (10 - 2) * 5 * 16
    assert at_once.metrics.prefill_positions == together.metrics.prefill_positions
    assert together.pool.used == at_once.pool.used == 0


def test_prefill_budget_does_not_change_codes():
    network = asked.model(endless=True)
    requests = asked.uneven(8)
    wanted, _ = asked.run(engine(network), requests)
    for budget in (1, 16, 50, 1000):
        found, _ = asked.run(engine(network, prefill_positions=budget, idle_prefill_positions=budget), requests)
        assert_same(found, wanted)


def paged(monkeypatch, kernels=None):
    """Use the attention of CUDA devices on the CPU."""
    chosen = None if kernels is None else (kernels, kernels)
    monkeypatch.setattr(engine_module, "RowAttention", lambda **shape: PagedAttention(**shape, kernels=chosen))


@pytest.mark.parametrize("over_blocks", [False, True])
def test_unwritten_memory_is_never_read(monkeypatch, over_blocks):
    network = asked.model(endless=True)
    requests = [*asked.uneven(6), *(asked.request(20 + n, voice=1, tokens=40, clip=60) for n in range(2))]
    wanted, _ = asked.run(engine(network), requests)
    if over_blocks:
        paged(monkeypatch)
    poisoned = engine(network, max_slots=3)
    for name in ("_pool",) if over_blocks else ("_pool", "_slots"):
        getattr(poisoned.runner.attention, name).fill_(float("nan"))
    found, _ = asked.run(poisoned, requests)
    assert_same(found, wanted)


def test_paged_attention_generates_the_same_codes(monkeypatch):
    """Also with preemption and shared prefixes."""
    network = asked.model(endless=True)
    requests = [*asked.uneven(8), *(asked.request(20 + n, voice=1, tokens=40, clip=60) for n in range(4))]
    wanted, _ = asked.run(engine(network), requests)
    paged(monkeypatch)
    for chosen in ({}, {"num_blocks": 24, "look_ahead": 1, "row_buckets": (1, 2, 4, 8)}):
        found, _ = asked.run(engine(network, **chosen), requests)
        assert_same(found, wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton compiles for it: see test_gpu")
def test_triton_kernels_generate_the_same_codes(monkeypatch):
    """In Triton's interpreter, with prompts in several spans and a shared prefix."""
    pytest.importorskip("triton", reason="Triton is available on Linux only")
    from higgs_model.engine.kernels_triton import TritonKernels

    network = asked.model(endless=True)
    requests = [asked.request(n, voice=n % 2, tokens=20, clip=20, max_frames=3) for n in (1, 3)]
    wanted, _ = asked.run(engine(network), requests)
    paged(monkeypatch, TritonKernels(tile=32))
    found, _ = asked.run(engine(network, max_slots=2, idle_prefill_positions=32), requests)
    assert_same(found, wanted)


def test_text_before_audio_equals_generate():
    network = asked.model()
    requests = [
        asked.request(n, end=7, sampling=SamplingParams(do_sample=True, temperature=2.0)) for n in range(100, 112)
    ]
    wanted = {one.id: asked.plainly(network, one, steps=100) for one in requests}
    found, reasons = asked.run(engine(network), requests)
    assert {reasons[name] for name in found if found[name].shape[1]} == {FinishReason.STOP}
    assert sum(frames.shape[1] > 0 for frames in found.values()) >= 2
    assert_same(found, {name: wanted[name][:, : found[name].shape[1]] for name in wanted})
    found, _ = asked.run(engine(network, max_slots=2, num_blocks=14), requests)
    assert_same(found, {name: wanted[name][:, : found[name].shape[1]] for name in wanted})


def test_text_and_audio_requests_run_concurrently():
    network = asked.model(endless=True)
    talk = SamplingParams(do_sample=True, temperature=2.0)
    requests = [
        asked.request(n, end=7, sampling=talk, max_frames=12) if n % 2 else asked.request(n, max_frames=12)
        for n in range(10)
    ]
    apart = {one.id: asked.run(engine(network), [one])[0][one.id] for one in requests}
    for chosen in ({}, {"max_slots": 3, "num_blocks": 12}):
        assert_same(asked.run(engine(network, **chosen), requests)[0], apart)


KINDS = [asked.request(n, tokens=8 + 5 * n, clip=4 + 7 * n, voice=n % 2, max_frames=12 + 4 * n) for n in range(6)]
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5)),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 40)),
        st.tuples(st.just("lose"), st.integers(0, 7)),
    ),
    min_size=5,
    max_size=30,
)


@pytest.fixture(scope="module")
def alone():
    network = asked.model(endless=True)
    return network, {one.id: asked.run(engine(network), [one])[0][one.id] for one in KINDS}


class Life:
    """Applies arbitrary operations to an engine; requests are `KINDS` with new ids."""

    def __init__(self, running):
        self.running, self.parts, self.reasons, self.kinds = running, {}, {}, {}

    def add(self, number):
        name = str(len(self.kinds))
        self.kinds[name] = KINDS[number].id
        every = None if number % 2 else 1 + number
        request = dataclasses.replace(KINDS[number], id=name, stream_every=every, priority=number % 3)
        self.running.add(request)

    def step(self, count=1):
        for _ in range(count):
            for update in self.running.step():
                self.parts.setdefault(update.request_id, []).append(update.frames)
                if update.finish_reason:
                    assert update.request_id not in self.reasons
                    self.reasons[update.request_id] = update.finish_reason

    def cancel(self, number):
        self.running.cancel(str(number))

    def lose(self, slot):
        if slot in self.running.scheduler.running:
            self.running.runner.stop(slot)
            self.running.scheduler.preempt(self.running.scheduler.running[slot])


@settings(max_examples=8, deadline=None)
@given(operations=OPERATIONS, slots=st.integers(1, 4), look_ahead=st.integers(0, 2))
def test_codes_do_not_depend_on_any_sequence_of_events(alone, operations, slots, look_ahead):
    network, wanted = alone
    life = Life(engine(network, max_slots=slots, num_blocks=16, look_ahead=look_ahead))
    for operation, number in operations:
        getattr(life, operation)(number)
    for _ in range(10_000):
        if not life.running.has_work:
            break
        life.step()
    assert life.reasons.keys() == life.kinds.keys()
    for name, kind in life.kinds.items():
        found = np.concatenate(life.parts[name], axis=1)
        cancelled = life.reasons[name] is FinishReason.CANCELLED
        np.testing.assert_array_equal(found, wanted[kind][:, : found.shape[1]] if cancelled else wanted[kind])
    assert life.running.pool.used == life.running.scheduler.waiting == 0
    assert not life.running.scheduler.running
    assert not life.running.runner.state.active.any()


def test_decoding_does_not_wait_for_long_prompts():
    running = engine(asked.model(endless=True), prefill_positions=16)
    running.add(asked.request(0, stream_every=1, max_frames=40))
    while not any(update.frames.shape[1] for update in running.step()):
        pass
    running.add(asked.request(1, tokens=100, clip=200, max_frames=5))
    before = running.metrics.prefill_positions
    for _ in range(15):
        assert [update.frames.shape[1] for update in running.step() if update.request_id == "0"] == [1]
    assert 0 < running.metrics.prefill_positions - before <= 15 * 16


def test_stalled_request_frees_its_slot(monkeypatch):
    running = engine(asked.model(endless=True), watch=dataclasses.replace(NO_WATCH, stalled_steps=20))
    wanted, _ = asked.run(running, [asked.request(0)])
    inner = running.scheduler.plan_prefill
    monkeypatch.setattr(running.scheduler, "plan_prefill", lambda: [one for one in inner() if one[0].request.id != "1"])
    found, reasons = asked.run(running, [asked.request(0), asked.request(1)])
    assert reasons == {"0": FinishReason.LENGTH, "1": FinishReason.STALLED}
    assert_same({"0": found["0"]}, wanted)
    assert running.pool.used == 0


def test_snapshot_reports_what_the_engine_did():
    running = engine(asked.model(endless=True), max_slots=3, num_blocks=40)
    requests = [asked.request(n, voice=1, tokens=30, clip=40, sampling=SamplingParams()) for n in range(7)]
    for one in requests:
        running.add(one)
    seen = []
    while running.has_work:
        running.step()
        seen.append(running.snapshot())
    assert {type(value) for numbers in seen for value in numbers.values()} <= {int, float}
    assert seen[0] | {"requests": 7, "queued": 4, "running": 3, "slots": 3, "kv_blocks": 39} == seen[0]
    assert max(numbers["kv_blocks_shared"] for numbers in seen) >= 3
    assert max(numbers["kv_blocks_used"] for numbers in seen) <= 39
    last = seen[-1]
    assert last["queued"] == last["running"] == last["kv_blocks_used"] == last["text_tokens"] == 0
    assert last["finished_length"] == 7
    assert last["decode_frames"] == 7 * (40 + K - 1)
    assert last["preemptions"] == running.scheduler.counters.preemptions
    assert last["prefill_positions"] + last["shared_positions"] >= sum(len(one.input_ids) for one in requests)
    assert 1 <= last["prefill_passes"] < 20
    assert 0.5 < last["occupancy"] <= 1
    assert last["audio_s_per_s"] == pytest.approx(last["frames_per_s"] / 25)
    assert 0 < last["first_frame_s_median"] <= last["first_frame_s_p95"]


def test_frames_are_streamed_as_soon_as_they_are_final():
    running = engine(asked.model(endless=True))
    running.add(asked.request(4, stream_every=1, max_frames=10))
    counts = []
    while running.has_work:
        counts.append(sum(update.frames.shape[1] for update in running.step()))
    # One step prefills and samples the first frame; a frame is complete K − 1 steps later because of the delay pattern.
    assert counts[: K - 1] == [0] * (K - 1)
    assert counts[K - 1 :] == [1] * 10


def test_lower_priority_value_runs_first():
    running = engine(asked.model(endless=True), max_slots=1)
    for number in range(4):
        running.add(asked.request(number, max_frames=5, priority=0 if number == 3 else 1))
    ended = []
    while running.has_work:
        ended += [update.request_id for update in running.step() if update.finish_reason]
    assert ended == ["3", "0", "1", "2"]


def test_cancelled_requests_finish_at_once():
    running = engine(asked.model(endless=True), max_slots=2)
    requests = [asked.request(n, max_frames=50, sampling=SamplingParams()) for n in range(4)]
    wanted, _ = asked.run(engine(asked.model(endless=True)), requests)

    def cancel(current, turn):
        if turn == 10:
            current.cancel("0")
            current.cancel("3")
            current.cancel("no such request")

    found, reasons = asked.run(running, requests, between=cancel)
    assert [reasons[str(n)].value for n in range(4)] == ["cancelled", "length", "length", "cancelled"]
    assert_same({n: found[n] for n in "12"}, {n: wanted[n] for n in "12"})
    assert running.pool.used == 0
    assert not running.scheduler.running


def test_non_finite_logits_end_the_request():
    network = asked.model(endless=True)
    with torch.no_grad():
        network.audio_decoder_proj.audio_lm_head.weight[3, 5] = float("nan")
    _, reasons = asked.run(engine(network), [asked.request(1)])
    assert reasons == {"1": FinishReason.INVALID}


def test_looping_clip_is_ended():
    network = asked.model(endless=True)
    with torch.no_grad():
        network.audio_codebook_embeddings.weight.zero_()  # without input or memory, it repeats itself
        for layer in network.layers:
            layer.self_attn.o_proj.weight.zero_()
    greedy = [asked.request(4, max_frames=400)]
    unwatched, _ = asked.run(engine(network), greedy)
    found, reasons = asked.run(engine(network, watch=WatchLimits(loop_frames=60, loop_period=20)), greedy)
    assert reasons == {"4": FinishReason.LOOP}
    assert 60 <= found["4"].shape[1] < 400
    np.testing.assert_array_equal(found["4"], unwatched["4"][:, : found["4"].shape[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": ()}, "the prompt is empty"),
        ({"input_ids": (3, 999, OUT_BOS)}, "token ids range from 3 to 999, the vocabulary from 0 to 159"),
        ({"input_ids": (3, OUT, OUT_BOS)}, "1 placeholders for 2 clips"),
        (
            {"clips": (np.zeros((K, 3), np.int64), np.full((K, 3), 24))},
            "clip 1 has codes from 24 to 24; wanted 0 to 23",
        ),
        ({"clips": (np.zeros((K, 3)), np.zeros((K, 3), np.int64))}, "clip 0 is float64"),
        ({"seed": 2**63}, "seed=9223372036854775808 does not fit into 64 bits"),
        ({"max_frames": 0}, "max_frames=0 is not positive"),
        ({"max_frames": 900}, "exceed the engine's 512 positions; shorten the prompt or lower max_frames=900"),
        ({"sampling": SamplingParams(ras_win_len=99)}, "ras_win_len=99 exceeds the engine's max_ras_win_len=32"),
    ],
)
def test_impossible_requests_are_refused_with_a_clear_message(change, message):
    running = engine(asked.model(endless=True))
    running.add(asked.request(1))
    with pytest.raises(BadInput, match=f"request '2': .*{message}"):
        running.add(dataclasses.replace(asked.request(2), **change))
    with pytest.raises(BadInput, match="a request with this id is already running"):
        running.add(asked.request(1))
    found, _ = asked.run(running, [])
    assert found.keys() == {"1"}


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
