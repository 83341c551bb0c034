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


def make_sequence(length, *, priority=0, voice=0, voice_length=0, max_frames=20):
    """Return a sequence whose prompt starts with the positions of a voice, followed by its own."""
    arrival = next(ARRIVALS)
    ids = np.concatenate([np.full(min(voice_length, length), voice), 1000 + arrival + np.arange(length)])[:length]
    prompt = ExpandedPrompt(ids, np.full((length, K), -1), np.empty((0, K), np.int64))
    request = Request(str(arrival), (0,), priority=priority, max_frames=max_frames)
    return Sequence(request, prompt, hash_blocks(prompt.content_PC, SIZE), arrival, K)


def make_scheduler(slots=4, blocks=60, prefill=16, idle=32):
    return Scheduler(BlockPool(blocks, SIZE), max_slots=slots, prefill_positions=prefill, idle_prefill_positions=idle)


def run_prefill(scheduler):
    """Run one prefill pass as the engine does; return the lengths of its spans."""
    list(scheduler.reuse_computed_blocks())
    planned = scheduler.plan_prefill()
    for sequence, span in planned:
        for index in range(span.start // SIZE, min(span.stop // SIZE, len(sequence.block_hashes))):
            scheduler.pool.register(sequence.blocks[index], sequence.block_hashes[index])
        sequence.num_computed = span.stop
        if span.stop == len(sequence.prompt):
            sequence.phase = Phase.DECODE
    return [span.length for _, span in planned]


def run_decode_step(scheduler, sequence):
    """Run one decode step of a sequence as the engine does; False if it was preempted."""
    scheduler.allocate_blocks(sequence)
    if sequence.phase is not Phase.DECODE:
        return False
    sequence.num_launched += 1
    return True


def admit_and_remove(scheduler, count):
    """Admit and remove `count` sequences one after the other; return them in order."""
    order = []
    for _ in range(count):
        sequence, _ = next(scheduler.admit())
        order.append(sequence)
        scheduler.remove(sequence)
    return order


def test_requests_of_one_priority_are_admitted_in_order_of_arrival():
    scheduler = make_scheduler(slots=1)
    requests = [make_sequence(5, priority=priority) for priority in (1, 0, 1, 0)]
    for sequence in requests:
        scheduler.enqueue(sequence)
    assert admit_and_remove(scheduler, 4) == [requests[number] for number in (1, 3, 0, 2)]


def test_low_priority_requests_do_not_starve():
    """However many requests of a higher priority arrive, every eighth slot goes to the oldest sequence."""
    scheduler = make_scheduler(slots=1)
    low_priority = [make_sequence(5, priority=1) for _ in range(2)]
    for sequence in low_priority:
        scheduler.enqueue(sequence)
    order = []
    for _ in range(32):
        scheduler.enqueue(make_sequence(5))
        scheduler.enqueue(make_sequence(5))
        order += admit_and_remove(scheduler, 1)
    assert [order.index(sequence) for sequence in low_priority] == [7, 15]


def test_promoted_request_is_not_preempted():
    scheduler = make_scheduler(slots=2, blocks=7)
    low_priority = make_sequence(8, priority=1)
    scheduler.enqueue(low_priority)
    for _ in range(7):
        scheduler.enqueue(make_sequence(4))
        admit_and_remove(scheduler, 1)
    assert [sequence for sequence, _ in scheduler.admit()] == [low_priority]
    scheduler.enqueue(make_sequence(4))
    newcomer, _ = next(scheduler.admit())
    while {low_priority.phase, newcomer.phase} != {Phase.DECODE}:
        run_prefill(scheduler)
    while run_decode_step(scheduler, low_priority):
        if newcomer.phase is Phase.WAITING:
            break
    assert low_priority.phase is Phase.DECODE


def test_long_prompt_is_not_overtaken():
    scheduler = make_scheduler(slots=4, blocks=12)
    first, long = make_sequence(20), make_sequence(36)
    for sequence in (first, long, make_sequence(4), make_sequence(4)):
        scheduler.enqueue(sequence)
    assert [sequence for sequence, _ in scheduler.admit()] == [first]
    assert scheduler.waiting == 3
    scheduler.remove(first)
    assert next(iter(scheduler.admit()))[0] is long


def test_prefill_budget_between_decode_steps_is_respected():
    scheduler = make_scheduler(prefill=16, idle=32)
    scheduler.enqueue(make_sequence(6))
    list(scheduler.admit())
    assert run_prefill(scheduler) == [6]
    for length in (100, 10):
        scheduler.enqueue(make_sequence(length))
    list(scheduler.admit())
    lengths = [run_prefill(scheduler) for _ in range(8)]
    # The first sequence is completed before the other gets what is left of the last pass's budget.
    assert lengths == [[16]] * 6 + [[4, 10], []]


def test_prompts_are_prefilled_together_while_nothing_decodes():
    scheduler = make_scheduler(idle=32)
    for _ in range(4):
        scheduler.enqueue(make_sequence(8))
    list(scheduler.admit())
    assert run_prefill(scheduler) == [8, 8, 8, 8]


@pytest.mark.parametrize(("decoding", "steps"), [(32, 1), (33, 9), (100, 9)])
def test_few_prompts_are_deferred_while_many_sequences_decode(decoding, steps):
    scheduler = make_scheduler(slots=120, blocks=600, idle=10_000)
    for _ in range(decoding):
        scheduler.enqueue(make_sequence(4))
    list(scheduler.admit())
    run_prefill(scheduler)
    scheduler.enqueue(make_sequence(4))
    list(scheduler.admit())
    first_prefill = next(step for step in itertools.count(1) if run_prefill(scheduler))
    assert first_prefill == steps


def test_enough_prompts_are_prefilled_at_once():
    scheduler = make_scheduler(slots=120, blocks=600, idle=10_000)
    for _ in range(100):
        scheduler.enqueue(make_sequence(4))
    list(scheduler.admit())
    run_prefill(scheduler)
    for _ in range(4):
        scheduler.enqueue(make_sequence(4))
        list(scheduler.admit())
        lengths = run_prefill(scheduler)
    assert lengths == [4, 4, 4, 4]


def test_shared_prefix_of_concurrent_prompts_is_computed_once():
    scheduler = make_scheduler(slots=8, blocks=200, prefill=100, idle=100)
    for _ in range(6):
        scheduler.enqueue(make_sequence(30, voice=7, voice_length=22))
    list(scheduler.admit())
    spans = [run_prefill(scheduler) for _ in range(3)]
    assert spans[0] == [30]
    # The voice has five full blocks; the rest of each prompt is its own.
    assert sorted(itertools.chain(*spans[1:])) == [10] * 5
    assert scheduler.counters.shared_positions == 5 * 20
    assert scheduler.pool.shared == 5


class SchedulerMachine(RuleBasedStateMachine):
    """Requests are added, run, preempted and removed in any order."""

    @initialize(slots=st.integers(1, 5), blocks=st.integers(14, 40))
    def create_scheduler(self, slots, blocks):
        self.scheduler, self.slots = make_scheduler(slots=slots, blocks=blocks), slots
        self.sequences = []

    def draw_sequence(self, data, *phases):
        candidates = [sequence for sequence in self.sequences if sequence.phase in phases]
        return data.draw(st.sampled_from(candidates)) if candidates else None

    @rule(length=st.integers(1, 30), voice=st.integers(0, 1), shared=st.integers(0, 20), priority=st.integers(0, 1))
    def add_request(self, length, voice, shared, priority):
        self.sequences.append(make_sequence(length, priority=priority, voice=voice, voice_length=shared))
        self.scheduler.enqueue(self.sequences[-1])

    @rule()
    def admit(self):
        for sequence, shared in self.scheduler.admit():
            assert list(shared) == list(range(sequence.num_computed // SIZE))

    @rule()
    def prefill(self):
        run_prefill(self.scheduler)

    @rule(data=st.data())
    def decode(self, data):
        sequence = self.draw_sequence(data, Phase.DECODE)
        if sequence is not None and sequence.num_launched < 20:
            run_decode_step(self.scheduler, sequence)

    @rule(data=st.data())
    def preempt(self, data):
        sequence = self.draw_sequence(data, Phase.PREFILL, Phase.DECODE)
        if sequence is not None:
            self.scheduler.preempt(sequence)

    @rule(data=st.data())
    def remove(self, data):
        sequence = self.draw_sequence(data, Phase.WAITING, Phase.PREFILL, Phase.DECODE)
        if sequence is not None:
            self.scheduler.remove(sequence)

    @precondition(lambda self: hasattr(self, "scheduler"))
    @invariant()
    def no_slot_or_block_is_lost_or_owned_twice(self):
        running = list(self.scheduler.running.values())
        assert {sequence.slot for sequence in running} == self.scheduler.running.keys()
        assert sorted([*self.scheduler.running, *self.scheduler._free_slots]) == list(range(self.slots))
        users = {}
        for sequence in running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            for index, block in enumerate(sequence.blocks):
                users.setdefault(block, []).append((sequence, index))
        assert 0 not in users
        assert len(users) == self.scheduler.pool.used
        for shared in users.values():
            # Only full, final blocks with the same content are shared.
            hashes = {
                sequence.block_hashes[index] if index < len(sequence.block_hashes) else id(sequence)
                for sequence, index in shared
            }
            assert len(hashes) == 1
        waiting = {id(sequence) for sequence in self.sequences if sequence.phase is Phase.WAITING}
        assert {id(sequence) for sequence in self.scheduler._waiting} == waiting
        assert not any(sequence.blocks for sequence in self.sequences if sequence not in running)

    def teardown(self):
        if hasattr(self, "scheduler"):
            for sequence in self.sequences:
                if sequence.phase is not Phase.FINISHED:
                    self.scheduler.remove(sequence)
            assert self.scheduler.pool.used == self.scheduler.waiting == 0
            assert len(self.scheduler._free_slots) == self.slots


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
