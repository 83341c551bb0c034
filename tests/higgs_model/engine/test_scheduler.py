"""Admission, prefill planning, block allocation and preemption, without a tensor."""

import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from higgs_model.engine.blocks import BlockPool, hash_blocks
from higgs_model.engine.prompt import ExpandedPrompt
from higgs_model.engine.request import Request
from higgs_model.engine.scheduler import Scheduler
from higgs_model.engine.sequence import Phase, Sequence

SIZE, K = 4, 2
ARRIVALS = itertools.count()


def sequence(length, *, priority=0, voice=0, voice_length=0, max_frames=20):
    """A sequence whose prompt starts with the positions of a voice, followed by its own."""
    arrival = next(ARRIVALS)
    ids = np.concatenate([np.full(min(voice_length, length), voice), 1000 + arrival + np.arange(length)])[:length]
    prompt = ExpandedPrompt(ids, np.full((length, K), -1), np.empty((0, K), np.int64))
    request = Request(str(arrival), (0,), priority=priority, max_frames=max_frames)
    return Sequence(request, prompt, hash_blocks(prompt.content_PC, SIZE), arrival, K)


def scheduler(slots=4, blocks=60, prefill=16, idle=32):
    return Scheduler(BlockPool(blocks, SIZE), max_slots=slots, prefill_positions=prefill, idle_prefill_positions=idle)


def run_prompts(made):
    """Run one prefill pass as the engine does; return the lengths of its spans."""
    list(made.reuse_computed_blocks())
    planned = made.plan_prefill()
    for one, span in planned:
        for index in range(span.start // SIZE, min(span.stop // SIZE, len(one.block_hashes))):
            made.pool.register(one.blocks[index], one.block_hashes[index])
        one.num_computed = span.stop
        if span.stop == len(one.prompt):
            one.phase = Phase.DECODE
    return [span.length for _, span in planned]


def speak(made, one):
    """Run one decode step of a sequence as the engine does; False if it was preempted."""
    made.allocate_blocks(one)
    if one.phase is not Phase.DECODE:
        return False
    one.num_launched += 1
    return True


def admitted(made, count):
    """Admit and remove `count` sequences one after the other; return them in order."""
    order = []
    for _ in range(count):
        one, _ = next(made.admit())
        order.append(one)
        made.remove(one)
    return order


def test_requests_of_one_priority_are_admitted_in_order_of_arrival():
    made = scheduler(slots=1)
    requests = [sequence(5, priority=priority) for priority in (1, 0, 1, 0)]
    for one in requests:
        made.enqueue(one)
    assert admitted(made, 4) == [requests[number] for number in (1, 3, 0, 2)]


def test_low_priority_requests_do_not_starve():
    """However many requests of a higher priority arrive, every eighth slot goes to the oldest one."""
    made = scheduler(slots=1)
    patient = [sequence(5, priority=1) for _ in range(2)]
    for one in patient:
        made.enqueue(one)
    order = []
    for _ in range(32):
        made.enqueue(sequence(5))
        made.enqueue(sequence(5))
        order += admitted(made, 1)
    assert [order.index(one) for one in patient] == [7, 15]


def test_promoted_request_is_not_preempted():
    made = scheduler(slots=2, blocks=7)
    patient = sequence(8, priority=1)
    made.enqueue(patient)
    for _ in range(7):
        made.enqueue(sequence(4))
        admitted(made, 1)
    assert [one for one, _ in made.admit()] == [patient]
    made.enqueue(sequence(4))
    hasty, _ = next(made.admit())
    while {patient.phase, hasty.phase} != {Phase.DECODE}:
        run_prompts(made)
    while speak(made, patient):
        if hasty.phase is Phase.WAITING:
            break
    assert patient.phase is Phase.DECODE


def test_long_prompt_is_not_overtaken():
    made = scheduler(slots=4, blocks=12)
    first, long = sequence(20), sequence(36)
    for one in (first, long, sequence(4), sequence(4)):
        made.enqueue(one)
    assert [one for one, _ in made.admit()] == [first]
    assert made.waiting == 3
    made.remove(first)
    assert next(iter(made.admit()))[0] is long


def test_prefill_budget_between_decode_steps_is_respected():
    made = scheduler(prefill=16, idle=32)
    made.enqueue(sequence(6))
    list(made.admit())
    assert run_prompts(made) == [6]
    for length in (100, 10):
        made.enqueue(sequence(length))
    list(made.admit())
    lengths = [run_prompts(made) for _ in range(8)]
    # The first one is completed before the other gets what is left of the last pass's budget.
    assert lengths == [[16]] * 6 + [[4, 10], []]


def test_prompts_are_prefilled_together_while_nothing_decodes():
    made = scheduler(idle=32)
    for _ in range(4):
        made.enqueue(sequence(8))
    list(made.admit())
    assert run_prompts(made) == [8, 8, 8, 8]


@pytest.mark.parametrize(("speaking", "steps"), [(32, 1), (33, 9), (100, 9)])
def test_few_prompts_are_deferred_while_many_sequences_decode(speaking, steps):
    made = scheduler(slots=120, blocks=600, idle=10_000)
    for _ in range(speaking):
        made.enqueue(sequence(4))
    list(made.admit())
    run_prompts(made)
    made.enqueue(sequence(4))
    list(made.admit())
    waited = next(step for step in itertools.count(1) if run_prompts(made))
    assert waited == steps


def test_enough_prompts_are_prefilled_at_once():
    made = scheduler(slots=120, blocks=600, idle=10_000)
    for _ in range(100):
        made.enqueue(sequence(4))
    list(made.admit())
    run_prompts(made)
    for _ in range(4):
        made.enqueue(sequence(4))
        list(made.admit())
        lengths = run_prompts(made)
    assert lengths == [4, 4, 4, 4]


def test_shared_prefix_of_concurrent_prompts_is_computed_once():
    made = scheduler(slots=8, blocks=200, prefill=100, idle=100)
    for _ in range(6):
        made.enqueue(sequence(30, voice=7, voice_length=22))
    list(made.admit())
    ran = [run_prompts(made) for _ in range(3)]
    assert ran[0] == [30]
    # The voice has five full blocks; the rest of each prompt is its own.
    assert sorted(itertools.chain(*ran[1:])) == [10] * 5
    assert made.counters.shared_positions == 5 * 20
    assert made.pool.shared == 5


class Life(RuleBasedStateMachine):
    """Requests are added, run, preempted and removed in any order."""

    @initialize(slots=st.integers(1, 5), blocks=st.integers(14, 40))
    def begin(self, slots, blocks):
        self.made, self.slots = scheduler(slots=slots, blocks=blocks), slots
        self.everyone = []

    def of(self, data, *phases):
        there = [one for one in self.everyone if one.phase in phases]
        return data.draw(st.sampled_from(there)) if there else None

    @rule(length=st.integers(1, 30), voice=st.integers(0, 1), shared=st.integers(0, 20), priority=st.integers(0, 1))
    def come(self, length, voice, shared, priority):
        self.everyone.append(sequence(length, priority=priority, voice=voice, voice_length=shared))
        self.made.enqueue(self.everyone[-1])

    @rule()
    def admit(self):
        for one, shared in self.made.admit():
            assert list(shared) == list(range(one.num_computed // SIZE))

    @rule()
    def prompts(self):
        run_prompts(self.made)

    @rule(data=st.data())
    def frame(self, data):
        one = self.of(data, Phase.DECODE)
        if one is not None and one.num_launched < 20:
            speak(self.made, one)

    @rule(data=st.data())
    def lose(self, data):
        one = self.of(data, Phase.PREFILL, Phase.DECODE)
        if one is not None:
            self.made.preempt(one)

    @rule(data=st.data())
    def leave(self, data):
        one = self.of(data, Phase.WAITING, Phase.PREFILL, Phase.DECODE)
        if one is not None:
            self.made.remove(one)

    @precondition(lambda self: hasattr(self, "made"))
    @invariant()
    def nothing_is_lost_or_in_two_hands(self):
        running = list(self.made.running.values())
        assert {one.slot for one in running} == self.made.running.keys()
        assert sorted([*self.made.running, *self.made._free_slots]) == list(range(self.slots))
        holders = {}
        for one in running:
            assert len(set(one.blocks)) == len(one.blocks)
            for index, block in enumerate(one.blocks):
                holders.setdefault(block, []).append((one, index))
        assert 0 not in holders
        assert len(holders) == self.made.pool.used
        for shared in holders.values():
            # Only full, final blocks with the same content are shared.
            keys = {one.block_hashes[index] if index < len(one.block_hashes) else id(one) for one, index in shared}
            assert len(keys) == 1
        waiting = {id(one) for one in self.everyone if one.phase is Phase.WAITING}
        assert {id(one) for one in self.made._waiting} == waiting
        assert not any(one.blocks for one in self.everyone if one not in running)

    def teardown(self):
        if hasattr(self, "made"):
            for one in self.everyone:
                if one.phase is not Phase.FINISHED:
                    self.made.remove(one)
            assert self.made.pool.used == self.made.waiting == 0
            assert len(self.made._free_slots) == self.slots


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
